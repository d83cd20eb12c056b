"""Fold per-channel affine maps into the layer before them.

With g = scale / sqrt(var + epsilon), h = bias - mean * g, BatchNormalization at inference is y = g * x + h per channel.
So are Mul, Div, Add and Sub by a constant of one value a channel (or one for all). Behind a layer z = W * x + b

    g * (W * x + b) + h = (g * W) * x + (g * b + h)            g scales the rows (output channels) of W

and the node disappears (Jacob et al. 2018, arXiv:1712.05877, section 3.2). A BatchNormalization without such a layer
before it becomes Mul and Add. g and h are computed in float64 and rounded once.

Folded into: Conv and Gemm with a constant weight whose output has no other reader. Never changed: a layer that would
need a second copy of a shared weight, a quantized layer (its weight is not a constant), a layer whose output is a graph
output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsec.passes.initializers import add_initializer
from sparsec.passes.layers import WeightedLayer, as_layer
from sparsec.passes.normalization.fold_constants import constant, remove_unused_initializers, static_shape
from sparsec.rewriting.passes_api import Context, Pass, PassResult

AFFINE = ("Mul", "Div", "Add", "Sub")


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold BatchNormalization and per-channel Mul, Div, Add, Sub into the Conv or Gemm before them."""

    name: ClassVar[str] = "fold-batch-norm"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> PassResult:
        folded, expanded = [], []
        for node in list(model.graph):
            affine = _affine(node)
            if affine is None or not (np.isfinite(affine[1]).all() and np.isfinite(affine[2]).all()):
                continue
            x, g, h = affine
            layer = _foldable_layer(x, g)
            if layer is not None:
                _fold(model.graph, layer, node, g, h)
                folded.append({"node": node.name, "into": layer.name})
            elif node.op_type == "BatchNormalization":
                _expand(model.graph, node, x, g, h)
                expanded.append(node.name)
        if folded or expanded:
            remove_unused_initializers(model.graph)
            Context.of(model).records.append({"folded": folded, "to_mul_add": expanded})
        return PassResult(model, bool(folded or expanded))


def _affine(node: ir.Node) -> tuple[ir.Value, np.ndarray, np.ndarray] | None:
    """x, g, h of y = g * x + h with one value a channel (axis 1), in float64; None if the node is none such."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "BatchNormalization":
        return _batch_norm(node)
    if node.op_type not in AFFINE:
        return None
    a, b = node.inputs
    x, c = (a, constant(b)) if constant(b) is not None else (b, constant(a))
    if c is None or x is None or not np.issubdtype(c.dtype, np.floating):
        return None
    shape = static_shape(x)
    if shape is None or len(shape) < 2 or shape != static_shape(node.outputs[0]):
        return None
    channels = _per_channel(c.astype(np.float64), shape)
    if channels is None:
        return None
    one, zero = np.ones_like(channels), np.zeros_like(channels)
    if node.op_type == "Mul":
        return x, channels, zero
    if node.op_type == "Add":
        return x, one, channels
    if node.op_type == "Sub":
        return (x, one, -channels) if x is a else (x, -one, channels)
    if x is a and (channels != 0).all():
        return x, 1 / channels, zero
    return None


def _per_channel(c: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """`c` as [C] if it broadcasts against `shape` along the channel axis only."""
    full = (1,) * (len(shape) - c.ndim) + c.shape
    if any(d != 1 for axis, d in enumerate(full) if axis != 1):
        return None
    return np.broadcast_to(c.reshape(full[1]), (shape[1],)).copy()


def _batch_norm(node: ir.Node) -> tuple[ir.Value, np.ndarray, np.ndarray] | None:
    x = node.inputs[0]
    parts = [constant(v) for v in node.inputs[1:5]]
    if x is None or any(p is None for p in parts) or node.attributes.get_int("training_mode", 0):
        return None
    if any(y.uses() or y.is_graph_output() for y in node.outputs[1:]):
        return None
    scale, bias, mean, var = (np.asarray(p, np.float64) for p in parts)
    g = scale / np.sqrt(var + node.attributes.get_float("epsilon", 1e-5))
    return x, g, bias - mean * g


def _foldable_layer(x: ir.Value, g: np.ndarray) -> WeightedLayer | None:
    node = x.producer()
    if node is None or x.is_graph_output() or len(x.uses()) != 1 or node.op_type not in ("Conv", "Gemm"):
        return None
    layer = as_layer(node)
    if not isinstance(layer, WeightedLayer) or layer.shape[0] != g.size:
        return None
    if len(layer.weight.uses()) != 1 and (g != 1).any():
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and constant(bias) is None:
        return None
    if node.op_type == "Gemm" and bias is not None and _per_channel(constant(bias), (1, g.size)) is None:
        return None
    return layer


def _fold(graph: ir.Graph, layer: WeightedLayer, node: ir.Node, g: np.ndarray, h: np.ndarray) -> None:
    owner, dtype = layer.node, layer.weight.const_value.dtype
    if (g != 1).any():
        layer.write((layer.read() * g[:, None, None, None]).astype(dtype.numpy()))
    old = owner.inputs[2] if len(owner.inputs) > 2 else None
    b = np.zeros(g.size) if old is None else np.broadcast_to(constant(old).astype(np.float64).reshape(-1), (g.size,))
    # Gemm is alpha * A @ B + beta * C; alpha scales W * x, which g has scaled already.
    beta = owner.attributes.get_float("beta", 1.0) if owner.op_type == "Gemm" else 1.0
    bias = (g * b * beta + h).astype(dtype.numpy())
    if owner.op_type == "Gemm" and beta != 1.0:
        owner.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
    value = add_initializer(graph, f"{owner.name}_bias", bias, dtype)
    if len(owner.inputs) < 3:
        owner.resize_inputs(3)
    owner.replace_input_with(2, value)
    _take_over(graph, owner.outputs[0], node)


def _take_over(graph: ir.Graph, x: ir.Value, node: ir.Node) -> None:
    """`x` replaces the output of `node` under its name, and `node` disappears."""
    y = node.outputs[0]
    name = y.name
    y.name = f"{name}__folded"
    y.replace_all_uses_with(x, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    x.name = name


def _expand(graph: ir.Graph, node: ir.Node, x: ir.Value, g: np.ndarray, h: np.ndarray) -> None:
    y, dtype = node.outputs[0], x.dtype
    shape = (1, g.size) + (1,) * (len(x.shape) - 2)
    scale = add_initializer(graph, f"{node.name}_scale", g.reshape(shape).astype(dtype.numpy()), dtype)
    shift = add_initializer(graph, f"{node.name}_shift", h.reshape(shape).astype(dtype.numpy()), dtype)
    mul = ir.node("Mul", [x, scale], name=f"{node.name}_mul")
    add = ir.node("Add", [mul.outputs[0], shift], name=node.name)
    for value, name in ((mul.outputs[0], f"{y.name}_scaled"), (add.outputs[0], y.name)):
        value.name, value.shape, value.type = name, y.shape, y.type
    graph.insert_before(node, [mul, add])
    y.name = f"{y.name}__expanded"
    y.replace_all_uses_with(add.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
