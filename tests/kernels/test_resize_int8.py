"""Bilinear resizing of 8-bit planes against its definition, bit by bit, and against float64."""

from __future__ import annotations

import numpy as np
import pytest
from layers import Layer, check_layers

from sparsec.kernels import resize_int8
from sparsec.kernels.epilogue import RELU
from sparsec.kernels.quantized import QuantType, Requantize
from sparsec.kernels.resize_int8 import Taps

X, S = QuantType(0.02, 7), QuantType(0.03, -5, "int8")
Y, Z = QuantType(0.013, 3), QuantType(0.03, -5, "int8")


def half_pixel(size: int, outputs: int) -> Taps:
    at = np.clip((np.arange(outputs) + 0.5) * size / outputs - 0.5, 0, size - 1)
    low = at.astype(np.int64)
    return Taps(low, np.minimum(low + 1, size - 1), at - low)


def stored(shape, x_type):
    rng = np.random.default_rng(shape)
    return rng.integers(*x_type.range, shape, endpoint=True).astype(x_type.dtype)


def layer(machine, shape, out, x_type=X, steps=Requantize(Y)):  # noqa: B008 - frozen
    rows, columns = half_pixel(shape[1], out[0]), half_pixel(shape[2], out[1])
    x = stored(shape, x_type)
    call = resize_int8.bind(
        machine, planes=shape[0], height=shape[1], width=shape[2], rows=rows, columns=columns, x=x_type, steps=steps
    )
    expected = resize_int8.reference(x, rows, columns, x_type, steps)
    return Layer(call, expected.astype(np.float32), 1e-4 if steps.y is None else 0.5, x=x)


def test_sizes(dot_target):
    machine = dot_target.machine
    check_layers([
        layer(machine, (3, 7, 9), (14, 18)),
        layer(machine, (2, 5, 33), (7, 50), S, Requantize(Z)),
        layer(machine, (1, 8, 70), (3, 31), S, Requantize(Y, RELU)),
        layer(machine, (2, 1, 1), (1, 5)),
        layer(machine, (1, 6, 16), (6, 100), X, Requantize(None)),
        layer(machine, (1, 2, 3), (3, 4), X, Requantize(QuantType(1e-30, 0))),
    ], dot_target)  # fmt: skip


@pytest.mark.parametrize(("size", "out"), [((8, 8), (16, 32)), ((13, 17), (40, 23))])
def test_fixed_point_is_within_an_eighth_of_a_step(size, out):
    """Rounding to steps of a sixteenth of x's shows it; twice and four times are exact."""
    fine = QuantType(X.scale / 16, 0)
    rows, columns = half_pixel(size[0], out[0]), half_pixel(size[1], out[1])
    x = (stored((4, *size), X) % 16).astype(np.uint8)
    plain = QuantType(X.scale, 0)
    got = resize_int8.reference(x, rows, columns, plain, Requantize(fine)).astype(np.float64)
    a, b = rows.weight[:, None], columns.weight
    taken = [[x[:, r][:, :, c].astype(np.float64) for c in (columns.low, columns.high)] for r in (rows.low, rows.high)]
    real = (1 - a) * ((1 - b) * taken[0][0] + b * taken[0][1]) + a * ((1 - b) * taken[1][0] + b * taken[1][1])
    wrong = np.abs(got - 16 * real)
    assert wrong.max() <= 0.5 + (0 if size == (8, 8) else 2)
