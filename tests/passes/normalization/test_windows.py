"""Pooling with ceil_mode: the number of windows is what ONNX Runtime computes, whatever shape inference says."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from programs import agree, feeds_of, onnx_runtime, parse

from sparsec.loading.load import load_model, model_bytes
from sparsec.passes.normalization.fold_constants import static_shape

# size, kernel, stride, pads, dilation; in the first ones the last window would start in the padding
AXES = [(3, 1, 3, (0, 0), 1), (3, 2, 2, (1, 1), 1), (5, 2, 2, (1, 1), 1), (5, 2, 4, (0, 1), 1), (7, 3, 2, (0, 0), 1),
        (6, 3, 2, (1, 1), 1), (9, 2, 3, (0, 1), 2), (6, 2, 3, (1, 0), 1), (4, 1, 2, (0, 0), 1)]  # fmt: skip


def pool(op: str, axes: tuple, counted: int = 0) -> onnx.ModelProto:
    size, kernel, stride, pads, dilation = zip(*axes, strict=True)
    attributes = f"ceil_mode=1, kernel_shape={list(kernel)}, strides={list(stride)}, dilations={list(dilation)}"
    attributes += f", pads={[p[0] for p in pads] + [p[1] for p in pads]}"
    attributes += ", count_include_pad=1" if counted else ""
    dims = ",".join(map(str, size))
    unknown = ",".join("hw"[: len(axes)])
    return parse(f"g (float[1,2,{dims}] x) => (float[1,2,{unknown}] y) {{ y = {op}<{attributes}>(x) }}")


@pytest.mark.parametrize(("op", "counted"), [("MaxPool", 0), ("AveragePool", 0), ("AveragePool", 1)])
def test_windows_of_two_axes(op, counted):
    for axes in itertools.product(AXES, repeat=2):
        model = pool(op, axes, counted)
        loaded = load_model(model)
        feeds = feeds_of(model)
        expected = onnx_runtime(model.SerializeToString(), feeds)["y"]
        assert static_shape(loaded.graph.outputs[0]) == expected.shape
        np.testing.assert_array_equal(onnx_runtime(model_bytes(loaded), feeds)["y"], expected)


@pytest.mark.parametrize("axes", [(AXES[0], AXES[5]), (AXES[5], AXES[8])])
def test_what_no_window_reads_is_cut_off(axes):
    """Counted padding on one axis, a stride above the window on the other: no pads say both."""
    model = pool("AveragePool", axes, counted=1)
    assert [node.op_type for node in load_model(model).graph] == ["Slice", "AveragePool"]
    agree(model)


def test_a_pooling_without_trouble_is_left_alone():
    model = pool("MaxPool", ((7, 3, 2, (0, 0), 1),))
    (node,) = load_model(model).graph
    assert node.attributes.get_int("ceil_mode") == 1


@pytest.mark.parametrize("axes", [(AXES[0],), (AXES[1],), (AXES[3], AXES[5])])
def test_what_follows_sees_the_right_shape(axes):
    model = pool("MaxPool", axes)
    model.graph.node.append(onnx.helper.make_node("Relu", ["y"], ["z"]))
    model.graph.node.append(onnx.helper.make_node("Flatten", ["z"], ["u"]))
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info("u", onnx.TensorProto.FLOAT, ["n", "m"]))
    agree(model)
