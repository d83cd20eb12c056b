"""Sums of products, windows, transforms."""

from __future__ import annotations

import numpy as np

from operator_cases.case import IMAGE, Case, floats, positive

CASES = [
    Case("MatMul", (floats(9, 20), floats(20, 33)), depth=20),
    Case("MatMul", (floats(2, 3, 9, 20), floats(2, 3, 20, 7)), name="batched", depth=20),
    Case("MatMul", (floats(2, 3, 9, 20),), (floats(20, 7),), name="weight", depth=20),
    Case("MatMul", (floats(20), floats(20, 7)), name="vector", depth=20),
    Case("Gemm", (floats(3, 20),), (floats(33, 20), floats(33)), {"transB": 1}, depth=21),
    Case("Gemm", (floats(20, 3), floats(20, 33)), (), {"transA": 1, "alpha": 0.5}, "transA", depth=20),
    Case("Gemm", (floats(3, 20), floats(20, 33)), (floats(3, 1),), {"alpha": 0.5, "beta": 2.0}, "beta", depth=21),
    Case("Conv", (floats(1, 4, 9, 11),), (floats(6, 4, 3, 3), floats(6)), {"pads": [1, 1, 1, 1]}, depth=37),
    Case("Conv", (floats(1, 4, 9, 40),), (floats(6, 2, 3, 3),), {"group": 2, "strides": [2, 2]}, "grouped", depth=18),
    Case("Conv", (floats(1, 4, 12, 33),), (floats(6, 4, 3, 3),), {"dilations": [2, 3]}, "dilated", depth=36),
    Case("Conv", (floats(1, 4, 9, 11),), (floats(6, 4, 3, 2),), {"pads": [0, 1, 2, 0]}, "asymmetric", depth=24),
    Case("Conv", (floats(1, 4, 50),), (floats(6, 4, 5), floats(6)), {"pads": [2, 2], "strides": [2]}, "1d", depth=21),
    Case(
        "Conv",
        (floats(1, 4, 9, 11),),
        (floats(4, 1, 3, 3),),
        {"group": 4, "auto_pad": "SAME_UPPER"},
        "depthwise",
        depth=9,
    ),
    Case("Conv", (floats(1, 2, 5, 6, 7),), (floats(3, 2, 3, 3, 3),), {"pads": [1] * 6}, "3d", depth=54),
    Case("ConvTranspose", (floats(1, 4, 5, 6),), (floats(4, 3, 3, 3), floats(3)), {"strides": [2, 2]}, depth=37),
    Case(
        "ConvTranspose",
        (floats(1, 4, 5, 6),),
        (floats(4, 3, 3, 3),),
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
        "padded",
        depth=36,
    ),
    Case("ConvTranspose", (floats(1, 4, 5, 6),), (floats(4, 2, 3, 3),), {"group": 2}, "grouped", depth=18),
    Case("MaxPool", (IMAGE,), attributes={"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    Case("MaxPool", (IMAGE,), attributes={"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}, name="ceil"),
    Case("MaxPool", (IMAGE,), attributes={"kernel_shape": [3, 3], "dilations": [2, 2]}, name="dilated"),
    *(
        Case(
            "AveragePool",
            (IMAGE,),
            attributes={"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2], "count_include_pad": include},
            name=f"include{include}",
            depth=9,
        )
        for include in (0, 1)
    ),
    Case(
        "AveragePool",
        (IMAGE,),
        attributes={"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1},
        name="ceil",
        depth=4,
    ),
    Case("GlobalAveragePool", (IMAGE,), depth=99),
    Case("GlobalMaxPool", (IMAGE,)),
    Case("CumSum", (floats(4, 30),), (np.array(1),), depth=30),
    Case("CumSum", (floats(4, 30),), (np.array(0),), {"exclusive": 1, "reverse": 1}, "reverse", depth=4),
    Case("Einsum", (floats(3, 5, 8), floats(3, 8, 4)), (), {"equation": "bij,bjk->bik"}, depth=8),
    *(
        Case("DFT", (floats(2, 12, 5, parts),), (np.array(n), np.array(axis)), flags, name, 64, 1, 20)
        for name, parts, n, axis, flags in (
            ("real", 1, 12, 1, {}),
            ("onesided", 1, 16, 1, {"onesided": 1}),
            ("cut", 2, 9, 1, {}),
            ("inverse", 2, 5, -2, {"inverse": 1}),
        )
    ),
    Case("STFT", (floats(2, 100, 1),), (np.array(8), positive(16)), {"onesided": 1}, "window", 64),
    Case("STFT", (floats(1, 64, 1),), (np.array(5), positive(12), np.array(12)), {"onesided": 0}, "both sides", 64),
    Case("Det", (floats(4, 3, 3),), depth=6, opset=21),
    Case("Det", (floats(2, 2),), depth=2, name="2x2", opset=21),
    Case(
        "ConvTranspose",
        (floats(1, 2, 5, 5), floats(2, 3, 3, 3)),
        (),
        {"output_shape": [10, 12], "strides": [2, 2]},
        "output_shape",
        36,
    ),
]
