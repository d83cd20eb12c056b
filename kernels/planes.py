"""Windows sliding over planes: what depthwise convolution and pooling share.

    y[o, oy, ox] = finish(reduce over (kh, kw) of x[i, oy * sh + kh * dh - top, ox * sw + kw * dw - left])

with `fill` (0 or -inf) outside the plane. Nothing is copied: rows are read where they lie, a vector of output columns at
a time, and several output rows are computed together so that a loaded row serves every kernel row it meets. The halo never
exists in memory: a vector that reaches over the plane's edge is a shuffle with a vector of `fill`, and kernel rows outside
are left out, both when the code is generated. So the plane is cut into a first part, an interior that loops, and a last
part, by rows and by columns. Stride 2 loads two neighbouring vectors and takes their even or odd lanes.

Vectors cover a row exactly: the last one is narrower, or overlaps its neighbour. Where a row is narrower than a vector,
its surplus lanes run into the following row of the same tile, which is stored later; the last rows store exactly.
Reads pass the end of x by at most two vectors (128 bytes); nothing is written outside of a tile.

Written out by hand: which loads exist, and from where, depends on the edge at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels.base import Machine

MAX_TAPS = 128  # unrolled taps of a kernel; beyond, code grows without need


@dataclass(frozen=True)
class Window:
    """Geometry of one plane. `pads`: top, left, bottom, right. `ceil`: ONNX's ceil_mode."""

    height: int
    width: int
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    ceil: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Output rows and columns."""
        return (
            self._extent(self.height, 0, self.pads[0], self.pads[2]),
            self._extent(self.width, 1, self.pads[1], self.pads[3]),
        )

    def _extent(self, size: int, axis: int, before: int, after: int) -> int:
        span = self.dilations[axis] * (self.kernel[axis] - 1) + 1
        free, stride = size + before + after - span, self.strides[axis]
        if not self.ceil:
            return free // stride + 1
        count = -(-free // stride) + 1
        return count - ((count - 1) * stride >= size + before)  # the last window must start inside

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return self.kernel[0] * self.kernel[1]

    def flat(self) -> Window:
        """The same window with rows and columns swapped where planes are one column wide, so that vectors are full."""
        if self.width == 1 and self.kernel[1] == 1 and self.pads[1] == self.pads[3] == 0:
            top, left, bottom, right = self.pads
            return Window(
                1, self.height, (1, self.kernel[0]), (1, self.strides[0]), (left, top, right, bottom),
                (1, self.dilations[0]), self.ceil,
            )  # fmt: skip
        return self


@dataclass(frozen=True)
class Column:
    """A vector of output columns: `lanes` from `start`, of which the first `valid` exist."""

    start: int
    lanes: int
    valid: int


def columns(machine: Machine, window: Window) -> list[Column]:
    """Vectors that cover an output row."""
    width = window.shape[1]
    if window.strides[1] > 2:
        return [Column(i, 1, 1) for i in range(width)]
    lanes = machine.lanes
    if width < lanes:
        lanes = 1 << (width - 1).bit_length()
        if width * 4 <= lanes * 3 and width > 4:  # 5, 6, 9..12: two narrower vectors are cheaper than one wide
            return [Column(0, lanes // 2, lanes // 2), *_rest(width, lanes // 2, lanes // 2)]
        return [Column(0, lanes, width)]
    found = [Column(i, lanes, lanes) for i in range(0, width - lanes + 1, lanes)]
    return found + _rest(width, len(found) * lanes, lanes)


def _rest(width: int, done: int, lanes: int) -> list[Column]:
    rest = width - done
    if not rest:
        return []
    while lanes > 4 and rest <= lanes // 2:
        lanes //= 2
    return [Column(width - lanes, lanes, lanes)]


def row_groups(window: Window, most: int) -> list[tuple[int, int]]:
    """(first row, rows) of groups of at most `most` output rows, as equal as they can be."""
    height = window.shape[0]
    size = -(-height // -(-height // most))
    return [(first, min(size, height - first)) for first in range(0, height, size)]


@dataclass(frozen=True)
class Sweep:
    """How a plane is cut. `bands`: tiles a plane; each is one row group, or the whole plane if there is one band."""

    window: Window
    columns: tuple[Column, ...]
    groups: tuple[tuple[int, int], ...]
    bands: int

    @property
    def lanes(self) -> tuple[int, ...]:
        """Vector widths in use."""
        return tuple(sorted({c.lanes for c in self.columns}))

    def interior_groups(self) -> tuple[int, int]:
        """[first, last) of the full groups that touch no edge."""
        window, size = self.window, self.groups[0][1]
        span = window.dilations[0] * (window.kernel[0] - 1) + 1

        def inside(group: tuple[int, int]) -> bool:
            top = group[0] * window.strides[0] - window.pads[0]
            bottom = (group[0] + size - 1) * window.strides[0] - window.pads[0] + span
            return group[1] == size and top >= 0 and bottom <= window.height

        hits = [i for i, group in enumerate(self.groups) if inside(group)]
        return (hits[0], hits[-1] + 1) if hits else (0, 0)

    def interior_columns(self) -> tuple[int, int]:
        """[first, last) of the full vectors whose loads stay inside the row."""
        window = self.window
        reach = window.dilations[1] * (window.kernel[1] - 1)

        def inside(column: Column) -> bool:
            low = column.start * window.strides[1] - window.pads[1]
            high = (column.start + column.lanes) * window.strides[1] - window.pads[1] + reach
            slack = 2 if window.strides[1] == 2 else 0  # the neighbours that shifted phases take a lane from
            regular = column.lanes == self.columns[0].lanes and column.start % column.lanes == 0
            return regular and column.valid == column.lanes and low - slack >= 0 and high + slack <= window.width

        hits = [i for i, column in enumerate(self.columns) if inside(column)]
        return (hits[0], hits[-1] + 1) if hits else (0, 0)


def plan(machine: Machine, window: Window, planes: int, most_rows: int, cost: int) -> Sweep:
    """Cut a plane. `most_rows`: output rows at once at most; `cost`: instructions for each tap, to bound the code's size."""
    cut = tuple(columns(machine, window))
    for most in range(most_rows, 0, -1):
        groups = tuple(row_groups(window, most))
        bands = len(groups) if planes < 16 and len(groups) > 1 else 1
        sweep = Sweep(window, cut, groups, bands)
        if most == 1 or _code_size(sweep) * window.taps * cost <= 2500:
            return sweep
    raise AssertionError("unreachable: one row is always accepted")


def _code_size(sweep: Sweep) -> int:
    first, last = sweep.interior_groups()
    rows = sum(n for i, (_, n) in enumerate(sweep.groups) if i <= first or i >= last)
    left, right = sweep.interior_columns()
    vectors = sum(i <= left or i >= right for i in range(len(sweep.columns)))
    return rows * vectors


class Rows:
    """Loads of one vector of columns: rows of x around a group of output rows, each value loaded and shuffled once."""

    def __init__(self, window: Window, x: Any, base: Any, start: Any, lanes: int, fill: float) -> None:
        self.window, self.x, self.base, self.start, self.lanes, self.fill = window, x, base, start, lanes, fill
        self._values: dict[tuple[Any, ...], Any] = {}

    def tap(self, row: int, kw: int) -> Any:
        """The vector that kernel column `kw` multiplies, in the row `row` rows below the group's first."""
        offset = kw * self.window.dilations[1] - self.window.pads[1]
        if self.window.strides[1] == 1 or self.lanes == 1:
            return self._load(row, offset, self.lanes)
        shift, phase = divmod(offset, 2)
        if shift in (-1, 1) and self.lanes > 1:
            return self._shifted(row, shift, phase)
        return self._phase(row, shift, phase)

    def _keep(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._values:
            self._values[key] = T.bind(make())
        return self._values[key]

    def _phase(self, row: int, shift: int, phase: int) -> Any:
        """Lanes 2 i + phase of the row from column 2 (start + shift) on."""

        def make() -> Any:
            pair = [self._load(row, 2 * shift + i * self.lanes, self.lanes) for i in range(2)]
            return T.Shuffle(pair, [2 * i + phase for i in range(self.lanes)])

        return self._keep(("phase", row, shift, phase), make)

    def _shifted(self, row: int, shift: int, phase: int) -> Any:
        """`_phase` one lane to the side: its lanes move and one new element comes in; cheaper than two loads more."""
        lanes = self.lanes

        def make() -> Any:
            here = self._phase(row, 0, phase)
            new = emit.splat(self._load(row, phase - 2 if shift < 0 else 2 * lanes + phase, 1), lanes)
            order = [lanes, *range(lanes - 1)] if shift < 0 else [*range(1, lanes), lanes]
            return T.Shuffle([here, new], order)

        return self._keep(("shifted", row, shift, phase), make)

    def _load(self, row: int, offset: int, lanes: int) -> Any:
        return self._keep(("load", row, offset, lanes), lambda: self._masked(row, offset, lanes))

    def _masked(self, row: int, offset: int, lanes: int) -> Any:
        """Columns from `start * sw + offset` on; `fill` outside the row. An interior `start` (an expression) is inside."""
        width = self.window.width
        at = self.base + row * width
        first = self.start * self.window.strides[1] + offset
        if not isinstance(self.start, int) or (first >= 0 and first + lanes <= width):
            return emit.load(self.x, at + first, lanes)
        outside = emit.constant(self.fill, lanes, str(self.x.dtype))
        if first >= width or first + lanes <= 0:
            return outside
        read = max(first, 0)
        loaded = emit.load(self.x, at + read, lanes)
        order = [first + i - read if 0 <= first + i < width else lanes for i in range(lanes)]
        return T.Shuffle([loaded, outside], order)


@dataclass(frozen=True)
class Reduction:
    """What happens to the taps. `start(lanes)`: a value to begin with. `step(acc, tap, position, lanes)`: one tap,
    position = kh * KW + kw. `finish(acc, oy, ox, offset, lanes)`: the value to store at element `offset` of y."""

    fill: float
    start: Callable[[int], Any]
    step: Callable[[Any, Any, int, int], Any]
    finish: Callable[[Any, Any, Any, Any, int], Any]


def emit_sweep(sweep: Sweep, x: Any, x_base: Any, y: Any, y_base: Any, band: Any, reduction: Reduction) -> None:
    """Code for one tile: the plane of x at element `x_base` to the plane of y at `y_base`; `band` of `sweep.bands`."""
    first, last = sweep.interior_groups()
    size = sweep.groups[0][1]
    if sweep.bands == 1:
        for i, (row, rows) in enumerate(sweep.groups):
            if not first <= i < last:
                _group(sweep, x, x_base, y, y_base, row, rows, None, reduction)
            elif i == first:
                with T.serial(first, last) as g:
                    _group(sweep, x, x_base, y, y_base, g * size, rows, sweep.groups[last - 1][0], reduction)
        return
    for i, (row, rows) in enumerate(sweep.groups):
        if not first <= i < last:
            with T.If(band == i), T.Then():
                _group(sweep, x, x_base, y, y_base, row, rows, None, reduction)
        elif i == first:
            with T.If(T.And(band >= first, band < last)), T.Then():
                _group(sweep, x, x_base, y, y_base, band * size, rows, sweep.groups[last - 1][0], reduction)


def _group(
    sweep: Sweep,
    x: Any,
    x_base: Any,
    y: Any,
    y_base: Any,
    row: Any,
    rows: int,
    last_row: int | None,
    reduction: Reduction,
) -> None:
    """One row group: `row` is a number, or an expression of an interior group, the last of which starts at `last_row`."""
    left, right = sweep.interior_columns()
    for i, column in enumerate(sweep.columns):
        if not left <= i < right:
            _block(sweep, x, x_base, y, y_base, row, rows, last_row, column.start, column, reduction)
        elif i == left:
            with T.serial(left, right) as c:
                _block(sweep, x, x_base, y, y_base, row, rows, last_row, c * column.lanes, column, reduction)


def _block(
    sweep: Sweep, x: Any, x_base: Any, y: Any, y_base: Any, row: Any, rows: int, last_row: int | None, start: Any,
    column: Column, reduction: Reduction,
) -> None:  # fmt: skip
    """`rows` output rows of one vector of columns."""
    window = sweep.window
    (kernel_h, kernel_w), (stride, _), dilation = window.kernel, window.strides, window.dilations[0]
    out_h, out_w = window.shape
    top = row * stride - window.pads[0]
    source = Rows(window, x, T.bind(x_base + top * window.width), start, column.lanes, reduction.fill)
    acc = [reduction.start(column.lanes) for _ in range(rows)]
    for j in range((rows - 1) * stride + (kernel_h - 1) * dilation + 1):
        if last_row is None and not 0 <= top + j < window.height:
            continue
        users = [(i, (j - i * stride) // dilation) for i in range(rows) if (j - i * stride) % dilation == 0]
        users = [(i, kh) for i, kh in users if 0 <= kh < kernel_h]
        for kw in range(kernel_w if users else 0):
            tap = source.tap(j, kw)
            for i, kh in users:
                acc[i] = T.bind(reduction.step(acc[i], tap, kh * kernel_w + kw, column.lanes))
    at = T.bind(y_base + row * out_w + start)
    tile_end = (out_h if sweep.bands == 1 else (last_row if last_row is not None else row) + rows) * out_w
    final = row if last_row is None else last_row
    for i in range(rows):
        value = reduction.finish(acc[i], row + i, start, at + i * out_w, column.lanes)
        overrun = (final + i) * out_w + column.lanes <= tile_end  # into rows of this tile that are stored later
        emit.store(y, at + i * out_w, value, column.lanes, column.lanes if overrun else column.valid)
