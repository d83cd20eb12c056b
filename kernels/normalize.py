"""Normalizations along the last axis: softmax and layer normalization, a row at a time.

    softmax     y[r, i] = exp(x[r, i] - max x[r]) / sum over j of exp(x[r, j] - max x[r])
    layernorm   y[r, i] = (x[r, i] - mean x[r]) / sqrt(var x[r] + epsilon) * gamma[i] + beta[i]

Each pass over a row reads L1. Sums run in several accumulators, a vector each, to cover the adder's latency; the row's last,
narrower vector is masked. All arithmetic is float32, whatever x and y are. Variance is taken from the differences to the
mean (two passes), which does not cancel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels.base import Format, KernelCall, Machine, unique
from sparsec.kernels.epilogue import exp
from sparsec.kernels.pool import reduce_lanes

ROWS = 8  # rows a tile
CHAINS = 4  # accumulators


TABLE: tuple[Format, ...] = (
    Format("softmax_f32", "Softmax", "dense", "float32", "softmax over the last axis", "the axis is the last"),
    Format(
        "layernorm_f32",
        "LayerNormalization",
        "dense",
        "float32",
        "layer normalization over the last axis",
        "the axis is the last",
    ),
)


def reference_softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis in float64."""
    shifted = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    powers = np.exp(shifted)
    return powers / powers.sum(axis=-1, keepdims=True)


def reference_layernorm(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray | None, epsilon: float) -> np.ndarray:
    """Layer normalization over the last axis in float64."""
    x = x.astype(np.float64)
    centred = x - x.mean(axis=-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon) * gamma
    return y if beta is None else y + beta


class _Row:
    """Passes over one row of `count` elements in vectors of `lanes`; the last may be narrower, then it is masked."""

    def __init__(self, machine: Machine, count: int) -> None:
        lanes = machine.lanes
        while lanes > 4 and lanes >= 2 * count:
            lanes //= 2
        self.count, self.lanes = count, lanes
        self.full, self.rest = divmod(count, lanes)

    def sweep(self, one: Callable[[Any, int], None]) -> None:
        """Emit `one(offset, valid)` for every vector, in rounds of CHAINS, the narrower last one included."""
        rounds = self.full // CHAINS
        if rounds > 1:
            with T.serial(0, rounds) as i:
                for c in range(CHAINS):
                    one((i * CHAINS + c) * self.lanes, self.lanes)
        first = rounds * CHAINS if rounds > 1 else 0
        for v in range(first, self.full):
            one(v * self.lanes, self.lanes)
        if self.rest:
            one(self.full * self.lanes, self.rest)

    def masked(self, value: Any, valid: int, fill: float) -> Any:
        """`value` with `fill` in the lanes from `valid` on."""
        if valid == self.lanes:
            return value
        inside = T.ramp(0, 1, self.lanes) < T.broadcast(valid, self.lanes)
        return T.Select(inside, value, T.broadcast(T.float32(fill), self.lanes))

    def reduce(self, element: Callable[[Any, int], Any], combine: Callable[[Any, Any], Any], fill: float) -> Any:
        """`combine` over element(offset, valid) of the whole row, as a scalar."""
        acc = emit.registers(CHAINS, self.lanes)
        for c in range(CHAINS):
            T.buffer_store(acc, emit.splat(T.float32(fill), self.lanes), [c])
        turn = [0]

        def one(at: Any, valid: int) -> None:
            c = turn[0] % CHAINS
            turn[0] += 1
            T.buffer_store(acc, combine(acc[c], self.masked(element(at, valid), valid, fill)), [c])

        self.sweep(one)
        for c in range(1, CHAINS):
            T.buffer_store(acc, combine(acc[0], acc[c]), [0])
        return reduce_lanes(acc[0], self.lanes, combine)


def bind_softmax(machine: Machine, *, rows: int, count: int) -> KernelCall:
    """The call for softmax of x [rows, count]. Roles (x, y). Tiles: ROWS rows each."""
    row, element = _Row(machine, count), machine.element

    def body(x: Any, y: Any, begin: Any, end: Any) -> None:
        with T.serial(begin * ROWS, T.min(end * ROWS, rows)) as r:
            base = T.bind(r * count)
            top = emit.registers(1, 1)
            largest = row.reduce(lambda at, valid: emit.load_float(x, base + at, row.lanes), T.max, -np.inf)
            T.buffer_store(top, largest, [0])

            def power(at: Any, valid: int) -> Any:
                value = emit.registers(1, row.lanes)
                T.buffer_store(
                    value, exp(emit.load_float(x, base + at, row.lanes) - emit.splat(top[0], row.lanes)), [0]
                )
                emit.store(y, base + at, emit.convert(value[0], element), row.lanes, valid)
                return value[0]

            total = row.reduce(power, lambda a, b: a + b, 0.0)
            scale = emit.registers(1, 1)
            T.buffer_store(scale, T.float32(1) / total, [0])

            def finish(at: Any, valid: int) -> None:
                value = emit.load_float(y, base + at, row.lanes) * emit.splat(scale[0], row.lanes)
                emit.store(y, base + at, emit.convert(value, element), row.lanes, valid)

            row.sweep(finish)

    func = emit.function([("x", rows * count, element), ("y", rows * count, element)], body)
    name = unique(machine.named("softmax_f32"), rows, count, machine)
    return KernelCall(name, func, ("x", "y"), {}, -(-rows // ROWS), 0, f"softmax of {rows} rows of {count}")


def bind_layernorm(
    machine: Machine, *, rows: int, gamma: np.ndarray, beta: np.ndarray | None, epsilon: float
) -> KernelCall:
    """The call for layer normalization of x [rows, len(gamma)]. Roles (x, y, scales). Tiles: ROWS rows each."""
    count = gamma.size
    row, element = _Row(machine, count), machine.element
    # gamma, then beta, each with room for a last whole vector
    pitch = count + row.lanes
    scales = np.zeros(2 * pitch, np.float32)
    scales[:count] = gamma
    if beta is not None:
        scales[pitch : pitch + count] = beta

    def body(x: Any, y: Any, held: Any, begin: Any, end: Any) -> None:
        with T.serial(begin * ROWS, T.min(end * ROWS, rows)) as r:
            base = T.bind(r * count)
            mean, inverse = emit.registers(1, 1), emit.registers(1, 1)
            total = row.reduce(lambda at, valid: emit.load_float(x, base + at, row.lanes), lambda a, b: a + b, 0.0)
            T.buffer_store(mean, total * T.float32(1.0 / count), [0])

            def centred(at: Any) -> Any:
                return emit.load_float(x, base + at, row.lanes) - emit.splat(mean[0], row.lanes)

            squares = row.reduce(lambda at, valid: centred(at) * centred(at), lambda a, b: a + b, 0.0)
            T.buffer_store(inverse, T.float32(1) / T.sqrt(squares * T.float32(1.0 / count) + T.float32(epsilon)), [0])

            def finish(at: Any, valid: int) -> None:
                scaled = centred(at) * emit.splat(inverse[0], row.lanes) * emit.load(held, at, row.lanes)
                value = scaled + emit.load(held, pitch + at, row.lanes)
                emit.store(y, base + at, emit.convert(value, element), row.lanes, valid)

            row.sweep(finish)

    size = rows * count
    func = emit.function([("x", size, element), ("y", size, element), ("scales", scales.size, "float32")], body)
    name = unique(machine.named("layernorm_f32"), rows, count, epsilon, machine)
    text = f"layer normalization of {rows} rows of {count}"
    return KernelCall(name, func, ("x", "y", "scales"), {"scales": scales}, -(-rows // ROWS), 0, text)
