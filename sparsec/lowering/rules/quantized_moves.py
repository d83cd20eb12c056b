"""Bytes that change their places: what `sparsec.lowering.integers` leaves of moves of quantized tensors.

Reshapes, and slices and joins along the outermost axis, are views (`views`). All others are an `Arrangement`: a stride or
a table of offsets for each axis of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from sparsec.kernels import moves_int8
from sparsec.kernels.base import roofline_us
from sparsec.kernels.moves_int8 import Arrangement, Axis, row_major
from sparsec.lowering.calls import Calls
from sparsec.lowering.match import Group, attribute, constant, dims
from sparsec.lowering.quantized import EIGHT
from sparsec.lowering.rules.base import Context, Taken, declare, dtype_of, node_names, record
from sparsec.lowering.rules.quantized_resize import nearest

Axes = list[Axis]  # of the result, outermost first, dense
Moved = tuple[int, Sequence[tuple[int, int | tuple[int, ...]]]]  # start in x; size and offsets in x of each axis of y


def take_move(node: ir.Node, context: Context) -> Taken | str | None:
    """Moves of uint8 and int8 with constant indices."""
    reader = _READERS.get(node.op_type)
    values = [v for v in (node.inputs if node.op_type == "Concat" else node.inputs[:1]) if v is not None]
    if reader is None or not values or dtype_of(values[0]) not in EIGHT:
        return None
    found = reader(node)
    if isinstance(found, str):
        return found
    group = Group(node, (node,), node.outputs[0])

    def emit(calls: Calls) -> None:
        us, kernel = 0.0, ""
        for part in found:
            target = declare(calls, part.y)
            element = dtype_of(part.y)
            if part.fill is not None:
                call = moves_int8.bind_fill(context.machine, size=calls.size(target), value=part.fill, element=element)
                calls.emit(call, {"y": target}, ("y",), node_names(group), group.name)
                us += roofline_us(context.machine.single(), 0.0, float(calls.size(target)))
            if part.arrangement.count:
                call = moves_int8.bind(context.machine, part.arrangement, element)
                calls.emit(call, {"x": declare(calls, part.x), "y": target}, ("y",), node_names(group), group.name)
                machine = context.machine.single()
                us += roofline_us(machine, 0.0, 2.0 * part.arrangement.count)
                us += moves_int8.cycles(part.arrangement) / (machine.ghz * 1e3)
                kernel = kernel or call.name
        record(calls, group, kernel or "fill", "bytes change their places", predicted_us=us)

    return Taken(group, emit)


class Part:
    """One call: an arrangement from `x` to `y`, of which `fill`, if given, is written to all of y before."""

    def __init__(self, x: ir.Value, y: ir.Value, axes: Sequence[Axis], x_start: int = 0, y_start: int = 0,
                 fill: int | None = None) -> None:  # fmt: skip
        sizes = [int(np.prod(dims(value), dtype=np.int64)) for value in (x, y)]
        self.x, self.y, self.fill = x, y, fill
        self.arrangement = Arrangement(sizes[0], sizes[1], tuple(axes), x_start, y_start)


Reader = Callable[[ir.Node], "list[Part] | str"]


def _io(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    x = node.inputs[0]
    assert x is not None
    return x, node.outputs[0]


def _dense(x: ir.Value, y: ir.Value, axes: Sequence[tuple[int, int | tuple[int, ...]]], x_start: int = 0) -> list[Part]:
    """y dense, of these sizes and offsets in x."""
    strides = row_major([size for size, _ in axes])
    return [Part(x, y, [Axis(size, at, stride) for (size, at), stride in zip(axes, strides, strict=True)], x_start)]


def _transpose(node: ir.Node) -> list[Part]:
    x, y = _io(node)
    shape = dims(x)
    strides = row_major(shape)
    order = attribute(node, "perm", tuple(range(len(shape)))[::-1])
    return _dense(x, y, [(shape[p], strides[p]) for p in order])


def _slice(node: ir.Node) -> list[Part] | str:
    x, y = _io(node)
    shape, strides = dims(x), row_major(dims(x))
    arrays = [constant(v) for v in (*node.inputs[1:], None, None)[:4]]
    if arrays[0] is None or any(a is None and v is not None for a, v in zip(arrays, node.inputs[1:], strict=False)):
        return "a Slice with computed bounds or steps"
    starts = arrays[0].reshape(-1).tolist()
    axes = range(len(starts)) if arrays[2] is None else [int(a) % len(shape) for a in arrays[2].reshape(-1)]
    steps = [1] * len(starts) if arrays[3] is None else arrays[3].reshape(-1).tolist()
    first, by = [0] * len(shape), list(strides)
    for axis, start, step in zip(axes, starts, steps, strict=True):
        begin = start + shape[axis] if start < 0 else start
        first[axis] = min(max(begin, 0), shape[axis] - (step < 0))
        by[axis] = step * strides[axis]
    start = sum(at * stride for at, stride in zip(first, strides, strict=True))
    return _dense(x, y, list(zip(dims(y), by, strict=True)), start)


def _split(node: ir.Node) -> list[Part]:
    x, _ = _io(node)
    strides, parts = row_major(dims(x)), []
    axis = int(attribute(node, "axis", 0)) % len(strides)
    start = 0
    for y in node.outputs:
        parts += _dense(x, y, list(zip(dims(y), strides, strict=True)), start)
        start += dims(y)[axis] * strides[axis]
    return [part for part in parts if part.y.uses() or part.y.is_graph_output()]


def _gather(node: ir.Node) -> list[Part] | str:
    x, y = _io(node)
    shape, strides = dims(x), row_major(dims(x))
    indices = constant(node.inputs[1])
    if indices is None:
        return "its indices are computed"
    axis = int(attribute(node, "axis", 0)) % len(shape)
    if indices.size and not (-shape[axis] <= indices.min() and indices.max() < shape[axis]):
        return f"its indices reach {indices.min()} and {indices.max()}, the axis has {shape[axis]} elements"
    table = tuple(int(v) for v in (indices.reshape(-1) % shape[axis]) * strides[axis])
    axes = list(zip(shape, strides, strict=True))
    return _dense(x, y, [*axes[:axis], (len(table), table), *axes[axis + 1 :]])


def _expand(node: ir.Node) -> list[Part]:
    x, y = _io(node)
    shape = (1,) * (len(dims(y)) - len(dims(x))) + dims(x)
    return _dense(x, y, [(n, 0 if m == 1 else s) for n, m, s in zip(dims(y), shape, row_major(shape), strict=True)])


def _tile(node: ir.Node) -> list[Part]:
    x, y = _io(node)
    axes: list[tuple[int, int]] = []
    for n, m, stride in zip(dims(y), dims(x), row_major(dims(x)), strict=True):
        axes += [(n // m, 0), (m, stride)]
    return _dense(x, y, axes)


def _depth_to_space(node: ir.Node) -> list[Part]:
    x, y = _io(node)
    n, c, h, w = dims(x)
    size = int(attribute(node, "blocksize", 1))
    depth = c // (size * size)
    if attribute(node, "mode", "DCR") == "DCR":
        fine, order = (n, size, size, depth, h, w), (0, 3, 4, 1, 5, 2)
    else:
        fine, order = (n, depth, size, size, h, w), (0, 1, 4, 2, 5, 3)
    strides = row_major(fine)
    return _dense(x, y, [(fine[p], strides[p]) for p in order])


def _space_to_depth(node: ir.Node) -> list[Part]:
    x, y = _io(node)
    n, c, h, w = dims(x)
    size = int(attribute(node, "blocksize", 1))
    fine = (n, c, h // size, size, w // size, size)
    strides = row_major(fine)
    return _dense(x, y, [(fine[p], strides[p]) for p in (0, 3, 5, 1, 2, 4)])


def _resize(node: ir.Node) -> list[Part] | str:
    x, y = _io(node)
    found = nearest(node)
    if isinstance(found, str):
        return found
    axes = [
        (index.size, tuple(int(v) for v in index * stride))
        for index, stride in zip(found, row_major(dims(x)), strict=True)
    ]
    return _dense(x, y, axes)


def _pad(node: ir.Node) -> list[Part] | str:
    x, y = _io(node)
    shape, rank = dims(x), len(dims(x))
    pads, axes = constant(node.inputs[1]), constant(node.inputs[3]) if len(node.inputs) > 3 else None
    if pads is None or (len(node.inputs) > 3 and node.inputs[3] is not None and axes is None):
        return "its pads are computed"
    which = list(range(rank)) if axes is None else [int(a) % rank for a in axes.reshape(-1)]
    before = dict(zip(which, pads.reshape(-1)[: len(which)].tolist(), strict=True))
    mode = attribute(node, "mode", "constant")
    index = [np.arange(n) - before.get(i, 0) for i, n in enumerate(dims(y))]
    strides = row_major(shape)
    if mode != "constant":
        found = []
        for at, n, stride in zip(index, shape, strides, strict=True):
            if mode == "reflect":
                period = max(2 * n - 2, 1)
                at = np.abs((at + n - 1) % period - (n - 1))
            else:
                at = at % n if mode == "wrap" else np.clip(at, 0, n - 1)
            found.append((at.size, tuple(int(v) for v in at * stride)))
        return _dense(x, y, found)
    value = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if len(node.inputs) > 2 and node.inputs[2] is not None and value is None:
        return "what it pads with is computed"
    fill = 0 if value is None else int(value.reshape(-1)[0])
    x_start = y_start = 0
    axes_of: Axes = []
    for at, n, x_stride, y_stride in zip(index, shape, strides, row_major(dims(y)), strict=True):
        inside = np.flatnonzero((at >= 0) & (at < n))
        if not inside.size:
            return "nothing of its input is left"
        x_start += int(at[inside[0]]) * x_stride
        y_start += int(inside[0]) * y_stride
        axes_of.append(Axis(int(inside.size), x_stride, y_stride))
    covered = all(axis.size == n for axis, n in zip(axes_of, dims(y), strict=True))
    return [Part(x, y, axes_of, x_start, y_start, None if covered else fill)]


def _concat(node: ir.Node) -> list[Part] | str:
    y = node.outputs[0]
    strides = row_major(dims(y))
    axis = int(attribute(node, "axis", 0)) % len(strides)
    start, parts = 0, []
    for x in node.inputs:
        assert x is not None
        axes = [Axis(n, s, t) for n, s, t in zip(dims(x), row_major(dims(x)), strides, strict=True)]
        parts.append(Part(x, y, axes, 0, start))
        start += dims(x)[axis] * strides[axis]
    return parts


_READERS: dict[str, Reader] = {
    "Transpose": _transpose,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "Expand": _expand,
    "Tile": _tile,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Resize": _resize,
    "Pad": _pad,
    "Concat": _concat,
}
