"""Random small networks that tie channels in every way: joins, splits, groups, gates, views, attention, padding.

Every value that nothing reads ends in a product with a weight, so that channels inside are free to move.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper


class Network:
    """Values by name with their shapes; every method adds something behind a plane [n, c, h, w], or nothing."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.rng = np.random.default_rng(draw(st.integers(0, 1000)))
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.values: dict[str, tuple[int, ...]] = {"x": (draw(st.integers(1, 2)), draw(st.integers(2, 6)), 6, 4)}
        self.read: set[str] = set()

    def among(self, choices: Any) -> Any:
        return self.draw(st.sampled_from(list(choices)))

    def constant(self, array: Any) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, *shape: int) -> str:
        """Normal numbers of a variance that keeps values of order 1."""
        fan = max(1, int(np.prod(shape[1:])))
        return self.constant((self.rng.standard_normal(shape) / np.sqrt(fan)).astype(np.float32))

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def add(self, op: str, inputs: list[str], shape: tuple[int, ...], **attributes: Any) -> str:
        name = f"v{len(self.values)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{op}_{len(self.nodes)}", **attributes))
        self.values[name] = shape
        self.read.update(inputs)
        return name

    # ---- layers

    def conv(self, x: str, rows: int = 0) -> str:
        n, c, h, w = self.values[x]
        rows = rows or self.among((4, 6, 8, 12))
        k = self.among((1, 3))
        inputs = [x, self.weight(rows, c, k, k)] + [self.weight(rows)] * self.among((0, 1))
        return self.add("Conv", inputs, (n, rows, h, w), pads=[k // 2] * 4)

    def grouped(self, x: str) -> str:
        n, c, h, w = self.values[x]
        groups = self.among([g for g in (1, 2, 3, 4, c) if c % g == 0])
        rows = groups * self.among((1, 2, 3))
        inputs = [x, self.weight(rows, c // groups, 3, 3), self.weight(rows)]
        return self.add("Conv", inputs, (n, rows, h, w), pads=[1] * 4, group=groups)

    def deconv(self, x: str) -> str:
        n, c, h, w = self.values[x]
        if self.among((0, 1)):
            return self.add("ConvTranspose", [x, self.weight(c, 1, 1, 1)], (n, c, h, w), group=c)
        return self.add("ConvTranspose", [x, self.weight(c, 4, 1, 1), self.weight(4)], (n, 4, h, w))

    def shared(self, x: str) -> str:
        """One weight read twice."""
        n, c, h, w = self.values[x]
        kernel = self.weight(c, c, 1, 1)
        once = self.add("Conv", [x, kernel], (n, c, h, w))
        return self.add("Conv", [self.add("Relu", [once], (n, c, h, w)), kernel], (n, c, h, w))

    def quantized(self, x: str) -> str:
        n, c, h, w = self.values[x]
        rows = self.among((4, 6))
        stored = self.constant(self.rng.integers(-9, 9, (rows, c, 1, 1)).astype(np.int8))
        scale = self.constant((0.1 + self.rng.random(rows)).astype(np.float32) / 9)
        zero = self.constant(np.zeros(rows, np.int8))
        kernel = self.add("DequantizeLinear", [stored, scale, zero], (rows, c, 1, 1), axis=0)
        return self.add("Conv", [x, kernel], (n, rows, h, w))

    def residual(self, x: str) -> str:
        shape = self.values[x]
        branch = self.activate(self.conv(x, shape[1]))
        return self.add("Add", self.among(([x, branch], [branch, x])), shape)

    def gate(self, x: str) -> str:
        n, c, h, w = self.values[x]
        if self.among((0, 1)):
            mean = self.add("GlobalAveragePool", [x], (n, c, 1, 1))
        else:
            mean = self.add("ReduceMean", [x, self.ints(2, 3)], (n, c, 1, 1))
        hidden = self.activate(self.conv(mean, 4))
        return self.add("Mul", [x, self.add("Sigmoid", [self.conv(hidden, c)], (n, c, 1, 1))], (n, c, h, w))

    def normalize(self, x: str) -> str:
        n, c, h, w = self.values[x]
        # The deviation of one value from its own mean is nothing but rounding.
        kind = self.among(("batch", "group", "layer", *(("instance",) if h * w > 1 else ())))
        if kind == "batch":
            variance = self.constant((0.5 + self.rng.random(c)).astype(np.float32))
            return self.add("BatchNormalization", [x, *(self.weight(c) for _ in range(3)), variance], self.values[x])
        if kind == "instance":
            return self.add("InstanceNormalization", [x, self.weight(c), self.weight(c)], self.values[x])
        if kind == "group":
            groups = self.among([g for g in (1, 2, 3) if c % g == 0])
            return self.add(
                "GroupNormalization", [x, self.weight(c), self.weight(c)], self.values[x], num_groups=groups
            )
        last = self.add("Transpose", [x], (n, h, w, c), perm=[0, 2, 3, 1])
        y = self.add("LayerNormalization", [last, self.weight(c), self.weight(c)], (n, h, w, c))
        return self.add("Transpose", [y], (n, c, h, w), perm=[0, 3, 1, 2])

    def activate(self, x: str) -> str:
        shape = self.values[x]
        kind = self.among(("Relu", "Sigmoid", "Clip", "PRelu", "scale", "Softmax", "Silu"))
        if kind == "Clip":
            return self.add("Clip", [x, self.constant(np.float32(-1)), self.constant(np.float32(1))], shape)
        if kind == "PRelu":
            return self.add("PRelu", [x, self.weight(self.among((1, shape[1])), 1, 1)], shape)
        if kind == "scale":
            return self.add(self.among(("Mul", "Add", "Sub", "Max")), [x, self.weight(1, shape[1], 1, 1)], shape)
        if kind == "Silu":
            return self.add("Mul", [x, self.add("Sigmoid", [x], shape)], shape)
        return self.add(kind, [x], shape, **({"axis": 1} if kind == "Softmax" else {}))

    # ---- joins and parts of the channel axis

    def join(self, x: str) -> str:
        n, _, h, w = self.values[x]
        others = [k for k, s in self.values.items() if len(s) == 4 and s[0] == n and s[2:] == (h, w)]
        parts = [x, *(self.among(others) for _ in range(self.among((1, 2))))]
        channels = sum(self.values[p][1] for p in parts)
        return self.add("Concat", parts, (n, channels, h, w), axis=1) if channels <= 40 else x

    def split(self, x: str) -> str:
        n, c, h, w = self.values[x]
        first = self.among(range(1, c)) if c > 1 else 0
        if not first:
            return x
        names = [f"v{len(self.values)}a", f"v{len(self.values)}b"]
        self.nodes.append(
            helper.make_node("Split", [x, self.ints(first, c - first)], names, name=f"Split_{len(self.nodes)}", axis=1)
        )
        self.read.add(x)
        for name, size in zip(names, (first, c - first), strict=True):
            self.values[name] = (n, size, h, w)
        return self.add("Concat", names[::-1], (n, c, h, w), axis=1) if self.among((0, 1)) else names[1]

    def slice(self, x: str) -> str:
        n, c, h, w = self.values[x]
        step = self.among((1, 1, 2, -1))
        start, end = (c - 1, -c - 1) if step < 0 else (self.among(range(c)), c)
        size = len(range(c)[slice(start, None if end < -c else end, step)])
        bounds = [self.ints(start), self.ints(end), self.ints(1), self.ints(step)]
        return self.add("Slice", [x, *bounds], (n, size, h, w))

    def gather(self, x: str) -> str:
        n, c, h, w = self.values[x]
        index = (
            self.rng.integers(0, c, self.among((c, max(1, c // 2)))) if self.among((0, 1)) else self.rng.permutation(c)
        )
        return self.add("Gather", [x, self.constant(index.astype(np.int64))], (n, len(index), h, w), axis=1)

    def pad(self, x: str) -> str:
        n, c, h, w = self.values[x]
        before, after = self.among((0, 2, 4)), self.among((0, 2, 3))
        if self.among((0, 1)):
            pads = [self.ints(0, before, 0, 0, 0, after, 0, 0)]
        else:
            pads = [self.ints(before, after), self.constant(np.float32(0.5)), self.ints(1)]
        return self.add("Pad", [x, *pads], (n, c + before + after, h, w))

    def tile(self, x: str) -> str:
        n, c, h, w = self.values[x]
        return self.add("Tile", [x, self.ints(1, 2, 1, 1)], (n, 2 * c, h, w)) if c <= 16 else x

    # ---- other shapes, and back

    def space(self, x: str) -> str:
        n, c, h, w = self.values[x]
        deep = self.add("SpaceToDepth", [x], (n, 4 * c, h // 2, w // 2), blocksize=2) if h % 2 + w % 2 == 0 else x
        n, c, h, w = self.values[deep]
        if c % 4 or c > 64:
            return deep
        return self.add("DepthToSpace", [deep], (n, c // 4, 2 * h, 2 * w), blocksize=2, mode=self.among(("DCR", "CRD")))

    def resize(self, x: str) -> str:
        n, c, h, w = self.values[x]
        if h > 6:
            return self.add("MaxPool", [x], (n, c, h // 2, w // 2), kernel_shape=[2, 2], strides=[2, 2])
        if self.among((0, 1)):
            factors = self.constant(np.array([1, 1, 2, 2], np.float32))
            return self.add("Resize", [x, "", factors], (n, c, 2 * h, 2 * w), mode="nearest")
        return self.add("Resize", [x, "", "", self.ints(n, c, 2 * h, 2 * w)], (n, c, 2 * h, 2 * w), mode="linear")

    def shuffle(self, x: str) -> str:
        """ShuffleNet's: [n, g, c/g, h, w] with both swapped."""
        n, c, h, w = self.values[x]
        groups = self.among([g for g in (1, 2, 3) if c % g == 0])
        split = self.add("Reshape", [x, self.ints(n, groups, c // groups, h, w)], (n, groups, c // groups, h, w))
        swapped = self.add("Transpose", [split], (n, c // groups, groups, h, w), perm=[0, 2, 1, 3, 4])
        return self.add("Reshape", [swapped, self.ints(n, -1, h, w)], (n, c, h, w))

    def attention(self, x: str) -> str:
        """Pixels are tokens; two heads."""
        n, c, h, w = self.values[x]
        heads, t, d = self.among((1, 2)), h * w, 4
        flat = self.add("Reshape", [x, self.ints(n, c, t)], (n, c, t))
        tokens = self.add("Transpose", [flat], (n, t, c), perm=[0, 2, 1])

        def project(perm: list[int], shape: tuple[int, ...]) -> str:
            y = self.add("MatMul", [tokens, self.weight(c, heads * d)], (n, t, heads * d))
            y = self.add("Add", [y, self.weight(heads * d)], (n, t, heads * d))
            y = self.add("Reshape", [y, self.ints(n, t, heads, d)], (n, t, heads, d))
            return self.add("Transpose", [y], shape, perm=perm)

        q, v = (project([0, 2, 1, 3], (n, heads, t, d)) for _ in range(2))
        k = project([0, 2, 3, 1], (n, heads, d, t))
        scores = self.add("Softmax", [self.add("MatMul", [q, k], (n, heads, t, t))], (n, heads, t, t), axis=-1)
        mixed = self.add("MatMul", [scores, v], (n, heads, t, d))
        back = self.add("Transpose", [mixed], (n, t, heads, d), perm=[0, 2, 1, 3])
        merged = self.add("Reshape", [back, self.ints(0, 0, heads * d)], (n, t, heads * d))
        out = self.add("MatMul", [merged, self.weight(heads * d, c)], (n, t, c))
        both = self.add("Add", [tokens, out], (n, t, c))
        back = self.add("Transpose", [both], (n, c, t), perm=[0, 2, 1])
        return self.add("Reshape", [back, self.ints(n, c, h, w)], (n, c, h, w))

    def finish(self, x: str) -> str:
        """To [n, 3], in one of several ways."""
        n, c, h, w = self.values[x]
        kind = self.among(("flatten", "reshape", "mean", "einsum", "pool"))
        if kind == "einsum":
            return self.add("Einsum", [x, self.weight(c, 3)], (n, 3), equation="nchw,cd->nd")
        if kind == "mean":
            flat = self.add("ReduceMean", [x, self.ints(2, 3)], (n, c), keepdims=0)
        elif kind == "pool":
            mean = self.add("GlobalMaxPool", [x], (n, c, 1, 1))
            flat = self.add("Squeeze", [mean, self.ints(2, 3)], (n, c))
        elif kind == "flatten":
            flat = self.add("Flatten", [x], (n, c * h * w), axis=1)
        else:
            flat = self.add("Reshape", [x, self.ints(n, c * h * w)], (n, c * h * w))
        width = self.values[flat][1]
        if self.among((0, 1)):
            return self.add("Gemm", [flat, self.weight(3, width), self.weight(3)], (n, 3), transB=1)
        hidden = self.add("Gemm", [flat, self.weight(width, 8), self.weight(8)], (n, 8), alpha=0.5)
        hidden = self.add(self.among(("Relu", "Tanh", "Softmax")), [hidden], (n, 8))
        return self.add("MatMul", [hidden, self.weight(8, 3)], (n, 3))

    def model(self) -> onnx.ModelProto:
        for name in [k for k in self.values if k not in self.read]:
            self.finish(name)
        outputs = [name for name in self.values if name not in self.read]
        info = {k: helper.make_tensor_value_info(k, TensorProto.FLOAT, s) for k, s in self.values.items()}
        inner = [info[k] for k in self.values if k not in outputs and k != "x"]
        graph = helper.make_graph(
            self.nodes, "network", [info["x"]], [info[k] for k in outputs], self.weights, value_info=inner
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model


STEPS = (
    "conv", "conv", "conv", "conv", "grouped", "grouped", "deconv", "shared", "quantized", "residual", "residual",
    "gate", "normalize", "normalize", "activate", "activate", "join", "join", "split", "slice", "gather", "pad",
    "tile", "space", "resize", "shuffle", "attention",
)  # fmt: skip


@st.composite
def channel_networks(draw: Any, steps: tuple[str, ...] = STEPS) -> onnx.ModelProto:
    """A valid ONNX model with the shape of every value."""
    net = Network(draw)
    x = net.conv("x")
    for _ in range(draw(st.integers(1, 7))):
        planes = [k for k, s in net.values.items() if len(s) == 4 and k != "x"]
        source = x if draw(st.integers(0, 3)) else draw(st.sampled_from(planes))
        if len(net.values[source]) == 4 and min(net.values[source]) > 0:
            x = getattr(net, net.among(steps))(source)
    return net.model()
