"""Ties of what mixes positions of an axis: normalization, Softmax, reductions, orders, windows."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from sparsec.passes.channels.ties import Rule, Ties, Unknown, every_input, ints, pin_space, row_parameters, shape_of
from sparsec.passes.normalization.fold_constants import constant

REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
)  # fmt: skip


def _mixed(ties: Ties, node: ir.Node, value: ir.Value | None, axis: int) -> None:
    """The node mixes positions along the axis regardless of their order, but not of their number."""
    if ties.cut:
        ties.pin(value, f"{node.op_type} {node.name!r} mixes it", axis % len(shape_of(value)))


def _batch_norm(ties: Ties, node: ir.Node) -> set[int]:
    if node.attributes.get_int("training_mode", 0):
        raise Unknown("training mode")
    x, y = node.inputs[0], node.outputs[0]
    ties.same(x, y, range(len(shape_of(x))))
    return {0} | row_parameters(ties, node, (1, 2, 3, 4), y)


def _instance_norm(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    ties.same(x, y, range(len(shape_of(x))))
    for axis in range(2, len(shape_of(x))):
        _mixed(ties, node, x, axis)
    return {0} | row_parameters(ties, node, (1, 2), y)


def _group_norm(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    ties.same(x, y, range(len(shape_of(x))))
    channels, groups = ties.axis(x, 1), node.attributes.get_int("num_groups", 1)
    ties.tie(channels, channels, np.arange(channels.size) // max(channels.size // groups, 1))
    for axis in range(1, len(shape_of(x))):
        _mixed(ties, node, x, axis)
    if shape_of(node.inputs[1])[0] != channels.size:
        return {0}
    return {0} | row_parameters(ties, node, (1, 2), y)


def _layer_norm(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(shape_of(x))
    ties.same(x, y, range(rank))
    for axis in range(node.attributes.get_int("axis", -1) % rank, rank):
        _mixed(ties, node, x, axis)
    for parameter in node.inputs[1:]:
        if parameter is not None:
            ties.broadcast(parameter, y)
    return every_input(node)


def _mixing(ties: Ties, node: ir.Node, default: int) -> set[int]:
    """Softmax and the like: along one axis, in any order."""
    x, y = node.inputs[0], node.outputs[0]
    ties.same(x, y, range(len(shape_of(x))))
    _mixed(ties, node, x, node.attributes.get_int("axis", default))
    return {0}


def _reduce(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(shape_of(x))
    axes = ints(node, 1, "axes")
    if not axes:
        axes = [] if node.attributes.get_int("noop_with_empty_axes", 0) else list(range(rank))
    gone = {a % rank for a in axes}
    keep = node.attributes.get_int("keepdims", 1)
    place = 0
    for axis in range(rank):
        if axis in gone:
            _mixed(ties, node, x, axis)
            place += keep
        else:
            ties.tie(ties.axis(x, axis), ties.axis(y, place))
            place += 1
    return {0}


def _ordered(ties: Ties, node: ir.Node, default: int) -> set[int]:
    """Along one axis the order matters; it may be lost or change its length there."""
    x = node.inputs[0]
    rank = len(shape_of(x))
    fixed = node.attributes.get_int("axis", default) % rank
    if node.op_type == "CumSum":
        fixed = (ints(node, 1) or [0])[0] % rank
    kept = [a for a in range(rank) if a != fixed]
    if node.op_type not in ("ArgMax", "ArgMin") or node.attributes.get_int("keepdims", 1):
        kept = list(range(rank))
    ties.pin(x, f"{node.op_type} {node.name!r} depends on the order along it", fixed)
    for y in (v for v in node.outputs if v.name):
        for place, axis in enumerate(kept):
            if axis == fixed:
                ties.pin(y, f"{node.op_type} {node.name!r} makes its order", place)
            else:
                ties.tie(ties.axis(x, axis), ties.axis(y, place))
    return {0}


def _pool(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    if len(node.outputs) > 1 and node.outputs[1].name and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        raise Unknown("its indices are read")
    ties.same(x, y, range(2))
    pin_space(ties, node, x, y)
    return {0}


def _global_pool(ties: Ties, node: ir.Node) -> set[int]:
    x = node.inputs[0]
    ties.same(x, node.outputs[0], range(2))
    for axis in range(2, len(shape_of(x))):
        _mixed(ties, node, x, axis)
    return {0}


def _resize(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    if node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        raise Unknown("it crops")
    if node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unknown("its scales depend on the shapes")
    rank = len(shape_of(x))
    axes = [a % rank for a in node.attributes.get_ints("axes", None) or range(rank)]
    given = node.inputs[2] if len(node.inputs) > 2 else None
    factors = constant(given)
    if given is not None and factors is None:
        raise Unknown("its scales are not constant")
    same = dict.fromkeys(range(rank), True)
    for place, axis in enumerate(axes):
        same[axis] = shape_of(x)[axis] == shape_of(y)[axis]
        if factors is not None and factors.size:
            same[axis] = float(factors.reshape(-1)[place]) == 1.0
    for axis in range(rank):
        if same[axis]:
            ties.tie(ties.axis(x, axis), ties.axis(y, axis))
        else:
            ties.pin(x, f"Resize {node.name!r} interpolates along it", axis)
            ties.pin(y, f"Resize {node.name!r} interpolates along it", axis)
    return {0}


RULES: dict[str, Rule] = {
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(("AveragePool", "MaxPool", "LpPool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), _global_pool),
    **dict.fromkeys(("ArgMax", "ArgMin", "CumSum"), partial(_ordered, default=0)),
    **dict.fromkeys(("TopK", "Hardmax"), partial(_ordered, default=-1)),
    **dict.fromkeys(("Softmax", "LogSoftmax", "LpNormalization"), partial(_mixing, default=-1)),
    "BatchNormalization": _batch_norm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "Resize": _resize,
}
