"""Models quantized by ONNX Runtime: imported, compared in ONNX Runtime before and after, compiled through every route."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import sparsec
from sparsec.errors import UnsupportedError
from sparsec.loading.load import load_model, model_bytes
from sparsec.proving.rounding import rounding

SETTINGS = [
    ("QDQ", "QUInt8", "QInt8", True),
    ("QDQ", "QUInt8", "QUInt8", True),
    ("QDQ", "QInt8", "QInt8", False),
    ("QOperator", "QUInt8", "QInt8", True),
    ("QOperator", "QUInt8", "QUInt8", False),
    ("QOperator", "QInt8", "QInt8", True),
]


def network() -> onnx.ModelProto:
    """Every operator that ONNX Runtime quantizes in a small classifier: x [N, 3, 12, 12] to y [N, 10]."""
    rng = np.random.default_rng(0)
    shapes = {"w0": (8, 3, 3, 3), "b0": (8,), "w1": (8, 8, 1, 1), "w2": (8, 1, 3, 3), "w3": (10, 16), "b3": (10,)}
    weights = {name: (rng.standard_normal(s) * (0.3 if len(s) > 1 else 1)).astype("f") for name, s in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], "first", pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["r0"], "relu"),
        helper.make_node("MaxPool", ["r0"], ["p0"], "max", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p0", "w1"], ["c1"], "second"),
        helper.make_node("Sigmoid", ["c1"], ["s1"], "gate"),
        helper.make_node("Mul", ["c1", "s1"], ["m1"], "swish"),
        helper.make_node("Conv", ["m1", "w2"], ["c2"], "depthwise", pads=[1] * 4, group=8),
        helper.make_node("LeakyRelu", ["c2"], ["l2"], "leaky"),
        helper.make_node("Add", ["l2", "p0"], ["a"], "residual"),
        helper.make_node("Concat", ["a", "m1"], ["cc"], "join", axis=1),
        helper.make_node("AveragePool", ["cc"], ["ap"], "average", kernel_shape=[2, 2]),
        helper.make_node("GlobalAveragePool", ["ap"], ["g"], "pool"),
        helper.make_node("Flatten", ["g"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], "head", transB=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 12, 12])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])
    graph = helper.make_graph(nodes, "net", [x], [y], [numpy_helper.from_array(v, k) for k, v in weights.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def samples(count: int, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return ({"x": rng.standard_normal((1, 3, 12, 12)).astype("f")} for _ in range(count))


class _Reader(CalibrationDataReader):
    def __init__(self) -> None:
        self._samples = samples(8)

    def get_next(self) -> Any:
        return next(self._samples, None)


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda s: "-".join(map(str, s)))
def quantized(request: Any, tmp_path_factory: Any) -> Path:
    logging.getLogger().setLevel(logging.ERROR)
    form, activations, weights, channels = request.param
    folder = tmp_path_factory.mktemp("quantized")
    onnx.save(network(), folder / "float.onnx")
    quantize_static(
        folder / "float.onnx", folder / "model.onnx", _Reader(), quant_format=QuantFormat[form],
        activation_type=QuantType[activations], weight_type=QuantType[weights], per_channel=channels,
    )  # fmt: skip
    return folder / "model.onnx"


def run(model: bytes, sample: dict[str, np.ndarray]) -> np.ndarray:
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, sample)[0]


def test_import_keeps_every_bit_in_onnx_runtime(quantized: Path) -> None:
    loaded = load_model(quantized)
    data = model_bytes(loaded)
    for sample in samples(3, seed=9):
        np.testing.assert_array_equal(run(data, sample), run(quantized.read_bytes(), sample))
    assert model_bytes(load_model(data)) == data  # nothing is left to do
    assert all(
        (node.domain == "" and not node.op_type.startswith("Q")) or node.op_type == "QuantizeLinear"
        for node in loaded.graph
    )
    stored = {
        node.inputs[0].dtype
        for node in loaded.graph
        if node.op_type == "DequantizeLinear" and node.inputs[0].const_value
    }
    assert stored <= {ir.DataType.INT8, ir.DataType.INT32}
    assert all(len(node.inputs) == 3 for node in loaded.graph if node.op_type.lower().endswith("quantizelinear"))


@pytest.mark.parametrize("quantized", [SETTINGS[1], SETTINGS[2], SETTINGS[5]], indirect=True, ids=str)
def test_compiles_and_agrees(quantized: Path) -> None:
    artifact = sparsec.compile(quantized, target="host")
    (parity,) = artifact.verify().parity
    assert parity.passed
    assert parity.steps is not None
    assert parity.steps.elements == 50


def test_other_foreign_operators_are_refused() -> None:
    model = network()
    model.graph.node[1].domain, model.graph.node[1].op_type = "com.microsoft", "QAttention"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(UnsupportedError, match="QAttention"):
        load_model(model)


def test_float_models_have_no_steps() -> None:
    assert rounding(model_bytes(load_model(network()))) is None


@pytest.mark.parametrize("quantized", SETTINGS[:1], indirect=True, ids=str)
def test_a_wrong_bias_fails(quantized: Path, tmp_path: Path) -> None:
    """The reference is model.onnx in the artifact: a shifted bias there is a difference that rounding does not explain."""
    artifact = sparsec.compile(quantized, target="host", output=tmp_path / "m.sparsec")
    model = onnx.load(artifact.path / "model.onnx")
    biases = [t for t in model.graph.initializer if t.data_type == TensorProto.INT32 and list(t.dims) == [10]]
    (bias,) = [t for t in biases if numpy_helper.to_array(t).any()]  # the others are zero points
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * 2 + 2000, bias.name))
    onnx.save(model, artifact.path / "model.onnx")
    assert not artifact.verify().passed
