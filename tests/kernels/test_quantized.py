"""8-bit arithmetic alone: sums of four products bit by bit, rounding and saturation against NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from harness import Library, Room, run_kernel
from layers import share
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import dots, emit, quantized
from sparsec.kernels.epilogue import NONE, RELU, RELU6, Activation
from sparsec.kernels.quantized import QuantType, Requantize, reference_requantize
from sparsec.program import Kernel

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


def finishing(machine, steps, multiplier, size, together):
    """A kernel that finishes sums: one vector at a time, or four as one of bytes."""
    lanes = machine.lanes

    def body(x, o, y, begin, end):
        with T.serial(begin, end) as t:
            first = t * (lanes * together)
            factor = emit.constant(multiplier, lanes)
            places = [first + v * lanes for v in range(together)]
            sums = [emit.load(x, at, lanes) for at in places]
            others = [emit.load(o, at, lanes) if steps.residual != "none" else None for at in places]
            if together == 1:
                value = steps.finish(machine, sums[0], factor, others[0])
            else:
                value = steps.finish_bytes(machine, sums, [factor] * together, others)
            emit.store(y, first, value, lanes * together)

    return emit.function([("x", size, "int32"), ("o", size, steps.other_element), ("y", size, steps.element)], body)


def test_requantize(dot_target):
    """Within one step where float32 operations of another order round to the other side, equal nearly everywhere."""
    machine, tiles = dot_target.machine, 64
    size = 4 * machine.lanes * tiles
    rng = np.random.default_rng(1)
    acc = rng.integers(-40000, 40000, size).astype(np.int32)
    acc[:4] = -(1 << 31), (1 << 31) - 1, 0, 1
    cases = []
    for i, steps in enumerate(share(STEPS, dot_target, 5)):
        multiplier = steps.multipliers(QuantType(0.02, 0), np.full(1, 0.013))
        other = bytes_of(rng, size).view(steps.other_element) if steps.other else rng.standard_normal(size).astype("f")
        for together in (1, 4) if steps.y is not None and machine.lanes >= 4 else (1,):
            func = finishing(machine, steps, float(multiplier[0]), size, together)
            cases.append((steps, Kernel(f"finish{i}x{together}", func), other, multiplier, 4 * tiles // together))
    library = Library([kernel for _, kernel, *_ in cases], dot_target)
    for steps, kernel, other, multiplier, count in cases:
        rooms = [Room(array) for array in (acc, other, np.zeros(size, steps.element))]
        library.call(kernel.name, rooms, count)
        found, expected = rooms[2].array, reference_requantize(acc, multiplier, steps, other)
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
