"""Pooling: windows on planes, and means or maxima over whole planes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from sparsec.kernels import planes, pool
from sparsec.kernels.base import roofline_us
from sparsec.lowering.match import attribute, constant, dims, fuse
from sparsec.lowering.rules.base import Context, Taken, emit_simple, float_input
from sparsec.lowering.rules.convolution import window_pads


def take_pool(node: ir.Node, context: Context) -> Taken | str | None:
    """MaxPool and AveragePool, 1-D as planes one row high."""
    if node.op_type not in ("MaxPool", "AveragePool"):
        return None
    x = float_input(node)
    if isinstance(x, str):
        return x
    if len(node.outputs) > 1 and node.outputs[1].uses():
        return "its indices are used"
    shape = dims(x)
    kernel = tuple(attribute(node, "kernel_shape", ()))
    rank = len(kernel)
    strides = tuple(attribute(node, "strides", (1,) * rank))
    dilations = tuple(attribute(node, "dilations", (1,) * rank))
    pads = window_pads(node, shape[2:], kernel, strides, dilations)
    if rank == 1:
        shape, kernel = (*shape[:2], 1, shape[2]), (1, *kernel)
        strides, dilations, pads = (1, *strides), (1, *dilations), (0, pads[0], 0, pads[1])
    if refused := pool.refusal(shape, kernel):
        return refused
    windows = planes.Window(shape[2], shape[3], kernel, strides, pads, dilations, bool(attribute(node, "ceil_mode", 0)))
    if windows.shape != (1, *dims(node.outputs[0])[2:])[-2:]:
        return f"it has {list(windows.shape)} windows, its output is {list(dims(node.outputs[0]))}"
    mode: Any = "max" if node.op_type == "MaxPool" else "average"
    group = fuse(node, context.taken, residual=False)
    call = pool.bind(
        context.machine, mode, x_shape=shape, kernel=kernel, strides=strides, pads=pads, dilations=dilations,
        ceil_mode=bool(attribute(node, "ceil_mode", 0)), count_include_pad=bool(attribute(node, "count_include_pad", 0)),
        activation=group.activation,
    )  # fmt: skip
    out = float(np.prod(dims(group.output)))
    us = roofline_us(context.machine, out * np.prod(kernel), 4.0 * (np.prod(shape) + out))
    return Taken(group, emit_simple(group, call, {"x": x}, f"{mode} pooling", us))


def take_global_pool(node: ir.Node, context: Context) -> Taken | str | None:
    """GlobalAveragePool, GlobalMaxPool, and ReduceMean or ReduceMax over the last axes."""
    modes: dict[str, Any] = {
        "GlobalAveragePool": "average", "GlobalMaxPool": "max", "ReduceMean": "average", "ReduceMax": "max",
    }  # fmt: skip
    if node.op_type not in modes:
        return None
    x = float_input(node)
    if isinstance(x, str):
        return x
    shape = dims(x)
    first = 2
    if node.op_type.startswith("Reduce"):
        given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = attribute(node, "axes", None) if given is None else given.reshape(-1).tolist()
        if len(node.inputs) > 1 and node.inputs[1] is not None and given is None:
            return "its axes are computed"
        if not axes:
            if attribute(node, "noop_with_empty_axes", 0):
                return "it reduces nothing"
            axes = range(len(shape))
        reduced = sorted(int(axis) % len(shape) for axis in axes)
        wide = [axis for axis in reduced if shape[axis] != 1]
        first = wide[0] if wide else len(shape)
        kept = [axis for axis in range(first, len(shape)) if axis not in reduced and shape[axis] != 1]
        if kept:
            return "it reduces an inner axis"
    rows, count = int(np.prod(shape[:first])), int(np.prod(shape[first:]))
    group = fuse(node, context.taken, residual=False)
    call = pool.bind_global(context.machine, modes[node.op_type], rows=rows, count=count, activation=group.activation)
    us = roofline_us(context.machine, rows * count, 4.0 * rows * count)
    return Taken(group, emit_simple(group, call, {"x": x}, f"{modes[node.op_type]} of {count} elements", us))
