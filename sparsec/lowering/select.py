"""Selection: which kernel runs each group, and why.

`RULES` is read in order; the first rule that takes a node binds it and what can be fused around it. A rule answers with an
emitter or with a refusal (a reason, or nothing where the operator is not its own). What every rule refuses takes the
generic route through Relax, with the refusals as its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsec.kernels import conv, depthwise
from sparsec.kernels.base import KernelCall, Machine
from sparsec.lowering.calls import Calls
from sparsec.lowering.match import Group, attribute, constant, dims, fuse
from sparsec.lowering.structure import detect_structure
from sparsec.program import Candidate, Layer

Emitter = Callable[[Calls], None]
_SPARSE_FROM = 0.05  # share of zeros from which sparse kernels are priced at all


@dataclass(frozen=True)
class Taken:
    """A rule took a node: the group it covers and what emits its calls."""

    group: Group
    emit: Emitter


@dataclass(frozen=True)
class Context:
    """What a rule may look at besides its node."""

    machine: Machine
    taken: Set[ir.Node]  # nodes that earlier groups hold


Rule = Callable[[ir.Node, Context], "Taken | str | None"]


def roofline_us(machine: Machine, flops: float, moved: float) -> float:
    """Time by arithmetic or by bytes from L2, whichever is longer; for kernels without a model of their own."""
    cycles = max(flops / (2 * machine.lanes * machine.fma), moved / machine.l2_bytes_per_cycle)
    return cycles / (machine.ghz * 1e3)


def dtype_of(value: ir.Value) -> str:
    """NumPy's name of a value's element type."""
    assert value.dtype is not None, value.name
    return str(value.dtype.numpy())


def declare(calls: Calls, value: ir.Value) -> str:
    """Make an ONNX value known to the calls, under its own name: an activation, or a constant of the graph."""
    assert value.name is not None
    array = constant(value)
    if array is None:
        return calls.value(value.name, dims(value), dtype_of(value))
    calls.constants.setdefault(value.name, array)
    return value.name


def node_names(group: Group) -> tuple[str, ...]:
    """Names of a group's nodes."""
    return tuple(node.name or "" for node in group.nodes)


def emit_simple(group: Group, call: KernelCall, inputs: dict[str, ir.Value], reason: str, us: float) -> Emitter:
    """The emitter of a group that is one kernel call: `inputs` by role, the group's output as role "y"."""

    def emit(calls: Calls) -> None:
        bound = {role: declare(calls, value) for role, value in inputs.items()}
        bound["y"] = declare(calls, group.output)
        calls.emit(call, bound, ("y",), node_names(group), group.name)
        stored = sum(array.nbytes for array in call.constants.values())
        calls.layers.append(
            Layer(group.name, group.op, dims(group.output), "native", call.name, reason, bytes=stored, predicted_us=us, nodes=node_names(group))
        )

    return emit


# --- convolution -----------------------------------------------------------------------------------------------------


def conv_pads(node: ir.Node, size: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]) -> tuple[int, ...]:
    """Begin and end pads by axis, `auto_pad` resolved as the ONNX operator page defines it."""
    mode = attribute(node, "auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        begins, ends = [], []
        for length, k, stride, dilation in zip(size, kernel, strides, dilations, strict=True):
            total = max(0, (-(-length // stride) - 1) * stride + (k - 1) * dilation + 1 - length)
            small, large = total // 2, total - total // 2
            begins.append(small if mode == "SAME_UPPER" else large)
            ends.append(large if mode == "SAME_UPPER" else small)
        return (*begins, *ends)
    if mode == "VALID":
        return (0,) * (2 * len(size))
    return tuple(attribute(node, "pads", (0,) * (2 * len(size))))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _ConvNode:
    """A Conv as 2-D: 1-D convolutions get a height of 1."""

    x_shape: tuple[int, int, int, int]
    w: np.ndarray
    bias: np.ndarray | None
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    groups: int


def _read_conv(node: ir.Node) -> _ConvNode | str:
    x = node.inputs[0]
    w = constant(node.inputs[1])
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if x is None or w is None or (len(node.inputs) > 2 and node.inputs[2] is not None and bias is None):
        return "its weights are computed, not constant"
    if dtype_of(x) != "float32":
        return f"its data is {dtype_of(x)}, not float32"
    rank = w.ndim - 2
    if rank not in (1, 2):
        return f"it is a {rank}-D convolution"
    strides = tuple(attribute(node, "strides", (1,) * rank))  # type: ignore[arg-type]
    dilations = tuple(attribute(node, "dilations", (1,) * rank))  # type: ignore[arg-type]
    shape = dims(x)
    pads = conv_pads(node, shape[2:], w.shape[2:], strides, dilations)
    if rank == 1:
        shape, w = (*shape[:2], 1, shape[2]), w[:, :, None, :]
        strides, dilations, pads = (1, *strides), (1, *dilations), (0, pads[0], 0, pads[1])
    if min(pads) < 0:
        return "its pads are negative"
    return _ConvNode(shape, w, bias, strides, pads, dilations, int(attribute(node, "group", 1)))  # type: ignore[arg-type]


def choose_conv(machine: Machine, geometry: conv.Geometry, w: np.ndarray) -> tuple[conv.Format, conv.Tiling, tuple[Candidate, ...], str, str]:
    """The cheapest format and tiling: (format, tiling, all candidates, reason, structure found)."""
    structure = detect_structure(w)
    priced: list[tuple[float, conv.Format, conv.Tiling]] = []
    for form in conv.TABLE:
        if form.sparse and structure.zeros < _SPARSE_FROM:
            continue
        tiling, cost = conv.best_tiling(machine, geometry, form, conv.stored_columns(w, form, machine, geometry))
        priced.append((cost, form, tiling))
    candidates = tuple(Candidate(form.name, round(cost, 3)) for cost, form, _ in sorted(priced, key=lambda p: p[0]))
    cost, form, tiling = min(priced, key=lambda p: p[0])
    dense = next(c for c, f, _ in priced if not f.sparse)
    if len(priced) == 1:
        reason = f"{100 * structure.zeros:.1f}% zeros: below {100 * _SPARSE_FROM:.0f}%, dense"
    elif form.sparse:
        reason = f"predicted {cost:.1f} us, dense {dense:.1f} us"
    else:
        runner_up = min((c, f.name) for c, f, _ in priced if f.sparse)
        reason = f"below break-even: dense {dense:.1f} us, best sparse {runner_up[1]} {runner_up[0]:.1f} us"
    return form, tiling, candidates, reason, str(structure)


def take_conv(node: ir.Node, context: Context) -> Taken | str | None:
    """Conv, groups 1 or few, by the register-tile family; depthwise by its own."""
    if node.op_type != "Conv":
        return None
    read = _read_conv(node)
    if isinstance(read, str):
        return read
    x = node.inputs[0]
    assert x is not None
    group, machine = fuse(node, context.taken), context.machine
    if read.groups > 1 and depthwise.refusal(read.x_shape, read.w.shape, read.groups) is None:
        inputs = {"x": x} | ({"residual": group.other} if group.other is not None else {})
        call = depthwise.bind(
            machine, x_shape=read.x_shape, w=read.w, bias=read.bias, strides=read.strides, pads=read.pads, dilations=read.dilations,
            activation=group.activation, residual=group.residual,
        )  # fmt: skip
        moved = 4.0 * (np.prod(read.x_shape) + np.prod(dims(group.output)))
        us = roofline_us(machine, 2.0 * np.prod(dims(group.output)) * np.prod(read.w.shape[2:]), moved)
        return Taken(group, emit_simple(group, call, inputs, "depthwise", us))
    if read.groups > 1 and (read.x_shape[0] != 1 or read.groups > 32):
        return f"{read.groups} groups"
    return Taken(group, _emit_conv(group, read, machine))


def _emit_conv(group: Group, read: _ConvNode, machine: Machine) -> Emitter:
    g = read.groups
    n, c, h, w = read.x_shape
    part_shape = (read.w.shape[0] // g, *read.w.shape[1:])
    geometry = conv.Geometry((n, c // g, h, w), part_shape, read.strides, read.pads, read.dilations)  # type: ignore[arg-type]

    def emit(calls: Calls) -> None:
        x = declare(calls, group.main.inputs[0])  # type: ignore[arg-type]
        y = declare(calls, group.output)
        other = declare(calls, group.other) if group.other is not None else ""
        form, tiling, candidates, reason, structure = choose_conv(machine, geometry, read.w)
        stored, us, names = 0, 0.0, node_names(group)
        for i in range(g):
            rows = slice(i * part_shape[0], (i + 1) * part_shape[0])
            prepare, main = conv.bind(
                machine, geometry, read.w[rows], form=form, bias=None if read.bias is None else read.bias[rows],
                activation=group.activation, residual=group.residual, tiling=tiling,
            )  # fmt: skip
            suffix = f"/group{i}" if g > 1 else ""
            at_x = {"x": i * (c // g) * h * w * 4}
            at_y = dict.fromkeys(("y", "residual"), i * part_shape[0] * geometry.pixels * 4)
            source = x
            if prepare is not None:
                source = calls.value(f"{group.name}{suffix}/prepared", geometry.prepared_shape, "float32")
                calls.emit(prepare, {"x": x, "prepared": source}, ("prepared",), names, group.name + suffix, at_x)
                at_x = {}
            bound = {"x": source, "y": y} | ({"residual": other} if other else {})
            calls.emit(main, bound, ("y",), names, group.name + suffix, at_x | at_y)
            stored += sum(array.nbytes for array in main.constants.values())
        us = g * min(candidate.predicted_us for candidate in candidates if candidate.kernel == form.name)
        calls.layers.append(
            Layer(
                group.name, group.op, dims(group.output), "native", main.name, reason, zeros=float(np.mean(read.w == 0)), structure=structure,
                candidates=tuple(replace(k, predicted_us=k.predicted_us * g) for k in candidates), bytes=stored, predicted_us=us, nodes=names,
            )  # fmt: skip
        )

    return emit


# --- no code at all --------------------------------------------------------------------------------------------------

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
        calls.layers.append(Layer(group.name, group.op, dims(group.output), "free", "view", "the same memory", nodes=node_names(group)))

    return Taken(group, emit)


def take_split(node: ir.Node, context: Context) -> Taken | str | None:
    """Split or unit-step Slice along the outermost axis that is not 1: parts of the same memory."""
    x = node.inputs[0] if node.inputs else None
    if node.op_type not in ("Split", "Slice") or x is None or x.const_value is not None:
        return None
    shape = dims(x)
    varying = [axis for axis, extent in enumerate(shape) if extent != 1]
    outer = varying[0] if varying else 0
    tail = int(np.prod(shape[outer + 1 :], dtype=np.int64)) * np.dtype(dtype_of(x)).itemsize
    offsets: list[int] = []
    if node.op_type == "Split":
        axis = int(attribute(node, "axis", 0)) % len(shape)  # type: ignore[call-overload]
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
        changed = [a for a, (before, after) in enumerate(zip(shape, dims(node.outputs[0]), strict=True)) if before != after]
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
        for part, offset in zip(node.outputs, offsets, strict=True):
            if part.uses() or part.is_graph_output():
                calls.views[declare(calls, part)] = (source, offset)
        calls.layers.append(Layer(group.name, group.op, dims(group.output), "free", "view", "part of the same memory", nodes=node_names(group)))

    return Taken(group, emit)


def take_concat(node: ir.Node, context: Context) -> Taken | str | None:
    """Concat along the outermost axis that is not 1: producers write into their part; others are copied."""
    if node.op_type != "Concat":
        return None
    out = node.outputs[0]
    axis = int(attribute(node, "axis", 0)) % len(dims(out))  # type: ignore[call-overload]
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
            while owner in calls.views and calls.views[owner][1] == 0 and calls.size(owner) == calls.size(calls.views[owner][0]):
                owner = calls.views[owner][0]
            if owner not in calls.views and owner not in pinned and owner != target and calls.size(owner) == calls.size(name):
                calls.views[owner] = (target, offset)
            else:
                copied += 1
                copy = _copy(calls.size(name))
                calls.emit(copy, {"x": name, "y": target}, ("y",), node_names(group), group.name, {"y": offset})
            offset += calls.size(name)
        how = f"{copied} of {len(node.inputs)} inputs are copied" if copied else "every producer writes in place"
        route: Any = "native" if copied else "free"
        calls.layers.append(Layer(group.name, group.op, dims(out), route, "copy" if copied else "view", how, nodes=node_names(group)))

    return Taken(group, emit)


def _copy(size: int) -> KernelCall:
    """`size` bytes from x to y."""
    from tvm.tirx.script.builder import ir as T

    from sparsec.kernels import emit

    unit = "int32" if size % 4 == 0 else "uint8"
    count = size // np.dtype(unit).itemsize
    chunk = 1 << 14

    def body(x: Any, y: Any, begin: Any, end: Any) -> None:
        with T.serial(begin, end) as t, T.serial(0, T.min(chunk, count - t * chunk)) as i:
            T.buffer_store(y, x[t * chunk + i], [t * chunk + i])

    func = emit.function([("x", count, unit), ("y", count, unit)], body)
    return KernelCall(f"copy_{unit}_{count}", func, ("x", "y"), {}, -(-count // chunk), 0, f"copy {size} bytes")


RULES: tuple[Rule, ...] = (take_view, take_split, take_concat, take_conv)
