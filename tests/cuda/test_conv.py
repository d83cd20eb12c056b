"""Convolutions on CUDA devices against float64, emulated: every right side and tile, borders, strides, groups, batches."""

from __future__ import annotations

import numpy as np
import pytest
from device_layers import ARCHS, GPU, DeviceLayer, check_device_layers, check_resources, round_to

from sparsec.kernels.cuda import conv
from sparsec.kernels.cuda.conv import Plan, Shape
from sparsec.kernels.epilogue import NONE, RELU6, Activation

ELEMENTS = ("float32", "float16")
EPS = {"float32": 2.0**-23, "float16": 2.0**-10}


def layer(element, shape, plan=None, *, activation=NONE, residual="none", with_bias=True):
    rng = np.random.default_rng([*shape.x, *shape.w])
    out = (shape.x[0], shape.w[0], *shape.plane)
    x, w, other = round_to(element, *(rng.standard_normal(s) for s in (shape.x, shape.w, out)))
    bias = rng.standard_normal(shape.w[0]).astype("f") if with_bias else None
    gpu = GPU.half() if element == "float16" else GPU
    w = w.astype("f")
    calls = conv.bind(gpu, shape, w=w, bias=bias, activation=activation, residual=residual, plan=plan)
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
    return [layer(element, padded(1, 5, 9, 9, tile.rows - 3, 3), Plan(tile), activation=RELU6) for tile in tiles]


def direct(element):
    """1x1 on some tiles, planes that divide into chunks and some that do not."""
    tiles = conv.tiles_of(padded(1, 8, 8, 8, 8, 1), element)
    sizes = [(1, 40, 8, 8), (3, 20, 6, 6), (2, 33, 2, 5), (1, 70, 3, 10)]
    chosen = [tiles[0], tiles[2], tiles[3], tiles[-1]]
    return [
        layer(element, padded(*size, 24, 1), Plan(tile), residual="before", activation=RELU6)
        for size, tile in zip(sizes, chosen, strict=True)
    ]


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_tile(element):
    check_device_layers(gathered(element) + direct(element), element)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_every_tile_fits_a_multiprocessor(element, arch):
    for name, (registers, _, shared) in check_resources(gathered(element) + direct(element)[:1], arch).items():
        tile = next(t for t in (*conv.GATHER_TILES, *conv.gemm.CORE_TILES, *conv.gemm.TENSOR_TILES) if f"_{t}_" in name)
        assert shared <= tile.shared
        assert registers * tile.threads <= GPU.registers


@pytest.mark.parametrize("element", ELEMENTS)
def test_geometries(element):
    silu = Activation("silu")
    layers = [
        layer(element, padded(1, 3, 17, 13, 20, 7, 2)),  # a stem: few channels
        layer(element, padded(2, 1, 6, 7, 5, 5), activation=silu),
        layer(element, padded(3, 16, 7, 7, 24, 3, 2), residual="after", activation=silu),  # planes that fill no chunk
        layer(element, padded(2, 10, 7, 7, 18, 1), with_bias=False),  # odd planes: gathered though 1x1
        layer(element, padded(1, 24, 9, 8, 40, 1, 2)),
        layer(element, padded(2, 24, 6, 5, 36, 3, 1, groups=3)),
        layer(element, padded(1, 16, 8, 8, 32, 1, 1, groups=2), residual="before"),
        layer(element, padded(1, 9, 9, 9, 6, 3, 1, dilation=2)),
        layer(element, Shape((1, 6, 1, 30), (7, 6, 1, 5), (1, 2), (0, 3, 0, 1))),  # one-dimensional, uneven pads
        layer(element, Shape((2, 5, 4, 6), (9, 5, 4, 6))),  # one pixel
    ]
    check_device_layers(layers, element)


@pytest.mark.parametrize("element", ELEMENTS)
def test_sums_in_parts(element):
    tile = conv.tiles_of(padded(1, 8, 8, 8, 8, 3), element)[-1]
    direct_tile = conv.tiles_of(padded(1, 8, 8, 8, 8, 1), element)[-1]
    layers = [
        layer(element, padded(2, 40, 5, 6, 20, 3), Plan(tile, 3), residual="before", activation=RELU6),
        layer(element, padded(1, 100, 4, 4, 20, 1), Plan(direct_tile, 2)),
        layer(element, padded(2, 24, 5, 6, 20, 3, groups=2), Plan(tile, 2)),
    ]
    check_device_layers(layers, element)


@pytest.mark.parametrize("element", ELEMENTS)
def test_weights_come_back(element):
    gpu = GPU.half() if element == "float16" else GPU
    for shape in (padded(1, 24, 8, 8, 12, 3, groups=2), padded(1, 3, 8, 8, 12, 5), padded(1, 24, 8, 8, 12, 1)):
        w = round_to(element, np.random.default_rng(0).standard_normal(shape.w))[0].astype("f")
        for tile in conv.tiles_of(shape, element):
            np.testing.assert_array_equal(conv.unpack(conv.pack(gpu, w, shape, Plan(tile, 2)), shape).astype("f"), w)


def test_choice_follows_the_work():
    half = GPU.half()
    assert conv.plans(half, padded(32, 256, 56, 56, 256, 3))[0][1] == Plan(conv.GATHER_TILES[0])
    assert conv.plans(half, padded(1, 512, 7, 7, 512, 3))[0][1].splits > 1
    assert conv.predict_us(half, padded(8, 64, 56, 56, 64, 3)) < conv.predict_us(GPU, padded(8, 64, 56, 56, 64, 3))
