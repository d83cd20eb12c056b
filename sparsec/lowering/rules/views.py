"""Nodes that need no code: the same memory under another name, a part of it, or producers that write into a whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit as tir
from sparsec.kernels.base import KernelCall
from sparsec.kernels.cuda import moves
from sparsec.lowering.calls import Calls
from sparsec.lowering.match import Group, attribute, constant, dims
from sparsec.lowering.rules.base import Context, Taken, declare, dtype_of, node_names, record

_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout")


def _is_view(node: ir.Node) -> bool:
    x, y = node.inputs[0], node.outputs[0]
    if x is None or x.const_value is not None or any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return False
    if node.op_type in _VIEWS:
        return True
    if node.op_type == "Cast":
        return dtype_of(x) == dtype_of(y)
    if node.op_type == "Transpose":  # only axes of extent 1 change places
        order: Any = attribute(node, "perm", tuple(range(len(dims(x))))[::-1])
        kept = [axis for axis in order if dims(x)[axis] != 1]
        return kept == sorted(kept)
    return False


def take_view(node: ir.Node, context: Context) -> Taken | str | None:
    """Reshape and its like: the same memory under another name."""
    if not _is_view(node):
        return None
    group = Group(node, (node,), node.outputs[0])

    def emit(calls: Calls) -> None:
        source = declare(calls, node.inputs[0])  # type: ignore[arg-type]
        target = declare(calls, node.outputs[0])
        calls.views[target] = (source, 0)
        record(calls, group, "view", "the same memory", "free")

    return Taken(group, emit)


def take_split(node: ir.Node, context: Context) -> Taken | str | None:
    """Split or unit-step Slice along the outermost axis that is not 1: parts of the same memory."""
    x = node.inputs[0] if node.inputs else None
    if node.op_type not in ("Split", "Slice") or x is None or x.const_value is not None:
        return None
    shape = dims(x)
    varying = [axis for axis, extent in enumerate(shape) if extent != 1]
    outer = varying[0] if varying else 0
    tail = int(np.prod(shape[outer + 1 :], dtype=np.int64))
    offsets: list[int] = []  # elements
    if node.op_type == "Split":
        axis = int(attribute(node, "axis", 0)) % len(shape)
        if axis > outer:
            return "parts of a Split are contiguous only along the outermost axis"
        start = 0
        for part in node.outputs:
            offsets.append(start * tail)
            start += dims(part)[axis]
    else:
        arrays = [constant(v) for v in node.inputs[1:]]
        if any(a is None for a in arrays[:2]) or (len(arrays) > 3 and (arrays[3] is None or (arrays[3] != 1).any())):
            return "a Slice with computed bounds or steps"
        starts = arrays[0]
        axes = arrays[2] if len(arrays) > 2 and arrays[2] is not None else np.arange(len(starts))  # type: ignore[arg-type]
        changed = [
            a for a, (before, after) in enumerate(zip(shape, dims(node.outputs[0]), strict=True)) if before != after
        ]
        if any(a != outer for a in changed):
            return "a Slice of an inner axis is not contiguous"
        begin = 0
        for axis, at in zip(axes, starts, strict=True):  # type: ignore[arg-type]
            if int(axis) % len(shape) == outer and changed:
                begin = int(at) + (shape[outer] if at < 0 else 0)
        offsets.append(min(max(begin, 0), shape[outer]) * tail)
    group = Group(node, (node,), node.outputs[0])

    def emit(calls: Calls) -> None:
        source = declare(calls, x)
        item = np.dtype(calls.values[source][1]).itemsize
        for part, offset in zip(node.outputs, offsets, strict=True):
            if part.uses() or part.is_graph_output():
                calls.views[declare(calls, part)] = (source, offset * item)
        record(calls, group, "view", "part of the same memory", "free")

    return Taken(group, emit)


def take_concat(node: ir.Node, context: Context) -> Taken | str | None:
    """Concat along the outermost axis that is not 1: producers write into their part; others are copied."""
    if node.op_type != "Concat":
        return None
    out = node.outputs[0]
    axis = int(attribute(node, "axis", 0)) % len(dims(out))
    if any(extent != 1 for extent in dims(out)[:axis]):
        return "a Concat along an inner axis is not contiguous"
    if any(v is None or v.const_value is not None for v in node.inputs):
        return "a Concat with a constant input"
    group = Group(node, (node,), out)

    def emit(calls: Calls) -> None:
        target = declare(calls, out)
        inputs = node.graph.inputs if node.graph is not None else ()
        pinned = {v.name for v in inputs}
        offset, copied = 0, 0
        for part in node.inputs:
            assert part is not None
            name = declare(calls, part)
            owner = name
            while (
                owner in calls.views
                and calls.views[owner][1] == 0
                and calls.size(owner) == calls.size(calls.views[owner][0])
            ):
                owner = calls.views[owner][0]
            if (
                owner not in calls.views
                and owner not in pinned
                and owner != target
                and calls.size(owner) == calls.size(name)
            ):
                calls.views[owner] = (target, offset)
            else:
                copied += 1
                bound, at = {"x": name, "y": target}, {"y": offset}
                if calls.gpu is not None:
                    call = moves.bind_copy(calls.size(name), aligned=offset % 4 == 0)
                    calls.launch(call, bound, ("y",), node_names(group), group.name, at)
                else:
                    calls.emit(_copy(calls.size(name)), bound, ("y",), node_names(group), group.name, at)
            offset += calls.size(name)
        how = f"{copied} of {len(node.inputs)} inputs are copied" if copied else "every producer writes in place"
        record(calls, group, "copy" if copied else "view", how, "native" if copied else "free")

    return Taken(group, emit)


def _copy(size: int) -> KernelCall:
    """`size` bytes from x to y."""
    unit = "int32" if size % 4 == 0 else "uint8"
    count = size // np.dtype(unit).itemsize
    chunk = 1 << 14

    def body(x: Any, y: Any, begin: Any, end: Any) -> None:
        with T.serial(begin, end) as t, T.serial(0, T.min(chunk, count - t * chunk)) as i:
            T.buffer_store(y, x[t * chunk + i], [t * chunk + i])

    func = tir.function([("x", count, unit), ("y", count, unit)], body)
    return KernelCall(f"copy_{unit}_{count}", func, ("x", "y"), {}, -(-count // chunk), 0, f"copy {size} bytes")
