"""Bytes that change their places: transposes, slices, gathers, repetitions, parts of a larger tensor.

    y[ys + sum over axes k of i_k * Y_k] = x[xs + sum over axes k of X_k(i_k)]        0 <= i_k < size of axis k

What moves values is a sum of one function for each axis: i * stride (Transpose, Slice, Expand with stride 0), or any
table of offsets (Gather, nearest Resize). `simplified` brings an arrangement to few, long axes; what its last axis is
then decides the code:

    run         neighbours stay neighbours: vectors are copied
    fill        one byte for all: the last axis has stride 0
    repeat      each byte r times, r = 2, 4, 8: a shuffle
    even        every second byte: a shuffle of two loads
    transpose   neighbours of x along another axis: squares of 16 x 16 bytes, transposed by interleaving
    gather      otherwise, byte by byte

8-bit tensors may be moved before they are dequantized: f(DQ(q)) = DQ(f(q)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels.base import Format, KernelCall, Machine, unique

TILE = 8192  # bytes of y that a tile has at least
SQUARE = 16

Way = Literal["run", "fill", "repeat", "even", "transpose", "gather"]

TABLE: tuple[Format, ...] = (
    Format("move_int8", "Transpose, Slice, Gather, Pad, Resize, ...", "dense", "int8", "bytes that change their places",
           "constant indices; Resize: nearest"),
)  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """`size` elements: how far apart they lie in y, and in x: a stride, or the offset of each."""

    size: int
    x: int | tuple[int, ...]
    y: int

    @property
    def offsets(self) -> np.ndarray:
        """Offsets in x: [size]."""
        return np.arange(self.size) * self.x if isinstance(self.x, int) else np.asarray(self.x)


@dataclass(frozen=True)
class Arrangement:
    """Which byte of x each byte of y is; y outside of it is not written. Sizes in bytes."""

    x_size: int
    y_size: int
    axes: tuple[Axis, ...]
    x_start: int = 0
    y_start: int = 0

    @property
    def count(self) -> int:
        """Bytes moved."""
        return math.prod(axis.size for axis in self.axes)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def reference(arrangement: Arrangement, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A copy of `y` with the bytes of `x` in it, by definition."""
    source, target = np.array(arrangement.x_start), np.array(arrangement.y_start)
    for axis in arrangement.axes:
        source = source[..., None] + axis.offsets
        target = target[..., None] + np.arange(axis.size) * axis.y
    y = y.copy()
    y.reshape(-1)[target] = x.reshape(-1)[source]
    return y


# --- few, long axes --------------------------------------------------------------------------------------------------


def simplified(arrangement: Arrangement) -> Arrangement:
    """The same bytes by axes of which none is trivial and no two neighbours are one; tables only where they must be."""
    start = arrangement.x_start
    axes: list[Axis] = []
    for axis in arrangement.axes:
        offsets = axis.offsets
        if axis.size and isinstance(axis.x, tuple):
            start += int(offsets[0])
            offsets = offsets - offsets[0]
        axes += _regular(axis.size, offsets, axis.y)
    merged: list[Axis] = []
    for axis in axes:
        if axis.size == 1:
            continue
        above = merged[-1] if merged else None
        if above is not None and _one(above, axis):
            merged[-1] = Axis(above.size * axis.size, axis.x, axis.y)
        else:
            merged.append(axis)
    return Arrangement(arrangement.x_size, arrangement.y_size, tuple(merged), start, arrangement.y_start)


def _regular(size: int, offsets: np.ndarray, y: int) -> list[Axis]:
    """Offsets from 0 on as a stride, as repetitions of strides, or as a table."""
    steps = np.diff(offsets)
    if size < 2 or (steps == steps[0]).all():
        return [Axis(size, int(steps[0]) if size > 1 else 0, y)]
    times = int(np.argmax(steps != 0)) + 1
    if times > 1 and size % times == 0:
        blocks = offsets.reshape(-1, times)
        if (blocks == blocks[:, :1]).all():
            return [*_regular(size // times, blocks[:, 0], y * times), Axis(times, 0, y)]
    return [Axis(size, tuple(int(v) for v in offsets), y)]


def _one(outer: Axis, inner: Axis) -> bool:
    """Whether two axes are one of both their sizes."""
    if isinstance(outer.x, tuple) or isinstance(inner.x, tuple):
        return False
    return outer.x == inner.x * inner.size and outer.y == inner.y * inner.size


def way(arrangement: Arrangement) -> Way:
    """The code of a simplified arrangement."""
    axes = arrangement.axes
    last = axes[-1] if axes else Axis(1, 1, 1)
    if last.y != 1 or isinstance(last.x, tuple):
        return "gather"
    if last.x in (0, 1):
        above = axes[-2] if len(axes) > 1 else None
        repeated = last.x == 0 and above is not None and above.x == 1 and above.y == last.size
        return "repeat" if repeated and last.size in (2, 4, 8) else "run" if last.x == 1 else "fill"
    if last.x == 2:
        return "even"
    return "transpose" if last.size >= SQUARE and _neighbours(axes) is not None else "gather"


def _neighbours(axes: Sequence[Axis]) -> int | None:
    """The axis along which neighbours of x lie, if it is long enough for squares."""
    return next((i for i, axis in enumerate(axes) if axis.x == 1 and axis.size >= SQUARE), None)


def cycles(arrangement: Arrangement) -> float:
    """Cycles beyond the traffic of bytes: what is moved byte by byte takes one each."""
    return float(arrangement.count) if way(simplified(arrangement)) == "gather" else 0.0


# --- calls -----------------------------------------------------------------------------------------------------------


def bind(machine: Machine, arrangement: Arrangement, element: str) -> KernelCall:
    """The call that moves bytes of type `element`. Roles (x, y[, offsets]). Tiles: a few thousand bytes of y.

    y outside the arrangement is not written.
    """
    return _Mover(machine.single(), simplified(arrangement), element).call()


def bind_fill(machine: Machine, *, size: int, value: int, element: str) -> KernelCall:
    """The call that writes `value` to `size` bytes. Roles (y). Tiles: runs of TILE bytes."""

    def body(y: Any, begin: Any, end: Any) -> None:
        with T.serial(begin, end) as t, T.serial(0, T.min(TILE, size - t * TILE)) as i:
            T.buffer_store(y, tirx.const(value, element), [t * TILE + i])

    func = emit.function([("y", size, element)], body)
    name = unique(f"fill_{element}", size, value)
    return KernelCall(name, func, ("y",), {}, -(-size // TILE), 0, f"{size} times {value}, {element}")


class _Mover:
    """The code of one simplified arrangement: rows over the outer axes, and within a row what `way` says."""

    def __init__(self, machine: Machine, arrangement: Arrangement, element: str) -> None:
        self.machine, self.arrangement, self.element = machine, arrangement, element
        self.way = way(arrangement)
        axes = list(arrangement.axes) or [Axis(1, 1, 1)]
        self.last = axes.pop()
        self.along: Axis | None = None  # the other axis of a square, or the one whose bytes are repeated
        if self.way == "repeat":
            self.along = axes.pop()
        elif self.way == "transpose":
            found = _neighbours(axes)
            assert found is not None
            self.along = axes.pop(found)
            axes.append(Axis(-(-self.along.size // SQUARE), SQUARE, SQUARE * self.along.y))
        self.outer = axes
        self.rows = math.prod(axis.size for axis in axes)
        self.tables: dict[int, int] = {}  # axis -> where its table begins; -1: the last axis
        self.offsets = np.zeros(0, np.int32)
        for i, axis in [*enumerate(axes), (-1, self.last)]:
            if isinstance(axis.x, tuple):
                self.tables[i] = self.offsets.size
                self.offsets = np.concatenate([self.offsets, np.asarray(axis.x, np.int32)])

    def call(self) -> KernelCall:
        """The bound kernel."""
        arrangement = self.arrangement
        arguments = [("x", arrangement.x_size, self.element), ("y", arrangement.y_size, self.element)]
        constants = {}
        if self.offsets.size:
            constants["offsets"] = self.offsets
            arguments.append(("offsets", self.offsets.size, "int32"))
        per_row = -(-arrangement.count // self.rows)
        self.per_tile = max(1, min(self.rows, TILE // max(per_row, 1)))
        func = emit.function(arguments, self._body)
        name = unique(f"move_int8_{self.way}", arrangement, self.element, self.machine)
        text = f"{self.way}: {arrangement.count} of {arrangement.x_size} bytes to {arrangement.y_size}"
        roles = tuple(argument[0] for argument in arguments)
        return KernelCall(name, func, roles, constants, -(-self.rows // self.per_tile), 0, text)

    def _body(self, *buffers: Any) -> None:
        self.x, self.y, self.table = buffers[0], buffers[1], buffers[2]
        begin, end = buffers[-2:]
        with T.serial(begin * self.per_tile, T.min(end * self.per_tile, self.rows)) as row:
            source, target = self.arrangement.x_start, self.arrangement.y_start
            left = row
            index: Any = 0
            for i in reversed(range(len(self.outer))):
                axis = self.outer[i]
                index = T.bind(left % axis.size) if i else left
                left = T.bind(left // axis.size) if i else left
                if i in self.tables:
                    source = source + self.table[self.tables[i] + index]
                else:
                    assert isinstance(axis.x, int)
                    source = source + index * axis.x
                target = target + index * axis.y
            square = T.bind(row % self.outer[-1].size) if self.way == "transpose" else 0
            self._row(T.bind(source), T.bind(target), square)

    def _row(self, source: Any, target: Any, square: Any) -> None:
        match self.way:
            case "run":
                self._vectors(self.last.size, 1, lambda at, lanes: emit.load(self.x, source + at, lanes), target)
            case "fill":
                one = T.bind(self.x[source])
                self._vectors(self.last.size, 1, lambda at, lanes: emit.splat(one, lanes), target)
            case "repeat":
                assert self.along is not None
                times = self.last.size

                def repeated(at: Any, lanes: int) -> Any:
                    few = emit.load(self.x, source + at, lanes // times)
                    if lanes == times:
                        return emit.splat(few, lanes)
                    return T.Shuffle([few] * times, [i // times for i in range(lanes)])

                self._vectors(self.along.size * times, times, repeated, target)
            case "even":
                self._vectors(self.last.size, 1, lambda at, lanes: self._even(source + 2 * at, lanes), target)
            case "transpose":
                assert self.along is not None
                rest = self.along.size % SQUARE
                if not rest:
                    self._squares(source, target, SQUARE)
                    return
                with T.If(square < self.along.size // SQUARE):
                    with T.Then():
                        self._squares(source, target, SQUARE)
                    with T.Else():
                        self._squares(source, target, rest)
            case _:
                with T.serial(0, self.last.size) as i:
                    at = self.table[self.tables[-1] + i] if -1 in self.tables else i * self.last.x
                    T.buffer_store(self.y, self.x[source + at], [target + i * self.last.y])

    def _even(self, at: Any, lanes: int) -> Any:
        if lanes == 1:
            return self.x[at]
        pair = [emit.load(self.x, at + v * lanes, lanes) for v in range(2)]
        return T.Shuffle(pair, list(range(0, 2 * lanes, 2)))

    def _vectors(self, count: int, step: int, value: Any, target: Any) -> None:
        """Write value(at // step, lanes) for vectors that cover 0..count; the last overlaps its neighbour."""
        lanes = self.machine.vector_bytes
        if count >= lanes:
            with T.serial(0, count // lanes) as i:
                emit.store(self.y, target + i * lanes, value(i * (lanes // step), lanes), lanes)
            if count % lanes:
                at = count - lanes
                emit.store(self.y, target + at, value(at // step, lanes), lanes)
            return
        done = 0
        while done < count:
            lanes = 1 << ((count - done).bit_length() - 1)
            emit.store(self.y, target + done, value(done // step, lanes), lanes)
            done += lanes

    def _squares(self, source: Any, target: Any, valid: int) -> None:
        """16 neighbours of x, of which `valid` are stored, for all of the last axis."""
        assert self.along is not None and isinstance(self.last.x, int)
        stride, apart = self.last.x, self.along.y

        def one(at: Any) -> None:
            rows = [T.bind(emit.load(self.x, source + (at + i) * stride, SQUARE)) for i in range(SQUARE)]
            half, whole = SQUARE // 2, SQUARE
            low = [lane for i in range(half) for lane in (i, whole + i)]
            high = [lane + half for lane in low]
            for _ in range(SQUARE.bit_length() - 1):
                pairs = [(rows[i], rows[i + half]) for i in range(half)]
                rows = [T.bind(T.Shuffle(list(pair), order)) for pair in pairs for order in (low, high)]
            for j in range(valid):
                emit.store(self.y, target + j * apart + at, rows[j], SQUARE)

        with T.serial(0, self.last.size // SQUARE) as i:
            one(i * SQUARE)
        if self.last.size % SQUARE:
            one(self.last.size - SQUARE)
