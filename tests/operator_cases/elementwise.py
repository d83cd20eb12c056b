"""Arithmetic by element, reductions, normalization."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from operator_cases.case import F32, IMAGE, INTS, A, B, Case, floats, ints, logical, positive

CASES = [
    *(Case(op, (A, B)) for op in ("Add", "Sub", "Mul", "Div")),
    Case("Add", (floats(1, 6, 9, 11), floats(6, 1, 1)), name="broadcast"),
    Case("Mul", (floats(3, 1, 5), floats(4, 1)), name="both"),
    Case("Add", (floats(70, 67), floats(70, 67, seed=9)), name="long"),
    Case("Add", (INTS, INTS[:1]), name="int64"),
    Case("Pow", (positive(4, 9),), (np.array(2, F32),), name="square"),
    Case("Pow", (positive(4, 9), floats(4, 9)), name="general"),
    Case("Pow", (floats(4, 9),), (np.array(3, F32),), name="cube"),
    *(Case(op, (positive(4, 19),)) for op in ("Sqrt", "Log", "Reciprocal")),
    *(
        Case(op, (floats(3, 33) * F32(3),))
        for op in [
            "Exp",
            "Erf",
            "Tanh",
            "Sigmoid",
            "Abs",
            "Neg",
            "Floor",
            "Ceil",
            "Round",
            "Sign",
            "Relu",
            "HardSwish",
            "HardSigmoid",
            "Softplus",
            "Softsign",
            "Sin",
            "Cos",
        ]
    ),
    Case("Round", (np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5], F32),), name="ties"),
    Case("HardSigmoid", (floats(3, 33),), attributes={"alpha": 0.3, "beta": 0.4}, name="attributes"),
    Case("Elu", (floats(3, 33),), attributes={"alpha": 0.7}),
    Case("Mish", (floats(3, 33),), opset=18),
    Case("Selu", (floats(3, 33),)),
    Case("LeakyRelu", (floats(3, 33),), attributes={"alpha": 0.2}),
    Case("ThresholdedRelu", (floats(3, 33),), attributes={"alpha": 0.5}),
    Case("PRelu", (floats(1, 6, 5, 5), positive(6, 1, 1))),
    Case("PRelu", (floats(1, 6, 5, 5), positive(1)), name="shared"),
    Case("PRelu", (floats(7), np.array(0.3, F32)), name="scalars"),
    Case("PRelu", (floats(2, 3, 4), positive(3, 4)), name="broadcast"),
    Case("Clip", (floats(3, 33),), (np.array(0, F32), np.array(6, F32)), name="relu6"),
    Case("Clip", (floats(3, 33),), (np.array(-0.5, F32),), name="min"),
    Case("Clip", (floats(3, 33),), (None, np.array(0.5, F32)), name="max"),
    *(
        Case("Softmax", (floats(*shape) * F32(4),), attributes={"axis": axis}, name=f"{shape}{axis}", depth=shape[axis])
        for shape, axis in (((3, 35), -1), ((1, 1000), 1), ((2, 5, 6, 7), 1), ((2, 5, 6, 70), 3), ((20, 8), 0))
    ),
    Case("LogSoftmax", (floats(3, 35),), attributes={"axis": -1}, depth=35),
    Case("Hardmax", (floats(3, 35),), attributes={"axis": -1}),
    *(
        Case(op, (IMAGE,), attributes={"axes": axes, "keepdims": keep}, name=f"{axes}{keep}", depth=99 * 6)
        for op in ("ReduceMean", "ReduceMax", "ReduceMin")
        for axes, keep in (([2, 3], 1), ([1], 0), ([-1], 1))
    ),
    Case("ReduceSum", (IMAGE,), (ints(2, 3),), {"keepdims": 0}, depth=99),
    Case("ReduceSum", (IMAGE,), (ints(1),), {"keepdims": 1}, name="channels", depth=6),
    Case("ReduceMean", (floats(4, 200),), attributes={"axes": [1]}, name="rows", depth=200),
    Case("ReduceMean", (floats(4, 5),), name="all", depth=20),
    Case("ReduceProd", (floats(4, 5),), attributes={"axes": [1]}, depth=5),
    Case("ReduceL2", (floats(4, 50),), attributes={"axes": [1]}, depth=50),
    Case("ReduceL1", (floats(4, 50),), attributes={"axes": [1]}, depth=50),
    Case("ReduceSumSquare", (floats(4, 50),), attributes={"axes": [1]}, depth=50),
    Case("ReduceLogSumExp", (floats(4, 50),), attributes={"axes": [1]}, depth=50),
    Case("LayerNormalization", (floats(3, 7, 40),), (positive(40), floats(40)), {"axis": -1}, depth=40),
    Case("LayerNormalization", (floats(3, 7, 40),), (positive(40),), {"axis": -1, "epsilon": 1e-3}, "nobias", depth=40),
    Case("LayerNormalization", (floats(3, 7, 8),), (positive(7, 8), floats(7, 8)), {"axis": 1}, "two axes", depth=56),
    Case("InstanceNormalization", (IMAGE,), (positive(6), floats(6)), depth=99),
    Case(
        "BatchNormalization",
        (IMAGE,),
        (positive(6), floats(6), floats(6, seed=4), positive(6)),
        {"epsilon": 1e-3},
        depth=3,
    ),
    Case("MeanVarianceNormalization", (IMAGE,), attributes={"axes": [0, 2, 3]}, depth=99),
    Case("LRN", (IMAGE,), attributes={"size": 5, "alpha": 0.01, "beta": 0.75, "bias": 1.5}, depth=5),
    Case("Celu", (floats(4, 30),), attributes={"alpha": 0.7}),
    Case("Where", (logical(3, 9), floats(3, 9), floats(3, 9, seed=1))),
    *(Case(op, (floats(3, 9), floats(3, 9, seed=1))) for op in ("Less", "Greater", "LessOrEqual", "GreaterOrEqual")),
    Case("Equal", (INTS, INTS[:1])),
    Case("Not", (logical(3, 9),)),
    *(Case(op, (logical(3, 9), logical(3, 9, seed=1))) for op in ("And", "Or", "Xor")),
    Case("Cast", (floats(3, 9) * F32(5),), attributes={"to": TensorProto.INT64}, name="int64"),
    Case("Cast", (INTS,), attributes={"to": TensorProto.FLOAT}, name="float"),
    Case("Cast", (floats(3, 9),), attributes={"to": TensorProto.BOOL}, name="bool"),
    Case("Cast", (logical(3, 9),), attributes={"to": TensorProto.FLOAT}, name="from bool"),
    *(
        Case(op, tuple(floats(3, 9, seed=i) for i in range(3)), name="3", depth=3)
        for op in ("Min", "Max", "Sum", "Mean")
    ),
    Case("Sum", tuple(floats(3, 9, seed=i) for i in range(10)), name="10", depth=10),
    Case("Mod", (INTS,), (np.array(4),)),
    Case("Mod", (floats(3, 9),), (np.array(0.7, F32),), {"fmod": 1}, "fmod"),
    Case("Shrink", (floats(3, 9),), attributes={"lambd": 0.5, "bias": 0.1}),
    Case("IsNaN", (np.array([1, np.nan, np.inf], F32),)),
    *(Case("LpNormalization", (floats(3, 7, 5),), (), {"p": p, "axis": 1}, str(p), 7, 1, 21) for p in (1, 2)),
    Case("Pow", (np.arange(1, 7, dtype=np.int64), np.array([2, 0, 3, 1, 5, 2], np.int64)), name="int64", opset=15),
    Case("Pow", (positive(4, 9), np.arange(9, dtype=np.int32)), name="mixed", depth=64, opset=15),
    Case("ReduceMax", (logical(3, 5),), (ints(1),), name="bool", opset=20),
]
