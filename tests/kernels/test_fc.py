"""Block-sparse fully connected layers: every format, densities from nothing to all, rows around the vector width."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Layer, check_layers

from sparsec.kernels import blocks, fc, gemm
from sparsec.kernels.epilogue import NONE, RELU, Activation
from sparsec.targets import find_target

EPS = np.finfo(np.float32).eps


def sparse_weight(n, k, form, density, seed=0):
    """[n, k] with blocks of `form` kept at `density`; "one" keeps a single element."""
    rng = np.random.default_rng([n, k, seed])
    w = rng.standard_normal((n, k)).astype("f")
    if density == "one":
        only = np.zeros_like(w)
        only[n // 2, k // 2] = w[n // 2, k // 2]
        return only
    kept = rng.random((-(-n // form.rows), -(-k // form.columns))) < density
    return w * np.kron(kept, np.ones((form.rows, form.columns)))[:n, :k].astype("f")


def layer(machine, m, k, n, form, density, *, activation=NONE, residual="none", with_bias=True):
    rng = np.random.default_rng([m, k, n])
    x, w = rng.standard_normal((m, k)).astype("f"), sparse_weight(n, k, form, density)
    bias = rng.standard_normal(n).astype("f") if with_bias else None
    other = rng.standard_normal((m, n)).astype("f")
    call = fc.bind(machine, m=m, w=w, form=form, bias=bias, activation=activation, residual=residual)
    expected = gemm.reference(x, w, bias, activation, residual, other)
    tolerance = (k + 4) * EPS * (gemm.reference(np.abs(x), np.abs(w)) + 8)
    given = {"x": x, "residual": other} if residual != "none" else {"x": x}
    return Layer(call, expected, tolerance, **given)


@pytest.mark.parametrize("form", fc.TABLE, ids=lambda form: form.name)
def test_formats(target, form):
    machine = target.machine
    cases = [layer(machine, 1, 24, 37, form, density) for density in (0.0, "one", 0.3, 1.0)]
    cases += [layer(machine, m, 21, 18, form, 0.3, activation=RELU) for m in (2, 5, 16)]
    cases += [layer(machine, 19, 24, 32, form, density) for density in (0.0, "one", 1.0)]
    check_layers(cases, target)


@pytest.mark.parametrize("m", [1, 3, 7, 37])
def test_epilogues(target, m):
    form, silu = fc.TABLE[1], Activation("silu")
    check_layers([
        layer(target.machine, m, 20, 30, form, 0.4, residual="before", activation=silu),
        layer(target.machine, m, 20, 30, form, 0.4, residual="after", activation=RELU),
        layer(target.machine, m, 20, 30, form, 0.4, with_bias=False),
        layer(target.machine, m, 20, 3, form, 0.9, activation=silu),
    ], target)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from(fc.TABLE), st.sampled_from([0.0, "one", 0.3, 1.0]))
def test_pack_round_trip(n, k, form, density):
    w = sparse_weight(n, k, form, density)
    np.testing.assert_array_equal(blocks.unpack(fc.pack(w, form)), w)


def test_only_blocks_with_a_nonzero_are_stored():
    form = fc.TABLE[1]
    w = sparse_weight(64, 100, form, 0.2)
    packed = fc.pack(w, form)
    assert packed.blocks == int(w.reshape(16, 4, 100).any(axis=1).sum())
    assert packed.bytes < w.nbytes / 3


def test_prediction_follows_density():
    machine, form = find_target("host").machine, fc.TABLE[1]
    for m in (1, 64):
        times = [fc.predict_us(machine, m, fc.pack(sparse_weight(256, 256, form, d), form)) for d in (0.1, 0.5, 1.0)]
        assert times == sorted(times)
        assert times[0] < 0.5 * times[2]


def test_refusals_say_why():
    assert fc.refusal((10, 65536)) is None
    assert "16 bits" in fc.refusal((10, 65537))
