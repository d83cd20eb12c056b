"""Convolutions on CUDA devices against float64, emulated: every right side and tile, borders, strides, groups, batches."""

from __future__ import annotations

import numpy as np
import pytest
from dense_layers import ELEMENTS, convolution, direct, gathered, padded
from device_layers import GPU, check_device_layers, round_to

from sparsec.kernels.cuda import conv
from sparsec.kernels.cuda.conv import Plan, Shape
from sparsec.kernels.epilogue import RELU6, Activation


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_tile(element):
    check_device_layers(gathered(element) + direct(element), element)


@pytest.mark.parametrize("element", ELEMENTS)
def test_geometries(element):
    silu = Activation("silu")
    layers = [
        convolution(element, padded(1, 3, 17, 13, 20, 7, 2)),  # a stem: few channels
        convolution(element, padded(2, 1, 6, 7, 5, 5), activation=silu),
        convolution(
            element, padded(3, 16, 7, 7, 24, 3, 2), residual="after", activation=silu
        ),  # planes that fill no chunk
        convolution(element, padded(2, 10, 7, 7, 18, 1), with_bias=False),  # odd planes: gathered though 1x1
        convolution(element, padded(1, 24, 9, 8, 40, 1, 2)),
        convolution(element, padded(2, 24, 6, 5, 36, 3, 1, groups=3)),
        convolution(element, padded(1, 16, 8, 8, 32, 1, 1, groups=2), residual="before"),
        convolution(element, padded(1, 9, 9, 9, 6, 3, 1, dilation=2)),
        convolution(element, Shape((1, 6, 1, 30), (7, 6, 1, 5), (1, 2), (0, 3, 0, 1))),  # one-dimensional, uneven pads
        convolution(element, Shape((2, 5, 4, 6), (9, 5, 4, 6))),  # one pixel
    ]
    check_device_layers(layers, element)


@pytest.mark.parametrize("element", ELEMENTS)
def test_sums_in_parts(element):
    tile = conv.tiles_of(padded(1, 8, 8, 8, 8, 3), element)[-1]
    direct_tile = conv.tiles_of(padded(1, 8, 8, 8, 8, 1), element)[-1]
    layers = [
        convolution(element, padded(2, 40, 5, 6, 20, 3), Plan(tile, 3), residual="before", activation=RELU6),
        convolution(element, padded(1, 100, 4, 4, 20, 1), Plan(direct_tile, 2)),
        convolution(element, padded(2, 24, 5, 6, 20, 3, groups=2), Plan(tile, 2)),
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
