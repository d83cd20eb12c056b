from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from sparsec.errors import RecipeError
from sparsec.passes.normalization.widen import Widen


def test_computes_in_float32_between_half_inputs_and_outputs(model) -> None:
    w = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float16)
    made = model("g (float16[4,64] x, float[4,8] z) => (float16[4,8] y, float[4,8] t) { h = MatMul(x, w) "
                 "r = Relu(h) y = Add(r, one) c = Cast<to = 1>(r) t = Mul(c, z) }", w=w, one=np.float16(1))  # fmt: skip
    assert Widen()(made).modified
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(made), strict_mode=True)
    onnx.checker.check_model(proto, full_check=True)
    assert {t.data_type for t in proto.graph.initializer} == {onnx.TensorProto.FLOAT}
    assert [v.type.tensor_type.elem_type for v in proto.graph.output] == [
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.FLOAT,
    ]
    x = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float16)
    z = np.ones((4, 8), np.float32)
    y, t = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x, "z": z})
    exact = np.maximum(x.astype(np.float64) @ w.astype(np.float64), 0)
    np.testing.assert_array_equal(y, (exact + 1).astype(np.float16))  # rounded once
    np.testing.assert_allclose(t, exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(RecipeError, match="nothing in float16"):
        Widen()(made)


def test_a_float_model_is_refused(model) -> None:
    with pytest.raises(RecipeError, match="nothing in float16"):
        Widen()(model("g (float[3] x) => (float[3] y) { y = Relu(x) }"))
