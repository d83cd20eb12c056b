"""Bring QuantizeLinear and DequantizeLinear, as exporters write them, to one form.

With DQ(q; s, z) = (q - z) * s and Q(x; s, z) = saturate(round(x / s) + z), which invert each other on stored values:

    parameters     zero points explicit, one value per tensor as a scalar, one zero point for each scale
    weights        DQ(w; s, z), w uint8 = DQ(w - 128; s, z - 128), int8 (the same by 8 for uint4)
                   f(DQ(w)), f a change of layout = DQ(f(w)), the axis of the scales moved with it
    activations    Q(DQ(q; s, z); s, z) = q;  two Q of one value, two DQ of one q, with equal s and z are one
                   f(q) read by DQ(s, z), f moving or selecting values = Q(f(DQ(q; s, z)); s, z)
    padding        Q(Pad(x, 0)) = Pad of the stored values, so x is quantized first and the Pad stands behind the DQ, where
                   `explicit-pads` finds it

All exact, up to the rounding that ONNX Runtime's own fusions may place otherwise (a step of one scale).

Left alone: activations with a scale for each channel, 16 bit types, a layout change that mixes the axis of the scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from sparsec.passes.initializers import add_initializer
from sparsec.passes.normalization.explicit_pads import spatial_zero_pad
from sparsec.passes.normalization.fold_constants import constant, remove_unused_initializers, static_shape
from sparsec.rewriting.passes_api import Context, Pass, PassResult

# Unsigned type -> its signed one, and how far stored values move.
SIGNED = {ir.DataType.UINT8: (ir.DataType.INT8, 128), ir.DataType.UINT4: (ir.DataType.INT4, 8)}

LAYOUT = ("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze")

# Operators that only move or select what they read first, whole numbers as well as real ones.
MOVES = (*LAYOUT, "DepthToSpace", "Expand", "Gather", "MaxPool", "Slice", "SpaceToDepth", "Split", "Tile")

SMALLEST = 2.0**-100  # below, s * 255 / s need not be 255


@dataclass(frozen=True)
class NormalizeQdq(Pass):
    """Bring QuantizeLinear and DequantizeLinear, as exporters write them, to one form."""

    name: ClassVar[str] = "normalize-qdq"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        if not any(_is(node, "QuantizeLinear", "DequantizeLinear") for node in graph):
            return PassResult(model, False)
        counts: dict[str, int] = {}
        for what, step in _STEPS:
            if done := step(graph):
                counts[what] = counts.get(what, 0) + done
        if counts:
            common.RemoveUnusedNodesPass()(model)
            remove_unused_initializers(graph)
            common.TopologicalSortPass()(model)
            Context.of(model).records.append(dict(counts))
        return PassResult(model, bool(counts))


def _is(node: ir.Node | None, *kinds: str) -> bool:
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in kinds


@dataclass(frozen=True)
class Quantization:
    """Scale and zero point of one value, per tensor, and where they are stored."""

    scale: float
    zero_point: int
    kind: ir.DataType
    values: tuple[ir.Value, ir.Value]


def quantization(node: ir.Node | None) -> Quantization | None:
    """What a QuantizeLinear or DequantizeLinear of one scale does; None for any other node."""
    if node is None or not _is(node, "QuantizeLinear", "DequantizeLinear") or len(node.inputs) < 3:
        return None
    scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
    if scale is None or zero is None or scale.size != 1 or zero.size != 1 or scale.dtype != np.float32:
        return None
    s = float(scale.reshape(-1)[0])
    kind, point = node.inputs[2], int(zero.reshape(-1)[0])
    if not s > SMALLEST or not np.isfinite(s) or kind is None or kind.dtype is None or node.inputs[1] is None:
        return None
    return Quantization(s, point, kind.dtype, (node.inputs[1], kind))


def same(a: Quantization | None, b: Quantization | None) -> bool:
    """Whether both are there and mean the same."""
    return a is not None and b is not None and (a.scale, a.zero_point, a.kind) == (b.scale, b.zero_point, b.kind)


# ---- parameters


def _parameters(graph: ir.Graph, node: ir.Node) -> bool:
    """Zero point explicit; scale and zero point of one value are scalars, else both of the scale's shape."""
    if not _is(node, "QuantizeLinear", "DequantizeLinear") or node.inputs[0] is None or node.inputs[1] is None:
        return False
    scale = constant(node.inputs[1])
    if scale is None:
        return False
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    kind = zero.dtype if zero is not None else _stored_type(node)
    points = np.zeros((), np.int64) if zero is None else constant(zero)
    if kind is None or not kind.is_integer() or points is None:
        return False
    single = scale.size == points.size == 1 and not node.attributes.get_int("block_size", 0)
    shape = () if single else points.shape if points.size > scale.size else scale.shape
    surplus = [name for name in ("output_dtype", "axis") if name in node.attributes and (single or name != "axis")]
    for name in surplus:
        del node.attributes[name]
    changed = bool(surplus)
    for index, (array, what, dtype) in enumerate(
        ((scale, "scale", node.inputs[1].dtype), (points, "zero_point", kind))
    ):
        if array.shape != shape or (index == 1 and zero is None):
            wide = array.reshape(shape) if array.size > 1 else np.full(shape, array.reshape(-1)[0])
            value = add_initializer(graph, _beside(node, what), wide.astype(dtype.numpy()), dtype)
            if len(node.inputs) < 3:
                node.resize_inputs(3)
            node.replace_input_with(1 + index, value)
            changed = True
    return changed


def _stored_type(node: ir.Node) -> ir.DataType | None:
    if _is(node, "DequantizeLinear"):
        return node.inputs[0].dtype if node.inputs[0] is not None else None
    given = node.attributes.get_int("output_dtype", 0)
    return ir.DataType(given) if given else ir.DataType.UINT8


def _beside(node: ir.Node, what: str) -> str:
    return f"{node.name}/{what}"


# ---- weights


def _signed_weight(graph: ir.Graph, node: ir.Node) -> bool:
    """uint8 constants as int8: both ends of a difference move by 128."""
    if not _is(node, "DequantizeLinear") or len(node.inputs) < 3:
        return False
    w, zero = node.inputs[0], node.inputs[2]
    array, points = constant(w), constant(zero)
    if w is None or zero is None or array is None or points is None or w.dtype not in SIGNED or zero.dtype != w.dtype:
        return False
    kind, half = SIGNED[w.dtype]

    def moved(values: np.ndarray) -> np.ndarray:
        return np.asarray((values.astype(np.int16) - half).astype(kind.numpy()), order="C")

    node.replace_input_with(0, add_initializer(graph, f"{w.name}_signed", moved(array), kind))
    node.replace_input_with(2, add_initializer(graph, f"{zero.name}_signed", moved(points), kind))
    return True


def _weight_layout(graph: ir.Graph, node: ir.Node) -> bool:
    """A Transpose, Reshape, ... of a dequantized constant becomes one of the constant."""
    if not _is(node, *LAYOUT) or any(constant(v) is None for v in node.inputs[1:] if v is not None):
        return False
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    shape = static_shape(node.outputs[0])
    if source is None or not _is(source, "DequantizeLinear") or shape is None or node.outputs[0].is_graph_output():
        return False
    w, scale = source.inputs[0], constant(source.inputs[1])
    array = constant(w)
    if w is None or array is None or scale is None or source.attributes.get_int("block_size", 0):
        return False
    order = node.attributes.get_ints("perm", None) or list(range(array.ndim))[::-1]
    attributes = {}
    if scale.size > 1:
        axis = source.attributes.get_int("axis", 1) % array.ndim
        moved = list(order).index(axis) if node.op_type == "Transpose" else _same_axis(array.shape, axis, shape)
        if moved is None:
            return False
        attributes["axis"] = moved
    array = array.transpose(order) if node.op_type == "Transpose" else array.reshape(shape)
    value = add_initializer(graph, f"{w.name}_{node.op_type.lower()}", array, w.dtype)
    made = ir.node("DequantizeLinear", [value, *source.inputs[1:]], attributes=attributes, name=node.name)
    graph.insert_before(node, made)
    _take_over(graph, node, made)
    return True


def _same_axis(before: tuple[int, ...], axis: int, after: tuple[int, ...]) -> int | None:
    """Where `axis` is after a reshape that leaves it whole and in its place; None if there is no such axis."""
    ahead = int(np.prod(before[:axis]))
    for i, size in enumerate(after):
        if size == before[axis] and int(np.prod(after[:i])) == ahead:
            return i
    return None


def _take_over(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """`new` replaces `old`, under the names of its outputs."""
    for before, after in zip(old.outputs, new.outputs, strict=True):
        after.name, after.shape, after.type = before.name, before.shape, before.type
        before.name = f"{before.name}/before"
        before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)


# ---- activations


def _inverse(graph: ir.Graph, node: ir.Node) -> bool:
    """Q(DQ(q; s, z); s, z) = q."""
    source = _producer(node) if _is(node, "QuantizeLinear") else None
    if source is None or not _is(source, "DequantizeLinear") or not same(quantization(source), quantization(node)):
        return False
    q, y = source.inputs[0], node.outputs[0]
    if q is None or q.const_value is not None or y.is_graph_output():
        return False
    y.replace_all_uses_with(q)
    return True


def _producer(node: ir.Node) -> ir.Node | None:
    return node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None


def _twins(graph: ir.Graph) -> int:
    """The first of several equal Q of one value, or DQ of one stored value, serves for all."""
    first: dict[tuple[Any, ...], ir.Node] = {}
    count = 0
    for node in graph:
        own = quantization(node)
        x, y = (node.inputs[0], node.outputs[0]) if own is not None else (None, None)
        if own is None or x is None or y is None or x.const_value is not None:
            continue
        keeper = first.setdefault((x, node.op_type, own.scale, own.zero_point, own.kind), node)
        if keeper is not node and y.uses() and not y.is_graph_output():
            y.replace_all_uses_with(keeper.outputs[0])
            count += 1
    return count


def _moves(graph: ir.Graph) -> int:
    """What moves stored values is written over real ones: DQ before, Q behind. Known is a Q before or a DQ behind."""
    known: dict[ir.Value, Quantization] = {}
    count = 0
    for node in list(graph):
        own = quantization(node)
        if own is not None and _is(node, "QuantizeLinear"):
            known[node.outputs[0]] = own
        x = node.inputs[0] if node.inputs and _is_move(node) else None
        if x is None or x.const_value is not None or x.dtype not in (ir.DataType.UINT8, ir.DataType.INT8):
            continue
        found = known.get(x) or next(
            (q for y in node.outputs for q in (quantization(use.node) for use in y.uses()) if q is not None), None
        )
        if found is not None and found.kind == x.dtype and _wrap(graph, node, found):
            known.update((y, found) for y in node.outputs)
            count += 1
    return count


def _is_move(node: ir.Node) -> bool:
    if _is(node, "Resize"):
        return node.attributes.get_string("mode", "nearest") == "nearest"
    if _is(node, "MaxPool"):
        return len(node.outputs) == 1
    return _is(node, "Pad", *MOVES)


def _wrap(graph: ir.Graph, node: ir.Node, found: Quantization) -> bool:
    x, name = node.inputs[0], str(node.name)
    assert x is not None
    if _is(node, "Pad") and not _real_padding(graph, node, found):
        return False
    before = ir.node("DequantizeLinear", [x, *found.values], name=f"{name}/DequantizeLinear")
    real = before.outputs[0]
    real.name, real.shape, real.type = f"{x.name}/{name}", x.shape, ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(node, before)
    node.replace_input_with(0, real)
    for i, y in enumerate(node.outputs):
        behind = ir.node("QuantizeLinear", [y, *found.values], name=f"{name}/QuantizeLinear{i or ''}")
        stored = behind.outputs[0]
        stored.shape, stored.type, stored.name = y.shape, ir.TensorType(found.kind), y.name
        y.name, y.type = f"{y.name}/real", real.type
        y.replace_all_uses_with(stored, replace_graph_outputs=True)
        behind.replace_input_with(0, y)
        graph.insert_after(node, behind)
    return True


def _real_padding(graph: ir.Graph, node: ir.Node, found: Quantization) -> bool:
    """The value that a Pad writes, from stored to real; without one it is a stored 0."""
    if node.attributes.get_string("mode", "constant") != "constant":
        return True
    given = node.inputs[2] if len(node.inputs) > 2 else None
    stored = constant(given) if given is not None else np.zeros((), np.int64)
    if stored is None:
        return False
    real = np.float32(int(stored.reshape(-1)[0]) - found.zero_point) * np.float32(found.scale)
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, add_initializer(graph, _beside(node, "value"), np.array(real, np.float32)))
    return True


def _padding(graph: ir.Graph, node: ir.Node) -> bool:
    """Pad -> Q -> DQ -> Conv becomes Q -> DQ -> Pad -> Conv: 0 is stored exactly."""
    own = quantization(node)
    pad = _producer(node) if own is not None and _is(node, "QuantizeLinear") else None
    x = pad.inputs[0] if pad is not None else None
    if pad is None or x is None or x.shape is None or spatial_zero_pad(pad, len(x.shape)) is None:
        return False
    dequantize = _only_reader(node)
    if _only_reader(pad) is not node or dequantize is None or not same(own, quantization(dequantize)):
        return False
    q, real, padded = node.outputs[0], dequantize.outputs[0], pad.outputs[0]
    if real.is_graph_output() or not all(_is(use.node, "Conv") and use.idx == 0 for use in real.uses()):
        return False
    real.replace_all_uses_with(padded)
    node.replace_input_with(0, x)
    pad.replace_input_with(0, real)
    q.shape = real.shape = x.shape
    return True


def _only_reader(node: ir.Node) -> ir.Node | None:
    y = node.outputs[0]
    users = [use.node for use in y.uses()]
    return users[0] if len(users) == 1 and not y.is_graph_output() else None


def _each(step: Callable[[ir.Graph, ir.Node], bool]) -> Callable[[ir.Graph], int]:
    return lambda graph: sum(step(graph, node) for node in list(graph) if node.graph is graph)


# In this order: a later step relies on what the earlier ones leave.
_STEPS: tuple[tuple[str, Callable[[ir.Graph], int]], ...] = (
    ("parameters", _each(_parameters)),
    ("signed_weights", _each(_signed_weight)),
    ("weight_layouts", _each(_weight_layout)),
    ("twins", _twins),
    ("moves", _moves),
    ("padding", _each(_padding)),
    ("inverse", _each(_inverse)),
    ("twins", _twins),
)
