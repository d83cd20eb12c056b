"""From whatever opset and domain a model was exported in to the standard operators of one working opset.

local functions                   inlined
operators of INLINED              replaced by the function body that ONNX defines for them at the model's own opset
opset below OPSET                 onnx's version converter
opset above OPSET                 relabelled, if every node means at OPSET what it means there
operators newer than OPSET        expanded into older ones (`NEWER`), or refused by name
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, inliner, numpy_helper, version_converter

from sparsec.errors import ModelError, UnsupportedError, one_line
from sparsec.loading.functions import function_body
from sparsec.passes.normalization.import_qoperator import IMPORTED

OPSET = 21  # what passes and lowering see; ONNX Runtime >= 1.20 runs it
IR_VERSION = 10  # of opset 21

STANDARD_DOMAINS = ("", "ai.onnx")
LISTED = 20  # unsupported things named in one message; the rest are counted
DEPTH = 8  # function bodies within function bodies

# What neither passes nor kernels know as one operator, and ONNX defines by others.
INLINED = frozenset({
    "Attention", "Bernoulli", "CausalConvWithState", "CenterCropPad", "DynamicQuantizeLinear", "GroupNormalization",
    "LinearAttention", "MeanVarianceNormalization", "NegativeLogLikelihoodLoss", "RMSNormalization",
    "RotaryEmbedding", "SoftmaxCrossEntropyLoss", "Swish",
})  # fmt: skip

FLOAT32_BODIES = frozenset({"MeanVarianceNormalization"})  # constants in them are float32 whatever the input is


def listed(problems: list[str]) -> str:
    """The first `LISTED` of them on one line."""
    more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    return "; ".join(problems[:LISTED]) + more


def inline_functions(proto: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """`proto` of standard operators alone, and of those that `import-qoperator` makes standard, without those of `INLINED`.

    Raises ModelError, UnsupportedError.
    """
    if proto.functions:
        try:
            proto = inliner.inline_local_functions(proto)
        except Exception as error:
            raise ModelError(f"its functions cannot be inlined: {one_line(error)}", where) from error
    problems = [
        f"{node.op_type} {node.name!r} of domain {node.domain!r}"
        for node in all_nodes(proto.graph)
        if node.domain not in STANDARD_DOMAINS and (node.domain, node.op_type) not in IMPORTED
    ]
    if problems:
        raise UnsupportedError(f"only standard ONNX operators are supported: {listed(problems)}", where)
    _write_defaults(proto)
    if any(node.op_type in FLOAT32_BODIES for node in proto.graph.node):
        _inline_bodies(proto, FLOAT32_BODIES)
    for _ in range(DEPTH):
        found = sorted({node.op_type for node in all_nodes(proto.graph)} & INLINED)
        if not found:
            break
        before = sum(1 for _ in all_nodes(proto.graph))
        try:
            proto = inliner.inline_selected_functions(proto, [("", op) for op in found], inline_schema_functions=True)
        except Exception as error:  # ONNX's inliner fails where an input is left out
            if not _inline_bodies(proto):
                raise UnsupportedError(f"{', '.join(found)} cannot be expanded: {one_line(error)}", where) from error
        if sum(1 for _ in all_nodes(proto.graph)) == before:
            break
    return proto


def _write_defaults(proto: onnx.ModelProto) -> None:
    """Give nodes the attributes that they leave out, where ONNX forgets that they have a default.

    Its inliner leaves them out in the bodies of `INLINED`; its shape inference takes onesided of STFT for 0.
    """
    version = max((o.version for o in proto.opset_import if o.domain in STANDARD_DOMAINS), default=1)
    for node in all_nodes(proto.graph):
        if node.op_type in {*INLINED, "STFT"} and node.domain in STANDARD_DOMAINS:
            schema: Any = onnx.defs.get_schema(node.op_type, version, "")
            given = {a.name for a in node.attribute}
            defaults = [a.default_value for name, a in schema.attributes.items() if name not in given]
            if schema.has_function or node.op_type == "STFT":
                node.attribute.extend(default for default in defaults if default.name)


def _inline_bodies(proto: onnx.ModelProto, operators: frozenset[str] = INLINED) -> bool:
    """Replace the nodes of `operators` in the main graph, in place, where the types of their inputs are known."""
    version = max((o.version for o in proto.opset_import if o.domain in STANDARD_DOMAINS), default=1)
    graph = onnx.shape_inference.infer_shapes(proto).graph
    types = {v.name: v.type for v in (*graph.input, *graph.value_info, *graph.output)}
    types.update({t.name: helper.make_tensor_type_proto(t.data_type, t.dims) for t in graph.initializer})
    result: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        known = all(name in types for name in node.input if name)
        given = [types[name].SerializeToString() if name else b"" for name in node.input] if known else None
        body = function_body(node, version, given) if node.op_type in operators else None
        result.extend([node] if body is None else body)
    changed = len(result) != len(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(result)
    return changed


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes of the graph and of the graphs inside them."""
    pending = [graph]
    while pending:
        graph = pending.pop()
        for node in graph.node:
            yield node
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    pending.append(attribute.g)
                pending.extend(attribute.graphs)


def to_working_opset(proto: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """`proto` at `OPSET`. Raises UnsupportedError that names every node in the way."""
    versions = [o.version for o in proto.opset_import if o.domain in STANDARD_DOMAINS]
    standard = any(node.domain in STANDARD_DOMAINS for node in all_nodes(proto.graph))
    version = max(versions, default=1 if standard else OPSET)
    if version == 8 and any(node.op_type == "Scan" for node in all_nodes(proto.graph)):
        raise UnsupportedError("Scan of opset 8 works on batches; export the model at opset 9 or later", where)
    if version < 13:
        _flatten_hardmax(proto.graph)
    if version < OPSET:
        try:
            proto = version_converter.convert_version(proto, OPSET)
        except Exception as error:
            what = f"cannot be upgraded from opset {version} to {OPSET}: {one_line(error)}"
            raise UnsupportedError(f"{what}; export it again at opset 18 or later", where) from error
    elif version > OPSET:
        _replace_newer(proto, version)
        newer = sorted({_newer(n, version) for n in all_nodes(proto.graph) if n.domain in STANDARD_DOMAINS} - {""})
        if newer:
            what = f"opset {version} is newer than {OPSET}, and these operators changed since: {listed(newer)}"
            raise UnsupportedError(f"{what}; export it again at opset {OPSET} or earlier", where)
    others = [o for o in proto.opset_import if o.domain not in STANDARD_DOMAINS]
    del proto.opset_import[:]
    proto.opset_import.extend([helper.make_opsetid("", OPSET), *others])
    proto.ir_version = IR_VERSION
    return proto


def _flatten_hardmax(graph: onnx.GraphProto) -> None:
    """Before opset 13 a Hardmax goes over all axes from its own on; ONNX's converter does not write that out, as for Softmax."""
    nodes: list[onnx.NodeProto] = []
    for i, node in enumerate(graph.node):
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                _flatten_hardmax(inner)
        if node.op_type != "Hardmax" or node.domain not in STANDARD_DOMAINS:
            nodes.append(node)
            continue
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        flat, chosen, shape = (f"{node.output[0]}/{i}/{part}" for part in ("flat", "chosen", "shape"))
        nodes += [
            helper.make_node("Shape", [node.input[0]], [shape]),
            helper.make_node("Flatten", [node.input[0]], [flat], axis=axis),
            helper.make_node("Hardmax", [flat], [chosen], node.name, axis=1),
            helper.make_node("Reshape", [chosen, shape], [node.output[0]]),
        ]
    if len(nodes) != len(graph.node):
        made = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(made)


def _newer(node: onnx.NodeProto, version: int) -> str:
    """The operator's name if the node means something at `version` that it does not at `OPSET`.

    A newer operator version that only widened its types, or added attributes and inputs the node does not use, is the
    same operator.
    """
    try:
        new = onnx.defs.get_schema(node.op_type, version, "")
        old = onnx.defs.get_schema(node.op_type, OPSET, "")
    except onnx.defs.SchemaError:
        return node.op_type
    if new.since_version == old.since_version:
        return ""
    used = {a.name for a in node.attribute}
    same_attributes = all(
        name in new.attributes and _default(new.attributes[name]) == _default(attribute)
        for name, attribute in old.attributes.items()
    )
    same_inputs = [i.name for i in new.inputs][: len(old.inputs)] == [i.name for i in old.inputs]
    fits = (
        len(node.input) <= max(old.max_input, 0) and len(node.output) <= old.max_output and used <= set(old.attributes)
    )
    return "" if same_attributes and same_inputs and fits else node.op_type


def _default(attribute: onnx.defs.OpSchema.Attribute) -> tuple[Any, ...]:
    return attribute.type, attribute.required, attribute.default_value.SerializeToString()


# ---- operators newer than OPSET


def _replace_newer(proto: onnx.ModelProto, version: int) -> None:
    """Expand the nodes of `NEWER` in place, where their shapes and constants are known."""
    if not any(node.op_type in NEWER for node in proto.graph.node):
        return
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    types = {v.name: v.type.tensor_type for v in (*inferred.input, *inferred.value_info, *inferred.output)}
    known = {t.name: t for t in proto.graph.initializer}
    types.update({name: helper.make_tensor_type_proto(t.data_type, t.dims).tensor_type for name, t in known.items()})
    known.update({
        node.output[0]: a.t for node in proto.graph.node if node.op_type == "Constant" for a in node.attribute if a.name == "value"
    })  # fmt: skip
    result: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        expand = NEWER.get(node.op_type)
        nodes = expand(node, types, known) if expand is not None else None
        result.extend([node] if nodes is None else nodes)
    del proto.graph.node[:]
    proto.graph.node.extend(result)


Types = dict[str, onnx.TypeProto.Tensor]
Expansion = Callable[[onnx.NodeProto, Types, dict[str, onnx.TensorProto]], "list[onnx.NodeProto] | None"]


def _constant(name: str, array: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name))


def _cum_prod(node: onnx.NodeProto, types: Types, known: dict[str, onnx.TensorProto]) -> list[onnx.NodeProto] | None:
    """y_i = x_0 x_1 ... x_i along an axis of n, by doubling: y = y * (y moved by d, ones moved in), d = 1, 2, 4, ... < n."""
    x, axis_name = node.input
    kind = types.get(x)
    if kind is None or axis_name not in known:
        return None
    shape = [d.dim_value for d in kind.shape.dim]
    flags = {a.name: a.i for a in node.attribute}
    axis = int(numpy_helper.to_array(known[axis_name]).reshape(-1)[0]) % len(shape)
    n, output = shape[axis], node.output[0]
    if min(shape) < 1:
        return None
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
    reverse = bool(flags.get("reverse", 0))
    nodes = [_constant(f"{output}/one", np.ones((), dtype)), _constant(f"{output}/axes", np.array([axis]))]

    def moved(value: str, by: int, name: str) -> str:
        pads = [by, -by] if not reverse else [-by, by]
        nodes.append(_constant(f"{name}/pads", np.array(pads)))
        inputs = [value, f"{name}/pads", f"{output}/one", f"{output}/axes"]
        nodes.append(helper.make_node("Pad", inputs, [name], name=f"{node.name or output}/move"))
        return name

    value = moved(x, 1, f"{output}/exclusive") if flags.get("exclusive", 0) else x
    step = 1
    while step < n:
        other = moved(value, step, f"{output}/moved{step}")
        nodes.append(helper.make_node("Mul", [value, other], [f"{output}/product{step}"]))
        value, step = f"{output}/product{step}", 2 * step
    nodes.append(helper.make_node("Identity", [value], [output]))
    return nodes


NEWER: dict[str, Expansion] = {"CumProd": _cum_prod}
