"""Elementwise layers that nothing before them absorbed: two tensors, a tensor and a vector, an activation alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from sparsec.kernels import elementwise
from sparsec.kernels.base import roofline_us
from sparsec.lowering.match import Group, dims, find_activation, fuse, in_graph_order, unary_activation
from sparsec.lowering.rules.base import Context, Taken, dtype_of, emit_simple, float_input

_OPS: dict[str, Any] = {"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div"}


def take_binary(node: ir.Node, context: Context) -> Taken | str | None:
    """Add, Sub, Mul and Div where one side has the result's shape."""
    if node.op_type not in _OPS:
        return None
    a, b = float_input(node), node.inputs[1]
    if isinstance(a, str):
        return a
    assert b is not None
    out = dims(node.outputs[0])
    # A side that is a decomposed activation's own gate is taken with the whole activation.
    for value in (a, b):
        found = find_activation(value) if value.const_value is None else None
        if found and node in found[1] and len(found[1]) > 1 and context.taken.isdisjoint(found[1]):
            return _activation(found, value, context)
    swapped = dims(a) != out
    wide, narrow = (b, a) if swapped else (a, b)
    if dims(wide) != out or elementwise.spread(dims(wide), dims(narrow)) is None:
        return "its sides broadcast in a way no kernel of ours knows"
    group = fuse(node, context.taken, residual=False)
    call = elementwise.bind(
        context.machine, _OPS[node.op_type], a_shape=dims(wide), b_shape=dims(narrow), activation=group.activation, swapped=swapped
    )  # fmt: skip
    us = roofline_us(context.machine, float(np.prod(out)), 12.0 * float(np.prod(out)))
    return Taken(group, emit_simple(group, call, {"a": wide, "b": narrow}, "elementwise", us))


def take_activation(node: ir.Node, context: Context) -> Taken | str | None:
    """An activation by itself: one node, or the first of a decomposed one."""
    x = node.inputs[0] if node.inputs else None
    if x is None or x.const_value is not None or x.dtype is None or dtype_of(x) != "float32":
        return None
    found = find_activation(x)
    if found and node in found[1] and context.taken.isdisjoint(found[1]):
        return _activation(found, x, context)
    alone = unary_activation(node)
    if alone is None:
        return None
    return _activation((alone, [node], node.outputs[0]), x, context)


def _activation(found: tuple[Any, list[ir.Node], ir.Value], x: ir.Value, context: Context) -> Taken:
    activation, nodes, output = found
    ordered = in_graph_order(nodes)
    group = Group(ordered[0], ordered, output, activation=activation)
    size = int(np.prod(dims(x), dtype=np.int64))
    call = elementwise.bind_unary(context.machine, size=size, activation=activation)
    us = roofline_us(context.machine, 8.0 * size, 8.0 * size)
    return Taken(group, emit_simple(group, call, {"x": x}, activation.kind, us))
