"""Remove nodes that return their input: y = x.

    Identity; Dropout at inference; Cast to the same type; Reshape, Flatten, Squeeze, Unsqueeze, Expand, Tile, Slice,
    Pad that keep the shape; Transpose that keeps the order; Concat, Sum, Mean, Min, Max of one input; Split into all
    and nothing. Parts of a Concat without elements are left out first.

Needs static shapes (`fold-constants`). Graph inputs and outputs keep their names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from sparsec.passes.normalization.fold_constants import constant, remove_unused_initializers, static_shape
from sparsec.rewriting.passes_api import Context, Pass, PassResult

# Slice, Pad and Tile of unchanged shape: for Slice a negative step may still reverse, see `_is_no_op`.
SHAPE_ONLY = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand"})
ONE_INPUT = frozenset({"Concat", "Sum", "Mean", "Min", "Max"})


@dataclass(frozen=True)
class RemoveNoOps(Pass):
    """Remove nodes that return their input (Identity, inference Dropout, reshapes to the same shape, ...)."""

    name: ClassVar[str] = "remove-no-ops"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> PassResult:
        removed = [f"empty parts of {node.name}" for node in model.graph if _drop_empty_parts(node)]
        for node in list(model.graph):
            if _is_no_op(node) and _bypass(model.graph, node):
                removed.append(node.name)
        if removed:
            common.RemoveUnusedNodesPass()(model)
            remove_unused_initializers(model.graph)
            Context.of(model).records.append({"removed": removed})
        return PassResult(model, bool(removed))


def _drop_empty_parts(node: ir.Node) -> bool:
    """Let a Concat read only inputs with elements, if there are some."""
    if node.op_type != "Concat" or node.domain not in ("", "ai.onnx"):
        return False
    kept = [x for x in node.inputs if x is None or 0 not in (static_shape(x) or ())]
    if not kept or len(kept) == len(node.inputs):
        return False
    for i, x in enumerate(kept):
        node.replace_input_with(i, x)
    node.resize_inputs(len(kept))
    return True


def _is_no_op(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None:
        return False
    x, y = node.inputs[0], node.outputs[0]
    shape = static_shape(x)
    same = shape is not None and shape == static_shape(y) and x.dtype == y.dtype
    if node.op_type == "Identity":
        return True
    if node.op_type == "Dropout":
        training = node.inputs[2] if len(node.inputs) > 2 else None
        off = training is None or (constant(training) is not None and not constant(training).reshape(-1)[0])
        return off and not (len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()))
    if node.op_type == "Cast":
        return x.dtype is not None and x.dtype == y.dtype
    if node.op_type in ONE_INPUT:
        return len(node.inputs) == 1
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", None)
        return order is not None and list(order) == sorted(order)
    if node.op_type in SHAPE_ONLY:
        return same
    if node.op_type == "Split":
        return same and not any(part.uses() or part.is_graph_output() for part in node.outputs[1:])
    if node.op_type == "Pad":
        pads = constant(node.inputs[1])
        return same and pads is not None and not pads.any()
    if node.op_type == "Tile":
        repeats = constant(node.inputs[1])
        return same and repeats is not None and bool((repeats == 1).all())
    if node.op_type == "Slice":
        steps = node.inputs[4] if len(node.inputs) > 4 else None
        return same and (steps is None or (constant(steps) is not None and bool((constant(steps) > 0).all())))
    return False


def _bypass(graph: ir.Graph, node: ir.Node) -> bool:
    """Readers of `node` read its input instead; False if input and output are both the graph's own."""
    x, y = node.inputs[0], node.outputs[0]
    if y.is_graph_output():
        owned = x.producer() is None or x.is_graph_output() or x.graph is not graph
        if owned:
            return False
        name = y.name
        y.name = f"{name}__bypassed"
        y.replace_all_uses_with(x, replace_graph_outputs=True)
        x.name = name
    else:
        y.replace_all_uses_with(x)
    graph.remove(node, safe=True)
    return True
