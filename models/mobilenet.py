"""MobileNetV1 (arXiv:1704.04861), MobileNetV2 (arXiv:1801.04381) and EfficientNet-Lite0 with seeded weights.

V1 and EfficientNet-Lite0 as exporters write them after folding (Conv with bias, Clip), V2 with BatchNormalization left
in and torchvision's numbering.
"""

from __future__ import annotations

import onnx

from sparsec.models.graph import Graph, Value, round_channels, same_padding

# (output channels, stride) of each depthwise + 1x1 pair.
_V1 = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)

# (expansion, output channels, repeats, stride of the first)
_V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

# (kernel, expansion, output channels, repeats, stride of the first)
_LITE0 = (
    (3, 1, 16, 1, 1),
    (3, 6, 24, 2, 2),
    (5, 6, 40, 2, 2),
    (3, 6, 80, 3, 2),
    (5, 6, 112, 3, 1),
    (5, 6, 192, 4, 2),
    (3, 6, 320, 1, 1),
)

# The last convolution of a residual branch: sums of branches stay of order 1.
_BRANCH_GAIN = 0.6


def mobilenet_v1(resolution: int = 224, width: float = 1.0, classes: int = 1000, seed: int = 0) -> onnx.ModelProto:
    """MobileNetV1: 13 pairs of depthwise 3x3 and 1x1 convolutions, BatchNorm folded, ReLU6; 4.2 M weights."""
    graph = Graph("mobilenet_v1", seed)
    x = graph.input(3, resolution, resolution)
    x = graph.relu6(graph.conv(x, "stem", round_channels(32 * width), 3, 2), "stem.relu6")
    for index, (channels, stride) in enumerate(_V1, 1):
        name = f"block{index}.depthwise"
        x = graph.relu6(graph.conv(x, name, x.channels, 3, stride, depthwise=True), f"{name}.relu6")
        name = f"block{index}.pointwise"
        x = graph.relu6(graph.conv(x, name, round_channels(channels * width)), f"{name}.relu6")
    x = graph.pool_flatten(x, "pool", "flatten")
    return graph.model(graph.gemm(x, "classifier", classes, "logits"))


def mobilenet_v2(resolution: int = 224, width: float = 1.0, classes: int = 1000, seed: int = 0) -> onnx.ModelProto:
    """MobileNetV2: inverted residuals, BatchNormalization not folded, ReLU6; 3.5 M weights."""
    graph = Graph("mobilenet_v2", seed)
    x = graph.input(3, resolution, resolution)

    def activated(x: Value, name: str, channels: int, kernel: int, stride: int = 1, depthwise: bool = False) -> Value:
        y = graph.conv(x, f"{name}.conv", channels, kernel, stride, depthwise=depthwise, batch_norm=True)
        return graph.relu6(y, f"{name}.relu6")

    x = activated(x, "features.0", round_channels(32 * width), 3, 2)
    index = 1
    for expansion, channels, repeats, first_stride in _V2:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            name = f"features.{index}"
            outputs = round_channels(channels * width)
            y = activated(x, f"{name}.expand", x.channels * expansion, 1) if expansion > 1 else x
            y = activated(y, f"{name}.depthwise", y.channels, 3, stride, depthwise=True)
            residual = stride == 1 and outputs == x.channels
            gain = _BRANCH_GAIN if residual else 1.0
            y = graph.conv(y, f"{name}.project.conv", outputs, batch_norm=True, gain=gain)
            x = graph.add(x, y, f"{name}.add") if residual else y
            index += 1
    x = activated(x, f"features.{index}", round_channels(1280 * max(width, 1.0)), 1)
    x = graph.pool_flatten(x, "pool", "flatten")
    return graph.model(graph.gemm(x, "classifier.1", classes, "logits"))


def efficientnet_lite0(
    resolution: int = 224, width: float = 1.0, classes: int = 1000, seed: int = 0
) -> onnx.ModelProto:
    """EfficientNet-Lite0: inverted residuals, depthwise 3x3 and 5x5, TensorFlow's uneven padding; 4.6 M weights."""
    graph = Graph("efficientnet_lite0", seed)
    x = graph.input(3, resolution, resolution)

    def conv(
        x: Value, name: str, channels: int, kernel: int = 1, stride: int = 1, depthwise: bool = False, gain: float = 1.0
    ) -> Value:
        top, bottom = same_padding(x.height, kernel, stride)
        left, right = same_padding(x.width, kernel, stride)
        pads = (top, left, bottom, right)
        return graph.conv(x, name, channels, kernel, stride, pads=pads, depthwise=depthwise, gain=gain)

    # Lite models scale neither stem nor head.
    x = graph.relu6(conv(x, "stem", 32, 3, 2), "stem.relu6")
    for stage, (kernel, expansion, channels, repeats, first_stride) in enumerate(_LITE0):
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            name = f"blocks.{stage}.{repeat}"
            outputs = round_channels(channels * width)
            y = x
            if expansion > 1:
                y = graph.relu6(conv(y, f"{name}.expand", x.channels * expansion), f"{name}.expand.relu6")
            y = conv(y, f"{name}.depthwise", y.channels, kernel, stride, depthwise=True)
            y = graph.relu6(y, f"{name}.depthwise.relu6")
            residual = stride == 1 and outputs == x.channels
            y = conv(y, f"{name}.project", outputs, gain=_BRANCH_GAIN if residual else 1.0)
            x = graph.add(x, y, f"{name}.add") if residual else y
    x = graph.relu6(conv(x, "head", 1280), "head.relu6")
    x = graph.pool_flatten(x, "pool", "flatten")
    return graph.model(graph.gemm(x, "classifier", classes, "logits"))
