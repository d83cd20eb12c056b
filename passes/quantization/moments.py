"""Mean and variance of every channel without data, for the bias correction of models that come without any.

Each channel is taken for normal, N(m, v), and channels for independent. Then, from an input that preprocessing brought
to N(0, 1) and through the operators that say how both change,

    Conv, Gemm, MatMul       m = W m + b            v = W^2 v
    LayerNormalization       m = beta               v = gamma^2       (whatever came before)
    Add                      m = m1 + m2            v = v1 + v2
    Relu, Clip, Sigmoid, ... of x ~ N(m, v)         m = E f(x),  v = Var f(x): the clipped normal of the paper
    average pools            m                      v / window
    changes of layout        m                      v

A layer whose weight w is rounded to q moves its output's mean by (w - q) m of its input, which its bias takes back. Any
other operator, a maximum, a product of two activations, leaves what is behind it unknown: those layers are not corrected,
until the next LayerNormalization. (The paper reads m and v off the BatchNorm in front; here that is folded away by then.)

Nagel et al. 2019, arXiv:1906.04721, section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
import onnx_ir as ir

from sparsec.passes.layers import WeightedLayer, as_layer
from sparsec.passes.normalization.fold_constants import constant, static_shape
from sparsec.passes.quantization.equalize import kept_axis

LAYOUT = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
POINTS = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)])  # equally likely pieces of N(0, 1)

Function = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Normal:
    """`mean`, `variance` [C] of the channels along `axis`."""

    mean: np.ndarray = field(repr=False)
    variance: np.ndarray = field(repr=False)
    axis: int

    def through(self, function: Function) -> Normal:
        """Of f(x), x ~ N(mean, variance)."""
        y = function(self.mean[:, None] + np.sqrt(self.variance)[:, None] * POINTS)
        return Normal(y.mean(axis=1), y.var(axis=1), self.axis)


def expected_inputs(model: ir.Model) -> dict[str, np.ndarray]:
    """Layer name -> mean [IC] of what a Gemm or MatMul reads, [IC of all groups] of a Conv; only where it is known."""
    known: dict[ir.Value, Normal] = {}
    for value in model.graph.inputs:
        shape = static_shape(value)
        if shape is not None and len(shape) > 1 and value.dtype == ir.DataType.FLOAT:
            axis = 1 if len(shape) > 3 else len(shape) - 1
            known[value] = Normal(np.zeros(shape[axis]), np.ones(shape[axis]), axis)
    found: dict[str, np.ndarray] = {}
    for node in model.graph:
        layer, x = as_layer(node), node.inputs[0] if node.inputs else None
        before = known.get(x) if x is not None else None
        if isinstance(layer, WeightedLayer):
            if before is None or layer.input_index != 1 or before.axis != _input_axis(layer):
                continue
            found[layer.name] = before.mean
            after = _product(layer, before)
        else:
            after = _after(node, before, known)
        if after is not None and len(node.outputs) == 1 and _fits(node.outputs[0], after):
            known[node.outputs[0]] = after
    return found


def _input_axis(layer: WeightedLayer) -> int:
    value = layer.node.inputs[0]
    shape = static_shape(value) if value is not None else None
    if layer.op == "Conv" or shape is None:
        return 1
    return len(shape) - (2 if layer.op == "Gemm" and layer.node.attributes.get_int("transA", 0) else 1)


def _fits(value: ir.Value, found: Normal) -> bool:
    shape = static_shape(value)
    return shape is not None and found.axis < len(shape) and shape[found.axis] == len(found.mean)


def _product(layer: WeightedLayer, x: Normal) -> Normal | None:
    weight = layer.read().astype(np.float64).sum(axis=(2, 3))  # pixels of a kernel have one mean
    square = np.square(layer.read().astype(np.float64)).sum(axis=(2, 3))
    groups = layer.groups
    if len(x.mean) != groups * weight.shape[1]:
        return None
    mean, variance = (
        np.einsum("gnk,gk->gn", m.reshape(groups, -1, m.shape[1]), v.reshape(groups, -1)).reshape(-1)
        for m, v in ((weight, x.mean), (square, x.variance))
    )
    bias = layer.node.inputs[2] if layer.op != "MatMul" and len(layer.node.inputs) > 2 else None
    if bias is not None:
        array = constant(bias)
        if array is None or array.size != len(mean):
            return None
        mean = mean + array.reshape(-1)
    shape = static_shape(layer.node.outputs[0])
    return None if shape is None else Normal(mean, variance, 1 if layer.op == "Conv" else len(shape) - 1)


def _after(node: ir.Node, x: Normal | None, known: Mapping[ir.Value, Normal]) -> Normal | None:
    op, inputs = node.op_type, node.inputs
    if node.domain not in ("", "ai.onnx"):
        return None
    if op == "LayerNormalization":
        return _normalized(node)
    if op in ("Add", "Sub", "Mul", "Div"):
        return _binary(node, known)
    if x is None:
        return None
    function = _function(node)
    if function is not None:
        return x.through(function)
    data = inputs[0]
    before, after = static_shape(data) if data is not None else None, static_shape(node.outputs[0])
    if before is None or after is None:
        return None
    if op in LAYOUT:
        axis = kept_axis(before, after, x.axis)
        return None if axis is None else Normal(x.mean, x.variance, axis)
    if op == "Transpose":
        order = list(node.attributes.get_ints("perm", None) or range(len(before))[::-1])
        return Normal(x.mean, x.variance, order.index(x.axis))
    if op in ("AveragePool", "GlobalAveragePool") and x.axis == 1:
        window = np.prod(node.attributes.get_ints("kernel_shape", before[2:]))
        return Normal(x.mean, x.variance / window, 1)
    return None


def _normalized(node: ir.Node) -> Normal | None:
    shape = static_shape(node.outputs[0])
    gamma, beta = (constant(v) if v is not None else None for v in ([*node.inputs[1:], None, None])[:2])
    if (
        shape is None
        or gamma is None
        or gamma.ndim != 1
        or node.attributes.get_int("axis", -1) not in (-1, len(shape) - 1)
    ):
        return None
    mean = np.zeros(gamma.size) if beta is None else beta.astype(np.float64)
    return Normal(mean, np.square(gamma.astype(np.float64)), len(shape) - 1)


def _binary(node: ir.Node, known: Mapping[ir.Value, Normal]) -> Normal | None:
    a, b = node.inputs[:2]
    if a is None or b is None:
        return None
    first, second = known.get(a), known.get(b)
    if first is not None and second is not None:
        same = first.axis == second.axis and static_shape(a) == static_shape(b)
        if node.op_type not in ("Add", "Sub") or not same or a is b:
            return None
        sign = 1 if node.op_type == "Add" else -1
        return Normal(first.mean + sign * second.mean, first.variance + second.variance, first.axis)
    x, other = (first, constant(b)) if first is not None else (second, constant(a))
    value = a if first is not None else b
    if x is None or other is None or (first is None and node.op_type in ("Sub", "Div")):
        return None
    vector = _along(other, static_shape(value), x)
    if vector is None:
        return None
    if node.op_type in ("Add", "Sub"):
        return Normal(x.mean + (vector if node.op_type == "Add" else -vector), x.variance, x.axis)
    factor = vector if node.op_type == "Mul" else 1 / vector
    return Normal(x.mean * factor, x.variance * factor**2, x.axis)


def _along(array: np.ndarray, shape: tuple[int, ...] | None, x: Normal) -> np.ndarray | None:
    """A constant operand as one number a channel; None if it varies along another axis."""
    if shape is None or array.ndim > len(shape):
        return None
    wide = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    if any(d != 1 for i, d in enumerate(wide.shape) if i != x.axis):
        return None
    return np.broadcast_to(wide.reshape(-1).astype(np.float64), x.mean.shape)


def _function(node: ir.Node) -> Function | None:
    attributes = node.attributes
    if node.op_type == "Clip":
        low, high = ([constant(v) if v is not None else None for v in node.inputs[1:]] + [None, None])[:2]
        missing = [v for v in node.inputs[1:] if v is not None and constant(v) is None]
        least = -np.inf if low is None else float(low.reshape(-1)[0])
        most = np.inf if high is None else float(high.reshape(-1)[0])
        return None if missing else lambda x: np.clip(x, least, most)
    slope = attributes.get_float("alpha", 0.01)
    functions: dict[str, Function] = {
        "Relu": lambda x: np.maximum(x, 0),
        "LeakyRelu": lambda x: np.where(x > 0, x, slope * x),
        "Sigmoid": lambda x: 1 / (1 + np.exp(-np.clip(x, -80, 80))),
        "Tanh": np.tanh,
        "HardSwish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
        "HardSigmoid": lambda x: np.clip(
            attributes.get_float("alpha", 0.2) * x + attributes.get_float("beta", 0.5), 0, 1
        ),
    }
    return functions.get(node.op_type)
