"""Recognize a LayerNormalization that an exporter wrote out, over the last axis.

    mean = E[x]      d = x - mean      var = E[d^2]      s = sqrt(var + eps)
    torch, hand-written:   y = d / s [* gamma] [+ beta]          or  d * (1 / s) [* gamma] [+ beta]
    tf.keras (batchnorm):  a = gamma * (1 / s)    y = x * a + (beta - mean * a)

E is ReduceMean over the last axis, or GlobalAveragePool of [N, C, L]. Both become the standard operator
`LayerNormalization(x, gamma, beta, axis=-1, epsilon=eps)` (Ba, Kiros, Hinton, arXiv 1607.06450); the function is the same up
to rounding. Nothing is changed where a value in between is used elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsec.passes.initializers import add_initializer
from sparsec.passes.normalization.fold_constants import constant, remove_unused_initializers, static_shape
from sparsec.rewriting.passes_api import Context, Pass, PassResult

_SINCE = 17  # the opset that defines LayerNormalization


@dataclass(frozen=True)
class _Match:
    """One normalization: its last node gives `y`."""

    x: ir.Value
    gamma: np.ndarray | None
    beta: np.ndarray | None
    epsilon: float
    nodes: frozenset[ir.Node]
    y: ir.Value


@dataclass(frozen=True)
class FuseLayerNorm(Pass):
    """Replace a written-out layer normalization by the LayerNormalization operator."""

    name: ClassVar[str] = "fuse-layer-norm"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> PassResult:
        if model.graph.opset_imports.get("", 0) < _SINCE:
            return PassResult(model, False)
        fused = []
        for node in list(model.graph):
            if node.op_type == "Sqrt" and node.graph is not None and (match := _match(node)):
                _rewrite(model.graph, match)
                fused.append(match.y.name)
        if fused:
            remove_unused_initializers(model.graph)
            Context.of(model).records.append({"fused": fused})
        return PassResult(model, bool(fused))


def _scalar(value: ir.Value | None) -> float | None:
    array = constant(value) if value is not None else None
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def _sides(node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    """Both orders of a commutative node's inputs."""
    a, b = node.inputs[0], node.inputs[1]
    return [(a, b), (b, a)] if a is not None and b is not None else []


def _made_by(value: ir.Value | None, *ops: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in ops and node.domain in ("", "ai.onnx") else None


def _mean_of(value: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """(node, x) if `value` is the mean of x over its last axis, kept as an axis of one."""
    node = _made_by(value, "ReduceMean", "GlobalAveragePool")
    x = node.inputs[0] if node is not None else None
    shape = static_shape(x) if x is not None else None
    if node is None or x is None or shape is None or static_shape(value) != (*shape[:-1], 1):
        return None
    if node.op_type == "GlobalAveragePool":
        return (node, x) if len(shape) == 3 else None
    given = constant(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    axes = given.reshape(-1).tolist() if given is not None else node.attributes.get_ints("axes", [])
    return (node, x) if [int(axis) % len(shape) for axis in axes] == [len(shape) - 1] else None


def _square_of(value: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    node = _made_by(value, "Mul", "Pow")
    if node is None or node.inputs[0] is None:
        return None
    squared = node.inputs[1] is node.inputs[0] if node.op_type == "Mul" else _scalar(node.inputs[1]) == 2.0
    return (node, node.inputs[0]) if squared else None


def _match(sqrt: ir.Node) -> _Match | None:
    """The normalization around `sqrt`."""
    add = _made_by(sqrt.inputs[0], "Add")
    if add is None:
        return None
    for variance, eps in _sides(add):
        epsilon = _scalar(eps)
        mean_square = _mean_of(variance) if epsilon is not None else None
        square = _square_of(mean_square[1]) if mean_square else None
        sub = _made_by(square[1], "Sub") if square else None
        mean = _mean_of(sub.inputs[1]) if sub is not None and sub.inputs[1] is not None else None
        if epsilon is None or mean_square is None or square is None or sub is None or mean is None:
            continue
        if mean[1] is not sub.inputs[0]:
            continue
        core = {sqrt, add, mean_square[0], square[0], sub, mean[0]}
        return _finish(mean[1], sub.outputs[0], sub.inputs[1], sqrt.outputs[0], epsilon, core)  # type: ignore[arg-type]
    return None


def _finish(x: ir.Value, d: ir.Value, mean: ir.Value, s: ir.Value, epsilon: float, core: set[ir.Node]) -> _Match | None:
    """What follows the standard deviation `s`: division, scale and shift."""
    depth = (static_shape(x) or (0,))[-1]
    for node, index in s.uses():
        if node.op_type == "Div" and index == 1 and node.inputs[0] is d:
            return _scale_and_shift(x, node, epsilon, core | {node}, depth)
        one = node.op_type == "Div" and index == 1 and _scalar(node.inputs[0]) == 1.0
        if node.op_type != "Reciprocal" and not one:
            continue
        inverse = node.outputs[0]
        for product, _ in inverse.uses():
            if product.op_type != "Mul":
                continue
            other = next((b for a, b in _sides(product) if a is inverse), None)
            if other is d:
                return _scale_and_shift(x, product, epsilon, core | {node, product}, depth)
            gamma = _vector(other, depth)
            if gamma is not None:
                return _folded_shift(x, mean, product, gamma, epsilon, core | {node, product}, depth)
    return None


def _vector(value: ir.Value | None, depth: int) -> np.ndarray | None:
    """A constant along the last axis, as [depth]."""
    array = constant(value) if value is not None else None
    if array is None or array.size != depth or array.shape[-1:] != (depth,):
        return None
    return array.reshape(-1)


def _only(value: ir.Value, op: str) -> ir.Node | None:
    uses = value.uses()
    return uses[0].node if len(uses) == 1 and uses[0].node.op_type == op and not value.is_graph_output() else None


def _scale_and_shift(x: ir.Value, node: ir.Node, epsilon: float, nodes: set[ir.Node], depth: int) -> _Match | None:
    """y = node [* gamma] [+ beta]."""
    found: dict[str, np.ndarray | None] = {"Mul": None, "Add": None}
    for op in ("Mul", "Add"):
        more = _only(node.outputs[0], op)
        if more is None:
            continue
        vector = next(
            (v for a, b in _sides(more) if a is node.outputs[0] and (v := _vector(b, depth)) is not None), None
        )
        if vector is None:
            continue
        found[op], node = vector, more
        nodes = nodes | {more}
    return _closed(_Match(x, found["Mul"], found["Add"], epsilon, frozenset(nodes), node.outputs[0]))


def _folded_shift(
    x: ir.Value, mean: ir.Value, scale: ir.Node, gamma: np.ndarray, epsilon: float, nodes: set[ir.Node], depth: int
) -> _Match | None:
    """y = x * a + (beta - mean * a) with a = `scale`'s output."""
    a = scale.outputs[0]
    products = {}
    for node, _ in a.uses():
        if node.op_type == "Mul":
            for left, right in _sides(node):
                if left is a and (right is x or right is mean):
                    products["x" if right is x else "mean"] = node
    if set(products) != {"x", "mean"}:
        return None
    sub = _only(products["mean"].outputs[0], "Sub")
    beta = _vector(sub.inputs[0], depth) if sub is not None else None
    add = _only(products["x"].outputs[0], "Add")
    if sub is None or beta is None or add is None or not any(v is sub.outputs[0] for v in add.inputs):
        return None
    return _closed(_Match(x, gamma, beta, epsilon, frozenset({*nodes, *products.values(), sub, add}), add.outputs[0]))


def _closed(match: _Match) -> _Match | None:
    """The match, unless a value in between is read elsewhere."""
    for node in match.nodes:
        for value in node.outputs:
            outside = value.is_graph_output() or any(user not in match.nodes for user, _ in value.uses())
            if value is not match.y and outside:
                return None
    return match


def _rewrite(graph: ir.Graph, match: _Match) -> None:
    depth = (static_shape(match.x) or (0,))[-1]
    stem = match.y.name or "layer_norm"
    dtype = match.x.dtype.numpy() if match.x.dtype is not None else np.dtype("float32")
    gamma = np.ones(depth, dtype) if match.gamma is None else match.gamma.astype(dtype)
    inputs: list[ir.Value | None] = [match.x, add_initializer(graph, f"{stem}/gamma", gamma)]
    if match.beta is not None:
        inputs.append(add_initializer(graph, f"{stem}/beta", match.beta.astype(dtype)))
    last = match.y.producer()
    assert last is not None
    attributes = [ir.AttrInt64("axis", -1), ir.AttrFloat32("epsilon", match.epsilon)]
    node = ir.Node("", "LayerNormalization", inputs, attributes, name=f"{last.name}/LayerNormalization")
    made = node.outputs[0]
    made.shape, made.type, made.name = match.y.shape, match.y.type, f"{stem}/normalized"
    graph.insert_after(last, node)
    name, outputs = match.y.name, list(graph.outputs)
    match.y.replace_all_uses_with(made, replace_graph_outputs=True)
    graph.remove([n for n in graph if n in match.nodes], safe=True)
    if any(value is match.y for value in outputs):
        made.name = name
