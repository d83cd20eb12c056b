"""Resize of 8-bit tensors: where it looks, and the linear one between DequantizeLinear and QuantizeLinear.

A place in the input for each output along an axis, in float32 as ONNX Runtime computes it:

    place(i) by coordinate_transformation_mode, scale = outputs / inputs or as given:
        half_pixel (i + 1/2) / scale - 1/2          pytorch_half_pixel the same, 0 if there is one output
        asymmetric i / scale                        align_corners i (inputs - 1) / (outputs - 1)
        half_pixel_symmetric                        half_pixel around the middle where inputs * scale is no whole number
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparsec.kernels import resize_int8
from sparsec.kernels.base import roofline_us
from sparsec.kernels.resize_int8 import Taps
from sparsec.lowering.match import attribute, constant, dims
from sparsec.lowering.quantized import fuse_quantized, read_past, source
from sparsec.lowering.rules.base import Context, Taken, emit_simple


def _places(node: ir.Node) -> list[np.ndarray] | str:
    """The place of each output along every axis: float32."""
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    if attribute(node, "antialias", 0):
        return "it antialiases"
    if attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return "it keeps the ratio of its axes"
    given = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    shape, out = dims(x), dims(y)
    chosen = attribute(node, "axes", None)
    axes = range(len(shape)) if chosen is None else [int(a) % len(shape) for a in chosen]
    scales = {axis: np.float32(out[axis]) / np.float32(shape[axis]) for axis in axes}
    if given is not None and given.size:
        scales = dict(zip(axes, given.astype(np.float32).reshape(-1), strict=True))
    mode = attribute(node, "coordinate_transformation_mode", "half_pixel")
    found = []
    for axis, (n, m) in enumerate(zip(shape, out, strict=True)):
        scale, i = scales.get(axis, np.float32(1)), np.arange(m, dtype=np.float32)
        if scale == 1:
            found.append(i)
            continue
        half = np.float32(0.5)
        match mode:
            case "half_pixel":
                place = (i + half) / scale - half
            case "pytorch_half_pixel":
                place = (i + half) / scale - half if m > 1 else i * 0
            case "asymmetric":
                place = i / scale
            case "align_corners":
                place = i * np.float32(n - 1) / np.float32(m - 1) if m > 1 else i * 0
            case "half_pixel_symmetric":
                middle = np.float32(n) / 2
                offset = middle * (1 - np.float32(m) / (scale * np.float32(n)))
                place = offset + (i + half) / scale - half
            case _:
                return f"its coordinates are {mode}"
        found.append(place.astype(np.float32))
    return found


def nearest(node: ir.Node) -> list[np.ndarray] | str:
    """The index in the input of each output along every axis, of a Resize that takes the nearest."""
    if attribute(node, "mode", "nearest") != "nearest":
        return "it interpolates"
    places = _places(node)
    if isinstance(places, str):
        return places
    mode = attribute(node, "nearest_mode", "round_prefer_floor")
    found = []
    for place, n in zip(places, dims(node.inputs[0]), strict=True):  # type: ignore[arg-type]
        match mode:
            case "floor":
                index = np.floor(place)
            case "ceil":
                index = np.ceil(place)
            case "round_prefer_ceil":
                index = np.floor(place + np.float32(0.5))
            case _:
                index = np.ceil(place - np.float32(0.5))
        found.append(np.clip(index, 0, n - 1).astype(np.int64))
    return found


def linear(node: ir.Node) -> tuple[Taps, Taps] | str:
    """Neighbours and weights along the last two axes of a linear Resize; no other axis may be resized."""
    places = _places(node)
    if isinstance(places, str):
        return places
    shape, out = dims(node.inputs[0]), dims(node.outputs[0])  # type: ignore[arg-type]
    if len(shape) < 2 or shape[:-2] != out[:-2]:
        return "it resizes more than the last two axes"
    found = []
    for place, n in zip(places[-2:], shape[-2:], strict=True):
        inside = np.clip(place, 0, n - 1)
        low = np.floor(inside).astype(np.int64)
        found.append(Taps(low, np.minimum(low + 1, n - 1), inside - low))
    return found[0], found[1]


def take_quantized_resize(node: ir.Node, context: Context) -> Taken | str | None:
    """Linear Resize of a dequantized tensor."""
    if node.op_type != "Resize" or attribute(node, "mode", "nearest") != "linear":
        return None
    x = source(node.inputs[0])
    if x is None:
        return None
    found = linear(node)
    if isinstance(found, str):
        return found
    (rows, columns), shape = found, dims(x.value)
    group = fuse_quantized(node, context.taken, through=read_past(node), residual=False)
    if group.steps.y is None and not (rows.exact and columns.exact):
        return "its result is in float, its weights are not exact in fixed point"
    planes = int(np.prod(shape[:-2], dtype=np.int64))
    call = resize_int8.bind(
        context.machine, planes=planes, height=shape[-2], width=shape[-1], rows=rows, columns=columns, x=x.type,
        steps=group.steps,
    )  # fmt: skip
    machine = context.machine.single()
    lines, out = float(planes * rows.size), float(planes * rows.size * columns.size)
    gathered = 2 * out / (machine.loads * machine.ghz * 1e3)  # two loads a result, one by one
    us = gathered + roofline_us(machine, 4 * lines * shape[-1] + 12 * out, 2 * lines * shape[-1] + out)
    return Taken(
        group, emit_simple(group, call, {"x": x.value}, "bilinear, weights in fixed point", us, element="float32")
    )
