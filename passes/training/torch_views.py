"""Views and selections: operators that only move elements, or mix neighbours as Resize does, in torch.

A row of `VIEWS` makes the function of one node, as in `torch_ops.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from sparsec.passes.training.torch_spec import Function, Spec, Tensor, Unsupported, following, static_shape


def _reshape(spec: Spec) -> Function:
    """To the static output shape; a leading 1 on both sides is a batch and stays what it is at run time."""
    before, after = spec.shape(), spec.out()
    if before[:1] == (1,) and after[:1] == (1,):
        return lambda x, *_: x.reshape(x.shape[0], *after[1:])
    return lambda x, *_: x.reshape(after)


def _transpose(spec: Spec) -> Function:
    axes = spec.ints("perm") or list(reversed(range(len(spec.shape()))))
    return lambda x: x.permute(axes)


def _concat(spec: Spec) -> Function:
    axis = spec.axis(0, len(spec.shape()))
    return lambda *x: torch.cat(x, axis)


def _split(spec: Spec) -> Function:
    axis = spec.axis(0, len(spec.shape()))
    parts = [static_shape(y)[axis] for y in spec.node.outputs]
    return lambda x, *_: torch.split(x, parts, axis)


def _slice(spec: Spec) -> Function:
    shape = spec.shape()
    starts, ends = spec.constant(1, "start"), spec.constant(2, "end")
    axes = spec.constant(3, "axes") if spec.has(3) else list(range(len(starts)))
    steps = spec.constant(4, "steps") if spec.has(4) else [1] * len(starts)
    cuts: list[tuple[int, range, Callable[[Tensor], Tensor]]] = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= len(shape)
        extent = shape[axis]
        r = range(*slice(start, None if step < 0 and end < -extent else end, step).indices(extent))
        cuts.append((axis, r, following(torch.tensor(list(r) if step < 0 else [], dtype=torch.int64))))

    def apply(x: Tensor, *_: Tensor) -> Tensor:
        for axis, r, indices in cuts:
            if r.step < 0:
                x = x.index_select(axis, indices(x))
            elif len(r) != shape[axis]:
                at = [slice(None)] * axis + [slice(r.start, r.stop, r.step)]
                x = x[tuple(at)]
        return x

    return apply


def _gather(spec: Spec) -> Function:
    shape = spec.shape()
    axis = spec.axis(0, len(shape))
    extent = shape[axis]

    def apply(x: Tensor, indices: Tensor) -> Tensor:
        at = torch.where(indices < 0, indices + extent, indices).to(torch.int64)
        y = x.index_select(axis, at.reshape(-1))
        return y.reshape(*x.shape[:axis], *at.shape, *x.shape[axis + 1 :])

    return apply


def _gather_elements(spec: Spec) -> Function:
    shape = spec.shape()
    axis = spec.axis(0, len(shape))
    extent = shape[axis]
    return lambda x, i: torch.gather(x, axis, torch.where(i < 0, i + extent, i).to(torch.int64))


def _expand(spec: Spec) -> Function:
    shape = spec.out()
    return lambda x, *_: x.expand(shape)


def _tile(spec: Spec) -> Function:
    repeats = spec.constant(1, "repeats")
    return lambda x, *_: x.repeat(repeats)


def _pad(spec: Spec) -> Function:
    rank, mode = len(spec.shape()), spec.text("mode", "constant")
    pads = spec.constant(1, "pads")
    axes = [a % rank for a in spec.constant(3, "axes")] if spec.has(3) else list(range(rank))
    value = spec.constant(2, "value")[0] if spec.has(2) else 0.0
    half = len(pads) // 2
    if mode == "constant":
        pairs = [0] * (2 * rank)
        for axis, b, e in zip(axes, pads[:half], pads[half:], strict=True):
            pairs[2 * (rank - 1 - axis)], pairs[2 * (rank - 1 - axis) + 1] = b, e
        return lambda x, *_: F.pad(x, pairs, value=value)
    if mode not in ("edge", "reflect", "wrap"):
        raise Unsupported(f"its mode is {mode}")
    extents = spec.shape()
    cuts = []  # the source of every element along an axis
    for axis, b, e in zip(axes, pads[:half], pads[half:], strict=True):
        if b or e:
            numpy_mode = {"edge": "edge", "reflect": "reflect", "wrap": "wrap"}[mode]
            kept = np.arange(max(-b, 0), extents[axis] - max(-e, 0))
            source = np.pad(kept, (max(b, 0), max(e, 0)), mode=numpy_mode)  # type: ignore[call-overload]
            cuts.append((axis, following(torch.from_numpy(source))))

    def apply(x: Tensor, *_: Tensor) -> Tensor:
        for axis, source in cuts:
            x = x.index_select(axis, source(x))
        return x

    return apply


def _depth_to_space(spec: Spec) -> Function:
    b, mode = spec.int("blocksize", 1), spec.text("mode", "DCR")

    def apply(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        k = c // (b * b)
        if mode == "DCR":
            return x.reshape(n, b, b, k, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, k, h * b, w * b)
        return x.reshape(n, k, b, b, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, k, h * b, w * b)

    return apply


def _space_to_depth(spec: Spec) -> Function:
    b = spec.int("blocksize", 1)

    def apply(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        split = x.reshape(n, c, h // b, b, w // b, b)
        return split.permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)

    return apply


def _squeeze(spec: Spec) -> Function:
    rank = len(spec.shape())
    if spec.has(1):
        axes = [a % rank for a in spec.constant(1, "axes")]
    else:
        axes = [i for i, d in enumerate(spec.shape()) if d == 1]
    return lambda x, *_: x.squeeze(tuple(axes))


def _unsqueeze(spec: Spec) -> Function:
    rank = len(spec.out())
    axes = sorted(a % rank for a in spec.constant(1, "axes"))

    def apply(x: Tensor, *_: Tensor) -> Tensor:
        for axis in axes:
            x = x.unsqueeze(axis)
        return x

    return apply


def _flatten(spec: Spec) -> Function:
    shape = spec.shape()
    axis = spec.int("axis", 1)
    axis += len(shape) if axis < 0 else 0
    if axis == 1:
        return lambda x: x.reshape(x.shape[0], math.prod(shape[1:]))
    after = (math.prod(shape[:axis]), math.prod(shape[axis:]))
    return lambda x: x.reshape(after)


def _resize(spec: Spec) -> Function:
    """Nearest or linear: along each axis that changes, y = M x with M[out, in] made from the page's coordinate law."""
    mode, law = spec.text("mode", "nearest"), spec.text("coordinate_transformation_mode", "half_pixel")
    before, after = spec.shape(), spec.out()
    if mode not in ("nearest", "linear") or law not in _COORDINATES or spec.int("antialias", 0):
        raise Unsupported(f"its mode is {mode}, {law}")
    scales = dict(enumerate(spec.constant(2, "scales"))) if spec.has(2) else {}
    if spec.ints("axes") or len(scales) not in (0, len(before)):
        raise Unsupported("it names axes")
    rounding = spec.text("nearest_mode", "round_prefer_floor")
    steps = []
    for axis, (n, m) in enumerate(zip(before, after, strict=True)):
        scale = scales.get(axis, m / n)
        if n != m or scale != 1:
            source = _COORDINATES[law](np.arange(m, dtype=np.float64), scale, n, m)
            steps.append((axis, following(torch.from_numpy(_interpolation(source, n, mode, rounding)))))

    def apply(x: Tensor, *_: Tensor) -> Tensor:
        for axis, matrix in steps:
            x = torch.movedim(torch.movedim(x, axis, -1) @ matrix(x).mT, -1, axis)
        return x

    return apply


_COORDINATES: dict[str, Callable[[np.ndarray, float, int, int], np.ndarray]] = {
    "half_pixel": lambda i, s, n, m: (i + 0.5) / s - 0.5,
    "pytorch_half_pixel": lambda i, s, n, m: (i + 0.5) / s - 0.5 if m > 1 else np.zeros(1),
    "asymmetric": lambda i, s, n, m: i / s,
    "align_corners": lambda i, s, n, m: i * (n - 1) / (m - 1) if m > 1 else np.zeros(1),
}


def _interpolation(source: np.ndarray, n: int, mode: str, rounding: str) -> np.ndarray:
    """[out, in]: the weight of every input element in each output element."""
    matrix = np.zeros((len(source), n), np.float32)
    rows = np.arange(len(source))
    if mode == "nearest":
        nearest = {
            "round_prefer_floor": np.ceil(source - 0.5), "round_prefer_ceil": np.floor(source + 0.5),
            "floor": np.floor(source), "ceil": np.ceil(source),
        }[rounding]  # fmt: skip
        matrix[rows, np.clip(nearest, 0, n - 1).astype(int)] = 1
        return matrix
    source = np.clip(source, 0, n - 1)
    low = np.floor(source).astype(int)
    np.add.at(matrix, (rows, low), 1 - (source - low))
    np.add.at(matrix, (rows, np.minimum(low + 1, n - 1)), source - low)
    return matrix


VIEWS: dict[str, Callable[[Spec], Function]] = {
    "Concat": _concat, "DepthToSpace": _depth_to_space, "Expand": _expand, "Flatten": _flatten, "Gather": _gather,
    "GatherElements": _gather_elements, "Pad": _pad, "Reshape": _reshape, "Resize": _resize, "Slice": _slice,
    "SpaceToDepth": _space_to_depth, "Split": _split, "Squeeze": _squeeze, "Tile": _tile, "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}  # fmt: skip
