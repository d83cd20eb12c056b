"""Convolution in 8 bits, dense and in blocks, on every instruction for sums of four products: sums bit by bit."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from layers import Layer, check_layers

from sparsec.kernels import quantized
from sparsec.kernels.conv import Geometry, Tiling, int8
from sparsec.kernels.epilogue import NONE, RELU, RELU6, Activation
from sparsec.kernels.quantized import QuantType, Requantize

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
SIZES = {1: (1, 1), 3: (1, 3), 5: (1, 5), 17: (1, 17), 33: (3, 11), 49: (7, 7), 65: (5, 13)}


def weights(rng, shape, density):
    w = rng.integers(-127, 128, shape).astype(np.int8)
    blocks = rng.random((-(-shape[0] // 4), -(-shape[1] // 4), *shape[2:])) < density
    return np.where(blocks.repeat(4, 0).repeat(4, 1)[: shape[0], : shape[1]], w, 0).astype(np.int8)


def layer(machine, form, *, size, channels, rows, kernel=(1, 1), strides=(1, 1), pads=(0, 0, 0, 0), dilations=(1, 1),
          batch=1, density=0.4, x_type=EXACT, steps=None, tiling=None):  # fmt: skip
    """One layer as the convolution sees it, behind `prepare`. Without `steps` the exact sums come out, as float32."""
    geometry = Geometry((batch, channels, *size), (rows, channels, *kernel), strides, pads, dilations)
    rng = np.random.default_rng([*geometry.x_shape, *geometry.w_shape, form.rows])
    x = rng.integers(*x_type.range, geometry.x_shape, endpoint=True).astype(x_type.dtype)
    w = weights(rng, geometry.w_shape, density)
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
    prepare, main = int8.bind(
        machine, geometry, w, x=x_type, w_scale=w_scale, steps=steps, form=form, bias=bias, tiling=tiling
    )
    given = {"x": prepared(geometry, x, x_type.zero_point)}
    if steps.residual != "none":
        given["residual"] = other
    tolerance = 1e-30 if exact else 1.5 if steps.y else 4e-6 * (1 + np.abs(expected))
    found = [Layer(main, expected.astype(np.float64), tolerance, **given)]
    if prepare is not None:
        found.append(Layer(replace(prepare, roles=("x", "y")), given["x"].astype(np.float64), 1e-30, x=x))
    return found


def prepared(geometry, x, outside):
    """The phase planes of x with whole words of channels, by their definition."""
    whole = int8.padded(geometry)
    (_, _, height, width), (sh, sw), (top, left, _, _) = geometry.x_shape, geometry.strides, geometry.pads
    out = np.full(whole.prepared_shape, outside, x.dtype)
    _, rows, columns = geometry.phase_shape
    for f, (row, column) in enumerate(geometry.phases):
        for q, r in itertools.product(range(rows), range(columns)):
            y, z = q * sh + row - top, r * sw + column - left
            if 0 <= y < height and 0 <= z < width:
                out[:, : x.shape[1], f, q, r] = x[:, :, y, z]
    return out


@pytest.fixture(params=int8.TABLE, ids=lambda form: form.name)
def form(request):
    return request.param


def test_sums(dot_target, form):
    """Every sum is the integer it should be, through the float32 that it is stored as."""
    cases = [
        layer(
            dot_target.machine, form, size=size, channels=channels, rows=rows, density=density,
            x_type=QuantType(1.0, zero, dtype), batch=1 + number % 2,
        )
        for number, ((_, size), channels, rows, density, (zero, dtype)) in enumerate(zip(
            SIZES.items(), (4, 8, 7, 12, 3, 16, 9), itertools.cycle((16, 5, 9)), itertools.cycle((0.4, 1.0, 0.0)),
            itertools.cycle(((97, "uint8"), (-9, "int8"))),
        ))
    ]  # fmt: skip
    check_layers([one for case in cases for one in case], dot_target)


def test_windows(dot_target, form):
    number = int8.TABLE.index(form)
    cases = [
        layer(
            dot_target.machine, form, size=size, channels=5 + i, rows=max(form.rows, 4) + i, kernel=kernel,
            strides=strides, pads=pads, dilations=dilations, batch=1 + (i == 1),
        )
        for i, (kernel, strides, pads, dilations, size) in enumerate(WINDOWS) if (i + number) % 2 or form.rows == 4
    ]  # fmt: skip
    check_layers([one for case in cases for one in case], dot_target)


def test_steps(dot_target):
    form = int8.TABLE[2]
    cases = [
        layer(
            dot_target.machine,
            form,
            size=SIZES[33 if i % 2 else 17],
            channels=8,
            rows=9,
            x_type=(X, S)[i % 2],
            steps=steps,
        )
        for i, steps in enumerate(STEPS)
    ]
    check_layers([one for case in cases for one in case], dot_target)


def test_passes(dot_target):
    machine = dot_target.machine
    cases = [
        layer(
            machine, form, size=(3, 7), channels=24, rows=9, density=0.7,
            tiling=Tiling(form.rows or 6, 2, min(machine.lanes, 16), 21, depth=2),
        )
        for form in int8.TABLE
    ]  # fmt: skip
    check_layers([one for case in cases for one in case], dot_target)


def test_stored_form_round_trips():
    rng = np.random.default_rng(5)
    for form, shape in itertools.product(int8.TABLE, ((7, 10, 3, 3), (16, 16, 1, 1), (5, 3, 1, 2))):
        w = weights(rng, shape, 0.5)
        np.testing.assert_array_equal(int8.unpack_words(int8.pack_words(w, form, 4, 6), shape), w)
