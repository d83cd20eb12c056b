"""Operators of quantized models, and bytes through those that move them."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from operator_cases.case import BYTES, F32, HALVES, IMAGE, INTS, SIGNED, Case, ints, positive

CASES = [
    *(
        Case(
            "QuantizeLinear",
            (x,),
            (np.array(0.5, F32), np.array(zero, dtype)),
            name=f"{dtype.__name__}{zero}",
            opset=21,
        )
        for dtype, zero in (
            (np.uint8, 0),
            (np.uint8, 117),
            (np.int8, 0),
            (np.int8, -128),
            (np.uint16, 9),
            (np.int16, -4),
        )
        for x in (HALVES,)
    ),
    Case("QuantizeLinear", (IMAGE,), (np.array(0.031, F32), np.array(117, np.uint8)), name="image"),
    Case("QuantizeLinear", (IMAGE,), (positive(6), np.arange(6).astype(np.int8)), {"axis": 1}, "channels"),
    Case("QuantizeLinear", (HALVES,), (np.array([0.5], F32),), name="no zero point", opset=21),
    Case("QuantizeLinear", (HALVES,), (np.array(0.5, F32),), {"output_dtype": TensorProto.INT8}, "type", opset=21),
    Case("DequantizeLinear", (BYTES,), (np.array(0.031, F32), np.array(117, np.uint8))),
    Case("DequantizeLinear", (SIGNED,), (np.array(0.031, F32), np.array(-128, np.int8)), name="int8"),
    Case("DequantizeLinear", (SIGNED,), (positive(6), np.arange(6).astype(np.int8)), {"axis": 1}, "channels"),
    Case("DequantizeLinear", (INTS.astype(np.int32),), (np.array(0.1, F32),), name="int32"),
    Case("DynamicQuantizeLinear", (IMAGE,), outputs=3),
    Case("MatMulInteger", (BYTES[0, 0], SIGNED[0, 0].T), (np.uint8(117), np.int8(3))),
    Case("MaxPool", (BYTES,), attributes={"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, name="uint8"),
    Case("MaxPool", (SIGNED,), attributes={"kernel_shape": [3, 3], "strides": [2, 2]}, name="int8"),
    *(Case("Concat", (x, x[:, :2]), attributes={"axis": 1}, name=f"{x.dtype}") for x in (BYTES, SIGNED)),
    *(Case("Transpose", (x,), attributes={"perm": [0, 2, 3, 1]}, name=f"{x.dtype}") for x in (BYTES, SIGNED)),
    *(Case("Split", (x,), (ints(2, 4),), {"axis": 1}, f"{x.dtype}", outputs=2) for x in (BYTES, SIGNED)),
    Case("Slice", (BYTES,), (ints(1), ints(5), ints(1), ints(2)), name="uint8"),
    Case("Pad", (BYTES,), (ints(0, 0, 1, 1, 0, 0, 2, 1), np.uint8(117)), name="uint8", opset=18),
    Case("Resize", (BYTES,), (None, np.array([1, 1, 2, 2], F32)), {"mode": "nearest"}, "uint8", opset=18),
]
