"""ResNet-18 and ResNet-50 (arXiv:1512.03385), torchvision's v1.5 (stride in the 3x3) and its names, seeded weights.

BatchNormalization is left in the graph, as in exports that were not simplified.
"""

from __future__ import annotations

import onnx

from sparsec.models.graph import Graph, Value, round_channels

# The last convolution of a residual branch: sums of branches stay of order 1.
_BRANCH_GAIN = 0.5


def _basic(graph: Graph, x: Value, name: str, channels: int, stride: int) -> Value:
    """3x3, 3x3."""
    y = graph.conv(x, f"{name}.conv1", channels, 3, stride, batch_norm=True)
    y = graph.relu(y, f"{name}.relu1")
    return graph.conv(y, f"{name}.conv2", channels, 3, batch_norm=True, gain=_BRANCH_GAIN)


def _bottleneck(graph: Graph, x: Value, name: str, channels: int, stride: int) -> Value:
    """1x1, 3x3, 1x1 to four times the channels."""
    y = graph.relu(graph.conv(x, f"{name}.conv1", channels, batch_norm=True), f"{name}.relu1")
    y = graph.relu(graph.conv(y, f"{name}.conv2", channels, 3, stride, batch_norm=True), f"{name}.relu2")
    return graph.conv(y, f"{name}.conv3", 4 * channels, batch_norm=True, gain=_BRANCH_GAIN)


def _resnet(
    name: str, blocks: tuple[int, ...], bottleneck: bool, resolution: int, width: float, classes: int, seed: int
) -> onnx.ModelProto:
    graph = Graph(name, seed)
    branch, expansion = (_bottleneck, 4) if bottleneck else (_basic, 1)
    x = graph.input(3, resolution, resolution)
    x = graph.relu(graph.conv(x, "conv1", round_channels(64 * width), 7, 2, batch_norm=True), "relu")
    x = graph.max_pool(x, "maxpool", 3, 2, pad=1)
    for stage, repeats in enumerate(blocks):
        channels = round_channels((64 << stage) * width)
        for repeat in range(repeats):
            prefix = f"layer{stage + 1}.{repeat}"
            stride = 2 if stage > 0 and repeat == 0 else 1
            y = branch(graph, x, prefix, channels, stride)
            shortcut = x
            if stride > 1 or x.channels != expansion * channels:
                shortcut = graph.conv(x, f"{prefix}.downsample.conv", y.channels, 1, stride, batch_norm=True)
            last = 3 if bottleneck else 2
            x = graph.relu(graph.add(y, shortcut, f"{prefix}.add"), f"{prefix}.relu{last}")
    x = graph.pool_flatten(x, "avgpool", "flatten")
    return graph.model(graph.gemm(x, "fc", classes, "logits"))


def resnet18(resolution: int = 224, width: float = 1.0, classes: int = 1000, seed: int = 0) -> onnx.ModelProto:
    """ResNet-18: residual pairs of 3x3 convolutions, BatchNormalization not folded; 11.7 M weights."""
    return _resnet("resnet18", (2, 2, 2, 2), False, resolution, width, classes, seed)


def resnet50(resolution: int = 224, width: float = 1.0, classes: int = 1000, seed: int = 0) -> onnx.ModelProto:
    """ResNet-50: residual bottlenecks (1x1, 3x3, 1x1), BatchNormalization not folded; 25.6 M weights."""
    return _resnet("resnet50", (3, 4, 6, 3), True, resolution, width, classes, seed)
