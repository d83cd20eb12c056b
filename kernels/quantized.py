"""8-bit arithmetic: what an integer of a quantized tensor means, sums of four products, and the way back to 8 bits.

    real = scale * (q - zero_point)                                                  (ONNX QuantizeLinear)
    acc[oc] = bias[oc] + sum over k of w[oc, k] * (x[k] - zero_point of x)           int32, exact
    y = saturate(round_half_even(acc * (x.scale * w.scale[oc] / y.scale)) + y.zero_point)

A *word* is 32 bits that hold four neighbours along the sum: four input channels, or four taps of a row.
`sparsec.kernels.dots` multiplies them.

Weights are signed 8 bits. Where the instruction wants activations of the other sign, their top bit is flipped as they
are packed, which moves values and zero point by 128. The zero point is multiplied out once: `correction`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import bytes as vectors
from sparsec.kernels import emit
from sparsec.kernels.base import Machine
from sparsec.kernels.dots import WORD
from sparsec.kernels.emit import lanes_of
from sparsec.kernels.epilogue import NONE, Activation, Residual, activate, keep, reference

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


def largest(w: np.ndarray, bias: np.ndarray | None, multipliers: np.ndarray) -> float:
    """The largest magnitude of a sum times its multiplier. w [OC, ...] int8, bias and multipliers [OC]."""
    reach = 255.0 * np.abs(w.reshape(w.shape[0], -1).astype(np.float64)).sum(axis=1)
    return float(np.max((reach + (0 if bias is None else np.abs(np.asarray(bias, np.float64)))) * multipliers))


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


# --- words ----------------------------------------------------------------------------------------------------------


def _int(value: int, lanes: int) -> Any:
    return emit.constant(value, lanes, "int32")


def interleave(machine: Machine, rows: list[Any]) -> Any:
    """Four vectors of bytes, one a channel, as words: lane i holds byte i of each. -> int32, as many lanes."""
    lanes = lanes_of(rows[0])
    if lanes == 1:
        words = [T.Cast("int32", _as_bytes(v)) << tirx.const(8 * i, "int32") for i, v in enumerate(rows)]
        return (words[0] | words[1]) | (words[2] | words[3])
    together = [_as_bytes(v) for v in rows]
    if lanes == 16 and machine.vector_bytes == 64:
        # Words across the vector, then bytes within 16: a shuffle of bytes across it takes LLVM eleven instructions.
        found = tirx.reinterpret("int32x16", T.Shuffle(together, list(range(64))))
        found = T.Shuffle([found], [4 * j + i for i in range(4) for j in range(WORD)])
        within = [16 * at + 4 * j + i for at in range(4) for i in range(4) for j in range(WORD)]
        return tirx.reinterpret("int32x16", T.Shuffle([tirx.reinterpret("uint8x64", found)], within))
    order = [j * lanes + i for i in range(lanes) for j in range(WORD)]
    return tirx.reinterpret(f"int32x{lanes}", T.Shuffle(together, order))


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
        if self.residual == "none":
            return self._stored(machine, value, self.activation, self.unit)
        first = self.activation if self.residual == "after" else NONE
        value = self._inner(machine, value, first) + self._residual(other)
        return self._stored(machine, value, self._last, 1.0)

    def finish_bytes(
        self, machine: Machine, sums: Sequence[Any], multipliers: Sequence[Any], others: Sequence[Any] = (),
        bounded: bool = True, spread: bool = False,
    ) -> Any:  # fmt: skip
        """`finish` of up to four vectors of sums, as one vector of bytes four times as long; for results of 8 bits.

        Lanes behind the last sum are anything. Not `bounded`: sums times multipliers stay below 2^30 (`largest`).
        `spread`: the sums are of `bytes.spread_words`.
        """
        assert self.y is not None
        others = others or [None] * len(sums)
        whole = [self._whole(machine, *terms, bounded) for terms in zip(sums, multipliers, others, strict=True)]
        whole = [whole[i % len(whole)] for i in range(WORD)]
        least, largest = bounds(self._last, self.y)
        return T.bind(vectors.narrow(machine, whole, self.y.zero_point, self.y.dtype, least, largest, spread))

    @property
    def _last(self) -> Activation:
        """The activation that bounds the result."""
        return NONE if self.residual == "after" else self.activation

    def _whole(self, machine: Machine, acc: Any, multiplier: Any, other: Any, bounded: bool) -> Any:
        """A result rounded, without its zero point and, but for a residual, its bounds, as int32."""
        assert self.y is not None
        lanes = lanes_of(acc)
        value = T.Cast(emit.vector_type(lanes), acc) * multiplier
        if self.residual != "none":
            first = self.activation if self.residual == "after" else NONE
            value = self._inner(machine, value, first) + self._residual(other)
            return rounded(machine, _bounded(value, self._last, self.y, 1.0))
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
    if machine.dot != "wasm" and not machine.lane_fma and lanes >= 4:
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
