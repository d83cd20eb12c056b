"""8-bit arithmetic alone: sums of four products bit by bit, rounding and saturation against NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from harness import run_kernel
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import dots, emit, quantized
from sparsec.kernels.epilogue import NONE, RELU, RELU6, Activation
from sparsec.kernels.quantized import QuantType, Requantize

EXTREMES = np.array([-128, -127, -1, 0, 1, 127], np.int8)


def bytes_of(rng, size):
    """Random bytes, extremes often."""
    return np.where(rng.random(size) < 0.5, rng.choice(EXTREMES, size), rng.integers(-128, 128, size)).astype(np.int8)


def test_dot(dot_target):
    machine, tiles = dot_target.machine, 64
    rng = np.random.default_rng(0)
    for lanes in [n for n in (1, 2, 4, 8, 16) if n <= machine.lanes]:

        def body(x, w, y, begin, end, lanes=lanes):
            with T.serial(begin, end) as t:
                acc = emit.load(y, t * lanes, lanes)
                value = dots.dot(machine, acc, emit.load(x, t * lanes, lanes), emit.load(w, t * lanes, lanes))
                emit.store(y, t * lanes, value, lanes)

        size = lanes * tiles
        func = emit.function([(name, size, "int32") for name in "xwy"], body)
        x, w = bytes_of(rng, (size, 4)), bytes_of(rng, (size, 4))
        x[:6], w[:6] = -128, np.repeat(EXTREMES[:, None], 4, axis=1)  # 0x80: 128 or -128
        start = rng.integers(-(1 << 20), 1 << 20, size).astype(np.int32)
        found = run_kernel(func, [quantized.words(x)[:, 0], quantized.words(w)[:, 0], start], tiles, dot_target)[2]
        left = x.astype(np.int64) if machine.signed_dot else x.view(np.uint8).astype(np.int64)
        np.testing.assert_array_equal(found, start + (left * w.astype(np.int64)).sum(axis=1))


def test_interleave(dot_target):
    for lanes in [n for n in (1, 4, 8, 16) if n <= dot_target.machine.lanes]:

        def body(x, y, begin, end, lanes=lanes):
            with T.serial(begin, end):
                rows = [emit.load(x, i * lanes, lanes) for i in range(4)]
                emit.store(y, 0, quantized.flip(quantized.interleave(dot_target.machine, rows)), lanes)

        x = bytes_of(np.random.default_rng(lanes), (4, lanes)).view(np.uint8)
        func = emit.function([("x", x.size, "uint8"), ("y", lanes, "int32")], body)
        found = run_kernel(func, [x.reshape(-1), np.zeros(lanes, np.int32)], 1, dot_target)[1]
        np.testing.assert_array_equal(found, quantized.words(np.ascontiguousarray(x.T ^ 128).view(np.int8))[:, 0])


Y, S, INNER = QuantType(0.05, 3), QuantType(0.07, -5, "int8"), QuantType(0.03, 200)
SILU, CLIP = Activation("silu"), Activation("clip", -0.7, 2.31)
STEPS = (
    *(Requantize(y, act) for y in (Y, S, None) for act in (NONE, RELU, RELU6, CLIP, SILU)),
    *(
        Requantize(y, act, kind, inner, other)
        for (act, kind), inner, (other, y) in itertools.product(
            ((NONE, "before"), (RELU, "before"), (SILU, "before"), (RELU6, "after"), (SILU, "after")),
            (INNER, None), ((S, Y), (Y, S), (None, None)),
        )
    ),
)  # fmt: skip


def test_requantize(dot_target):
    """Within one step where float32 operations of another order round to the other side, equal nearly everywhere."""
    machine = dot_target.machine
    lanes, tiles = machine.lanes, 64
    rng = np.random.default_rng(1)
    size = lanes * tiles
    for steps in STEPS if machine.dot == "vnni" or machine.lane_fma else STEPS[::7]:
        acc = rng.integers(-40000, 40000, size).astype(np.int32)
        acc[:4] = -(1 << 31), (1 << 31) - 1, 0, 1
        multiplier = steps.multipliers(QuantType(0.02, 0), np.full(1, 0.013))
        other = bytes_of(rng, size).view(steps.other_element) if steps.other else rng.standard_normal(size).astype("f")

        def body(x, o, y, begin, end, steps=steps, multiplier=multiplier):
            with T.serial(begin, end) as t:
                rest = emit.load(o, t * lanes, lanes) if steps.residual != "none" else None
                value = steps.finish(
                    machine, emit.load(x, t * lanes, lanes), emit.constant(float(multiplier[0]), lanes), rest
                )
                emit.store(y, t * lanes, value, lanes)

        func = emit.function([("x", size, "int32"), ("o", size, steps.other_element), ("y", size, steps.element)], body)
        found = run_kernel(func, [acc, other, np.zeros(size, steps.element)], tiles, dot_target)[2]
        expected = quantized.reference_requantize(acc, multiplier, steps, other)
        if steps.y is None:
            np.testing.assert_allclose(found, expected, rtol=3e-6, atol=3e-6, err_msg=str(steps))
            continue
        wrong = np.abs(found.astype(int) - expected.astype(int))
        assert wrong.max() <= 1 and np.mean(wrong > 0) <= 0.003, (steps, wrong.max(), np.mean(wrong > 0))


def test_zero_points():
    """The correction is what makes packed products those of the real values."""

    class Signed:
        signed_dot = True

    class Unsigned:
        signed_dot = False

    rng = np.random.default_rng(2)
    w, bias = bytes_of(rng, (3, 8)), rng.integers(-1000, 1000, 3)
    for dtype, machine in itertools.product(("uint8", "int8"), (Signed, Unsigned)):
        x_type = QuantType(0.1, 7, dtype)
        x = bytes_of(rng, 8).view(dtype)
        packed = (x.view(np.uint8) ^ (128 if quantized.flipped(machine, x_type) else 0)).view(
            np.int8 if machine.signed_dot else np.uint8
        )
        start = quantized.correction(machine, w, bias, x_type)
        expected = bias + w.astype(int) @ (x.astype(int) - 7)
        np.testing.assert_array_equal(start + w.astype(int) @ packed.astype(int), expected)
    with pytest.raises(ValueError, match="32 bits"):
        quantized.correction(Unsigned, w, np.full(3, 1 << 31), QuantType(1.0, 0))


def test_refused():
    for bad in ({"scale": 0.0}, {"scale": float("nan")}, {"zero_point": 256}, {"zero_point": -1}):
        with pytest.raises(ValueError, match="quantization needs"):
            QuantType(**({"scale": 1.0, "zero_point": 0} | bad))
