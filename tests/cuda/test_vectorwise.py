"""Convolutions with 4x1 and 8x1 blocks of zeros on CUDA cores against float64, emulated."""

from __future__ import annotations

import numpy as np
import pytest
from device_layers import ARCHS, GPU, DeviceLayer, check_device_layers, check_resources

from sparsec.kernels.cuda import conv, vectorwise
from sparsec.kernels.cuda.conv import Shape
from sparsec.kernels.epilogue import NONE, RELU6, Activation
from sparsec.program import MAX_ARGS


def shape_of(n, c, h, w, oc, k, stride=1):
    return Shape((n, c, h, w), (oc, c, k, k), (stride, stride), (k // 2,) * 4)


def weight(rng, shape, rows, density):
    """Blocks of `rows` outputs at one input of one tap. Density 0: one block is kept."""
    oc, c, kh, kw = shape.w
    keep = rng.random((-(-oc // rows), c, kh, kw)) < density
    if density == 0:
        keep[0, c // 2, 0, 0] = True
    return (rng.standard_normal(shape.w) * np.repeat(keep, rows, 0)[:oc]).astype("f")


def layer(form, shape, density, tiling=None, *, activation=NONE, residual="none"):
    rng = np.random.default_rng([*shape.x, *shape.w])
    w, x = weight(rng, shape, form.rows, density), rng.standard_normal(shape.x).astype("f")
    other = rng.standard_normal((shape.x[0], shape.w[0], *shape.plane)).astype("f")
    bias = rng.standard_normal(shape.w[0]).astype("f")
    options = {"activation": activation, "residual": residual, "tiling": tiling}
    call = vectorwise.bind(GPU, shape, w=w, form=form, bias=bias, **options)
    assert len(call.roles) <= MAX_ARGS
    expected = conv.reference(shape, x, w, bias, activation, residual, other)
    size = conv.reference(shape, np.abs(x), np.abs(w))
    tolerance = (shape.taps * shape.w[1] + 8) * 2.0**-23 * (size + 8)
    given = {"x": x, "residual": other} if residual != "none" else {"x": x}
    return DeviceLayer((call,), expected, tolerance, given)


def layers():
    """Every tiling, 1x1 and 3x3; densities from one block to all; tails of rows, pixels and steps; several images."""
    silu = Activation("silu")
    found = [
        layer(form, shape_of(1, 70, 7, 20, tiling.rows + 5, 1), 0.3, tiling, activation=RELU6)
        for form in vectorwise.TABLE
        for tiling in vectorwise.TILINGS
    ]
    small = vectorwise.TILINGS[-1]
    found += [layer(vectorwise.TABLE[1], shape_of(1, 20, 5, 7, 24, 3), density, small) for density in (0, 0.2, 1)]
    return [
        *found,
        layer(vectorwise.TABLE[0], shape_of(2, 12, 9, 7, 40, 3, 2), 0.4, small, residual="after", activation=silu),
        layer(vectorwise.TABLE[1], shape_of(3, 33, 3, 3, 20, 1), 0.5, residual="before", activation=silu),
    ]


def test_tilings_densities_and_epilogues():
    check_device_layers(layers(), "float32")


@pytest.mark.parametrize("arch", ARCHS)
def test_tilings_fit_a_multiprocessor(arch):
    largest = f"_{vectorwise.TILINGS[0]}_"
    for name, (registers, _, shared) in check_resources(layers(), arch).items():
        assert shared <= vectorwise.TILINGS[0].shared
        assert registers <= vectorwise.REGISTERS or largest not in name


@pytest.mark.parametrize("density", [0, 0.1, 0.5, 1])
def test_the_stored_form_holds_the_weight(density):
    rng = np.random.default_rng(0)
    for form in vectorwise.TABLE:
        for shape in (shape_of(1, 9, 3, 3, 37, 3), shape_of(1, 70, 2, 2, 150, 1)):
            w = weight(rng, shape, form.rows, density)
            for tiling in vectorwise.TILINGS:
                packed = vectorwise.pack(w, form, tiling)
                np.testing.assert_array_equal(vectorwise.unpack(packed, shape.w), w)


def test_break_even():
    """80 % of zeros pay, 20 % do not."""
    shape, rng = shape_of(8, 256, 28, 28, 256, 1), np.random.default_rng(0)
    dense = conv.predict_us(GPU, shape)
    form = vectorwise.TABLE[1]
    few, many = (
        vectorwise.ranked_tilings(GPU, shape, weight(rng, shape, 4, density), form)[0][0] for density in (0.2, 0.8)
    )
    assert 1.5 * few < dense < many
