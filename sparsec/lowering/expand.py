"""ONNX nodes rewritten, before import, into operators that TVM's importer gets right.

    float16 operators that round inside      float32 ones between casts: one rounding at the end
    operators of `expansions`                what stands there
    operators the importer lacks             the function body that ONNX defines for them

again and again, until nothing changes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx
from onnx import TensorProto, helper

from sparsec.loading.functions import function_body
from sparsec.lowering.expansions import EXPANSIONS, Context, ExpansionError

__all__ = ["ExpansionError", "expand_nodes"]


def expand_nodes(
    nodes: list[onnx.NodeProto],
    types: Mapping[str, onnx.ValueInfoProto],
    initializers: dict[str, onnx.TensorProto],
    importable: Collection[str],
    opset: int,
) -> list[onnx.NodeProto]:
    """`nodes` with some expanded, in order. New constants are added to `initializers`.

    `types`: of every value that is not a constant. `importable`: operators that the importer has.
    """
    context = Context(dict(types), initializers, importable, opset)
    result: list[onnx.NodeProto] = []
    pending = [made for node in nodes for made in _widened(node, context)][::-1]
    while pending:
        node = pending.pop()
        expansion = (
            EXPANSIONS.get(node.op_type, _function_body)(node, context) if node.domain in ("", "ai.onnx") else None
        )
        if expansion is None:
            result.append(node)
        else:
            pending.extend(reversed(expansion))
    return result


# Of float16: exact, or rounded once as they are.
_ONE_ROUNDING = frozenset({
    "Abs", "Add", "Cast", "CastLike", "Ceil", "Clip", "Compress", "Concat", "DepthToSpace", "DequantizeLinear", "Div", "Dropout",
    "Equal", "Expand", "EyeLike", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Greater", "GreaterOrEqual",
    "Identity", "IsInf", "IsNaN", "Less", "LessOrEqual", "Max", "MaxPool", "Min", "Mul", "Neg", "OneHot", "Pad",
    "QuantizeLinear", "Relu", "Reshape", "ReverseSequence", "Round", "ScatterElements", "ScatterND", "Shape", "Sign", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Sqrt", "Sub", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
})  # fmt: skip


def _widened(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto]:
    """`node` on float32 between casts, if it computes with float16 and rounds on the way."""

    def is_half(name: str) -> bool:
        known = name in context.types or name in context.initializers
        return bool(name) and known and context.element(name) == TensorProto.FLOAT16

    if node.domain not in ("", "ai.onnx") or node.op_type in _ONE_ROUNDING:
        return [node]
    if not any(map(is_half, (*node.input, *node.output))):
        return [node]
    before, after = [], []
    wide = onnx.NodeProto()
    wide.CopyFrom(node)

    def declare(name: str, like: str) -> str:
        context.types[name] = helper.make_tensor_value_info(name, TensorProto.FLOAT, context.shape(like))
        return name

    for i, name in enumerate(node.input):
        if is_half(name) and name in context.initializers:
            wide.input[i] = context.constant(f"{name}/wide", context.value(name).astype("float32"))
        elif is_half(name):
            wide.input[i] = f"{name}/wide"
            if not context.knows(wide.input[i]):  # several may read it
                before.append(helper.make_node("Cast", [name], [declare(wide.input[i], name)], to=TensorProto.FLOAT))
    for i, name in enumerate(node.output):
        if is_half(name):
            wide.output[i] = declare(f"{name}/unrounded", name)
            after.append(helper.make_node("Cast", [wide.output[i]], [name], to=TensorProto.FLOAT16))
    return [*before, wide, *after]


def _function_body(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto] | None:
    """The function that ONNX defines for an operator the importer lacks."""
    if node.op_type in context.importable or not onnx.defs.has(node.op_type):
        return None
    known = all(i in context.types or i in context.initializers for i in node.input if i)
    types = [context.type_of(i).SerializeToString() if i else b"" for i in node.input] if known else None
    return function_body(node, context.opset, types)
