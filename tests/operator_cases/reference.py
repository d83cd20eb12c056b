"""A case as a model, and how near a result must come to ONNX Runtime's."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from operator_cases.case import Case

EPS = float(np.finfo(np.float32).eps)


def model_of(case: Case) -> onnx.ModelProto:
    """One node, `node`, of inputs `x0`, ... and initializers `c0`, ... to `y0`, ..., shapes inferred."""
    names, initializers, inputs = [], [], []
    for i, array in enumerate(case.x):
        names.append(f"x{i}")
        inputs.append(helper.make_tensor_value_info(f"x{i}", helper.np_dtype_to_tensor_dtype(array.dtype), array.shape))
    for i, array in enumerate(case.constants):
        names.append("" if array is None else f"c{i}")
        if array is not None:
            initializers.append(numpy_helper.from_array(np.asarray(array), f"c{i}"))
    outputs = [f"y{i}" for i in range(case.outputs)]
    node = helper.make_node(case.op, names, outputs, name="node", **case.attributes)
    graph = helper.make_graph(
        [node], "case", inputs, [helper.make_empty_tensor_value_info(o) for o in outputs], initializers
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", case.opset)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def expected(case: Case) -> list[np.ndarray]:
    """ONNX Runtime's outputs."""
    session = onnxruntime.InferenceSession(model_of(case).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {f"x{i}": array for i, array in enumerate(case.x)})


def compare(case: Case, reference: np.ndarray, result: np.ndarray) -> None:
    """Equal, or within what sums of `case.depth` products in any order and 16 ulp of an elementary function allow."""
    assert result.shape == reference.shape
    assert result.dtype == reference.dtype
    if reference.dtype != np.float32:
        np.testing.assert_array_equal(result, reference)
        return
    finite = np.abs(reference[np.isfinite(reference)])
    scale = max(float(finite.max(initial=0)), float(max(np.abs(x).max() for x in case.x)))
    np.testing.assert_allclose(result, reference, rtol=16 * EPS, atol=(16 + 2 * case.depth) * EPS * scale)
