"""Pooling against its definition and, for ceil_mode and count_include_pad, against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from harness import Library
from layers import Layer, check_layers
from onnx import TensorProto, helper

from sparsec.kernels import planes, pool
from sparsec.kernels.epilogue import NONE, RELU, Activation
from sparsec.program import Kernel

EPS = np.finfo(np.float32).eps


def layer(machine, mode, shape, kernel, *, strides=(1, 1), pads=(0, 0, 0, 0), dilations=(1, 1), ceil=False,
          include_pad=False, activation=NONE):  # fmt: skip
    x = np.random.default_rng([*shape, *kernel]).standard_normal(shape).astype(np.float32)
    call = pool.bind(
        machine, mode, x_shape=shape, kernel=kernel, strides=strides, pads=pads, dilations=dilations, ceil_mode=ceil,
        count_include_pad=include_pad, activation=activation,
    )  # fmt: skip
    window = planes.Window(shape[2], shape[3], kernel, strides, pads, dilations, ceil)
    expected = pool.reference(mode, x, window, include_pad, activation)
    return Layer(call, expected, EPS * (kernel[0] * kernel[1] + 4) * 4, x=x)


@pytest.mark.parametrize("mode", ["max", "average"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 3)])
def test_windows(target, mode, strides):
    cases = []
    for shape in [(1, 17, 9, 33), (2, 9, 14, 14), (1, 16, 7, 5)] if max(strides) < 3 else [(1, 16, 9, 10)]:
        cases.append(layer(target.machine, mode, shape, (3, 3), strides=strides, pads=(1, 1, 1, 1), activation=RELU))
        cases.append(layer(target.machine, mode, shape, (2, 3), strides=strides, pads=(0, 0, 1, 1), include_pad=True))
    check_layers(cases, target)


@pytest.mark.parametrize("mode", ["max", "average"])
def test_ceil_mode_dilations_and_large_windows(target, mode):
    machine = target.machine
    cases = [layer(machine, mode, (1, 4, 9, 9), (2, 2), strides=(2, 2), ceil=True)]
    cases.append(layer(machine, mode, (1, 16, 12, 12), (3, 3), strides=(2, 2), ceil=True, pads=(1, 1, 1, 1)))
    cases.append(layer(machine, mode, (1, 16, 13, 13), (7, 7)))
    cases.append(layer(machine, mode, (1, 16, 11, 40), (2, 2), dilations=(2, 3)))
    check_layers(cases, target)


@pytest.mark.parametrize("mode", ["max", "average"])
def test_means_of_planes(target, mode):
    layers = []
    for rows, count in [(1, 1), (33, 49), (16, 3), (5, 64), (40, 196), (3, 1000), (18, 4)]:
        x = np.random.default_rng(count).standard_normal((rows, count)).astype(np.float32) + 1
        for activation in (NONE, Activation("sigmoid")):
            call = pool.bind_global(target.machine, mode, rows=rows, count=count, activation=activation)
            expected = pool.reference_global(mode, x, activation)
            layers.append(Layer(call, expected, EPS * (np.abs(x).mean(axis=1) * (count + 2) + 2), x=x))
    check_layers(layers, target)


@pytest.mark.parametrize("include_pad", [False, True])
@pytest.mark.parametrize("ceil", [False, True])
def test_reference_is_what_onnxruntime_computes(include_pad, ceil):
    """The definition in `pool.reference` itself: output size, counts at the border."""
    for mode, size, kernel, stride, pad in [
        ("average", 9, 2, 2, 0),
        ("average", 12, 3, 2, 1),
        ("max", 12, 3, 2, 1),
        ("max", 7, 3, 3, 1),
    ]:
        x = np.random.default_rng(size).standard_normal((1, 2, size, size)).astype(np.float32)
        extra = {"count_include_pad": int(include_pad)} if mode == "average" else {}
        node = helper.make_node(
            "MaxPool" if mode == "max" else "AveragePool", ["x"], ["y"], kernel_shape=[kernel] * 2, strides=[stride] * 2,
            pads=[pad] * 4, ceil_mode=int(ceil), **extra,
        )  # fmt: skip
        value = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (("x", x.shape), ("y", None))
        ]
        model = helper.make_model(
            helper.make_graph([node], "g", value[:1], value[1:]),
            opset_imports=[helper.make_opsetid("", 19)],
            ir_version=9,
        )
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        expected = session.run(None, {"x": x})[0]
        window = planes.Window(size, size, (kernel, kernel), (stride, stride), (pad,) * 4, ceil=ceil)
        np.testing.assert_allclose(pool.reference(mode, x, window, include_pad), expected, rtol=1e-5, atol=1e-6)


def test_maximum_of_minus_infinities(target):
    case = layer(target.machine, "max", (1, 1, 1, 64), (1, 3))
    case.activations["x"][..., 30:40] = -np.inf
    window = planes.Window(1, 64, (1, 3))
    y = pool.reference("max", case.activations["x"], window)
    assert (y[..., 30:38] == -np.inf).all()
    rooms = case.rooms()
    Library([Kernel(case.call.name, case.call.func)], target).call(case.call.name, rooms, case.call.tiles)
    np.testing.assert_array_equal(rooms[1].array, y.astype(np.float32))


def test_refusals_say_why():
    assert pool.refusal((1, 3, 8, 8), (3, 3)) is None
    assert "2-D" in pool.refusal((1, 3, 8), (3,))
    assert "at most" in pool.refusal((1, 3, 80, 80), (20, 20))
