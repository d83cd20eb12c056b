"""Pooling between integers: maxima of bytes, and means from DequantizeLinear to QuantizeLinear.

max      MaxPool, GlobalMaxPool of uint8 or int8 themselves    (`sparsec.lowering.integers` brings them there)
average  DequantizeLinear -> AveragePool | GlobalAveragePool | ReduceMean [activation] [QuantizeLinear]
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparsec.kernels import mean_int8, pool_int8
from sparsec.kernels.base import KernelCall, Machine, roofline_us
from sparsec.kernels.planes import Window
from sparsec.lowering.match import Group, attribute, dims
from sparsec.lowering.quantized import EIGHT, QuantGroup, Source, fuse_quantized, read_past, source
from sparsec.lowering.rules.base import Context, Taken, dtype_of, emit_simple
from sparsec.lowering.rules.pooling import MODES, read_rows, read_windows


def take_integer_max(node: ir.Node, context: Context) -> Taken | str | None:
    """MaxPool, GlobalMaxPool and ReduceMax of bytes."""
    x = node.inputs[0] if node.inputs else None
    if x is None or not (node.op_type == "MaxPool" or MODES.get(node.op_type) == "max") or dtype_of(x) not in EIGHT:
        return None
    if node.op_type == "MaxPool":
        window = read_windows(node)
    else:
        read = read_rows(node)
        last = dims(x)[-1] if dims(x) else 1
        wide = last if not isinstance(read, str) and read[1] % last == 0 else 1
        window = read if isinstance(read, str) else Window(read[1] // wide, wide, (read[1] // wide, wide))
    if isinstance(window, str):
        return window
    if refused := pool_int8.refusal(window):
        return refused
    count = int(np.prod(dims(x), dtype=np.int64)) // (window.height * window.width)
    call = pool_int8.bind_max(context.machine, planes=count, window=window, element=dtype_of(x))
    group = Group(node, (node,), node.outputs[0])
    reason = f"max pooling of {dtype_of(x)}"
    return Taken(group, emit_simple(group, call, {"x": x}, reason, _window_us(context.machine, node, window)))


def take_quantized_average(node: ir.Node, context: Context) -> Taken | str | None:
    """Means of dequantized tensors."""
    if not (node.op_type == "AveragePool" or MODES.get(node.op_type) == "average"):
        return None
    x = source(node.inputs[0])
    if x is None:
        return None
    if node.op_type == "AveragePool":
        windows = read_windows(node)
        if isinstance(windows, str):
            return windows
        if _whole(windows):
            return _means(node, context, x, windows.height * windows.width)
        if refused := pool_int8.refusal(windows):
            return refused
        group = _group(node, context)
        call = pool_int8.bind_average(
            context.machine, planes=int(np.prod(dims(x.value)[:2])), window=windows, x=x.type, steps=group.steps,
            include_pad=bool(attribute(node, "count_include_pad", 0)),
        )  # fmt: skip
        return _taken(group, call, x, "average pooling in 8 bits", _window_us(context.machine, node, windows))
    read = read_rows(node)
    return read if isinstance(read, str) else _means(node, context, x, read[1])


def _whole(windows: Window) -> bool:
    """Whether one window is the plane."""
    return windows.kernel == (windows.height, windows.width) and not any(windows.pads)


def _means(node: ir.Node, context: Context, x: Source, count: int) -> Taken | str:
    rows = int(np.prod(dims(x.value), dtype=np.int64)) // count
    if count > mean_int8.MOST:
        return f"sums of {count:,} integers leave 32 bits"
    group = _group(node, context)
    call = mean_int8.bind_mean(context.machine, rows=rows, count=count, x=x.type, steps=group.steps)
    us = roofline_us(context.machine.single(), 0.5 * rows * count + 16.0 * rows, float(rows * (count + 1)))
    return _taken(group, call, x, f"mean of {count} integers", us)


def _group(node: ir.Node, context: Context) -> QuantGroup:
    return fuse_quantized(node, context.taken, through=read_past(node), residual=False)


def _taken(group: QuantGroup, call: KernelCall, x: Source, reason: str, us: float) -> Taken:
    return Taken(group, emit_simple(group, call, {"x": x.value}, reason, us, element="float32"))


def _window_us(machine: Machine, node: ir.Node, window: Window) -> float:
    """A column's reduction and a row's, four bytes a lane of float32; x is read once for each row of a window."""
    machine = machine.single()
    out = float(np.prod(dims(node.outputs[0]), dtype=np.float64))
    inside = float(np.prod(dims(node.inputs[0]), dtype=np.float64))  # type: ignore[arg-type]
    read = inside * window.kernel[0] / window.strides[0]
    per_byte = 0.25 if node.op_type != "AveragePool" else 0.5
    rows = out / window.shape[1]
    arithmetic = per_byte * (read + out * window.kernel[1] * min(window.strides[1], 2))
    start = rows * machine.group_cycles / (machine.ghz * 1e3)
    return start + roofline_us(machine, 2 * arithmetic, read + out)
