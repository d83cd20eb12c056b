"""8-bit elementwise layers of two tensors.

    add, sub    sum = A (a - za) +- B (b - zb)                                A = s_a / u, B = s_b / u, rounded
    mul         sum = (a - za) (b - zb)                                       u = s_a s_b
    div         y = saturate(round_half_even(act((a - za) s_a / ((b - zb) s_b)) / s_y) + z_y)

Sums are exact in int32 and are worth u each; `Requantize` takes them back to 8 bits: bounds of relu and clip, other
activations in float32. For add and sub u = max(s_a, s_b) / 2^22: the larger factor is 2^22 and the sum stays below 2^31;
rounding of the smaller one moves a result by at most 2^-15 max(s_a, s_b). Integers instead of two float products, because
a compiler may fuse or not fuse those: results are equal on every instruction set, and ties are found as ties.

One side may be constant reals r: rint(r / u) for add and sub, where u holds max |r| / 255 as if it were a scale; part of the
multiplier, u = s r, for mul; themselves for div. Sides broadcast over each other as in ONNX: `axes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels.base import Format, KernelCall, Machine, unique
from sparsec.kernels.bytes import narrow
from sparsec.kernels.elementwise import Op
from sparsec.kernels.emit import lanes_of
from sparsec.kernels.epilogue import reference as reference_activation
from sparsec.kernels.quantize_int8 import BOUNDS, TILE, divided, integers, real, runs, span
from sparsec.kernels.quantized import QuantType, Requantize, reference_requantize

UNIT = 2.0**-22  # of the larger scale: what a sum of add and sub counts in

TABLE: tuple[Format, ...] = (
    Format("elementwise_int8_same", "Add, Sub, Mul, Div", "dense", "int8", "two 8-bit tensors of one shape", "equal shapes"),
    Format("elementwise_int8_channel", "Add, Sub, Mul, Div", "dense", "int8", "an 8-bit tensor and a value a channel",
           "one value for all of the last axes"),
    Format("elementwise_int8_row", "Add, Sub, Mul, Div", "dense", "int8", "an 8-bit tensor and a vector over its last axes",
           "one vector for other axes"),
    Format("elementwise_int8_scalar", "Add, Sub, Mul, Div", "dense", "int8", "an 8-bit tensor and one value", "one element"),
    Format("elementwise_int8_outer", "Add, Sub, Mul, Div", "dense", "int8", "8-bit tensors that broadcast over each other", ""),
)  # fmt: skip


# --- what is computed ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One side: integers of `type`, or constant `reals`, of shape `shape`."""

    shape: tuple[int, ...]
    type: QuantType | None = None
    reals: np.ndarray | None = None

    def __post_init__(self) -> None:
        if (self.type is None) == (self.reals is None) or (
            self.reals is not None and not np.isfinite(self.reals).all()
        ):
            raise ValueError("a side is integers of a type, or finite constants")

    @property
    def unit(self) -> float:
        """The real value of one step; of reals, of 1/255 of the largest."""
        if self.type is not None:
            return self.type.scale
        assert self.reals is not None
        return float(np.abs(self.reals).max(initial=0)) / 255

    def values(self, stored: np.ndarray | None) -> np.ndarray:
        """Reals in float32, as DequantizeLinear gives them."""
        if self.type is None or stored is None:
            assert self.reals is not None
            return np.asarray(self.reals, np.float32)
        return self.type.dequantize(stored)

    def terms(self, unit: float, stored: np.ndarray | None = None) -> np.ndarray:
        """What the side adds to a sum in units of `unit`: int64."""
        if self.type is None or stored is None:
            assert self.reals is not None
            return np.rint(self.reals.astype(np.float64) / unit).astype(np.int64)
        return (stored.astype(np.int64) - self.type.zero_point) * round(self.type.scale / unit)


def sum_unit(a: Side, b: Side) -> float:
    """What a sum of add or sub counts in."""
    return max(a.unit, b.unit) * UNIT


def multiplier(op: Op, a: Side, b: Side, steps: Requantize) -> np.ndarray:
    """What a sum of add, sub or mul is multiplied with before it is rounded: float32 [1], or reals' shape for mul."""
    if op == "mul":
        typed, other = (a, b) if a.type is not None else (b, a)
        assert typed.type is not None
        by = np.full(1, other.type.scale, np.float32) if other.type is not None else other.values(None)
        return steps.multipliers(typed.type, by)
    return steps.multipliers(QuantType(max(a.unit, b.unit), 0), np.full(1, UNIT))


def reference(
    op: Op, sides: tuple[Side, Side], stored: tuple[np.ndarray | None, np.ndarray | None], steps: Requantize
) -> np.ndarray:
    """`op` by NumPy: stored integers of the sides that have a type, to integers of type steps.y."""
    (a, b), y = sides, steps.y
    assert y is not None
    if op == "div":
        with np.errstate(divide="ignore", invalid="ignore"):
            found = a.values(stored[0]) / b.values(stored[1])
        if steps.activation.kind in BOUNDS:
            found = np.where(np.isnan(found), np.float32(-np.inf), found)
        found = reference_activation(steps.activation, found).astype(np.float32)
        return y.quantize(np.where(np.isnan(found), np.float32(-np.inf), found))
    by = multiplier(op, a, b, steps)
    if op == "mul":
        whole = [
            np.ones(1, np.int64) if q is None or s.type is None else q.astype(np.int64) - s.type.zero_point
            for s, q in zip(sides, stored, strict=True)
        ]
        total = whole[0] * whole[1]
    else:
        left, right = (s.terms(sum_unit(a, b), q) for s, q in zip(sides, stored, strict=True))
        total = left + (right if op == "add" else -right)
    return reference_requantize(total.astype(np.int32), by, steps)


Axis = tuple[int, bool, bool]  # extent, whether a varies along it, whether b does


def axes(a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> tuple[Axis, ...]:
    """The axes of a result, those merged along which both sides go on in the same way; at least one.

    Raises ValueError where shapes do not broadcast.
    """
    rank = max(len(a_shape), len(b_shape))
    shapes = [(1,) * (rank - len(shape)) + tuple(shape) for shape in (a_shape, b_shape)]
    found: list[Axis] = []
    for extents in zip(*shapes, strict=True):
        if 1 not in extents and extents[0] != extents[1]:
            raise ValueError(f"{list(a_shape)} and {list(b_shape)} do not broadcast")
        size, along = max(extents) if 0 not in extents else 0, (extents[0] > 1, extents[1] > 1)
        if size == 1:
            continue
        if found and found[-1][1:] == along:
            found[-1] = (found[-1][0] * size, *along)
        else:
            found.append((size, *along))
    return tuple(found) or ((1, True, True),)


def kind_of(merged: tuple[Axis, ...]) -> str:
    """Which row of the table merged axes are."""
    if not (all(a for _, a, _ in merged) or all(b for _, _, b in merged)):
        return "outer"
    last = merged[-1][1] and merged[-1][2]
    if len(merged) == 1:
        return "same" if last else "scalar"
    return "row" if last else "channel"


# --- calls -----------------------------------------------------------------------------------------------------------


def bind(machine: Machine, op: Op, *, sides: tuple[Side, Side], steps: Requantize) -> KernelCall:
    """The call for `a op b`, then `steps`. Roles (a, b, y); the role of a side of reals is a constant of the call.

    `steps` ends in integers and adds nothing. y must not overlap a or b. Raises ValueError where shapes do not broadcast.
    """
    if steps.y is None or steps.residual != "none" or all(side.type is None for side in sides):
        raise ValueError("8-bit elementwise layers begin and end in 8 bits and add no residual")
    machine = machine.single()
    merged = axes(sides[0].shape, sides[1].shape)
    *outer, (inner, *varies) = merged
    rows, per_tile = math.prod(extent for extent, _, _ in outer), max(1, TILE // inner)
    size = rows * inner
    kernel = _Binary(machine, op, sides, steps)

    def body(a: Any, b: Any, y: Any, begin: Any, end: Any) -> None:
        def row(base: Any, starts: tuple[Any, Any]) -> Callable[[Any, int, int], None]:
            """What computes a vector of the row at `base` of y, whose sides begin at `starts`."""
            buffers = (a, b)
            single = [None if varies[i] else kernel.single(i, buffers[i], starts[i]) for i in (0, 1)]

            def terms(i: int, at: Any, width: int) -> list[Any]:
                if single[i] is not None:
                    return [emit.splat(single[i], width // 4)] * 4
                return kernel.vectors(i, buffers[i], starts[i] + at, width)

            def one(at: Any, width: int, valid: int) -> None:
                value = kernel.combined(terms(0, at, width), terms(1, at, width))
                emit.store(y, base + at, value, width, valid)

            return one

        if not outer:
            runs(size, machine.vector_bytes, begin, end, row(0, (0, 0)))
            return
        with T.serial(begin * per_tile, T.min(end * per_tile, rows)) as r:
            span(inner, machine.vector_bytes, row(T.bind(r * inner), _starts(r, merged)))

    counts = [math.prod(side.shape) for side in sides]
    arguments = [(role, counts[i], kernel.element(i)) for i, role in enumerate("ab")] + [("y", size, steps.y.dtype)]
    constants = {role: kernel.constant(i) for i, role in enumerate("ab") if sides[i].type is None}
    tiles = -(-rows // per_tile) if outer else -(-size // TILE)
    facts = (op, merged, tuple(side.type for side in sides), steps, kernel.bounded, kernel.code, machine)
    text = f"{op} of {list(sides[0].shape)} and {list(sides[1].shape)} in 8 bits, {steps.activation.name}"
    name = unique(f"{op}_int8_{kind_of(merged)}", *facts)
    return KernelCall(name, emit.function(arguments, body), ("a", "b", "y"), constants, tiles, 0, text)


def _starts(row: Any, merged: tuple[Axis, ...]) -> tuple[Any, Any]:
    """Where a row of the last axis begins in a and in b."""
    starts: list[Any] = [0, 0]
    strides = [merged[-1][0] if varies else 1 for varies in merged[-1][1:]]
    rest, outer = row, merged[:-1]
    for i, (extent, *varies) in reversed(list(enumerate(outer))):
        number = rest if i == 0 else T.bind(rest % extent)
        rest = None if i == 0 else T.bind(rest // extent)
        for side in (0, 1):
            if varies[side]:
                starts[side] = T.bind(starts[side] + number * strides[side])
                strides[side] *= extent
    return starts[0], starts[1]


class _Binary:
    """The code of one vector of results: four vectors of int32 from each side, or of float32, narrowed together.

    What a side gives: its terms of a sum; for mul with reals, 1 of the sum and its part of the multiplier; for div, reals.
    """

    def __init__(self, machine: Machine, op: Op, sides: tuple[Side, Side], steps: Requantize) -> None:
        assert steps.y is not None
        self.machine, self.op, self.sides, self.steps, self.y = machine, op, sides, steps, steps.y
        self.unit = sum_unit(*sides)
        self.factors = multiplier(op, *sides, steps) if op != "div" else np.zeros(1, np.float32)
        if op in ("add", "sub"):
            largest = 2.0**31
        else:
            largest = math.prod(255.0 for side in sides if side.type is not None)
        # Rounding to int32 needs bounds of its own where products are beyond it.
        self.bounded = largest * float(np.abs(self.factors).max(initial=0)) >= 2.0**30
        scales = [None if side.type is None else round(side.type.scale / self.unit) for side in sides]
        self.code = (
            scales if op in ("add", "sub") else None,
            self.factors.tobytes() if self.factors.size == 1 else None,
        )

    def element(self, side: int) -> str:
        """Element type of a side as it lies in memory."""
        kind = self.sides[side].type
        return kind.dtype if kind is not None else "int32" if self.op in ("add", "sub") else "float32"

    def constant(self, side: int) -> np.ndarray:
        """Stored reals of a side."""
        reals = self.sides[side]
        if self.op in ("add", "sub"):
            return reals.terms(self.unit).astype(np.int32)
        return np.ascontiguousarray(self.factors if self.op == "mul" else reals.values(None), np.float32)

    def single(self, side: int, buffer: Any, at: Any) -> Any:
        """One element for all lanes."""
        kind, value = self.sides[side].type, buffer[at]
        if kind is not None:
            value = T.Cast("int32", value) - tirx.const(kind.zero_point, "int32")
        return T.bind(self._given(value, side))

    def vectors(self, side: int, buffer: Any, at: Any, width: int) -> list[Any]:
        """Four vectors of neighbours."""
        kind, lanes = self.sides[side].type, width // 4
        if kind is None:
            found = [emit.load(buffer, at + v * lanes, lanes) for v in range(4)]
        else:
            found = integers(self.machine, buffer, at, width, kind)
        return [self._given(value, side) for value in found]

    def _given(self, value: Any, side: int) -> Any:
        """What a side gives of its integers without zero point, or of its stored reals."""
        kind, lanes = self.sides[side].type, lanes_of(value)
        if kind is not None and self.op == "div":
            return real(value, kind)
        if self.op in ("mul", "div"):
            return value
        if kind is not None:
            by = round(kind.scale / self.unit)
            value = value if by == 1 else value * emit.constant(by, lanes, "int32")
        return value

    def combined(self, left: list[Any], right: list[Any]) -> Any:
        """Bytes of the result."""
        lanes, y = lanes_of(left[0]), self.y
        if self.op == "div":
            quotients = [a / b for a, b in zip(left, right, strict=True)]
            whole = [divided(self.machine, q, y, self.steps.activation) for q in quotients]
            return T.bind(narrow(self.machine, whole, y.zero_point, y.dtype, *y.range))
        by = [emit.constant(float(self.factors.reshape(-1)[0]), lanes)] * 4
        if self.op == "mul" and self.sides[0].type is None:
            sums, by = right, left
        elif self.op == "mul" and self.sides[1].type is None:
            sums, by = left, right
        elif self.op == "mul":
            sums = [a * b for a, b in zip(left, right, strict=True)]
        else:
            sums = [a + b if self.op == "add" else a - b for a, b in zip(left, right, strict=True)]
        return self.steps.finish_bytes(self.machine, sums, by, bounded=self.bounded)
