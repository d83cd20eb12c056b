"""What follows the sums of a product's tile: scale, bias, residual, activation, guards, and where y lies.

    rows     y[row, column]                              row-major [m, n], bias by column
    planes   y[image, row, pixel]                        images of `channels` planes, bias by row

A store is called with the tile's columns once and gives what stores one row of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit as tir
from sparsec.kernels.cuda import emit
from sparsec.kernels.epilogue import NONE, Activation, Residual, finish


class RowStore:
    """What follows the sums where y is row-major [m, n] from `base` on: scale, bias, residual, activation, guards.

    `in_row`: the columns of a call are neighbours.
    """

    def __init__(
        self, m: int, n: int, first: tuple[Any, Any], base: Any, y: Any, *, whole: tuple[bool, bool], in_row: bool,
        bias: Any = None, other: Any = None, residual: Residual = "none", activation: Activation = NONE,
        scale: float = 1.0,
    ) -> None:  # fmt: skip
        self.m, self.n, self.first, self.base, self.y, self.whole, self.in_row = m, n, first, base, y, whole, in_row
        self.bias, self.other, self.residual, self.activation, self.scale = bias, other, residual, activation, scale
        self.dtype = str(y.dtype)
        self.kind = emit.C_NAMES[self.dtype]

    def __call__(self, columns: list[Any]) -> Any:
        """Emits what a set of columns shares; returns what stores a row of them."""
        width = len(columns)
        at = [T.bind(self.first[1] + c) for c in (columns[:1] if self.in_row else columns)]
        held = None
        if self.bias is not None:
            held = emit.local(width)
            if self.in_row:
                emit.call(f"sparsec_read<float, {width}>", emit.address(held, 0), emit.address(self.bias, at[0]), width)
            else:
                for c in range(width):
                    T.buffer_store(held, self.bias[at[c]], [c])

        def finished(value: Any, c: int, other: Any) -> Any:
            value = value if self.scale == 1.0 else value * T.float32(self.scale)
            value = value if held is None else value + held[c]
            other = None if other is None else tir.convert(other, "float32")
            return tir.convert(finish(value, self.activation, self.residual, other), self.dtype)

        def one(row: Any, values: list[Any]) -> None:
            r = T.bind(self.first[0] + row)
            if self.whole[0]:
                inside(r, values)
            else:
                with T.If(r < self.m), T.Then():
                    inside(r, values)

        def inside(r: Any, values: list[Any]) -> None:
            start = T.bind(self.base + r * self.n)
            if self.in_row:
                in_row(T.bind(start + at[0]), values)
                return
            for c, value in enumerate(values):
                with T.If(at[c] < self.n), T.Then():
                    other = None if self.other is None else self.other[start + at[c]]
                    T.buffer_store(self.y, finished(value, c, other), [start + at[c]])

        def in_row(start: Any, values: list[Any]) -> None:
            valid = width if self.whole[1] else self.n - at[0]
            out, others = emit.local(width, self.dtype), None
            if self.other is not None:
                others = emit.local(width, self.dtype)
                name = f"sparsec_read<{self.kind}, {width}>"
                emit.call(name, emit.address(others, 0), emit.address(self.other, start), valid)
            for c, value in enumerate(values):
                T.buffer_store(out, finished(value, c, None if others is None else others[c]), [c])
            emit.call(f"sparsec_write<{self.kind}, {width}>", emit.address(self.y, start), emit.address(out, 0), valid)

        return one


class PlaneStore:
    """y [images, channels, pixels] from channel `channel` on: tile rows are channels, `rows` of them exist.

    Tile columns count pixels image by image, `pitch` to an image, a multiple of the columns of a call where there are
    several images. `bias`: from `bias_at` on, one a row.
    """

    def __init__(
        self, images: int, channels: int, pixels: int, pitch: int, rows: int, first: tuple[Any, Any], channel: Any,
        y: Any, *, whole_rows: bool, base: Any = 0, bias: Any = None, bias_at: Any = 0, other: Any = None,
        residual: Residual = "none", activation: Activation = NONE,
    ) -> None:  # fmt: skip
        self.images, self.channels, self.pixels, self.pitch, self.rows = images, channels, pixels, pitch, rows
        self.first, self.channel, self.y, self.whole_rows, self.base = first, channel, y, whole_rows, base
        self.bias, self.bias_at, self.other = bias, bias_at, other
        self.residual, self.activation = residual, activation
        self.dtype = str(y.dtype)
        self.kind = emit.C_NAMES[self.dtype]

    def __call__(self, columns: list[Any]) -> Callable[[Any, list[Any]], None]:
        """Emits what a set of neighbouring columns shares; returns what stores a row of them."""
        width = len(columns)
        at = T.bind(self.first[1] + columns[0])
        image = T.bind(at // self.pitch) if self.images > 1 else 0
        pixel = T.bind(at % self.pitch) if self.images > 1 else at
        valid = T.bind(T.if_then_else(at < self.images * self.pitch, self.pixels - pixel, 0))
        start = T.bind(self.base + (image * self.channels + self.channel) * self.pixels + pixel)

        def one(row: Any, values: list[Any]) -> None:
            r = T.bind(self.first[0] + row)
            if self.whole_rows:
                inside(r, values)
            else:
                with T.If(r < self.rows), T.Then():
                    inside(r, values)

        def inside(r: Any, values: list[Any]) -> None:
            to = T.bind(start + r * self.pixels)
            out, others = emit.local(width, self.dtype), None
            if self.other is not None:
                others = emit.local(width, self.dtype)
                name = f"sparsec_read<{self.kind}, {width}>"
                emit.call(name, emit.address(others, 0), emit.address(self.other, to), valid)
            for c, value in enumerate(values):
                value = value if self.bias is None else value + self.bias[self.bias_at + r]
                other = None if others is None else tir.convert(others[c], "float32")
                value = finish(value, self.activation, self.residual, other)
                T.buffer_store(out, tir.convert(value, self.dtype), [c])
            emit.call(f"sparsec_write<{self.kind}, {width}>", emit.address(self.y, to), emit.address(out, 0), valid)

        return one
