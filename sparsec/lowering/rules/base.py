"""What rules share: what they are given, what they answer, and the emitter of a layer that is one kernel call.

A rule looks at one node. It answers with `Taken` (the group it binds and what emits its calls), with a refusal (why not,
one clause), or with None where the operator is not its own.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sparsec.kernels.base import KernelCall, Machine
from sparsec.lowering.calls import Calls
from sparsec.lowering.match import Group, constant, dims
from sparsec.program import Candidate, Layer
from sparsec.tuning import Choices

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


Rule = Callable[[ir.Node, Context], "Taken | str | None"]


def dtype_of(value: ir.Value) -> str:
    """NumPy's name of a value's element type."""
    assert value.dtype is not None, value.name
    return str(value.dtype.numpy())


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
) -> Emitter:
    """The emitter of a group that is one kernel call: `inputs` by role, the group's output as role "y"."""

    def emit(calls: Calls) -> None:
        bound = {role: declare(calls, value) for role, value in inputs.items()}
        bound["y"] = declare(calls, group.output)
        calls.emit(call, bound, ("y",), node_names(group), group.name)
        stored = sum(array.nbytes for array in call.constants.values())
        zeros = float(np.mean(weight == 0)) if weight is not None else 0.0
        calls.layers.append(
            Layer(
                group.name,
                group.op,
                dims(group.output),
                "native",
                call.name,
                reason,
                zeros=zeros,
                structure=structure,
                candidates=candidates,
                bytes=stored,
                predicted_us=us,
                nodes=node_names(group),
            )
        )

    return emit
