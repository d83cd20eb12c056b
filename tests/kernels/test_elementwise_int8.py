"""8-bit elementwise layers bit by bit against NumPy: types, broadcasts, sizes around the vector, ties, saturation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from layers import Layer, check_layers

from sparsec.kernels import elementwise_int8, quantize_int8
from sparsec.kernels.elementwise_int8 import Side
from sparsec.kernels.epilogue import NONE, RELU, RELU6, Activation
from sparsec.kernels.quantized import QuantType, Requantize
from sparsec.targets import find_target

EXACT = 0.5
UNSIGNED, SIGNED, COARSE = QuantType(0.021, 131), QuantType(0.0173, -9, "int8"), QuantType(0.25, 3)
SIZES = (1, 2, 3, 5, 15, 16, 17, 31, 33, 49, 63, 64, 65, 127, 130, 8191, 8192, 8193, 16400)
SHAPES = [
    ((1, 3, 7, 7), (1, 3, 7, 7)), ((9000,), (9000,)), ((2, 5, 3, 3), (5, 1, 1)), ((5, 1, 1), (2, 5, 6, 7)),
    ((3, 50, 20), (20,)), ((1,), (3, 50, 20)), ((2, 3, 9001), (9001,)), ((1, 40, 9, 15), (1, 40, 1, 1)),
    ((9, 1), (33,)), ((2, 1, 5, 1, 4), (3, 1, 6, 1)), ((1, 1), (1,)),
]  # fmt: skip


def integers(rng, shape, kind):
    """Over the whole range, its ends often."""
    low, high = kind.range
    values = np.where(rng.random(shape) < 0.2, rng.choice([low, high], shape), rng.integers(low, high + 1, shape))
    return values.astype(kind.dtype)


def sides_of(rng, shapes, types):
    """Sides and their stored integers; a type that is None: constant reals around zero."""
    sides, stored = [], []
    for shape, kind in zip(shapes, types, strict=True):
        reals = (rng.uniform(0.1, 3, shape) * rng.choice([-1, 1], shape)).astype(np.float32)
        sides.append(Side(shape, kind, reals if kind is None else None))
        stored.append(None if kind is None else integers(rng, shape, kind))
    return tuple(sides), tuple(stored)


def layer(machine, op, shapes, types, steps, *, tolerance=EXACT):
    sides, stored = sides_of(np.random.default_rng([*shapes[0], len(shapes[1])]), shapes, types)
    call = elementwise_int8.bind(machine, op, sides=sides, steps=steps)
    given = {role: q for role, q in zip("ab", stored, strict=True) if q is not None}
    return Layer(call, elementwise_int8.reference(op, sides, stored, steps), tolerance, **given)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div"])
def test_every_broadcast(dot_target, op):
    machine = dot_target.machine
    choices = itertools.cycle(
        itertools.product((UNSIGNED, SIGNED), (SIGNED, COARSE), (UNSIGNED, SIGNED), (NONE, RELU6))
    )
    cases = [
        layer(machine, op, s, (a, b), Requantize(y, act)) for s, (a, b, y, act) in zip(SHAPES, choices, strict=False)
    ]
    check_layers(cases, dot_target)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div"])
def test_constant_reals(dot_target, op):
    machine, steps = dot_target.machine, Requantize(SIGNED)
    cases = [layer(machine, op, shapes, (None, UNSIGNED), steps) for shapes in SHAPES[::3]]
    cases += [layer(machine, op, shapes, (SIGNED, None), steps) for shapes in SHAPES[1::3]]
    check_layers(cases, dot_target)


def test_sizes_and_types(dot_target):
    cases, machine = [], dot_target.machine
    kinds = itertools.cycle([(UNSIGNED, UNSIGNED, SIGNED), (SIGNED, UNSIGNED, UNSIGNED), (SIGNED, SIGNED, SIGNED)])
    for n in SIZES[:-3]:
        a, b, y = next(kinds)
        cases.append(layer(machine, "add", ((n,), (n,)), (a, b), Requantize(y, RELU)))
    check_layers(cases, dot_target)


def test_ties_round_to_even(dot_target):
    """Equal scales and half of them: every odd sum or product lies between two integers."""
    one, half = QuantType(0.5, 128), QuantType(1.0, 3, "int8")
    both = ((500,), (500,))
    cases = [layer(dot_target.machine, op, both, (one, one), Requantize(half)) for op in ("add", "sub")]
    cases.append(layer(dot_target.machine, "mul", both, (one, half), Requantize(QuantType(1.0, 100))))
    check_layers(cases, dot_target)
    a, side = np.arange(256, dtype=np.uint8), Side((256,), one)
    found = elementwise_int8.reference("add", (side, side), (a, np.full(256, 128, np.uint8)), Requantize(half))
    np.testing.assert_array_equal(found, np.rint((a.astype(int) - 128) / 2) + 3)


def test_scales_far_apart_and_large_results(dot_target):
    far = [(QuantType(1e-3, 7), QuantType(5.0, 200)), (QuantType(3.0, 0), QuantType(1e-9, 255))]
    types = [*far, (QuantType(900.0, 0), QuantType(500.0, 255)), (None, QuantType(1e5, 3)), (QuantType(1e-7, 3), None)]
    steps = Requantize(QuantType(1e-4, 77))
    check_layers(
        [layer(dot_target.machine, op, ((70,), (70,)), t, steps) for op in ("add", "sub", "mul") for t in types],
        dot_target,
    )


def test_other_activations(dot_target):
    """In float32 as everywhere: another order of operations may round to the other side."""
    types = (UNSIGNED, SIGNED)
    cases = [
        layer(dot_target.machine, op, ((3000,), (3000,)), types, Requantize(UNSIGNED, act), tolerance=1.5)
        for op, act in itertools.product(("add", "mul", "div"), (Activation("silu"), Activation("leaky_relu", 0.1)))
    ]
    check_layers(cases, dot_target)


@pytest.mark.parametrize("reals", [False, True])
def test_sum_is_the_real_one(reals):
    """The law of the sum: beside exact arithmetic, results move by no more than 2^-15 of the larger scale."""
    rng = np.random.default_rng(0)
    for a_scale, b_scale in rng.uniform(0.001, 3, (50, 2)):
        types = QuantType(float(np.float32(a_scale)), 7), QuantType(float(np.float32(b_scale)), -90, "int8")
        sides, stored = sides_of(rng, ((300,), (300,)), (types[0], None if reals else types[1]))
        y = QuantType(float(np.float32((a_scale + b_scale) / 2)), 128)
        real = (stored[0].astype(float) - 7) * types[0].scale
        real = real + (sides[1].reals if reals else (stored[1].astype(float) + 90) * types[1].scale)
        off = elementwise_int8.reference("add", sides, stored, Requantize(y)) - (real / y.scale + 128).clip(0, 255)
        assert np.abs(off).max() <= 0.5 + 2.0**-15 * max(s.unit for s in sides) / y.scale + 255 * 2.0**-22


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
        call = quantize_int8.bind_quantize(machine, size=n, y=kind)
        cases.append(Layer(call, kind.quantize(x), EXACT, x=x))
        q = integers(np.random.default_rng(n), n, kind)
        call = quantize_int8.bind_dequantize(machine, size=n, x=kind)
        cases.append(Layer(call, kind.dequantize(q), 1e-30, x=q))
    check_layers(cases, dot_target)


def test_not_a_number_is_the_least(dot_target):
    x = np.where(np.arange(70) % 3 == 0, np.nan, np.arange(70)).astype(np.float32)
    call = quantize_int8.bind_quantize(dot_target.machine, size=70, y=SIGNED)
    check_layers([Layer(call, SIGNED.quantize(np.where(np.isnan(x), -np.inf, x)), EXACT, x=x)], dot_target)


def test_axes():
    assert elementwise_int8.axes((2, 3, 4), (2, 3, 4)) == ((24, True, True),)
    assert elementwise_int8.axes((2, 3, 4, 5), (3, 1, 1)) == ((2, True, False), (3, True, True), (20, True, False))
    assert elementwise_int8.axes((1, 9, 1), (7,)) == ((9, True, False), (7, False, True))
    assert elementwise_int8.axes((1,), (1, 1)) == ((1, True, True),)
    kinds = [((4, 5), (4, 5)), ((4, 5), (1,)), ((4, 5), (5,)), ((4, 1), (4, 5)), ((4, 1), (5,))]
    found = [elementwise_int8.kind_of(elementwise_int8.axes(*shapes)) for shapes in kinds]
    assert found == ["same", "scalar", "row", "channel", "outer"]


def test_what_cannot_be_bound():
    with pytest.raises(ValueError, match="do not broadcast"):
        elementwise_int8.axes((2, 3, 4), (2, 2, 4))
    side, machine = Side((3,), UNSIGNED), find_target("host").machine
    for steps in (Requantize(None), Requantize(UNSIGNED, RELU, "before")):
        with pytest.raises(ValueError, match="end in 8 bits"):
            elementwise_int8.bind(machine, "add", sides=(side, side), steps=steps)
    for bad in ({}, {"reals": np.array([np.inf, 1.0, 1.0])}, {"type": UNSIGNED, "reals": np.ones(3)}):
        with pytest.raises(ValueError, match="a side is"):
            Side((3,), **bad)
