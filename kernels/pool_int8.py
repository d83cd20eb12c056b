"""Pooling of 8-bit planes: windows of integers, no float between them.

    max      y = largest integer of the window inside the plane, the same quantization in and out
    average  acc = sum over the window inside the plane of (x - zero_point of x)                      int32, exact
             y = acc * (rows[oy] * columns[ox]) through `Requantize`
             rows[oy] = x.scale / (unit * rows inside), columns[ox] = 1 / columns inside               float32

rows and columns inside count the padded plane's with count_include_pad. Dequantized values are in the order of their
integers, so the largest integer is the largest value: max is exact.

A window is a column's reduction, then a row's. The first reads whole rows of x where they lie and writes rows of
column results to scratch, with room for the padding on both sides; the second reads those at every tap's offset.
Neither has edges to think of: rows outside are left out of the first by the bounds of its loop, and the padding's room
holds what changes nothing, the least integer or the zero points that are taken off again. Stride 2 reduces at every column
and keeps the even ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels import pool as pool_f32
from sparsec.kernels.base import Format, KernelCall, Machine, unique
from sparsec.kernels.planes import Window
from sparsec.kernels.quantized import QuantType, Requantize, reference_requantize

Mode = Literal["max", "average"]
SCRATCH = 8192  # bytes of column results at once
UNROLLED = 8  # taps of a row or column that are written out; more are a loop
_LARGEST16 = 128  # bytes whose sum fits in 16 bits, signed

TABLE: tuple[Format, ...] = (
    Format("maxpool_int8", "MaxPool", "dense", "int8", "maximum over windows of 8-bit planes", "2-D, no Indices output"),
    Format("averagepool_int8", "AveragePool", "dense", "int8", "mean over windows of 8-bit planes", "2-D"),
)  # fmt: skip


def refusal(window: Window) -> str | None:
    """Why windows cannot run here, or None."""
    rows, columns = pool_f32.counts(window, include_pad=False)
    if rows.size == 0 or columns.size == 0 or rows.min() == 0 or columns.min() == 0:
        return "some of its windows have no element inside the plane"
    return None


# --- what is computed ------------------------------------------------------------------------------------------------


def factors(window: Window, include_pad: bool, x: QuantType, steps: Requantize) -> tuple[np.ndarray, np.ndarray]:
    """What sums are multiplied with: float32 [OH] times float32 [OW]."""
    rows, columns = pool_f32.counts(window, include_pad)
    return steps.multipliers(x, 1 / rows), (1 / columns).astype(np.float32)


def reference_max(x: np.ndarray, window: Window) -> np.ndarray:
    """Largest integers of x [N, C, H, W] as stored, by definition: [N, C, OH, OW]."""
    return pool_f32.reference("max", x, window).astype(x.dtype)


def reference_average(
    x: np.ndarray, window: Window, x_type: QuantType, steps: Requantize, include_pad: bool = False
) -> np.ndarray:
    """Means of x [N, C, H, W] as stored: exact sums, then float32 as above."""
    rows, columns = pool_f32.counts(window, include_pad=True)
    means = pool_f32.reference("average", x.astype(np.float64) - x_type.zero_point, window, include_pad=True)
    sums = np.rint(means * (rows[:, None] * columns[None, :])).astype(np.int32)
    by_row, by_column = factors(window, include_pad, x_type, steps)
    return reference_requantize(sums, by_row[:, None] * by_column[None, :], steps)


# --- calls -----------------------------------------------------------------------------------------------------------


def bind_max(machine: Machine, *, planes: int, window: Window, element: str) -> KernelCall:
    """The call for maxima of `planes` planes of uint8 or int8. Roles (x, y, scratch). Tiles: planes, or bands of rows."""
    return _Max(machine.single(), planes, window.flat(), element).call()


def bind_average(
    machine: Machine, *, planes: int, window: Window, x: QuantType, steps: Requantize, include_pad: bool = False
) -> KernelCall:
    """The call for means of `planes` planes of type `x`. Roles (x, y, scales, scratch). Tiles: planes, or bands of rows."""
    return _Average(machine.single(), planes, window.flat(), x, steps, include_pad).call()


# --- code ------------------------------------------------------------------------------------------------------------


def _each(count: int, one: Callable[[Any], None]) -> None:
    """one(i) for i below `count`."""
    if count <= UNROLLED:
        for i in range(count):
            one(i)
    else:
        with T.serial(0, count) as i:
            one(i)


def _width(count: int, most: int) -> int:
    """Lanes of vectors that cover `count` elements, at most `most`."""
    return min(most, 1 << max(0, count - 1).bit_length())


def _cover(count: int, width: int, one: Callable[[Any], None]) -> None:
    """one(start) for vectors of `width` lanes that cover 0..count; the last overlaps its neighbour."""
    if count <= width:
        one(0)
        return
    with T.serial(0, count // width) as i:
        one(i * width)
    if count % width:
        one(count - width)


class _Windows:
    """The code of one layer; subclasses say what a reduction is.

    `element`: of the row of column results; `most`: its lanes at most; `fill`: what stands in the padding's room.
    """

    stem: str
    most: int
    fill: int
    constants: dict[str, np.ndarray]

    def __init__(self, machine: Machine, planes: int, window: Window, x_element: str, element: str, y: str) -> None:
        self.machine, self.planes, self.window = machine, planes, window
        self.x_element, self.element, self.y_element = x_element, element, y
        self.constants = {}
        self.out_lanes = _width(window.shape[1], machine.vector_bytes)

    def call(self) -> KernelCall:
        """The bound kernel."""
        window, (out_h, out_w) = self.window, self.window.shape
        self.in_lanes = _width(window.width, self.most)
        reach = max(out_w, self.out_lanes) * window.strides[1] + (window.kernel[1] - 1) * window.dilations[1]
        written = window.pads[1] + max(window.width, self.in_lanes)
        self.pitch = max(reach, written) + 2 * self.machine.vector_bytes
        together = max(1, SCRATCH // (self.pitch * np.dtype(self.element).itemsize))
        bands = max(16 // self.planes, -(-out_h // together), 1)
        self.band_rows = -(-out_h // min(bands, out_h))
        self.bands = -(-out_h // self.band_rows)
        self.scratch = self.band_rows * self.pitch
        sizes = [
            ("x", self.planes * window.height * window.width, self.x_element),
            ("y", self.planes * out_h * out_w, self.y_element),
            *((role, array.size, str(array.dtype)) for role, array in self.constants.items()),
            ("scratch", self.scratch, self.element),
        ]
        shape = f"{window.kernel[0]}x{window.kernel[1]}s{window.strides[0]}{window.strides[1]}"
        name = unique(f"{self.stem}pool_int8_{shape}", self.planes, window, *self.facts(), self.machine)
        text = f"{self.stem} pooling {shape} on {self.planes}x{window.height}x{window.width}, {self.x_element}"
        scratch = self.scratch * np.dtype(self.element).itemsize
        func = emit.function(sizes, self._body)
        roles = tuple(size[0] for size in sizes)
        return KernelCall(name, func, roles, self.constants, self.planes * self.bands, scratch, text)

    def facts(self) -> tuple[Any, ...]:
        """What the code depends on besides the window."""
        raise NotImplementedError

    def begin(self, missing: Any) -> Any:
        """What a column's reduction starts with; `missing`: rows of the window outside the plane, or None."""
        raise NotImplementedError

    def step(self, acc: Any, value: Any) -> Any:
        """A reduction's step."""
        raise NotImplementedError

    def outputs(self, oy: Any, ox: Any, room: Any, at: Any, lanes: int, valid: Any) -> None:
        """Reduce the row at `room` for `lanes` outputs from column `ox` on, store them at `at`; `valid(store)`: how many."""
        raise NotImplementedError

    def _body(self, *buffers: Any) -> None:
        window, (out_h, out_w) = self.window, self.window.shape
        self.x, self.y, self.row = buffers[0], buffers[1], buffers[-3]
        self.scales = buffers[2]
        begin, end = buffers[-2:]
        left = window.pads[1]
        with T.serial(0, self.scratch) as i:
            T.buffer_store(self.row, tirx.const(self.fill, self.element), [i])
        with T.serial(begin, end) as t:
            plane = T.bind(t // self.bands) if self.bands > 1 else t
            x_base, y_base = T.bind(plane * (window.height * window.width)), T.bind(plane * (out_h * out_w))
            first = T.bind(t % self.bands * self.band_rows) if self.bands > 1 else 0
            last = T.bind(T.min(first + self.band_rows, out_h)) if self.bands > 1 else out_h
            # All rows of a band before any is read again: what was just stored cannot be loaded at another offset.
            with T.serial(first, last) as oy:
                top = T.bind(oy * window.strides[0] - window.pads[0])
                room = T.bind((oy - first) * self.pitch + left)
                _cover(window.width, self.in_lanes, lambda at, a=(x_base, top, room): self._column(*a, at))
            with T.serial(first, last) as oy:
                self._row(oy, T.bind((oy - first) * self.pitch), y_base, last)

    def _column(self, x_base: Any, top: Any, room: Any, at: Any) -> None:
        """Column results of `in_lanes` columns from `at` on, of the window whose first row is `top`, to the row at `room`."""
        window, lanes = self.window, self.in_lanes
        (kernel, _), (dilation, _) = window.kernel, window.dilations
        acc = emit.registers(1, lanes, self.element)

        def one(k: Any) -> None:
            value = emit.load(self.x, x_base + (top + k * dilation) * window.width + at, lanes)
            T.buffer_store(acc, self.step(acc[0], emit.convert(value, self.element)), [0])

        inside = T.And(top >= 0, top + (kernel - 1) * dilation < window.height)
        with T.If(inside):
            with T.Then():
                T.buffer_store(acc, self.begin(None), [0])
                _each(kernel, one)
            with T.Else():
                # Clamped before they are divided: neither may look negative.
                above = T.bind((T.max(0 - top, 0) + (dilation - 1)) // dilation)
                below = T.bind(T.min(T.max(window.height - 1 - top, 0) // dilation + 1, kernel))
                T.buffer_store(acc, self.begin(kernel - (below - above)), [0])
                with T.serial(above, below) as k:
                    one(k)
        value = acc[0]
        if lanes > window.width:  # the room behind the row is padding
            outside = emit.splat(tirx.const(self.fill, self.element), lanes)
            value = T.Shuffle([value, outside], [i if i < window.width else lanes for i in range(lanes)])
        emit.store(self.row, room + at, value, lanes)

    def _row(self, oy: Any, room: Any, y_base: Any, last: Any) -> None:
        """All outputs of row `oy`, whose column results are at `room`; `last`: the row behind this tile's."""
        out_w, lanes = self.window.shape[1], self.out_lanes
        base = T.bind(y_base + oy * out_w)

        def one(ox: Any) -> None:
            surplus = lanes - out_w
            if surplus <= 0:
                self.outputs(oy, ox, room, base + ox, lanes, lambda store: store(lanes))
                return
            rows = -(-surplus // out_w)  # that the surplus lanes run into

            def valid(store: Callable[[int], None]) -> None:
                with T.If(oy + rows < last):
                    with T.Then():  # they are stored later
                        store(lanes)
                    with T.Else():
                        store(out_w)

            self.outputs(oy, ox, room, base + ox, lanes, valid)

        _cover(out_w, lanes, one)

    def taps(self, at: Any, lanes: int, load: Callable[[Any], Any], start: Any) -> Any:
        """The reduction of `lanes` windows that begin at scratch element `at`, one element apart; `load(at)`: a vector."""
        acc = emit.registers(1, lanes, "int32" if self.element != self.x_element else self.element)
        T.buffer_store(acc, start, [0])

        def one(k: Any) -> None:
            T.buffer_store(acc, self.step(acc[0], load(at + k * self.window.dilations[1])), [0])

        _each(self.window.kernel[1], one)
        return acc[0]


def _spaced(buffer: Any, at: Any, stride: int, lanes: int) -> Any:
    """Elements at, at + stride, ... one by one."""
    found = [buffer[at + i * stride] for i in range(lanes)]
    return found[0] if lanes == 1 else T.Shuffle(found, list(range(lanes)))


class _Max(_Windows):
    stem = "max"

    def __init__(self, machine: Machine, planes: int, window: Window, element: str) -> None:
        super().__init__(machine, planes, window, element, element, element)
        self.most = machine.vector_bytes
        self.fill = -128 if element == "int8" else 0
        if window.strides[1] > 2:
            self.out_lanes = min(self.out_lanes, 16)

    def facts(self) -> tuple[Any, ...]:
        return (self.element,)

    def begin(self, missing: Any) -> Any:
        return emit.splat(tirx.const(self.fill, self.element), self.in_lanes)

    def step(self, acc: Any, value: Any) -> Any:
        return T.max(acc, value)

    def outputs(self, oy: Any, ox: Any, room: Any, at: Any, lanes: int, valid: Any) -> None:
        stride = self.window.strides[1]
        least = emit.splat(tirx.const(self.fill, self.element), lanes)
        if stride > 2:
            value = self.taps(room + ox * stride, lanes, lambda i: _spaced(self.row, i, stride, lanes), least)
        else:
            parts = [
                self.taps(room + ox * stride + v * lanes, lanes, lambda i: emit.load(self.row, i, lanes), least)
                for v in range(stride)
            ]
            value = parts[0] if stride == 1 else T.Shuffle(parts, list(range(0, 2 * lanes, 2)))
        value = T.bind(value)
        valid(lambda count: emit.store(self.y, at, value, lanes, count))


class _Average(_Windows):
    stem = "average"

    def __init__(
        self, machine: Machine, planes: int, window: Window, x: QuantType, steps: Requantize, include_pad: bool
    ) -> None:
        element = "int16" if window.kernel[0] <= _LARGEST16 else "int32"
        super().__init__(machine, planes, window, x.dtype, element, steps.element)
        self.most = machine.vector_bytes // np.dtype(element).itemsize
        self.fill = x.zero_point * window.kernel[0]
        self.x_type, self.steps, self.include_pad = x, steps, include_pad
        self.out_lanes = max(self.out_lanes, 4)
        rows, columns = factors(window, include_pad, x, steps)
        self.bounded = 255.0 * window.taps * float(rows.max() * columns.max()) >= 2.0**30
        surplus = np.zeros(self.out_lanes, np.float32)
        self.constants = {"scales": np.concatenate([rows, columns, surplus])}

    def facts(self) -> tuple[Any, ...]:
        return (self.x_type, self.steps, self.include_pad)

    def begin(self, missing: Any) -> Any:
        zero = self.x_type.zero_point
        start = tirx.const(0, self.element)
        if missing is not None and zero:
            start = T.Cast(self.element, missing * zero)
        return emit.splat(start, self.in_lanes)

    def step(self, acc: Any, value: Any) -> Any:
        return acc + value

    def outputs(self, oy: Any, ox: Any, room: Any, at: Any, lanes: int, valid: Any) -> None:
        part, steps = lanes // 4, self.steps
        zero = emit.splat(tirx.const(-self.x_type.zero_point * self.window.taps, "int32"), part)
        by_row = emit.splat(self.scales[oy], part)
        sums = [self._sum(room + (ox + v * part) * self.window.strides[1], part, zero) for v in range(4)]
        by = [by_row * emit.load(self.scales, self.window.shape[0] + ox + v * part, part) for v in range(4)]
        if steps.y is None:
            reals = [T.bind(steps.finish(self.machine, s, b)) for s, b in zip(sums, by, strict=True)]

            def store(count: int) -> None:
                for v, real in enumerate(reals):
                    if count > v * part:
                        emit.store(self.y, at + v * part, real, part, min(part, count - v * part))

            valid(store)
            return
        value = steps.finish_bytes(self.machine, sums, by, bounded=self.bounded)
        valid(lambda count: emit.store(self.y, at, value, lanes, count))

    def _sum(self, first: Any, lanes: int, start: Any) -> Any:
        stride = self.window.strides[1]

        def load(at: Any) -> Any:
            if stride == 1 or lanes == 1:
                value = emit.load(self.row, at, lanes)
            elif stride == 2:
                pair = [emit.load(self.row, at + v * lanes, lanes) for v in range(2)]
                value = T.Shuffle(pair, list(range(0, 2 * lanes, 2)))
            else:
                value = _spaced(self.row, at, stride, lanes)
            return emit.convert(value, "int32")

        return T.bind(self.taps(first, lanes, load, start))
