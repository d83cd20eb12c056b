"""Layers: normalizations, transposed convolutions, folding of columns, grids; what is refused by name."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from sparsec.lowering.expansions.context import Chain, Context, ExpansionError, attribute, numpy_type


def layer_norm(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto] | None:
    """Mean and variance over the axes from `axis` on; the importer knows neither other axes nor the other outputs."""
    x, scale, bias = [*node.input, ""][:3]
    rank = len(context.shape(x))
    axis = int(attribute(node, "axis", -1)) % rank
    if context.element(x) != TensorProto.FLOAT or context.opset < 18:  # where the axes of ReduceMean are an attribute
        return None
    output, mean, inverse = [*node.output, "", ""][:3]
    chain = Chain(context, output)
    axes = chain.const(np.arange(axis, rank))
    mean = chain.add("ReduceMean", x, axes, keepdims=1, result=mean)
    centred = chain.add("Sub", x, mean)
    variance = chain.add("ReduceMean", chain.add("Mul", centred, centred), axes, keepdims=1)
    deviation = chain.add("Sqrt", chain.add("Add", variance, chain.const(attribute(node, "epsilon", 1e-5), np.float32)))
    inverse = chain.add("Div", chain.const(1, np.float32), deviation, result=inverse)
    weighted = chain.add("Mul", chain.add("Mul", centred, inverse), scale, result="" if bias else output)
    if bias:
        chain.add("Add", weighted, bias, result=output)
    return chain.nodes


def batch_norm(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto] | None:
    """Only as it is after training."""
    if attribute(node, "training_mode", 0):
        raise ExpansionError("BatchNormalization in training mode has no lowering; export the model for inference")
    return None


def dropout(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto] | None:
    """After training: x itself, and a mask of ones."""
    x, mask = node.input[0], [*node.output, ""][1]
    if not mask:
        return None
    ones = context.constant(f"{mask}/ones", np.ones(context.shape(x), bool))
    parts = [helper.make_node("Identity", [ones], [mask])]
    return [helper.make_node("Identity", [x], [node.output[0]]), *parts] if node.output[0] else parts


def roi_align(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto] | None:
    """Averages only."""
    if attribute(node, "mode", "avg") == "max":
        raise ExpansionError("RoiAlign with mode max has no lowering")
    return None


def conv_transpose(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto] | None:
    """`output_shape` as the padding that leads to it; what cannot be padded away is added at the end."""
    if not attribute(node, "output_shape", None):
        return None
    shape, size = context.shape(node.input[0])[2:], context.shape(node.output[0])[2:]
    rank = len(shape)
    kernel = context.shape(node.input[1])[2:]
    strides, dilations = attribute(node, "strides", [1] * rank), attribute(node, "dilations", [1] * rank)
    extra = list(attribute(node, "output_padding", [0] * rank))
    upper = attribute(node, "auto_pad", "NOTSET") == "SAME_UPPER"
    begins, ends = [], []
    for d in range(rank):
        total = strides[d] * (shape[d] - 1) + extra[d] + (kernel[d] - 1) * dilations[d] + 1 - size[d]
        extra[d] += max(0, -total)
        total = max(0, total)
        begins.append(total // 2 if upper else total - total // 2)
        ends.append(total - begins[-1])
    kept = [a for a in node.attribute if a.name not in ("output_shape", "output_padding", "auto_pad", "pads")]
    made = helper.make_node("ConvTranspose", node.input, node.output, pads=[*begins, *ends], output_padding=extra)
    made.attribute.extend(kept)
    return [made]


def col2im(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto]:
    """Each column back at its place, overlaps added: a transposed convolution, a channel by a channel, with unit kernels."""
    x = node.input[0]
    image, kernel = ([int(v) for v in context.value(name)] for name in node.input[1:3])
    rank, batch = len(kernel), context.shape(x)[0]
    strides, dilations = attribute(node, "strides", [1] * rank), attribute(node, "dilations", [1] * rank)
    pads = list(attribute(node, "pads", [0] * (2 * rank)))
    spans = [dilations[d] * (kernel[d] - 1) + 1 for d in range(rank)]
    blocks = [(image[d] + pads[d] + pads[rank + d] - spans[d]) // strides[d] + 1 for d in range(rank)]
    rest = [image[d] + pads[d] + pads[rank + d] - spans[d] - strides[d] * (blocks[d] - 1) for d in range(rank)]
    volume = int(np.prod(kernel))
    channels = context.shape(x)[1] // volume
    units = np.tile(np.eye(volume).reshape([volume, 1, *kernel]), [channels, 1] + [1] * rank)
    chain = Chain(context, node.output[0])
    grid = chain.add("Reshape", x, chain.const([batch, channels * volume, *blocks]))
    chain.add(
        "ConvTranspose", grid, chain.const(units, numpy_type(context.element(x))), result=node.output[0],
        group=channels, strides=strides, dilations=dilations, pads=pads, output_padding=rest,
    )  # fmt: skip
    return chain.nodes


def affine_grid(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto]:
    """theta [N, d, d + 1] times each point (x, y, .., 1) of the unit cube's grid, x along the last axis."""
    theta, size = node.input[0], [int(v) for v in context.value(node.input[1])][2:]
    corners = bool(attribute(node, "align_corners", 0))
    lines = [np.linspace(-1, 1, n) if corners else (2 * np.arange(n) + 1) / n - 1 for n in size]
    points = np.meshgrid(*lines, indexing="ij")[::-1]
    grid = np.stack([*points, np.ones(size)], axis=-1).reshape(-1, len(size) + 1)
    chain = Chain(context, node.output[0])
    rows = chain.const(grid, numpy_type(context.element(theta)))
    moved = chain.add("MatMul", rows, chain.add("Transpose", theta, perm=[0, 2, 1]))
    chain.add("Reshape", moved, chain.const([context.shape(theta)[0], *size, len(size)]), result=node.output[0])
    return chain.nodes


def pad(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto] | None:
    """A value that is not known at compile time, by a choice between it and x padded with zeros."""
    value = node.input[2] if len(node.input) > 2 else ""
    if not value or value in context.initializers:
        return None
    x, output = node.input[0], node.output[0]
    chain = Chain(context, output)
    shape, pads = context.shape(x), context.value(node.input[1])
    axes = list(range(len(shape)))
    if len(node.input) > 3 and node.input[3]:
        axes = [int(a) % len(shape) for a in context.value(node.input[3])]
    widths = [(0, 0)] * len(shape)
    for i, axis in enumerate(axes):
        widths[axis] = int(pads[i]), int(pads[len(axes) + i])
    if any(width < 0 for pair in widths for width in pair):
        raise ExpansionError("Pad with negative pads and a value that is not constant has no lowering")
    inside = chain.const(np.pad(np.ones(shape, bool), widths), bool)
    zero = chain.const(0, numpy_type(context.element(x)))
    every = chain.const([w for pair in zip(*widths, strict=True) for w in pair])
    chain.add("Where", inside, chain.add("Pad", x, every, zero), value, result=output)
    return chain.nodes
