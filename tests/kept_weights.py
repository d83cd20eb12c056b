"""Models of one product whose weight is stored as integers."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TYPES = {"int8": (TensorProto.INT8, -127, 127), "int4": (TensorProto.INT4, -7, 7), "uint8": (TensorProto.UINT8, 0, 255),
         "uint4": (TensorProto.UINT4, 0, 15)}  # fmt: skip


def product(
    m: int = 1, k: int = 200, n: int = 120, kind: str = "int4", block: int = 32, zeros: bool = False,
    op: str = "MatMul", scales: str = "", alpha: float = 1.0,
) -> onnx.ModelProto:  # fmt: skip
    """x [m, k] -> DequantizeLinear of a constant -> product -> Add -> Relu. `scales`: "one" for all, "inputs" one an input."""
    rng = np.random.default_rng([m, k, n])
    stored, low, high = TYPES[kind]
    turned = op == "Gemm"
    axis = 1 if turned else 0  # of the inputs
    dims = (n, k) if turned else (k, n)
    q = rng.integers(low, high + 1, dims)
    parameters = list(dims)
    parameters[axis] = -(-k // block) if block else 1
    shape = tuple(parameters) if block else {"": (n,), "one": (), "inputs": (k,)}[scales]
    s = (rng.uniform(0.5, 1.5, shape) / high / np.sqrt(k)).astype(np.float32)
    z = rng.integers(low, high + 1, shape) if zeros else np.full(shape, 0 if low else (high + 1) // 2)
    options = {"axis": axis, "block_size": block} if block else {"axis": axis if scales == "inputs" else 1 - axis}
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], "dequantize", **(options if shape else {})),
        helper.make_node(op, ["x", "w"], ["p"], "product", **({"transB": 1, "alpha": alpha} if turned else {})),
        helper.make_node("Add", ["p", "b"], ["a"], "bias"),
        helper.make_node("Relu", ["a"], ["y"], "relu"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "product", [value("x", TensorProto.FLOAT, [m, k])], [value("y", TensorProto.FLOAT, [m, n])],
        [
            helper.make_tensor("q", stored, dims, q.reshape(-1).tolist()),
            helper.make_tensor("z", stored, shape, z.reshape(-1).tolist()),
            numpy_helper.from_array(s, "s"), numpy_helper.from_array(rng.standard_normal(n).astype("f"), "b"),
        ],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(made)
    return made
