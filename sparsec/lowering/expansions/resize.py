"""Resize as gathers at constant positions, one axis after the other.

    y[i] = sum_t w_t[i] x[clip(p_t[i], 0, n - 1)]       1 tap for nearest, 2 for linear, 4 for cubic; antialias: more

Positions are float32, after the formulas of ONNX in the precision of ONNX Runtime. With antialias and a scale s < 1 the
kernel is stretched by 1 / s and its weights sum to one; elsewhere it is the plain one.
https://onnx.ai/onnx/operators/onnx__Resize.html
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx

from sparsec.lowering.expansions.context import Chain, Context, ExpansionError, attribute

Taps = list[tuple[np.ndarray, "np.ndarray | None"]]  # indices and weights; no weight means 1


@dataclass(frozen=True)
class _Axis:
    axis: int
    n: int  # of x
    m: int  # of y
    scale: np.float32
    crop: tuple[float, float]  # first and last place, as shares of the input


def resize(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto]:
    """One gather an axis and tap, weighted."""
    x, output = node.input[0], node.output[0]
    mode = str(attribute(node, "mode", "nearest"))
    transform = str(attribute(node, "coordinate_transformation_mode", "half_pixel"))
    antialias = bool(attribute(node, "antialias", 0))
    rank = len(context.shape(x))
    chain = Chain(context, output)
    outside: list[str] = []
    for one in _axes(node, context, transform):
        if one.m == one.n and one.scale == 1 and one.crop == (0, 1):
            continue
        places = _positions(one, transform)
        taps = _stretched(node, mode, places, one) if antialias and one.scale < 1 else _taps(node, mode, places, one.n)
        along = [-1] + [1] * (rank - 1 - one.axis)
        total = ""
        for index, weight in taps:
            term = chain.add("Gather", x, chain.const(np.clip(index, 0, one.n - 1)), axis=one.axis)
            if weight is not None:
                term = chain.add("Mul", term, chain.const(weight.reshape(along), np.float32))
            total = chain.add("Add", total, term) if total else term
        x = total
        if transform == "tf_crop_and_resize":
            beyond = (places < 0) | (places > one.n - 1)
            if beyond.any():
                outside.append(chain.const(beyond.reshape(along), bool))
    for mask in outside:
        x = chain.add("Where", mask, chain.const(attribute(node, "extrapolation_value", 0.0), np.float32), x)
    chain.add("Identity", x, result=output)
    return chain.nodes


def _axes(node: onnx.NodeProto, context: Context, transform: str) -> list[_Axis]:
    """Of each resized axis: sizes, scale and crop."""
    shape, made = context.shape(node.input[0]), context.shape(node.output[0])
    axes = [int(a) % len(shape) for a in attribute(node, "axes", range(len(shape)))]
    roi, scales, sizes = (context.value(name) if name else np.zeros(0) for name in [*node.input[1:], "", "", ""][:3])
    if scales.size:
        scales = scales.astype(np.float32)
        lengths = [int(np.floor(np.float32(shape[a]) * s)) for a, s in zip(axes, scales, strict=True)]
    else:
        wanted = [float(m) / shape[a] for a, m in zip(axes, sizes, strict=True)]
        policy = attribute(node, "keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            wanted = [min(wanted) if policy == "not_larger" else max(wanted)] * len(axes)
            lengths = [int(s * shape[a] + 0.5) for a, s in zip(axes, wanted, strict=True)]
        else:
            lengths = [int(m) for m in sizes]
        scales = np.array(wanted, np.float32)
    if lengths != [made[a] for a in axes]:
        raise ExpansionError(f"Resize makes {lengths} of {shape}, declared is {made}")
    crops = [(0.0, 1.0)] * len(axes)
    if transform == "tf_crop_and_resize":
        crops = [(float(roi[i]), float(roi[len(axes) + i])) for i in range(len(axes))]
    if transform == "align_corners":
        for a, m, scale in zip(axes, lengths, scales, strict=True):
            if m > 1 and abs(m - shape[a] * float(scale)) > 1e-5 * m:  # ONNX divides by n s - 1, ONNX Runtime by m - 1
                raise ExpansionError(f"Resize with align_corners of {shape[a]} by {scale:g}: not a whole size")
    return [_Axis(a, shape[a], m, np.float32(s), c) for a, m, s, c in zip(axes, lengths, scales, crops, strict=True)]


def _positions(one: _Axis, transform: str) -> np.ndarray:
    """Coordinates in the input, float32 as in ONNX Runtime, of the m outputs along an axis of n."""
    half, out = np.float32(0.5), np.arange(one.m, dtype=np.float32)
    n, m, scale = one.n, one.m, one.scale
    if transform == "align_corners":
        return out * np.float32(n - 1) / np.float32(m - 1) if m > 1 else out * 0
    if transform == "asymmetric":
        return out / scale
    if transform == "tf_crop_and_resize":
        first, last = (np.float32(share) for share in one.crop)
        end = np.float32(n - 1)
        if m > 1:
            return first * end + out * (last - first) * end / np.float32(m - 1)
        return half * (first + last) * end + out
    centred = (out + half) / scale - half
    if transform == "half_pixel":
        return centred
    if transform == "pytorch_half_pixel":
        return centred if m > 1 else out * 0
    if transform == "half_pixel_symmetric":
        return np.float32(n / 2 * (1 - m / (float(scale) * n))) + centred
    raise ExpansionError(f"Resize with coordinate_transformation_mode {transform!r} has no lowering")


def _taps(node: onnx.NodeProto, mode: str, x: np.ndarray, n: int) -> Taps:
    """Indices and weights whose weighted sum is the result."""
    if mode == "nearest":
        rounding: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "round_prefer_floor": lambda v: np.ceil(v - np.float32(0.5)),
            "round_prefer_ceil": lambda v: np.floor(v + np.float32(0.5)),
            "floor": np.floor,
            "ceil": np.ceil,
        }
        return [(rounding[str(attribute(node, "nearest_mode", "round_prefer_floor"))](x), None)]
    if mode == "linear":
        x = np.clip(x, 0, n - 1)
        low = np.floor(x)
        share = x - low
        return [(low, 1 - share), (low + 1, share)]
    if mode == "cubic":
        a = float(attribute(node, "cubic_coeff_a", -0.75))
        low = np.floor(x)
        t = x - low
        indices = [low + d for d in (-1, 0, 1, 2)]
        weights = [_cubic(t + 1, a), _cubic(t, a), _cubic(1 - t, a), _cubic(2 - t, a)]
        return _within(node, indices, weights, n)
    raise ExpansionError(f"Resize with mode {mode!r} has no lowering")


def _stretched(node: onnx.NodeProto, mode: str, x: np.ndarray, one: _Axis) -> Taps:
    """The taps of a kernel that is wider than one input step by 1 / scale."""
    if mode not in ("linear", "cubic"):
        raise ExpansionError(f"Resize with antialias and mode {mode!r} has no lowering")
    reach, scale = (1 if mode == "linear" else 2), float(one.scale)
    low = np.ceil(x) - 1  # an input in the middle counts as the right one
    start = int(np.floor(-reach / scale) + 1)
    indices = [low + d for d in range(start, reach + 1 - start)]
    distances = [np.abs(scale * (i - x.astype(np.float64))) for i in indices]
    if mode == "linear":
        weights = [np.clip(1 - d, 0, 1) for d in distances]
    else:
        a = float(attribute(node, "cubic_coeff_a", -0.75))
        weights = [np.where(d < 2, _cubic(d, a), 0) for d in distances]
    total = np.sum(weights, axis=0)
    return _within(node, indices, [w / total for w in weights], one.n)


def _cubic(d: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel at the distance d, 0..2."""
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    return np.where(d <= 1, near, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a)


def _within(node: onnx.NodeProto, indices: list[np.ndarray], weights: list[np.ndarray], n: int) -> Taps:
    """With exclude_outside: no weight outside, and the others again sum to one."""
    if attribute(node, "exclude_outside", 0):
        weights = [np.where((i >= 0) & (i < n), w, 0) for i, w in zip(indices, weights, strict=True)]
        total = np.sum(weights, axis=0)
        weights = [w / np.where(total == 0, 1, total) for w in weights]
    return list(zip(indices, weights, strict=True))
