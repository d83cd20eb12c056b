"""`prepare`: x copied into phase planes, once before a convolution with strides or padding."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels.base import KernelCall, Machine, unique
from sparsec.kernels.conv.geometry import Geometry


def prepare(
    machine: Machine, geometry: Geometry, element: str | None = None, outside: int = 0, channels: int | None = None
) -> KernelCall:
    """Copy x into phase planes: prepared[n, c, f, q, r] = x[n, c, q * sh + row(f) - top, r * sw + column(f) - left].

    `outside`: what lies outside of x. `channels` of an image are prepared, more than x has: the last ones are `outside`.
    """
    n, c, h, w = geometry.x_shape
    element, channels = element or machine.element, channels or c
    count, rows, columns = geometry.phase_shape
    (sh, sw), (top, left, _, _) = geometry.strides, geometry.pads

    def fill(x: Any, prepared: Any, plane: Any, number: int) -> None:
        """Phase `number` of one channel of one image."""
        row, column = geometry.phases[number]
        zero = emit.constant(outside, element=element)
        # Columns r with 0 <= r * sw + column - left < w; the others are halo.
        first = min(columns, max(0, -(-(left - column) // sw)))
        last = max(first, min(columns, -(-(w + left - column) // sw)))
        top_rows = min(rows, max(0, -(-(top - row) // sh)))
        end_rows = max(top_rows, min(rows, -(-(h + top - row) // sh)))
        out = (plane * count + number) * rows * columns
        if top_rows:
            with T.serial(0, top_rows * columns) as i:
                T.buffer_store(prepared, zero, [out + i])
        with T.serial(top_rows, end_rows) as q:
            source = (plane_of(plane) * h + q * sh + (row - top)) * w + (column - left)
            if first:
                with T.serial(0, first) as r:
                    T.buffer_store(prepared, zero, [out + q * columns + r])
            with T.serial(first, last) as r:
                T.buffer_store(prepared, x[source + r * sw], [out + q * columns + r])
            if last < columns:
                with T.serial(last, columns) as r:
                    T.buffer_store(prepared, zero, [out + q * columns + r])
        if end_rows < rows:
            with T.serial(end_rows * columns, rows * columns) as i:
                T.buffer_store(prepared, zero, [out + i])

    def plane_of(plane: Any) -> Any:
        """The plane of x that a prepared plane is made of."""
        return plane if channels == c or n == 1 else plane // channels * c + plane % channels

    def some(x: Any, prepared: Any, tile: Any, number: int) -> None:
        plane = tile // count if count > 1 else tile
        if channels == c:
            fill(x, prepared, plane, number)
            return
        with T.If((plane if n == 1 else plane % channels) < c):
            with T.Then():
                fill(x, prepared, plane, number)
            with T.Else(), T.serial(0, rows * columns) as i:
                at = (plane * count + number) * rows * columns
                T.buffer_store(prepared, emit.constant(outside, element=element), [at + i])

    def body(x: Any, prepared: Any, begin: Any, end: Any) -> None:
        with T.serial(begin, end) as tile:
            for number in range(count):
                if count == 1:
                    some(x, prepared, tile, 0)
                else:
                    with T.If(tile % count == number), T.Then():
                        some(x, prepared, tile, number)

    size = n * channels * count * rows * columns
    func = emit.function([("x", n * c * h * w, element), ("prepared", size, element)], body)
    text = f"pad and split {c}x{h}x{w} into {count} phase planes {rows}x{columns}"
    kind = {"float32": "f32", "float16": "f16", "uint8": "u8", "int8": "i8"}[element]
    name = unique(f"conv_prepare_{kind}", geometry, *((outside, channels) if element in ("uint8", "int8") else ()))
    return KernelCall(name, func, ("x", "prepared"), {}, n * channels * count, 0, text)
