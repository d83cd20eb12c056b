"""Operators that ONNX defines by others: the nodes of that definition, with the names and attributes of one use.

    Y = Op<a = 1>(X)     with the function   y = Op(x): t = F<p = @a>(x); y = G(t)
    becomes              Y/t = F<p = 1>(X); Y = G(Y/t)

A context-dependent function is built by ONNX for the types of the node's inputs. https://onnx.ai/onnx/repo-docs/IR.html#functions
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def function_body(node: onnx.NodeProto, opset: int, types: Sequence[bytes] | None) -> list[onnx.NodeProto] | None:
    """What the standard operator `node` stands for at `opset`; None if ONNX has no definition, or needs types for it.

    `types`: a serialized TypeProto for each input, empty where the input is left out; None if they are unknown.
    """
    try:
        schema: Any = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return None
    plain = [v for v in schema.function_opset_versions if v <= opset]
    dependent = [v for v in schema.context_dependent_function_opset_versions if v <= opset]
    if plain:
        text = schema.get_function_with_opset_version(max(plain))
    elif dependent and types is not None:
        text = schema.get_context_dependent_function_with_opset_version(
            max(dependent), node.SerializeToString(), list(types)
        )
    else:
        return None
    body = onnx.FunctionProto.FromString(text)
    defaults = {name: a.default_value for name, a in schema.attributes.items() if a.default_value.name}
    given = {**defaults, **{attribute.name: attribute for attribute in node.attribute}}
    names = dict(zip(body.output, node.output, strict=False))
    names.update(zip(body.input, [*node.input, *[""] * (len(body.input) - len(node.input))], strict=False))
    prefix = next(name for name in node.output if name)
    nodes = [_renamed(inner, names, f"{prefix}/", given) for inner in body.node]
    element = onnx.TypeProto.FromString(types[0]).tensor_type.elem_type if types and types[0] else 0
    return _in_type(nodes, node, element) if plain and element else nodes


def _in_type(nodes: list[onnx.NodeProto], node: onnx.NodeProto, element: int) -> list[onnx.NodeProto]:
    """A body whose constants ONNX writes for float32 alone: with constants of float64, or in float32 between two casts."""
    constants = [
        a.t for n in nodes if n.op_type == "Constant" for a in n.attribute if a.t.data_type == TensorProto.FLOAT
    ]
    if not constants or element not in (TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16):
        return nodes
    if element == TensorProto.DOUBLE:
        for tensor in constants:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
        return nodes
    x, y = node.input[0], node.output[0]
    wide = {x: f"{y}/in_float32", y: f"{y}/of_float32"}
    for inner in nodes:
        for names in (inner.input, inner.output):
            renamed = [wide.get(name, name) for name in names]
            del names[:]
            names.extend(renamed)
    return [
        helper.make_node("Cast", [x], [wide[x]], to=TensorProto.FLOAT), *nodes,
        helper.make_node("Cast", [wide[y]], [y], to=element),
    ]  # fmt: skip


def _renamed(
    node: onnx.NodeProto, names: Mapping[str, str], prefix: str, given: Mapping[str, onnx.AttributeProto]
) -> onnx.NodeProto:
    def name_of(value: str) -> str:
        return names.get(value) or f"{prefix}{value}" if value and names.get(value) != "" else ""

    clone = helper.make_node(
        node.op_type, [name_of(i) for i in node.input], [name_of(o) for o in node.output], domain=node.domain
    )
    for attribute in node.attribute:
        if attribute.ref_attr_name and attribute.ref_attr_name not in given:
            continue
        copy = clone.attribute.add()
        copy.CopyFrom(given[attribute.ref_attr_name] if attribute.ref_attr_name else attribute)
        copy.name = attribute.name
        for graph in [copy.g] if copy.HasField("g") else list(copy.graphs):
            inner = [_renamed(n, names, prefix, given) for n in graph.node]
            del graph.node[:]
            graph.node.extend(inner)
            for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
                value.name = name_of(value.name)
    return clone
