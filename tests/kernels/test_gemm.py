"""Matrix products against float64: sizes around vector and tile, ragged both ways, batches, transposed operands."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Layer, check_layers

from sparsec.kernels import gemm
from sparsec.kernels.epilogue import NONE, RELU, Activation
from sparsec.targets import find_target

EPS = np.finfo(np.float32).eps


def constant(machine, m, k, n, *, activation=NONE, residual="none", with_bias=True, tiling=None):
    rng = np.random.default_rng([m, k, n])
    x, w = rng.standard_normal((m, k)).astype("f"), rng.standard_normal((n, k)).astype("f")
    bias = rng.standard_normal(n).astype("f") if with_bias else None
    other = rng.standard_normal((m, n)).astype("f")
    call = gemm.bind(machine, m=m, w=w, bias=bias, activation=activation, residual=residual, tiling=tiling)
    expected = gemm.reference(x, w, bias, activation, residual, other)
    tolerance = (k + 4) * EPS * (gemm.reference(np.abs(x), np.abs(w)) + 8)
    given = {"x": x, "residual": other} if residual != "none" else {"x": x}
    return Layer(call, expected, tolerance, **given)


def dynamic(machine, batch, m, k, n, *, transposed=False, a_shared=False, b_shared=False, **options):
    rng = np.random.default_rng([batch, m, k, n])
    a = rng.standard_normal((1 if a_shared else batch, m, k)).astype("f")
    b = rng.standard_normal((1 if b_shared else batch, *((n, k) if transposed else (k, n)))).astype("f")
    call = gemm.bind_matmul(
        machine, batch=batch, m=m, k=k, n=n, transposed=transposed, a_shared=a_shared, b_shared=b_shared, **options
    )
    product = gemm.reference_matmul(a, b, transposed) * options.get("scale", 1.0)
    expected = gemm.reference_finish(product, options.get("activation", NONE))
    tolerance = (k + 4) * EPS * (gemm.reference_matmul(np.abs(a), np.abs(b), transposed) + 1)
    return Layer(call, expected, np.broadcast_to(tolerance, expected.shape), a=a, b=b)


@pytest.mark.parametrize("m", [1, 2, 5, 17])
def test_columns_around_the_vector(target, m):
    sizes = (1, 2, 3, 4, 7, 8, 10, 15, 16, 17, 31, 33, 50, 130)
    check_layers([constant(target.machine, m, 9, n, activation=RELU) for n in sizes], target)


def test_depths_and_rows(target):
    cases = [constant(target.machine, 3, k, 20) for k in (1, 2, 3, 4, 5, 8, 130)]
    cases += [constant(target.machine, m, 12, 40) for m in (4, 8, 13, 14, 29, 100)]
    check_layers(cases, target)


def test_epilogues(target):
    silu, machine = Activation("silu"), target.machine
    check_layers([
        constant(machine, 6, 20, 37, residual="before", activation=silu),
        constant(machine, 6, 20, 37, residual="after", activation=silu),
        constant(machine, 1, 20, 37, residual="before", activation=RELU),
        constant(machine, 5, 20, 37, with_bias=False),
    ], target)  # fmt: skip


def test_every_register_tile(target):
    lanes = target.machine.lanes
    tilings = [gemm.Tiling(r, v, lanes) for r, v in ((1, 1), (3, 2), (4, 1), (2, 4))]
    check_layers([constant(target.machine, 7, 6, 5 * lanes + 3, tiling=tiling) for tiling in tilings], target)


def test_two_activations(target):
    machine = target.machine
    cases = []
    for batch, m, k, n in [(1, 1, 1, 1), (3, 5, 7, 9), (2, 19, 16, 33), (1, 40, 5, 3), (4, 2, 11, 70)]:
        for transposed in (False, True):
            cases.append(dynamic(machine, batch, m, k, n, transposed=transposed))
    turned = [dynamic(machine, batch, 90, 6, n, transposed=True) for batch, n in ((1, 20), (2, 21), (2, 130))]
    assert all(layer.call.tiles > batch for layer, batch in zip(turned, (1, 2, 2), strict=True))  # rows are cut, too
    cases += turned
    cases += [dynamic(machine, 3, 6, 8, 20, a_shared=True), dynamic(machine, 3, 6, 8, 20, b_shared=True)]
    cases += [dynamic(machine, 2, 6, 8, 20, transposed=True, b_shared=True, scale=0.125, activation=RELU)]
    check_layers(cases, target)


def test_a_single_large_product_splits_over_threads():
    machine = find_target("host").machine
    assert dynamic(machine, 1, 99, 16, 99).call.tiles >= 4
    assert constant(machine, 1, 64, 1000).call.tiles >= 4


def test_prediction_grows_with_work_and_favours_full_tiles():
    machine = find_target("host", "x86-64-v4").machine
    assert gemm.predict_us(machine, 64, 256, 256) < gemm.predict_us(machine, 64, 512, 256)
    assert (
        gemm.choose_tiling(machine, 197, 192, 768)[0].rows * gemm.choose_tiling(machine, 197, 192, 768)[0].vectors >= 20
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.sampled_from([4, 8, 16]))
def test_pack_round_trip(n, k, vectors, lanes):
    rng = np.random.default_rng(n)
    w, bias = rng.standard_normal((n, k)).astype("f"), rng.standard_normal(n).astype("f")
    tiling = gemm.Tiling(1, vectors, lanes)
    again, again_bias = gemm.unpack(gemm.pack(w, bias, tiling), n, k, tiling)
    np.testing.assert_array_equal(again, w)
    np.testing.assert_array_equal(again_bias, bias)
