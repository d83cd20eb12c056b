"""Products in 8 bits: sums bit by bit against NumPy on every instruction set, sizes around vector, tile and word."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Layer, check_layers, share

from sparsec.kernels import gemm, gemm_int8
from sparsec.kernels.epilogue import NONE, RELU, Activation
from sparsec.kernels.quantized import QuantType, Requantize, reference_requantize
from sparsec.targets import find_target

SUMS = Requantize(None)  # the sums as float32: exact below 2^24
UNSIGNED, SIGNED = QuantType(1.0, 117), QuantType(1.0, -5, "int8")


def operands(m, k, n, x_type):
    """x [m, k] and w [n, k] over their whole range, extremes often; bias [n]."""
    rng = np.random.default_rng([m, k, n])
    low, high = x_type.range
    x = np.where(rng.random((m, k)) < 0.3, rng.choice([low, high], (m, k)), rng.integers(low, high + 1, (m, k)))
    w = np.where(rng.random((n, k)) < 0.3, rng.choice([-128, 127], (n, k)), rng.integers(-128, 128, (n, k)))
    return x.astype(x_type.dtype), w.astype(np.int8), rng.integers(-5000, 5000, n)


def sums(machine, m, k, n, *, x_type=UNSIGNED, tiling=None):
    x, w, bias = operands(m, k, n, x_type)
    call = gemm_int8.bind(machine, m=m, w=w, x=x_type, w_scale=np.ones(1), steps=SUMS, bias=bias, tiling=tiling)
    return Layer(call, gemm_int8.reference(x, w, bias, x_type), 0.5, x=x)


def requantized(machine, m, k, n, steps, x_type=UNSIGNED):
    x, w, bias = operands(m, k, n, x_type)
    scale = np.random.default_rng(n).uniform(2e-5, 2e-4, n)
    low, high = (0, 256) if steps.other_element == "uint8" else (-128, 128)
    other = np.random.default_rng(m).integers(low, high, (m, n)).astype(steps.other_element)
    call = gemm_int8.bind(machine, m=m, w=w, x=x_type, w_scale=scale, steps=steps, bias=bias)
    acc = gemm_int8.reference(x, w, bias, x_type).astype(np.int32)
    expected = reference_requantize(acc, steps.multipliers(x_type, scale), steps, other)
    given = {"x": x, "residual": other} if steps.residual != "none" else {"x": x}
    return Layer(call, expected, 1.5 if steps.y else 1e-4, **given)


def test_sums(dot_target):
    sizes = [(1, 9, n) for n in (1, 3, 4, 7, 16, 17, 33, 150)] + [(2, 8, 37), (5, 7, 10), (7, 12, 70)]
    sizes += [(3, k, 20) for k in (1, 2, 4, 5, 31, 64)] + [(1, 70, 5), (1, 260, 300), (29, 12, 40)]
    cases = [(size, x_type) for size in sizes for x_type in (UNSIGNED, SIGNED)]
    machine = dot_target.machine
    check_layers([sums(machine, *size, x_type=kind) for size, kind in share(cases, dot_target, 3)], dot_target)


def test_every_register_tile(dot_target):
    lanes = dot_target.machine.lanes
    tilings = [gemm.Tiling(r, v, lanes) for r, v in ((1, 1), (3, 2), (2, 1), (1, 8))]
    cases = [sums(dot_target.machine, 7, 27, 5 * lanes + 3, tiling=tiling) for tiling in tilings]
    check_layers(cases, dot_target)


def test_epilogues(dot_target):
    y, s, inner = QuantType(0.05, 3), QuantType(0.07, -5, "int8"), QuantType(0.03, 200)
    silu = Activation("silu")
    kinds = [
        Requantize(y, RELU), Requantize(s), Requantize(s, silu), Requantize(None, RELU),
        Requantize(y, RELU, "before", inner, s), Requantize(s, silu, "after", inner, y), Requantize(None, NONE, "before"),
    ]  # fmt: skip
    cases = [(3, 50, 37, steps) for steps in kinds]
    cases += [(1, 50, 37, kinds[4], SIGNED), (2, 10, 75, kinds[0]), (2, 10, 111, kinds[4])]
    check_layers([requantized(dot_target.machine, *case) for case in share(cases, dot_target, 3)], dot_target)


def test_results_beyond_32_bits_saturate(dot_target):
    n = 70
    w, x = np.full((n, 8), 127, np.int8), np.full((3, 8), 255, np.uint8)
    bias = np.where(np.arange(n) % 2, -(1 << 30), 1 << 30).astype(np.int32)
    call = gemm_int8.bind(
        dot_target.machine, m=3, w=w, x=QuantType(1.0, 0), w_scale=np.full(n, 64.0),
        steps=Requantize(QuantType(1.0, 5)), bias=bias,
    )  # fmt: skip
    expected = np.broadcast_to(np.where(bias > 0, 255, 0), (3, n)).astype(np.float32)
    check_layers([Layer(call, expected, 0.5, x=x)], dot_target)


def test_sums_beyond_32_bits_are_refused():
    machine = find_target("host").machine
    with pytest.raises(ValueError, match="32 bits"):
        gemm_int8.bind(
            machine, m=1, w=np.full((1, 70000), 127, np.int8), x=UNSIGNED, w_scale=np.ones(1), steps=SUMS,
            bias=np.zeros(1),
        )  # fmt: skip


def test_a_single_large_product_splits_over_threads():
    machine = find_target("host").machine
    assert sums(machine, 99, 16, 99).call.tiles >= 4
    assert sums(machine, 1, 64, 1000).call.tiles >= 4


def test_prediction():
    """Four times fewer bytes where the weights' bytes count, and faster than float32 where arithmetic counts."""
    machine = find_target("host", "cascadelake").machine
    assert gemm_int8.predict_us(machine, 64, 256, 256) < 0.5 * gemm.predict_us(machine, 64, 256, 256)
    large = gemm_int8.predict_us(machine, 1, 4096, 4096), gemm.predict_us(machine, 1, 4096, 4096)
    assert large[0] == pytest.approx(large[1] / 4, rel=0.2)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 4), st.sampled_from([4, 8, 16]))
def test_pack_round_trip(n, k, vectors, lanes):
    w = np.random.default_rng(n).integers(-128, 128, (n, k)).astype(np.int8)
    words = gemm_int8.words_of(w)
    tiling = gemm.Tiling(1, vectors, lanes)
    again = gemm_int8.unpack(gemm_int8.pack(words, tiling), n, words.shape[1], tiling)
    np.testing.assert_array_equal(again, words)
    np.testing.assert_array_equal(again.view(np.int8)[:, :k], w)
