"""Block-sparse products and convolutions on CUDA devices against float64, emulated: every tile, densities, tails, epilogues."""

from __future__ import annotations

import numpy as np
import pytest
from device_layers import ARCHS, GPU, DeviceLayer, check_device_layers, check_resources, round_to
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.kernels.cuda import block_sparse, conv, gemm, kept
from sparsec.kernels.cuda.block_sparse import CONV_TABLE, GEMM_TABLE, Plan
from sparsec.kernels.cuda.conv import Shape
from sparsec.kernels.epilogue import NONE, RELU6, Activation

ELEMENTS = ("float32", "float16")
EPS = {"float32": 2.0**-23, "float16": 2.0**-10}


def on(element):
    return GPU.half() if element == "float16" else GPU


def tolerance(element, terms, size, values):
    """Sums of products of magnitude `size` in float32, rounded once to the element."""
    return (terms + 8) * EPS["float32"] * (size + 8) + EPS[element] * (np.abs(values) + 2.0**-14)


def blocks_of_zeros(rng, n, k, rows, columns, density):
    """[n, k] with blocks of zeros, and some zeros within the blocks that are kept. Density 0: one block is kept."""
    groups, units = -(-n // rows), -(-k // columns)
    keep = rng.random((groups, units)) < density
    if density == 0:
        keep[groups // 2, units // 2] = True
    mask = np.repeat(np.repeat(keep, rows, 0), columns, 1)[:n, :k]
    return rng.standard_normal((n, k)) * mask * (rng.random((n, k)) < 0.95)


def product(element, form, m, k, n, density, tile=None, *, activation=NONE, residual="none", with_bias=True):
    rng = np.random.default_rng([m, k, n])
    weight = blocks_of_zeros(rng, n, k, form.rows, form.columns, density)
    x, w, other = round_to(element, rng.standard_normal((m, k)), weight, rng.standard_normal((m, n)))
    bias = rng.standard_normal(n).astype("f") if with_bias else None
    options = {"activation": activation, "residual": residual, "plan": Plan(tile) if tile else None}
    call = block_sparse.bind_gemm(on(element), m=m, w=w.astype("f"), form=form, bias=bias, **options)
    expected = gemm.reference(x, w, bias, activation, residual, other)
    given = {"x": x, "residual": other} if residual != "none" else {"x": x}
    size = gemm.reference(np.abs(x), np.abs(w))
    return DeviceLayer((call,), expected, tolerance(element, k, size, expected), given)


def convolution(element, form, shape, density, plan=None, *, rows=None, activation=NONE, residual="none"):
    rng = np.random.default_rng([*shape.x, *shape.w])
    oc, c, kh, kw = shape.w
    weight = blocks_of_zeros(rng, oc, kh * kw * c, rows or form.rows, 1, density).reshape(oc, kh, kw, c)
    out = (shape.x[0], oc, *shape.plane)
    x, w, other = round_to(
        element, rng.standard_normal(shape.x), weight.transpose(0, 3, 1, 2), rng.standard_normal(out)
    )
    bias = rng.standard_normal(oc).astype("f")
    options = {"activation": activation, "residual": residual, "plan": plan}
    call = block_sparse.bind_conv(on(element), shape, w=w.astype("f"), form=form, bias=bias, **options)
    expected = conv.reference(shape, x, w, bias, activation, residual, other)
    given = {"x": x, "residual": other} if residual != "none" else {"x": x}
    size = conv.reference(shape, np.abs(x), np.abs(w))
    return DeviceLayer((call,), expected, tolerance(element, kh * kw * c, size, expected), given)


def shape_of(n, c, h, w, oc, k, stride=1):
    return Shape((n, c, h, w), (oc, c, k, k), (stride, stride), (k // 2,) * 4)


def form_named(table, text):
    return next(form for form in table if form.format == text)


def products(element, tiles=slice(None)):
    """Every tile once, groups of several steps and of one, ragged ends on all sides. `tiles`: which of each form."""
    return [
        product(element, form, tile.rows - 3, 3 * tile.depth + 5, form.rows + 9, 0.6, tile, activation=RELU6)
        for form in GEMM_TABLE
        for tile in block_sparse.gemm_tiles(form, element)[tiles]
    ]


def convolutions(element, tiles=slice(None)):
    """Every tile once, 1x1 and 3x3."""
    sizes = ((1, 70, 4, 8, 1), (1, 12, 5, 7, 3))
    return [
        convolution(element, form, shape_of(*size, form.rows + 7, kernel), 0.5, Plan(tile))
        for *size, kernel in sizes
        for form in CONV_TABLE
        for tile in block_sparse.conv_tiles(form, shape_of(*size, form.rows + 7, kernel), element)[tiles]
    ]


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("layers", [products, convolutions])
def test_every_tile(element, layers):
    check_device_layers(layers(element), element)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_every_tile_fits_a_multiprocessor(element, arch):
    """All on one architecture, the first and largest tile of every form on the others."""
    some = slice(None) if arch == ARCHS[-1] else slice(1)
    layers = products(element, some) + convolutions(element, some)
    found = (*block_sparse.GEMM_TILES[element], *block_sparse.PICK_TILES[element], *block_sparse.CONV_TILES[element])
    for name, (registers, _, shared) in check_resources(layers, arch).items():
        tiles = [tile for tile in (*block_sparse.GATHER_TILES, *found) if f"_{tile}_" in name]  # they differ in stages
        assert shared <= max(tile.shared for tile in tiles)
        assert registers * max(tile.threads for tile in tiles) <= GPU.registers


@pytest.mark.parametrize("element", ELEMENTS)
def test_densities_sizes_and_epilogues(element):
    wide, single, rows = form_named(GEMM_TABLE, "32x8"), form_named(GEMM_TABLE, "32x1"), form_named(CONV_TABLE, "16x1")
    silu = Activation("silu")
    check_device_layers([
        *(product(element, wide, 5, 70, 70, density) for density in (0, 0.2, 1)),
        *(product(element, single, 5, 70, 70, density) for density in (0, 0.2, 1)),
        product(element, wide, 1, 1, 1, 1), product(element, single, 3, 5, 7, 1, with_bias=False),
        product(element, wide, 6, 40, 40, 0.5, residual="before", activation=silu),
        product(element, single, 6, 40, 40, 0.5, residual="after", activation=silu),
        *(convolution(element, rows, shape_of(1, 20, 3, 5, 24, 3), density) for density in (0, 0.2, 1)),
        convolution(element, rows, shape_of(2, 20, 4, 4, 24, 1), 0.4, residual="before", activation=silu),
        convolution(element, rows, shape_of(3, 6, 9, 7, 20, 3, 2), 0.4, residual="after", activation=RELU6),
        convolution(element, rows, shape_of(2, 20, 3, 3, 24, 1), 0.4),
    ], element)  # fmt: skip


@pytest.mark.parametrize("element", ELEMENTS)
def test_like_rows_are_gathered(element):
    """Every fourth row keeps the same columns: neighbours have nothing in common."""
    form = form_named(CONV_TABLE, "16x1")
    rng = np.random.default_rng(0)
    kinds = rng.random((4, 40)) < 0.25
    units = kinds[np.arange(70) % 4]
    rows = block_sparse.like_rows(units, 16)
    assert sorted(rows[rows < 70].tolist()) == list(range(70)) and rows.shape[1] == 16
    assert kept.group_mask(units, 16, rows).sum() < 0.6 * kept.group_mask(units, 16).sum()
    assert block_sparse.like_rows(np.ones((70, 40), bool), 16) is None

    shape = shape_of(1, 40, 3, 5, 70, 1)
    w = (rng.standard_normal((70, 40)) * units).astype(element)
    x = rng.standard_normal(shape.x).astype(element)
    tile = block_sparse.conv_tiles(form, shape, element)[-1]
    call = block_sparse.bind_conv(
        on(element), shape, w=w.astype("f")[:, :, None, None], form=form, plan=Plan(tile, rows), activation=RELU6
    )
    expected = conv.reference(shape, x, w[:, :, None, None], None, RELU6)
    size = conv.reference(shape, np.abs(x), np.abs(w)[:, :, None, None])
    check_device_layers([DeviceLayer((call,), expected, tolerance(element, 40, size, expected), {"x": x})], element)


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([16, 32]), st.sampled_from([1, 8]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_stored_form_holds_the_weight(n, k, height, width, permuted):
    rng = np.random.default_rng([n, k, height, width])
    w = blocks_of_zeros(rng, n, k, 4, 1, 0.4).astype("f")
    rows = None
    if permuted:
        filled = np.full(-(-n // height) * height, n)
        filled[:n] = rng.permutation(n)
        rows = filled.reshape(-1, height)
    packed = kept.pack(w, height, width, 16, rows)
    np.testing.assert_array_equal(kept.unpack(packed), w)
    assert (np.diff(packed.pointers) == np.sort(np.diff(packed.pointers))[::-1]).all()


def test_it_is_predicted_to_pay():
    """80 % of zeros in blocks on tensor cores; half of them in small blocks not."""
    half, rng = GPU.half(), np.random.default_rng(0)
    dense = gemm.predict_us(half, 4096, 4096, 4096)
    form = form_named(GEMM_TABLE, "64x8")
    for rows, density, gain in ((64, 0.2, 2.5), (4, 0.5, 0)):
        mask = np.repeat(np.repeat(rng.random((4096 // rows, 64)) < density, rows, 0), 64, 1)
        us = block_sparse.gemm_plans(half, 4096, mask.astype("f"), form)[0][0]
        assert gain * us < dense if gain else us > dense
