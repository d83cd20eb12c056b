"""8-bit arithmetic: what an integer of a quantized tensor means, sums of four products, and the way back to 8 bits.

    real = scale * (q - zero_point)                                                  (ONNX QuantizeLinear)
    acc[oc] = bias[oc] + sum over k of w[oc, k] * (x[k] - zero_point of x)           int32, exact
    y = saturate(round_half_even(acc * (x.scale * w.scale[oc] / y.scale)) + y.zero_point)

A *word* is 32 bits that hold four neighbours along the sum: four input channels, or four taps of a row. `dot` adds the
four products of a word of activations and a word of weights to an int32, on every lane:

    vnni      vpdpbusd (AVX512-VNNI, AVX-VNNI)            unsigned activations
    sdot      sdot (FEAT_DotProd)                          signed
    pmaddwd   bytes widened to pairs of 16 bits, pmaddwd   unsigned; pmaddubsw would saturate
    smull     smull, saddlp, addp (Armv8.0)                signed
    portable  shifts and multiplications of int32          unsigned

Weights are signed 8 bits. Where the instruction wants activations of the other sign, their top bit is flipped as they
are packed, which moves values and zero point by 128. The zero point is multiplied out once: `correction`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels.base import Machine
from sparsec.kernels.emit import lanes_of
from sparsec.kernels.epilogue import NONE, Activation, Residual, activate, keep, reference

WORD = 4  # products of a word
_PLAIN = ("none", "relu", "clip")  # activations that are bounds of the 8-bit result


@dataclass(frozen=True)
class QuantType:
    """How the integers of a tensor are to be read: real = scale * (q - zero_point). `dtype`: uint8 or int8."""

    scale: float
    zero_point: int
    dtype: str = "uint8"

    def __post_init__(self) -> None:
        low, high = self.range
        if not (math.isfinite(self.scale) and self.scale > 0 and low <= self.zero_point <= high):
            raise ValueError(f"quantization needs a finite scale > 0 and a zero point in {low}..{high}, got {self}")

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        return (-128, 127) if self.dtype == "int8" else (0, 255)

    def quantize(self, x: np.ndarray) -> np.ndarray:
        """Reals to integers, as QuantizeLinear does: divided in float32, rounded half to even, saturated."""
        low, high = self.range
        q = np.rint(np.asarray(x, np.float32) / np.float32(self.scale)) + self.zero_point
        return np.clip(q, low, high).astype(self.dtype)

    def dequantize(self, q: np.ndarray) -> np.ndarray:
        """Integers to float32 reals."""
        return (q.astype(np.int32) - self.zero_point).astype(np.float32) * np.float32(self.scale)


def flipped(machine: Machine, x: QuantType) -> bool:
    """Whether activations of type `x` have the other sign than the machine's `dot` wants."""
    return (x.dtype == "int8") != machine.signed_dot


def packed_zero(machine: Machine, x: QuantType) -> int:
    """The zero point of x as it is packed for `dot`."""
    if not flipped(machine, x):
        return x.zero_point
    return x.zero_point - 128 if machine.signed_dot else x.zero_point + 128


def correction(machine: Machine, w: np.ndarray, bias: np.ndarray | None, x: QuantType) -> np.ndarray:
    """What sums of packed activations start with: bias - zero point * sum of weights. w [OC, ...] int8 -> int32 [OC].

    Raises ValueError where a sum could leave 32 bits.
    """
    rows = w.reshape(w.shape[0], -1).astype(np.int64)
    start = (0 if bias is None else np.asarray(bias, np.int64)) - packed_zero(machine, x) * rows.sum(axis=1)
    reach = np.abs(start) + 255 * np.abs(rows).sum(axis=1)
    if reach.size and reach.max() >= 1 << 31:
        raise ValueError(f"sums reach {int(reach.max()):,}: 32 bits are not enough")
    return start.astype(np.int32)


def flip(value: Any) -> Any:
    """Bytes of any type, or words of four, with the top bit of each byte flipped."""
    lanes = lanes_of(value)
    if emit.dtype_of(value).partition("x")[0] == "int32":
        return value ^ emit.splat(tirx.const(-0x7F7F7F80, "int32"), lanes)
    return tirx.reinterpret(
        emit.vector_type(lanes, "uint8"), value if "uint8" in emit.dtype_of(value) else _as_bytes(value)
    ) ^ emit.splat(tirx.const(128, "uint8"), lanes)


def _as_bytes(value: Any) -> Any:
    return tirx.reinterpret(emit.vector_type(lanes_of(value), "uint8"), value)


# --- sums of products ------------------------------------------------------------------------------------------------


def dot(machine: Machine, acc: Any, activations: Any, weights: Any) -> Any:
    """acc + the four products of each lane. All int32 of equal lanes; activations packed as the machine wants them."""
    lanes = lanes_of(acc)
    if machine.dot in ("vnni", "sdot") and lanes < 4:
        wide = [_repeat(v, 4 // lanes) for v in (acc, activations, weights)]
        return T.Shuffle([dot(machine, *wide)], list(range(lanes)))
    most = machine.vector_bytes // 4
    if machine.dot not in ("portable",) and lanes > most:
        raise ValueError(f"{lanes} lanes: the machine's vectors have {most}")
    match machine.dot:
        case "vnni":
            name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
            return T.call_llvm_pure_intrin(f"int32x{lanes}", name, acc, _quads(activations), _quads(weights))
        case "sdot":
            name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
            return T.call_llvm_pure_intrin("int32x4", name, acc, _quads(activations), _quads(weights))
        case "pmaddwd" if lanes >= 4:
            return acc + _pmaddwd(activations, weights)
        case "smull" if lanes == 4:
            return acc + _smull(activations, weights)
    return acc + _portable(machine, activations, weights)


def _repeat(value: Any, times: int) -> Any:
    """The lanes of a value, `times` times one behind the other."""
    lanes = lanes_of(value)
    return emit.splat(value, times) if lanes == 1 else T.Shuffle([value] * times, list(range(lanes)) * times)


def _quads(words: Any) -> Any:
    return tirx.reinterpret(f"int8x{4 * lanes_of(words)}", words)


def _int(value: int, lanes: int) -> Any:
    return emit.splat(tirx.const(value, "int32"), lanes)


def _pmaddwd(activations: Any, weights: Any) -> Any:
    """Even and odd bytes as 16 bits: of activations without, of weights with their sign."""
    lanes = lanes_of(activations)
    name = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}[lanes]
    halves = f"int16x{2 * lanes}"

    def half(words: Any) -> Any:
        return tirx.reinterpret(halves, words)

    def shift(value: Any, left: bool) -> Any:
        eight = emit.splat(tirx.const(8, "int16"), 2 * lanes)
        return value << eight if left else value >> eight

    low = _int(0x00FF00FF, lanes)
    even_x, odd_x = half(activations & low), half((activations >> _int(8, lanes)) & low)
    both = half(weights)
    even_w, odd_w = shift(shift(both, True), False), shift(both, False)
    dtype = f"int32x{lanes}"
    return T.call_llvm_pure_intrin(dtype, name, even_x, even_w) + T.call_llvm_pure_intrin(dtype, name, odd_x, odd_w)


def _smull(activations: Any, weights: Any) -> Any:
    """Products of 8 bits as 16, added in pairs as 32: nothing can overflow."""
    x, w = _quads(activations), _quads(weights)

    def pairs(first: int) -> Any:
        part = [T.Shuffle([v], list(range(first, first + 8))) for v in (x, w)]
        products = T.call_llvm_pure_intrin("int16x8", "llvm.aarch64.neon.smull.v8i16", *part)
        return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.saddlp.v4i32.v8i16", products)

    return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.addp.v4i32", pairs(0), pairs(8))


def _portable(machine: Machine, activations: Any, weights: Any) -> Any:
    lanes = lanes_of(activations)

    def byte(words: Any, number: int, signed: bool) -> Any:
        if signed:
            return (words << _int(24 - 8 * number, lanes)) >> _int(24, lanes)
        return (words >> _int(8 * number, lanes)) & _int(255, lanes)

    products = [byte(activations, i, machine.signed_dot) * byte(weights, i, True) for i in range(WORD)]
    return (products[0] + products[1]) + (products[2] + products[3])


def interleave(rows: list[Any]) -> Any:
    """Four vectors of bytes, one a channel, as words: lane i holds byte i of each. -> int32, as many lanes."""
    lanes = lanes_of(rows[0])
    if lanes == 1:
        words = [T.Cast("int32", _as_bytes(v)) << tirx.const(8 * i, "int32") for i, v in enumerate(rows)]
        return (words[0] | words[1]) | (words[2] | words[3])
    order = [j * lanes + i for i in range(lanes) for j in range(WORD)]
    return tirx.reinterpret(f"int32x{lanes}", T.Shuffle([_as_bytes(v) for v in rows], order))


def words(w: np.ndarray) -> np.ndarray:
    """int8 [..., 4 n] as little-endian words, int32 [..., n]."""
    return np.ascontiguousarray(w, np.int8).view("<i4")


# --- back to 8 bits --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Requantize:
    """What follows an int32 sum before it is stored.

        v = act(sum)                       residual "none" or "after"; rounded to `inner` where there is a residual
        v = v + other                      residual "before" (then act) or "after"
        y = v as `y`, or as float32 where `y` is None

    `inner`: the quantization that stands between the sum and the residual in the graph, or None. `other`: that of the
    residual, or None for float32.
    """

    y: QuantType | None
    activation: Activation = NONE
    residual: Residual = "none"
    inner: QuantType | None = None
    other: QuantType | None = None

    @property
    def element(self) -> str:
        """Element type of what is stored."""
        return "float32" if self.y is None else self.y.dtype

    @property
    def other_element(self) -> str:
        """Element type of the residual."""
        return "float32" if self.other is None else self.other.dtype

    @property
    def unit(self) -> float:
        """The real value that the multipliers of `multipliers` are in units of."""
        first = self.inner if self.residual != "none" else self.y
        act = self.activation if self.residual != "before" else NONE
        return first.scale if first is not None and act.kind in _PLAIN else 1.0

    def multipliers(self, x: QuantType, w_scale: np.ndarray) -> np.ndarray:
        """What a sum is multiplied with, for each output channel: float32 [OC]."""
        scale = np.float32(x.scale) * np.asarray(w_scale, np.float32)
        return np.ascontiguousarray(scale / np.float32(self.unit), np.float32)

    def finish(self, machine: Machine, acc: Any, multiplier: Any, other: Any = None) -> Any:
        """The value to be stored, of type `element`, of an int32 sum; `other`: the residual as it lies in memory."""
        lanes = lanes_of(acc)
        value = T.Cast(emit.vector_type(lanes), acc) * multiplier
        first = self.activation if self.residual != "before" else NONE
        if self.residual == "none":
            return self._stored(machine, value, first, self.unit)
        value = self._inner(machine, value, first)
        value = value + self._residual(other)
        return self._stored(machine, value, self.activation if self.residual == "before" else NONE, 1.0)

    def whole(self, machine: Machine, acc: Any, multiplier: Any, bounded: bool = True) -> Any:
        """A sum in units of `y`, rounded, without its zero point and bounds, as int32; for steps without a residual.

        What narrows it must saturate, and keep `bounds`. Not `bounded`: sums times multipliers stay below 2^30.
        """
        assert self.y is not None
        lanes = lanes_of(acc)
        value = T.Cast(emit.vector_type(lanes), acc) * multiplier
        if self.activation.kind not in _PLAIN:
            value = activate(self.activation, value) * emit.constant(1.0 / self.y.scale, lanes)
            bounded = True
        if bounded:
            value = keep(value)
            value = T.min(T.max(value, emit.constant(-(2.0**24), lanes)), emit.constant(2.0**24, lanes))
        return rounded(machine, value)

    def _inner(self, machine: Machine, value: Any, act: Activation) -> Any:
        """The sum as a real, through `inner` if there is one."""
        if self.inner is None:
            return activate(act, value)
        lanes = lanes_of(value)
        whole = T.Cast(emit.vector_type(lanes), rounded(machine, _bounded(value, act, self.inner, self.unit)))
        return whole * emit.constant(self.inner.scale, lanes)

    def _residual(self, other: Any) -> Any:
        if self.other is None:
            return other
        lanes = lanes_of(other)
        whole = T.Cast(emit.vector_type(lanes, "int32"), other) - _int(self.other.zero_point, lanes)
        return T.Cast(emit.vector_type(lanes), whole) * emit.constant(self.other.scale, lanes)

    def _stored(self, machine: Machine, value: Any, act: Activation, unit: float) -> Any:
        if self.y is None:
            return activate(act, value)
        return narrowed(machine, value, act, self.y, unit)


def narrowed(machine: Machine, value: Any, act: Activation, y: QuantType, unit: float = 1.0) -> Any:
    """act(value * unit) as integers of type `y`; value float32. `unit`: `y.scale`, or 1."""
    lanes = lanes_of(value)
    whole = rounded(machine, _bounded(value, act, y, unit)) + _int(y.zero_point, lanes)
    return T.Cast(emit.vector_type(lanes, y.dtype), whole)


def _bounded(value: Any, act: Activation, y: QuantType, unit: float) -> Any:
    """act(value * unit) in units of y.scale, within what y can hold around its zero point; NaN becomes the least."""
    lanes = lanes_of(value)
    if act.kind not in _PLAIN:
        value, act, unit = activate(act, value * emit.constant(unit, lanes) if unit != 1.0 else value), NONE, 1.0
    if unit != y.scale:
        value = value * emit.constant(unit / y.scale, lanes)
    low, high = bounds(act, y)
    value = keep(value)
    # Not NaN-keeping selections: these are one instruction each, and rounding needs a number.
    return T.min(T.max(value, emit.constant(low - y.zero_point, lanes)), emit.constant(high - y.zero_point, lanes))


def bounds(act: Activation, y: QuantType) -> tuple[int, int]:
    """Least and largest integer that relu, clip or no activation leaves: rounding is monotone, so it may come first."""
    low, high = y.range
    if act.kind not in ("relu", "clip"):
        return low, high
    ends = (0.0, math.inf) if act.kind == "relu" else (act.alpha, act.beta)
    least, largest = (np.clip(np.rint(np.float32(e) / np.float32(y.scale)) + y.zero_point, low, high) for e in ends)
    return int(least), int(largest)


def rounded(machine: Machine, value: Any) -> Any:
    """float32 within int32's range, rounded half to even, as int32."""
    lanes = lanes_of(value)
    if not machine.lane_fma and lanes >= 4:
        return T.call_llvm_pure_intrin(f"int32x{lanes}", f"llvm.lrint.v{lanes}i32.v{lanes}f32", value)
    if machine.lane_fma and lanes == 4:
        return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.fcvtns.v4i32.v4f32", value)
    return T.Cast(emit.vector_type(lanes, "int32"), T.nearbyint(value))


def reference_requantize(
    acc: np.ndarray, multiplier: np.ndarray, steps: Requantize, other: np.ndarray | None = None
) -> np.ndarray:
    """`Requantize.finish` by NumPy. acc int32 [..., OC on the axis that multiplier broadcasts over]."""
    value = acc.astype(np.float32) * multiplier.astype(np.float32)
    first = steps.activation if steps.residual != "before" else NONE

    def whole(value: np.ndarray, act: Activation, y: QuantType, unit: float) -> np.ndarray:
        if act.kind not in _PLAIN:
            value, act, unit = reference(act, value * np.float32(unit)).astype(np.float32), NONE, 1.0
        if unit != y.scale:
            value = value * np.float32(unit / y.scale)
        low, high = bounds(act, y)
        return np.rint(np.clip(value, low - y.zero_point, high - y.zero_point))

    if steps.residual == "none":
        act, unit = first, steps.unit
    else:
        if steps.inner is None:
            value = reference(first, value).astype(np.float32)
        else:
            value = whole(value, first, steps.inner, steps.unit).astype(np.float32) * np.float32(steps.inner.scale)
        assert other is not None
        value = value + (other if steps.other is None else steps.other.dequantize(other))
        act, unit = (steps.activation if steps.residual == "before" else NONE), 1.0
    if steps.y is None:
        return reference(act, value).astype(np.float32)
    return (whole(value, act, steps.y, unit) + steps.y.zero_point).astype(steps.y.dtype)
