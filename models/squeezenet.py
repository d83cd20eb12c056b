"""SqueezeNet 1.1 (arXiv:1602.07360) with seeded weights and torchvision's names."""

from __future__ import annotations

import onnx

from sparsec.models.graph import Graph, Value, round_channels

# (torchvision's index, squeezed channels, expanded channels of each half); a pool stands before 3, 6 and 9.
_FIRES = (
    (3, 16, 64),
    (4, 16, 64),
    (6, 32, 128),
    (7, 32, 128),
    (9, 48, 192),
    (10, 48, 192),
    (11, 64, 256),
    (12, 64, 256),
)


def _fire(graph: Graph, x: Value, name: str, squeezed: int, expanded: int) -> Value:
    """1x1 to few channels, then 1x1 and 3x3 beside each other."""
    x = graph.relu(graph.conv(x, f"{name}.squeeze", squeezed), f"{name}.squeeze_relu")
    one = graph.relu(graph.conv(x, f"{name}.expand1x1", expanded), f"{name}.expand1x1_relu")
    three = graph.relu(graph.conv(x, f"{name}.expand3x3", expanded, 3), f"{name}.expand3x3_relu")
    return graph.concat([one, three], f"{name}.concat")


def squeezenet(resolution: int = 224, width: float = 1.0, classes: int = 1000, seed: int = 0) -> onnx.ModelProto:
    """SqueezeNet 1.1: fire modules with Concat, max pooling rounded up, no Gemm; 1.24 M weights."""
    graph = Graph("squeezenet", seed)
    x = graph.input(3, resolution, resolution)
    x = graph.conv(x, "features.0", round_channels(64 * width), 3, 2, pads=(0, 0, 0, 0))
    x = graph.relu(x, "features.1")
    for index, squeezed, expanded in _FIRES:
        if index in (3, 6, 9):
            x = graph.max_pool(x, f"features.{index - 1}", 3, 2, ceil=True)
        x = _fire(graph, x, f"features.{index}", round_channels(squeezed * width), round_channels(expanded * width))
    x = graph.relu(graph.conv(x, "classifier.1", classes), "classifier.2")
    return graph.model(graph.pool_flatten(x, "classifier.3", "flatten", "logits"))
