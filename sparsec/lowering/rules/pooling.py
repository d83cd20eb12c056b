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


def read_windows(node: ir.Node) -> planes.Window | str:
    """The windows of a MaxPool or AveragePool, 1-D as planes one row high, or why they are not 2-D."""
    x = node.inputs[0]
    assert x is not None
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
    if len(shape) != 4:
        return f"pooling kernels are 2-D, got {rank}-D windows"
    windows = planes.Window(shape[2], shape[3], kernel, strides, pads, dilations, bool(attribute(node, "ceil_mode", 0)))
    if windows.shape != (1, *dims(node.outputs[0])[2:])[-2:]:
        return f"it has {list(windows.shape)} windows, its output is {list(dims(node.outputs[0]))}"
    return windows


def read_pool(node: ir.Node) -> tuple[ir.Value, planes.Window, Any] | str | None:
    """What a MaxPool or AveragePool reads, its windows and "max" or "average"; or why it has no kernel."""
    if node.op_type not in ("MaxPool", "AveragePool"):
        return None
    x = float_input(node)
    if isinstance(x, str):
        return x
    windows = read_windows(node)
    return windows if isinstance(windows, str) else (x, windows, "max" if node.op_type == "MaxPool" else "average")


def take_pool(node: ir.Node, context: Context) -> Taken | str | None:
    """MaxPool and AveragePool."""
    read = read_pool(node)
    if not isinstance(read, tuple):
        return read
    x, windows, mode = read
    shape = (*dims(x)[:2], windows.height, windows.width)
    if refused := pool.refusal(shape, windows.kernel):
        return refused
    group = fuse(node, context.taken, residual=False)
    call = pool.bind(
        context.machine, mode, x_shape=shape, kernel=windows.kernel, strides=windows.strides, pads=windows.pads,
        dilations=windows.dilations, ceil_mode=windows.ceil, count_include_pad=bool(attribute(node, "count_include_pad", 0)),
        activation=group.activation,
    )  # fmt: skip
    out = float(np.prod(dims(group.output)))
    us = roofline_us(context.machine, out * windows.taps, 4.0 * (np.prod(shape) + out))
    return Taken(group, emit_simple(group, call, {"x": x}, f"{mode} pooling", us))


MODES: dict[str, Any] = {
    "GlobalAveragePool": "average", "GlobalMaxPool": "max", "ReduceMean": "average", "ReduceMax": "max",
}  # fmt: skip


def read_rows(node: ir.Node) -> tuple[int, int] | str:
    """Rows and their length, of which a node of `MODES` keeps one element each; or why that is not what it does."""
    x = node.inputs[0]
    assert x is not None
    shape, first = dims(x), 2
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
    return int(np.prod(shape[:first])), int(np.prod(shape[first:]))


def read_global_pool(node: ir.Node) -> tuple[ir.Value, int, int, Any] | str | None:
    """What a node of `MODES` reads, rows, their length and what is kept of each; or why it has no kernel."""
    if node.op_type not in MODES:
        return None
    x = float_input(node)
    if isinstance(x, str):
        return x
    rows = read_rows(node)
    return rows if isinstance(rows, str) else (x, *rows, MODES[node.op_type])


def take_global_pool(node: ir.Node, context: Context) -> Taken | str | None:
    """GlobalAveragePool, GlobalMaxPool, and ReduceMean or ReduceMax over the last axes."""
    read = read_global_pool(node)
    if not isinstance(read, tuple):
        return read
    x, rows, count, mode = read
    group = fuse(node, context.taken, residual=False)
    call = pool.bind_global(context.machine, mode, rows=rows, count=count, activation=group.activation)
    us = roofline_us(context.machine, rows * count, 4.0 * rows * count)
    return Taken(group, emit_simple(group, call, {"x": x}, f"{mode} of {count} elements", us))
