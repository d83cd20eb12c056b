"""Graphs written a layer a call: the little that ONNX helpers leave to do, with seeded weights.

Weights of a network nobody trained are useless for tests if activations die, explode or stop depending on the image.
So every value carries the mean and variance of each channel as they follow from its weights, its elements taken as
independent:

    conv      mean' = sum(w * mean),  var' = sum(w^2 * var)
    relu      of N(m, s^2):  mean' = m P + s p,  second moment = (m^2 + s^2) P + m s p    with P, p of m / s
    add       sums

and each convolution is normalized to N(beta, gamma^2) by them: as BatchNormalization, whose running statistics they
then are, or folded into weight and bias, as exporters write it. With beta near gamma / 2 a ReLU passes 0.55 of the
assumed variance but only 0.5 of a much larger one: a wrong assumption about the image fades from layer to layer, and
activations stay of order 1 at any depth.

Bytes are the same on every machine: weights are sums of four integers of PCG64's raw stream (nearly normal), moments
are rounded before use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 9

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Value:
    """An ONNX value [1, channels, height, width] (height = width = 0 for [1, channels]) and its channels' moments."""

    name: str
    height: int
    width: int
    mean: Array  # [channels]
    var: Array  # [channels]

    @property
    def channels(self) -> int:
        return len(self.mean)


def _normal_pdf_cdf(z: Array) -> tuple[Array, Array]:
    pdf = np.array([math.exp(-0.5 * v * v) / math.sqrt(2 * math.pi) for v in z.tolist()])
    cdf = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in z.tolist()])
    return pdf, cdf


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME: output ceil(size / stride), the odd pixel at the end."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def round_channels(channels: float, multiple: int = 8) -> int:
    """Nearest multiple, not below 90 % of `channels`: the rule of MobileNetV2's reference code."""
    rounded = max(multiple, int(channels + multiple / 2) // multiple * multiple)
    return rounded if rounded >= 0.9 * channels else rounded + multiple


class Graph:
    """Collects nodes and initializers; `seed` determines every weight."""

    def __init__(self, name: str, seed: int = 0) -> None:
        self.name = name
        self._bits = np.random.PCG64(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []

    def _normal(self, *shape: int) -> NDArray[np.float32]:
        """Mean 0, deviation 1, within 3.5."""
        raw = np.asarray(self._bits.random_raw(math.prod(shape)), "<u8").view("<u2").reshape(-1, 4)
        total = raw.sum(axis=1, dtype=np.int32) - 2 * 65535
        return (total.astype(np.float32) * np.float32(math.sqrt(3) / 65536)).reshape(shape)

    def constant(self, name: str, array: Array | np.floating) -> str:
        """An initializer; scalars may be asked for again."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.asarray(array, np.float32), name)
        return name

    def node(self, op: str, name: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """Append a node; its output is called `output`, by default like the node."""
        output = output or name
        self._nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def input(self, channels: int, height: int, width: int, name: str = "input") -> Value:
        """The model's input [1, channels, height, width], taken as standardised."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, height, width]))
        return Value(name, height, width, np.zeros(channels), np.ones(channels))

    def conv(
        self,
        x: Value,
        name: str,
        channels: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        pads: Sequence[int] | None = None,
        depthwise: bool = False,
        batch_norm: bool = False,
        gain: float = 1.0,
        output: str | None = None,
    ) -> Value:
        """Convolution with a bias, or followed by BatchNormalization `batch_norm` (its node: `name` with conv -> bn).

        `pads` as in ONNX (top, left, bottom, right), default symmetric for an odd kernel. The result has deviation
        about `gain` in each channel.
        """
        pads = tuple(pads) if pads is not None else (kernel // 2,) * 4
        groups = x.channels if depthwise else 1
        fan_in = x.channels // groups * kernel * kernel
        weight = self._normal(channels, x.channels // groups, kernel, kernel)
        weight *= np.float32(math.sqrt(2.0 / fan_in))
        mean, var = self._moments(weight, x, groups)
        gamma = gain * (1.0 + 0.15 * self._normal(channels).astype(np.float64))
        beta = gain * (0.5 + 0.2 * self._normal(channels).astype(np.float64))

        inputs = [x.name, self.constant(f"{name}.weight", weight)]
        if not batch_norm:
            scale = gamma / np.sqrt(var + 1e-5)
            self._initializers[f"{name}.weight"] = numpy_helper.from_array(
                (weight * scale[:, None, None, None]).astype(np.float32), f"{name}.weight"
            )
            inputs.append(self.constant(f"{name}.bias", beta - mean * scale))
        y = self.node(
            "Conv",
            name,
            inputs,
            output if not batch_norm else None,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=list(pads),
            dilations=[1, 1],
            group=groups,
        )
        if batch_norm:
            bn = _batch_norm_name(name)
            parameters = {"weight": gamma, "bias": beta, "running_mean": mean, "running_var": var}
            y = self.node(
                "BatchNormalization",
                bn,
                [y, *(self.constant(f"{bn}.{key}", value) for key, value in parameters.items())],
                output,
                epsilon=1e-5,
            )
        height = (x.height + pads[0] + pads[2] - kernel) // stride + 1
        width = (x.width + pads[1] + pads[3] - kernel) // stride + 1
        return Value(y, height, width, beta, gamma * gamma)

    def _moments(self, weight: Array, x: Value, groups: int) -> tuple[Array, Array]:
        """Mean and variance of each output channel; rounded, so that no summation order shows."""
        taps = weight.astype(np.float64).sum(axis=(2, 3))
        power = np.square(weight.astype(np.float64)).sum(axis=(2, 3))
        if groups == 1:
            mean, var = (taps * x.mean).sum(axis=1), (power * x.var).sum(axis=1)
        else:
            mean, var = taps[:, 0] * x.mean, power[:, 0] * x.var
        return np.round(mean, 5), np.maximum(np.round(var, 5), 1e-3)

    def relu(self, x: Value, name: str) -> Value:
        return self._rectified(x, self.node("Relu", name, [x.name]))

    def relu6(self, x: Value, name: str) -> Value:
        """Clip to [0, 6], as exporters write ReLU6 since opset 11."""
        bounds = [self.constant("clip_min", np.float32(0)), self.constant("clip_max", np.float32(6))]
        return self._rectified(x, self.node("Clip", name, [x.name, *bounds]))

    def _rectified(self, x: Value, name: str) -> Value:
        deviation = np.sqrt(x.var)
        pdf, cdf = _normal_pdf_cdf(x.mean / deviation)
        mean = x.mean * cdf + deviation * pdf
        square = (x.mean**2 + x.var) * cdf + x.mean * deviation * pdf
        return Value(name, x.height, x.width, np.round(mean, 5), np.maximum(np.round(square - mean**2, 5), 1e-3))

    def add(self, a: Value, b: Value, name: str) -> Value:
        y = self.node("Add", name, [a.name, b.name])
        return Value(y, a.height, a.width, a.mean + b.mean, a.var + b.var)

    def concat(self, values: Sequence[Value], name: str) -> Value:
        y = self.node("Concat", name, [value.name for value in values], axis=1)
        first = values[0]
        mean, var = (np.concatenate([getattr(value, key) for value in values]) for key in ("mean", "var"))
        return Value(y, first.height, first.width, mean, var)

    def max_pool(
        self, x: Value, name: str, kernel: int = 3, stride: int = 2, pad: int = 0, ceil: bool = False
    ) -> Value:
        """The maximum of `kernel`^2 neighbours lies about one deviation above their mean."""
        y = self.node(
            "MaxPool",
            name,
            [x.name],
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[pad] * 4,
            ceil_mode=int(ceil),
        )
        up = stride - 1 if ceil else 0
        height, width = ((size + 2 * pad - kernel + up) // stride + 1 for size in (x.height, x.width))
        return Value(y, height, width, x.mean + np.sqrt(x.var), x.var)

    def pool_flatten(self, x: Value, pool: str, flatten: str, output: str | None = None) -> Value:
        """Global average pooling, then [1, channels, 1, 1] -> [1, channels]."""
        y = self.node("Flatten", flatten, [self.node("GlobalAveragePool", pool, [x.name])], output, axis=1)
        return Value(y, 0, 0, x.mean, x.var)

    def gemm(self, x: Value, name: str, units: int, output: str) -> Value:
        """Fully connected, weight [units, channels], for a classifier's head: logits of deviation about 1."""
        weight = self._normal(units, x.channels)
        # Means over an image vary far less than pixels do: the gain brings logits of different images apart.
        weight *= np.float32(4.0 / math.sqrt(x.channels))
        mean = np.round((weight.astype(np.float64) * x.mean).sum(axis=1), 5)
        bias = 0.1 * self._normal(units) - mean
        parameters = [self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias)]
        y = self.node("Gemm", name, [x.name, *parameters], output, transB=1)
        return Value(y, 0, 0, np.zeros(units), np.ones(units))

    def model(self, output: Value) -> onnx.ModelProto:
        """The finished model."""
        shape = [1, output.channels] if output.height == 0 else [1, output.channels, output.height, output.width]
        result = helper.make_tensor_value_info(output.name, TensorProto.FLOAT, shape)
        graph = helper.make_graph(self._nodes, self.name, self._inputs, [result], list(self._initializers.values()))
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="sparsec"
        )


def _batch_norm_name(conv: str) -> str:
    """`layer1.0.conv2` -> `layer1.0.bn2`; a name without conv gets `.bn`."""
    head, found, tail = conv.rpartition("conv")
    return f"{head}bn{tail}" if found else f"{conv}.bn"
