"""Ties of layers that sum products: Conv, Gemm, MatMul, Einsum, recurrent layers. Their weights are noted as uses."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from sparsec.passes.channels.ties import Rule, Ties, Unknown, every_input, pin_space, row_parameters, shape_of
from sparsec.passes.normalization.fold_constants import constant


def _weight(ties: Ties, node: ir.Node) -> ir.Value:
    """Input 1. What is cut must be zero in the masked twin, so a computed weight is not cut."""
    value = node.inputs[1]
    if value is None or (ties.cut and constant(value) is None):
        raise Unknown("its weight is not constant")
    return value


def _conv(ties: Ties, node: ir.Node) -> set[int]:
    x, w, y = node.inputs[0], _weight(ties, node), node.outputs[0]
    rows, columns = shape_of(w)[:2]
    groups = node.attributes.get_int("group", 1)
    ties.tie(ties.axis(x, 0), ties.axis(y, 0))
    pin_space(ties, node, x, w, y)
    out = ties.axis(w, 0)
    ties.tie(ties.axis(y, 1), out)
    if groups == 1:
        ties.tie(ties.axis(x, 1), ties.axis(w, 1))
        ties.use(node, 1, "column", ties.axis(w, 1))
        ties.use(node, 1, "row", out)
    elif columns == 1:
        ties.tie(np.repeat(ties.axis(x, 1).atoms, rows // groups), out, _inner(rows, groups))
    else:
        ties.use(node, 1, "row", out)
        _conv_groups(ties, node, groups)
    return {0, 1} | row_parameters(ties, node, (2,), y)


def _inner(rows: int, groups: int) -> np.ndarray:
    return np.tile(np.arange(rows // groups), groups)


def _conv_groups(ties: Ties, node: ir.Node, groups: int) -> None:
    x, w = node.inputs[0], node.inputs[1]
    rows, columns = shape_of(w)[:2]
    source, out, per = ties.axis(x, 1).atoms.reshape(groups, columns), ties.axis(w, 0).atoms, rows // groups
    if ties.cut:  # every group loses the same channels, so that groups stay equally large
        column = ties.axis(w, 1)
        ties.use(node, 1, "column", column)
        for g in range(groups):
            ties.tie(source[g], column)
            ties.tie(out[g * per : (g + 1) * per], out[:per])
        return
    if constant(w) is None:
        raise Unknown("the weight of a grouped convolution is not constant")
    for g in range(groups):
        column = ties.axis(w, 1, (g * per, (g + 1) * per))
        ties.tie(source[g], column)
        ties.use(node, 1, "column", column)
    ties.tie(out, out, np.repeat(np.arange(groups), per))  # rows stay in their group


def _conv_transpose(ties: Ties, node: ir.Node) -> set[int]:
    x, w, y = node.inputs[0], _weight(ties, node), node.outputs[0]
    groups, (rows, columns) = node.attributes.get_int("group", 1), shape_of(w)[:2]
    ties.tie(ties.axis(x, 0), ties.axis(y, 0))
    pin_space(ties, node, x, w, y)
    ties.tie(ties.axis(x, 1), ties.axis(w, 0))
    if groups == 1:
        ties.tie(ties.axis(y, 1), ties.axis(w, 1))
        ties.use(node, 1, "column", ties.axis(w, 0))
        ties.use(node, 1, "row", ties.axis(w, 1))
    elif groups == rows and columns == 1:
        ties.tie(ties.axis(x, 1), ties.axis(y, 1))
    else:
        raise Unknown("a grouped transposed convolution")
    return {0, 1} | row_parameters(ties, node, (2,), y)


def _contract(ties: Ties, node: ir.Node, index: int, a: ir.Value, i: int, b: ir.Value, j: int) -> None:
    """A sum over axis i of a and axis j of b; a cut is only known to be exact where one of them is a weight."""
    ties.tie(ties.axis(a, i), ties.axis(b, j))
    if constant(a) is None and constant(b) is None and ties.cut:
        ties.pin(a, f"{node.op_type} {node.name!r} sums products of activations along it", i)


def _gemm(ties: Ties, node: ir.Node) -> set[int]:
    a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
    k = 0 if node.attributes.get_int("transA", 0) else 1
    n = 0 if node.attributes.get_int("transB", 0) else 1
    _contract(ties, node, 1, a, k, b, 1 - n)
    ties.tie(ties.axis(a, 1 - k), ties.axis(y, 0))
    ties.tie(ties.axis(b, n), ties.axis(y, 1))
    if constant(b) is not None:
        ties.use(node, 1, "column", ties.axis(b, 1 - n))
        ties.use(node, 1, "row", ties.axis(b, n))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        ties.broadcast(node.inputs[2], y)
    return {0, 1, 2}


def _matmul(ties: Ties, node: ir.Node) -> set[int]:
    a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
    if len(shape_of(a)) < 2 or len(shape_of(b)) < 2:
        raise Unknown("a product with a vector")
    _contract(ties, node, 1, a, -1, b, -2)
    ties.tie(ties.axis(a, -2), ties.axis(y, -2))
    ties.tie(ties.axis(b, -1), ties.axis(y, -1))
    for x in (a, b):
        ties.broadcast(x, y, skip=2)
    if constant(b) is not None:
        ties.use(node, 1, "column", ties.axis(b, -2))
        ties.use(node, 1, "row", ties.axis(b, -1))
    elif constant(a) is not None:
        ties.use(node, 0, "column", ties.axis(a, -1))
        ties.use(node, 0, "row", ties.axis(a, -2))
    return {0, 1}


def _recurrent(ties: Ties, node: ir.Node, gates: int) -> set[int]:
    """Only the input's features; the state stays as it is."""
    w = _weight(ties, node)
    ties.tie(ties.axis(node.inputs[0], 2), ties.axis(w, 2))
    ties.use(node, 1, "column", ties.axis(w, 2))
    what = f"{node.op_type} {node.name!r}"
    ties.pin(node.inputs[0], f"{what} runs along it", 0)
    ties.pin(node.inputs[0], f"{what} runs along it", 1)
    ties.pin(w, f"{what}: a state of {gates} gates", 0)
    ties.pin(w, f"{what}: a state of {gates} gates", 1)
    for y in node.outputs:
        ties.pin(y if y.name else None, f"{what}: a state")
    return {0, 1}


def _einsum(ties: Ties, node: ir.Node) -> set[int]:
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = [*left.split(","), right]
    if not arrow or "." in equation or any(len(set(t)) != len(t) for t in terms):
        raise Unknown("an Einsum with an ellipsis, a diagonal or no arrow")
    values = [*node.inputs, node.outputs[0]]
    for letter in sorted(set("".join(terms))):
        found = [ties.axis(v, t.index(letter)) for v, t in zip(values, terms, strict=True) if letter in t]
        for a in found[1:]:
            ties.tie(found[0], a)
        if ties.cut and letter not in right:
            ties.pin_atoms(found[0].atoms, f"Einsum {node.name!r} sums along it")
    return every_input(node)


RULES: dict[str, Rule] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "GRU": partial(_recurrent, gates=3),
    "Gemm": _gemm,
    "LSTM": partial(_recurrent, gates=4),
    "MatMul": _matmul,
    "RNN": partial(_recurrent, gates=1),
}
