"""The demo: a small trained classifier of `demo_data`'s images, 72 thousand weights, shipped as `demo.onnx`.

It holds one of each layer kind that matters on phones: a strided first convolution, depthwise 3x3 of both strides, 1x1,
a full 3x3 under a residual Add, ReLU6, ReLU, HardSwish, global average pooling, Gemm. `LAYERS` is the architecture;
`tools/train_demo.py` trains it and `assemble` writes the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

import numpy as np
import onnx
from numpy.typing import NDArray

from sparsec.models import demo_data
from sparsec.models.graph import IR_VERSION, OPSET


@dataclass(frozen=True)
class Layer:
    """A convolution with bias and what follows it; padding keeps ceil(size / stride)."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    stride: int = 1
    groups: int = 1
    activation: str = "Clip"  # Clip is ReLU6
    residual: bool = False  # its input is added before the activation


LAYERS = (
    Layer("stem", 3, 16, 3, stride=2),
    Layer("block1.depthwise", 16, 16, 3, groups=16),
    Layer("block1.pointwise", 16, 32, 1),
    Layer("block2.depthwise", 32, 32, 3, stride=2, groups=32),
    Layer("block2.pointwise", 32, 64, 1),
    Layer("block3.conv", 64, 64, 3, activation="Relu", residual=True),
    Layer("block4.depthwise", 64, 64, 3, stride=2, groups=64),
    Layer("block4.pointwise", 64, 128, 1, activation="HardSwish"),
    Layer("block5.depthwise", 128, 128, 3, groups=128),
    Layer("block5.pointwise", 128, 128, 1),
)
HEAD = "head"


def assemble(weights: Mapping[str, NDArray[np.float32]]) -> onnx.ModelProto:
    """The model of `NAME.weight` and `NAME.bias` for each layer of `LAYERS` and for the head [classes, channels]."""
    helper = onnx.helper
    nodes = []
    value = "input"
    for layer in LAYERS:
        source, value = value, layer.name
        nodes.append(
            helper.make_node(
                "Conv",
                [source, f"{layer.name}.weight", f"{layer.name}.bias"],
                [value],
                name=layer.name,
                kernel_shape=[layer.kernel] * 2,
                strides=[layer.stride] * 2,
                pads=[layer.kernel // 2] * 4,
                group=layer.groups,
            )
        )
        if layer.residual:
            value = f"{layer.name}.add"
            nodes.append(helper.make_node("Add", [layer.name, source], [value], name=value))
        bounds = ["clip_min", "clip_max"] if layer.activation == "Clip" else []
        activation = f"{layer.name}.{layer.activation.lower()}"
        nodes.append(helper.make_node(layer.activation, [value, *bounds], [activation], name=activation))
        value = activation
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["pool"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["pool"], ["flatten"], name="flatten", axis=1))
    nodes.append(
        helper.make_node("Gemm", ["flatten", f"{HEAD}.weight", f"{HEAD}.bias"], ["logits"], name=HEAD, transB=1)
    )

    arrays = {"clip_min": np.float32(0), "clip_max": np.float32(6), **weights}
    initializers = [onnx.numpy_helper.from_array(np.asarray(array, np.float32), key) for key, array in arrays.items()]
    shape = [1, demo_data.CHANNELS, demo_data.SIZE, demo_data.SIZE]
    graph = helper.make_graph(
        nodes,
        "demo",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1, len(demo_data.LABELS)])],
        initializers,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="sparsec"
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def demo() -> onnx.ModelProto:
    """The trained model; its held-out data: `demo_data.generate("test", count)`."""
    return onnx.load_model_from_string(resources.files("sparsec.models").joinpath("demo.onnx").read_bytes())
