"""Ties of what only moves positions: views, copies, parts of a whole. What they move where is here for other passes too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sparsec.passes.channels.ties import Merge, Rule, Ties, Unknown, every_input, ints, pin_space, shape_of
from sparsec.passes.normalization.fold_constants import constant


def _string(ties: Ties, parts: Sequence[ir.Value | None], whole: ir.Value | None, along: int) -> None:
    """`parts` lie one behind the other in `whole` on axis `along` and are as wide on the others."""
    offset = 0
    for part in parts:
        for axis in range(len(shape_of(whole))):
            atoms, own = ties.axis(whole, axis).atoms, ties.axis(part, axis)
            ties.tie(own, atoms[offset : offset + own.size] if axis == along else atoms)
        offset += shape_of(part)[along]


def _concat(ties: Ties, node: ir.Node) -> set[int]:
    y = node.outputs[0]
    _string(ties, node.inputs, y, node.attributes.get_int("axis", 0) % len(shape_of(y)))
    return every_input(node)


def _split(ties: Ties, node: ir.Node) -> set[int]:
    _refuse_old_form(ties, node, "split")
    x = node.inputs[0]
    _string(ties, node.outputs, x, node.attributes.get_int("axis", 0) % len(shape_of(x)))
    return {0}


def _refuse_old_form(ties: Ties, node: ir.Node, attribute: str) -> None:
    if ties.cut and attribute in node.attributes:
        raise Unknown(f"{attribute} is an attribute, as before opset 13")


def slice_index(node: ir.Node) -> dict[int, np.ndarray]:
    """Axis -> positions of the input that a Slice with constant bounds takes. Raises Unknown."""
    shape = shape_of(node.inputs[0])
    starts, ends = ints(node, 1, "starts"), ints(node, 2, "ends")
    if starts is None or ends is None:
        raise Unknown("a Slice without bounds")
    axes = ints(node, 3, "axes") or list(range(len(starts)))
    steps = ints(node, 4) or [1] * len(starts)
    taken = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = shape[axis % len(shape)]
        if step < 0:  # ONNX counts from the end as Python does, but an end below -size means "past the first"
            low = size + end if -size <= end < 0 else max(end, -1)
            taken[axis % len(shape)] = np.arange(min(start + size if start < 0 else start, size - 1), low, step)
        else:
            taken[axis % len(shape)] = np.arange(size)[slice(start, end, step)]
    return taken


def _slice(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    _refuse_old_form(ties, node, "starts")
    taken = slice_index(node)
    for axis in range(len(shape_of(x))):
        positions = taken.get(axis)
        source = ties.axis(x, axis)
        ties.tie(source if positions is None else source.atoms[positions], ties.axis(y, axis))
        if positions is not None and ties.cut and positions.size > 1 and positions[1] - positions[0] != 1:
            ties.pin(x, f"Slice {node.name!r} takes every {positions[1] - positions[0]}th of it", axis)
    return {0}


def _gather(ties: Ties, node: ir.Node) -> set[int]:
    x, i, y = node.inputs[0], node.inputs[1], node.outputs[0]
    rank, extra = len(shape_of(x)), len(shape_of(i))
    axis = node.attributes.get_int("axis", 0) % rank
    for a in range(rank):
        if a != axis:
            ties.tie(ties.axis(x, a), ties.axis(y, a if a < axis else a - 1 + extra))
    indices = constant(i)
    if indices is None:
        ties.pin(x, f"Gather {node.name!r} takes positions of it by number", axis)
        for a in range(extra):
            ties.tie(ties.axis(i, a), ties.axis(y, axis + a))
        return {0, 1}
    if extra == 1 and not ties.cut:
        ties.tie(ties.axis(x, axis).atoms[indices], ties.axis(y, axis))
    else:
        ties.pin_atoms(ties.axis(x, axis).atoms[indices.reshape(-1)], f"Gather {node.name!r} takes it by number")
        for a in range(extra):
            ties.pin(y, f"Gather {node.name!r} makes its order", axis + a)
        if ties.cut:
            ties.pin(x, f"Gather {node.name!r} takes positions of it by number", axis)
    return {0}


def pad_amounts(node: ir.Node) -> tuple[list[int], list[int]]:
    """Begin and end pads of every axis. Raises Unknown if they are not constant."""
    rank = len(shape_of(node.inputs[0]))
    pads = ints(node, 1, "pads")
    axes = [a % rank for a in ints(node, 3) or range(rank)]
    begin, end = [0] * rank, [0] * rank
    for place, axis in enumerate(axes):
        begin[axis], end[axis] = (pads or [])[place], (pads or [])[len(axes) + place]
    return begin, end


def _pad(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    _refuse_old_form(ties, node, "pads")
    filled = node.attributes.get_string("mode", "constant") == "constant"
    for axis, (begin, end) in enumerate(zip(*pad_amounts(node), strict=True)):
        inner, outer = ties.axis(x, axis), ties.axis(y, axis)
        if begin == end == 0 or (filled and begin >= 0 and end >= 0):
            ties.tie(inner, outer.atoms[begin : begin + inner.size])
        else:
            ties.pin(x, f"Pad {node.name!r} repeats or crops it", axis)
            ties.pin(y, f"Pad {node.name!r} repeats or crops it", axis)
    return {0}


def _transpose(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(shape_of(x))
    for target, source in enumerate(node.attributes.get_ints("perm", None) or reversed(range(rank))):
        ties.tie(ties.axis(x, source), ties.axis(y, target))
    return {0}


def _expand(ties: Ties, node: ir.Node) -> set[int]:
    ties.broadcast(node.inputs[0], node.outputs[0])
    return {0}


def _tile(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    for axis, (short, long) in enumerate(zip(shape_of(x), shape_of(y), strict=True)):
        times = long // max(short, 1)
        ties.tie(np.tile(ties.axis(x, axis).atoms, times), ties.axis(y, axis), np.repeat(np.arange(times), short))
    return {0}


def _depth_space(ties: Ties, node: ir.Node) -> set[int]:
    deep, flat = node.inputs[0], node.outputs[0]
    if node.op_type == "SpaceToDepth":
        deep, flat = flat, deep
    block, few = node.attributes.get_int("blocksize", 1) ** 2, shape_of(flat)[1]
    atoms = ties.axis(flat, 1).atoms
    inner_first = node.op_type == "DepthToSpace" and node.attributes.get_string("mode", "DCR") == "CRD"
    source = np.repeat(atoms, block) if inner_first else np.tile(atoms, block)
    color = np.tile(np.arange(block), few) if inner_first else np.repeat(np.arange(block), few)
    ties.tie(source, ties.axis(deep, 1), color)
    ties.same(deep, flat, range(1))
    pin_space(ties, node, deep, flat)
    return {0}


def _reshape(ties: Ties, node: ir.Node) -> set[int]:
    """Runs of axes with equal products: one to one tied, one to many a `Merge`, many to many pinned. Ones in between
    belong to no run."""
    x, y = node.inputs[0], node.outputs[0]
    what = f"{node.op_type} {node.name!r}"
    if ties.cut and node.op_type == "Squeeze" and ints(node, 1, "axes") is None:
        raise Unknown("it drops every axis of length 1")
    for left, right in reshape_runs(shape_of(x), shape_of(y)):
        a, b = [ties.axis(x, i) for i in left], [ties.axis(y, j) for j in right]
        if len(a) == 1 and len(b) == 1:
            ties.tie(a[0], b[0])
        elif len(a) == 1 and b:
            ties.merges.append(Merge(node, a[0], tuple(b)))
        elif len(b) == 1 and a:
            ties.merges.append(Merge(node, b[0], tuple(a)))
        else:
            for axis in (*a, *b):
                ties.pin_atoms(axis.atoms, f"{what} mixes it with other axes")
    return {0}


def reshape_runs(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Shortest runs of axes with equal products; axes of length 1 are left out.

    >>> reshape_runs((1, 8, 3, 3), (1, 72))
    [([1, 2, 3], [1])]
    """
    if 0 in before or 0 in after:
        return [(list(range(len(before))), list(range(len(after))))]
    left, right = ([i for i, d in enumerate(s) if d != 1] for s in (before, after))
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        a, b, m, n = [left[i]], [right[j]], before[left[i]], after[right[j]]
        i, j = i + 1, j + 1
        while m != n:
            if m < n:
                a.append(left[i])
                m, i = m * before[left[i]], i + 1
            else:
                b.append(right[j])
                n, j = n * after[right[j]], j + 1
        runs.append((a, b))
    return runs


RULES: dict[str, Rule] = {
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _depth_space),
    "Concat": _concat,
    "Expand": _expand,
    "Gather": _gather,
    "Pad": _pad,
    "Slice": _slice,
    "Split": _split,
    "Tile": _tile,
    "Transpose": _transpose,
}
