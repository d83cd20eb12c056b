"""Bodies of operators that ONNX defines by others, against ONNX Runtime or the definition itself."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from sparsec.loading.functions import function_body
from sparsec.loading.opsets import inline_functions


def single(node: onnx.NodeProto, opset: int, outputs: int = 1, **inputs: list[int]) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output[:outputs]]
    graph = helper.make_graph([node], "g", values, results)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def same(model: onnx.ModelProto, inlined: onnx.ModelProto, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for got, wanted in zip(
        ReferenceEvaluator(inlined).run(None, feeds), ReferenceEvaluator(model).run(None, feeds), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axes", [None, [1, 2, 3]])
def test_defaults_of_left_out_attributes_count(axes: list[int] | None) -> None:
    """ONNX's inliner forgets them: without `axes` the mean would be taken over everything."""
    node = helper.make_node("MeanVarianceNormalization", ["x"], ["y"], name="n", **({"axes": axes} if axes else {}))
    model = single(node, 13, x=[3, 2, 4, 5])
    inlined = inline_functions(onnx.ModelProto.FromString(model.SerializeToString()), "model")
    assert "MeanVarianceNormalization" not in {n.op_type for n in inlined.graph.node}
    same(model, inlined)


@pytest.mark.parametrize(("element", "tolerance"), [(TensorProto.FLOAT16, 2e-3), (TensorProto.DOUBLE, 1e-8)])
@pytest.mark.parametrize("opset", [13, 21])
def test_constants_of_a_body_take_the_type_of_the_input(element: int, tolerance: float, opset: int) -> None:
    """ONNX writes 2 and 1e-9 in float32, which Pow and Add do not take beside another type."""
    node = helper.make_node("MeanVarianceNormalization", ["x"], ["y"], name="n")
    model = single(node, opset, x=[3, 2, 4, 5])
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = element
    inlined = onnx.shape_inference.infer_shapes(inline_functions(model, "model"), strict_mode=True)
    onnx.checker.check_model(inlined, full_check=True)
    x = np.random.default_rng(1).standard_normal((3, 2, 4, 5)).astype(helper.tensor_dtype_to_np_dtype(element))
    (y,) = ReferenceEvaluator(inlined).run(None, {"x": x})
    wide = x.astype(np.float64)
    wanted = (wide - wide.mean((0, 2, 3), keepdims=True)) / wide.std((0, 2, 3), keepdims=True)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(y.astype(np.float64), wanted, rtol=0, atol=3 * tolerance)


def test_a_left_out_input_between_given_ones() -> None:
    """Attention without a mask, with a cache: ONNX's inliner fails on it."""
    shape = {"q": [1, 2, 3, 8], "k": [1, 2, 3, 8], "v": [1, 2, 3, 8], "pk": [1, 2, 4, 8], "pv": [1, 2, 4, 8]}
    node = helper.make_node("Attention", ["q", "k", "v", "", "pk", "pv"], ["y", "nk", "nv"], name="n")
    model = single(node, 23, outputs=3, **shape)
    inlined = inline_functions(onnx.ModelProto.FromString(model.SerializeToString()), "model")
    assert "Attention" not in {n.op_type for n in inlined.graph.node}
    same(model, inlined)


def test_names_and_attributes_are_those_of_the_use() -> None:
    body = function_body(helper.make_node("Elu", ["in"], ["out"], alpha=3.0), 18, None)
    assert body is not None
    assert body[-1].output == ["out"]
    assert {name for node in body for name in node.input} & {"in"}
    assert all(
        name in ("in", "out") or name.startswith("out/")
        for node in body
        for name in (*node.input, *node.output)
        if name
    )
    constants = [a for node in body for a in node.attribute if node.op_type == "Constant"]
    assert 3.0 in [a.f for a in constants]


def test_no_definition() -> None:
    assert function_body(helper.make_node("Conv", ["x", "w"], ["y"]), 21, None) is None
    assert function_body(helper.make_node("NoSuchOperator", ["x"], ["y"]), 21, None) is None
