"""Sums of several products, ordered so that each product adds one of the other terms as it is stored.

    (U v + S x) + c + r   ->   (U v + c) + (S x + r)          c: a constant vector, r: anything computed

A kernel adds a bias and one other value (`sparsec.lowering.match`). Exporters and passes add up in the order of the
formula: the product of a low-rank layer, its sparse residual, the bias, then the shortcut; only the first of these Adds
stands where a kernel can take it. A tree of Adds whose values nobody else reads, over products p_1 .. p_m (m >= 2) of
constant weights, at most one vector c and other terms r_1 .. r_n, becomes

    (p_1 + c) + (p_2 + ( .. (p_m + r_1))) + r_2 .. + r_n

Only the order of the terms changes: every node stays, with its name, and moves to where the sum is complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from sparsec.lowering.match import constant, dims, only_consumer

PRODUCTS = ("Conv", "Gemm", "MatMul")


@dataclass
class Tree:
    """The Adds of one sum, the last of them its root, and what they add up."""

    adds: list[ir.Node] = field(default_factory=list)
    products: list[ir.Value] = field(default_factory=list)
    biases: list[ir.Value] = field(default_factory=list)
    others: list[ir.Value] = field(default_factory=list)


def gather_sums(model: ir.Model) -> ir.Model:
    """`model`, or a copy with its sums in another order."""
    if not any(True for _ in trees(model.graph)):
        return model
    model = model.clone()
    for tree in list(trees(model.graph)):
        _reorder(model.graph, tree)
    return model


def trees(graph: ir.Graph) -> Iterator[Tree]:
    """Sums that gain from another order; all in the order of the graph."""
    position: dict[ir.Node | None, int] = {node: i for i, node in enumerate(graph)}
    for node in graph:
        if node.op_type != "Add" or _inside(node):
            continue
        tree = _collect(node)
        if tree is not None and len(tree.products) > 1 and _gains(tree):
            tree.adds.sort(key=lambda n: position[n])
            for values in (tree.products, tree.others):
                values.sort(key=lambda v: position.get(v.producer(), -1))
            yield tree


def _inside(node: ir.Node) -> bool:
    """Whether the sum goes on behind `node`."""
    behind = only_consumer(node.outputs[0])
    return behind is not None and behind.op_type == "Add" and dims(behind.outputs[0]) == dims(node.outputs[0])


def _gains(tree: Tree) -> bool:
    """Whether there is a term besides the products, and a product that can take a bias, if there is one."""
    fits = len(tree.biases) < 2 and (not tree.biases or _taker(tree) is not None)
    return fits and bool(tree.biases or tree.others)


def _taker(tree: Tree) -> ir.Value | None:
    """The product that a bias is added to: of a MatMul, whose node has no place for one."""
    return next((p for p in tree.products if _op(p) == "MatMul"), None)


def _op(value: ir.Value) -> str:
    node = value.producer()
    return "" if node is None else node.op_type


def _collect(root: ir.Node) -> Tree | None:
    """What the sum `root` adds up; None if a term broadcasts in a way that no kernel adds."""
    tree, shape, pending = Tree(), dims(root.outputs[0]), [root]
    while pending:
        node = pending.pop()
        tree.adds.append(node)
        for value in node.inputs:
            assert value is not None
            maker = value.producer()
            alone = maker is not None and only_consumer(value) is node
            array = constant(value)
            if array is not None:
                if array.ndim == 0 or array.size != shape[-1] or array.shape[-1] != shape[-1]:
                    return None
                tree.biases.append(value)
            elif dims(value) != shape:
                return None
            elif alone and maker.op_type == "Add":  # type: ignore[union-attr]
                pending.append(maker)  # type: ignore[arg-type]
            elif alone and maker.op_type in PRODUCTS and constant(maker.inputs[1]) is not None:  # type: ignore[union-attr]
                tree.products.append(value)
            else:
                tree.others.append(value)
    return tree


def _reorder(graph: ir.Graph, tree: Tree) -> None:
    root, free = tree.adds[-1], tree.adds[:-1]
    for node in free:
        graph.remove(node)
        graph.insert_before(root, node)
    order = [*free, root]

    def added(a: ir.Value, b: ir.Value) -> ir.Value:
        node = order.pop(0)
        node.replace_input_with(0, a)
        node.replace_input_with(1, b)
        return node.outputs[0]

    products, others = list(tree.products), list(tree.others)
    first = _taker(tree) or products[0]
    products.remove(next(p for p in products if p is first))
    total = products.pop() if not others else others.pop(0)
    for product in reversed(products):
        total = added(product, total)
    if tree.biases:
        first = added(first, tree.biases[0])
    total = added(first, total)
    for other in others:
        total = added(total, other)
