"""Round the weights of int8 layers one after another, each for the inputs that the quantized model gives it.

The model has its activations quantized already, its weights are float still. For a layer with weights v, inputs x of
the model so far and output y of the original at the same place (`sparsec.passes.measure.replay`), rounding minimizes

    E |g - w x - b|^2 + ridge,   g = v x + trust (y - v x),   w on the grid of its row (`sparsec.passes.quantization.grid`)

trust = 0 lets the layer do with its new inputs what it did before, trust > 0 lets it make up for errors of the layers in
front, pruning among them; `auto` asks held-out samples, as refitting after pruning does. Zero weights stay zero. The bias
then takes what rounding and the inputs moved the mean by,

    b' = E[y] - w E[x]

(bias correction: Nagel et al. 2019, arXiv:1906.04721, with data). Weights are written as the floats they stand for;
`sparsec.passes.quantization.graph.store_weight` writes the integers at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir

from sparsec.errors import DataError
from sparsec.passes.initializers import add_initializer
from sparsec.passes.layers import WeightedLayer
from sparsec.passes.measure.replay import Replay
from sparsec.passes.pruning.reconstruct import RIDGE, held_out_trust, matched, problems, set_constant
from sparsec.passes.quantization.graph import Plan, Range, Step
from sparsec.passes.quantization.grid import Rounding, Scales, round_weights, row_grid
from sparsec.rewriting.passes_api import Context, Samples

BIAS_BITS = 30  # of 31: what int32 sums leave for the bias


@dataclass(frozen=True)
class Rounded:
    """A layer on its grid: `q` [OC, IC, KH, KW] integers as float64, `scale` [OC].

    `error`: share of its output's variance that rounding loses on the calibration data; None: not looked at.
    """

    step: Step = field(repr=False)
    q: np.ndarray = field(repr=False)
    scale: np.ndarray = field(repr=False)
    error: float | None = None
    trust: float | None = None


@dataclass(frozen=True)
class How:
    """Options of rounding; see the pass `quantize`."""

    rounding: Rounding = "descent"
    scales: Scales = "mse"
    correct: bool = True
    trust: Literal["auto"] | float = "auto"
    ridge: float = RIDGE


def add_biases(model: ir.Model, plan: Plan) -> bool:
    """Give convolutions and Gemms without a bias one of zeros, so that their mean can be corrected."""
    added = False
    for step in plan.layers:
        node, layer = step.node, step.layer
        assert layer is not None
        if layer.op == "MatMul" or (len(node.inputs) > 2 and node.inputs[2] is not None):
            continue
        zeros = add_initializer(model.graph, f"{layer.weight.name}_bias", np.zeros(layer.shape[0], np.float32))
        node.resize_inputs(max(3, len(node.inputs)))
        node.replace_input_with(2, zeros)
        added = True
    return added


def reference(model: ir.Model, original: bytes | None) -> ir.Model:
    """The quantized `model` as the original computes it: no rounding of activations, the original's constants.

    Constants of a graph that is another (channels were removed) are left: the reference then is the model itself.
    """
    copy = ir.from_proto(ir.to_proto(model))
    for node in list(copy.graph):
        if node.op_type != "DequantizeLinear":
            continue
        quantize = node.inputs[0].producer() if node.inputs[0] is not None else None
        if quantize is None or quantize.op_type != "QuantizeLinear":
            continue
        y = node.outputs[0]
        identity = ir.node("Identity", [quantize.inputs[0]], name=node.name)
        z = identity.outputs[0]
        name, z.shape, z.type = y.name, y.shape, y.type
        copy.graph.insert_before(node, identity)
        y.name = f"{name}__old"
        y.replace_all_uses_with(z, replace_graph_outputs=True)
        z.name = name
        copy.graph.remove(node, safe=True)
        stored = quantize.outputs[0]
        if not stored.uses() and not stored.is_graph_output():  # what reads the bytes themselves still does
            copy.graph.remove(quantize, safe=True)
    if original is None:
        return copy
    theirs = ir.from_proto(onnx.load_model_from_string(original)).graph
    makers = {y.name: n.op_type for n in copy.graph for y in n.outputs}
    same = {y.name: n.op_type for n in theirs for y in n.outputs}
    mine = copy.graph.initializers
    shapes = {n: (v.shape, v.dtype) for n, v in theirs.initializers.items()}
    if any(makers.get(n) != op for n, op in same.items()) and not _renamed(makers, same):
        return copy
    if any(n in mine and (mine[n].shape, mine[n].dtype) != shape for n, shape in shapes.items()):
        return copy
    for name, value in theirs.initializers.items():
        if name in mine and value.const_value is not None:
            mine[name].const_value = value.const_value
    return copy


def _renamed(makers: Mapping[str | None, str], same: Mapping[str | None, str]) -> bool:
    """Whether nodes differ only at the model's outputs, where the dequantized value has taken the name."""
    return all(makers.get(n) == op or makers.get(f"{n}_float") == op for n, op in same.items())


def nearest(step: Step, x_range: Range | None, scales: Scales = "mse") -> Rounded:
    """A layer rounded to nearest, without data."""
    layer = step.layer
    assert layer is not None
    weight = layer.read().astype(np.float64)
    w = weight.reshape(1, len(weight), -1)
    grid = row_grid(w, None, scales, _least(step, x_range, (1, len(weight))))
    q = np.where(w != 0, grid.codes(w), 0.0)
    return Rounded(step, q.reshape(weight.shape), np.broadcast_to(grid.scale, (1, len(weight), 1)).reshape(-1))


def round_layers(
    model: ir.Model,
    plan: Plan,
    ranges: Mapping[ir.Value, Range],
    original: bytes | None,
    calibration: Samples,
    how: How,
) -> Iterator[Rounded]:
    """Round every layer of the plan in graph order, in place, as floats. `ranges`: of every quantized value."""
    context = Context.of(model)
    replay = Replay(reference(model, original), model, calibration)
    shared: dict[ir.Value, Rounded] = {}
    for done, step in enumerate(plan.layers):
        layer = step.layer
        assert layer is not None
        context.tell(f"quantize {layer.name}", done, len(plan.layers))
        if layer.weight in shared:
            first = shared[layer.weight]
            yield Rounded(step, first.q, first.scale)
            continue
        x_range = ranges[step.inputs[0]]
        if len(layer.weight.uses()) > 1:
            rounded = nearest(step, x_range, how.scales)
            shared[layer.weight] = rounded
            layer.write(_floats(rounded))
        else:
            rounded = _round(step, layer, replay, x_range, how)
        replay.changed(layer)
        yield rounded


def _round(step: Step, layer: WeightedLayer, replay: Replay, x_range: Range, how: How) -> Rounded:
    folds, goal = replay.pairs(layer)
    pairs = folds[0] + folds[1]
    if not all(np.isfinite(sums).all() for sums in (pairs.xx, pairs.yx, pairs.yy)):
        raise DataError("its activations on the calibration data are not finite", layer.name)
    weight = layer.read()
    centred = goal.bias is not None and how.correct
    groups, k = pairs.x.shape
    keep = (weight != 0).reshape(groups, -1, k)
    trust = how.trust
    if trust == "auto":
        trust = held_out_trust(weight, keep, folds, centred, how.ridge)
    parts = problems(weight, pairs, centred, how.ridge, trust)
    h = np.stack([part.h for part in parts])
    w = np.stack([part.start for part in parts])
    if trust > 0:
        rows = [part.full() if m.all() else part.refit(m) for part, m in zip(parts, keep, strict=True)]
        w = np.where(keep, np.stack(matched(rows, pairs, centred)), 0.0)
    grid = row_grid(w, np.diagonal(h, axis1=1, axis2=2), how.scales, _least(step, x_range, w.shape[:2]))
    v = round_weights(w, grid, keep, how.rounding, h)
    q = grid.codes(v).reshape(weight.shape)
    scale = np.broadcast_to(grid.scale, (*w.shape[:2], 1)).reshape(-1)
    layer.write(v.reshape(weight.shape).astype(weight.dtype))
    if centred and goal.bias is not None:
        set_constant(goal.bias, pairs.y - np.einsum("gnk,gk->gn", v, pairs.x).reshape(-1))
    judges = problems(weight, pairs, centred, 0.0)
    error = sum(float(judge.error(rows).sum()) for judge, rows in zip(judges, v, strict=True))
    total = float((pairs.yy - pairs.y**2).sum()) if centred else float(pairs.yy.sum())
    return Rounded(step, q, scale, max(error, 0.0) / total if total > 0 else 0.0, trust)


def _floats(rounded: Rounded) -> np.ndarray:
    return (rounded.q * rounded.scale[:, None, None, None]).astype(np.float32)


def _least(step: Step, x_range: Range | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """The scale of each row below which its bias would leave int32, [G, N]."""
    if step.bias is None or x_range is None or step.bias.const_value is None:
        return None
    bias = np.abs(step.bias.const_value.numpy().astype(np.float64)).reshape(shape)
    return bias / (float(x_range.scale) * 2.0**BIAS_BITS)
