"""Integers by groups times few rows on CUDA devices against float64, emulated: the stored form, types, densities, tails."""

from __future__ import annotations

import numpy as np
import pytest
from device_layers import ARCHS, GPU, DeviceLayer, check_device_layers, check_resources, round_to
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.kernels.cuda import group_matvec, group_tiles
from sparsec.kernels.cuda.group_matvec import Tiling
from sparsec.kernels.epilogue import NONE, RELU, Activation
from sparsec.kernels.integers import Stored

ELEMENTS = ("float32", "float16")
EPS = {"float32": 2.0**-23, "float16": 2.0**-10}


def on(element):
    return GPU.half() if element == "float16" else GPU


def weight(n, k, bits, group, zeros, density, scale=1.0):
    """Integers over their whole range; groups of zeros (of zero points, where there are any). Density 0: one group is kept."""
    rng = np.random.default_rng([n, k, bits, group])
    low, high = (-128, 127) if bits == 8 else (-8, 7)
    groups = -(-k // group)
    q = rng.integers(low, high + 1, (n, k))
    zero = rng.integers(low, high + 1, (n, groups)) if zeros else None
    keep = rng.random((n, groups)) < density
    if density == 0:
        keep[n // 2, groups // 2] = True
    q = np.where(np.repeat(keep, group, 1)[:, :k], q, np.repeat(zero, group, 1)[:, :k] if zeros else 0)
    scales = rng.uniform(0.5, 2, (n, groups)).astype("f") * np.float32(scale)
    return Stored(bits, group, q.astype(np.int8), scales, None if zero is None else zero.astype(np.int8))


def layer(element, m, stored, tiling=None, *, sparse=True, activation=NONE, residual="none", with_bias=True):
    """Rounding: sums in float32; scales rounded to float16 with float16; y rounded once."""
    n, k = stored.q.shape
    rng = np.random.default_rng([m, n, k])
    x, other = round_to(element, rng.standard_normal((m, k)), rng.standard_normal((m, n)))
    bias = rng.standard_normal(n).astype("f") if with_bias else None
    options = {"activation": activation, "residual": residual, "tiling": tiling}
    calls = group_matvec.bind(on(element), m=m, stored=stored, sparse=sparse, bias=bias, **options)
    expected = group_matvec.reference(
        stored, x.astype("d"), bias, activation=activation, residual=residual, other=other.astype("d")
    )
    apart = Stored(
        stored.bits, stored.group, -np.abs(stored.q), stored.scale, None if stored.zero is None else np.abs(stored.zero)
    )
    size = np.abs(group_matvec.reference(apart, np.abs(x.astype("d"))))  # |q| + |zero|
    exact = np.zeros(1) if element == "float32" else 2.0**-11 * size
    tolerance = (k + 8) * EPS["float32"] * (size + 8) + exact + EPS[element] * (np.abs(expected) + 8)
    given = {"x": x, "residual": other} if residual != "none" else {"x": x}
    rooms = {"parts": (tiling.splits * m * n, "float32")} if len(calls) > 1 else {}
    return DeviceLayer(calls, expected, tolerance, given, rooms)


def formats(element):
    """Both widths, dense and sparse, every number of slots, groups of each way of dealing, zero points, splits."""
    cases = [
        (1, (37, 256, 64), True, 0.5, True, 1),
        (2, (40, 100, 32), False, 0.6, True, 1),  # a short last group
        (3, (19, 256, 128), True, 0.5, True, 1),
        (8, (33, 64, 16), False, 0.3, True, 1),
        (1, (17, 130, 130), True, 1.0, False, 2),  # a scale an output
    ]
    return [
        layer(element, m, weight(*shape[:2], bits, shape[2], zeros, density), Tiling(3, splits, 2), sparse=sparse)
        for bits in (4, 8)
        for m, shape, zeros, density, sparse, splits in cases
    ]


@pytest.mark.parametrize("element", ELEMENTS)
def test_formats(element):
    check_device_layers(formats(element), element)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_formats_fit_a_multiprocessor(element, arch):
    check_resources(formats(element), arch)


@pytest.mark.parametrize("element", ELEMENTS)
def test_densities_and_epilogues(element):
    silu = Activation("silu")
    check_device_layers([
        *(layer(element, 1, weight(24, 96, 4, 32, False, density)) for density in (0, 0.2, 1)),
        layer(element, 1, weight(24, 96, 8, 32, False, -1)),  # nothing but zeros
        layer(element, 4, weight(24, 96, 4, 32, True, 0.5), residual="before", activation=silu),
        layer(element, 1, weight(24, 96, 4, 32, True, 0.5), Tiling(2, 3, 4), residual="after", activation=RELU),
        layer(element, 5, weight(1, 16, 8, 16, False, 1), with_bias=False),
        layer(element, 1, weight(9, 64, 4, 16, False, 0.7, scale=2.0**-20)),  # no normal float16
    ], element)  # fmt: skip


@given(
    st.integers(1, 40), st.integers(1, 150), st.sampled_from([4, 8]), st.sampled_from([16, 32, 48, 64, 128, 0]),
    st.booleans(), st.integers(1, 8), st.booleans(), st.sampled_from(ELEMENTS),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_stored_form_holds_the_weight(n, k, bits, group, zeros, m, sparse, element):
    stored = weight(n, k, bits, min(group, k) or k, zeros, 0.5)
    if reason := group_matvec.refusal(m, stored):
        assert "multiple of 16" in reason
        return
    packed = group_tiles.pack(stored, m, Tiling(3, 2, 4), sparse, element)
    q, scale, zero = group_tiles.unpack(packed)
    whole = group_tiles.cut(stored)
    kept = group_tiles.kept_groups(stored) if sparse else np.ones((n, whole.groups), bool)
    mask = np.repeat(kept, whole.group, 1)[:, :k]
    np.testing.assert_array_equal(q, np.where(mask, stored.q, 0))
    np.testing.assert_array_equal(scale, np.where(kept, whole.scale, 0).astype(packed.scales.dtype))
    if zeros:
        np.testing.assert_array_equal(zero, np.where(kept, whole.zero, 0))


def test_bands_have_equal_shares():
    counts = np.random.default_rng(0).integers(20, 44, 4096)
    bands = group_tiles.bands_of(counts, 264)
    shares = np.add.reduceat(counts, bands[:-1])
    assert bands[0] == 0 and bands[-1] == 4096
    assert shares.max() <= counts.sum() / 264 + 44
    assert np.diff(group_tiles.bands_of(np.ones(20000), 2)).max() < group_tiles.SLOT


def test_what_is_refused():
    assert "9 rows" in group_matvec.refusal(9, weight(4, 64, 4, 32, False, 1))
    assert "groups of 24" in group_matvec.refusal(1, weight(4, 64, 4, 24, False, 1))
    with pytest.raises(ValueError, match="groups of 24"):
        group_matvec.bind(GPU, m=1, stored=weight(4, 64, 4, 24, False, 1), sparse=True)


def test_half_the_groups_are_predicted_to_pay():
    stored = weight(11008, 4096, 4, 128, False, 0.5)
    dense, sparse = (group_matvec.ranked_tilings(GPU.half(), 1, stored, kind)[0][0] for kind in (False, True))
    assert 1.25 * (sparse - GPU.launch_us) < dense - GPU.launch_us
