"""Lowering: a rewritten ONNX model to a Program, in the phases that `lower` lists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from sparsec.errors import UnsupportedError
from sparsec.kernels.base import roofline_us
from sparsec.kernels.cuda.base import roofline_us as device_us
from sparsec.kernels.emit import HALF_MAX
from sparsec.lowering.calls import Call, Calls, check_sizes
from sparsec.lowering.generic import lower_generic, unsupported
from sparsec.lowering.integers import move_integers
from sparsec.lowering.match import Group, constant, dims
from sparsec.lowering.plan import plan
from sparsec.lowering.quantized import unread
from sparsec.lowering.rules.base import Context, Taken, declare
from sparsec.lowering.select import select
from sparsec.lowering.sums import gather_sums
from sparsec.passes.quantization.ports import port_quantization
from sparsec.program import Layer, Program, Tensor
from sparsec.targets import Target
from sparsec.tuning import Choices


def lower(model: ir.Model, target: Target, name: str = "model", tuning: Choices | None = None) -> Program:
    """A loaded (and rewritten) model to a Program for `target`: match and select, generic rest, memory plan.

    `tuning`: measured choices, asked before the cost model.
    """
    graph = move_integers(gather_sums(model)).graph
    check_sizes({str(v.name): dims(v) for v in _values(graph) if v.name})
    calls = Calls(target.machine, frozenset(str(v.name) for v in _values(graph)), gpu=target.gpu)
    for value in graph.inputs:
        declare(calls, value, "float32")
    items = schedule(graph, target, tuning)
    if target.precision == "f16":
        _check_range(items)
    problems: list[str] = []
    for item in items:
        if isinstance(item, Taken):
            item.emit(calls)
            continue
        try:
            _emit_generic(item, calls, target)
        except UnsupportedError as error:  # go on: the user wants to see all of them
            problems += error.problems or (str(error),)
    if problems:
        raise unsupported(problems, target.gpu is not None and not target.cpu_fallback)
    for value in graph.outputs:
        declare(calls, value, "float32")
    program = plan(name, target, calls, [str(v.name) for v in graph.inputs], [str(v.name) for v in graph.outputs])
    ports = model.graph
    return replace(program, inputs=_meant(program.inputs, ports.inputs), outputs=_meant(program.outputs, ports.outputs))


def _meant(ports: Iterable[Tensor], values: Iterable[ir.Value]) -> tuple[Tensor, ...]:
    """Ports with what their whole numbers stand for."""
    return tuple(replace(t, quantization=port_quantization(v)) for t, v in zip(ports, values, strict=True))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def schedule(graph: ir.Graph, target: Target, tuning: Choices | None = None) -> list[Taken | list[tuple[ir.Node, str]]]:
    """What runs, in order: groups with a kernel, and runs of nodes (each with the reason) for the generic route."""
    position = {node: i for i, node in enumerate(graph)}
    claimed: set[ir.Node] = set()
    groups: dict[ir.Node, Group] = {}
    items: list[tuple[int, Taken | tuple[ir.Node, str]]] = []
    for node in graph:
        if node in claimed:
            continue
        taken = select(node, Context(target.machine, claimed, tuning, target.gpu))
        if isinstance(taken, Taken):
            claimed.update(taken.group.nodes)
            groups.update(dict.fromkeys(taken.group.nodes, taken.group))
            items.append((max(position[n] for n in taken.group.nodes), taken))
        else:
            items.append((position[node], (node, taken)))
    items = [item for item in items if isinstance(item[1], Taken) or item[1][0] not in claimed]
    items = [item for item in items if not unread(_first(item[1]), groups)]
    ordered: list[Taken | list[tuple[ir.Node, str]]] = []
    for _, item in sorted(items, key=lambda item: item[0]):
        if isinstance(item, Taken):
            ordered.append(item)
        elif ordered and isinstance(ordered[-1], list):
            ordered[-1].append(item)
        else:
            ordered.append([item])
    return ordered


def _first(item: Taken | tuple[ir.Node, str]) -> ir.Node:
    return item.group.main if isinstance(item, Taken) else item[0]


def _check_range(items: list[Taken | list[tuple[ir.Node, str]]]) -> None:
    """Raise UnsupportedError that names every weight of a kernel beyond float16."""
    found = []
    for item in items:
        for node in item.group.nodes if isinstance(item, Taken) else ():
            for value in node.inputs:
                array = constant(value) if node.op_type != "Clip" else None  # its bounds may be infinite
                if array is not None and array.dtype == np.float32 and array.size:
                    largest = float(np.abs(array).max())
                    if largest > HALF_MAX:
                        found.append(f"{value.name} of {node.op_type} {node.name} reaches {largest:.4g}")  # type: ignore[union-attr]
    if found:
        text = "; ".join(dict.fromkeys(found))
        raise UnsupportedError(f"float16 ends at {HALF_MAX:.0f}: {text}; compile without --precision f16")


def _emit_generic(items: list[tuple[ir.Node, str]], calls: Calls, target: Target) -> None:
    """Lower a run of nodes through Relax and add its steps."""
    nodes = [node for node, _ in items]
    reasons = {str(node.name): reason for node, reason in items}
    for node in nodes:
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.name:
                declare(calls, value, "float32")
    machine = target.machine.single()
    region = lower_generic(nodes, machine, gpu=target.gpu, cpu_fallback=target.cpu_fallback)
    own: dict[str, str] = {}  # the region's names -> names that are new here
    for name, (shape, dtype) in region.temporaries.items():
        own[name] = calls.value(calls.fresh(name), shape, dtype)
    for name, array in region.constants.items():
        own[name] = calls.fresh(name)
        calls.constants[own[name]] = array
    outputs = {str(v.name): dims(v) for node in nodes for v in node.outputs if v.name}
    for step in region.steps:
        rooms = tuple(calls.value(calls.fresh(s.name), s.shape, s.dtype) for s in step.scratch)
        inputs, writes = (tuple(own.get(n, n) for n in names) for names in (step.inputs, step.outputs))
        refs = tuple(calls.ref(n) for n in (*inputs, *writes, *rooms))
        reads = tuple(n for n in inputs if n in calls.values)
        writes = (*writes, *rooms)
        calls.calls.append(Call(step.kernel, refs, reads, writes, step.tiles, 0, step.nodes))
        shape = next((outputs[n] for n in step.outputs if n in outputs), ())
        why = "; ".join(dict.fromkeys(reasons[n] for n in step.nodes if n in reasons))
        ops = "+".join(node.op_type for node in nodes if node.name in step.nodes)
        gpu = target.gpu if step.kernel.launch is not None else None
        us = (
            device_us(gpu, step.flops, step.bytes)
            if gpu
            else roofline_us(machine, float(step.flops), float(step.bytes))
        )
        if target.gpu is not None and gpu is None:
            why = f"on the host's CPU: {step.why}"
        calls.layers.append(
            Layer(
                step.nodes[0] if step.nodes else "",
                ops,
                shape,
                "generic",
                step.kernel.name,
                why,
                predicted_us=us,
                nodes=step.nodes,
            )
        )


def generic_share(program: Program) -> float:
    """Share of the predicted time that the generic route takes, 0..1."""
    total = sum(layer.predicted_us for layer in program.layers)
    return sum(layer.predicted_us for layer in program.layers if layer.route == "generic") / total if total else 0.0


def generic_layers(program: Program) -> Iterator[Layer]:
    """Layers without a kernel of our own."""
    return (layer for layer in program.layers if layer.route == "generic")


__all__ = ["generic_layers", "generic_share", "lower", "schedule"]
