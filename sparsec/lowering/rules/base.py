"""What rules share: what they are given, what they answer, and the emitter of a layer that is one kernel call.

A rule looks at one node. It answers with `Taken` (the group it binds and what emits its calls), with a refusal (why not,
one clause), or with None where the operator is not its own.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from sparsec.kernels.base import KernelCall, Machine
from sparsec.lowering.calls import Calls
from sparsec.lowering.match import Group, constant, dims
from sparsec.program import Candidate, Layer, Route
from sparsec.tuning import Choices

if TYPE_CHECKING:
    from sparsec.kernels.cuda.base import Gpu

Emitter = Callable[[Calls], None]


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
    tuning: Choices | None = None  # measured choices; else the cost model decides
    gpu: Gpu | None = None  # of a program for a CUDA device; `machine` is the processor beside it


Rule = Callable[[ir.Node, Context], "Taken | str | None"]


def dtype_of(value: ir.Value) -> str:
    """NumPy's name of a value's element type."""
    assert value.dtype is not None, value.name
    return str(value.dtype.numpy())


def float_input(node: ir.Node) -> ir.Value | str:
    """The node's first input, or why no kernel of ours reads it."""
    x = node.inputs[0]
    assert x is not None
    return x if dtype_of(x) == "float32" else f"its data is {dtype_of(x)}, not float32"


def declare(calls: Calls, value: ir.Value, element: str | None = None) -> str:
    """The name in the calls of an ONNX value: an activation, or a constant of the graph.

    `element`: how a float32 value is to be held; by default as kernels hold it.
    """
    assert value.name is not None
    array, element = constant(value), element or calls.machine.element
    if array is None:
        return calls.hold(value.name, dims(value), dtype_of(value), element)
    return calls.hold_constant(value.name, array, element)


def node_names(group: Group) -> tuple[str, ...]:
    """Names of a group's nodes."""
    return tuple(node.name or "" for node in group.nodes)


def record(calls: Calls, group: Group, kernel: str, reason: str, route: Route = "native", **facts: Any) -> None:
    """Add what `inspect` prints of a group; `facts` are fields of `Layer`."""
    nodes = node_names(group)
    calls.layers.append(Layer(group.name, group.op, dims(group.output), route, kernel, reason, nodes=nodes, **facts))


def emit_simple(
    group: Group,
    call: KernelCall,
    inputs: dict[str, ir.Value],
    reason: str,
    us: float,
    *,
    weight: np.ndarray | None = None,
    structure: str = "",
    candidates: tuple[Candidate, ...] = (),
    element: str | None = None,
) -> Emitter:
    """The emitter of a group that is one kernel call: `inputs` by role, the group's output as role "y".

    `element`: how the kernel holds float32 values, by default as the machine does.
    """

    def emit(calls: Calls) -> None:
        bound = {role: declare(calls, value, element) for role, value in inputs.items()}
        bound["y"] = declare(calls, group.output, element)
        calls.emit(call, bound, ("y",), node_names(group), group.name)
        record(
            calls, group, call.name, reason,
            zeros=float(np.mean(weight == 0)) if weight is not None else 0.0, structure=structure, candidates=candidates,
            bytes=sum(array.nbytes for array in call.constants.values()), predicted_us=us,
        )  # fmt: skip

    return emit
