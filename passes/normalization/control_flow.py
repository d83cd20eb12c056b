"""If, Loop and Scan as straight lines, where what they depend on is constant.

    If(c)                          the branch taken
    Loop(M, c, v)                  body(0, v), then Loop(M - 1, c', v') of what it leaves; one iteration at a time, so that a
                                   condition computed by the body may fold before the next is asked for
    Scan(v, x)                     body(v, x[0]), body(v', x[1]), ...; as many as x is long

What a body adds to the sequence of a scan output is stacked along its axis at the end. Every copy has values and nodes of
its own, named NODE/ITERATION/..., and reads what the body reads from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from sparsec.errors import UnsupportedError

UNROLL_STEPS = 64


@dataclass
class LoopState:
    """How far a Loop is written out: iterations done, and for each scan output what they gave."""

    done: int = 0
    scanned: list[list[ir.Value]] = field(default_factory=list)


def inline_branch(graph: ir.Graph, node: ir.Node, branch: ir.Graph) -> list[ir.Node]:
    """Move the branch's nodes in front of the If `node`, which disappears; the moved nodes."""
    moved, outputs = _move(graph, node, branch, f"{node.name}/")
    return [*moved, *_replace(graph, node, outputs)]


def peel_loop(graph: ir.Graph, node: ir.Node, state: LoopState, trips: int | None, go_on: bool) -> list[ir.Node]:
    """Write one more iteration of a Loop in front of it, or its end instead of it; nodes to look at next.

    `trips`: the constant trip count, None without one; `go_on`: the condition's value now.
    """
    body = node.attributes["body"].as_graph()
    carried = list(node.inputs[2:])
    count = len(body.outputs) - 1 - len(carried)
    state.scanned = state.scanned or [[] for _ in range(count)]
    if not go_on or (trips is not None and state.done >= trips):
        moved: list[ir.Node] = []
        outputs = [v for v in carried if v is not None]
        for parts, old in zip(state.scanned, node.outputs[len(carried) :], strict=False):
            nodes, value = _stacked(graph, node, parts, 0, old)
            moved += nodes
            outputs.append(value)
        return [*moved, *_replace(graph, node, outputs)]
    copy = body.clone(allow_outer_scope_values=True)
    prefix = f"{node.name}/{state.done}/"
    number = _constant(graph, f"{prefix}iteration", np.array(state.done, np.int64))
    true = _constant(graph, f"{prefix}condition", np.array(True))
    _bind(copy, [number, true, *carried])
    moved, outputs = _move(graph, node, copy, prefix)
    node.replace_input_with(1, outputs[0])
    for i, value in enumerate(outputs[1 : 1 + len(carried)]):
        node.replace_input_with(2 + i, value)
    for parts, value in zip(state.scanned, outputs[1 + len(carried) :], strict=True):
        parts.append(value)
    state.done += 1
    return [*moved, node]


def unroll_scan(graph: ir.Graph, node: ir.Node, lengths: Sequence[int]) -> list[ir.Node]:
    """Write a Scan out; the nodes to look at next. `lengths`: of each scan input along its axis, all equal."""
    body = node.attributes["body"].as_graph()
    count = node.attributes.get_int("num_scan_inputs", 1)
    states = list(node.inputs[: len(node.inputs) - count])
    scanned = list(node.inputs[len(node.inputs) - count :])
    outs = len(body.outputs) - len(states)
    axes = node.attributes.get_ints("scan_input_axes", [0] * count)
    backwards = node.attributes.get_ints("scan_input_directions", [0] * count)
    out_axes = node.attributes.get_ints("scan_output_axes", [0] * outs)
    out_backwards = node.attributes.get_ints("scan_output_directions", [0] * outs)
    steps = lengths[0]
    everything: list[ir.Node] = []
    collected: list[list[ir.Value]] = [[] for _ in range(outs)]
    for k in range(steps):
        prefix = f"{node.name}/{k}/"
        slices = []
        for i, (value, axis, backward) in enumerate(zip(scanned, axes, backwards, strict=True)):
            at = _constant(graph, f"{prefix}at{i}", np.array(steps - 1 - k if backward else k, np.int64))
            taken = ir.node("Gather", [value, at], attributes={"axis": int(axis)}, name=f"{prefix}part{i}")
            taken.outputs[0].name = f"{prefix}part{i}"
            graph.insert_before(node, taken)
            everything.append(taken)
            slices.append(taken.outputs[0])
        copy = body.clone(allow_outer_scope_values=True)
        _bind(copy, [*states, *slices])
        moved, outputs = _move(graph, node, copy, prefix)
        everything += moved
        states = list(outputs[: len(states)])
        for parts, value in zip(collected, outputs[len(states) :], strict=True):
            parts.append(value)
    results = [v for v in states if v is not None]
    for i, (parts, old) in enumerate(zip(collected, node.outputs[len(states) :], strict=True)):
        ordered = parts[::-1] if out_backwards[i] else parts
        nodes, value = _stacked(graph, node, ordered, int(out_axes[i]), old)
        everything += nodes
        results.append(value)
    return [*everything, *_replace(graph, node, results)]


def too_long(node: ir.Node, steps: int, limit: int) -> UnsupportedError:
    """The error for a loop beyond the limit."""
    what = f"{node.op_type} of {steps} steps: at most {limit} are written out"
    return UnsupportedError(f"{what}; give --limit unroll=N, or compile for a shorter input", f"node {node.name!r}")


def _bind(body: ir.Graph, values: Sequence[ir.Value | None]) -> None:
    """Read `values` instead of the body's inputs; the inputs go."""
    for inner, outer in zip(list(body.inputs), values, strict=False):
        if outer is not None:
            inner.replace_all_uses_with(outer, replace_graph_outputs=True)
    body.inputs.clear()


def _move(graph: ir.Graph, node: ir.Node, body: ir.Graph, prefix: str) -> tuple[list[ir.Node], list[ir.Value]]:
    """Move a body's nodes and initializers in front of `node`; the nodes, and the body's outputs."""
    outputs = list(body.outputs)
    for value in list(body.initializers.values()):
        del body.initializers[value.name]
        value.name = prefix + value.name
        graph.register_initializer(value)
    moved = list(body)
    body.outputs.clear()
    body.remove(moved)
    for inner in moved:
        inner.name = prefix + (inner.name or inner.op_type)
        for value in inner.outputs:
            if value.name:
                value.name = prefix + value.name
    graph.insert_before(node, moved)
    return moved, outputs


def _replace(graph: ir.Graph, node: ir.Node, outputs: Sequence[ir.Value]) -> list[ir.Node]:
    """Let Identities of `outputs` stand for the outputs of `node`, which goes."""
    links = []
    for i, (value, old) in enumerate(zip(outputs, node.outputs, strict=True)):
        link = ir.node("Identity", [value], name=f"{node.name}/output_{i}")
        new = link.outputs[0]
        new.name, new.shape, new.type = old.name, old.shape, old.type
        old.name = f"{old.name}__{node.op_type.lower()}"
        graph.insert_before(node, link)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        links.append(link)
    graph.remove(node, safe=True)
    return links


def _stacked(
    graph: ir.Graph, node: ir.Node, parts: Sequence[ir.Value], axis: int, old: ir.Value
) -> tuple[list[ir.Node], ir.Value]:
    """`parts` side by side along a new axis: nodes, and the value. Without parts: nothing of the right rank and type."""
    name = f"{node.name}/{old.name}"
    if not parts:
        rank = len(old.shape) if old.shape is not None else 1
        dtype = old.dtype.numpy() if old.dtype is not None else np.dtype(np.float32)
        return [], _constant(graph, f"{name}/none", np.zeros([0] * rank, dtype))
    where = _constant(graph, f"{name}/axis", np.array([axis], np.int64))
    nodes = [ir.node("Unsqueeze", [v, where], name=f"{name}/part_{i}") for i, v in enumerate(parts)]
    nodes.append(ir.node("Concat", [n.outputs[0] for n in nodes], attributes={"axis": axis}, name=f"{name}/whole"))
    for added in nodes:
        added.outputs[0].name = str(added.name)
    graph.insert_before(node, nodes)
    return nodes, nodes[-1].outputs[0]


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
