"""Bilinear resizing of 8-bit planes, weights in fixed point.

    v[w]   = 2^11 x[low_h, w] + b_h (x[high_h, w] - x[low_h, w])                      b = round(2^11 weight of high)
    acc    = 2^11 v[low_w] + b_w (v[high_w] - v[low_w]) - 2^22 zero_point of x        int32, exact
    y      = acc * (2^-22 x.scale / unit) through `Requantize`

low, high and the weight of high are given for each output row and column. A weight is off by 2^-12 at most, an interpolated
value by 2 * 255 / 2^12 < 1/8 of a step of x; weights of the usual factors 2, 4 and 8 are exact. A row is interpolated
between rows as vectors first, into scratch; its columns are then taken from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels.base import Format, KernelCall, Machine, unique
from sparsec.kernels.quantized import QuantType, Requantize, reference_requantize

BITS = 11  # of a weight: 8 + 2 * 11 bits fit in int32 with a sign
ONE = 1 << BITS
_TILE_ROWS = 4

TABLE: tuple[Format, ...] = (
    Format("resize_int8", "Resize", "dense", "int8", "bilinear resizing of 8-bit planes", "the last two axes, no antialias"),
)  # fmt: skip


@dataclass(frozen=True)
class Taps:
    """Each output's neighbours along one axis, and the second one's weight, 0..1: all [outputs]."""

    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray

    @property
    def size(self) -> int:
        """Outputs."""
        return int(self.low.size)

    @property
    def fixed(self) -> np.ndarray:
        """Weights in fixed point: int32."""
        return np.rint(np.asarray(self.weight, np.float64) * ONE).astype(np.int32)

    @property
    def exact(self) -> bool:
        """Whether fixed point holds the weights as they are."""
        return bool(np.all(self.fixed == np.asarray(self.weight, np.float64) * ONE))

    def packed(self, pitch: int) -> np.ndarray:
        """low * pitch, high * pitch, weights: int32 [3, outputs]."""
        return np.stack([self.low * pitch, self.high * pitch, self.fixed]).astype(np.int32)


def multiplier(x: QuantType, steps: Requantize) -> np.float32:
    """What sums are multiplied with."""
    return np.float32(steps.multipliers(x, np.full(1, 2.0 ** (-2 * BITS)))[0])


def reference(x: np.ndarray, rows: Taps, columns: Taps, x_type: QuantType, steps: Requantize) -> np.ndarray:
    """x [..., H, W] as stored -> [..., OH, OW], by definition."""
    wide = x.astype(np.int64)
    low, high = wide[..., rows.low, :], wide[..., rows.high, :]
    v = ONE * low + rows.fixed[:, None] * (high - low)
    low, high = v[..., columns.low], v[..., columns.high]
    acc = ONE * low + columns.fixed * (high - low) - ONE * ONE * x_type.zero_point
    return reference_requantize(acc.astype(np.int32), np.asarray(multiplier(x_type, steps)), steps)


def bind(
    machine: Machine,
    *,
    planes: int,
    height: int,
    width: int,
    rows: Taps,
    columns: Taps,
    x: QuantType,
    steps: Requantize,
) -> KernelCall:
    """The call for `planes` planes of type `x`. Roles (x, y, rows, columns, scratch). Tiles: a few output rows."""
    machine = machine.single()
    lanes = 4
    while lanes < machine.lanes and 4 * lanes < columns.size:
        lanes *= 2
    wide, out_h, out_w = 4 * lanes, rows.size, columns.size
    pitch = max(out_w, wide)  # of the table of columns; lanes behind the last column read column 0
    table = np.zeros((3, pitch), np.int32)
    table[:, :out_w] = columns.packed(1)
    constants = {"rows": rows.packed(width), "columns": table}
    step = machine.lanes
    while step > 1 and step > width:
        step //= 2
    sizes = [
        ("x", planes * height * width, x.dtype), ("y", planes * out_h * out_w, steps.element), ("rows", 3 * out_h, "int32"),
        ("columns", 3 * pitch, "int32"), ("scratch", width, "int32"),
    ]  # fmt: skip
    by = emit.constant(float(multiplier(x, steps)), lanes)
    bounded = 255.0 * ONE * ONE * float(multiplier(x, steps)) >= 2.0**30

    def splat(value: Any, count: int) -> Any:
        return emit.splat(tirx.const(value, "int32") if isinstance(value, int) else value, count)

    def body(data: Any, y: Any, by_row: Any, by_column: Any, row: Any, begin: Any, end: Any) -> None:
        def between(at: Any, base: Any, line: Any) -> None:
            low, high = (
                emit.convert(emit.load(data, base + by_row[line + i * out_h] + at, step), "int32") for i in range(2)
            )
            low = T.bind(low)
            weight = splat(by_row[line + 2 * out_h], step)
            emit.store(row, at, low * splat(ONE, step) + (high - low) * weight, step)

        def across(at: Any) -> Any:
            low, high = (T.bind(row[emit.load(by_column, i * pitch + at, lanes)]) for i in range(2))
            weight = emit.load(by_column, 2 * pitch + at, lanes)
            start = splat(-ONE * ONE * x.zero_point, lanes)
            return T.bind(low * splat(ONE, lanes) + (high - low) * weight + start)

        def outputs(at: Any, base: Any, valid: int) -> None:
            sums = [across(at + v * lanes) for v in range(4)]
            if steps.y is not None:
                value = steps.finish_bytes(machine, sums, [by] * 4, bounded=bounded)
                emit.store(y, base + at, value, wide, valid)
                return
            for v in range(-(-valid // lanes)):
                real = T.bind(steps.finish(machine, sums[v], by))
                emit.store(y, base + at + v * lanes, real, lanes, min(lanes, valid - v * lanes))

        with T.serial(begin * _TILE_ROWS, T.min(end * _TILE_ROWS, planes * out_h)) as r:
            base, line = T.bind(r // out_h * (height * width)), T.bind(r % out_h)
            with T.serial(0, width // step) as i:
                between(i * step, base, line)
            if width % step:
                between(width - step, base, line)
            target = T.bind(r * out_w)
            if out_w < wide:
                outputs(0, target, out_w)
                return
            with T.serial(0, out_w // wide) as i:
                outputs(i * wide, target, wide)
            if out_w % wide:
                outputs(out_w - wide, target, wide)

    func = emit.function(sizes, body)
    facts = (planes, height, width, out_h, out_w, x, steps, machine)
    text = f"bilinear {planes}x{height}x{width} to {out_h}x{out_w} in 8 bits, {steps.activation.name}"
    roles = tuple(size[0] for size in sizes)
    tiles = -(-planes * out_h // _TILE_ROWS)
    return KernelCall(unique(f"resize_int8_{x.dtype}", *facts), func, roles, constants, tiles, 4 * width, text)
