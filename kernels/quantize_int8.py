"""Floats to integers of 8 bits and back, and the vectors of bytes of which 8-bit elementwise kernels consist.

quantize    y = saturate(round_half_even(x / s) + z)                      x float32, divided as ONNX does
dequantize  y = (x - z) * s                                               float32, exact
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit, quantized
from sparsec.kernels.base import Format, KernelCall, Machine, unique
from sparsec.kernels.bytes import narrow
from sparsec.kernels.emit import lanes_of
from sparsec.kernels.epilogue import NONE, Activation, activate, keep
from sparsec.kernels.quantized import QuantType

TILE = 8192  # elements
BOUNDS = ("none", "relu", "clip")  # activations that are bounds of the result

TABLE: tuple[Format, ...] = (
    Format("quantize_int8", "QuantizeLinear", "dense", "int8", "float32 to 8 bits", "one constant scale"),
    Format("dequantize_int8", "DequantizeLinear", "dense", "int8", "8 bits to float32", "one constant scale"),
)


def bind_quantize(machine: Machine, *, size: int, y: QuantType) -> KernelCall:
    """The call for `size` float32 elements as integers of type `y`. Roles (x, y). Tiles: runs of TILE elements."""
    machine = machine.single()

    def one(x: Any, out: Any, at: Any, width: int, valid: int) -> None:
        lanes = width // 4
        whole = [divided(machine, emit.load(x, at + v * lanes, lanes), y) for v in range(4)]
        emit.store(out, at, T.bind(narrow(machine, whole, y.zero_point, y.dtype, *y.range)), width, valid)

    func = emit.function([("x", size, "float32"), ("y", size, y.dtype)], by_runs(machine, size, one))
    name = unique(f"quantize_{y.dtype}", size, y, machine)
    return KernelCall(name, func, ("x", "y"), {}, -(-size // TILE), 0, f"{size} elements to {y.dtype}")


def bind_dequantize(machine: Machine, *, size: int, x: QuantType) -> KernelCall:
    """The call for `size` integers of type `x` as float32. Roles (x, y). Tiles: runs of TILE elements."""
    machine = machine.single()

    def one(data: Any, y: Any, at: Any, width: int, valid: int) -> None:
        lanes = width // 4
        for v, value in enumerate(integers(machine, data, at, width, x)):
            if valid > v * lanes:
                emit.store(y, at + v * lanes, real(value, x), lanes, min(lanes, valid - v * lanes))

    func = emit.function([("x", size, x.dtype), ("y", size, "float32")], by_runs(machine, size, one))
    name = unique(f"dequantize_{x.dtype}", size, x, machine)
    return KernelCall(name, func, ("x", "y"), {}, -(-size // TILE), 0, f"{size} elements from {x.dtype}")


# --- code ------------------------------------------------------------------------------------------------------------


def divided(machine: Machine, value: Any, y: QuantType, act: Activation = NONE) -> Any:
    """act(value) / y.scale within what y can hold, rounded to int32, without its zero point. The least where it is NaN."""
    lanes = lanes_of(value)
    if act.kind not in BOUNDS:
        value = activate(act, value)
    low, high = (end - y.zero_point for end in quantized.bounds(act, y))
    value = keep(value / emit.constant(y.scale, lanes))
    if machine.lane_fma:  # there maxima pass NaN on
        value = keep(tirx.Select(value >= emit.constant(low, lanes), value, emit.constant(low, lanes)))
        return quantized.rounded(machine, T.min(value, emit.constant(high, lanes)))
    return quantized.rounded(machine, T.min(T.max(value, emit.constant(low, lanes)), emit.constant(high, lanes)))


def real(value: Any, x: QuantType) -> Any:
    """Integers of type x, without their zero point, as float32."""
    lanes = lanes_of(value)
    return T.Cast(emit.vector_type(lanes), value) * emit.constant(x.scale, lanes)


def integers(machine: Machine, buffer: Any, at: Any, width: int, x: QuantType) -> list[Any]:
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
        runs(size, width or machine.vector_bytes, begin, end, lambda at, width, valid: one(x, y, at, width, valid))

    return body


def runs(size: int, width: int, begin: Any, end: Any, one: Callable[[Any, int, int], None]) -> None:
    """Tiles of TILE consecutive elements, the last one shorter."""
    full, rest = divmod(size, TILE)
    if full:
        with T.serial(begin, T.min(end, full)) as t:
            span(TILE, width, lambda at, width, valid: one(t * TILE + at, width, valid))
    if rest:
        with T.If(T.And(begin <= full, end > full)), T.Then():
            span(rest, width, lambda at, width, valid: one(full * TILE + at, width, valid))


def span(count: int, width: int, one: Callable[[Any, int, int], None]) -> None:
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
