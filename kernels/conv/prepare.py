"""`prepare`: x copied into phase planes, once before a convolution with strides or padding."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels.base import KernelCall, Machine, unique
from sparsec.kernels.conv.geometry import Geometry


def prepare(machine: Machine, geometry: Geometry) -> KernelCall:
    """Copy x into phase planes: prepared[n, c, f, q, r] = x[n, c, q * sh + row(f) - top, r * sw + column(f) - left]."""
    n, c, h, w = geometry.x_shape
    count, rows, columns = geometry.phase_shape
    (sh, sw), (top, left, _, _) = geometry.strides, geometry.pads

    def fill(x: Any, prepared: Any, plane: Any, number: int) -> None:
        """Phase `number` of one channel of one image."""
        row, column = geometry.phases[number]
        zero = emit.constant(0, element=machine.element)
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
            source = (plane * h + q * sh + (row - top)) * w + (column - left)
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

    def body(x: Any, prepared: Any, begin: Any, end: Any) -> None:
        with T.serial(begin, end) as tile:
            for number in range(count):
                if count == 1:
                    fill(x, prepared, tile, 0)
                else:
                    with T.If(tile % count == number), T.Then():
                        fill(x, prepared, tile // count, number)

    size = int(np.prod(geometry.prepared_shape))
    func = emit.function([("x", n * c * h * w, machine.element), ("prepared", size, machine.element)], body)
    text = f"pad and split {c}x{h}x{w} into {count} phase planes {rows}x{columns}"
    return KernelCall(
        unique(machine.named("conv_prepare_f32"), geometry), func, ("x", "prepared"), {}, n * c * count, 0, text
    )
