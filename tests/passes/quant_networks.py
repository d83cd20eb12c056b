"""Small networks that tests of quantization share, with calibration data and what ONNX Runtime makes of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir

from sparsec.passes.normalization.fold_constants import FoldConstants, constant, quiet_session
from sparsec.rewriting.passes_api import Context, Stacked
from tests.passes.conftest import parse, save

# Convolutions (plain, depthwise, with and without bias), a residual, a join, pools and both kinds of products.
CLASSIFIER = """g (float[1,3,12,12] x) => (float[1,10] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w0, b0)
    r = Relu(a)
    m = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r)
    d = Conv<pads = [1, 1, 1, 1], group = 16>(m, w1, b1)
    c = Clip(d, low, high)
    e = Conv(c, w2)
    s = Add(e, m)
    t = Relu(s)
    j = Concat<axis = 1>(t, c)
    p = GlobalAveragePool(j)
    f = Flatten(p)
    h = Gemm<transB = 1>(f, w3, b3)
    u = Relu(h)
    v = MatMul(u, w4)
    y = Add(v, b4)
}"""


def classifier_weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def f32(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)

    return {
        "w0": f32(16, 3, 3, 3), "b0": f32(16), "w1": f32(16, 1, 3, 3), "b1": f32(16), "w2": f32(16, 16, 1, 1),
        "w3": f32(24, 32), "b3": f32(24), "w4": f32(24, 10), "b4": f32(10),
        "low": np.float32(0), "high": np.float32(6),
    }  # fmt: skip


def classifier(seed: int = 0, **weights: np.ndarray) -> ir.Model:
    """`CLASSIFIER` with calibration data in its context; `weights` replace its own."""
    made = parse(CLASSIFIER, {**classifier_weights(seed), **weights})
    FoldConstants()(made)
    return calibrated(made, images())


def images(count: int = 24, seed: int = 1) -> Stacked:
    return Stacked({"x": np.random.default_rng(seed).standard_normal((count, 3, 12, 12)).astype(np.float32)})


def calibrated(made: ir.Model, data: Stacked) -> ir.Model:
    made.meta["sparsec"] = Context(calibration=data, original=save(made))
    return made


def outputs(made: ir.Model, data: Stacked) -> np.ndarray:
    """The first output in ONNX Runtime, all samples."""
    session = quiet_session(save(made))
    return np.concatenate([session.run(None, sample)[0] for sample in data])


def error(got: np.ndarray, reference: np.ndarray) -> float:
    """Share of the reference's power."""
    return float(np.square(got - reference).sum() / np.square(reference).sum())


def stored_weights(made: ir.Model) -> Iterator[tuple[ir.Node, np.ndarray, np.ndarray, np.ndarray]]:
    """(DequantizeLinear, integers, scale, zero point) of every constant that a layer multiplies with."""
    for node in made.graph:
        q = constant(node.inputs[0]) if node.op_type == "DequantizeLinear" else None
        if q is not None and q.dtype != np.int32:
            scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
            assert scale is not None and zero is not None
            yield node, q, scale, zero


def checked(made: ir.Model) -> onnx.ModelProto:
    """The model, which must be valid and load."""
    data = save(made)
    onnx.checker.check_model(data, full_check=True)
    quiet_session(data)
    return onnx.load_model_from_string(data)
