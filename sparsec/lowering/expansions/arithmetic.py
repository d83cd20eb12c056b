"""Elementwise operators and reductions that the importer lacks or gets wrong for some types."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from sparsec.lowering.expansions.context import Chain, Context, ExpansionError, attribute, numpy_type

MANY = 6  # inputs of one kernel; with the output and an intermediate it stays within the ABI's pointers


def chain_of_many(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto] | None:
    """Concat, Sum, Min, Max of many: the first few, then that with the next few."""
    if len(node.input) <= MANY:
        return None
    head = f"{node.output[0]}/of{len(node.input)}"
    first = helper.make_node(node.op_type, node.input[:MANY], [head], name=node.name)
    second = helper.make_node(node.op_type, [head, *node.input[MANY:]], node.output, name=node.name)
    first.attribute.extend(node.attribute)
    second.attribute.extend(node.attribute)
    return [first, second]


def mean(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto] | None:
    """Of many: their sum, divided."""
    if len(node.input) <= MANY:
        return None
    total, output = f"{node.output[0]}/sum", node.output[0]
    count = context.constant(f"{output}/count", np.array(len(node.input), np.float32))
    return [helper.make_node("Sum", node.input, [total]), helper.make_node("Div", [total, count], [output])]


def power(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto] | None:
    """Small whole powers as products: exact, vectors instead of a call, and right for negative bases.

    Else a floating base keeps its type, and integers go through float64 and are cut off, as in ONNX Runtime.
    """
    x, exponent = node.input
    products = _products(node, context)
    if products is not None or not (context.knows(x) and context.knows(exponent)):
        return products
    kind, other = context.element(x), context.element(exponent)
    whole = np.dtype(numpy_type(kind)).kind != "f"
    if kind == other and not whole:
        return None
    chain = Chain(context, node.output[0])
    wide = int(TensorProto.DOUBLE) if whole else kind
    raised = chain.add("Pow", chain.cast(x, wide), chain.cast(exponent, wide), result="" if whole else node.output[0])
    if whole:
        chain.add("Cast", raised, to=kind, result=node.output[0])
    return chain.nodes


def _products(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto] | None:
    x, exponent = node.input
    if exponent not in context.initializers or context.value(exponent).size != 1 or not context.knows(x):
        return None
    times = float(context.value(exponent).reshape(()))
    if context.shape(exponent) not in ((), (1,)) or times not in (1, 2, 3, 4) or not context.shape(x):
        return None
    output, square = node.output[0], f"{node.output[0]}/square"
    if times == 1:
        return [helper.make_node("Identity", [x], [output])]
    if times == 2:
        return [helper.make_node("Mul", [x, x], [output])]
    other = x if times == 3 else square
    return [helper.make_node("Mul", [x, x], [square]), helper.make_node("Mul", [square, other], [output])]


def mish(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto] | None:
    """x tanh(log(1 + e^x)) = x n / (n + 2) with n = e^x (e^x + 2): no logarithm of a number next to 1."""
    x, output = node.input[0], node.output[0]
    if not context.knows(x) or context.element(x) != TensorProto.FLOAT:
        return None
    chain = Chain(context, output)
    two, most = chain.const(2, np.float32), chain.const(20, np.float32)  # beyond 20 n / (n + 2) is 1 already
    e = chain.add("Exp", chain.add("Min", x, most))
    n = chain.add("Mul", e, chain.add("Add", e, two))
    chain.add("Mul", x, chain.add("Div", n, chain.add("Add", n, two)), result=output)
    return chain.nodes


def prelu(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto]:
    """x, and slope * x below 0: the importer knows one slope a channel only."""
    x, slope = node.input
    chain = Chain(context, node.output[0])
    below = chain.add("Less", x, chain.const(0, numpy_type(context.element(x))))
    chain.add("Where", below, chain.add("Mul", x, slope), x, result=node.output[0])
    return chain.nodes


def is_inf(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto] | None:
    """The importer knows both signs together only."""
    x, output = node.input[0], node.output[0]
    both = attribute(node, "detect_positive", 1), attribute(node, "detect_negative", 1)
    if both == (1, 1):
        return None
    if both == (0, 0):
        raise ExpansionError("IsInf that detects no sign has no lowering")
    bound = np.array(np.inf if both[0] else -np.inf, numpy_type(context.element(x)))
    return [helper.make_node("Equal", [x, context.constant(f"{output}/infinity", bound)], [output])]


def extreme(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto] | None:
    """ReduceMax and ReduceMin of truth values, as numbers."""
    x = node.input[0]
    if not context.knows(x) or context.element(x) != TensorProto.BOOL:
        return None
    chain = Chain(context, node.output[0])
    reduced = chain.add(node.op_type, chain.cast(x, TensorProto.UINT8), *node.input[1:])
    chain.nodes[-1].attribute.extend(node.attribute)
    chain.add("Cast", reduced, to=TensorProto.BOOL, result=node.output[0])
    return chain.nodes


def lp_normalization(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto]:
    """x / |x|_p along an axis, and 0 where the norm is 0; p is 1 or 2."""
    x, kind = node.input[0], numpy_type(context.element(node.input[0]))
    chain = Chain(context, node.output[0])
    axes = chain.const([int(attribute(node, "axis", -1))])
    norm = chain.add("ReduceL1" if int(attribute(node, "p", 2)) == 1 else "ReduceL2", x, axes, keepdims=1)
    empty = chain.add("Equal", norm, chain.const(0, kind))
    below = chain.add("Where", empty, chain.const(1, kind), norm)
    chain.add("Div", x, below, result=node.output[0])
    return chain.nodes


def determinant(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto]:
    """Of matrices up to 3 x 3, by the rule of Sarrus."""
    x, shape = node.input[0], context.shape(node.input[0])
    n = shape[-1]
    if n > 3:
        raise ExpansionError(f"Det of a {n} x {n} matrix has no lowering; up to 3 x 3 has")
    chain = Chain(context, node.output[0])
    flat = chain.add("Reshape", x, chain.const([*shape[:-2], n * n]))
    entries = [chain.add("Gather", flat, chain.const(i), axis=-1) for i in range(n * n)]

    def diagonals(step: int) -> str:
        terms = []
        for start in range(n if n == 3 else 1):
            first = (start if step > 0 else n - 1 - start) if n == 3 else (0 if step > 0 else n - 1)
            term = ""
            for row in range(n):
                entry = entries[row * n + (first + step * row) % n]
                term = chain.add("Mul", term, entry) if term else entry
            terms.append(term)
        total = terms[0]
        for term in terms[1:]:
            total = chain.add("Add", total, term)
        return total

    down = diagonals(1)
    if n == 1:
        chain.add("Identity", down, result=node.output[0])
    else:
        chain.add("Sub", down, diagonals(-1), result=node.output[0])
    return chain.nodes
