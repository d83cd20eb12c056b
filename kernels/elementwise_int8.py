"""8-bit elementwise layers: floats to integers and back, and two quantized tensors combined.

    quantize    y = saturate(round_half_even(x / s) + z)                      x float32, divided as ONNX does
    dequantize  y = (x - z) * s                                               float32, exact
    add, sub    sum = A (a - za) +- B (b - zb)                                A = s_a / u, B = s_b / u, rounded
    mul         sum = (a - za) (b - zb)                                       u = s_a s_b
    div         y = saturate(round_half_even(act((a - za) s_a / ((b - zb) s_b)) / s_y) + z_y)

Sums are exact in int32 and are worth u each; `Requantize` takes them back to 8 bits: bounds of relu and clip, other
activations in float32. For add and sub u = max(s_a, s_b) / 2^22: the larger factor is 2^22 and the sum stays below 2^31;
rounding of the smaller one moves a result by at most 2^-15 max(s_a, s_b). Integers instead of two float products, because
a compiler may fuse or not fuse those: results are equal on every instruction set, and ties are found as ties.

b broadcasts over a as in `sparsec.kernels.elementwise.spread`; `swapped` exchanges the sides of op.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit, quantized
from sparsec.kernels.base import Format, KernelCall, Machine, unique
from sparsec.kernels.bytes import narrow
from sparsec.kernels.elementwise import Op, spread
from sparsec.kernels.emit import lanes_of
from sparsec.kernels.epilogue import NONE, Activation, activate, keep
from sparsec.kernels.epilogue import reference as reference_activation
from sparsec.kernels.quantized import QuantType, Requantize, reference_requantize

TILE = 8192  # elements
UNIT = 2.0**-22  # of the larger scale: what a sum of add and sub counts in
_BOUNDS = ("none", "relu", "clip")  # activations that are bounds of the result

TABLE: tuple[Format, ...] = (
    Format("elementwise_int8_same", "Add, Sub, Mul, Div", "dense", "int8", "two 8-bit tensors of one shape", "equal shapes"),
    Format("elementwise_int8_channel", "Add, Sub, Mul, Div", "dense", "int8", "an 8-bit tensor and a value a channel",
           "b [C, 1, 1] or [N, C, 1, 1]"),
    Format("elementwise_int8_row", "Add, Sub, Mul, Div", "dense", "int8", "an 8-bit tensor and a vector over its last axes",
           "b's shape is the tail of a's"),
    Format("elementwise_int8_scalar", "Add, Sub, Mul, Div", "dense", "int8", "an 8-bit tensor and one value", "b has one element"),
    Format("quantize_int8", "QuantizeLinear", "dense", "int8", "float32 to 8 bits", "one constant scale"),
    Format("dequantize_int8", "DequantizeLinear", "dense", "int8", "8 bits to float32", "one constant scale"),
)  # fmt: skip


# --- what is computed ------------------------------------------------------------------------------------------------


def factors(op: Op, a: QuantType, b: QuantType, swapped: bool = False) -> tuple[int, int]:
    """What (a - za) and (b - zb) are multiplied with in the sum of add or sub."""
    unit = max(a.scale, b.scale) * UNIT
    left, right = round(a.scale / unit), round(b.scale / unit)
    if op == "sub":
        return (-left, right) if swapped else (left, -right)
    return left, right


def multiplier(op: Op, a: QuantType, b: QuantType, steps: Requantize) -> float:
    """What a sum of add, sub or mul is multiplied with before it is rounded: a float32."""
    if op == "mul":
        return float(steps.multipliers(a, np.full(1, b.scale))[0])
    return float(steps.multipliers(replace(a, scale=max(a.scale, b.scale)), np.full(1, UNIT))[0])


def reference(
    op: Op, a: np.ndarray, b: np.ndarray, types: tuple[QuantType, QuantType], steps: Requantize, swapped: bool = False
) -> np.ndarray:
    """`op` by NumPy: integers a and b of `types`, b broadcasting over a, to integers of type steps.y."""
    a_type, b_type = types
    assert steps.y is not None
    left, right = a.astype(np.int64) - a_type.zero_point, b.astype(np.int64) - b_type.zero_point
    if op == "div":
        above, below = left.astype(np.float32) * np.float32(a_type.scale), right.astype(np.float32) * np.float32(b_type.scale)  # fmt: skip
        if swapped:
            above, below = below, above
        with np.errstate(divide="ignore", invalid="ignore"):
            found = above / below
        if steps.activation.kind in _BOUNDS:
            found = np.where(np.isnan(found), np.float32(-np.inf), found)
        found = reference_activation(steps.activation, found).astype(np.float32)
        return steps.y.quantize(np.where(np.isnan(found), np.float32(-np.inf), found))
    if op == "mul":
        total = left * right
    else:
        by = factors(op, a_type, b_type, swapped)
        total = left * by[0] + right * by[1]
    by_unit = np.full(1, multiplier(op, a_type, b_type, steps), np.float32)
    return reference_requantize(total.astype(np.int32), by_unit, steps)


# --- calls -----------------------------------------------------------------------------------------------------------


def bind_quantize(machine: Machine, *, size: int, y: QuantType) -> KernelCall:
    """The call for `size` float32 elements as integers of type `y`. Roles (x, y). Tiles: runs of TILE elements."""
    machine = machine.single()

    def one(x: Any, out: Any, at: Any, width: int, valid: int) -> None:
        lanes = width // 4
        whole = [_divided(machine, emit.load(x, at + v * lanes, lanes), y) for v in range(4)]
        emit.store(out, at, T.bind(narrow(machine, whole, y.zero_point, y.dtype, *y.range)), width, valid)

    func = emit.function([("x", size, "float32"), ("y", size, y.dtype)], by_runs(machine, size, one))
    name = unique(f"quantize_{y.dtype}", size, y, machine)
    return KernelCall(name, func, ("x", "y"), {}, -(-size // TILE), 0, f"{size} elements to {y.dtype}")


def bind_dequantize(machine: Machine, *, size: int, x: QuantType) -> KernelCall:
    """The call for `size` integers of type `x` as float32. Roles (x, y). Tiles: runs of TILE elements."""
    machine = machine.single()

    def one(data: Any, y: Any, at: Any, width: int, valid: int) -> None:
        lanes = width // 4
        for v, value in enumerate(_integers(machine, data, at, width, x)):
            if valid > v * lanes:
                emit.store(y, at + v * lanes, _real(value, x), lanes, min(lanes, valid - v * lanes))

    func = emit.function([("x", size, x.dtype), ("y", size, "float32")], by_runs(machine, size, one))
    name = unique(f"dequantize_{x.dtype}", size, x, machine)
    return KernelCall(name, func, ("x", "y"), {}, -(-size // TILE), 0, f"{size} elements from {x.dtype}")


def bind(
    machine: Machine,
    op: Op,
    *,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    types: tuple[QuantType, QuantType],
    steps: Requantize,
    swapped: bool = False,
) -> KernelCall:
    """The call for `a op b` (or `b op a` if `swapped`) of integers of `types`, then `steps`. Roles (a, b, y).

    b broadcasts over a; `steps` ends in integers and adds nothing. y must not overlap a or b. Raises ValueError where
    `spread` knows no way.
    """
    found = spread(a_shape, b_shape)
    if found is None:
        raise ValueError(f"b {list(b_shape)} does not broadcast over a {list(a_shape)} as one run of axes")
    if steps.y is None or steps.residual != "none":
        raise ValueError("8-bit elementwise layers end in 8 bits and add no residual")
    kind, count, inner = found
    size = int(np.prod(a_shape))
    machine = machine.single()
    kernel = _Binary(machine, op, types, steps, swapped)
    in_rows = kind in ("channel", "row")
    per_tile = max(1, TILE // inner)
    rows = size // inner

    def flat(a: Any, b: Any, y: Any, begin: Any, end: Any) -> None:
        single = T.bind(b[0]) if kind == "scalar" else None

        def one(at: Any, width: int, valid: int) -> None:
            kernel.store(y, at, width, valid, kernel.left(a, at, width), kernel.right(b, at, width, single))

        _runs(size, machine.vector_bytes, begin, end, one)

    def by_rows(a: Any, b: Any, y: Any, begin: Any, end: Any) -> None:
        with T.serial(begin * per_tile, T.min(end * per_tile, rows)) as r:
            base = T.bind(r * inner)
            single = T.bind(b[r % count]) if kind == "channel" else None

            def one(at: Any, width: int, valid: int) -> None:
                left = kernel.left(a, base + at, width)
                kernel.store(y, base + at, width, valid, left, kernel.right(b, at, width, single))

            _span(inner, machine.vector_bytes, one)

    arguments = [("a", size, types[0].dtype), ("b", count, types[1].dtype), ("y", size, steps.y.dtype)]
    func = emit.function(arguments, by_rows if in_rows else flat)
    tiles = -(-rows // per_tile) if in_rows else -(-size // TILE)
    name = unique(f"{op}_int8_{kind}", op, size, kind, count, inner, types, steps, swapped, machine)
    text = (
        f"{op} of {list(a_shape)} and {list(b_shape)}{' swapped' if swapped else ''} in 8 bits, {steps.activation.name}"
    )
    return KernelCall(name, func, ("a", "b", "y"), {}, tiles, 0, text)


class _Binary:
    """The code of one vector of results: four vectors of int32 from each side, narrowed together."""

    def __init__(
        self, machine: Machine, op: Op, types: tuple[QuantType, QuantType], steps: Requantize, swapped: bool
    ) -> None:
        assert steps.y is not None
        self.machine, self.op, self.types, self.steps, self.y = machine, op, types, steps, steps.y
        self.swapped = swapped
        self.factor = multiplier(op, *types, steps)
        self.by = factors(op, *types, swapped) if op in ("add", "sub") else (1, 1)
        largest = 255.0 * 255.0 if op == "mul" else 255.0 * (abs(self.by[0]) + abs(self.by[1]))
        self.bounded = largest * self.factor >= 2.0**30  # rounding to int32 needs a bound of its own

    def left(self, buffer: Any, at: Any, width: int) -> list[Any]:
        """Integers of a, times their factor."""
        return [self._scaled(value, 0) for value in _integers(self.machine, buffer, at, width, self.types[0])]

    def right(self, buffer: Any, at: Any, width: int, single: Any) -> list[Any]:
        """The same of b; `single`: one of its bytes, for all lanes."""
        if single is None:
            found = _integers(self.machine, buffer, at, width, self.types[1])
            return [self._scaled(value, 1) for value in found]
        value = T.Cast("int32", single) - tirx.const(self.types[1].zero_point, "int32")
        return [emit.splat(self._scaled(value, 1), width // 4)] * 4

    def _scaled(self, value: Any, side: int) -> Any:
        by = self.by[side]
        return value if by == 1 else value * emit.splat(tirx.const(by, "int32"), lanes_of(value))

    def store(self, y: Any, at: Any, width: int, valid: int, left: list[Any], right: list[Any]) -> None:
        """Combine, requantize and write `valid` bytes."""
        if self.op == "div":
            value = self._quotients(left, right)
        else:
            sums = [a * b if self.op == "mul" else a + b for a, b in zip(left, right, strict=True)]
            by = emit.constant(self.factor, lanes_of(sums[0]))
            value = self.steps.finish_bytes(self.machine, sums, [by] * len(sums), bounded=self.bounded)
        emit.store(y, at, value, width, valid)

    def _quotients(self, left: list[Any], right: list[Any]) -> Any:
        whole = []
        for pair in zip(left, right, strict=True):
            a, b = (_real(v, t) for v, t in zip(pair, self.types, strict=True))
            quotient = b / a if self.swapped else a / b
            whole.append(_divided(self.machine, quotient, self.y, self.steps.activation))
        return T.bind(narrow(self.machine, whole, self.y.zero_point, self.y.dtype, *self.y.range))


# --- code ------------------------------------------------------------------------------------------------------------


def _divided(machine: Machine, value: Any, y: QuantType, act: Activation = NONE) -> Any:
    """act(value) / y.scale within what y can hold, rounded to int32, without its zero point. The least where it is NaN."""
    lanes = lanes_of(value)
    if act.kind not in _BOUNDS:
        value = activate(act, value)
    low, high = (end - y.zero_point for end in quantized.bounds(act, y))
    value = keep(value / emit.constant(y.scale, lanes))
    if machine.lane_fma:  # there maxima pass NaN on
        value = keep(tirx.Select(value >= emit.constant(low, lanes), value, emit.constant(low, lanes)))
        return quantized.rounded(machine, T.min(value, emit.constant(high, lanes)))
    return quantized.rounded(machine, T.min(T.max(value, emit.constant(low, lanes)), emit.constant(high, lanes)))


def _real(value: Any, x: QuantType) -> Any:
    """Integers of type x, without their zero point, as float32."""
    lanes = lanes_of(value)
    return T.Cast(emit.vector_type(lanes), value) * emit.constant(x.scale, lanes)


def _integers(machine: Machine, buffer: Any, at: Any, width: int, x: QuantType) -> list[Any]:
    """`width` bytes of type x from `at` on, without their zero point: four vectors of int32."""
    lanes = width // 4
    if machine.lane_fma:  # one load, widened in steps; elsewhere a load widens
        whole = T.bind(emit.load(buffer, at, width))
        parts = [T.Shuffle([whole], list(range(v * lanes, (v + 1) * lanes))) for v in range(4)]
    else:
        parts = [emit.load(buffer, at + v * lanes, lanes) for v in range(4)]
    zero = emit.splat(tirx.const(x.zero_point, "int32"), lanes)
    wide = [T.Cast(emit.vector_type(lanes, "int32"), part) for part in parts]
    return [value - zero for value in wide] if x.zero_point else wide


def by_runs(
    machine: Machine, size: int, one: Callable[[Any, Any, Any, int, int], None], width: int | None = None
) -> Callable[..., None]:
    """The body of a kernel with roles (x, y): `one(x, y, at, width, valid)` writes `valid` elements of y from `at` on.

    Vectors of bytes are `width` wide (default: a register), or 16 and more where there are fewer elements.
    """

    def body(x: Any, y: Any, begin: Any, end: Any) -> None:
        _runs(size, width or machine.vector_bytes, begin, end, lambda at, width, valid: one(x, y, at, width, valid))

    return body


def _runs(size: int, width: int, begin: Any, end: Any, one: Callable[[Any, int, int], None]) -> None:
    """Tiles of TILE consecutive elements, the last one shorter."""
    full, rest = divmod(size, TILE)
    if full:
        with T.serial(begin, T.min(end, full)) as t:
            _span(TILE, width, lambda at, width, valid: one(t * TILE + at, width, valid))
    if rest:
        with T.If(T.And(begin <= full, end > full)), T.Then():
            _span(rest, width, lambda at, width, valid: one(full * TILE + at, width, valid))


def _span(count: int, width: int, one: Callable[[Any, int, int], None]) -> None:
    """`one(at, width, valid)` for vectors of bytes that cover 0..count; the last overlaps its neighbour, or is 16 wide.

    It may read up to 15 elements behind the last one.
    """
    while width > 16 and width > count:
        width //= 2
    if count < width:
        one(0, width, count)
        return
    with T.serial(0, count // width) as i:
        one(i * width, width, width)
    if count % width:
        one(count - width, width, width)
