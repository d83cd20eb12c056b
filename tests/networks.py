"""Random small networks for property tests: convolutions, pooling, products, joins, views and activations."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

ACTIVATIONS = ("Relu", "Sigmoid", "HardSwish", "LeakyRelu", "Tanh", "Clip", "Silu", "HardSwishParts")


class _Network:
    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.rng = np.random.default_rng(draw(st.integers(0, 1000)))
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.values: dict[str, tuple[int, ...]] = {}
        self.inputs: list[str] = []

    def among(self, choices: Any) -> Any:
        return self.draw(st.sampled_from(list(choices)))

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def add(self, op: str, inputs: list[str], shape: tuple[int, ...], **attributes: Any) -> str:
        name = f"v{len(self.values)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        self.values[name] = shape
        return name

    def constant(self, array: Any) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, *shape: int) -> str:
        zeros = self.among([0.0, 0.0, 0.5, 0.8, 0.95])
        block = self.among([(1, 1), (4, 1), (8, 4)])
        array = self.rng.standard_normal(shape).astype("f") / np.sqrt(np.prod(shape[1:]) * (1 - zeros))
        grid = self.rng.random((-(-shape[0] // block[0]), -(-shape[1] // block[1]), *shape[2:])) < zeros
        mask = grid.repeat(block[0], axis=0).repeat(block[1], axis=1)[: shape[0], : shape[1]]
        return self.constant(np.where(mask, 0, array).astype("f"))

    def planes(self) -> list[str]:
        return [name for name, shape in self.values.items() if len(shape) == 4]

    # Every method below adds something behind a value, or nothing where it does not fit.

    def conv(self, x: str) -> None:
        n, c, h, w = self.values[x]
        kernel = self.among(
            [k for k in ((1, 1), (1, 1), (3, 3), (1, 3), (2, 2), (5, 3)) if k[0] <= h + 2 and k[1] <= w + 2]
        )
        strides = (self.number(1, 2), self.number(1, 2))
        pads = [self.number(0, kernel[i % 2] // 2) for i in range(4)]
        dilation = self.number(1, 2)
        out = [
            (size + pads[i] + pads[i + 2] - dilation * (kernel[i] - 1) - 1) // strides[i] + 1
            for i, size in enumerate((h, w))
        ]
        if min(out) < 1:
            return
        group = self.among([g for g in (1, 1, 1, 2, c) if c % g == 0])
        rows = group * self.number(1, 3) if group > 1 else self.number(1, 19)
        inputs = [x, self.weight(rows, c // group, *kernel)]
        if self.number(0, 1):
            inputs.append(self.constant(self.rng.standard_normal(rows).astype("f")))
        self.add(
            "Conv", inputs, (n, rows, *out), strides=strides, pads=pads, dilations=(dilation, dilation), group=group
        )

    def pool(self, x: str) -> None:
        n, c, h, w = self.values[x]
        kind, k, s = self.among(["MaxPool", "AveragePool"]), self.number(1, 3), self.number(1, 2)
        if min(h, w) >= k:
            shape = (n, c, (h - k) // s + 1, (w - k) // s + 1)
            self.add(kind, [x], shape, kernel_shape=(k, k), strides=(s, s))

    def reduce(self, x: str) -> None:
        shape = self.values[x]
        self.add("GlobalAveragePool", [x], (*shape[:2], 1, 1))

    def join(self, x: str) -> None:
        shape = self.values[x]
        axis = self.among([0, 1, 1, 1, 2, 3])
        others = [
            name for name, other in self.values.items()
            if len(other) == 4 and all(a == b for i, (a, b) in enumerate(zip(shape, other, strict=True)) if i != axis)
        ]  # fmt: skip
        parts = [x, *(self.among(others) for _ in range(self.number(0, 2)))]
        extent = sum(self.values[p][axis] for p in parts)
        if extent <= 48:
            self.add("Concat", parts, (*shape[:axis], extent, *shape[axis + 1 :]), axis=axis)

    def split(self, x: str) -> None:
        shape = self.values[x]
        axis = self.among([1, 1, 2])
        if shape[axis] > 1:
            start = self.number(0, shape[axis] - 1)
            stop = self.number(start + 1, shape[axis])
            bounds = [self.constant(np.array([v], np.int64)) for v in (start, stop, axis)]
            self.add("Slice", [x, *bounds], (*shape[:axis], stop - start, *shape[axis + 1 :]))

    def combine(self, x: str) -> None:
        shape = self.values[x]
        same = [name for name, other in self.values.items() if other == shape]
        scales = [name for name, other in self.values.items() if other == (*shape[:2], 1, 1)]
        self.add(self.among(["Add", "Add", "Mul"]), [self.among(same + scales), x], shape)

    def residual(self, x: str) -> None:
        shape = self.values[x]
        y = self.add("Conv", [x, self.weight(shape[1], shape[1], 1, 1)], shape)
        for place in range(2):
            if self.number(0, 1):
                self.activate(y)
                y = list(self.values)[-1]
            if place == 0:
                y = self.add("Add", [x, y] if self.number(0, 1) else [y, x], shape)

    def gated(self, x: str) -> None:
        shape = self.values[x]
        mean = self.add("GlobalAveragePool", [x], (*shape[:2], 1, 1))
        gate = self.add("Conv", [mean, self.weight(shape[1], shape[1], 1, 1)], (*shape[:2], 1, 1))
        self.add("Mul", [x, self.add("HardSigmoid", [gate], (*shape[:2], 1, 1))], shape)

    def view(self, x: str) -> None:
        n, c, h, w = self.values[x]
        flat = self.add("Reshape", [x, self.constant(np.array([n, c, -1], np.int64))], (n, c, h * w))
        behind = self.add(self.among(["Relu", "Identity", "Sigmoid"]), [flat], (n, c, h * w))
        self.add("Reshape", [behind, self.constant(np.array([n, c, w, h], np.int64))], (n, c, w, h))

    def activate(self, x: str) -> None:
        shape, kind = self.values[x], self.among(ACTIVATIONS)
        low, high = self.constant(np.float32(0)), self.constant(np.float32(6))
        if kind == "Silu":
            self.add("Mul", [x, self.add("Sigmoid", [x], shape)], shape)
        elif kind == "HardSwishParts":
            shifted = self.add("Add", [x, self.constant(np.float32(3))], shape)
            gate = self.add("Clip", [shifted, low, high], shape)
            self.add("Div", [self.add("Mul", [x, gate], shape), high], shape)
        else:
            self.add(kind, [x, low, high] if kind == "Clip" else [x], shape)

    def product(self, x: str) -> None:
        n, c, h, w = self.values[x]
        flat = self.add("Flatten", [x], (n, c * h * w))
        columns = self.number(1, 40)
        bias = self.constant(self.rng.standard_normal(columns).astype("f"))
        gemm = self.add("Gemm", [flat, self.weight(columns, c * h * w), bias], (n, columns), transB=1)
        self.add(self.among(["Relu", "Softmax", "Identity"]), [gemm], (n, columns))


@st.composite
def networks(draw: Any) -> onnx.ModelProto:
    """An ONNX model with one or two inputs and every value that nothing reads, and some others, as outputs."""
    net = _Network(draw)
    batch = net.among([1, 1, 1, 2])
    size = (net.number(1, 12), net.number(1, 18))
    for i in range(net.number(1, 2)):
        net.values[f"x{i}"] = (batch, net.number(1, 9), *size)
        net.inputs.append(f"x{i}")
    steps = (
        net.conv, net.conv, net.conv, net.conv, net.pool, net.join, net.join, net.split, net.combine, net.combine,
        net.view, net.activate, net.activate, net.activate, net.reduce, net.product, net.residual, net.residual, net.gated,
    )  # fmt: skip
    for _ in range(net.number(2, 12)):
        planes = net.planes()
        net.among(steps)(planes[-1] if net.number(0, 3) else net.among(planes[-4:]))
    if not net.nodes:
        net.activate("x0")
    read = {name for node in net.nodes for name in node.input}
    made = [node.output[0] for node in net.nodes]
    outputs = [name for name in made if name not in read or net.number(0, 9) == 0]
    if len(made) > 3 and net.number(0, 3) == 0:
        outputs.append(net.inputs[0])
    info = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in net.values.items()}
    graph = helper.make_graph(
        net.nodes, "network", [info[n] for n in net.inputs], [info[n] for n in dict.fromkeys(outputs)], net.weights
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model
