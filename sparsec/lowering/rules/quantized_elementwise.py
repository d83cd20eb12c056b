"""Elementwise layers between integers: tables, two quantized tensors combined, and the ends of a quantized part.

    lookup      q -> DequantizeLinear -> f [-> g ...] -> QuantizeLinear     whatever q alone decides is a table of 256 bytes
    binary      DequantizeLinear, DequantizeLinear or constant -> Add | Sub | Mul | Div [activation] -> QuantizeLinear
    quantize, dequantize                                                    what is left over, beside layers in float32

A lookup is a cone of operators with constants of one element, QuantizeLinear, DequantizeLinear and Reshape among them:
x sigmoid(x) is one, quantized in between or not. ONNX Runtime computes the table node by node, so it holds what ONNX defines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from sparsec.kernels import elementwise_int8, lookup_int8, quantize_int8
from sparsec.kernels.base import roofline_us
from sparsec.kernels.elementwise_int8 import Side
from sparsec.kernels.quantized import Requantize
from sparsec.lowering.generic import ELEMENTWISE
from sparsec.lowering.match import VIEWS, Group, constant, dims, in_graph_order
from sparsec.lowering.quantized import QuantGroup, fuse_quantized, source, type_of
from sparsec.lowering.rules.base import Context, Taken, emit_simple
from sparsec.passes.normalization.fold_constants import quiet_session

_OPS: dict[str, Any] = {"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div"}
_WITHIN = ELEMENTWISE | {"QuantizeLinear", "DequantizeLinear", *VIEWS}  # what a cone consists of
_MOST = 32  # nodes of a cone


def _size(value: ir.Value) -> int:
    return int(np.prod(dims(value), dtype=np.int64))


# --- tables ----------------------------------------------------------------------------------------------------------


def take_lookup(node: ir.Node, context: Context) -> Taken | str | None:
    """A node behind DequantizeLinear, with all behind it that the same integers decide, up to a QuantizeLinear."""
    root = _root(node)
    if root is None:
        return None
    for end in reversed(_ends(node)):
        found = _cone(root, end, node)
        if found is None or not context.taken.isdisjoint(found[0]):
            continue
        nodes, through = found
        try:
            table = _table(root, nodes, through, end)
        except Exception as error:  # whatever ONNX Runtime has no kernel for; it names no class of its own
            return f"ONNX Runtime cannot compute its table: {str(error).splitlines()[0][:200]}"
        y, ordered = type_of(end), in_graph_order(nodes)
        group = QuantGroup(node, ordered, end.outputs[0], steps=Requantize(y), through=in_graph_order(through))
        size = _size(root)
        assert root.dtype is not None
        call = lookup_int8.bind(context.machine, size=size, table=table, x_type=str(root.dtype.numpy()))
        us = roofline_us(context.machine.single(), 0.25 * size, 2.0 * size)
        return Taken(group, emit_simple(group, call, {"x": root}, "table of 256 bytes", us))
    return None


def _root(node: ir.Node) -> ir.Value | None:
    """The integers of which alone `node` is a function, directly behind their DequantizeLinear."""
    if node.op_type != "QuantizeLinear" and node.op_type not in ELEMENTWISE:
        return None
    found = {value: source(value) for value in node.inputs if value is not None and constant(value) is None}
    roots = {s.value for s in found.values() if s is not None}
    return roots.pop() if len(roots) == 1 and None not in found.values() else None


def _ends(node: ir.Node) -> list[ir.Node]:
    """QuantizeLinear nodes to 8 bits at and behind `node`, nearest first."""
    seen, frontier = [node], [node]
    while frontier and len(seen) <= _MOST:
        for reader, _ in frontier.pop(0).outputs[0].uses():
            if reader not in seen and reader.op_type in _WITHIN:
                seen.append(reader)
                frontier.append(reader)
    return [n for n in seen if n.op_type == "QuantizeLinear" and type_of(n) is not None]


def _cone(root: ir.Value, end: ir.Node, first: ir.Node) -> tuple[list[ir.Node], list[ir.Node]] | None:
    """The nodes from `root`'s DequantizeLinear nodes (given apart) to `end`, `first` among them.

    None if anything else but constants of one element flows in, a value inside is read outside, or the number of elements
    changes: while it does not, elements keep their order.
    """
    size = _size(root)
    nodes: list[ir.Node] = []
    doors: list[ir.Node] = []
    pending = [end]
    while pending:
        node = pending.pop()
        if node in nodes:
            continue
        if (
            node.op_type not in _WITHIN
            or len(node.outputs) != 1
            or _size(node.outputs[0]) != size
            or len(nodes) == _MOST
        ):
            return None
        nodes.append(node)
        for value in node.inputs[:1] if node.op_type in VIEWS else node.inputs:
            array = constant(value)
            if value is None or (array is not None and array.size == 1):
                continue
            maker = value.producer()
            if array is not None or maker is None:
                return None
            known = source(value)
            if known is not None and known.value is root:
                if maker not in doors:
                    doors.append(maker)
            else:
                pending.append(maker)
    for node in nodes:
        value = node.outputs[0]
        if node is not end and (value.is_graph_output() or any(reader not in nodes for reader, _ in value.uses())):
            return None
    return (nodes, doors) if first in nodes else None


def _table(root: ir.Value, nodes: list[ir.Node], doors: list[ir.Node], end: ir.Node) -> np.ndarray:
    """What the cone makes of each of the 256 bytes, taken as unsigned for their place: [256] of the result's type."""
    graph = end.graph
    assert graph is not None and root.dtype is not None and end.outputs[0].dtype is not None
    ordered = in_graph_order([*doors, *nodes])
    read = [value for node in ordered for value in (node.inputs[:1] if node.op_type in VIEWS else node.inputs)]
    fixed = {value: constant(value) for value in read if value is not None}
    tensors = [
        onnx.numpy_helper.from_array(array.reshape(()), str(value.name))
        for value, array in fixed.items()
        if array is not None
    ]
    info = [
        onnx.helper.make_tensor_value_info(str(v.name), int(v.dtype), [256])  # type: ignore[arg-type]
        for v in (root, end.outputs[0])
    ]
    computed = [
        onnx.helper.make_node("Identity", [str(node.inputs[0].name)], [str(node.outputs[0].name)])  # type: ignore[union-attr]
        if node.op_type in VIEWS
        else ir.to_proto(node)
        for node in ordered
    ]
    proto = onnx.helper.make_graph(computed, "table", info[:1], info[1:], tensors)
    opset = onnx.helper.make_opsetid("", graph.opset_imports.get("", 21))
    model = onnx.helper.make_model(proto, opset_imports=[opset], ir_version=10)
    x = np.arange(256, dtype=np.uint8).view(root.dtype.numpy())
    (found,) = quiet_session(model.SerializeToString()).run(None, {str(root.name): x})
    return np.asarray(found)


# --- two tensors -----------------------------------------------------------------------------------------------------


def take_quantized_binary(node: ir.Node, context: Context) -> Taken | str | None:
    """Add, Sub, Mul and Div of two quantized tensors, or of one and a constant, quantized again."""
    if node.op_type not in _OPS:
        return None
    a, b = _operand(node.inputs[0]), _operand(node.inputs[1])
    if a is None or b is None or (a.through is None and b.through is None):
        return None
    through = tuple(operand.through for operand in (a, b) if operand.through is not None)
    group = fuse_quantized(node, context.taken, through=through, residual=False)
    if group.steps.y is None:
        return "its result is not quantized"
    op = _OPS[node.op_type]
    call = elementwise_int8.bind(context.machine, op, sides=(a.side, b.side), steps=group.steps)
    size = float(_size(node.outputs[0]))
    us = roofline_us(context.machine.single(), 6.0 * size, 3.0 * size)
    inputs = {role: operand.value for role, operand in zip("ab", (a, b), strict=True) if operand.side.type is not None}
    return Taken(group, emit_simple(group, call, inputs, f"{op} in 8 bits", us))


@dataclass(frozen=True)
class _Operand:
    """A side, and the value of its integers; `through`: the DequantizeLinear that is read past, if they are computed."""

    side: Side
    value: ir.Value
    through: ir.Node | None = None


def _operand(value: ir.Value | None) -> _Operand | None:
    """Integers behind `value`, computed or constant, or constant floats; None for computed floats."""
    if value is None:
        return None
    found, array = source(value), constant(value)
    if found is not None:
        return _Operand(Side(dims(value), found.type), found.value, found.through)
    if array is None or array.dtype != np.float32 or not np.isfinite(array).all():
        return None
    node = value.producer()
    stored = node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else None
    kind = type_of(node) if node is not None and stored is not None else None
    if stored is not None and kind is not None:
        return _Operand(Side(array.shape, kind), stored)
    return _Operand(Side(array.shape, None, array), value)


# --- into and out of integers ----------------------------------------------------------------------------------------


def take_quantize(node: ir.Node, context: Context) -> Taken | str | None:
    """QuantizeLinear of float32 with one constant scale, to 8 bits."""
    if node.op_type != "QuantizeLinear":
        return None
    x, y = node.inputs[0], type_of(node)
    if x is None or x.const_value is not None or x.dtype != ir.DataType.FLOAT or y is None:
        return "only float32 is quantized, to 8 bits with one constant scale"
    size = _size(x)
    call = quantize_int8.bind_quantize(context.machine, size=size, y=y)
    return _converted(node, x, call, f"to {y.dtype}", size, context)


def take_dequantize(node: ir.Node, context: Context) -> Taken | str | None:
    """DequantizeLinear of computed 8-bit integers with one constant scale; in vain where all readers read past it."""
    if node.op_type != "DequantizeLinear":
        return None
    known = source(node.outputs[0])
    if known is None or node.outputs[0].dtype != ir.DataType.FLOAT:
        return "only computed 8 bits with one constant scale are dequantized"
    size = _size(known.value)
    call = quantize_int8.bind_dequantize(context.machine, size=size, x=known.type)
    return _converted(node, known.value, call, f"from {known.type.dtype}", size, context)


def _converted(node: ir.Node, x: ir.Value, call: Any, reason: str, size: int, context: Context) -> Taken:
    group = Group(node, (node,), node.outputs[0])
    us = roofline_us(context.machine.single(), 4.0 * size, 5.0 * size)
    return Taken(group, emit_simple(group, call, {"x": x}, reason, us, element="float32"))
