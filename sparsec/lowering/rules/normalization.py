"""Softmax and LayerNormalization over the last axis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sparsec.kernels import normalize
from sparsec.kernels.base import roofline_us
from sparsec.lowering.match import Group, attribute, constant, dims
from sparsec.lowering.rules.base import Context, Taken, emit_simple, float_input


def read_softmax(node: ir.Node) -> tuple[ir.Value, int, int] | str:
    """x, rows and their length of a Softmax over the last axis that is not 1; or why not."""
    x = float_input(node)
    if isinstance(x, str):
        return x
    shape = dims(x)
    axis = int(attribute(node, "axis", -1)) % len(shape)
    if any(extent != 1 for extent in shape[axis + 1 :]):
        return "a Softmax over an inner axis"
    count = shape[axis]
    return x, int(np.prod(shape[:axis], dtype=np.int64)), count


def take_softmax(node: ir.Node, context: Context) -> Taken | str | None:
    """Softmax over the last axis that is not 1."""
    if node.op_type != "Softmax":
        return None
    read = read_softmax(node)
    if isinstance(read, str):
        return read
    x, rows, count = read
    group = Group(node, (node,), node.outputs[0])
    call = normalize.bind_softmax(context.machine, rows=rows, count=count)
    us = roofline_us(context.machine, 40.0 * rows * count, 20.0 * rows * count)
    return Taken(group, emit_simple(group, call, {"x": x}, "softmax", us))


@dataclass(frozen=True)
class Normalization:
    """x [rows, len(gamma)], normalized row by row."""

    x: ir.Value
    rows: int
    gamma: np.ndarray
    beta: np.ndarray | None
    epsilon: float


def read_normalization(node: ir.Node) -> Normalization | str:
    """A normalization over the last axes, with constant scale and shift, whose statistics nobody reads; or why not."""
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
    epsilon = float(attribute(node, "epsilon", 1e-5))
    return Normalization(x, rows, gamma.reshape(-1), None if beta is None else beta.reshape(-1), epsilon)


def take_layernorm(node: ir.Node, context: Context) -> Taken | str | None:
    """LayerNormalization over the last axes."""
    if node.op_type != "LayerNormalization":
        return None
    read = read_normalization(node)
    if isinstance(read, str):
        return read
    group = Group(node, (node,), node.outputs[0])
    call = normalize.bind_layernorm(
        context.machine, rows=read.rows, gamma=read.gamma, beta=read.beta, epsilon=read.epsilon
    )
    size = read.rows * read.gamma.size
    us = roofline_us(context.machine, 8.0 * size, 16.0 * size)
    return Taken(group, emit_simple(group, call, {"x": read.x}, "layer normalization", us))
