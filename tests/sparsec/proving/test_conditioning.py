"""The law for samples in which sums cancel: it is its formula, holds for real roundings, and hides no wrong result."""

from __future__ import annotations

import math
import struct
import subprocess

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import sparsec
from sparsec import compiler
from sparsec.building.emit import HEADER_BYTES
from sparsec.proving.conditioning import RUNS, Conditioning, with_errors
from sparsec.proving.parity import Tallies
from sparsec.proving.tolerance import SIGMAS, UNIT_ROUNDOFF
from sparsec.runtimes.ort import OrtSession

RNG = np.random.default_rng(5)


def model(text: str, **constants: np.ndarray) -> onnx.ModelProto:
    made = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> g {text}')
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    return onnx.shape_inference.infer_shapes(made, strict_mode=True)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def bound(made: onnx.ModelProto, **sample: np.ndarray) -> float:
    return Conditioning(made.SerializeToString()).bounds(sample)["y"]


@pytest.mark.parametrize("drift", [0.0, 3.0])
@pytest.mark.parametrize("k", [32, 512])
def test_a_sum_has_the_variance_of_its_partial_sums(k: int, drift: float) -> None:
    """Terms with and without a common sign, added one by one in float32 in many orders: the error is the law's."""
    w = normal(k, 1) + np.float32(drift)
    x, terms = np.ones((1, k), np.float32), w[:, 0]
    errors = []
    for _ in range(200):
        total = np.float32(0)
        for term in RNG.permutation(terms):
            total = np.float32(total + term)
        errors.append(float(total) - float(terms.astype(np.float64).sum()))
    found = bound(model(f"(float[1,{k}] x) => (float[1,1] y) {{ y = MatMul(x, w) }}", w=w), x=x) / SIGMAS
    assert (
        found / 4 < math.sqrt(np.mean(np.square(errors))) < 2 * found
    )  # of RUNS values, and the real ones are smaller


def test_cancelling_sums_need_more_than_a_share_of_the_result() -> None:
    """x - mean(x), enlarged: float32 is off by as much as the law has it, far more than roundings of the result."""
    k = 256
    w = np.eye(k, dtype=np.float32) - np.float32(1 / k)
    made = model(f"(float[1,{k}] x) => (float[1,{k}] y) {{ y = MatMul(x, w) }}", w=w)
    x = np.float32(1000) + np.float32(0.1) * normal(1, k)
    exact = x.astype(np.float64) @ w.astype(np.float64)
    with OrtSession(made.SerializeToString()) as session:
        off = float(np.abs(session.run({"x": x})["y"] - exact).max())
    found = bound(made, x=x)
    assert found > off
    assert found > 20 * SIGMAS * UNIT_ROUNDOFF * math.sqrt(2 * k) * np.abs(exact).max()
    well = bound(made, x=normal(1, k))
    assert well < SIGMAS * UNIT_ROUNDOFF * math.sqrt(2 * k) * 3  # without a mean nothing cancels


@pytest.mark.parametrize(("k", "every_term"), [(16, True), (1024, False)])
def test_a_bias_is_a_term_of_short_sums_only(k: int, every_term: bool) -> None:
    """Behind a long one it is rounded once, which is less than every term in its size."""
    made = model(
        f"(float[1,{k}] x) => (float[1,8] y) {{ y = Gemm<beta = 2.0>(x, w, b) }}",
        w=normal(k, 8),
        b=np.full(8, 500, "f"),
    )
    found = bound(made, x=np.float32(1e-3) * normal(1, k)) / 1000
    in_its_size = SIGMAS * UNIT_ROUNDOFF * math.sqrt(k / 6)
    assert (found > in_its_size / 3) == every_term
    assert found < 4 * in_its_size


BODIES = {
    "conv": ("float[1,8,9,9] x", "c = Conv<group = 2, pads = [1,1,1,1]>(x, w, b) y = Relu(c)",
             {"w": normal(8, 4, 3, 3), "b": normal(8)}),
    "conv1d": ("float[1,40,9] x", "y = Conv(x, w, b)", {"w": normal(8, 40, 3), "b": normal(8)}),
    "transposed": ("float[1,4,5,5] x", "y = ConvTranspose<strides = [2,2]>(x, w, b)",
                   {"w": normal(4, 6, 3, 3), "b": normal(6)}),
    "gemm": ("float[3,8] x", "y = Gemm<alpha = 0.5, beta = 2.0, transB = 1>(x, w, b)", {"w": normal(5, 8), "b": normal(5)}),
    "matmul": ("float[2,3,4] x", "t = Transpose<perm = [0,2,1]>(x) y = MatMul(x, t)", {}),
    "means": ("float[1,3,8,8] x", "p = AveragePool<kernel_shape = [2,2]>(x) g = GlobalAveragePool(p) y = ReduceMean(g, a)",
              {"a": np.array([1])}),
    "sum": ("float[4,8] x", "y = ReduceSum<keepdims = 0>(x, a)", {"a": np.array([1])}),
    "normalized": ("float[4,8] x", "n = LayerNormalization(x, s) g = Sigmoid(n) y = Softmax(g)", {"s": normal(8)}),
    "gates": ("float[3,1,4] x", "a, y = LSTM<hidden_size = 5>(x, w, r)", {"w": normal(1, 20, 4), "r": normal(1, 20, 5)}),
    "unrounded": ("float[4,8] x", "i = ArgMax(x) f = Cast<to = 1>(i) y = Neg(f)", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_operators_get_errors_of_the_size_of_a_rounding(name: str) -> None:
    inputs, body, constants = BODIES[name]
    made = model(f"({inputs}) => (float[n] y) {{ {body} }}".replace("float[n]", "float" + _shape(name)), **constants)
    sample = {"x": normal(*(d.dim_value for d in made.graph.input[0].type.tensor_type.shape.dim))}
    with OrtSession(made.SerializeToString()) as session:
        y = session.run(sample)["y"]
    found = bound(made, **sample)
    if name == "unrounded":
        assert found == 0
        return
    assert 0.3 * UNIT_ROUNDOFF < found / np.abs(y).max() < 300 * UNIT_ROUNDOFF


def _shape(name: str) -> str:
    shapes = {"conv": "[1,8,9,9]", "conv1d": "[1,8,7]", "transposed": "[1,6,11,11]", "gemm": "[3,5]", "matmul": "[2,3,3]",
              "means": "[1,1,1,1]", "sum": "[4]", "normalized": "[4,8]", "gates": "[1,1,5]", "unrounded": "[1,8]"}  # fmt: skip
    return shapes[name]


def test_errors_are_drawn_anew_and_repeat() -> None:
    made = model("(float[1,64] x) => (float[1,64] y) { y = MatMul(x, w) }", w=normal(64, 64))
    x = normal(1, 64)
    with OrtSession(with_errors(made).SerializeToString(), optimize=False) as session:
        first, second = (session.run({"x": x})["y"] for _ in range(2))
    assert not np.array_equal(first, second)
    assert bound(made, x=x) == bound(made, x=x)
    assert RUNS > 1


def test_a_wrong_result_fails_in_a_cancelling_sample_too() -> None:
    k = 256
    w = np.eye(k, dtype=np.float32) - np.float32(1 / k)
    made = model(f"(float[1,{k}] x) => (float[1,{k}] y) {{ y = MatMul(x, w) }}", w=w)
    law = Conditioning(made.SerializeToString())
    x = np.float32(1000) + np.float32(0.1) * normal(1, k)
    wanted = {"y": (x.astype(np.float64) @ w).astype(np.float32)}
    allowed = law.bounds({"x": x})["y"]
    for off, passes in ((0.5 * allowed, True), (3 * allowed, False)):
        for known, expected in ((law, passes), (None, False)):
            tallies = Tallies({"y": 1e-5}, None, {}, known)
            tallies.add({"x": x}, {"y": wanted["y"] + np.float32(off)}, wanted)
            assert tallies.result()[0].passed == expected
    tallies = Tallies({"y": 1e-5}, None, {}, law)
    tallies.add({"x": x}, {"y": np.full_like(wanted["y"], np.nan)}, wanted)
    assert not tallies.result()[0].passed


@pytest.mark.parametrize("ran", [True, False])
def test_an_artifact_holds_its_own_sample_to_the_same(monkeypatch, ran: bool) -> None:
    """`bench` compares with the tolerance in parity.bin, on devices where nothing else does."""
    k = 256
    w = np.eye(k, dtype=np.float32) - np.float32(1 / k)
    made = model(f"(float[1,{k}] x) => (float[1,{k}] y) {{ y = MatMul(x, w) }}", w=w)
    data = {"x": np.float32(1000) + np.float32(0.1) * normal(1, k)}
    record = {"passed": True, "runtime": "r", "samples": 1, "outputs": [{"output": "y", "tolerance": 0.5}]}
    monkeypatch.setattr(compiler, "_prove", lambda artifact: ([], record) if ran else (["not run"], None))
    artifact = sparsec.compile(made, calibration=data)
    held = struct.unpack_from("<f", (artifact.path / "parity.bin").read_bytes(), HEADER_BYTES)[0]
    if ran:
        assert held == 0.5
    else:
        assert 10 * artifact.manifest["tolerances"]["y"] < held < 0.5
    done = subprocess.run([artifact.path / "bench", "--runs", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
