"""Softmax and LayerNormalization over the last axis."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparsec.kernels import normalize
from sparsec.kernels.base import roofline_us
from sparsec.lowering.match import Group, attribute, constant, dims
from sparsec.lowering.rules.base import Context, Taken, emit_simple, float_input


def take_softmax(node: ir.Node, context: Context) -> Taken | str | None:
    """Softmax over the last axis that is not 1."""
    if node.op_type != "Softmax":
        return None
    x = float_input(node)
    if isinstance(x, str):
        return x
    shape = dims(x)
    axis = int(attribute(node, "axis", -1)) % len(shape)
    if any(extent != 1 for extent in shape[axis + 1 :]):
        return "a Softmax over an inner axis"
    count = shape[axis]
    rows = int(np.prod(shape[:axis], dtype=np.int64))
    group = Group(node, (node,), node.outputs[0])
    call = normalize.bind_softmax(context.machine, rows=rows, count=count)
    us = roofline_us(context.machine, 40.0 * rows * count, 20.0 * rows * count)
    return Taken(group, emit_simple(group, call, {"x": x}, "softmax", us))


def take_layernorm(node: ir.Node, context: Context) -> Taken | str | None:
    """LayerNormalization over the last axis, with constant scale and shift, whose statistics nobody reads."""
    if node.op_type != "LayerNormalization":
        return None
    x = float_input(node)
    if isinstance(x, str):
        return x
    shape = dims(x)
    axis = int(attribute(node, "axis", -1)) % len(shape)
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return "its mean or deviation is used"
    count = int(np.prod(shape[axis:], dtype=np.int64))
    gamma = constant(node.inputs[1])
    shift = node.inputs[2] if len(node.inputs) > 2 else None
    beta = constant(shift)
    if gamma is None or (shift is not None and beta is None):
        return "its scale or shift is computed"
    if gamma.size != count or (beta is not None and beta.size != count):
        return "its scale or shift broadcasts"
    rows = int(np.prod(shape[:axis], dtype=np.int64))
    group = Group(node, (node,), node.outputs[0])
    call = normalize.bind_layernorm(
        context.machine, rows=rows, gamma=gamma.reshape(-1), beta=None if beta is None else beta.reshape(-1),
        epsilon=float(attribute(node, "epsilon", 1e-5)),
    )  # fmt: skip
    us = roofline_us(context.machine, 8.0 * rows * count, 16.0 * rows * count)
    return Taken(group, emit_simple(group, call, {"x": x}, "layer normalization", us))
