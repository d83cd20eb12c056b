"""Random single operators with unusual shapes and attributes, several in one model, for property tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, shape_inference


class _Bag:
    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.rng = np.random.default_rng(draw(st.integers(0, 1000)))
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.outputs: list[str] = []

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def among(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def shape(self, low: int, high: int, extent: int = 6) -> list[int]:
        return [self.among(1, self.number(1, extent)) for _ in range(self.number(low, high))]

    def input(self, shape: list[int]) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def constant(self, array: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def either(self, shape: list[int]) -> str:
        """An input, or a constant."""
        return self.input(shape) if self.number(0, 2) else self.constant(self.rng.standard_normal(shape))

    def add(self, op: str, inputs: list[str], outputs: int = 1, **attributes: Any) -> None:
        names = [f"y{len(self.outputs) + i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, **attributes))
        self.outputs += names

    # --- one operator each

    def binary(self) -> None:
        whole = self.shape(1, 5)
        sides = [[self.among(e, e, 1) for e in whole] for _ in range(2)]
        short = self.number(0, 1)
        sides[short] = sides[short][self.number(0, len(whole) - 1) :] if self.number(0, 1) else sides[short]
        a, b = self.input(sides[0]), self.either(sides[1])
        pair = [a, b] if self.number(0, 1) else [b, a]
        self.add(self.among("Add", "Sub", "Mul", "Max"), pair)

    def matmul(self) -> None:
        m, k, n = (self.number(1, 20) for _ in range(3))
        batch = self.shape(0, 2, 3)
        left, right = ([self.among(e, e, 1) for e in batch] for _ in range(2))
        a, b = [*left, m, k], [*(right if self.number(0, 2) else []), k, n]
        if self.number(0, 9) == 0:
            a = a[-1:]
        elif self.number(0, 9) == 0:
            b = b[-2:-1]
        self.add("MatMul", [self.input(a), self.either(b)])

    def gemm(self) -> None:
        m, k, n = (self.number(1, 18) for _ in range(3))
        flags = {"transA": self.number(0, 1), "transB": self.number(0, 1)}
        a, b = ([k, m] if flags["transA"] else [m, k]), ([n, k] if flags["transB"] else [k, n])
        c = self.among(None, [n], [1], [1, n], [m, 1], [m, n], [])
        extra = [] if c is None else [self.either(c)]
        self.add(
            "Gemm",
            [self.input(a), self.either(b), *extra],
            alpha=self.among(1.0, 0.5),
            beta=self.among(1.0, 2.0),
            **flags,
        )

    def conv(self) -> None:
        rank, group = self.number(1, 2), self.among(1, 1, 2, 3)
        size = [self.number(3, 14) for _ in range(rank)]
        kernel, strides, dilations = ([self.number(1, 3) for _ in range(rank)] for _ in range(3))
        mode = self.among("NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")
        attributes: dict[str, Any] = {"strides": strides, "dilations": dilations if mode == "NOTSET" else [1] * rank}
        if mode == "NOTSET":
            attributes["pads"] = [self.number(0, 3) for _ in range(2 * rank)]
            kernel = [k if d * (k - 1) < s else 1 for k, d, s in zip(kernel, dilations, size, strict=True)]
        channels, rows = self.number(1, 5), group * self.number(1, 6)
        x = self.input([self.number(1, 2), group * channels, *size])
        w = self.rng.standard_normal((rows, channels, *kernel)) * (self.rng.random((rows, channels, *kernel)) < 0.6)
        self.add("Conv", [x, self.constant(w)], group=group, auto_pad=mode, **attributes)

    def pool(self) -> None:
        rank, kind = self.number(1, 2), self.among("MaxPool", "AveragePool")
        size = [self.number(3, 12) for _ in range(rank)]
        kernel, strides = ([self.number(1, 3) for _ in range(rank)] for _ in range(2))
        attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "ceil_mode": self.number(0, 1)}
        attributes["pads"] = [self.number(0, kernel[i % rank] - 1) for i in range(2 * rank)]
        if kind == "AveragePool":
            attributes["count_include_pad"] = self.number(0, 1)
        self.add(kind, [self.input([self.number(1, 2), self.number(1, 4), *size])], **attributes)

    def reduce(self) -> None:
        shape = self.shape(1, 5)
        axes = self.draw(st.sets(st.integers(0, len(shape) - 1)))
        signed = [axis - len(shape) if self.number(0, 1) else axis for axis in axes]
        extra = [self.constant(signed, np.int64)] if signed or self.number(0, 1) else []
        kind = self.among("ReduceMean", "ReduceMax", "ReduceSum", "ReduceMin")
        self.add(kind, [self.input(shape), *extra], keepdims=self.number(0, 1), noop_with_empty_axes=self.number(0, 1))

    def slice(self) -> None:
        shape = self.shape(1, 4)
        axes = sorted(self.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1, max_size=2)))
        starts, ends, steps = [], [], []
        for axis in axes:
            start = self.number(0, shape[axis] - 1)
            end = self.number(start + 1, shape[axis])
            back = self.number(0, 4) == 0
            starts.append(end - 1 if back else self.among(start, start - shape[axis]))
            ends.append(
                (start - 1 if start else -(2**40)) if back else self.among(end, 2**40 if end == shape[axis] else end)
            )
            steps.append(-1 if back else self.among(1, 1, 2))
        parts = [starts, ends, [self.among(a, a - len(shape)) for a in axes]] + (
            [steps] if max(steps) > 1 or min(steps) < 0 else []
        )
        self.add("Slice", [self.input(shape), *(self.constant(p, np.int64) for p in parts)])

    def split(self) -> None:
        shape = self.shape(1, 4)
        axis = self.number(0, len(shape) - 1)
        shape[axis] = self.number(2, 9)
        cut = self.number(1, shape[axis] - 1)
        sizes = self.constant([cut, shape[axis] - cut], np.int64)
        self.add("Split", [self.input(shape), sizes], 2, axis=self.among(axis, axis - len(shape)))

    def concat(self) -> None:
        shape = self.shape(1, 4)
        axis = self.number(0, len(shape) - 1)
        parts = []
        for i in range(self.number(1, 3)):
            part = [*shape[:axis], self.number(1, 4), *shape[axis + 1 :]]
            parts.append(self.either(part) if i else self.input(part))
        self.add("Concat", parts, axis=self.among(axis, axis - len(shape)))

    def transpose(self) -> None:
        shape = self.shape(1, 5)
        self.add("Transpose", [self.input(shape)], perm=self.draw(st.permutations(range(len(shape)))))

    def normalize(self) -> None:
        shape = self.shape(1, 4, 9)
        axis = self.number(-len(shape), len(shape) - 1)
        if self.number(0, 1):
            self.add("Softmax", [self.input(shape)], axis=axis)
            return
        shape[-1] = self.number(2, 20)  # the deviation of one element is noise
        tail = shape[axis:]
        parts = [self.constant(self.rng.standard_normal(tail)) for _ in range(self.number(1, 2))]
        self.add("LayerNormalization", [self.input(shape), *parts], axis=axis)

    def activation(self) -> None:
        kind = self.among(
            "Relu", "LeakyRelu", "HardSwish", "Sigmoid", "Tanh", "Gelu", "Elu", "Softplus", "Mish", "Abs", "Neg"
        )
        self.add(kind, [self.input(self.shape(0, 4, 9))])

    def pad(self) -> None:
        shape = self.shape(1, 4)
        pads = self.constant([self.number(0, 2) for _ in range(2 * len(shape))], np.int64)
        self.add("Pad", [self.input(shape), pads], mode=self.among("constant", "edge"))


@st.composite
def operators(draw: Any) -> onnx.ModelProto:
    """An ONNX model of some unconnected operators, all results outputs."""
    bag = _Bag(draw)
    kinds = (
        bag.binary, bag.matmul, bag.gemm, bag.conv, bag.pool, bag.reduce, bag.slice, bag.split, bag.concat, bag.transpose,
        bag.normalize, bag.activation, bag.pad, bag.binary, bag.matmul, bag.conv, bag.pool,
    )  # fmt: skip
    for _ in range(bag.number(1, 8)):
        draw(st.sampled_from(kinds))()
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in bag.outputs]
    graph = helper.make_graph(bag.nodes, "operators", bag.inputs, outputs, bag.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model = shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    onnx.checker.check_model(model)
    return model
