"""Groups: a node that does the work and what is fused around it, found on the ONNX graph, so names survive.

    group   = main [bias] [activation] [residual Add] [activation]      at most one activation
    main    = Conv | Gemm | MatMul | pooling | elementwise | normalization ...     see `sparsec.lowering.select`

A value may be fused through only if nothing else reads it and it is not an output of the graph. A group runs where its last
node stands, so that everything it reads is ready.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsec.kernels.epilogue import NONE, Activation, Residual

_UNARY = ("Relu", "Clip", "LeakyRelu", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Gelu")
_CONE = (
    "Mul",
    "Div",
    "Add",
    "Erf",
    "Tanh",
    "Pow",
    "Clip",
    "Sigmoid",
    "HardSigmoid",
)  # what decomposed activations are made of
_CONE_NODES = 9
VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")  # the same elements in the same order


@dataclass(frozen=True)
class Group:
    """One layer: `nodes` in graph order, `main` among them; `output` is what the last one writes."""

    main: ir.Node
    nodes: tuple[ir.Node, ...]
    output: ir.Value
    bias: ir.Value | None = None  # added by a node of its own, constant, along the last axis
    activation: Activation = NONE
    residual: Residual = "none"
    other: ir.Value | None = None  # the residual

    @property
    def name(self) -> str:
        """The main node's name."""
        return self.main.name or ""

    @property
    def op(self) -> str:
        """`Conv+Add+Relu`."""
        return "+".join(node.op_type for node in self.nodes)


def dims(value: ir.Value) -> tuple[int, ...]:
    """Static shape of a loaded model's value."""
    assert value.shape is not None, value.name
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer, dequantized where it is stored quantized, or None for anything computed."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    return _dequantized(node) if node is not None and node.op_type == "DequantizeLinear" else None


def _dequantized(node: ir.Node) -> np.ndarray | None:
    """What a DequantizeLinear of constants gives: (integers - zero point) * scale in float32, as ONNX defines it."""
    if any(value is not None and value.const_value is None for value in node.inputs):
        return None
    integers, scale = constant(node.inputs[0]), constant(node.inputs[1])
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if integers is None or scale is None or scale.dtype != np.float32:
        return None
    axis, block = int(attribute(node, "axis", 1)), int(attribute(node, "block_size", 0))

    def spread(parameter: np.ndarray) -> np.ndarray:
        if block:
            return np.repeat(parameter, block, axis)[tuple(slice(size) for size in integers.shape)]
        shape = [1] * integers.ndim
        if parameter.size > 1:
            shape[axis % integers.ndim] = parameter.size
        return parameter.reshape(shape)

    whole = integers.astype(np.int64) - (0 if zero is None else spread(zero).astype(np.int64))
    return np.asarray(whole.astype(np.float32) * spread(scale))


def scalar(value: ir.Value | None) -> float | None:
    """The one element of a constant, or None."""
    array = constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """An attribute's Python value, or the default."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The node that alone reads `value`, once; None if there are several, or the graph itself reads it."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def unary_activation(node: ir.Node) -> Activation | None:
    """The activation that a single node computes."""
    if node.op_type not in _UNARY:
        return None
    match node.op_type:
        case "Relu":
            return Activation("relu")
        case "Clip":
            bounds = [(scalar(v) if v is not None else None) for v in (*node.inputs, None, None)[1:3]]
            given = [v is not None for v in (*node.inputs, None, None)[1:3]]
            if any(g and b is None for g, b in zip(given, bounds, strict=True)):
                return None
            low = -math.inf if bounds[0] is None else bounds[0]
            high = math.inf if bounds[1] is None else bounds[1]
            return Activation("clip", low, high) if low <= high else None
        case "LeakyRelu":
            return Activation("leaky_relu", float(attribute(node, "alpha", 0.01)))
        case "HardSigmoid":
            alpha, beta = attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)
            return Activation("hardsigmoid", float(alpha), float(beta))
        case "Gelu":
            kind = "gelu" if attribute(node, "approximate", "none") in ("none", b"none") else "gelu_tanh"
            return Activation(kind)
        case _:
            return Activation(node.op_type.lower())


def _factors(value: ir.Value, stop: ir.Value) -> tuple[list[ir.Value], float]:
    """`value` as a product: its factors that are not scalars, and the scalars' product; never looks behind `stop`."""
    node = value.producer()
    if value is stop or node is None or node.op_type not in ("Mul", "Div"):
        number = scalar(value)
        return ([value], 1.0) if number is None else ([], number)
    left, left_scale = _factors(node.inputs[0], stop)  # type: ignore[arg-type]
    if node.op_type == "Div":
        divisor = scalar(node.inputs[1])
        return ([value], 1.0) if not divisor else (left, left_scale / divisor)
    right, right_scale = _factors(node.inputs[1], stop)  # type: ignore[arg-type]
    return left + right, left_scale * right_scale


def _shifted(value: ir.Value, op: str) -> tuple[ir.Value, float] | None:
    """(x, c) if `value` = op(x, c) with a scalar c."""
    node = value.producer()
    if node is None or node.op_type != op:
        return None
    for x, c in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        number = scalar(c)
        if number is not None and x is not None:
            return x, number
    return None


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5)


def _decomposed(end: ir.Value, x: ir.Value) -> Activation | None:
    """The activation of x that `end` is, if it is x times a gate of x.

    silu x sigmoid(x); hardswish x clip(x + 3, 0, 6) / 6 or x hardsigmoid(x; 1/6, 1/2); gelu x (erf(x / sqrt 2) + 1) / 2;
    gelu_tanh x (tanh(sqrt(2 / pi) (x + 0.044715 x^3)) + 1) / 2.
    """
    factors, scale = _factors(end, x)
    if len(factors) != 2 or not any(f is x for f in factors):
        return None
    gate = factors[1] if factors[0] is x else factors[0]
    node = gate.producer()
    if gate is x or node is None:
        return None
    if node.op_type == "Sigmoid" and node.inputs[0] is x and _near(scale, 1):
        return Activation("silu")
    if node.op_type == "HardSigmoid" and node.inputs[0] is x and _near(scale, 1):
        gate_of = unary_activation(node)
        return Activation("hardswish") if gate_of and _near(gate_of.alpha, 1 / 6) and _near(gate_of.beta, 0.5) else None
    if node.op_type == "Clip" and _near(scale, 1 / 6):
        clip, shift = unary_activation(node), _shifted(node.inputs[0], "Add")  # type: ignore[arg-type]
        fits = clip and (clip.alpha, clip.beta) == (0.0, 6.0) and shift and shift[0] is x and shift[1] == 3.0
        return Activation("hardswish") if fits else None
    shift = _shifted(gate, "Add")
    inner = shift[0].producer() if shift and shift[1] == 1.0 and _near(scale, 0.5) else None
    if inner is None or inner.op_type not in ("Erf", "Tanh") or inner.inputs[0] is None:
        return None
    argument, factor = _factors(inner.inputs[0], x)
    if len(argument) != 1:
        return None
    if inner.op_type == "Erf":
        return Activation("gelu") if argument[0] is x and _near(factor, math.sqrt(0.5)) else None
    fits = _near(factor, math.sqrt(2 / math.pi)) and _is_cubic(argument[0], x)
    return Activation("gelu_tanh") if fits else None


def _is_cubic(value: ir.Value, x: ir.Value) -> bool:
    """Whether `value` = x + 0.044715 x^3."""
    node = value.producer()
    if node is None or node.op_type != "Add" or not any(v is x for v in node.inputs):
        return False
    cubic = node.inputs[1] if node.inputs[0] is x else node.inputs[0]
    if cubic is None:
        return False
    factors, scale = _factors(cubic, x)
    if not _near(scale, 0.044715):
        return False
    if len(factors) == 1:
        power = factors[0].producer()
        return power is not None and power.op_type == "Pow" and power.inputs[0] is x and scalar(power.inputs[1]) == 3.0
    return len(factors) == 3 and all(f is x for f in factors)


def _cone(x: ir.Value) -> list[ir.Node]:
    """Nodes near behind `x` that a decomposed activation may consist of, nearest first."""
    found: list[ir.Node] = []
    frontier = [x]
    while frontier and len(found) < 2 * _CONE_NODES:
        value = frontier.pop(0)
        for node, _ in value.uses():
            if node.op_type in _CONE and node not in found:
                found.append(node)
                frontier.extend(node.outputs)
    return found


def _between(x: ir.Value, end: ir.Value) -> list[ir.Node] | None:
    """Nodes from `x` to `end`, or None if one of their values, or x, is read outside."""
    inside: list[ir.Node] = []
    pending = [end]
    while pending:
        node = pending.pop().producer()
        if node is None or node in inside:
            continue
        inside.append(node)
        if len(inside) > _CONE_NODES:
            return None
        pending.extend(v for v in node.inputs if v is not None and v is not x and v.const_value is None)
    for value in (x, *(v for node in inside for v in node.outputs)):
        if value is end:
            continue
        if value.is_graph_output() or any(node not in inside for node, _ in value.uses()):
            return None
    return inside if any(v is x for node in inside for v in node.inputs) else None


def find_activation(x: ir.Value) -> tuple[Activation, list[ir.Node], ir.Value] | None:
    """The activation applied to `x` and to nothing else of it: what, by which nodes, giving which value."""
    if x.is_graph_output():
        return None
    if len(x.uses()) > 1:
        for node in reversed(_cone(x)):
            if node.op_type in ("Mul", "Div"):
                activation = _decomposed(node.outputs[0], x)
                nodes = _between(x, node.outputs[0]) if activation else None
                if activation and nodes:
                    return activation, nodes, node.outputs[0]
        return None
    follower = only_consumer(x)
    if follower is None or follower.inputs[0] is not x:
        return None
    activation = unary_activation(follower)
    return (activation, [follower], follower.outputs[0]) if activation else None


def _residual(x: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """The Add of `x` and another computed value of the same shape."""
    node = only_consumer(x)
    if node is None or node.op_type != "Add":
        return None
    other = node.inputs[1] if node.inputs[0] is x else node.inputs[0]
    if other is None or other is x or other.const_value is not None or dims(other) != dims(x):
        return None
    return node, other


def _bias(x: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """The Add of `x` and a constant vector along its last axis."""
    node = only_consumer(x)
    if node is None or node.op_type != "Add":
        return None
    other = node.inputs[1] if node.inputs[0] is x else node.inputs[0]
    array = constant(other)
    last = dims(x)[-1]
    fits = array is not None and array.size == last and array.shape[-1] == last and array.ndim <= len(dims(x))
    return (node, other) if fits and other is not None else None


def past_views(value: ir.Value) -> tuple[list[ir.Node], ir.Value]:
    """The Reshapes that alone read `value`, one behind the other, and what the last one gives."""
    nodes: list[ir.Node] = []
    while True:
        node = only_consumer(value)
        if node is None or node.op_type not in VIEWS or node.inputs[0] is not value:
            return nodes, value
        nodes.append(node)
        value = node.outputs[0]


def fuse(
    main: ir.Node, taken: Set[ir.Node], *, bias: bool = False, residual: bool = True, activation: bool = True
) -> Group:
    """`main` with all that can be fused behind it; `taken`: nodes that other groups hold already."""

    value = main.outputs[0]
    nodes = [main]

    def find(search: Callable[[ir.Value], Any]) -> Any:
        """What `search` finds behind the value, or behind Reshapes of it, if no other group has it."""
        views, behind = past_views(value)
        for seen, at in (([], value), (views, behind)):
            found = search(at)
            if found is not None:
                more = found[1] if isinstance(found[1], list) else [found[0]]
                if taken.isdisjoint((*seen, *more)):
                    nodes.extend((*seen, *more))
                    return found
        return None

    found_bias = None
    if bias and (added := _bias(value)) and added[0] not in taken:
        nodes.append(added[0])
        found_bias, value = added[1], added[0].outputs[0]
    applied, kind, other = NONE, "none", None
    if activation and (found := find(find_activation)):
        applied, _, value = found
    if residual and (added := find(_residual)):
        kind = "after" if applied != NONE else "before"
        other, value = added[1], added[0].outputs[0]
        if activation and applied == NONE and (found := find(find_activation)):
            applied, _, value = found
    return Group(main, in_graph_order(nodes), value, found_bias, applied, kind, other)


def in_graph_order(nodes: Iterable[ir.Node]) -> tuple[ir.Node, ...]:
    """Nodes sorted by their position in the graph."""
    listed = list(nodes)
    if len(listed) < 2:
        return tuple(listed)
    wanted = set(listed)
    graph = listed[0].graph
    assert graph is not None
    return tuple(node for node in graph if node in wanted)
