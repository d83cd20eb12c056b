"""Means of whole planes in 8 bits: GlobalAveragePool, and ReduceMean over the last axes.

    acc[r] = sum of x[r, :] - count * zero_point of x                       int32, exact
    y[r] = acc[r] * (x.scale / (unit * count)) through `Requantize`

A sum of bytes is a dot product with ones (`sparsec.kernels.dots`): four bytes a lane and instruction. Each row
gives a vector of partial sums; as many rows as a vector has lanes are then added across: two vectors become one with half
as many partial sums of either, until a lane holds a row's sum. Four of those vectors become one of bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit, quantized
from sparsec.kernels.base import Format, KernelCall, Machine, unique
from sparsec.kernels.dots import dot
from sparsec.kernels.quantized import QuantType, Requantize, reference_requantize

TABLE: tuple[Format, ...] = (
    Format("globalpool_int8", "GlobalAveragePool, ReduceMean", "dense", "int8",
           "mean of each 8-bit plane", "reduction over all trailing axes"),
)  # fmt: skip
MOST = ((1 << 31) - 1) // (255 * 2)  # elements of a row whose sum, less its zero points, fits in 32 bits


def multiplier(count: int, x: QuantType, steps: Requantize) -> np.float32:
    """What a sum of `count` integers is multiplied with."""
    return np.float32(steps.multipliers(x, np.full(1, 1.0 / count))[0])


def reference(x: np.ndarray, x_type: QuantType, steps: Requantize) -> np.ndarray:
    """Means of x [rows, count] as stored: exact sums, then float32."""
    sums = (x.astype(np.int64) - x_type.zero_point).sum(axis=1).astype(np.int32)
    return reference_requantize(sums, np.asarray(multiplier(x.shape[1], x_type, steps)), steps)


def bind_mean(machine: Machine, *, rows: int, count: int, x: QuantType, steps: Requantize) -> KernelCall:
    """The call for means of `rows` rows of `count` integers of type `x`. Roles (x, y, scratch).

    Tiles: four vectors of rows each, the last fewer. Raises ValueError where a sum could leave 32 bits.
    """
    if count > MOST:
        raise ValueError(f"sums of {count:,} integers: 32 bits are not enough")
    kernel = _Mean(machine.single(), rows, count, x, steps)
    sizes = [
        ("x", rows * count, x.dtype), ("y", rows, steps.element), ("scratch", kernel.scratch, "int32"),
    ]  # fmt: skip
    name = unique(f"globalaveragepool_int8_{x.dtype}", rows, count, x, steps, machine)
    text = f"mean of {rows} planes of {count} in 8 bits, {steps.activation.name}"
    func = emit.function(sizes, kernel.body)
    roles = ("x", "y", "scratch")
    return KernelCall(name, func, roles, {}, -(-rows // kernel.per_tile), 4 * kernel.scratch, text)


class _Mean:
    """The code of one layer."""

    def __init__(self, machine: Machine, rows: int, count: int, x: QuantType, steps: Requantize) -> None:
        self.machine, self.rows, self.count, self.x_type, self.steps = machine, rows, count, x, steps
        lanes = machine.lanes
        while lanes > 4 and 4 * lanes >= 2 * count:
            lanes //= 2
        self.words = lanes  # of a vector of a row
        self.lanes = machine.lanes  # rows whose sums become a vector
        self.per_tile = 4 * self.lanes
        self.scratch = self.lanes * self.words + 4 * self.lanes
        self.flipped = quantized.flipped(machine, x)
        self.start = -count * quantized.packed_zero(machine, x)
        self.factor = multiplier(count, x, steps)
        self.bounded = 255.0 * count * float(self.factor) >= 2.0**30

    def body(self, x: Any, y: Any, room: Any, begin: Any, end: Any) -> None:
        """All tiles [begin, end). `room`: partial sums of `lanes` rows, then sums of all rows of the tile."""
        self.x, self.y, self.room = x, y, room
        sums = self.lanes * self.words
        with T.serial(begin, end) as t:
            with T.serial(0, 4) as g:
                with T.serial(0, self.lanes) as r:
                    # Behind the last row it is taken again, and not stored.
                    row = T.bind(T.min(t * self.per_tile + g * self.lanes + r, self.rows - 1))
                    emit.store(room, r * self.words, self._row(row * self.count), self.words)
                vectors = [emit.load(room, r * self.words, self.words) for r in range(self.lanes)]
                emit.store(room, sums + g * self.lanes, across(vectors), self.lanes)
            rest = self.rows % self.per_tile
            at = T.bind(t * self.per_tile)
            if rest and self.rows > rest:
                with T.If(t < self.rows // self.per_tile):
                    with T.Then():
                        self._finish(at, sums, self.per_tile)
                    with T.Else():
                        self._finish(at, sums, rest)
            else:
                self._finish(at, sums, rest or self.per_tile)

    def _row(self, base: Any) -> Any:
        """Partial sums of a row: int32, `words` lanes."""
        size, words = 4 * self.words, self.words
        acc = emit.registers(1, words, "int32")
        T.buffer_store(acc, emit.splat(tirx.const(0, "int32"), words), [0])
        ones = emit.splat(tirx.const(0x01010101, "int32"), words)

        def add(at: Any, valid: int) -> None:
            data = tirx.reinterpret(emit.vector_type(words, "int32"), emit.load(self.x, base + at, size))
            if self.flipped:
                data = quantized.flip(data)
            if valid < size:
                keep = np.where(np.arange(size) < valid, 255, 0).astype(np.uint8).view(np.int32)
                data = data & T.Shuffle([tirx.const(int(v), "int32") for v in keep], list(range(words)))
            T.buffer_store(acc, dot(self.machine, acc[0], data, ones), [0])

        full = self.count // size
        if full > 1:
            with T.serial(0, full) as i:
                add(i * size, size)
        elif full:
            add(0, size)
        if self.count % size:
            add(full * size, self.count % size)
        return acc[0]

    def _finish(self, at: Any, sums: int, valid: int) -> None:
        """Requantize the tile's sums and store the first `valid`."""
        lanes, steps = self.lanes, self.steps
        start = emit.splat(tirx.const(self.start, "int32"), lanes)
        by = emit.constant(float(self.factor), lanes)
        found = [T.bind(emit.load(self.room, sums + g * lanes, lanes) + start) for g in range(4)]
        if steps.y is None:
            for g in range(-(-valid // lanes)):
                real = T.bind(steps.finish(self.machine, found[g], by))
                emit.store(self.y, at + g * lanes, real, lanes, min(lanes, valid - g * lanes))
            return
        value = steps.finish_bytes(self.machine, found, [by] * 4, bounded=self.bounded)
        emit.store(self.y, at, value, 4 * lanes, valid)


def across(vectors: list[Any]) -> Any:
    """The sum of the lanes of each vector, one a lane. At least as many vectors as lanes, both powers of two."""
    width = lanes = emit.lanes_of(vectors[0])  # `lanes`: partial sums that are left of a row
    while lanes > 1:
        half = lanes // 2
        low = [group * lanes + i for group in range(2 * width // lanes) for i in range(half)]
        high = [i + half for i in low]
        pairs = [vectors[i : i + 2] for i in range(0, len(vectors), 2)]
        vectors = [T.bind(T.Shuffle(pair, low) + T.Shuffle(pair, high)) for pair in pairs]
        lanes = half
    return vectors[0] if len(vectors) == 1 else T.Shuffle(vectors, list(range(width * len(vectors))))
