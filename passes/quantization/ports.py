"""Inputs and outputs of a quantized model in 8 bits: the float ends of the graph go away.

    x -> Q(s, z) -> ...                 x 8 bits -> ...           where every reader of x is that QuantizeLinear
    q -> DQ(s, z) -> y                  q = y, 8 bits             where a QuantizeLinear(s, z) made q

Operators that only move or select values (`sparsec.passes.normalization.normalize_qdq.MOVES`) may stand between and move the integers
instead. The caller then does what the removed node did: real = s * (q - z), per tensor; names and shapes stay.

What a port of 8 bits means is read off the graph (`port_quantization`), so that a model which came with such ports is as
good as one that this pass made. Left alone: ports that are not quantized, or with a scale for each channel, or in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from sparsec.passes.normalization.fold_constants import remove_unused_initializers
from sparsec.passes.normalization.normalize_qdq import MOVES, quantization, same
from sparsec.passes.normalization.normalize_qdq import Quantization as Parameters
from sparsec.ports import Quantization
from sparsec.rewriting.passes_api import Context, Pass, PassResult

EIGHT = (ir.DataType.INT8, ir.DataType.UINT8)


@dataclass(frozen=True)
class QuantizedPorts(Pass):
    """Make float inputs and outputs that are quantized at once into 8-bit ones."""

    name: ClassVar[str] = "quantized-ports"

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        made, left = [], []
        for value in list(graph.inputs):
            if value.dtype == ir.DataType.FLOAT:
                reason = _quantize_input(value)
                (left if reason else made).append(f"input {value.name!r}{reason and ' ' + reason}")
        for index, value in enumerate(list(graph.outputs)):
            if value.dtype == ir.DataType.FLOAT:
                name = value.name
                reason = _quantize_output(graph, index)
                (left if reason else made).append(f"output {name!r}{reason and ' ' + reason}")
        if made:
            common.RemoveUnusedNodesPass()(model)
            remove_unused_initializers(graph)
            common.TopologicalSortPass()(model)
        Context.of(model).records.append({"quantized": made, "float": left})
        return PassResult(model, bool(made))


def port_quantization(value: ir.Value) -> Quantization | None:
    """Scale and zero point of an 8-bit input or output, where its readers or its maker say them; else None."""
    if value.dtype not in EIGHT:
        return None
    found = _made_as(value) or _read_as(value)
    return Quantization(found.scale, found.zero_point) if found is not None else None


# ---- what stands at an end


def _moved(node: ir.Node, index: int) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type in MOVES and index == 0


def _ends(value: ir.Value) -> Iterator[tuple[ir.Node, int] | None]:
    """Who reads `value`, moved or not: (node, input), and None for the graph itself."""
    if value.is_graph_output():
        yield None
    for node, index in value.uses():
        if not _moved(node, index):
            yield node, index
            continue
        for moved in node.outputs:
            yield from _ends(moved)


def _all_read(value: ir.Value, kind: str) -> Parameters | str:
    """The one quantization that nodes of type `kind`, who alone read `value`, have; or why there is none."""
    found: Parameters | None = None
    for end in _ends(value):
        if end is None:
            return "is an output as well"
        node, index = end
        parameters = quantization(node) if node.op_type == kind and index == 0 else None
        if parameters is None or parameters.kind not in EIGHT:
            return f"is read by {node.op_type} {node.name!r}"
        if found is not None and not same(found, parameters):
            return "is quantized in two ways"
        found = parameters
    return found or "is not read"


def _read_as(value: ir.Value) -> Parameters | None:
    found = _all_read(value, "DequantizeLinear")
    return None if isinstance(found, str) else found


def _made_as(value: ir.Value) -> Parameters | None:
    """The QuantizeLinear that made 8-bit values, moved or not."""
    node = value.producer()
    while node is not None and _moved(node, 0) and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return quantization(node) if node is not None and node.op_type == "QuantizeLinear" else None


# ---- rewriting


def _quantize_input(value: ir.Value) -> str:
    """Make a float input 8 bits wide; why not, or ''."""
    found = _all_read(value, "QuantizeLinear")
    if isinstance(found, str):
        return found
    nodes = [end[0] for end in _ends(value) if end is not None]
    for node in nodes:
        behind = _all_read(node.outputs[0], "DequantizeLinear")
        if isinstance(behind, str) or not same(behind, found):
            return f"is quantized, but {node.outputs[0].name!r} {behind if isinstance(behind, str) else 'is read otherwise'}"
    pending = [value]
    while pending:
        moved = pending.pop()
        moved.type = ir.TensorType(found.kind)
        for node, index in list(moved.uses()):
            if _moved(node, index):
                pending += node.outputs
            else:
                node.outputs[0].replace_all_uses_with(moved)
    return ""


def _quantize_output(graph: ir.Graph, index: int) -> str:
    """Make a float output 8 bits wide; why not, or ''."""
    y = graph.outputs[index]
    chain: list[ir.Node] = []
    node = y.producer()
    while node is not None and _moved(node, 0) and len(node.outputs) == 1 and node.inputs[0] is not None:
        chain.append(node)
        node = node.inputs[0].producer()
    if node is None:
        return "is no layer's result"
    found = quantization(node) if node.op_type == "DequantizeLinear" else None
    if found is None or found.kind not in EIGHT:
        return f"is made by {node.op_type} {node.name!r}"
    q = node.inputs[0]
    if q is None or not same(_made_as(q), found):
        return f"is made by {node.op_type} {node.name!r} from what no QuantizeLinear of the same scale made"
    for moved in chain:
        if len(moved.outputs[0].uses()) > (moved is not chain[0]) or (
            moved is not chain[0] and moved.outputs[0].is_graph_output()
        ):
            return f"is made by {moved.op_type} {moved.name!r}, which others read"
    if sum(value is y for value in graph.outputs) > 1:
        return "is two outputs"
    if chain:
        chain[-1].replace_input_with(0, q)
        for moved in chain:
            moved.outputs[0].type = ir.TensorType(found.kind)
        return ""
    name = str(y.name)
    if q.is_graph_output() or q.is_graph_input():
        copy = ir.node("Identity", [q], name=f"{name}/copy")
        graph.insert_after(node, copy)
        copy.outputs[0].shape, copy.outputs[0].type = y.shape, ir.TensorType(found.kind)
        q = copy.outputs[0]
    graph.outputs[index] = q
    y.name = f"{name}/real"
    q.name = name
    return ""
