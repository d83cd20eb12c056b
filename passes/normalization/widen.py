"""Compute a float16 model in float32: half constants become floats, casts stand at half inputs and outputs.

    y = f(x)   in float16           y = half(f32(float(x)))

float16 values are float32 values, so constants keep theirs; what is lost are the roundings in between, so that results
differ by those. float32 is what every kernel here computes with; a float16 model otherwise takes the generic route, an
operator at a time. The other way round, `compile --precision f16` computes a float32 model in half precision where the
target has the instructions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsec.errors import RecipeError
from sparsec.passes.normalization.fold_constants import remove_unused_initializers
from sparsec.rewriting.passes_api import Context, Pass, PassResult

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type", "softmax_precision")


@dataclass(frozen=True)
class Widen(Pass):
    """Compute a float16 model in float32; its inputs and outputs stay float16."""

    name: ClassVar[str] = "widen"
    exact: ClassVar[bool] = False

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        half = [v for v in _values(graph) if v.dtype == HALF]
        if all(map(_only_cast, half)):
            raise RecipeError("the model computes nothing in float16; leave the pass out", self.name)
        for node in ir.traversal.RecursiveGraphIterator(graph):
            _widen_attributes(node)
        for value in half:
            if value.const_value is not None:
                tensor = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
                value.const_value = tensor
            if not value.is_graph_input():
                value.type = ir.TensorType(FLOAT)
        for value in graph.inputs:
            if value.dtype == HALF:
                _cast_input(graph, value)
        for i, value in enumerate(list(graph.outputs)):
            if value in half:
                graph.outputs[i] = _cast_output(graph, value)
        remove_unused_initializers(graph)
        Context.of(model).records.append({"widened": len(half)})
        return PassResult(model, True)


def _only_cast(value: ir.Value) -> bool:
    """An input that only casts to float32 read, or an output that is cast from it: what this pass leaves."""
    if value.is_graph_input():
        return all(use.node.op_type == "Cast" for use in value.uses())
    producer = value.producer()
    return value.is_graph_output() and producer is not None and producer.op_type == "Cast" and not value.uses()


def _values(graph: ir.Graph) -> list[ir.Value]:
    """Every value of the graph and of the graphs inside it."""
    found = [*graph.inputs, *graph.initializers.values()]
    for node in ir.traversal.RecursiveGraphIterator(graph):
        found += node.outputs
    return list(dict.fromkeys(found))


def _widen_attributes(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.INT and name in TYPE_ATTRIBUTES and attribute.as_int() == HALF:
            node.attributes[name] = ir.AttrInt64(name, int(FLOAT))
        elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == HALF:
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.as_tensor().numpy().astype(np.float32)))


def _cast_input(graph: ir.Graph, value: ir.Value) -> None:
    readers = list(value.uses())
    cast = ir.node("Cast", [value], attributes={"to": int(FLOAT)}, name=f"{value.name}/widen")
    wide = cast.outputs[0]
    wide.name, wide.shape, wide.type = f"{value.name}/wide", value.shape, ir.TensorType(FLOAT)
    for use in readers:
        use.node.replace_input_with(use.idx, wide)
    if value.is_graph_output():
        return
    first = next((node for node in graph), None)
    if first is None:
        graph.append(cast)
    else:
        graph.insert_before(first, cast)


def _cast_output(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """The graph output in half precision, under the name it had."""
    name = value.name
    value.name = f"{name}/unrounded"
    cast = ir.node("Cast", [value], attributes={"to": int(HALF)}, name=f"{name}/round")
    new = cast.outputs[0]
    new.name, new.shape, new.type = name, value.shape, ir.TensorType(HALF)
    graph.append(cast)
    return new
