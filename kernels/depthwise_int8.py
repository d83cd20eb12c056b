"""Depthwise convolution of 8-bit planes: a word of sums is up to four taps of a kernel row.

    acc[c, oy, ox] = bias[c] + sum over (kh, kw) of w[c, kh, kw] * (x[c // m, iy, ix] - zero point)
    iy = oy * sh + kh * dh - top,  ix = ox * sw + kw * dw - left
    y = acc through `Requantize`

3x3 takes three products of words for each vector of outputs, and a vector of words serves every output row that reads its
input row (`sparsec.kernels.words`). Edges cost nothing in the loops: taps outside the columns have their weights masked
away and their zero points in the sums' start, both made once a plane for the vectors that touch an edge; rows outside
multiply the zero point. Columns are the outer loop, so that only one kind of column is held in registers.

Stored form: `weights[c]` = words of the kernel's rows, start of the sum, multiplier (float32 bits); `patterns`: orders and masks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import bytes as vectors
from sparsec.kernels import depthwise, dots, emit, planes, quantized, words
from sparsec.kernels.base import Format, KernelCall, Machine, unique
from sparsec.kernels.bytes import as_type
from sparsec.kernels.quantized import QuantType, Requantize
from sparsec.kernels.words import Patterns, Pick, Reader, Row, Segment

TABLE: tuple[Format, ...] = (
    Format("depthwise_int8", "Conv", "dense", "int8", "depthwise convolution of 8-bit planes, rows of taps as words",
           f"groups == input channels, at most {planes.MAX_TAPS} kernel positions"),
)  # fmt: skip


_FINISH = 3.0  # operations that follow the sums of a vector, and are not hidden behind them
_GROUP = 2.0  # cycles a group of rows begins and ends with


def refusal(
    machine: Machine,
    x_shape: tuple[int, int, int, int],
    w_shape: tuple[int, ...],
    groups: int,
    *,
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilations: tuple[int, int] = (1, 1),
) -> str | None:
    """Why this family cannot run a Conv, or None if it can. w [OC, 1, KH, KW]."""
    refused = depthwise.refusal(x_shape, w_shape, groups)
    if refused:
        return refused
    if not vectors.picks(machine):
        return f"8-bit depthwise kernels need a byte shuffle; {machine.dot} machines have none"
    window = planes.Window(x_shape[2], x_shape[3], w_shape[2:], strides, pads, dilations).flat()  # type: ignore[arg-type]
    if words.reader(machine, window) is None:
        return f"strides {list(strides)} with dilations {list(dilations)} spread four outputs over more than 16 bytes"
    return None


def predict_us(
    machine: Machine,
    x_shape: tuple[int, int, int, int],
    w_shape: tuple[int, ...],
    *,
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilations: tuple[int, int] = (1, 1),
) -> float:
    """Time on one thread: sums, byte shuffles and what follows the sums run on the same units."""
    window = planes.Window(x_shape[2], x_shape[3], w_shape[2:], strides, pads, dilations).flat()  # type: ignore[arg-type]
    reader = words.reader(machine, window)
    assert reader is not None, "ask `refusal` first"
    share = max(reader.lanes / machine.lanes, 0.5 if machine.vector_bytes == 64 else 1.0)
    cycles = machine.group_cycles
    for segment in words.segments(reader.lanes, window.shape[1]):
        for _, rows in planes.row_groups(window, _most_rows(machine, segment)):
            taken = (rows - 1) * strides[0] + (window.kernel[0] - 1) * dilations[0] + 1
            picked = reader.words * min(taken, rows * window.kernel[0])
            sums = rows * window.kernel[0] * reader.words
            vector = segment.vectors * (sums / machine.dots + (picked + rows * _FINISH) / machine.fma)
            cycles += share * vector + _GROUP
    return float(x_shape[0] * w_shape[0] * cycles / (machine.ghz * 1e3))


def _most_rows(machine: Machine, segment: Segment) -> int:
    """Output rows of a group: half of the registers hold sums."""
    room = machine.registers // 2 if machine.lane_fma else max(4, machine.registers // 2)
    return max(1, min(8, room // segment.vectors))


def reference(
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None,
    x_type: QuantType,
    *,
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilations: tuple[int, int] = (1, 1),
) -> np.ndarray:
    """The int32 sums, by definition. x [N, IC, H, W] as stored, w int8 [OC, 1, KH, KW], bias int32 -> [N, OC, OH, OW]."""
    real = x.astype(np.float64) - x_type.zero_point  # exact
    return depthwise.reference(real, w, bias, strides=strides, pads=pads, dilations=dilations).astype(np.int32)


def pack(
    machine: Machine, reader: Reader, w: np.ndarray, bias: np.ndarray | None, x: QuantType, multipliers: np.ndarray
) -> np.ndarray:
    """int32 [OC, KH * words + 2]: words of weights, start, multiplier."""
    rows = quantized.words(words.pack(reader, w))[..., 0].reshape(w.shape[0], -1)
    start = quantized.correction(machine, w, bias, x)
    return np.concatenate([rows, start[:, None], multipliers.view(np.int32)[:, None]], axis=1).astype(np.int32)


def bind(
    machine: Machine,
    *,
    x_shape: tuple[int, int, int, int],
    w: np.ndarray,
    bias: np.ndarray | None,
    x: QuantType,
    w_scale: np.ndarray,
    steps: Requantize,
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilations: tuple[int, int] = (1, 1),
) -> KernelCall:
    """The call for one layer. x [N, IC, H, W], w int8 [OC, 1, KH, KW], bias int32 [OC], w_scale [OC].

    Roles (x, y[, residual], weights, patterns). y must not overlap x or residual. Tiles: output planes, or bands of rows
    of them. Raises ValueError where a sum could leave 32 bits.
    """
    n, channels, height, width = x_shape
    window = planes.Window(height, width, (w.shape[2], w.shape[3]), strides, pads, dilations).flat()
    w = w.reshape(w.shape[0], 1, *window.kernel)
    reader = words.reader(machine, window)
    assert reader is not None, "ask `refusal` first"
    scale = np.broadcast_to(np.asarray(w_scale, np.float32), w.shape[:1])
    multipliers = steps.multipliers(x, scale)
    packed = pack(machine, reader, w, bias, x, multipliers)
    patterns = Patterns()
    kernel = _Kernel(
        machine, reader, x, steps, patterns, n, channels, w.shape[0], quantized.largest(w, bias, multipliers)
    )
    sizes = {"x": n * channels * height * width, "y": n * w.shape[0] * kernel.out_plane, "weights": packed.size}
    kinds = {"x": x.dtype, "y": steps.element, "residual": steps.other_element, "weights": "int32", "patterns": "uint8"}
    roles = (
        ("x", "y", "residual", "weights", "patterns") if steps.residual != "none" else ("x", "y", "weights", "patterns")
    )
    sizes |= {"residual": sizes["y"], "patterns": kernel.store_patterns()}
    func = emit.function([(role, sizes[role], kinds[role]) for role in roles], kernel.body)
    shape = f"{w.shape[2]}x{w.shape[3]}s{strides[0]}{strides[1]}"
    facts = (x_shape, w.shape, strides, pads, dilations, x, steps, kernel.bounded, machine)
    text = (
        f"depthwise {shape} on {channels}x{height}x{width}, 8 bits, {steps.activation.name}, residual {steps.residual}"
    )
    constants = {"weights": packed, "patterns": patterns.array()}
    tiles = n * w.shape[0] * kernel.bands
    return KernelCall(unique(f"depthwise_int8_{shape}", *facts), func, roles, constants, tiles, 0, text)


class _Kernel:
    """The code of one layer, plane by plane."""

    def __init__(
        self, machine: Machine, reader: Reader, x: QuantType, steps: Requantize, patterns: Patterns, n: int,
        channels: int, out_channels: int, largest: float,
    ) -> None:  # fmt: skip
        window = reader.window
        self.machine = replace(machine.words(), lanes=reader.lanes)
        self.reader, self.window, self.x_type, self.steps, self.patterns = reader, window, x, steps, patterns
        self.n, self.channels, self.out_channels = n, channels, out_channels
        self.bounded = largest >= 2.0**30  # rounding to int32 needs a bound of its own
        self.segments = words.segments(reader.lanes, window.shape[1])
        self.out_plane = window.shape[0] * window.shape[1]
        self.zero = quantized.packed_zero(machine, x)
        self.flipped = quantized.flipped(machine, x)
        self.taps = window.kernel[0] * reader.words
        self.rows = _most_rows(machine, self.segments[0])
        self.groups = planes.row_groups(window, self.rows)
        self.bands = len(self.groups) if n * out_channels < 16 and len(self.groups) > 1 else 1
        self.sweep = planes.Sweep(window, (), tuple(self.groups), self.bands)

    # --- patterns: stored before the code is written, loaded by it

    def store_patterns(self) -> int:
        """Put every pattern in the table; bytes of it."""
        for segment in self.segments:
            found = self.reader.picks(segment)
            assert found is not None
            for vector in found:
                for how in vector:
                    self.patterns.add(how.order)
                    if how.spread:
                        self.patterns.add(how.spread, "int32")
            for mask in self.reader.outside(segment):
                for word in mask:
                    self.patterns.add(np.where(word, 0, 255).reshape(-1))
                    self.patterns.add(np.where(word, self.zero & 255, 0).reshape(-1))
        return self.patterns.array().size

    def _pattern(self, values: Any, dtype: str = "uint8") -> Any:
        size = len(np.asarray(values).reshape(-1)) * np.dtype(dtype).itemsize
        loaded = emit.load(self.table, self.patterns.add(values, dtype), size)
        return as_type(loaded, dtype) if dtype != "uint8" else loaded

    # --- code

    def body(self, *buffers: Any) -> None:
        """All tiles [begin, end)."""
        self.x, self.y, self.weights, self.table = buffers[0], buffers[1], buffers[-4], buffers[-3]
        self.residual = buffers[2] if self.steps.residual != "none" else None
        window, (begin, end) = self.window, buffers[-2:]
        in_plane, multiplier = window.height * window.width, self.out_channels // self.channels
        with T.serial(begin, end) as t:
            plane = T.bind(t // self.bands) if self.bands > 1 else t
            channel = T.bind(plane % self.out_channels) if self.n > 1 else plane
            source = plane // multiplier if multiplier > 1 else plane  # also right for n > 1: OC is a multiple of m
            self.x_base, self.y_base = T.bind(source * in_plane), T.bind(plane * self.out_plane)
            base = T.bind(channel * (self.taps + 2))
            self.scalars = emit.Scalars(self.weights, base, self.taps, self.machine.lane_fma)
            self.start = T.bind(self.weights[base + self.taps])
            self.factor = T.bind(tirx.reinterpret("float32", self.weights[base + self.taps + 1]))
            self.band = t % self.bands
            first, last = self._interior()
            for i, segment in enumerate(self.segments):
                if not first <= i < last:
                    self._columns(segment, segment.start)
                elif i == first:
                    with T.serial(first, last) as c:
                        self._columns(segment, c * (segment.vectors * segment.lanes))

    def _interior(self) -> tuple[int, int]:
        """[first, last) of the whole segments of 16 columns that touch no edge."""
        hits = [
            i for i, s in enumerate(self.segments)
            if s.start == 16 * i and s.valid == 16 and not self.reader.outside(s).any()
        ]  # fmt: skip
        return (hits[0], hits[-1] + 1) if hits else (0, 0)

    def _splat(self, value: int) -> Any:
        return emit.splat(tirx.const(value, "int32"), self.reader.lanes)

    def _columns(self, segment: Segment, start: Any) -> None:
        """All rows of one segment; `start` is its number, or an expression in the interior."""
        lanes, outside = self.reader.lanes, self.reader.outside(segment)
        how = self.reader.picks(segment)
        assert how is not None
        weights, starts = [], []
        for mask in outside:
            plain = [self.scalars(k, lanes) for k in range(self.taps)]
            begin = emit.splat(self.start, lanes)
            if mask.any():
                for k in range(self.taps):
                    word = mask[k % self.reader.words]
                    if not word.any():
                        continue
                    if self.zero:
                        edge = as_type(self._pattern(np.where(word, self.zero & 255, 0).reshape(-1)), "int32")
                        begin = T.bind(dots.dot(self.machine, begin, edge, plain[k]))
                    keep = as_type(self._pattern(np.where(word, 0, 255).reshape(-1)), "int32")
                    plain[k] = T.bind(plain[k] & keep)
            weights.append(plain)
            starts.append(T.bind(begin))
        first, last = self.sweep.interior_groups()
        if isinstance(start, int):
            at_column: Any = 0
        else:
            at_column = T.bind((start - segment.start) * self.window.strides[1])
        for i, (row, rows) in enumerate(self.groups):
            arguments = (segment, start, at_column, how, weights, starts)
            if not first <= i < last:
                if self.bands == 1:
                    self._group(row, rows, None, *arguments)
                else:
                    with T.If(self.band == i), T.Then():
                        self._group(row, rows, None, *arguments)
            elif i == first:
                final, size = self.groups[last - 1][0], self.groups[0][1]
                if self.bands == 1:
                    with T.serial(first, last) as g:
                        self._group(g * size, rows, final, *arguments)
                else:
                    with T.If(T.And(self.band >= first, self.band < last)), T.Then():
                        self._group(self.band * size, rows, final, *arguments)

    def _group(
        self, row: Any, rows: int, final: int | None, segment: Segment, start: Any, at_column: Any,
        how: list[list[Pick]], weights: list[list[Any]], starts: list[Any],
    ) -> None:  # fmt: skip
        """`rows` output rows from `row` on: a number, or an expression of an interior group, the last of which is `final`."""
        window, reader = self.window, self.reader
        kernel, stride, dilation = window.kernel[0], window.strides[0], window.dilations[0]
        out_h, out_w = window.shape
        top = row * stride - window.pads[0]
        origin = T.bind(self.x_base + top * window.width + at_column)
        acc = [[starts[v] for v in range(segment.vectors)] for _ in range(rows)]
        zero = self._splat(_repeated(self.zero))
        for j in range((rows - 1) * stride + (kernel - 1) * dilation + 1):
            users = [(i, (j - i * stride) // dilation) for i in range(rows) if (j - i * stride) % dilation == 0]
            users = [(i, kh) for i, kh in users if 0 <= kh < kernel]
            missing = final is None and not 0 <= top + j < window.height
            if not users or (missing and not self.zero):
                continue
            source = Row(reader, self.x, origin + j * window.width, self._pattern, self._change)
            for v in range(segment.vectors):
                for u in range(reader.words):
                    word = zero if missing else source.words(how[v][u])
                    for i, kh in users:
                        weight = weights[v][kh * reader.words + u]
                        acc[i][v] = T.bind(dots.dot(self.machine, acc[i][v], word, weight))
        at = T.bind(self.y_base + row * out_w + start)
        if final is None:
            final = row
        tile_end = (out_h if self.bands == 1 else final + rows) * out_w
        exact = [(final + i) * out_w + segment.vectors * segment.lanes > tile_end for i in range(rows)]
        self._finish(segment, acc, at, exact)

    def _change(self, loaded: Any) -> Any:
        return quantized.flip(loaded) if self.flipped else loaded

    def _finish(self, segment: Segment, acc: list[list[Any]], at: Any, exact: list[bool]) -> None:
        """Store the rows; those that are not `exact` may run into the next one, which is stored later."""
        out_w, lanes = self.window.shape[1], segment.lanes
        width = segment.vectors * lanes
        factor = emit.splat(self.factor, lanes)
        if self.steps.y is None:
            for i, row in enumerate(acc):
                for v, value in enumerate(row):
                    where, valid = at + i * out_w + v * lanes, min(lanes, max(segment.valid - v * lanes, 0))
                    done = self.steps.finish(self.machine, value, factor, self._other(where))
                    emit.store(self.y, where, done, lanes, valid if exact[i] else lanes)
            return
        together = 4 // segment.vectors  # rows that make a vector of bytes
        for first in range(0, len(acc), together):
            group = [(at + i * out_w + v * lanes, value) for i, row in enumerate(acc) for v, value in enumerate(row)]
            group = group[first * segment.vectors : (first + together) * segment.vectors]
            sums, others = [value for _, value in group], [self._other(where) for where, _ in group]
            value = self.steps.finish_bytes(self.machine, sums, [factor] * len(sums), others, self.bounded)
            for i in range(min(together, len(acc) - first)):
                valid = segment.valid if exact[first + i] else width
                emit.store(self.y, at + (first + i) * out_w, value, width, valid, i * width)

    def _other(self, where: Any) -> Any:
        """The residual of a vector, if there is one."""
        return None if self.residual is None else emit.load(self.residual, where, self.reader.lanes)


def _repeated(byte: int) -> int:
    """A byte four times, as int32."""
    return int(np.frombuffer(bytes([byte & 255]) * 4, "<i4")[0])
