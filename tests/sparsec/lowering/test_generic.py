"""The generic route against ONNX Runtime, operator by operator, then on real models."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import onnxscript.optimizer
import pytest
from harness import run_region
from onnx import TensorProto, helper, numpy_helper
from operator_cases import CASES, Case, floats, ints, positive
from operator_cases.reference import EPS, compare, expected, model_of
from programs import agree, parse

from sparsec.errors import UnsupportedError
from sparsec.lowering.generic import GenericRegion, lower_generic
from sparsec.targets import find_target

MACHINE = find_target("host").machine


def lower_model(model: onnx.ModelProto) -> tuple[GenericRegion, dict[str, tuple[tuple[int, ...], str]]]:
    ir_model = onnx_ir.from_proto(model)
    nodes = list(ir_model.graph)
    region = lower_generic(nodes, MACHINE)
    written = {name for step in region.steps for name in step.outputs}
    values = [v for node in nodes for v in node.outputs if v.name in written]
    return region, {v.name: (tuple(int(d) for d in v.shape), v.dtype.numpy().name) for v in values}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_operator(case: Case) -> None:
    model = model_of(case)
    feeds = {f"x{i}": array for i, array in enumerate(case.x)}
    region, outputs = lower_model(model)
    results = run_region(region, feeds, outputs)
    for i, reference in enumerate(expected(case)):
        compare(case, reference, results[f"y{i}"])
    assert all(step.nodes == ("node",) for step in region.steps)


@pytest.mark.parametrize("stored", [TensorProto.INT4, TensorProto.UINT4, TensorProto.INT8])
def test_weights_with_scales_in_blocks(stored: int) -> None:
    """DequantizeLinear of a constant [20, 7], blocks of 8 along the sum, is part of the product behind it."""
    low, high = (-8, 8) if stored != TensorProto.UINT4 else (0, 16)
    made = np.random.default_rng(1).integers(low, high, (20, 7))
    weights = [
        helper.make_tensor("q", stored, made.shape, made.reshape(-1).tolist()),
        numpy_helper.from_array(positive(3, 7), "s"),
        helper.make_tensor("z", stored, (3, 7), [3] * 21),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], name="weight", axis=0, block_size=8),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [9, 20])
    graph = helper.make_graph(nodes, "g", [x], [helper.make_empty_tensor_value_info("y")], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model)
    region, outputs = lower_model(model)
    assert {step.nodes for step in region.steps} == {("product", "weight")}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    case = Case("MatMul", (floats(9, 20),), depth=20)
    compare(case, session.run(None, {"x": case.x[0]})[0], run_region(region, {"x": case.x[0]}, outputs)["y"])


def test_unsupported_operators_are_listed_together() -> None:
    nodes = [
        helper.make_node("TopK", ["x", "k"], ["v", "i"], name="top"),
        helper.make_node("Relu", ["v"], ["r"], name="relu"),
        helper.make_node("NonZero", ["r"], ["y"], name="holes"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 9])],
        [
            helper.make_tensor_value_info("y", TensorProto.INT64, [2, 6]),
            helper.make_tensor_value_info("i", TensorProto.INT64, [2, 3]),
        ],
        [numpy_helper.from_array(ints(3), "k")],
        value_info=[helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in "vr"],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    with pytest.raises(UnsupportedError) as caught:
        lower_generic(list(onnx_ir.from_proto(model).graph), MACHINE)
    assert "2 nodes" in str(caught.value)
    assert "top (TopK)" in str(caught.value)
    assert "holes (NonZero)" in str(caught.value)


def test_fused_group_keeps_its_names() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="product"),
        helper.make_node("Add", ["m", "b"], ["a"], name="bias"),
        helper.make_node("Sigmoid", ["a"], ["s"], name="gate"),
        helper.make_node("Mul", ["a", "s"], ["y"], name="swish"),
    ]
    weights = [numpy_helper.from_array(floats(20, 33), "w"), numpy_helper.from_array(floats(33), "b")]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [9, 20])],
        [helper.make_empty_tensor_value_info("y")],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model)
    region, outputs = lower_model(model)
    assert [step.nodes for step in region.steps] == [("product", "bias", "gate", "swish")]
    assert region.steps[0].tiles == 9
    assert sum(array.nbytes for array in region.constants.values()) == (20 * 33 + 33) * 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": floats(9, 20)})[0]
    result = run_region(region, {"x": floats(9, 20)}, outputs)["y"]
    np.testing.assert_allclose(result, expected, rtol=16 * EPS, atol=64 * EPS * np.abs(expected).max())


def test_functions_of_half_values_are_rounded_once() -> None:
    """Two read the same value; each rounds once, as float32 between casts does."""
    text = "g (float16[3,8] x) => (float16[3,8] y) { a = Neg(x) b = Exp(a) c = Tanh(a) y = Max(b, c) }"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    x = floats(3, 8).astype(np.float16)
    region, outputs = lower_model(onnx.shape_inference.infer_shapes(model))
    wide = -x.astype(np.float64)
    expected = np.maximum(np.exp(wide).astype(np.float16), np.tanh(wide).astype(np.float16))
    got = run_region(region, {"x": x}, outputs)["y"]
    assert got.dtype == np.float16
    np.testing.assert_array_max_ulp(got, expected, maxulp=1, dtype=np.float16)


def test_index_outside_is_clipped_not_read() -> None:
    case = Case("Gather", (floats(9, 5), np.array([10**9, -(10**9)])), (), {"axis": 0})
    region, outputs = lower_model(model_of(case))
    result = run_region(region, {"x0": case.x[0], "x1": case.x[1]}, outputs)["y0"]
    np.testing.assert_array_equal(result, case.x[0][[8, 0]])


DATA = os.environ.get("SPARSEC_DATA", "")
MODELS = ["resnet20_cifar10", "kwt1_speech_commands", "dscnn_kws_mlperf_tiny", "ultraface_RFB_320"]


@pytest.mark.skipif(not DATA, reason="SPARSEC_DATA is not set")
@pytest.mark.parametrize("name", MODELS[:3])
def test_model_end_to_end(name: str) -> None:
    """Every node of a real model through the generic route, against ONNX Runtime."""
    model = fixed(onnx.load(Path(DATA, "models", f"{name}.onnx")))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {i.name: floats(*i.shape) for i in session.get_inputs()}
    expected = dict(zip((o.name for o in session.get_outputs()), session.run(None, feeds), strict=True))
    region, outputs = lower_model(model)
    results = run_region(region, feeds, outputs)
    for output, reference in expected.items():
        error = np.abs(results[output] - reference).max() / np.abs(reference).max()
        assert error <= 2e-5
    named = {node.name or node.output[0] for node in model.graph.node}
    assert {node for step in region.steps for node in step.nodes} == named


def fixed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Batch 1, opset 17, constants folded, shapes inferred."""
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.dim_value:
                dim.dim_value = 1
    model = onnx.version_converter.convert_version(model, 17)
    graph = onnx_ir.from_proto(model)
    onnxscript.optimizer.optimize_ir(graph, onnx_shape_inference=True)
    model = onnx.shape_inference.infer_shapes(onnx_ir.to_proto(graph), data_prop=True)
    for i, node in enumerate(model.graph.node):
        node.name = node.name or f"node{i}"
    return model


def test_code_generation_prints_nothing(capfd) -> None:
    """TVM's own scatter carries a pragma that LLVM does not know and says so, on the user's terminal."""
    agree(
        parse("""g (float[4, 30] x, float[2, 30] updates) => (float[4, 30] y) {
            at = Constant <value = int64[2, 1] {2, 0}> () y = ScatterND (x, at, updates) }""")
    )
    assert capfd.readouterr() == ("", "")
