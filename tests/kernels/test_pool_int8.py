"""8-bit pooling against its definition, bit by bit: widths around the vector, edges, strides, types."""

from __future__ import annotations

import numpy as np
import pytest
from layers import Layer, check_layers

from sparsec.kernels import mean_int8, planes, pool_int8
from sparsec.kernels.epilogue import NONE, RELU, Activation
from sparsec.kernels.quantized import QuantType, Requantize

X, S = QuantType(0.02, 7), QuantType(0.03, -5, "int8")
Y, Z = QuantType(0.013, 3), QuantType(0.025, -9, "int8")
EXACT = 0.5  # of integers


def stored(shape, x_type, *seed):
    rng = np.random.default_rng([*shape, *seed])
    return rng.integers(*x_type.range, shape, endpoint=True).astype(x_type.dtype)


def largest(machine, shape, kernel, x_type=X, strides=(1, 1), pads=(0, 0, 0, 0), dilations=(1, 1), ceil=False):
    window = planes.Window(shape[2], shape[3], kernel, strides, pads, dilations, ceil)
    assert pool_int8.refusal(window) is None
    x = stored(shape, x_type, *kernel)
    call = pool_int8.bind_max(machine, planes=shape[0] * shape[1], window=window, element=x_type.dtype)
    return Layer(call, pool_int8.reference_max(x, window).astype(np.float32), EXACT, x=x)


def average(machine, shape, kernel, x_type=X, strides=(1, 1), pads=(0, 0, 0, 0), dilations=(1, 1), ceil=False, *,
            include_pad=False, steps=None):  # fmt: skip
    window = planes.Window(shape[2], shape[3], kernel, strides, pads, dilations, ceil)
    steps = steps or Requantize(Y)
    x = stored(shape, x_type, *kernel)
    call = pool_int8.bind_average(
        machine, planes=shape[0] * shape[1], window=window, x=x_type, steps=steps, include_pad=include_pad
    )
    expected = pool_int8.reference_average(x, window, x_type, steps, include_pad)
    plain = steps.activation.kind in ("none", "relu", "clip")
    # float32 functions may round to the other side; never further
    tolerance = 1e-4 if steps.y is None else EXACT if plain else 1.5
    return Layer(call, expected.astype(np.float32), tolerance, x=x)


@pytest.mark.parametrize("bound", [largest, average])
def test_widths_around_the_vector(dot_target, bound):
    cases = []
    for i, width in enumerate((1, 2, 3, 5, 9, 15, 16, 17, 31, 33, 65, 130)):
        stride = 1 + i // 2 % 2
        cases.append(bound(dot_target.machine, (1, 3, 4, width), (2, 3), (S, X)[i % 2], (1, stride), (0, 1, 1, 1)))
    check_layers(cases, dot_target)


@pytest.mark.parametrize("bound", [largest, average])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 3)])
def test_windows(dot_target, bound, strides):
    cases = []
    for i, shape in enumerate([(1, 17, 9, 33), (2, 9, 14, 14), (1, 2, 27, 26), (1, 3, 7, 5)]):
        pads = [(1, 1, 1, 1), (0, 0, 0, 0), (0, 0, 1, 2), (2, 0, 1, 1)][i]
        cases.append(bound(dot_target.machine, shape, (3, 3), (X, S)[i % 2], strides, pads))
    cases.append(bound(dot_target.machine, (1, 5, 8, 23), (1, 1), S, strides))
    check_layers(cases, dot_target)


@pytest.mark.parametrize("bound", [largest, average])
def test_large_windows_dilations_and_rounding_up(dot_target, bound):
    machine = dot_target.machine
    check_layers([
        bound(machine, (1, 4, 9, 9), (2, 2), X, (2, 2), ceil=True),
        bound(machine, (1, 16, 12, 12), (3, 3), S, (2, 2), (1, 1, 1, 1), ceil=True),
        bound(machine, (1, 2, 13, 13), (13, 13)),
        bound(machine, (1, 3, 12, 30), (10, 9), S, (1, 2), (4, 4, 4, 4)),
        bound(machine, (1, 3, 140, 3), (130, 3), X, (1, 1), (3, 1, 3, 1)),
        bound(machine, (1, 17, 11, 40), (2, 2), X, dilations=(2, 3)),
        bound(machine, (1, 2, 9, 20), (3, 3), S, (1, 1), (4, 3, 4, 3), (4, 3)),
        bound(machine, (1, 5, 50, 1), (9, 1), X, (2, 1), (4, 0, 4, 0)),
    ], dot_target)  # fmt: skip


def test_what_follows_a_sum(dot_target):
    machine, shape, one = dot_target.machine, (1, 17, 9, 21), (1, 1, 1, 1)
    check_layers([
        average(machine, shape, (3, 3), pads=one, include_pad=True),
        average(machine, shape, (3, 3), S, (2, 2), one, include_pad=True, steps=Requantize(Z)),
        average(machine, shape, (2, 2), QuantType(0.02, 0), (2, 2), steps=Requantize(QuantType(0.02, 0))),  # many ties
        average(machine, shape, (3, 3), steps=Requantize(Y, RELU)),
        average(machine, shape, (3, 3), S, steps=Requantize(Z, Activation("clip", -0.7, 1.31))),
        average(machine, shape, (3, 3), steps=Requantize(Y, Activation("hardswish"))),
        average(machine, shape, (3, 3), (S), (2, 2), one, steps=Requantize(None, RELU)),
        average(machine, (1, 2, 3, 3), (2, 2), S, steps=Requantize(None, NONE)),
    ], dot_target)  # fmt: skip


def test_means_of_planes(dot_target):
    cases = []
    for i, (rows, count) in enumerate([
        (1, 1), (33, 49), (64, 3), (5, 64), (40, 196), (3, 1000), (130, 16), (18, 65), (67, 9),
    ]):  # fmt: skip
        x_type = (X, S)[i % 2]
        x = stored((rows, count), x_type)
        for steps in (Requantize((Y, Z)[i // 2 % 2]), (Requantize(None, RELU), Requantize(Z, RELU))[i % 2]):
            call = mean_int8.bind_mean(dot_target.machine, rows=rows, count=count, x=x_type, steps=steps)
            expected = mean_int8.reference(x, x_type, steps).astype(np.float32)
            cases.append(Layer(call, expected, 1e-4 if steps.y is None else EXACT, x=x))
    check_layers(cases, dot_target)


def test_extremes_are_not_cut_off(dot_target):
    """Sums of 128 rows of the largest integer are as wide as 16 bits get; results beyond 8 bits saturate."""
    shape, kernel = (1, 1, 128, 20), (128, 3)
    window = planes.Window(*shape[2:], kernel)
    cases = []
    for x_type in (QuantType(1.0, 0), QuantType(1.0, 255), QuantType(1.0, -128, "int8"), QuantType(1.0, 127, "int8")):
        for value in x_type.range:
            for y in (QuantType(1.0, 0), QuantType(1e-30, 0)):
                x, steps = np.full(shape, value, x_type.dtype), Requantize(y)
                call = pool_int8.bind_average(dot_target.machine, planes=1, window=window, x=x_type, steps=steps)
                expected = np.full((1, 1, *window.shape), y.quantize(x_type.dequantize(x[0, 0, 0, 0])), np.float32)
                cases.append(Layer(call, expected, EXACT, x=x))
    check_layers(cases, dot_target)


def test_refusals_say_why():
    assert pool_int8.refusal(planes.Window(4, 4, (2, 2))) is None
    assert "no element inside" in pool_int8.refusal(planes.Window(4, 4, (2, 2), (1, 1), (2, 0, 0, 0)))
    with np.testing.assert_raises_regex(ValueError, "32 bits"):
        mean_int8.bind_mean(None, rows=1, count=1 << 23, x=X, steps=Requantize(Y))  # type: ignore[arg-type]
