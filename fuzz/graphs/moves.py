"""Operators that move, select, repeat or sum what is there, and shapes that are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fuzz.graphs.draft import BOOL, BYTES, F16, F32, F64, I32, I64, REAL, WHOLE, Draft, Value, size

REDUCE = {
    "ReduceSum": (*REAL, *WHOLE), "ReduceMean": REAL, "ReduceMax": (F16, F32, I32), "ReduceMin": (F16, F32, I32),
    "ReduceL1": REAL, "ReduceL2": REAL, "ReduceSumSquare": REAL, "ReduceProd": (F32, I32), "ReduceLogSumExp": (F32, F64),
}  # fmt: skip
FACTORS = 6  # of a product of whole numbers, each below 16


def reduce(d: Draft, x: Value) -> None:
    """Over some axes or, without a list, all; axes are an input since opset 13 (ReduceSum) or 18."""
    fitting = [op for op, dtypes in REDUCE.items() if x.dtype in dtypes]
    if not fitting or not x.shape or x.rounded:
        return
    op, keep = d.among(fitting), d.number(0, 1)
    everything = d.maybe(6)
    axes = list(range(x.rank)) if everything else sorted({d.number(0, x.rank - 1) for _ in range(d.number(1, x.rank))})
    if op == "ReduceProd" and x.dtype == I32 and not (x in d.inputs and size([x.shape[a] for a in axes]) <= FACTORS):
        return  # what an overflow gives ONNX does not say
    shape = [1 if i in axes else s for i, s in enumerate(x.shape) if keep or i not in axes]
    written = [a - x.rank if d.maybe(4) else a for a in axes]
    if everything:
        d.add(op, [x.name], shape, x.dtype, keepdims=keep)
    elif d.opset >= (13 if op == "ReduceSum" else 18):
        d.add(op, [x.name, d.constant(written)], shape, x.dtype, keepdims=keep)
    else:
        d.add(op, [x.name], shape, x.dtype, keepdims=keep, axes=written)


def scan_sum(d: Draft, x: Value) -> None:
    """CumSum, and the place of the largest of whole numbers."""
    if x.dtype not in (F32, *WHOLE) or not x.rank:
        return
    axis = d.number(0, x.rank - 1)
    if x.dtype == I32 and d.maybe():
        keep = d.number(0, 1)
        shape = tuple(1 if i == axis else s for i, s in enumerate(x.shape) if keep or i != axis)
        last: dict[str, Any] = {"select_last_index": d.number(0, 1)} if d.opset >= 12 else {}
        d.add(d.among(("ArgMax", "ArgMin")), [x.name], shape, I64, axis=axis, keepdims=keep, **last)
    else:
        d.add("CumSum", [x.name, d.constant(axis)], x.shape, x.dtype, exclusive=d.number(0, 1), reverse=d.number(0, 1))


def _transpose(d: Draft, x: Value) -> None:
    order = sorted(range(x.rank), key=lambda _: d.number(0, 99))
    d.add("Transpose", [x.name], [x.shape[i] for i in order], x.dtype, x.rounded, perm=order)


def _reshape(d: Draft, x: Value) -> None:
    first = d.among([f for f in range(1, x.size + 1) if x.size % f == 0][:12])
    if x.rank > 1 and d.maybe():  # a dimension stays, written as 0
        rest = x.size // x.shape[0]
        d.add("Reshape", [x.name, d.constant([0, -1])], (x.shape[0], rest), x.dtype, x.rounded)
    else:
        d.add("Reshape", [x.name, d.constant([first, -1])], (first, x.size // first), x.dtype, x.rounded)


def _flatten(d: Draft, x: Value) -> None:
    axis = d.number(0, x.rank)
    d.add("Flatten", [x.name], (size(x.shape[:axis]), size(x.shape[axis:])), x.dtype, x.rounded, axis=axis)


def _unsqueeze(d: Draft, x: Value) -> None:
    if x.rank < 5:
        axis = d.number(0, x.rank)
        _with_axes(d, "Unsqueeze", x, (*x.shape[:axis], 1, *x.shape[axis:]), axis)


def _squeeze(d: Draft, x: Value) -> None:
    if 1 in x.shape:
        axis = x.shape.index(1)
        _with_axes(d, "Squeeze", x, x.shape[:axis] + x.shape[axis + 1 :], axis)


def _with_axes(d: Draft, op: str, x: Value, shape: tuple[int, ...], axis: int) -> None:
    if d.opset < 13:
        d.add(op, [x.name], shape, x.dtype, x.rounded, axes=[axis])
    else:
        d.add(op, [x.name, d.constant([axis])], shape, x.dtype, x.rounded)


def _slice(d: Draft, x: Value) -> None:
    axis, step = d.number(0, x.rank - 1), d.among((1, 1, 2, -1, -3))
    length = x.shape[axis]
    start = d.number(0, length - 1)
    end = d.number(start + 1, length + 2) if step > 0 else d.among((-length - 1, -(2**62)))
    count = len(range(length)[start : (end if step > 0 else None) : step])
    bounds = [d.constant([v]) for v in (start - length if d.maybe(4) else start, end, axis, step)]
    shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
    if count:
        d.add("Slice", [x.name, *bounds], shape, x.dtype, x.rounded)


def _pad(d: Draft, x: Value) -> None:
    if x.dtype == BOOL:
        return
    mode = d.among(("constant", "constant", "edge", "reflect", *(("wrap",) if d.opset >= 19 else ())))
    most = [2] * x.rank if mode in ("constant", "edge") else [min(2, s - 1) for s in x.shape]
    pads = [d.number(0, most[i % x.rank]) for i in range(2 * x.rank)]
    shape = [s + pads[i] + pads[i + x.rank] for i, s in enumerate(x.shape)]
    value = [d.constant(d.among((0, 1, 3)), x.dtype)] if mode == "constant" and d.maybe() else []
    d.add("Pad", [x.name, d.constant(pads), *value], shape, x.dtype, x.rounded, mode=mode)


def _concat(d: Draft, x: Value) -> None:
    axis = d.number(0, x.rank - 1)
    rest = x.shape[:axis] + x.shape[axis + 1 :]
    fitting = [
        v for v in d.values if v.dtype == x.dtype and v.rank == x.rank and v.shape[:axis] + v.shape[axis + 1 :] == rest
    ]
    parts = [x, *[d.among(fitting) for _ in range(d.number(1, 2))]]
    shape = (*x.shape[:axis], sum(v.shape[axis] for v in parts), *x.shape[axis + 1 :])
    d.add("Concat", [v.name for v in parts], shape, x.dtype, any(v.rounded for v in parts), axis=axis)


def _split(d: Draft, x: Value) -> None:
    axis = d.number(0, x.rank - 1)
    length = x.shape[axis]
    if length < 2:
        return
    first = d.number(1, length - 1)
    shapes = [(*x.shape[:axis], s, *x.shape[axis + 1 :]) for s in (first, length - first)]
    if d.opset < 13:
        d.add_all("Split", [x.name], shapes, x.dtype, x.rounded, axis=axis, split=[first, length - first])
    elif d.opset >= 18 and length == 2 * first and d.maybe():
        d.add_all("Split", [x.name], shapes, x.dtype, x.rounded, axis=axis, num_outputs=2)
    else:
        d.add_all("Split", [x.name, d.constant([first, length - first])], shapes, x.dtype, x.rounded, axis=axis)


def _expand(d: Draft, x: Value) -> None:
    if x.rank < 5:
        shape = (d.number(1, 3), *[s if s > 1 else d.number(1, 3) for s in x.shape])
        d.broadcasts += 1
        d.add("Expand", [x.name, d.constant(shape, I64)], shape, x.dtype, x.rounded)


def _tile(d: Draft, x: Value) -> None:
    repeats = [d.number(1, 2) for _ in x.shape]
    shape = [r * s for r, s in zip(repeats, x.shape, strict=True)]
    d.add("Tile", [x.name, d.constant(repeats)], shape, x.dtype, x.rounded)


def _gather(d: Draft, x: Value) -> None:
    axis = d.number(0, x.rank - 1)
    length = x.shape[axis]
    if d.maybe(3):
        shape = tuple(d.number(1, s) for s in x.shape)
        index = np.random.default_rng(d.number(0, 99)).integers(-length, length, shape)
        d.add("GatherElements", [x.name, d.constant(index)], shape, x.dtype, x.rounded, axis=axis)
        return
    places = d.among(((), (1,), (3,), (2, 2)))
    if x.rank + len(places) - 1 <= 5:
        index = np.random.default_rng(d.number(0, 99)).integers(-length, length, places)
        shape = (*x.shape[:axis], *places, *x.shape[axis + 1 :])
        d.add("Gather", [x.name, d.constant(index)], shape, x.dtype, x.rounded, axis=axis)


def _scatter(d: Draft, x: Value) -> None:
    """Each place once: what is written twice has no order."""
    axis, length = d.number(0, x.rank - 1), 1
    shape = tuple(length if i == axis else s for i, s in enumerate(x.shape))
    index = np.random.default_rng(d.number(0, 99)).integers(0, x.shape[axis], shape)
    updates = d.constant(d.numbers(shape, x.dtype))
    if not x.rounded:
        d.add("ScatterElements", [x.name, d.constant(index), updates], x.shape, x.dtype, axis=axis)


def _depth(d: Draft, x: Value) -> None:
    if x.rank != 4:
        return
    n, c, h, w = x.shape
    if c % 4 == 0 and d.maybe():
        mode = d.among(("DCR", "CRD"))
        d.add("DepthToSpace", [x.name], (n, c // 4, 2 * h, 2 * w), x.dtype, x.rounded, blocksize=2, mode=mode)
    elif h % 2 == 0 and w % 2 == 0:
        d.add("SpaceToDepth", [x.name], (n, 4 * c, h // 2, w // 2), x.dtype, x.rounded, blocksize=2)


def _triangle(d: Draft, x: Value) -> None:
    if x.rank >= 2 and d.opset >= 14:
        more = [d.constant(d.number(-2, 2))] if d.maybe() else []
        d.add("Trilu", [x.name, *more], x.shape, x.dtype, upper=d.number(0, 1))


VIEWS: tuple[Callable[[Draft, Value], None], ...] = (
    _transpose, _reshape, _flatten, _unsqueeze, _squeeze, _slice, _pad, _concat, _split, _expand, _tile, _gather, _scatter,
    _depth, _triangle,
)  # fmt: skip
ANY_RANK = (_reshape, _flatten, _unsqueeze, _expand)


def views(d: Draft, x: Value) -> None:
    """One of them, of any type that ONNX Runtime moves."""
    d.among(VIEWS if x.rank else ANY_RANK)(d, x)


def resize(d: Draft, x: Value) -> None:
    """Images made larger or smaller; the nearest pixel where its place is not half way between two."""
    if x.rank != 4 or x.dtype not in (F16, F32, *BYTES) or x.rounded:
        return
    n, c, h, w = x.shape
    mode = d.among(("nearest", "linear", "linear", "cubic")) if x.dtype in REAL else "nearest"
    factors = [d.among((2, 2, 3, 1)) for _ in range(2)]
    more: dict[str, Any] = {"mode": mode}
    if mode == "nearest":
        more |= {"nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    else:
        more["coordinate_transformation_mode"] = d.among(
            ("half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel")
        )
    shape = (n, c, factors[0] * h, factors[1] * w)
    roi = d.constant(np.zeros(0, F32)) if d.opset < 13 else ""
    if d.maybe():
        d.add("Resize", [x.name, roi, d.constant([1, 1, *factors], F32)], shape, x.dtype, **more)
    else:
        empty = d.constant(np.zeros(0, F32)) if d.opset < 13 else ""
        d.add("Resize", [x.name, roi, empty, d.constant(shape, I64)], shape, x.dtype, **more)


def computed_shape(d: Draft, x: Value) -> None:
    """Shape, Gather, Concat and Reshape, as exporters write `x.view(x.size(0), -1)`; folded away when loaded."""
    if not x.rank:
        return
    shape = d.aside("Shape", [x.name], (x.rank,), I64)
    first = shape and d.aside("Gather", [shape.name, d.constant([0])], (1,), I64, axis=0)
    both = first and d.aside("Concat", [first.name, d.constant([-1])], (2,), I64, axis=0)
    if both:
        d.add("Reshape", [x.name, both.name], (x.shape[0], x.size // x.shape[0]), x.dtype, x.rounded)
