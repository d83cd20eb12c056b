"""Convolution, dense and in every block format, against float64: sizes around the vector, ragged both ways, any stride."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import tvm_ffi
from hypothesis import example, given, settings
from hypothesis import strategies as st
from layers import Layer, check_layers

from sparsec.kernels import conv
from sparsec.kernels.epilogue import KINDS, NONE, RELU, RELU6, Activation
from sparsec.targets import find_target

EPS = np.finfo(np.float32).eps
ACTIVATIONS = (NONE, RELU, RELU6, Activation("silu"), Activation("leaky_relu", 0.1), Activation("hardswish"))
RESIDUALS = ("none", "before", "after")
DENSITIES = (0.3, 1.0, "one", 0.0)
SHAPES = {
    1: (1, 1), 3: (1, 3), 4: (2, 2), 5: (1, 5), 7: (7, 1), 8: (2, 4), 9: (3, 3), 15: (3, 5), 16: (4, 4), 17: (1, 17),
    31: (1, 31), 32: (4, 8), 33: (3, 11), 49: (7, 7), 196: (14, 14),
}  # fmt: skip
WINDOWS = (  # kernel, strides, pads, dilations, input rows and columns
    ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (7, 7)),
    ((3, 3), (2, 2), (0, 1, 1, 0), (1, 1), (9, 15)),
    ((5, 5), (1, 2), (2, 0, 1, 3), (1, 1), (6, 18)),
    ((1, 7), (1, 1), (0, 3, 0, 3), (1, 1), (3, 21)),
    ((2, 3), (3, 3), (0, 0, 0, 0), (1, 1), (11, 12)),
    ((3, 3), (1, 1), (2, 2, 2, 2), (2, 2), (8, 20)),
    ((3, 3), (2, 1), (0, 0, 0, 0), (2, 1), (14, 6)),
    ((1, 1), (2, 2), (0, 0, 0, 0), (1, 1), (13, 9)),
    ((3, 1), (3, 2), (4, 0, 0, 1), (1, 1), (1, 5)),  # rows of halo only
)


def weights(rng, shape, density):
    w = rng.standard_normal(shape).astype("f")
    if density == "one":
        kept = np.zeros(w.size, bool)
        kept[rng.integers(w.size)] = True
        kept = kept.reshape(shape)
    else:
        kept = rng.random(shape) < density
    return np.where(kept, w, 0).astype("f")


def prepared(geometry, x):
    """The phase planes of x, by their definition."""
    _, _, height, width = geometry.x_shape
    (sh, sw), (top, left, _, _) = geometry.strides, geometry.pads
    out = np.zeros(geometry.prepared_shape, np.float32)
    _, rows, columns = geometry.phase_shape
    for f, (row, column) in enumerate(geometry.phases):
        for q, r in itertools.product(range(rows), range(columns)):
            y, z = q * sh + row - top, r * sw + column - left
            if 0 <= y < height and 0 <= z < width:
                out[:, :, f, q, r] = x[:, :, y, z]
    return out


def layers(machine, form, *, size, channels, rows, kernel=(1, 1), strides=(1, 1), pads=(0, 0, 0, 0), dilations=(1, 1),
           batch=1, density=0.3, activation=NONE, residual="none", with_bias=True, tiling=None):  # fmt: skip
    """One convolution bound to `form`: the layer of `prepare`, if there is one, and that of the convolution."""
    geometry = conv.Geometry((batch, channels, *size), (rows, channels, *kernel), strides, pads, dilations)
    rng = np.random.default_rng([*geometry.x_shape, *geometry.w_shape, *pads, form.rows, form.columns])
    x = rng.standard_normal(geometry.x_shape).astype("f")
    w = weights(rng, geometry.w_shape, density)
    bias = rng.standard_normal(rows).astype("f") if with_bias else None
    other = rng.standard_normal(geometry.y_shape).astype("f")
    expected = conv.reference(geometry, x, w, bias, activation, residual, other)
    # One rounding for each product of the longest sum, some for what follows; no activation here is steeper than 1.2.
    products = int(np.count_nonzero(w.reshape(rows, -1), axis=1).max())
    size_of_sum = conv.reference(geometry, np.abs(x), np.abs(w), None if bias is None else np.abs(bias))
    tolerance = 1.2 * EPS * ((products + 4) * size_of_sum + 8 * (1 + np.abs(other)))
    prepare, main = conv.bind(
        machine, geometry, w, form=form, bias=bias, activation=activation, residual=residual, tiling=tiling
    )
    planes = prepared(geometry, x)
    assert (prepare is not None) == geometry.needs_prepare
    given = {"x": planes, "residual": other} if residual != "none" else {"x": planes}
    found = [Layer(main, expected, tolerance, **given)]
    if prepare is not None:
        found.append(Layer(replace(prepare, roles=("x", "y")), planes, 1e-30, x=x))
    return found


def cycle(number):
    """Residual, activation, density and bias that go with case `number`: all of them meet as numbers go on."""
    return {
        "residual": RESIDUALS[number % 3], "activation": ACTIVATIONS[number % 6 if number % 4 else number % 5],
        "density": DENSITIES[number // 2 % 4], "with_bias": number % 5 > 0,
    }  # fmt: skip


@pytest.fixture(params=conv.TABLE, ids=lambda form: form.name)
def form(request):
    return request.param


def test_pixels_around_the_vector(target, form):
    lanes = target.machine.lanes
    pixels = {1, lanes - 1, lanes + 1, 2 * lanes + 1}
    if lanes == 16 or target.machine.lane_fma:
        pixels |= {5, lanes, 2 * lanes - 1, 49}
    rows, columns = max(form.rows, 6), form.columns
    check_layers([
        layer for number, p in enumerate(sorted(pixels)) for layer in layers(
            target.machine, form, size=SHAPES[p], channels=columns * (2 + number % 2) + number % 3 // 2,
            rows=rows + number % 4, batch=1 + number % 2, **cycle(number + conv.TABLE.index(form)),
        )
    ], target)  # fmt: skip


def test_windows(target, form):
    rows, first = max(form.rows, 5), conv.TABLE.index(form) + target.machine.lanes // 8
    check_layers([
        layer for number, (kernel, strides, pads, dilations, size) in enumerate(WINDOWS) for layer in layers(
            target.machine, form, size=size, channels=4 + number % 2, rows=rows + number % 3, kernel=kernel,
            strides=strides, pads=pads, dilations=dilations, batch=1 + (number == 1), **cycle(number + form.rows),
        ) if (number + first) % 2
    ], target)  # fmt: skip


def test_densities(target, form):
    sizes = {"size": (3, 5), "channels": 8, "rows": 2 * max(form.rows, 4) + 1, "kernel": (1, 3)}
    check_layers([
        layer for number, density in enumerate(DENSITIES)
        for layer in layers(target.machine, form, density=density, residual=RESIDUALS[number % 3], activation=RELU, **sizes)
    ], target)  # fmt: skip


def test_activations_and_residuals(target):
    kinds = [Activation(kind, *((-0.5, 1.5) if kind == "clip" else (0.2, 0.4))) for kind in KINDS]
    check_layers([
        layers(target.machine, conv.TABLE[3], size=(1, 19), channels=5, rows=6, activation=activation, residual=residual)[0]
        for (activation, residual) in zip(kinds, itertools.cycle(RESIDUALS))
    ], target)  # fmt: skip


@pytest.mark.parametrize("number", [0, 3])
def test_every_register_tile(target, number):
    form = conv.TABLE[number]
    geometry = conv.Geometry((1, 3, 5, 13), (9, 3, 3, 3), pads=(1, 1, 1, 1))
    tilings = conv.tilings(target.machine, geometry, form)
    assert len(tilings) > 2
    check_layers([
        layers(target.machine, form, size=(5, 13), channels=3, rows=9, kernel=(3, 3), pads=(1, 1, 1, 1), tiling=tiling)[0]
        for tiling in tilings[:: max(1, len(tilings) // 8)]
    ], target)  # fmt: skip


def test_passes_over_the_panel(target, form):
    """Sums rest in scratch between passes: even and uneven depths, a smaller last group, turned and straight tails."""
    lanes = target.machine.lanes
    check_layers([
        layers(
            target.machine, form, size=(1, vectors * lanes + rest), channels=channels, rows=max(form.rows, 6) + 3,
            residual=RESIDUALS[number % 3], activation=RELU, density=(1.0, 0.4)[number % 2], batch=1 + number % 2,
            tiling=conv.Tiling(form.rows or 6, vectors, lanes, vectors * lanes + rest, depth),
        )[0]
        for number, (vectors, rest, channels, depth) in enumerate(
            ((1, 1, 12, 4), (2, lanes - 1, 20, 8), (1, 3, 16, 12), (2, 0, 8, 1))
        )
    ], target)  # fmt: skip


def test_left_over_pixels(target):
    """Fewer pixels than rows are summed in vectors of rows, more in a vector of pixels."""
    lanes = target.machine.lanes
    for rows in (2, 4, 6, 8):
        tiling = conv.Tiling(rows, 2, lanes, 2 * lanes + 1)
        for rest in range(1, lanes):
            parts = tiling.parts_of(lanes + rest, rows)
            assert [p.valid for p in parts] == [lanes, rest]
            assert parts[1].turned == (rest < rows and 1 << (rows - 1).bit_length() <= lanes)
            assert parts[1].vectors(rows) <= rows
    check_layers([
        layers(target.machine, form, size=(1, lanes + rest), channels=5, rows=2 * form.rows + 3 if form.rows else 11,
               residual=RESIDUALS[rest % 3], tiling=conv.Tiling(form.rows or 6, 2, lanes, lanes + rest))[0]
        for form in (conv.DENSE, conv.TABLE[2], conv.TABLE[3]) for rest in (1, 2, 3)
    ], target)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.integers(1, 4), st.integers(0, 200))
@example(vectors=7, pixels=281, images=1, groups=9)  # a tail of one pixel: less than a piece
def test_pieces_cover_every_tile_once_and_evenly(vectors, pixels, images, groups):
    tiling = conv.Tiling(4, vectors, 8, pixels)
    shares = conv.Shares.of(tiling, images, groups)
    seen = {}
    for piece in range(images * shares.image):
        image, rest = divmod(piece, shares.image)
        tile = image * tiling.count + min(rest // shares.full, tiling.count - 1)
        seen.setdefault(tile, []).append(piece)
    assert list(seen) == list(range(images * tiling.count))
    tail = shares.tail or shares.full
    assert all(len(p) == (tail if t % tiling.count == tiling.count - 1 else shares.full) for t, p in seen.items())
    if tiling.tail and tiling.full:
        share = max(1, shares.full * tiling.tail / tiling.width)  # a piece is the least a tile can have
        assert abs(shares.tail - share) <= 0.5 + 1e-9  # a tie may round up


def test_few_pixels_split_by_rows(target):
    """A panel that stays while the groups of rows change, in whatever ranges the pieces come."""
    cases = [
        layers(target.machine, form, size=(2, 3), channels=9, rows=101, kernel=kernel, batch=batch)[0]
        for form in (conv.DENSE, conv.TABLE[1], conv.TABLE[3], conv.TABLE[6])
        for kernel, batch in (((1, 1), 1), ((1, 2), 3))
    ]
    assert all(layer.call.tiles >= 4 for layer in cases)
    check_layers(cases, target)


def test_more_panel_rows_than_16_bits():
    target = find_target("host")
    found = layers(target.machine, conv.TABLE[1], size=(1, 2), channels=70_000, rows=2, density=1.0)
    assert found[0].call.constants["index"].dtype == np.int32
    check_layers(found, target)


def test_many_pixels(target):
    check_layers([
        *layers(target.machine, conv.TABLE[3], size=(14, 14), channels=6, rows=9, residual="before", activation=RELU),
        *layers(target.machine, conv.DENSE, size=(40, 41), channels=2, rows=3, kernel=(3, 3), pads=(1, 1, 1, 1)),
    ], target)  # fmt: skip


def test_halo_wider_than_the_output():
    """Every pixel of the only output lies in the padding; its first column would be right of the last."""
    target = find_target("host")
    for pads, size in (((0, 4, 0, 0), (1, 1)), ((4, 0, 0, 0), (1, 1)), ((5, 5, 4, 4), (2, 2))):
        found = layers(target.machine, conv.DENSE, size=size, channels=3, rows=4, strides=(3, 3),
                       kernel=(3 if pads[0] else 1, 3 if pads[1] else 1), pads=pads)  # fmt: skip
        check_layers(found, target)


def _variants(machine):
    """Calls that differ in one fact each."""
    rng = np.random.default_rng(0)
    base = {"size": (3, 6), "channels": 4, "rows": 9}
    changes = [
        {}, {"size": (6, 3)}, {"size": (2, 9)}, {"channels": 8}, {"rows": 10}, {"batch": 2}, {"kernel": (1, 2)},
        {"kernel": (2, 1)}, {"strides": (1, 2)}, {"strides": (2, 1)}, {"pads": (0, 1, 0, 0)}, {"pads": (0, 0, 0, 1)},
        {"pads": (1, 0, 0, 0)}, {"kernel": (2, 2), "dilations": (1, 2)}, {"kernel": (2, 2), "dilations": (2, 1)},
        {"with_bias": False}, {"residual": "before"}, {"residual": "after"}, {"density": 0.0}, {"density": "one"},
        {"density": 0.5}, {"density": 1.0},
        *({"activation": Activation(kind, 0.1, 0.2)} for kind in KINDS),
        {"activation": Activation("clip", 0.1, 0.25)}, {"activation": Activation("leaky_relu", 0.1000001)},
    ]  # fmt: skip
    for form in conv.TABLE:
        for change in changes:
            yield from (layer.call for layer in layers(machine, form, **{**base, **change}))
        geometry = conv.Geometry((1, 4, 3, 6), (9, 4, 1, 1))
        for tiling in conv.tilings(machine, geometry, form):
            yield conv.bind(machine, geometry, weights(rng, (9, 4, 1, 1), 0.5), form=form, tiling=tiling)[1]


def test_one_name_is_one_code():
    """What distinguishes two kernels is in their names: equal names share code in a program."""
    known = {}
    shared = 0
    for name in ("x86-64-v2", "x86-64-v4", "armv8.2-a"):
        target = find_target("arm" if name.startswith("arm") else "host", name)
        for call in _variants(target.machine):
            func, tiles = known.setdefault(call.name, (call.func, call.tiles))
            shared += func is not call.func
            assert tvm_ffi.structural_equal(func, call.func, map_free_vars=True), f"{call.name}: {call.text}"
            assert tiles == call.tiles, call.name
    assert shared > 50


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 9), st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from(conv.TABLE), st.sampled_from([0.0, "one", 0.2, 0.9, 1.0]), st.integers(1, 12), st.integers(0, 99),
    st.integers(0, 12),
)  # fmt: skip
def test_pack_round_trip(rows, channels, kernel, form, density, height, seed, depth):
    w = weights(np.random.default_rng(seed), (rows, channels, *kernel), density)
    packed = conv.pack(w, form, height, depth)
    np.testing.assert_array_equal(conv.unpack(packed, w.shape), w)
    if form.sparse and rows % form.rows == 0 and channels % form.columns == 0:
        assert packed.values.size == packed.blocks * form.rows * form.columns
    if form.sparse and density == 0.0:
        assert packed.bytes == packed.pointers.nbytes


def test_a_wrong_weight_is_found(target):
    """The comparison can fail: one weight off by one part in a thousand."""
    layer = layers(target.machine, conv.TABLE[3], size=(3, 5), channels=4, rows=4, density=1.0)[0]
    layer.call.constants["values"][5] *= 1.001
    with pytest.raises(AssertionError):
        check_layers([layer], target)
