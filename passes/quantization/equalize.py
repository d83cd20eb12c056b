"""Equalize channels across layers, so that one scale for a tensor serves all of them.

A channel c of a stream of values may be counted in another unit, x_c = s_c x'_c, with s_c > 0:

    layers that make it     W'[c, :] = W[c, :] / s_c,   b'_c = b_c / s_c
    layers that read it     W'[:, c] = W[:, c] * s_c
    between them            only f with f(s x) = s f(x): Relu, LeakyRelu, sums of two such values, pools, changes of layout

The function is unchanged up to the rounding of each product. A residual stream is one set of channels with several
makers and readers. Every other operator, an input or an output of the model, and a Clip with an upper bound fix the
channels that reach them (s = 1): Clip(0, 6) would have to clip each channel at 6 / s_c, which no int8 kernel fuses, and
without it the function is another.

    s_c = r_c^STRENGTH / w_c^(1 - STRENGTH)   up to a factor that all channels share

w_c is the largest |weight| that reads c. r_c is, by `activations`, the largest |x_c| on calibration data; by
`weights`, the largest |weight| that makes c (with STRENGTH = 1/2 the sqrt(r w) / w of the paper). Weights have a scale for
each row of their own, so only columns of a row compete with each other, and channels of an activation.

Cross-layer equalization: Nagel et al. 2019, arXiv:1906.04721; by activations: SmoothQuant, arXiv:2211.10438.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir

from sparsec.passes.layers import WeightedLayer, as_layer
from sparsec.passes.measure.statistics import Activations
from sparsec.passes.normalization.fold_constants import constant, static_shape
from sparsec.rewriting.passes_api import Samples

Equalize = Literal["none", "weights", "activations"]

STRENGTH = 0.5
SWEEPS = 20  # a layer between two streams has its rows scaled by one and its columns by the other
SETTLED = 1e-3  # the largest change of a factor that a last sweep makes
WIDEST = 64.0  # factors stay within 1 / WIDEST ... WIDEST: a channel that hardly exists needs no more

_SAME = ("Identity", "Relu", "LeakyRelu")
_PLANES = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")


@dataclass
class Stream:
    """Channels that keep their unit through several values. `fixed`: why they must keep it, empty if they need not."""

    size: int
    values: dict[ir.Value, int] = field(default_factory=dict, repr=False)  # value -> its axis of channels
    makers: list[WeightedLayer] = field(default_factory=list, repr=False)
    readers: list[WeightedLayer] = field(default_factory=list, repr=False)
    biases: list[ir.Value] = field(default_factory=list, repr=False)
    fixed: str = ""


def streams(model: ir.Model) -> list[Stream]:
    """Every stream that may change its units and has a maker and a reader, in graph order."""
    found: list[Stream] = []
    seen: set[ir.Value] = set()
    for node in model.graph:
        layer = as_layer(node)
        if isinstance(layer, WeightedLayer) and node.outputs[0] not in seen:
            stream = _follow(node.outputs[0], _output_axis(layer))
            seen.update(stream.values)
            if not stream.fixed and stream.makers and stream.readers:
                found.append(stream)
    return found


def _output_axis(layer: WeightedLayer) -> int:
    shape = static_shape(layer.node.outputs[0])
    return 1 if layer.op == "Conv" or shape is None else len(shape) - 1


def _follow(start: ir.Value, axis: int) -> Stream:
    """All that shares the channels of `start`, forwards and backwards."""
    shape = static_shape(start)
    stream = Stream(shape[axis] if shape is not None else 0)
    if shape is None:
        stream.fixed = "its shape is not known"
    pending = [(start, axis)]
    while pending:
        value, axis = pending.pop()
        if value in stream.values:
            if stream.values[value] != axis:
                stream.fixed = "two axes are one"
            continue
        stream.values[value] = axis
        if value.is_graph_input() or value.is_graph_output() or value.const_value is not None:
            stream.fixed = "is an input, an output or a constant"
            continue
        node = value.producer()
        pending += _made(stream, node, axis) if node is not None else ()
        for use in value.uses():
            pending += _read(stream, use.node, use.idx, axis)
    return stream


def _made(stream: Stream, node: ir.Node, axis: int) -> list[tuple[ir.Value, int]]:
    layer = as_layer(node)
    if not isinstance(layer, WeightedLayer):
        return _through(stream, node, axis, backwards=True)
    bias = node.inputs[2] if len(node.inputs) > 2 and layer.op != "MatMul" else None
    plain = all(node.attributes.get_float(key, 1.0) == 1.0 for key in ("alpha", "beta"))
    if not _own(layer) or not plain or axis != _output_axis(layer) or (bias is not None and not _vector(bias, stream)):
        stream.fixed = f"{layer.name} cannot change its rows"
    stream.makers.append(layer)
    if bias is not None:
        stream.biases.append(bias)
    return []


def _read(stream: Stream, node: ir.Node, index: int, axis: int) -> list[tuple[ir.Value, int]]:
    layer = as_layer(node)
    if not isinstance(layer, WeightedLayer):
        return _through(stream, node, axis, backwards=False)
    value = node.inputs[index]
    shape = None if value is None else static_shape(value)
    expected = None if shape is None else 1 if layer.op == "Conv" else len(shape) - 1
    transposed = layer.op == "Gemm" and node.attributes.get_int("transA", 0)
    if index != 0 or not _own(layer) or axis != expected or transposed:
        return _fix(stream, node)
    stream.readers.append(layer)
    return []


def _own(layer: WeightedLayer) -> bool:
    """Whether nothing else reads the weight, and it is the right operand."""
    return len(layer.weight.uses()) == 1 and layer.weight.is_initializer() and layer.input_index == 1


def _vector(value: ir.Value, stream: Stream) -> bool:
    """One constant number a channel along the last axis, for one reader."""
    array = constant(value)
    own = array is not None and len(value.uses()) == 1 and value.is_initializer() and not value.is_graph_input()
    return own and array is not None and array.size == stream.size and array.shape[-1:] == (stream.size,)


def _fix(stream: Stream, node: ir.Node) -> list[tuple[ir.Value, int]]:
    stream.fixed = stream.fixed or f"{node.op_type} {node.name} depends on their unit"
    return []


def _through(stream: Stream, node: ir.Node, axis: int, backwards: bool) -> list[tuple[ir.Value, int]]:
    """Both ends of a node that keeps the channels along `axis` of its data (`backwards`: of its output)."""
    if node.domain not in ("", "ai.onnx") or len(node.outputs) != 1:
        return _fix(stream, node)
    x, y = node.inputs[0], node.outputs[0]
    op, attributes = node.op_type, node.attributes
    if x is None:
        return _fix(stream, node)
    if op in _SAME or (op == "Clip" and _is_relu(node)) or (op in _PLANES and axis == 1):
        return [(x, axis), (y, axis)]
    if op == "Add":
        return _through_sum(stream, node, axis)
    before, after = static_shape(x), static_shape(y)
    if before is None or after is None:
        return _fix(stream, node)
    if op in ("Flatten", "Reshape", "Squeeze", "Unsqueeze"):
        other = kept_axis(after, before, axis) if backwards else kept_axis(before, after, axis)
        if other is None:
            return _fix(stream, node)
        return [(x, other), (y, axis)] if backwards else [(x, axis), (y, other)]
    if op == "Pad" and attributes.get_string("mode", "constant") == "constant" and before[axis] == after[axis]:
        fill = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        if len(node.inputs) < 3 or node.inputs[2] is None or (fill is not None and not fill.any()):
            return [(x, axis), (y, axis)]
    return _fix(stream, node)


def _is_relu(node: ir.Node) -> bool:
    low, high = ([*map(_number, node.inputs[1:]), None, None])[:2]
    return low == 0 and (high is None or high == np.inf)


def _number(value: ir.Value | None) -> float | None:
    array = None if value is None else constant(value)
    return (
        float("nan") if value is not None and array is None else None if array is None else float(array.reshape(-1)[0])
    )


def _through_sum(stream: Stream, node: ir.Node, axis: int) -> list[tuple[ir.Value, int]]:
    a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
    if a is None or b is None:
        return _fix(stream, node)
    for x, other in ((a, b), (b, a)):
        if constant(other) is not None and constant(x) is None:
            shape = static_shape(x)
            if shape is None or axis != len(shape) - 1 or not _vector(other, stream):
                return _fix(stream, node)
            if other not in stream.biases:
                stream.biases.append(other)
            return [(x, axis), (y, axis)]
    if static_shape(a) is None or static_shape(a) != static_shape(b):
        return _fix(stream, node)
    return [(a, axis), (b, axis), (y, axis)]


def kept_axis(source: tuple[int, ...], target: tuple[int, ...], axis: int) -> int | None:
    """Where `axis` of `source` lies in `target`, if a change of layout leaves it whole and in its place."""
    ahead = int(np.prod(source[:axis]))
    for i, size in enumerate(target):
        if size == source[axis] and int(np.prod(target[:i])) == ahead:
            return i
    return None


# ---- factors


def equalize(
    model: ir.Model, how: Equalize, calibration: Samples | None = None, strength: float = STRENGTH
) -> dict[str, np.ndarray]:
    """Change the units of every stream, in place; initializer name -> what it was multiplied by, as stored.

    `how` = activations needs `calibration`. Equal models stay equal under `apply` of the result.
    """
    found = streams(model) if how != "none" else []
    if not found:
        return {}
    peaks = _peaks(model, found, calibration) if how == "activations" and calibration is not None else None
    weights = {
        layer.weight: np.abs(layer.read()).astype(np.float64) for s in found for layer in (*s.makers, *s.readers)
    }
    total = [np.ones(s.size) for s in found]
    for _ in range(SWEEPS):
        moved = 0.0
        for i, stream in enumerate(found):
            made = _most(_rows(stream, weights)) if peaks is None else peaks[i] / total[i]
            read = _most(_columns(stream, weights))
            factor = _factor(made, read, strength, total[i])
            total[i] *= factor
            for layer in stream.makers:
                weights[layer.weight] /= factor[:, None, None, None]
            for layer in stream.readers:
                weights[layer.weight] *= _along_inputs(layer, factor)
            moved = max(moved, float(np.abs(np.log(factor)).max(initial=0.0)))
        if moved < SETTLED:
            break
    factors = _factors(found, total)
    scale(model, factors)
    return factors


def _factor(made: np.ndarray, read: np.ndarray, strength: float, total: np.ndarray) -> np.ndarray:
    live = (made > 0) & (read > 0)
    if not live.any():
        return np.ones_like(made)
    log = strength * np.log(np.where(live, made, 1)) - (1 - strength) * np.log(np.where(live, read, 1))
    log = np.where(live, log - np.mean(log[live]), 0.0)
    return np.clip(total * np.exp(log), 1 / WIDEST, WIDEST) / total


def _rows(stream: Stream, weights: Mapping[ir.Value, np.ndarray]) -> Iterator[np.ndarray]:
    for layer in stream.makers:
        yield weights[layer.weight].max(axis=(1, 2, 3))


def _columns(stream: Stream, weights: Mapping[ir.Value, np.ndarray]) -> Iterator[np.ndarray]:
    for layer in stream.readers:
        w = weights[layer.weight]
        yield w.reshape(layer.groups, -1, *w.shape[1:]).max(axis=(1, 3, 4)).reshape(-1)


def _most(parts: Iterator[np.ndarray]) -> np.ndarray:
    return np.maximum.reduce(list(parts))


def _along_inputs(layer: WeightedLayer, factor: np.ndarray) -> np.ndarray:
    """[IC] as what W [OC, IC/groups, KH, KW] is multiplied by."""
    oc, ic = layer.shape[:2]
    return np.repeat(factor.reshape(layer.groups, ic), oc // layer.groups, axis=0)[:, :, None, None]


def _factors(found: list[Stream], total: list[np.ndarray]) -> dict[str, np.ndarray]:
    factors: dict[str, np.ndarray] = {}

    def multiply(name: str | None, array: np.ndarray) -> None:
        factors[str(name)] = factors.get(str(name), np.float64(1)) * array

    for stream, s in zip(found, total, strict=True):
        for layer in stream.makers:
            multiply(layer.weight.name, _stored(layer, 1 / s[:, None, None, None]))
        for layer in stream.readers:
            multiply(layer.weight.name, _stored(layer, _along_inputs(layer, s)))
        for bias in stream.biases:
            multiply(bias.name, 1 / s)
    return factors


def _stored(layer: WeightedLayer, array: np.ndarray) -> np.ndarray:
    """[OC, IC, KH, KW] or broadcast to it, as the initializer lies, float64."""
    wide = np.broadcast_to(array, layer.shape)
    if layer.op == "Conv":
        return wide.reshape(layer.tensor.shape.numpy())
    matrix = wide.reshape(layer.shape[:2])
    return (matrix.T if layer.transposed else matrix).reshape(layer.tensor.shape.numpy())


def scale(model: ir.Model, factors: Mapping[str, np.ndarray]) -> None:
    """Multiply initializers; one that the model does not have, or has in another shape, is left."""
    for name, factor in factors.items():
        value = model.graph.initializers.get(name)
        if value is None or value.const_value is None:
            continue
        array = value.const_value.numpy()
        if np.broadcast_shapes(array.shape, factor.shape) == array.shape:
            made = (array.astype(np.float64) * factor).astype(array.dtype)
            value.const_value = ir.Tensor(made, dtype=value.const_value.dtype, name=name)


def scaled(data: bytes, factors: Mapping[str, np.ndarray]) -> bytes:
    """ONNX bytes with initializers multiplied."""
    model = ir.from_proto(onnx.load_model_from_string(data))
    scale(model, factors)
    return ir.to_proto(model).SerializeToString()


def _peaks(model: ir.Model, found: list[Stream], calibration: Samples) -> list[np.ndarray]:
    """The largest |x_c| that any reader of each stream sees."""
    axes = {
        str(value.name): (i, axis)
        for i, stream in enumerate(found)
        for value, axis in stream.values.items()
        if any(value is layer.node.inputs[0] for layer in stream.readers)
    }
    peaks = [np.zeros(stream.size) for stream in found]
    for batch in Activations(model).stream(list(axes), calibration):
        for name, (i, axis) in axes.items():
            x = np.abs(np.moveaxis(batch[name], axis + 1, 0))
            peaks[i] = np.maximum(peaks[i], x.reshape(len(x), -1).max(axis=1))
    return peaks
