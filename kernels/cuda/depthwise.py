"""Depthwise convolution on CUDA devices: every output channel reads one input channel.

    y[n, c, oy, ox] = act(bias[c] + sum over (kh, kw) of w[c, kh, kw] * x[n, c // m, oy * sh + kh - top, ox * sw + kw - left])

A thread computes `strip` output rows of one column: a row that it loads serves every kernel row that meets it. Threads
follow columns, so that a warp reads neighbours; kernel columns that overlap come from L1. Bound by memory: no shared
memory, no barrier. Stored form: `weights[c][KH * KW + 1]` float32, the bias last.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit as tir
from sparsec.kernels.base import Format, unique
from sparsec.kernels.cuda import emit
from sparsec.kernels.cuda.base import DeviceCall, Gpu, roofline_us
from sparsec.kernels.cuda.conv import Shape
from sparsec.kernels.depthwise import pack, reference, unpack
from sparsec.kernels.epilogue import NONE, Activation, Residual, finish
from sparsec.program import Launch

__all__ = ["MAX_TAPS", "TABLE", "bind", "pack", "predict_us", "reference", "refusal", "unpack"]

TABLE: tuple[Format, ...] = (
    Format("cuda_depthwise_f32", "Conv", "dense", "float32", "depthwise convolution, strips of rows a thread",
           "groups == input channels, at most 128 kernel positions"),
)  # fmt: skip

MAX_TAPS = 128
THREADS = 128  # of a block
STRIPS = (8, 4, 2, 1)  # output rows of a thread
UNROLLED = 128  # multiply-adds of a thread, at most


def refusal(shape: Shape) -> str | None:
    """Why this family cannot run a Conv, or None if it can."""
    if shape.groups != shape.x[1] or shape.w[1] != 1 or shape.w[0] % shape.groups:
        return f"not depthwise: {shape.groups} groups for {shape.x[1]} input channels"
    if shape.taps > MAX_TAPS:
        return f"{shape.w[2]}x{shape.w[3]} kernel: at most {MAX_TAPS} positions are unrolled"
    return None


def strip_of(gpu: Gpu, shape: Shape) -> int:
    """Output rows of a thread: as many as leave every multiprocessor eight warps, and code of bounded size."""
    columns = shape.x[0] * shape.w[0] * shape.plane[1]
    for strip in STRIPS[:-1]:
        enough = columns * -(-shape.plane[0] // strip) >= 8 * emit.WARP * gpu.multiprocessors
        if enough and strip <= shape.plane[0] and strip * shape.taps <= UNROLLED:
            return strip
    return 1


def predict_us(gpu: Gpu, shape: Shape) -> float:
    """Time by memory, or by loads of a thread."""
    out = shape.x[0] * shape.w[0] * shape.pixels
    strip = strip_of(gpu, shape)
    loads = ((strip - 1) * shape.strides[0] + shape.w[2]) * shape.w[3] + shape.taps  # x and weights
    cycles = out / strip * loads / emit.WARP / gpu.multiprocessors
    moved = gpu.item * float(np.prod(shape.x) + out)
    return max(roofline_us(gpu, 2.0 * out * shape.taps, moved), cycles / (gpu.ghz * 1e3) + gpu.launch_us)


def bind(
    gpu: Gpu, shape: Shape, *, w: np.ndarray, bias: np.ndarray | None = None, activation: Activation = NONE,
    residual: Residual = "none", strip: int | None = None,
) -> DeviceCall:  # fmt: skip
    """The call for one layer. w [OC, 1, KH, KW] float32, bias [OC]. Roles (x, y[, residual], weights)."""
    n, channels, height, width = shape.x
    out_channels, (oh, ow) = shape.w[0], shape.plane
    multiplier = out_channels // channels
    strip = strip or strip_of(gpu, shape)
    strips, taps = -(-oh // strip), shape.taps
    (kh_count, kw_count), (sh, sw), (dh, dw) = shape.w[2:], shape.strides, shape.dilations
    packed = pack(w, bias)
    size = n * out_channels * strips * ow

    def body(*arguments: Any) -> None:
        *buffers, (block,), (thread,) = arguments
        named = dict(zip(roles, buffers, strict=True))
        i = T.bind(block * THREADS + thread)
        if size % THREADS:
            with T.If(i < size), T.Then():
                one(i, named)
        else:
            one(i, named)

    def one(i: Any, named: dict[str, Any]) -> None:
        x, y, weights = named["x"], named["y"], named["weights"]
        ox, first = T.bind(i % ow), T.bind(i // ow % strips * strip)
        plane = T.bind(i // (ow * strips))
        channel = T.bind(plane % out_channels) if n > 1 else plane
        source = T.bind(plane // multiplier * (height * width))  # also right for n > 1: OC is a multiple of m
        at = T.bind(channel * (taps + 1))
        top, left = T.bind(first * sh - shape.pads[0]), T.bind(ox * sw - shape.pads[1])
        sums = emit.local(strip)
        for r in range(strip):
            T.buffer_store(sums, weights[at + taps], [r])
        beside = [None] * kw_count
        if any(shape.pads) or (ow - 1) * sw + (kw_count - 1) * dw >= width:
            beside = [T.bind(tirx.all(left + kw * dw >= 0, left + kw * dw < width)) for kw in range(kw_count)]
        rows = sorted({r * sh + kh * dh for r in range(strip) for kh in range(kh_count)})
        value = emit.local(1, gpu.element)
        for row in rows:
            y_in = T.bind(top + row)
            inside = T.bind(tirx.all(y_in >= 0, y_in < height))
            start = T.bind(source + y_in * width + left)
            offsets = [(r, row - r * sh) for r in range(strip)]
            users = [(r, down // dh) for r, down in offsets if down % dh == 0 and 0 <= down <= (kh_count - 1) * dh]
            for kw in range(kw_count):
                exists = inside if beside[kw] is None else tirx.all(inside, beside[kw])
                loaded = emit.address(x, start + kw * dw)
                emit.call("sparsec_load_if", emit.address(value, 0), loaded, T.if_then_else(exists, 1, 0))
                for r, kh in users:
                    term = tir.convert(value[0], "float32") * weights[at + kh * kw_count + kw]
                    T.buffer_store(sums, sums[r] + term, [r])
        out = T.bind(plane * (oh * ow) + first * ow + ox)
        for r in range(strip):
            if oh % strip:
                with T.If(first + r < oh), T.Then():
                    store(named, y, out + r * ow, sums[r])
            else:
                store(named, y, out + r * ow, sums[r])

    def store(named: dict[str, Any], y: Any, at: Any, value: Any) -> None:
        other = tir.convert(named["residual"][at], "float32") if residual != "none" else None
        T.buffer_store(y, tir.convert(finish(value, activation, residual, other), gpu.element), [at])

    roles = ("x", "y", "residual", "weights") if residual != "none" else ("x", "y", "weights")
    out_size = n * out_channels * oh * ow
    sizes = {
        "x": (int(np.prod(shape.x)), gpu.element), "y": (out_size, gpu.element), "residual": (out_size, gpu.element),
        "weights": (packed.size, "float32"),
    }  # fmt: skip
    grid = -(-size // THREADS)
    func = emit.function([(role, *sizes[role]) for role in roles], grid, THREADS, body)
    kernel = f"{shape.w[2]}x{shape.w[3]}s{sh}{sw}"
    name = unique(f"{gpu.named(TABLE[0].name)}_{kernel}", shape, strip, activation, residual, gpu.element)
    text = f"depthwise {kernel} on {n} x {channels}x{height}x{width}, {activation.name}, residual {residual}"
    launch = Launch((grid, 1, 1), (THREADS, 1, 1))
    return DeviceCall(name, func, roles, {"weights": packed}, launch, {}, text)
