"""Models in float16, compiled as they are: what their results may differ by, and that they do not differ by more."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest

import sparsec
from sparsec.loading.load import load_model
from sparsec.proving.conditioning import Conditioning
from sparsec.proving.parity import Tallies
from sparsec.proving.rounding import HALF_BITS, rounding
from sparsec.proving.tolerance import SIGMAS, behind_half, derive_tolerance, tolerances
from sparsec.targets import find_target

RNG = np.random.default_rng(11)
NET = """g (float16[1,16,8,8] x, float[1,4] z) => (float16[1,8,8,8] y, float[1,8,8,8] a, float[1,4] t) {
    c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) s = Conv(r, v) y = Softmax<axis=1>(s) a = Cast<to=1>(s) t = Tanh(z) }"""


def net() -> onnx.ModelProto:
    made = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {NET}')
    for name, shape in (("w", (32, 16, 3, 3)), ("v", (8, 32, 1, 1))):
        made.graph.initializer.append(onnx.numpy_helper.from_array(RNG.standard_normal(shape).astype(np.float16), name))
    return made


def test_outputs_behind_float16_have_its_tolerance() -> None:
    model = load_model(net())
    assert behind_half(model.graph.outputs) == {"y", "a"}
    found = tolerances(model, find_target("host"))
    assert (
        found["y"] == found["a"] == pytest.approx(4 * 2**-11 * math.sqrt(2 * 3 / 3), rel=1e-2)
    )  # two Conv and a Softmax
    assert found["t"] == pytest.approx(derive_tolerance(model), rel=1e-2)


def test_a_model_in_float16_compiles_with_parity(tmp_path) -> None:
    verification = sparsec.compile(net(), "host", output=tmp_path / "net.sparsec").verify()
    assert verification.passed
    errors = {parity.output: parity.max_relative_error for parity in verification.parity}
    assert errors["y"] > 1e-4  # float16 did the work
    assert errors["t"] < 1e-6


def test_logits_of_many_units_are_held_to_what_float16_makes_of_them() -> None:
    """exp of 100 +- half a unit of float16: a share of the largest probability that no count of operators explains."""
    made = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float16[1,8] x) => (float16[1,8] y) { s = Mul(x, x) y = Softmax(s) }'
    )
    made = onnx.shape_inference.infer_shapes(made)
    x = (100 + RNG.random((1, 8)) / 4).astype(np.float16) ** np.float16(0.5)
    bound = Conditioning(made.SerializeToString()).bounds({"x": x})["y"]
    unit = 2.0**-4 / 8 * 7 / 8  # of 100 in float16, times y (1 - y) of eight that are alike
    assert 0.2 * unit < bound / SIGMAS < 2 * unit
    plain = np.exp(x.astype(np.float64) ** 2 - 100)
    wanted = {"y": (plain / plain.sum()).astype(np.float16)}
    tallies = Tallies({"y": 1e-3}, None, {}, Conditioning(made.SerializeToString()))
    tallies.add({"x": x}, {"y": wanted["y"][:, ::-1].copy()}, wanted)
    assert not tallies.result()[0].passed


def test_what_is_rounded_behind_float16_may_fall_either_way() -> None:
    made = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float16[512] x) => (uint8[512] q) <float s = {0.01}, uint8 o = {128}>
        { t = Tanh(x) w = Cast<to=1>(t) q = QuantizeLinear(w, s, o) }"""
    )
    made = onnx.shape_inference.infer_shapes(made)
    for i, node in enumerate(made.graph.node):
        node.name = f"n{i}"
    law = rounding(made.SerializeToString())
    assert law is not None
    x = RNG.standard_normal(512).astype(np.float16)
    plain = np.round(np.tanh(x.astype(np.float32)) / np.float32(0.01)) + 128
    off = np.mean(law.witness({"x": x})["q"] != plain)
    assert 0.2 * 50 * HALF_BITS < off < 4 * 50 * HALF_BITS  # a value of 0.5 moves by up to that many of 0.01
