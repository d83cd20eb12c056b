"""Channels of a masked model that nobody would miss, and what they leave in the biases of their readers.

A column that reads a unit is spare if it is zero, if the unit is known to be zero, or if the unit holds a constant c
that the layer's bias can take over, b'[o] = b[o] + c sum over k of W[o, u, k]: not in a convolution that pads (a border
sees less of it) and not in a product without a bias. A unit whose columns are all spare is dead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sparsec.passes.channels.channel_choice import WEIGHT_OPS
from sparsec.passes.channels.constant_channels import Channels, constant_channels, is_padded
from sparsec.passes.channels.coupling import ChannelClass, WeightAxis
from sparsec.passes.channels.cut import Removal, zero
from sparsec.passes.initializers import add_initializer
from sparsec.passes.normalization.fold_constants import constant, static_shape


def dead_units(classes: Sequence[ChannelClass], width: int, known: Mapping[ir.Value, Channels]) -> list[Removal]:
    """Units that no column needs, as many as leave multiples of `width`."""
    removals = []
    for units in classes:
        spare = np.ones(units.size, bool)
        for use in units.consumers:
            spare &= _spare_columns(use, known)[use.member.positions].all(axis=1)
        stay = max(width, -(-(units.size - int(spare.sum())) // width) * width)
        if units.size > stay:
            removed = np.zeros(units.size, bool)
            removed[np.flatnonzero(spare)[::-1][: units.size - stay]] = True
            removals.append((units, removed))
    return removals


def fold_into_biases(graph: ir.Graph, removals: Sequence[Removal]) -> None:
    """Put what constant units contribute into the biases of their readers, and zero the columns that read them."""
    known = constant_channels(graph)
    for units, removed in removals:
        for use in units.consumers:
            _fold_columns(graph, use, known, use.member.positions[removed].ravel())
    for units, removed in removals:
        for use in units.consumers:
            zero(use.member.value, use.member.axis.axis, use.member.positions[removed].ravel())


def _columns(use: WeightAxis) -> np.ndarray | None:
    """The weight as [columns, others...]; None if it is not constant."""
    array = constant(use.node.inputs[use.index])
    return None if array is None else np.moveaxis(array, use.member.axis.axis, 0)


def _inputs(use: WeightAxis, known: Mapping[ir.Value, Channels]) -> np.ndarray | None:
    """Known constants of what the columns multiply, [groups, columns], NaN where unknown."""
    node = use.node
    x = node.inputs[1 - use.index] if node.op_type == "MatMul" else node.inputs[0]
    found = known.get(x) if x is not None else None
    if x is None or found is None:
        return None
    rank = len(static_shape(x) or ())
    axis = {"Conv": 1, "ConvTranspose": 1, "Gemm": 0 if node.attributes.get_int("transA", 0) else 1}.get(
        node.op_type, rank - 2 if use.index == 0 else rank - 1
    )
    if found.axis != axis or node.op_type not in WEIGHT_OPS:
        return None
    return found.values.reshape(node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1, -1)


def _spare_columns(use: WeightAxis, known: Mapping[ir.Value, Channels]) -> np.ndarray:
    """Columns that may go: zero, or multiplied with a constant that is zero or that the bias can take, [columns]."""
    columns = _columns(use)
    spare = np.zeros(use.member.axis.size, bool)
    if columns is not None:
        spare |= (columns.reshape(len(columns), -1) == 0).all(axis=1)
    inputs = _inputs(use, known)
    if inputs is not None:
        fine = inputs == 0
        if _takes_bias(use) and columns is not None:
            fine |= ~np.isnan(inputs)
        spare |= fine.all(axis=0)
    return spare


def _takes_bias(use: WeightAxis) -> bool:
    node = use.node
    if node.op_type not in ("Conv", "Gemm") or (node.op_type == "Conv" and is_padded(node)):
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    rows = (static_shape(node.outputs[0]) or (0, 0))[1]
    given = constant(bias)
    return bias is None or (given is not None and given.size == rows)


def _fold_columns(graph: ir.Graph, use: WeightAxis, known: Mapping[ir.Value, Channels], positions: np.ndarray) -> None:
    """Add what the removed columns contribute to the layer's bias."""
    columns, inputs = _columns(use), _inputs(use, known)
    if columns is None or inputs is None:
        return
    node = use.node
    nonzero = (columns[positions].reshape(positions.size, -1) != 0).any(axis=1)
    positions = positions[nonzero]
    if not positions.size or not np.nan_to_num(inputs[:, positions]).any():
        return
    taps = columns[positions].astype(np.float64)  # [p, OC, taps...], as axis 0 was taken out of [OC, IC, ...] or [K, N]
    taps = taps.reshape(*taps.shape[:2], -1).sum(axis=2)
    rows = taps.shape[1]
    values = np.repeat(inputs[:, positions], rows // len(inputs), axis=0)  # [OC, p]
    extra = (values * taps.T).sum(axis=1)
    if node.op_type == "Gemm":
        extra = extra * node.attributes.get_float("alpha", 1.0) / (node.attributes.get_float("beta", 1.0) or 1.0)
    old = node.inputs[2] if len(node.inputs) > 2 else None
    dtype = node.inputs[use.index].dtype
    assert dtype is not None
    given = constant(old)
    new = extra if given is None else given.astype(np.float64).reshape(-1) + extra
    bias = add_initializer(graph, f"{node.name}_bias", new.astype(dtype.numpy()), dtype)
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, bias)
