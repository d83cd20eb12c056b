"""Quantized forms: QuantizeLinear (Q) and DequantizeLinear (DQ) around layers, operators with quantization inside, weights alone.

Scales are powers of two, as often as not: then both sides round the same numbers, and a tie is a tie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from fuzz.graphs.draft import BYTES, F16, F32, I8, I32, U8, Draft, Value
from fuzz.graphs.layers import window

LOW = {U8: 0, I8: -128}


def _parameters(d: Draft, dtype: np.dtype) -> tuple[str, str, float]:
    """Names of scale and zero point of an activation, and the scale."""
    scale = d.among((0.0625, 0.03125, 0.05, 0.021))
    zero = d.among((0, 128, 113) if dtype == U8 else (0, -7, 20))
    return d.constant(scale, F32), d.constant(zero, dtype), scale


def quantize(d: Draft, x: Value, dtype: np.dtype | None = None) -> tuple[Value, float] | None:
    """Q and DQ behind `x`, and the scale."""
    dtype = dtype or d.among((U8, U8, I8))
    scale, zero, number = _parameters(d, dtype)
    q = d.add("QuantizeLinear", [x.name, scale, zero], x.shape, dtype, rounded=True)
    back = q and d.add("DequantizeLinear", [q.name, scale, zero], x.shape, F32)
    return (back, number) if back else None


def pair(d: Draft, x: Value) -> None:
    """Q and DQ anywhere."""
    if x.dtype == F32:
        quantize(d, x)


def dequantize(d: Draft, x: Value) -> None:
    """Bytes of an input or of a Q become real numbers, after some of them moved."""
    if x.dtype in BYTES:
        scale, zero, _ = _parameters(d, x.dtype)
        d.add("DequantizeLinear", [x.name, scale, zero], x.shape, F32)


def _weight(d: Draft, shape: tuple[int, ...], axis: int) -> tuple[str, np.ndarray]:
    """Name of a dequantized int8 (at times uint8) constant and its scales, one an index of `axis` or one of all."""
    each = d.opset >= 13 and d.number(0, 2) > 0
    rng = np.random.default_rng(d.number(0, 99))
    scales = np.asarray(0.002 + 0.008 * rng.random(shape[axis] if each else ()), F32)
    numbers, zeros = d.weight(shape, I8), np.zeros(scales.shape, I8)
    if not each and d.maybe(4):
        numbers, zeros = (numbers.astype(I32) + 128).astype(U8), np.array(128, U8)
    more: dict[str, Any] = {"axis": axis} if each else {}
    made = d.aside("DequantizeLinear", [d.constant(numbers), d.constant(scales), d.constant(zeros)], shape, F32, **more)
    assert made
    return made.name, scales


def _bias(d: Draft, count: int, scales: np.ndarray, scale: float) -> list[str]:
    """Nothing, real numbers, or int32 behind a DQ."""
    kind = d.number(0, 2)
    if kind == 0 or (kind == 2 and d.opset < 13):
        return []
    if kind == 1:
        return [d.constant(0.3 * d.numbers((count,), F32))]
    unit = np.broadcast_to(scales * np.float32(scale), (count,)).astype(F32)
    numbers = np.round(0.3 * d.numbers((count,), F32) / unit).astype(I32)
    inputs = [d.constant(numbers), d.constant(unit), d.constant(np.zeros(count), I32)]
    made = d.aside("DequantizeLinear", inputs, (count,), F32, axis=0)
    return [made.name] if made else []


def _conv(d: Draft, x: Value, scale: float) -> Value | None:
    found = window(d, x.shape[2:]) if x.rank in (3, 4) else None
    if found is None:
        return None
    out, more = found
    n, c = x.shape[:2]
    group = d.among([1, 1, c])
    oc = group * d.among((1, 2)) if group > 1 else d.among((1, 4, 8, 17))
    weight, scales = _weight(d, (oc, c // group, *more["kernel_shape"]), 0)
    return d.add("Conv", [x.name, weight, *_bias(d, oc, scales, scale)], (n, oc, *out), F32, group=group, **more)


def _gemm(d: Draft, x: Value, scale: float) -> Value | None:
    if x.rank != 2:
        return None
    n, turned = d.among((1, 4, 8, 17)), d.number(0, 1)
    shape = (n, x.shape[1]) if turned else (x.shape[1], n)
    weight, scales = _weight(d, shape, 1 - turned)
    bias = _bias(d, n, scales, scale)
    return d.add("Gemm", [x.name, weight, *bias], (x.shape[0], n), F32, transB=turned) if bias or d.opset > 10 else None


def _matmul(d: Draft, x: Value, scale: float) -> Value | None:
    if x.rank < 2:
        return None
    n = d.among((1, 4, 8, 17))
    weight, _ = _weight(d, (x.shape[-1], n), 1)
    return d.add("MatMul", [x.name, weight], (*x.shape[:-1], n), F32)


def _two(d: Draft, x: Value, scale: float) -> Value | None:
    others = [v for v in d.values if v.dtype == F32 and v.shape == x.shape]
    other = quantize(d, d.among(others))
    return other and d.add(d.among(("Add", "Add", "Mul")), [x.name, other[0].name], x.shape, F32)


def _concat(d: Draft, x: Value, scale: float) -> Value | None:
    if not x.rank:
        return None
    other, axis = quantize(d, x), d.number(0, x.rank - 1)
    shape = tuple(2 * s if i == axis else s for i, s in enumerate(x.shape))
    return other and d.add("Concat", [x.name, other[0].name], shape, F32, axis=axis)


def _pool(d: Draft, x: Value, scale: float) -> Value | None:
    if x.rank != 4:
        return None
    n, c, h, w = x.shape
    op = d.among(("GlobalAveragePool", "MaxPool", "AveragePool"))
    if op.startswith("G"):
        return d.add(op, [x.name], (n, c, 1, 1), F32)
    k = d.number(1, min(2, h, w))
    return d.add(op, [x.name], (n, c, h // k, w // k), F32, kernel_shape=[k, k], strides=[k, k])


def _simple(d: Draft, x: Value, scale: float) -> Value | None:
    op = d.among(("Sigmoid", "Relu", "Tanh", "Softmax", "LeakyRelu", "Transpose", "HardSwish"))
    shape = x.shape[::-1] if op == "Transpose" else x.shape
    return d.add(op, [x.name], shape, F32) if x.rank else None


LAYERS: tuple[Callable[[Draft, Value, float], Value | None], ...] = (
    _conv, _conv, _conv, _gemm, _gemm, _matmul, _two, _concat, _pool, _simple,
)  # fmt: skip


def layer(d: Draft, x: Value) -> None:
    """DQ -> layer [-> Relu | Clip] -> Q -> DQ; at times without what stands behind."""
    if x.dtype != F32:
        return
    start = quantize(d, x)
    y = start and d.among(LAYERS)(d, *start)
    if not y:
        return
    if d.maybe():
        if d.maybe() and d.opset >= 11:
            y = d.add("Clip", [y.name, d.constant(0, F32), d.constant(6, F32)], y.shape, F32) or y
        else:
            y = d.add("Relu", [y.name], y.shape, F32) or y
    if d.number(0, 4):
        quantize(d, y)


def inside(d: Draft, x: Value) -> None:
    """QLinearConv, QLinearMatMul and DynamicQuantizeLinear."""
    if x.dtype == F32 and d.maybe(3):
        names = [d.name() for _ in range(3)]
        d.nodes.append(helper.make_node("DynamicQuantizeLinear", [x.name], names, name=f"Dynamic_{names[0]}"))
        d.known |= {names[0]: (U8, x.shape), names[1]: (F32, ()), names[2]: (U8, ())}
        d.add("DequantizeLinear", names, x.shape, F32)
        return
    if x.dtype not in BYTES:
        return
    first = [x.name, *_parameters(d, x.dtype)[:2]]
    found = window(d, x.shape[2:]) if x.rank == 4 else None
    if found and d.number(0, 2):
        out, more = found
        oc = d.among((1, 4, 8, 17))
        each = d.number(0, 1)
        scales = np.full((oc,) if each else (), 0.005, F32)
        weight = [d.constant(d.weight((oc, x.shape[1], *more["kernel_shape"]), I8)), d.constant(scales)]
        weight.append(d.constant(np.zeros(scales.shape), I8))
        bias = [d.constant(d.number(-200, 200) * np.ones(oc), I32)] if d.maybe() else []
        shape = (x.shape[0], oc, *out)
        inputs = [*first, *weight, *_parameters(d, x.dtype)[:2], *bias]
        d.add("QLinearConv", inputs, shape, x.dtype, rounded=True, **more)
    elif x.rank >= 2:
        n = d.among((1, 4, 17))
        weight = [d.constant(d.weight((x.shape[-1], n), x.dtype)), d.constant(0.005, F32), d.constant(0, x.dtype)]
        inputs = [*first, *weight, *_parameters(d, x.dtype)[:2]]
        d.add("QLinearMatMul", inputs, (*x.shape[:-1], n), x.dtype, rounded=True)


def weights_only(d: Draft, x: Value) -> None:
    """MatMul or Gemm in floats with int8 or int4 weights, one scale for a block of inputs."""
    if x.dtype not in (F16, F32) or x.rank < 2 or d.opset < 21:
        return
    k, n, block = x.shape[-1], d.among((4, 8, 17)), d.among((16, 32))
    scales = np.abs(d.numbers((-(-k // block), n), x.dtype)) + x.dtype.type(0.01)
    kind = d.among((TensorProto.INT4, TensorProto.INT8, TensorProto.UINT4))
    rng = np.random.default_rng(d.number(0, 99))
    low, high = (-127, 128) if kind == TensorProto.INT8 else (0, 16) if kind == TensorProto.UINT4 else (-8, 8)
    numbers = rng.integers(low, high, (k, n))
    weight = d.tensor(helper.make_tensor("", kind, (k, n), numbers.reshape(-1).tolist()))
    inputs: list[Any] = [weight, d.constant(scales * x.dtype.type(0.05))]
    if kind == TensorProto.UINT4:
        inputs.append(d.tensor(helper.make_tensor("", kind, scales.shape, [8] * scales.size)))
    made = d.aside("DequantizeLinear", inputs, (k, n), x.dtype, axis=0, block_size=block)
    if made:
        d.add("MatMul", [x.name, made.name], (*x.shape[:-1], n), x.dtype)
