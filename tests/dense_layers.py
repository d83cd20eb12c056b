"""Dense products and convolutions for CUDA devices with what they must give, for tests of their values and of their code."""

from __future__ import annotations

import numpy as np
from device_layers import GPU, DeviceLayer, round_to

from sparsec.kernels.cuda import conv, gemm
from sparsec.kernels.cuda.conv import Plan, Shape
from sparsec.kernels.epilogue import NONE, RELU6

ELEMENTS = ("float32", "float16")
EPS = {"float32": 2.0**-23, "float16": 2.0**-10}  # of what is stored; sums are float32 always


def on(element):
    return GPU.half() if element == "float16" else GPU


def close(element, terms, size, values):
    """A sum of `terms` products of magnitude `size` in float32, then rounded to the element."""
    return (terms + 8) * EPS["float32"] * (size + 8) + EPS[element] * (np.abs(values) + 2.0**-14)


def product(element, m, k, n, plan=None, *, activation=NONE, residual="none", with_bias=True):
    rng = np.random.default_rng([m, k, n])
    x, w, other = round_to(element, *(rng.standard_normal(s) for s in ((m, k), (n, k), (m, n))))
    bias = rng.standard_normal(n).astype("f") if with_bias else None
    gpu = on(element)
    calls = gemm.bind(gpu, m=m, w=w.astype("f"), bias=bias, activation=activation, residual=residual, plan=plan)
    expected = gemm.reference(x, w, bias, activation, residual, other)
    tolerance = close(element, k, gemm.reference(np.abs(x), np.abs(w)), expected)
    given = {"x": x, "residual": other} if residual != "none" else {"x": x}
    rooms = {"parts": (calls[1].func.params[0].shape[0].value, "float32")} if len(calls) > 1 else {}
    return DeviceLayer(calls, expected, tolerance, given, rooms)


def ragged(element, tile):
    return product(element, tile.rows + 3, 2 * tile.depth + 5, tile.columns + 9, gemm.Plan(tile))


def convolution(element, shape, plan=None, *, activation=NONE, residual="none", with_bias=True):
    rng = np.random.default_rng([*shape.x, *shape.w])
    out = (shape.x[0], shape.w[0], *shape.plane)
    x, w, other = round_to(element, *(rng.standard_normal(s) for s in (shape.x, shape.w, out)))
    bias = rng.standard_normal(shape.w[0]).astype("f") if with_bias else None
    w = w.astype("f")
    calls = conv.bind(on(element), shape, w=w, bias=bias, activation=activation, residual=residual, plan=plan)
    expected = conv.reference(shape, x, w, bias, activation, residual, other)
    size = conv.reference(shape, np.abs(x), np.abs(w))
    terms = shape.taps * shape.w[1]
    tolerance = (terms + 8) * EPS["float32"] * (size + 8) + EPS[element] * (np.abs(expected) + 2.0**-14)
    given = {"x": x, "residual": other} if residual != "none" else {"x": x}
    rooms = {"parts": (calls[1].func.params[0].shape[0].value, "float32")} if len(calls) > 1 else {}
    return DeviceLayer(calls, expected, tolerance, given, rooms)


def padded(n, c, h, w, oc, k, stride=1, groups=1, dilation=1):
    pad = dilation * (k // 2)
    return Shape((n, c, h, w), (oc, c // groups, k, k), (stride, stride), (pad,) * 4, (dilation,) * 2, groups)


def gathered(element):
    """3x3 on every tile, ragged."""
    tiles = conv.tiles_of(padded(1, 8, 8, 8, 8, 3), element)
    return [convolution(element, padded(1, 5, 9, 9, tile.rows - 3, 3), Plan(tile), activation=RELU6) for tile in tiles]


def direct(element):
    """1x1 on some tiles, planes that divide into chunks and some that do not."""
    tiles = conv.tiles_of(padded(1, 8, 8, 8, 8, 1), element)
    sizes = [(1, 40, 8, 8), (3, 20, 6, 6), (2, 33, 2, 5), (1, 70, 3, 10)]
    chosen = [tiles[0], tiles[2], tiles[3], tiles[-1]]
    return [
        convolution(element, padded(*size, 24, 1), Plan(tile), residual="before", activation=RELU6)
        for size, tile in zip(sizes, chosen, strict=True)
    ]
