"""Remove channels for good: the arrays, shapes and attributes of a graph without some units of its classes.

A class of a coupling for cutting (`couple(graph, cut=True)`) lists every axis that its units lie along. Removing unit u
takes its positions out of every such axis: rows and biases of the layers that make it, columns of those that read it,
per-channel parameters and depthwise weights in between, and the shapes of all values. What counts channels follows:

    Conv group          channels of the input / columns of the weight
    Reshape, Expand     the new shape of the output                     Resize   the new sizes
    Split               how much of each part is left                   Pad      how many padded channels are left
    Slice               where its first and last channel are now

The cut network computes what the whole one does when the columns that read the removed units are zero (`silence`), since
a unit reaches other channels through columns only: everything else that would mix it in pins it. DepGraph, Fang et al.
2023, arXiv:2301.12900; OTO, Chen et al. 2023, arXiv:2305.18030.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from sparsec.passes.channels.coupling import ChannelClass
from sparsec.passes.channels.tie_moves import pad_amounts, slice_index
from sparsec.passes.initializers import add_initializer
from sparsec.passes.normalization.fold_constants import constant, remove_unused_initializers, static_shape

Removal = tuple[ChannelClass, np.ndarray]  # the class, and a mask [units] of what goes
Kept = dict[tuple[ir.Value, int], np.ndarray]  # value, axis -> mask of the positions that stay


def cut(graph: ir.Graph, removals: Sequence[Removal]) -> None:
    """Remove the units; `removals` come from one coupling of this graph. ValueError if an axis would lose everything."""
    kept = _kept(removals)
    for node in graph:
        if any((v, a) in kept for v in (*node.inputs, *node.outputs) if v is not None for a in _axes(v)):
            _adapt(graph, node, kept)
    for (value, axis), stays in kept.items():
        tensor = value.const_value if value.is_initializer() else None
        if tensor is not None:
            array = np.ascontiguousarray(np.compress(stays, tensor.numpy(), axis=axis))
            value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=value.name)
        dims = list(static_shape(value) or ())
        dims[axis] = int(stays.sum())
        value.shape = ir.Shape(dims)
    remove_unused_initializers(graph)


def silence(graph: ir.Graph, removals: Sequence[Removal]) -> None:
    """Zero the rows, biases and columns of the units instead of removing them: the masked twin of `cut`."""
    for units, removed in removals:
        for use in (*units.producers, *units.consumers):
            value, axis = use.member.value, use.member.axis.axis
            zero(value, axis, use.member.positions[removed].ravel())
        for use in units.producers:
            biases = use.node.inputs[2:3] if use.node.op_type in ("Conv", "ConvTranspose", "Gemm") else ()
            for member in units.members:
                if any(member.value is bias for bias in biases):
                    zero(member.value, member.axis.axis, member.positions[removed].ravel())


def zero(value: ir.Value, axis: int, positions: np.ndarray) -> None:
    """Zero these positions of an initializer."""
    tensor = value.const_value if value.is_initializer() else None
    if tensor is None:
        return
    array = tensor.numpy().copy()
    np.moveaxis(array, axis, 0)[positions] = 0
    value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=value.name)


def _axes(value: ir.Value) -> range:
    return range(len(static_shape(value) or ()))


def _kept(removals: Iterable[Removal]) -> Kept:
    kept: Kept = {}
    for units, removed in removals:
        if not units.free or np.shape(removed) != (units.size,):
            raise ValueError(f"not a choice among the units of a free class: {units.name}")
        for member in units.members:
            axis = member.axis
            stays = kept.setdefault((axis.value, axis.axis), np.ones(axis.size, bool))
            stays[member.positions[removed].ravel()] = False
    for (value, axis), stays in list(kept.items()):
        if stays.all():
            del kept[value, axis]
        elif not stays.any():
            raise ValueError(f"nothing would be left of axis {axis} of {value.name!r}")
    return kept


# ---- what counts channels


def _new_shape(value: ir.Value, kept: Kept) -> list[int]:
    return [int(kept[value, a].sum()) if (value, a) in kept else d for a, d in enumerate(static_shape(value) or ())]


def _adapt(graph: ir.Graph, node: ir.Node, kept: Kept) -> None:
    """Attributes and constants of the node that speak of channel numbers, before any shape has changed."""
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    if node.op_type in ("Conv", "ConvTranspose") and node.attributes.get_int("group", 1) > 1:
        weight = node.inputs[1]
        assert weight is not None
        columns = 1 if node.op_type == "ConvTranspose" else _new_shape(weight, kept)[1]
        node.attributes["group"] = ir.AttrInt64("group", _new_shape(x, kept)[1] // columns)
    elif node.op_type in ("Reshape", "Expand"):
        _replace(graph, node, 1, _new_shape(y, kept))
    elif node.op_type == "Resize" and len(node.inputs) > 3 and node.inputs[3] is not None:
        sizes = _new_shape(y, kept)
        _replace(graph, node, 3, [sizes[a] for a in node.attributes.get_ints("axes", None) or range(len(sizes))])
    elif node.op_type == "Split":
        axis = node.attributes.get_int("axis", 0) % len(_axes(x))
        node.attributes.pop("num_outputs", None)
        _replace(graph, node, 1, [_new_shape(part, kept)[axis] for part in node.outputs])
    elif node.op_type == "Slice":
        _adapt_slice(graph, node, x, kept)
    elif node.op_type == "Pad":
        begin, end = pad_amounts(node)
        for axis in _axes(y):
            stays = kept.get((y, axis))
            if stays is not None:
                inner = len(kept.get((x, axis), ())) or (static_shape(x) or ())[axis]
                begin[axis], end[axis] = int(stays[: begin[axis]].sum()), int(stays[begin[axis] + inner :].sum())
        _replace(graph, node, 1, [*begin, *end])
        if len(node.inputs) > 3:
            node.replace_input_with(3, None)


def _adapt_slice(graph: ir.Graph, node: ir.Node, x: ir.Value, kept: Kept) -> None:
    taken = slice_index(node)
    axes = list(taken)
    starts, ends, steps = [], [], []
    for axis in axes:
        positions = taken[axis]
        step = int(positions[1] - positions[0]) if positions.size > 1 else 1
        start = int(positions[0]) if positions.size else 0
        count = positions.size
        stays = kept.get((x, axis))
        if stays is not None:  # the coupling pins an axis that is not taken in a row
            start, count = int(stays[:start].sum()), int(stays[positions].sum())
        stop = start + count * step
        starts.append(start)
        ends.append(stop if stop >= 0 else -(1 << 62))  # an end before the first position
        steps.append(step)
    for index, values in ((1, starts), (2, ends), (3, axes), (4, steps)):
        _replace(graph, node, index, values)


def _replace(graph: ir.Graph, node: ir.Node, index: int, numbers: list[int]) -> None:
    """A constant of int64 as input `index`, unless it says the same already."""
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    old = constant(node.inputs[index])
    array = np.array(numbers, np.int64)
    if old is None or old.shape != array.shape or not np.array_equal(old, array):
        node.replace_input_with(index, add_initializer(graph, f"{node.name}_{index}", array))
