"""Weights kept in 8 or 4 bits: every type, groups that divide K and groups that do not, ragged columns, rows, targets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Layer, check_layers

from sparsec.kernels import integers, weight_only
from sparsec.kernels.epilogue import NONE, RELU, Activation
from sparsec.kernels.gemm import Tiling
from sparsec.kernels.integers import Stored
from sparsec.targets import find_target, with_precision

EPS = np.finfo(np.float32).eps


def stored_weight(n, k, bits, group, zeros, seed=0):
    """Integers over their whole range, ends included."""
    rng = np.random.default_rng([n, k, bits, group, seed])
    low, high = (-128, 127) if bits == 8 else (-8, 7)
    q = rng.integers(low, high + 1, (n, k)).astype(np.int8)
    q[0, 0], q[-1, -1] = low, high
    groups = -(-k // group)
    zero = rng.integers(low, high + 1, (n, groups)).astype(np.int8) if zeros else None
    return Stored(bits, group, q, rng.uniform(0.5, 2, (n, groups)).astype(np.float32), zero)


def layer(machine, m, stored, *, activation=NONE, residual="none", with_bias=True, tiling=None):
    """Rounding: K products and a scaling in float32, each off by at most one unit of the sum of magnitudes."""
    n, k = stored.q.shape
    rng = np.random.default_rng([m, k, n])
    x, other = (rng.standard_normal(shape).astype(machine.element) for shape in ((m, k), (m, n)))
    bias = rng.standard_normal(n).astype("f") if with_bias else None
    call = weight_only.bind(
        machine, m=m, stored=stored, bias=bias, activation=activation, residual=residual, tiling=tiling
    )
    expected = integers.reference(
        stored, x.astype("f"), bias, activation=activation, residual=residual, other=other.astype(np.float64)
    )
    apart = Stored(
        stored.bits, stored.group, -np.abs(stored.q), stored.scale, None if stored.zero is None else np.abs(stored.zero)
    )
    magnitudes = np.abs(integers.reference(apart, np.abs(x).astype("f")))  # |q| + |zero|
    tolerance = (k + 4) * EPS * (magnitudes + 8)
    if machine.element == "float16":
        tolerance = tolerance + 2.0**-10 * (np.abs(expected) + 8)
    given = {"x": x, "residual": other} if residual != "none" else {"x": x}
    return Layer(call, expected, tolerance, **given)


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("bits", [8, 4])
def test_groups_and_tails(target, bits, zeros):
    machine = target.machine
    cases = [
        layer(machine, m, stored_weight(n, k, bits, group, zeros))
        for m, n, k, group in (
            (1, 37, 64, 32),  # whole groups, ragged columns
            (1, 5, 100, 32),  # a short last group that ends in a part of a word
            (2, 80, 43, 43),  # one group: a scale for each output
            (3, 1, 30, 10),  # groups that end within a word
            (5, 18, 129, 64),  # a last group of one
        )
    ]
    check_layers(cases, target)


@pytest.mark.parametrize("bits", [8, 4])
def test_epilogues_and_rows(target, bits):
    machine, silu = target.machine, Activation("silu")
    weight = stored_weight(21, 64, bits, 32, True)
    check_layers([
        layer(machine, 1, weight, residual="before", activation=silu),
        layer(machine, 9, weight, residual="after", activation=RELU),
        layer(machine, 1, weight, with_bias=False),
        layer(machine, 7, weight, tiling=Tiling(3, 2, 4)),
    ], target)  # fmt: skip


@pytest.mark.parametrize("bits", [8, 4])
def test_float16(bits):
    target = with_precision(find_target("arm", "armv8.2-a"), "f16")
    cases = [layer(target.machine, m, stored_weight(19, 75, bits, 32, zeros)) for m, zeros in ((1, False), (3, True))]
    check_layers(cases, target)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 70), st.integers(1, 70), st.sampled_from([4, 8]),
    st.sampled_from([Tiling(1, 1, 4), Tiling(1, 3, 8), Tiling(2, 2, 16)]),
)  # fmt: skip
def test_pack_round_trip(n, k, group, bits, tiling):
    stored = stored_weight(n, k, bits, min(group, k), True)
    packed = integers.pack(stored, None, tiling)
    np.testing.assert_array_equal(integers.unpack(packed["weights"], stored, tiling), stored.q)


def test_the_reals_are_those_of_the_reference():
    stored = stored_weight(6, 40, 4, 16, True)
    np.testing.assert_allclose(stored.real().T, integers.reference(stored, np.eye(40)), rtol=4 * EPS)


def test_half_a_byte_a_weight():
    stored = stored_weight(64, 1024, 4, 128, False)
    packed = integers.pack(stored, None, Tiling(1, 4, 16))
    assert packed["weights"].nbytes == 64 * 1024 // 2
    assert stored.bytes == packed["weights"].nbytes + packed["scales"].nbytes


def test_prediction_follows_bytes():
    machine = find_target("host", "x86-64-v4").machine
    four, eight = (
        weight_only.ranked_tilings(machine, 1, stored_weight(2048, 4096, bits, 128, False))[0][0] for bits in (4, 8)
    )
    assert 0.45 < four / eight < 0.75


@pytest.mark.parametrize(("group", "scales"), [(0, 1), (65, 1), (32, 3)])
def test_what_does_not_fit_is_refused(group, scales):
    with pytest.raises(ValueError, match="groups of"):
        Stored(4, group, np.zeros((2, 64), np.int8), np.ones((2, scales), np.float32))
