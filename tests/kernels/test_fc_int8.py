"""Block-sparse products in 8 bits: every format, densities from nothing to all, tails of words, groups and rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Layer, check_layers, share

from sparsec.kernels import fc_int8, gemm_int8
from sparsec.kernels.epilogue import NONE, RELU, Activation
from sparsec.kernels.quantized import QuantType, Requantize, reference_requantize
from sparsec.targets import find_target

SUMS = Requantize(None)  # the sums as float32: exact below 2^24
UNSIGNED, SIGNED = QuantType(1.0, 117), QuantType(1.0, -5, "int8")
Y = QuantType(0.05, 3)
FORM = fc_int8.TABLE[1]


def sparse_weight(n, k, form, density):
    """int8 [n, k] with blocks of `form` kept at `density`; "one" keeps a single element."""
    rng = np.random.default_rng([n, k])
    w = np.where(rng.random((n, k)) < 0.3, rng.choice([-128, 127], (n, k)), rng.integers(-128, 128, (n, k)))
    if density == "one":
        kept = np.zeros((n, k), bool)
        kept[n // 2, k // 2] = True
    else:
        some = rng.random((-(-n // form.rows), -(-k // form.columns))) < density
        kept = np.kron(some, np.ones((form.rows, form.columns), bool))[:n, :k]
    return (w * kept).astype(np.int8)


def layer(machine, m, k, n, form, density, *, steps=SUMS, x_type=UNSIGNED):
    rng = np.random.default_rng([m, k, n])
    low, high = x_type.range
    x = rng.integers(low, high + 1, (m, k)).astype(x_type.dtype)
    w, bias = sparse_weight(n, k, form, density), rng.integers(-5000, 5000, n)
    scale = np.ones(n) if steps is SUMS else rng.uniform(2e-5, 2e-4, n)
    low, high = (0, 256) if steps.other_element == "uint8" else (-128, 128)
    other = rng.integers(low, high, (m, n)).astype(steps.other_element)
    call = fc_int8.bind(machine, m=m, w=w, x=x_type, w_scale=scale, steps=steps, form=form, bias=bias)
    acc = gemm_int8.reference(x, w, bias, x_type)
    given = {"x": x, "residual": other} if steps.residual != "none" else {"x": x}
    if steps is SUMS:
        return Layer(call, acc, 0.5, **given)
    expected = reference_requantize(acc.astype(np.int32), steps.multipliers(x_type, scale), steps, other)
    return Layer(call, expected, 1.5 if steps.y else 1e-4, **given)


def test_sums(dot_target):
    shapes = [(1, 24, 37, density, UNSIGNED) for density in (0.0, "one", 1.0)]
    shapes += [(1, 130, 37, 0.4, UNSIGNED), (3, 22, 20, 0.4, SIGNED), (37, 21, 18, 0.5, UNSIGNED)]
    shapes += [(19, 24, 32, 0.0, UNSIGNED), (9, 22, 20, 0.6, SIGNED)]
    cases = [(form, *shape) for shape in shapes for form in fc_int8.TABLE]
    layers = [
        layer(dot_target.machine, m, k, n, form, density, x_type=x_type)
        for form, m, k, n, density, x_type in share(cases, dot_target, 5)
    ]
    check_layers(layers, dot_target)


def test_epilogues(dot_target):
    s, inner, silu = QuantType(0.07, -5, "int8"), QuantType(0.03, 200), Activation("silu")
    kinds = [Requantize(Y, RELU), Requantize(Y, RELU, "before", inner, s), Requantize(None, NONE, "before")]
    cases = [(m, 20, 30, FORM, steps) for m in (1, 7) for steps in kinds]
    cases += [(18, 20, 35, form, Requantize(s, silu)) for form in fc_int8.TABLE[::2]]
    layers = [layer(dot_target.machine, *shape, 0.5, steps=steps) for *shape, steps in share(cases, dot_target, 3)]
    check_layers(layers, dot_target)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from(fc_int8.TABLE), st.sampled_from([0.0, "one", 0.3, 1.0]))
def test_pack_round_trip(n, k, form, density):
    w = sparse_weight(n, k, form, density)
    np.testing.assert_array_equal(fc_int8.unpack(fc_int8.pack(w, form), k), w)


def test_only_blocks_with_a_nonzero_are_stored():
    w = sparse_weight(64, 100, FORM, 0.2)
    packed = fc_int8.pack(w, FORM)
    assert packed.blocks == int(w.reshape(16, 4, 25, 4).any(axis=(1, 3)).sum())
    assert packed.bytes < w.nbytes / 3


def test_prediction_follows_density():
    machine = find_target("host").machine
    for m in (1, 64):
        packed = [fc_int8.pack(sparse_weight(256, 256, FORM, d), FORM) for d in (0.1, 0.5, 1.0)]
        times = [fc_int8.predict_us(machine, m, part) for part in packed]
        assert times == sorted(times)
        assert times[0] < 0.5 * times[2]
