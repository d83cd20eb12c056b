"""The rules of `sparsec.passes.channels.ties`, by operator: one function each or for a family, in a file for each kind."""

from __future__ import annotations

import onnx_ir as ir

from sparsec.passes.channels import tie_mixing, tie_moves, tie_weights
from sparsec.passes.channels.ties import Rule, Ties, Unknown, every_input, shape_of

POINTWISE = (
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitShift", "BitwiseAnd", "BitwiseNot",
    "BitwiseOr", "BitwiseXor", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Div", "Dropout", "Elu",
    "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity",
    "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg",
    "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh",
    "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor",
)  # fmt: skip


def _pointwise(ties: Ties, node: ir.Node) -> set[int]:
    for x in node.inputs:
        if x is not None:
            ties.broadcast(x, node.outputs[0])
    return every_input(node)


def _quantize(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(shape_of(x))
    ties.same(x, y, range(rank))
    for parameter in node.inputs[1:]:
        shape = () if parameter is None else shape_of(parameter)
        if len(shape) > 1 or node.attributes.get_int("block_size", 0):
            raise Unknown("quantized in blocks")
        if len(shape) == 1 and shape != (1,):
            ties.tie(ties.axis(parameter, 0), ties.axis(x, node.attributes.get_int("axis", 1) % rank))
    return every_input(node)


RULES: dict[str, Rule] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantize),
    **tie_weights.RULES,
    **tie_mixing.RULES,
    **tie_moves.RULES,
}
