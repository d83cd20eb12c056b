"""8-bit elementwise layers bit by bit against NumPy: types, broadcasts, sizes around the vector, ties, saturation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from layers import Layer, check_layers

from sparsec.kernels import elementwise_int8
from sparsec.kernels.epilogue import NONE, RELU, RELU6, Activation
from sparsec.kernels.quantized import QuantType, Requantize

EXACT = 0.5
UNSIGNED, SIGNED, COARSE = QuantType(0.021, 131), QuantType(0.0173, -9, "int8"), QuantType(0.25, 3)
SIZES = (1, 2, 3, 5, 15, 16, 17, 31, 33, 49, 63, 64, 65, 127, 130, 8191, 8192, 8193, 16400)
SHAPES = [
    ((1, 3, 7, 7), (1, 3, 7, 7)), ((9000,), (9000,)), ((2, 5, 3, 3), (5, 1, 1)), ((2, 5, 6, 7), (2, 5, 1, 1)),
    ((3, 50, 20), (20,)), ((3, 50, 20), (1,)), ((2, 3, 9001), (9001,)), ((1, 40, 9, 15), (1, 40, 1, 1)),
]  # fmt: skip


def integers(rng, shape, kind):
    """Over the whole range, its ends often."""
    low, high = kind.range
    values = np.where(rng.random(shape) < 0.2, rng.choice([low, high], shape), rng.integers(low, high + 1, shape))
    return values.astype(kind.dtype)


def layer(machine, op, a_shape, b_shape, types, steps, *, swapped=False, tolerance=EXACT):
    rng = np.random.default_rng([*a_shape, len(b_shape)])
    a, b = (integers(rng, shape, kind) for shape, kind in zip((a_shape, b_shape), types, strict=True))
    call = elementwise_int8.bind(
        machine, op, a_shape=a_shape, b_shape=b_shape, types=types, steps=steps, swapped=swapped
    )
    return Layer(call, elementwise_int8.reference(op, a, b, types, steps, swapped), tolerance, a=a, b=b)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div"])
def test_every_spread(dot_target, op):
    cases, machine = [], dot_target.machine
    choices = itertools.cycle(
        itertools.product((UNSIGNED, SIGNED), (SIGNED, COARSE), (UNSIGNED, SIGNED), (NONE, RELU6))
    )
    for (a, b), swapped in itertools.product(SHAPES, (False, True)):
        x, other, y, act = next(choices)
        cases.append(layer(machine, op, a, b, (x, other), Requantize(y, act), swapped=swapped))
    check_layers(cases, dot_target)


def test_sizes_and_types(dot_target):
    cases, machine = [], dot_target.machine
    kinds = itertools.cycle([(UNSIGNED, UNSIGNED, SIGNED), (SIGNED, UNSIGNED, UNSIGNED), (SIGNED, SIGNED, SIGNED)])
    for n in SIZES[:-3]:
        a, b, y = next(kinds)
        cases.append(layer(machine, "add", (n,), (n,), (a, b), Requantize(y, RELU)))
    check_layers(cases, dot_target)


def test_ties_round_to_even(dot_target):
    """Equal scales and half of them: every odd sum or product lies between two integers."""
    one, half = QuantType(0.5, 128), QuantType(1.0, 3, "int8")
    cases = [layer(dot_target.machine, op, (500,), (500,), (one, one), Requantize(half)) for op in ("add", "sub")]
    cases.append(layer(dot_target.machine, "mul", (500,), (500,), (one, half), Requantize(QuantType(1.0, 100))))
    check_layers(cases, dot_target)
    a = np.arange(256, dtype=np.uint8)
    found = elementwise_int8.reference("add", a, np.full(256, 128, np.uint8), (one, one), Requantize(half))
    np.testing.assert_array_equal(found, np.rint((a.astype(int) - 128) / 2) + 3)


def test_scales_far_apart_and_large_results(dot_target):
    far = [(QuantType(1e-3, 7), QuantType(5.0, 200)), (QuantType(3.0, 0), QuantType(1e-9, 255))]
    types = [*far, (QuantType(900.0, 0), QuantType(500.0, 255))]
    steps = Requantize(QuantType(1e-4, 77))
    check_layers(
        [layer(dot_target.machine, op, (70,), (70,), t, steps) for op in ("add", "sub", "mul") for t in types],
        dot_target,
    )


def test_other_activations(dot_target):
    """In float32 as everywhere: another order of operations may round to the other side."""
    cases = [
        layer(dot_target.machine, op, (3000,), (3000,), (UNSIGNED, SIGNED), Requantize(UNSIGNED, act), tolerance=1.5)
        for op, act in itertools.product(("add", "mul", "div"), (Activation("silu"), Activation("leaky_relu", 0.1)))
    ]
    check_layers(cases, dot_target)


def test_sum_is_the_real_one():
    """The law of the sum: beside exact arithmetic, results move by no more than 2^-15 of the larger scale."""
    rng = np.random.default_rng(0)
    for a_scale, b_scale in rng.uniform(0.001, 3, (50, 2)):
        types = QuantType(float(np.float32(a_scale)), 7), QuantType(float(np.float32(b_scale)), -90, "int8")
        a, b = integers(rng, 300, types[0]), integers(rng, 300, types[1])
        y = QuantType(float(np.float32((a_scale + b_scale) / 2)), 128)
        real = (a.astype(float) - 7) * types[0].scale + (b.astype(float) + 90) * types[1].scale
        off = elementwise_int8.reference("add", a, b, types, Requantize(y)) - (real / y.scale + 128).clip(0, 255)
        assert np.abs(off).max() <= 0.5 + 2.0**-15 * max(a_scale, b_scale) / y.scale + 255 * 2.0**-22


def floats(n, y):
    """Values around every step of y, ties exactly where the scale is a power of two, and far outside."""
    rng = np.random.default_rng(n)
    x = (rng.integers(-300, 600, n) / 2 * np.float32(y.scale)).astype(np.float32)
    x[::5] = rng.choice([np.inf, -np.inf, 1e30, -1e30, 0.0, -0.0], x[::5].size)
    return x


def test_quantize_and_dequantize(dot_target):
    machine, cases = dot_target.machine, []
    kinds = itertools.cycle([UNSIGNED, SIGNED, COARSE, QuantType(1e-6, 0), QuantType(0.125, -128, "int8")])
    for n, kind in zip(SIZES, kinds, strict=False):
        x = floats(n, kind)
        call = elementwise_int8.bind_quantize(machine, size=n, y=kind)
        cases.append(Layer(call, kind.quantize(x), EXACT, x=x))
        q = integers(np.random.default_rng(n), n, kind)
        call = elementwise_int8.bind_dequantize(machine, size=n, x=kind)
        cases.append(Layer(call, kind.dequantize(q), 1e-30, x=q))
    check_layers(cases, dot_target)


def test_not_a_number_is_the_least(dot_target):
    x = np.where(np.arange(70) % 3 == 0, np.nan, np.arange(70)).astype(np.float32)
    call = elementwise_int8.bind_quantize(dot_target.machine, size=70, y=SIGNED)
    check_layers([Layer(call, SIGNED.quantize(np.where(np.isnan(x), -np.inf, x)), EXACT, x=x)], dot_target)


def test_what_cannot_be_bound():
    with pytest.raises(ValueError, match="does not broadcast"):
        elementwise_int8.bind(
            None, "add", a_shape=(2, 3, 4), b_shape=(2, 1, 4), types=(UNSIGNED, SIGNED), steps=Requantize(UNSIGNED)
        )
    for steps in (Requantize(None), Requantize(UNSIGNED, RELU, "before")):
        with pytest.raises(ValueError, match="end in 8 bits"):
            elementwise_int8.bind(None, "add", a_shape=(3,), b_shape=(3,), types=(UNSIGNED, SIGNED), steps=steps)
