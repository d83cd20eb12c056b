"""Models of one product each, whose kernels `gpu_check.py` times alone: dense, 2:4, blocks, int4 by groups."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BLOCK_INPUTS = 16  # that are zero together
GROUP = 64  # inputs of an int4 weight that share a scale, and are zero together


def dense(k: int, n: int) -> np.ndarray:
    """w [k, n] of float16's values, so that storing them in float16 rounds nothing."""
    w = np.random.default_rng([k, n]).standard_normal((k, n)) / np.sqrt(k)
    return w.astype(np.float16).astype(np.float32)


def two_four(w: np.ndarray) -> np.ndarray:
    """`w` with the two smaller of every four neighbouring inputs zero."""
    k, n = w.shape
    parts = w.reshape(k // 4, 4, n)
    order = np.argsort(np.abs(parts), axis=1)
    kept = parts.copy()
    np.put_along_axis(kept, order[:, :2], 0, axis=1)
    return kept.reshape(k, n)


def blocks(w: np.ndarray, outputs: int, zeros: float) -> np.ndarray:
    """`w` with a share of its blocks, `outputs` x BLOCK_INPUTS, zero, drawn."""
    inputs, (k, n) = BLOCK_INPUTS, w.shape
    keep = np.random.default_rng(1).permutation(k // inputs * (n // outputs)) >= zeros * (k // inputs) * (n // outputs)
    return w * np.kron(keep.reshape(k // inputs, n // outputs), np.ones((inputs, outputs), np.float32))


def product(m: int, w: np.ndarray) -> onnx.ModelProto:
    """y [m, n] = x [m, k] w."""
    k, n = w.shape
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "product")]
    return _model(nodes, m, k, n, [numpy_helper.from_array(w, "w")])


def integers(k: int, n: int, zeros: float) -> tuple[onnx.ModelProto, np.ndarray]:
    """y [1, n] = x [1, k] w with w of int4, a scale a group and a share of groups zero; the model and w [k, n]."""
    rng = np.random.default_rng([k, n, 4])
    q = rng.integers(-7, 8, (k // GROUP, GROUP, n))
    keep = rng.permutation(k // GROUP * n) >= zeros * (k // GROUP) * n
    q = (q * keep.reshape(k // GROUP, 1, n)).reshape(k, n)
    scale = (rng.uniform(0.5, 1.5, (k // GROUP, n)) / 7 / np.sqrt(k)).astype(np.float16).astype(np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], "dequantize", axis=0, block_size=GROUP),
        helper.make_node("MatMul", ["x", "w"], ["y"], "product"),
    ]
    parts = [
        helper.make_tensor("q", TensorProto.INT4, (k, n), q.reshape(-1).tolist()),
        helper.make_tensor("z", TensorProto.INT4, scale.shape, [0] * scale.size),
        numpy_helper.from_array(scale, "s"),
    ]
    return _model(nodes, 1, k, n, parts), (q * np.repeat(scale, GROUP, 0)).astype(np.float32)


def _model(
    nodes: list[onnx.NodeProto], m: int, k: int, n: int, constants: list[onnx.TensorProto]
) -> onnx.ModelProto:  # fmt: skip
    value = helper.make_tensor_value_info
    ports = [value("x", TensorProto.FLOAT, [m, k])], [value("y", TensorProto.FLOAT, [m, n])]
    graph = helper.make_graph(nodes, "product", *ports, constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(made)
    return made
