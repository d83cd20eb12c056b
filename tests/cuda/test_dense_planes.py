"""Depthwise convolution, pooling and normalizations on CUDA devices against float64, emulated."""

from __future__ import annotations

import numpy as np
import pytest
from device_layers import ARCHS, GPU, DeviceLayer, check_device_layers, check_resources, round_to

from sparsec.kernels.cuda import depthwise, normalize, pool
from sparsec.kernels.cuda.conv import Shape
from sparsec.kernels.epilogue import NONE, RELU6, Activation
from sparsec.kernels.planes import Window

ELEMENTS = ("float32", "float16")
EPS = {"float32": 2.0**-23, "float16": 2.0**-10}


def on(element):
    return GPU.half() if element == "float16" else GPU


def near(element, terms, size, expected):
    return (terms + 8) * EPS["float32"] * (np.abs(size) + 4) + EPS[element] * (np.abs(expected) + 2.0**-14)


def by_channel(element, shape, strip=None, *, activation=NONE, residual="none"):
    rng = np.random.default_rng([*shape.x, *shape.w])
    out = (shape.x[0], shape.w[0], *shape.plane)
    x, other = round_to(element, rng.standard_normal(shape.x), rng.standard_normal(out))
    w, bias = rng.standard_normal(shape.w).astype("f"), rng.standard_normal(shape.w[0]).astype("f")
    call = depthwise.bind(on(element), shape, w=w, bias=bias, activation=activation, residual=residual, strip=strip)
    options = {"strides": shape.strides, "pads": shape.pads, "dilations": shape.dilations}
    expected = depthwise.reference(x, w, bias, **options, activation=activation, residual=residual, other=other)
    size = depthwise.reference(np.abs(x), np.abs(w), np.abs(bias), **options)
    given = {"x": x, "residual": other} if residual != "none" else {"x": x}
    return DeviceLayer((call,), expected, near(element, shape.taps, size, expected), given)


def depthwise_layers(element):
    silu = Activation("silu")
    return [
        by_channel(element, Shape((2, 5, 9, 7), (5, 1, 3, 3), pads=(1, 1, 1, 1), groups=5), 4, activation=RELU6),
        by_channel(element, Shape((1, 4, 14, 11), (4, 1, 3, 3), (2, 2), (0, 0, 1, 1), groups=4), 2, residual="before"),
        by_channel(element, Shape((3, 2, 8, 8), (6, 1, 5, 5), pads=(2, 2, 2, 2), groups=2), 8, activation=silu),
        by_channel(element, Shape((1, 3, 10, 9), (3, 1, 3, 3), pads=(2, 2, 2, 2), dilations=(2, 2), groups=3), 4),
        by_channel(element, Shape((1, 6, 1, 40), (6, 1, 1, 9), pads=(0, 4, 0, 4), groups=6), residual="after"),
    ]


def windows(element, mode, planes, window, include_pad=False, activation=NONE):
    rng = np.random.default_rng([planes, window.height, window.width])
    (x,) = round_to(element, rng.standard_normal((1, planes, window.height, window.width)))
    call = pool.bind(
        on(element), mode, planes=planes, window=window, count_include_pad=include_pad, activation=activation
    )
    expected = pool.reference(mode, x, window, include_pad, activation)
    return DeviceLayer((call,), expected, near(element, window.taps, 4.0, expected), {"x": x})


def whole_planes(element, mode, rows, count):
    (x,) = round_to(element, np.random.default_rng([rows, count]).standard_normal((rows, count)))
    call = pool.bind_global(on(element), mode, rows=rows, count=count, activation=RELU6)
    expected = pool.reference_global(mode, x, RELU6)
    return DeviceLayer((call,), expected, near(element, count, 4.0, expected), {"x": x})


def pooling_layers(element):
    return [
        windows(element, "max", 5, Window(9, 7, (3, 3), (2, 2), (1, 1, 1, 1)), activation=RELU6),
        windows(element, "max", 3, Window(8, 8, (2, 2), (2, 2), dilations=(2, 3))),
        windows(element, "max", 2, Window(7, 7, (3, 3), (2, 2), ceil=True)),
        windows(element, "average", 3, Window(8, 9, (3, 3), (1, 2), (1, 1, 1, 1))),
        windows(element, "average", 3, Window(8, 9, (3, 3), (1, 2), (1, 1, 1, 1)), include_pad=True),
        windows(element, "average", 2, Window(12, 12, (9, 7), pads=(3, 3, 3, 3))),
        *(whole_planes(element, mode, 7, count) for mode in ("max", "average") for count in (1, 20, 49, 200)),
    ]


def softmax(element, rows, count):
    (x,) = round_to(element, 4 * np.random.default_rng([rows, count]).standard_normal((rows, count)))
    expected = normalize.reference_softmax(x)
    tolerance = 16 * EPS["float32"] * (1 + count / 32) * expected + EPS[element] * (expected + 2.0**-14)
    return DeviceLayer((normalize.bind_softmax(on(element), rows=rows, count=count),), expected, tolerance, {"x": x})


def norm(element, kind, rows, count, with_beta=True):
    rng = np.random.default_rng([rows, count])
    (x,) = round_to(element, rng.standard_normal((rows, count)) + 3)
    gamma, beta = rng.standard_normal(count).astype("f"), rng.standard_normal(count).astype("f") if with_beta else None
    call = normalize.bind_norm(on(element), kind, rows=rows, gamma=gamma, beta=beta, epsilon=1e-3)
    if kind == "layer":
        expected = normalize.reference_layernorm(x, gamma, beta, 1e-3)
    else:
        expected = normalize.reference_rmsnorm(x, gamma, 1e-3) + (0 if beta is None else beta)
    # A row of one element has no variance: its difference to the mean is divided by the root of epsilon.
    tolerance = near(element, 64 + count / 8, 32 * (1 + np.abs(gamma)), expected)
    return DeviceLayer((call,), expected, np.broadcast_to(tolerance, expected.shape), {"x": x})


def normalization_layers(element):
    sizes = [(5, 1), (7, 10), (4, 49), (3, 512), (2, 600), (2, 5000), (1, 33000)]
    layers = [softmax(element, *size) for size in sizes]
    layers += [norm(element, "layer", *size) for size in sizes[1:5]]
    return [
        *layers,
        norm(element, "layer", 1, 33000, False),
        norm(element, "rms", 3, 96, False),
        norm(element, "rms", 2, 700),
    ]


FAMILIES = (depthwise_layers, pooling_layers, normalization_layers)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_against_float64(family, element):
    check_device_layers(family(element), element)


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills(arch):
    for element in ELEMENTS:
        check_resources([layer for family in FAMILIES for layer in family(element)[:4]], arch)


def test_what_depthwise_refuses():
    assert "groups" in depthwise.refusal(Shape((1, 8, 4, 4), (8, 2, 3, 3), groups=4))
    assert "unrolled" in depthwise.refusal(Shape((1, 8, 40, 40), (8, 1, 13, 13), groups=8))
    assert depthwise.refusal(Shape((1, 8, 4, 4), (16, 1, 3, 3), groups=8)) is None


def test_strips_are_long_where_there_is_work():
    small = Shape((1, 32, 7, 7), (32, 1, 3, 3), pads=(1, 1, 1, 1), groups=32)
    large = Shape((32, 32, 112, 112), (32, 1, 3, 3), pads=(1, 1, 1, 1), groups=32)
    assert depthwise.strip_of(GPU, small) == 1
    assert depthwise.strip_of(GPU, large) == 8
    assert depthwise.predict_us(GPU.half(), large) < depthwise.predict_us(GPU, large)
