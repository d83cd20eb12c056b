"""The generic route against ONNX Runtime, operator by operator, then on real models."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import onnxscript.optimizer
import pytest
from harness import run_region
from onnx import TensorProto, helper, numpy_helper

from sparsec.errors import UnsupportedError
from sparsec.lowering.generic import GenericRegion, lower_generic
from sparsec.targets import find_target

EPS = float(np.finfo(np.float32).eps)
MACHINE = find_target("host").machine


@dataclass(frozen=True)
class Case:
    """One node: `x` are activations, `constants` follow them as initializers (None: input left out)."""

    op: str
    x: tuple[Any, ...]
    constants: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    depth: int = 1  # length of the longest sum behind one result
    outputs: int = 1
    opset: int = 17

    @property
    def id(self) -> str:
        return self.op + (f"-{self.name}" if self.name else "")


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return np.abs(floats(*shape, seed=3)) + np.float32(0.1)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def logical(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.5


A, B = floats(2, 5, 7, seed=1), floats(2, 5, 7, seed=2)
IMAGE = floats(1, 6, 9, 11)
INTS = np.random.default_rng(5).integers(-9, 9, (3, 10))
F32 = np.float32
BYTES = np.random.default_rng(6).integers(0, 256, (1, 6, 9, 11)).astype(np.uint8)
SIGNED = (BYTES.astype(np.int16) - 128).astype(np.int8)
HALVES = np.array([[-1e9, -3.75, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 40.25, 1e9]], F32)  # halves of the scale 0.5

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
    Case("Transpose", (floats(3, 4, 5),), attributes={"perm": [2, 0, 1]}),
    Case("Transpose", (floats(1, 6, 40, 5),), attributes={"perm": [0, 2, 3, 1]}, name="nhwc"),
    Case("Transpose", (floats(3, 4),), name="default"),
    Case("Reshape", (floats(2, 3, 8),), (ints(0, -1),)),
    Case("Flatten", (floats(2, 3, 8),), attributes={"axis": 1}),
    Case("Squeeze", (floats(1, 3, 1, 8),), (ints(0, 2),)),
    Case("Unsqueeze", (floats(3, 8),), (ints(0, 2),)),
    Case("Identity", (floats(3, 8),)),
    Case("Slice", (floats(3, 20),), (ints(2), ints(17), ints(1))),
    Case("Slice", (floats(8, 20),), (ints(1, 2), ints(8, 19), ints(0, 1), ints(2, 3)), name="strided"),
    Case("Slice", (floats(3, 20),), (ints(-1), ints(-21), ints(1), ints(-1)), name="reversed"),
    Case("Slice", (floats(3, 20),), (ints(-5), ints(2**62), ints(-1)), name="open end"),
    Case("Gather", (floats(9, 5),), (ints(0, 3, -1, 8),), {"axis": 0}),
    Case("Gather", (floats(4, 9),), (np.array(2),), {"axis": 1}, "scalar"),
    Case("Gather", (floats(4, 9),), (np.array([[0, 1], [8, -9]]),), {"axis": 1}, "matrix"),
    Case("GatherElements", (floats(3, 4),), (np.array([[0, 1], [2, -1]]),), {"axis": 0}),
    Case("GatherND", (floats(3, 4, 5),), (np.array([[0, 1], [2, 3]]),)),
    Case("Concat", (floats(1, 2, 5), floats(1, 3, 5, seed=1)), attributes={"axis": 1}),
    Case("Concat", (floats(2, 3), floats(2, 1), floats(2, 4)), attributes={"axis": -1}, name="three"),
    Case("Concat", tuple(floats(1, 2, 5, seed=i) for i in range(11)), attributes={"axis": 1}, name="eleven"),
    Case("Split", (floats(2, 9, 4),), (ints(2, 3, 4),), {"axis": 1}, outputs=3),
    Case("Split", (floats(2, 10),), (), {"axis": 1}, "equal", outputs=2),
    Case("Split", (floats(2, 20),), (ints(*[2] * 10),), {"axis": 1}, "ten", outputs=10),
    Case("Pad", (floats(3, 8),), (ints(1, 2, 0, 3), np.array(1.5, F32)), {"mode": "constant"}),
    Case("Pad", (floats(1, 2, 6, 8),), (ints(0, 0, 2, 1, 0, 0, 3, 2),), {"mode": "reflect"}, "reflect"),
    Case("Pad", (floats(1, 2, 6, 8),), (ints(0, 0, 2, 1, 0, 0, 3, 2),), {"mode": "edge"}, "edge"),
    Case("Pad", (floats(3, 8),), (ints(-1, 2, 0, -3),), {"mode": "constant"}, "negative"),
    *(
        Case(
            "Resize",
            (floats(1, 3, 5, 7),),
            (None, np.array([1, 1, *scale], F32)),
            {"mode": mode, "coordinate_transformation_mode": coordinates, **extra},
            f"{mode}-{coordinates}-{scale[0]}",
            depth=16,
        )
        for mode, coordinates, scale, extra in (
            ("nearest", "asymmetric", (2.0, 2.0), {"nearest_mode": "floor"}),
            ("nearest", "half_pixel", (2.0, 2.0), {}),
            ("nearest", "half_pixel", (0.6, 0.6), {}),
            ("linear", "half_pixel", (2.0, 3.0), {}),
            ("linear", "align_corners", (2.0, 2.0), {}),
            ("linear", "pytorch_half_pixel", (1.7, 0.6), {}),
            ("linear", "asymmetric", (2.0, 2.0), {}),
            ("nearest", "asymmetric", (2.5, 1.3), {"nearest_mode": "round_prefer_ceil"}),
            ("nearest", "align_corners", (3, 2), {"nearest_mode": "ceil"}),
            ("cubic", "align_corners", (2.0, 3.0), {}),
            ("cubic", "asymmetric", (0.6, 2.3), {"exclude_outside": 1}),
            ("cubic", "half_pixel", (2.0, 2.0), {"cubic_coeff_a": -0.75}),
        )
    ),
    Case("Resize", (floats(1, 3, 5, 7),), (None, None, ints(1, 3, 10, 14)), {"mode": "linear"}, "sizes", depth=4),
    Case("Where", (logical(3, 9), floats(3, 9), floats(3, 9, seed=1))),
    *(Case(op, (floats(3, 9), floats(3, 9, seed=1))) for op in ("Less", "Greater", "LessOrEqual", "GreaterOrEqual")),
    Case("Equal", (INTS, INTS[:1])),
    Case("Not", (logical(3, 9),)),
    *(Case(op, (logical(3, 9), logical(3, 9, seed=1))) for op in ("And", "Or", "Xor")),
    Case("Cast", (floats(3, 9) * F32(5),), attributes={"to": TensorProto.INT64}, name="int64"),
    Case("Cast", (INTS,), attributes={"to": TensorProto.FLOAT}, name="float"),
    Case("Cast", (floats(3, 9),), attributes={"to": TensorProto.BOOL}, name="bool"),
    Case("Cast", (logical(3, 9),), attributes={"to": TensorProto.FLOAT}, name="from bool"),
    Case("Expand", (floats(3, 1),), (ints(2, 3, 4),)),
    Case("Tile", (floats(3, 4),), (ints(2, 3),)),
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
    Case("DepthToSpace", (floats(1, 8, 3, 5),), attributes={"blocksize": 2}),
    Case("DepthToSpace", (floats(1, 8, 3, 5),), attributes={"blocksize": 2, "mode": "CRD"}, name="crd"),
    Case("SpaceToDepth", (floats(1, 2, 6, 10),), attributes={"blocksize": 2}),
    Case("ArgMax", (floats(4, 30),), attributes={"axis": 1}),
    Case("ArgMax", (floats(4, 30),), attributes={"axis": 0, "keepdims": 0}, name="columns"),
    Case("ArgMin", (floats(4, 30),), attributes={"axis": 1}),
    Case("CumSum", (floats(4, 30),), (np.array(1),), depth=30),
    Case("CumSum", (floats(4, 30),), (np.array(0),), {"exclusive": 1, "reverse": 1}, "reverse", depth=4),
    *(
        Case(op, tuple(floats(3, 9, seed=i) for i in range(3)), name="3", depth=3)
        for op in ("Min", "Max", "Sum", "Mean")
    ),
    Case("Sum", tuple(floats(3, 9, seed=i) for i in range(10)), name="10", depth=10),
    Case("Mod", (INTS,), (np.array(4),)),
    Case("Mod", (floats(3, 9),), (np.array(0.7, F32),), {"fmod": 1}, "fmod"),
    Case("OneHot", (np.array([[1, 0], [3, 2]]),), (np.array(4), np.array([0, 1], F32)), {"axis": -1}),
    Case("Trilu", (floats(5, 7),), (), {"upper": 1}),
    Case("Einsum", (floats(3, 5, 8), floats(3, 8, 4)), (), {"equation": "bij,bjk->bik"}, depth=8),
    Case("Shrink", (floats(3, 9),), attributes={"lambd": 0.5, "bias": 0.1}),
    Case("IsNaN", (np.array([1, np.nan, np.inf], F32),)),
    Case("ScatterND", (floats(5, 4),), (ints(1, 3).reshape(2, 1), floats(2, 4, seed=8))),
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
    *(
        Case(
            "TopK",
            (INTS if "int" in name else floats(2, 10, 7).round(),),
            (ints(3),),
            {"axis": axis, "largest": largest},
            name,
            1,
            2,
            21,
        )
        for name, axis, largest in (("ties", 1, 1), ("smallest", -1, 0), ("int64", 1, 1), ("int-smallest", 0, 0))
    ),
    *(
        Case(
            "Resize",
            (IMAGE,),
            (None, np.array(scales, F32)),
            {"mode": mode, "antialias": 1, **extra},
            f"antialias-{name}",
            8,
            1,
            18,
        )
        for name, mode, scales, extra in (
            ("linear", "linear", (1, 1, 0.5, 0.37), {}),
            ("cubic", "cubic", (1, 1, 0.4, 2.2), {}),
            ("outside", "cubic", (1, 1, 0.7, 0.3), {"exclude_outside": 1}),
        )
    ),
    Case(
        "Resize",
        (IMAGE,),
        (np.array([0, 0, 0.2, -0.2, 1, 1, 0.9, 1.3], F32), None, ints(1, 6, 5, 7)),
        {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 3.0},
        "crop",
        4,
    ),
    *(
        Case(
            "Resize",
            (IMAGE,),
            (None, None, ints(17, 13)),
            {"mode": "linear", "axes": [2, 3], "keep_aspect_ratio_policy": p},
            p,
            4,
            1,
            18,
        )
        for p in ("not_larger", "not_smaller")
    ),
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
    *(Case("LpNormalization", (floats(3, 7, 5),), (), {"p": p, "axis": 1}, str(p), 7, 1, 21) for p in (1, 2)),
    Case(
        "Col2Im",
        (floats(2, 3 * 6, 6),),
        (ints(5, 6), ints(2, 3)),
        {"pads": [0, 1, 1, 0], "strides": [2, 2], "dilations": [1, 2]},
        depth=6,
        opset=21,
    ),
    Case("EyeLike", (floats(4, 6),), (), {"k": 1, "dtype": int(TensorProto.INT64)}, opset=21),
    Case("Pow", (np.arange(1, 7, dtype=np.int64), np.array([2, 0, 3, 1, 5, 2], np.int64)), name="int64", opset=15),
    Case("Pow", (positive(4, 9), np.arange(9, dtype=np.int32)), name="mixed", depth=64, opset=15),
    Case("ReduceMax", (logical(3, 5),), (ints(1),), name="bool", opset=20),
    Case("AffineGrid", (floats(2, 2, 3),), (ints(2, 1, 4, 5),), {}, depth=3, opset=20),
    Case(
        "ConvTranspose",
        (floats(1, 2, 5, 5), floats(2, 3, 3, 3)),
        (),
        {"output_shape": [10, 12], "strides": [2, 2]},
        "output_shape",
        36,
    ),
    Case(
        "TfIdfVectorizer",
        (np.random.default_rng(1).integers(0, 4, (3, 12)),),
        (),
        {
            "mode": "TFIDF",
            "min_gram_length": 1,
            "max_gram_length": 2,
            "max_skip_count": 2,
            "ngram_counts": [0, 4],
            "ngram_indexes": [3, 0, 1, 4, 2, 6, 5],
            "pool_int64s": [0, 1, 2, 3, 0, 1, 2, 2, 1, 3],
            "weights": [1.0, 2.0, 0.5, 1.5, 3.0, 1.0, 2.5],
        },
        opset=21,
    ),
]


def model_of(case: Case) -> onnx.ModelProto:
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


def lower_model(model: onnx.ModelProto) -> tuple[GenericRegion, dict[str, tuple[tuple[int, ...], str]]]:
    ir_model = onnx_ir.from_proto(model)
    nodes = list(ir_model.graph)
    region = lower_generic(nodes, MACHINE)
    written = {name for step in region.steps for name in step.outputs}
    values = [v for node in nodes for v in node.outputs if v.name in written]
    return region, {v.name: (tuple(int(d) for d in v.shape), v.dtype.numpy().name) for v in values}


def compare(case: Case, reference: np.ndarray, result: np.ndarray) -> None:
    assert result.shape == reference.shape
    assert result.dtype == reference.dtype
    if reference.dtype != np.float32:
        np.testing.assert_array_equal(result, reference)
        return
    finite = np.abs(reference[np.isfinite(reference)])
    scale = max(float(finite.max(initial=0)), float(max(np.abs(x).max() for x in case.x)))
    # a sum of `depth` products in any order, and an elementary function of it within 16 ulp
    tolerance = (16 + 2 * case.depth) * EPS * scale
    np.testing.assert_allclose(result, reference, rtol=16 * EPS, atol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_operator(case: Case) -> None:
    model = model_of(case)
    feeds = {f"x{i}": array for i, array in enumerate(case.x)}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, feeds)
    region, outputs = lower_model(model)
    results = run_region(region, feeds, outputs)
    for i, reference in enumerate(expected):
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
