"""Move transposes down through elementwise operators until two meet, and let them cancel.

    T_q(T_p(x)) = T_{pq}(x), nothing where pq is the identity           (T_p(x))_i has axis p_i of x
    f(T_p(x)) = T_p(f(x))                    f elementwise: activations, Clip, Cast, Quantize/Dequantize of one scale
    f(T_p(x), T_p(y)) = T_p(f(x, y))         also with a constant: T_p(f(x, T_p^{-1}(c)))
    cat_a(T_p(x), T_p(y)) = T_p(cat_{p_a}(x, y))
    pad, reduce over axes a                  the same over the axes p_a

Exporters of channels-last models (tf2onnx) put a transpose before and behind each convolution; most are gone when the
file is written, those around a residual Add, a Concat or an activation that the exporter did not know are not. A
transpose moves only where everything that reads it moves, so there are never more of them than before, and values are the same
bit by bit. It is done only if fewer are left in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsec.passes.normalization.fold_constants import constant, remove_unused_initializers, static_shape
from sparsec.rewriting.passes_api import Context, Pass, PassResult

UNARY = frozenset({
    "Abs", "Cast", "Ceil", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log",
    "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt",
    "Tanh", "ThresholdedRelu",
})  # fmt: skip
BROADCASTING = frozenset({
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mul", "Or", "PRelu", "Pow",
    "Sub", "Where", "Xor",
})  # fmt: skip
REDUCING = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceL2"})  # with keepdims: the rank stays
ROUNDS = 64  # a transpose goes down one operator a round


@dataclass(frozen=True)
class CancelTransposes(Pass):
    """Move transposes down through elementwise operators, Concat, Pad and reductions, and cancel those that meet."""

    name: ClassVar[str] = "cancel-transposes"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        before = _count(graph)
        if before < 2:  # one alone has nothing to meet
            return PassResult(model, False)
        trial = graph.clone()
        _move_all(trial)
        if _count(trial) >= before:
            return PassResult(model, False)
        _move_all(graph)
        remove_unused_initializers(graph)
        Context.of(model).records.append({"transposes_before": before, "transposes_after": _count(graph)})
        return PassResult(model, True)


def _move_all(graph: ir.Graph) -> None:
    for _ in range(ROUNDS):
        changed = 0
        for node in list(graph):
            if node.graph is graph and (_join(graph, node) or _sink(graph, node)):
                changed += 1
        if not changed:
            return


def _count(graph: ir.Graph) -> int:
    return sum(1 for node in graph if _order(node) is not None)


def _order(node: ir.Node | None) -> list[int] | None:
    """The permutation of a Transpose, None for any other node."""
    if node is None or node.op_type != "Transpose" or node.domain not in ("", "ai.onnx") or node.inputs[0] is None:
        return None
    order = node.attributes.get_ints("perm", None)
    if order is not None:
        return [int(a) for a in order]
    shape = static_shape(node.inputs[0])
    return None if shape is None else list(range(len(shape)))[::-1]


def _join(graph: ir.Graph, node: ir.Node) -> bool:
    """Let a Transpose of a Transpose read what that one reads; one that does nothing goes."""
    second = _order(node)
    if second is None:
        return False
    assert node.inputs[0] is not None
    first = _order(node.inputs[0].producer())
    if first is not None:
        above = node.inputs[0].producer()
        assert above is not None
        second = [first[a] for a in second]
        node.replace_input_with(0, above.inputs[0])
        node.attributes["perm"] = ir.AttrInt64s("perm", second)
        _drop_unused(graph, above)
    y, x = node.outputs[0], node.inputs[0]
    if second == sorted(second) and not y.is_graph_output():
        y.replace_all_uses_with(x)
        graph.remove(node, safe=True)
        return True
    return first is not None


def _drop_unused(graph: ir.Graph, node: ir.Node) -> None:
    if not any(v.uses() or v.is_graph_output() for v in node.outputs):
        graph.remove(node, safe=True)


def _sink(graph: ir.Graph, node: ir.Node) -> bool:
    """Move the transposes of all inputs of `node` behind it; False if that is not possible."""
    if node.domain not in ("", "ai.onnx") or not node.inputs or any(v.is_graph_output() for v in node.outputs):
        return False
    order = _common_order(node)
    if order is None or not _rewrite(graph, node, order):
        return False
    rank, back = len(order), np.argsort(order)
    for y in list(node.outputs):
        behind = ir.node("Transpose", [y], attributes={"perm": order}, name=f"{node.name}/{y.index()}/transpose")
        new = behind.outputs[0]
        new.name, new.shape, new.type = f"{y.name}/transposed", y.shape, y.type
        shape = static_shape(y)
        assert shape is not None
        assert len(shape) == rank
        for use in list(y.uses()):
            if use.node is not behind:
                use.node.replace_input_with(use.idx, new)
        y.shape = ir.Shape([shape[int(back[d])] for d in range(rank)])
        graph.insert_after(node, behind)
    return True


def _common_order(node: ir.Node) -> list[int] | None:
    """The one permutation of all inputs that are transposed here alone; None if some input forbids it."""
    found: list[int] | None = None
    for i, x in enumerate(_data(node)):
        if x is None:
            continue
        order = _order(x.producer())
        if order is not None and len(x.uses()) == 1 and not x.is_graph_output():
            if found is not None and order != found:
                return None
            found = order
        elif constant(x) is None or (i == 0 and node.op_type not in BROADCASTING):
            return None
    if found is None or any(len(static_shape(y) or ()) != len(found) for y in node.outputs):
        return None
    return found


def _data(node: ir.Node) -> Sequence[ir.Value | None]:
    """The inputs that have the axes of the output."""
    return node.inputs if node.op_type in (*BROADCASTING, "Concat") else node.inputs[:1]


def _rewrite(graph: ir.Graph, node: ir.Node, order: list[int]) -> bool:
    """Let `node` compute on the untransposed inputs; False, and nothing is done, if it cannot."""
    kind, back = node.op_type, [int(a) for a in np.argsort(order)]
    constants: dict[int, np.ndarray] = {}
    if kind in BROADCASTING or kind == "Concat":
        for i, x in enumerate(node.inputs):
            array = constant(x)
            if array is not None and (kind == "Concat" or array.ndim > len(order)):
                return False
            if array is not None and array.size > 1:
                wide = array.reshape([1] * (len(order) - array.ndim) + list(array.shape))
                constants[i] = wide.transpose(back)
    elif kind in ("QuantizeLinear", "DequantizeLinear"):
        if any(static_shape(x) not in ((), (1,)) for x in node.inputs[1:] if x is not None):
            return False
    elif kind == "Pad":
        pads = constant(node.inputs[1])
        if pads is None or len(node.inputs) > 3 or len(pads) != 2 * len(order):
            return False
        constants[1] = pads.reshape(2, -1)[:, back].reshape(-1)
    elif kind in REDUCING:
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if axes is None or not axes.size or not node.attributes.get_int("keepdims", 1):
            return False
        constants[1] = np.sort(np.array([order[int(a)] for a in axes], np.int64))
    elif kind not in UNARY:
        return False
    for i, array in constants.items():
        node.replace_input_with(i, _constant(graph, f"{node.name}/{i}/transposed", array))
    for i, x in enumerate(_data(node)):
        above = x.producer() if x is not None else None
        if above is not None and _order(above) is not None:
            node.replace_input_with(i, above.inputs[0])
            _drop_unused(graph, above)
    if kind == "Concat":
        node.attributes["axis"] = ir.AttrInt64("axis", order[node.attributes.get_int("axis", 0)])
    return True


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    taken, number = name, 1
    while taken in graph.initializers:
        taken, number = f"{name}_{number}", number + 1
    tensor = ir.tensor(np.ascontiguousarray(array), name=taken)
    value = ir.Value(name=taken, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
