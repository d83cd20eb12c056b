"""Convolution in 8 bits, dense and in blocks, on every instruction for sums of four products: sums bit by bit."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from layers import DOT_CPUS, Layer, check_layers, share

from sparsec.kernels import quantized
from sparsec.kernels.conv import Geometry, Tiling, gathered, int8, paired
from sparsec.kernels.epilogue import NONE, RELU, RELU6, Activation
from sparsec.kernels.quantized import QuantType, Requantize
from sparsec.lowering.rules.quantized_conv import price_quantized_conv
from sparsec.targets import find_target

X, S = QuantType(0.02, 131), QuantType(0.03, -7, "int8")
# Sums are stored exactly where the result is float32 and every scale is a power of two.
EXACT = QuantType(1.0, 97)
STEPS = (
    Requantize(QuantType(0.9, 12)), Requantize(QuantType(0.8, 3, "int8"), RELU), Requantize(QuantType(0.5, 0), RELU6),
    Requantize(QuantType(1.1, 100), NONE, "before", QuantType(0.7, 90), S), Requantize(None, Activation("silu")),
    Requantize(QuantType(1.2, 10), RELU, "before", None, X), Requantize(None, RELU, "after", None, None),
    Requantize(QuantType(0.9, 50), RELU6, "after", QuantType(0.4, 1), X),
)  # fmt: skip
WINDOWS = (  # kernel, strides, pads, dilations, input rows and columns
    ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (7, 7)),
    ((3, 3), (2, 2), (0, 1, 1, 0), (1, 1), (9, 15)),
    ((2, 3), (3, 3), (0, 0, 0, 0), (1, 1), (11, 12)),
    ((3, 3), (1, 1), (2, 2, 2, 2), (2, 2), (8, 20)),
    ((3, 3), (1, 1), (0, 0, 0, 0), (1, 1), (5, 6)),
)
SIZES = {200: (8, 25), 1: (1, 1), 3: (1, 3), 5: (1, 5), 17: (1, 17), 33: (3, 11), 49: (7, 7), 65: (5, 13)}


FORMS = (*int8.TABLE, *gathered.TABLE)


def weights(rng, shape, density, rows=4, columns=4):
    w = rng.integers(-127, 128, shape).astype(np.int8)
    blocks = rng.random((-(-shape[0] // rows), -(-shape[1] // columns), *shape[2:])) < density
    return np.where(blocks.repeat(rows, 0).repeat(columns, 1)[: shape[0], : shape[1]], w, 0).astype(np.int8)


def layer(machine, form, *, size, channels, rows, kernel=(1, 1), strides=(1, 1), pads=(0, 0, 0, 0), dilations=(1, 1),
          batch=1, density=0.4, x_type=EXACT, steps=None, tiling=None):  # fmt: skip
    """One layer as the convolution sees it, behind `prepare`. Without `steps` the exact sums come out, as float32."""
    geometry = Geometry((batch, channels, *size), (rows, channels, *kernel), strides, pads, dilations)
    rng = np.random.default_rng([*geometry.x_shape, *geometry.w_shape, form.rows])
    x = rng.integers(*x_type.range, geometry.x_shape, endpoint=True).astype(x_type.dtype)
    family = next(f for f in (int8, gathered, paired) if form in f.TABLE)
    w = weights(rng, geometry.w_shape, density, *((form.rows, 1) if family is gathered else (4, 4)))
    bias = rng.integers(-1000, 1000, rows)
    w_scale = 2.0 ** -rng.integers(0, 4, rows) if steps is None else rng.uniform(0.001, 0.01, rows)
    acc = int8.reference(geometry, x, w, bias, x_type)
    exact = steps is None
    steps = Requantize(None) if exact else steps
    multiplier = steps.multipliers(x_type, w_scale)[None, :, None, None]
    other = quantized.QuantType(1.0, 0, steps.other_element).quantize(rng.uniform(0, 99, geometry.y_shape))
    if steps.other is None:
        other = rng.standard_normal(geometry.y_shape).astype("f")
    expected = quantized.reference_requantize(acc.astype(np.int32), multiplier, steps, other)
    prepare, main = family.bind(
        machine, geometry, w, x=x_type, w_scale=w_scale, steps=steps, form=form, bias=bias, tiling=tiling
    )
    given = {"x": prepared(geometry, family.padded(geometry), x, x_type.zero_point)}
    if steps.residual != "none":
        given["residual"] = other
    tolerance = 1e-30 if exact else 1.5 if steps.y else 4e-6 * (1 + np.abs(expected))
    found = [Layer(main, expected.astype(np.float64), tolerance, **given)]
    if prepare is not None:
        found.append(Layer(replace(prepare, roles=("x", "y")), given["x"].astype(np.float64), 1e-30, x=x))
    return found


def prepared(geometry, whole, x, outside):
    """The phase planes of x by their definition; `whole`: the geometry with the channels that they have."""
    (_, _, height, width), (sh, sw), (top, left, _, _) = geometry.x_shape, geometry.strides, geometry.pads
    out = np.full(whole.prepared_shape, outside, x.dtype)
    _, rows, columns = geometry.phase_shape
    for f, (row, column) in enumerate(geometry.phases):
        for q, r in itertools.product(range(rows), range(columns)):
            y, z = q * sh + row - top, r * sw + column - left
            if 0 <= y < height and 0 <= z < width:
                out[:, : x.shape[1], f, q, r] = x[:, :, y, z]
    return out


def check(cases, target):
    check_layers([one for case in cases for one in layer(target.machine, **case)], target)


SUMS = [
    {
        "form": form, "size": SIZES[pixels], "channels": channels, "rows": max(rows, form.rows - 3), "density": density,
        "x_type": QuantType(1.0, *zero), "batch": batch,
    }
    for (i, form), (pixels, channels, rows, density, zero, batch) in itertools.product(enumerate(FORMS), (
        (1, 4, 16, 0.4, (97, "uint8"), 1), (3, 8, 5, 1.0, (-9, "int8"), 2), (5, 7, 9, 0.0, (97, "uint8"), 1),
        (17, 12, 16, 0.4, (-9, "int8"), 2), (33, 3, 5, 1.0, (97, "uint8"), 1), (49, 16, 9, 0.4, (-9, "int8"), 2),
        (65, 9, 16, 0.5, (97, "uint8"), 1), (200, 6, 9, 0.5, (97, "uint8"), 1),
    ))
    if (i + pixels // 2) % 2 or pixels == 65
]  # fmt: skip


def test_sums(dot_target):
    """Every sum is the integer it should be, through the float32 that it is stored as."""
    check(share(SUMS, dot_target, 9), dot_target)


def test_windows(dot_target):
    cases = [
        {
            "form": form, "size": size, "channels": 5 + i, "rows": max(form.rows, 4) + i, "kernel": kernel,
            "strides": strides, "pads": pads, "dilations": dilations, "batch": 1 + (i == 1),
        }
        for (number, form), (i, (kernel, strides, pads, dilations, size))
        in itertools.product(enumerate(FORMS), enumerate(WINDOWS)) if (i + number) % 3 == 0
    ]  # fmt: skip
    check(share(cases, dot_target, 7), dot_target)


def test_steps(dot_target):
    cases = [
        {
            "form": form, "size": SIZES[33 if i % 2 else 17], "channels": 8, "rows": 9, "x_type": (X, S)[i % 2],
            "steps": steps,
        }
        for form in (int8.DENSE, gathered.TABLE[1]) for i, steps in enumerate(STEPS)
    ]  # fmt: skip
    check(share(cases, dot_target, 6), dot_target)


def test_results_beyond_32_bits_saturate(dot_target):
    """Multipliers that carry sums out of what a rounded integer can hold."""
    geometry, rows = Geometry((1, 4, 5, 7), (8, 4, 1, 1)), 8
    w, x = np.full((rows, 4, 1, 1), 127, np.int8), np.full(geometry.x_shape, 255, np.uint8)
    bias = np.where(np.arange(rows) % 2, -(1 << 30), 1 << 30).astype(np.int32)
    expected = np.broadcast_to(np.where(bias > 0, 255, 0)[:, None, None], geometry.y_shape).astype(np.float32)
    steps = Requantize(QuantType(1.0, 7))
    calls = [
        family.bind(dot_target.machine, geometry, w, x=QuantType(1.0, 0), w_scale=np.full(rows, 64.0),
                    steps=steps, form=form, bias=bias)[1]
        for family, form in ((int8, int8.DENSE), (gathered, gathered.TABLE[1]))
    ]  # fmt: skip
    check_layers([Layer(call, expected, 0.5, x=x) for call in calls], dot_target)


def test_passes(dot_target):
    lanes = min(dot_target.machine.lanes, 16)
    cases = [
        {
            "form": form, "size": (3, 7), "channels": 24, "rows": 9, "density": 0.7,
            "tiling": Tiling(form.rows or 6, 2, lanes, 21, depth=2),
        }
        for form in int8.TABLE
    ]  # fmt: skip
    check(share(cases, dot_target, 6), dot_target)


@pytest.fixture
def pairs_target():
    target = find_target("arm", "armv8.6-a")
    if target.cpu not in DOT_CPUS:
        pytest.skip("no emulator for Arm's i8mm")
    return target


def test_pairs_of_pixels_and_channels(pairs_target):
    """Every register tile, ragged pixels, rows and channels, windows, what follows the sums."""
    common = {"form": paired.FORM, "x_type": EXACT}
    cases = [
        {**common, "size": (5, 9), "channels": 8, "rows": 12, "tiling": Tiling(r, q, 4, 45)}
        for r, q in ((8, 3), (8, 2), (8, 1), (4, 6), (4, 4))
    ]
    cases += [
        {**common, "size": (1, 5), "channels": 3, "rows": 9},
        {**common, "size": (1, 1), "channels": 17, "rows": 5, "batch": 2},
        {**common, "size": (7, 7), "channels": 24, "rows": 16, "x_type": QuantType(1.0, -9, "int8")},
        {**common, "size": (8, 9), "channels": 5, "rows": 8, "kernel": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)},
        *({**common, "size": (3, 11), "channels": 8, "rows": 9, "steps": steps} for steps in STEPS[:4]),
    ]
    check(cases, pairs_target)
    geometry = Geometry((1, 128, 14, 14), (128, 128, 1, 1))
    prices = price_quantized_conv(pairs_target.machine, geometry, np.ones(geometry.w_shape, np.int8), X)
    assert prices.cheapest.kernel == paired.FORM.name


def test_pairs_round_trip():
    rng = np.random.default_rng(8)
    for rows, shape in itertools.product((4, 8), ((7, 10, 3, 3), (16, 16, 1, 1), (5, 3, 1, 2))):
        w = rng.integers(-128, 128, shape).astype(np.int8)
        np.testing.assert_array_equal(paired.unpack(paired.pack(w, rows), shape), w)


def test_gathered_form_round_trips():
    rng = np.random.default_rng(6)
    shapes, densities = ((7, 10, 3, 3), (16, 16, 1, 1), (5, 3, 1, 2)), (0.0, 0.3, 1.0)
    for form, shape, density in itertools.product(gathered.TABLE, shapes, densities):
        w = weights(rng, shape, density, form.rows, 1)
        packed = gathered.pack(w, form)
        np.testing.assert_array_equal(gathered.unpack(packed, shape), w)
        assert packed.blocks == gathered.quads(w, form.rows)


def test_the_cheapest_form_follows_the_zeros():
    """Zeros in columns take a form that reads rows one by one, dense weights none; blocks are never stored as columns of 8."""
    machine = find_target("host", "cascadelake").machine
    geometry, rng = Geometry((1, 256, 14, 14), (256, 256, 1, 1)), np.random.default_rng(7)
    for density, rows, columns, expected in (
        (1.0, 4, 1, {"conv_i8_dense"}), (0.2, 4, 1, {"conv_i8_4x1"}), (0.05, 1, 1, {"conv_i8_1x1"}),
        (0.2, 4, 4, {"conv_i8_4x4", "conv_i8_4x1"}),
    ):  # fmt: skip
        prices = price_quantized_conv(machine, geometry, weights(rng, geometry.w_shape, density, rows, columns), X)
        assert prices.cheapest.kernel in expected, (density, rows, columns)


def test_stored_form_round_trips():
    rng = np.random.default_rng(5)
    for form, shape in itertools.product(int8.TABLE, ((7, 10, 3, 3), (16, 16, 1, 1), (5, 3, 1, 2))):
        w = weights(rng, shape, 0.5)
        np.testing.assert_array_equal(int8.unpack_words(int8.pack_words(w, form, 4, 6), shape), w)
