"""Biases of quantized layers: in float32 where nothing is rounded behind them, and along the columns or not at all."""

from __future__ import annotations

import numpy as np
import pytest
from programs import onnx_runtime, run_program
from quantized_models import check, feeds_of, graph, kernels

from sparsec.loading.load import load_model, model_bytes
from sparsec.lowering import lower
from sparsec.targets import find_target

RNG = np.random.default_rng(4)
W = ", int8[4,6] w = {" + ",".join(map(str, RNG.integers(-127, 128, 24))) + "}, int8 none = {0}, float ws = {0.004}"
LAYER = "x = D(q, s, z)  k = D(w, ws, none)  y = Gemm<transB=1>(x, k, b)"


def numbers(count: int) -> str:
    return ",".join(f"{v:.7f}" for v in RNG.standard_normal(count))


def run(model) -> tuple[np.ndarray, np.ndarray]:
    loaded, feeds = load_model(model), feeds_of(model)
    program = lower(loaded, find_target("host"))
    return run_program(program, feeds)["y"], onnx_runtime(model_bytes(loaded), feeds)["y"]


def test_a_bias_in_float_in_front_of_a_float_result_is_not_rounded() -> None:
    """In units of both scales, 2e-4, it would be off by up to 1e-4."""
    model = graph("uint8[5,6] q", "float[5,4] y", LAYER, f"{W}, float[4] b = {{{numbers(4)}}}")
    got, expected = run(model)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("bias", ["100", "-70000"])
def test_a_bias_of_whole_units_keeps_the_kernel(bias: str) -> None:
    constants = f"{W}, int32[4] bi = {{{bias},1,2,3}}, float bs = {{0.0002}}, int32 bz = {{0}}"
    model = graph("uint8[5,6] q", "float[5,4] y", LAYER.replace("y =", "b = D(bi, bs, bz) y ="), constants)
    assert kernels(check(model)) == kernels(check(graph("uint8[5,6] q", "float[5,4] y", LAYER.replace(", b)", ")"), W)))


def test_a_bias_in_float_in_front_of_a_rounded_result_keeps_the_kernel() -> None:
    model = graph("uint8[5,6] q", "uint8[5,4] r", f"{LAYER}  r = Q(y, s, z)", f"{W}, float[4] b = {{{numbers(4)}}}")
    kernels(check(model))


@pytest.mark.parametrize("shape", ["[4,1]", "[4,4]", "[1,4]", "[4]", "[1,1]", ""])
@pytest.mark.parametrize("rounded", [True, False])
def test_a_matrix_or_a_column_is_no_bias(shape: str, rounded: bool) -> None:
    """[4, 1] beside a result of [4, 4] has as many numbers as columns, along the rows."""
    count = int(np.prod([int(n) for n in shape.strip("[]").split(",") if n], dtype=int))
    value = f"{{{numbers(count)}}}"
    behind = "r = Q(y, s, z) y2 = D(r, s, z)" if rounded else "y2 = Identity(y)"
    model = graph("uint8[4,6] q", "float[4,4] y2", f"{LAYER}  {behind}", f"{W}, float{shape} b = {value}")
    loaded, feeds = load_model(model), feeds_of(model)
    got = run_program(lower(loaded, find_target("host")), feeds)["y2"]
    expected = onnx_runtime(model_bytes(loaded), feeds)["y2"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=0.0501 if rounded else 2e-6)
    assert np.mean(np.abs(got - expected) > 1e-5) < 0.1
