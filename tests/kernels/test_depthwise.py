"""Depthwise convolution against its definition: sizes around the vector width, strides, pads, edges, tiles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Layer, check_layers

from sparsec.kernels import depthwise, planes
from sparsec.kernels.epilogue import NONE, RELU, RELU6, Activation
from sparsec.targets import find_target


def layer(machine, shape, kernel, *, multiplier=1, strides=(1, 1), pads=None, dilations=(1, 1), activation=NONE,
          residual="none", with_bias=True):  # fmt: skip
    rng = np.random.default_rng([*shape, *kernel])
    pads = (kernel[0] // 2, kernel[1] // 2) * 2 if pads is None else pads
    x = rng.standard_normal(shape).astype(np.float32)
    w = rng.standard_normal((shape[1] * multiplier, 1, *kernel)).astype(np.float32)
    bias = rng.standard_normal(shape[1] * multiplier).astype(np.float32) if with_bias else None
    options = {"strides": strides, "pads": pads, "dilations": dilations, "activation": activation, "residual": residual}
    call = depthwise.bind(machine, x_shape=shape, w=w, bias=bias, **options)
    expected_shape = depthwise.reference(x, w, strides=strides, pads=pads, dilations=dilations).shape
    other = rng.standard_normal(expected_shape).astype(np.float32)
    expected = depthwise.reference(x, w, bias, **options, other=other)
    magnitude = depthwise.reference(np.abs(x), np.abs(w), strides=strides, pads=pads, dilations=dilations) + 8
    tolerance = (w[0].size + 4) * np.finfo(np.float32).eps * magnitude
    given = {"x": x, "residual": other} if residual != "none" else {"x": x}
    return Layer(call, expected, tolerance, **given)


def test_widths_around_the_vector(target):
    sizes = [(3, w) for w in (1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 24, 25, 31, 33, 50)]
    check_layers([layer(target.machine, (1, 3, *size), (3, 3), activation=RELU) for size in sizes], target)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1), (1, 2), (3, 3)])
def test_planes(target, strides):
    cases = []
    for size in [(14, 14), (7, 7), (9, 33), (20, 28), (35, 5)] if max(strides) < 3 else [(9, 10)]:
        pads = [(1, 1, 1, 1), (0, 0, 1, 1), (0, 0, 0, 0), (2, 3, 1, 0)][len(cases) % 4]
        cases.append(layer(target.machine, (1, 20, *size), (3, 3), strides=strides, pads=pads, activation=RELU6))
    check_layers(cases, target)


@pytest.mark.parametrize("kernel", [(5, 5), (1, 1), (2, 2), (7, 7), (9, 1), (1, 9), (3, 5)])
def test_kernels(target, kernel):
    cases = [layer(target.machine, (1, 17, 13, 18), kernel, strides=strides) for strides in ((1, 1), (2, 2))]
    check_layers(cases, target)


def test_residual_batch_multiplier_dilation_and_no_bias(target):
    machine, shape = target.machine, (2, 9, 11, 19)
    hardswish = Activation("hardswish")
    check_layers([
        layer(machine, shape, (3, 3), residual="before", activation=hardswish),
        layer(machine, shape, (3, 3), residual="after", activation=RELU),
        layer(machine, (1, 3, 9, 6), (3, 3), residual="before", activation=RELU),
        layer(machine, shape, (3, 3), multiplier=3, strides=(2, 2)),
        layer(machine, shape, (3, 3), dilations=(2, 2), pads=(2, 2, 2, 2)),
        layer(machine, shape, (3, 3), dilations=(2, 3), strides=(2, 2), pads=(2, 2, 2, 2)),
        layer(machine, shape, (3, 3), with_bias=False),
    ], target)  # fmt: skip


def test_one_column_planes_use_full_vectors(target):
    machine = target.machine
    cases = [layer(machine, (1, 5, 50, 1), (9, 1), strides=(s, 1), pads=(4, 0, 4, 0)) for s in (1, 2)]
    check_layers(cases, target)
    assert planes.Window(50, 1, (9, 1), pads=(4, 0, 4, 0)).flat().width == 50


def test_few_planes_are_cut_into_bands(target):
    cases = [
        layer(target.machine, (1, 2, h, w), (3, 3), strides=(s, s)) for h, w in ((40, 40), (41, 6)) for s in (1, 2)
    ]
    assert all(case.call.tiles > 2 for case in cases)
    check_layers(cases, target)


def test_pads_larger_than_the_plane(target):
    check_layers(
        [layer(target.machine, (1, 16, 3, 3), (3, 3), pads=(5, 4, 3, 6), strides=s) for s in ((1, 1), (2, 2))], target
    )


def test_columns_cover_each_output_once():
    for cpu, width in itertools.product(("x86-64-v2", "x86-64-v3", "x86-64-v4"), range(1, 70)):
        machine = find_target("host", cpu).machine
        cover = np.zeros(width, bool)
        for column in planes.columns(machine, planes.Window(1, width, (1, 1))):
            cover[column.start : column.start + column.valid] = True
            assert column.start + column.valid <= width
        assert cover.all()


def test_equal_layers_share_their_code_and_different_ones_do_not():
    machine = find_target("host").machine
    one = layer(machine, (1, 4, 8, 8), (3, 3)).call
    assert one.name == layer(machine, (1, 4, 8, 8), (3, 3)).call.name
    assert one.name != layer(machine, (1, 4, 8, 8), (3, 3), activation=RELU).call.name


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5))
def test_pack_round_trip(channels, kh, kw):
    rng = np.random.default_rng(0)
    w, bias = rng.standard_normal((channels, 1, kh, kw)).astype("f"), rng.standard_normal(channels).astype("f")
    again, again_bias = depthwise.unpack(depthwise.pack(w, bias), (kh, kw))
    np.testing.assert_array_equal(again, w)
    np.testing.assert_array_equal(again_bias, bias)


def test_refusals_say_why():
    assert depthwise.refusal((1, 8, 4, 4), (8, 1, 3, 3), 8) is None
    assert "groups" in depthwise.refusal((1, 8, 4, 4), (8, 4, 3, 3), 2)
    assert "rank" in depthwise.refusal((1, 8, 4), (8, 1, 3), 8)
    assert "at most" in depthwise.refusal((1, 8, 40, 40), (8, 1, 31, 31), 8)
