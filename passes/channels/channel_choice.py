"""Which channels to remove: energies of weights, what removing saves, and a greedy choice of bundles.

The law stands in `sparsec.passes.channels.prune_channels`: energy shares along both axes of every layer, damage
D = - sum log(energy left), the bundle with the least D per saving first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from sparsec.passes.channels.coupling import ChannelClass, WeightAxis
from sparsec.passes.channels.cut import Removal
from sparsec.passes.layers import WeightedLayer, weighted_layers
from sparsec.passes.measure.statistics import Activations, input_of
from sparsec.passes.normalization.fold_constants import constant, static_shape
from sparsec.rewriting.passes_api import Context

WEIGHT_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Work:
    """Weights of Conv, ConvTranspose, Gemm and MatMul, and how often they are multiplied."""

    weights: int
    multiply_adds: int


def weight_of(node: ir.Node) -> int | None:
    """Which input of a layer is its constant weight."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in WEIGHT_OPS:
        return None
    for index in (1, 0) if node.op_type == "MatMul" else (1,):
        array = constant(node.inputs[index])
        if array is not None and array.ndim >= 2:
            return index
    return None


def repeats(node: ir.Node, index: int) -> int:
    """How often one pass through the network multiplies each weight of a layer."""
    x, y = static_shape(node.inputs[0]) or (), static_shape(node.outputs[0]) or ()
    if node.op_type == "Conv":
        return y[0] * int(np.prod(y[2:], dtype=np.int64))
    if node.op_type == "ConvTranspose":
        return x[0] * int(np.prod(x[2:], dtype=np.int64))
    shape = static_shape(node.inputs[index]) or ()
    if node.op_type == "Gemm":
        return y[0]
    own = int(np.prod(shape[:-2], dtype=np.int64))
    rows = shape[-1] if index == 1 else shape[-2]
    return int(np.prod(y, dtype=np.int64)) // (rows * own)


def work(graph: ir.Graph) -> Work:
    """The cost of the whole network; shapes must be known."""
    weights: dict[ir.Value, int] = {}
    total = 0
    for node in graph:
        index = weight_of(node)
        value = node.inputs[index] if index is not None else None
        if value is not None and index is not None:
            size = int(np.prod(static_shape(value) or (), dtype=np.int64))
            weights[value] = size
            total += size * repeats(node, index)
    return Work(sum(weights.values()), total)


def input_energy(model: ir.Model, context: Context) -> dict[ir.Node, np.ndarray]:
    """Mean square of every input channel of every layer over the calibration data: [groups, IC]."""
    layers = [layer for layer in weighted_layers(model)]
    sums: dict[ir.Node, np.ndarray] = {}
    names = [str(input_of(layer).name) for layer in layers]
    assert context.calibration is not None
    batches = 0
    for values in Activations(model).stream(names, context.calibration):
        for layer, name in zip(layers, names, strict=True):
            x = values[name].astype(np.float64)  # [samples, *shape]
            axis = 1 + _channel_axis(layer, x.ndim - 1)
            mean = np.square(np.moveaxis(x, axis, 0)).reshape(x.shape[axis], -1).mean(axis=1)
            sums[layer.node] = sums.get(layer.node, 0.0) + mean.reshape(layer.groups, -1)
        batches += 1
        context.tell("energy of activations", batches, batches + 1)
    return {node: total / max(batches, 1) for node, total in sums.items()}


def _channel_axis(layer: WeightedLayer, rank: int) -> int:
    if layer.op == "Conv":
        return 1
    if layer.op == "MatMul" and layer.input_index == 0:
        return rank - 2
    return 0 if layer.op == "Gemm" and layer.node.attributes.get_int("transA", 0) else rank - 1


# ---- choosing


@dataclass
class _Layer:
    """A weight as stored: sizes of its first two (last two) axes and how much each size costs."""

    sizes: dict[int, int]  # axis -> positions left, of the axes that classes lie along
    fixed: int  # product of the other axes
    times: float  # multiply-adds of one weight, 1 if weights are counted

    def cost(self, less: Mapping[int, int]) -> float:
        """The cost with `less` positions along some axes."""
        return self.times * self.fixed * float(np.prod([n - less.get(a, 0) for a, n in self.sizes.items()]))


@dataclass
class _Option:
    """One class while it is chosen from: `order` is ascending importance, the first `gone` units are removed."""

    units: ChannelClass
    order: np.ndarray
    shares: list[tuple[tuple[ir.Value, int], np.ndarray]]  # layer axis, energy share of each unit
    least: int  # units that stay
    copies: dict[tuple[ir.Value, int], int] = field(default_factory=dict)  # positions of a unit along a layer's axis
    gone: int = 0


class Choice:
    """The greedy choice of bundles."""

    def __init__(
        self, graph: ir.Graph, classes: Sequence[ChannelClass], energy: Mapping[ir.Node, np.ndarray], width: int,
        floor: float, count_weights: bool,
    ) -> None:  # fmt: skip
        self._width = width
        self._layers: dict[ir.Value, _Layer] = {}
        for node in graph:
            index = weight_of(node)
            value = node.inputs[index] if index is not None else None
            if value is None or index is None:
                continue
            if value in self._layers:
                self._layers[value].times += 0 if count_weights else repeats(node, index)
            else:
                times = 1 if count_weights else repeats(node, index)
                size = int(np.prod(static_shape(value) or (), dtype=np.int64))
                self._layers[value] = _Layer({}, size, float(times))
        self._left: dict[tuple[ir.Value, int], float] = {}  # share of energy left along a layer's axis
        self._options = []
        scores: dict[ir.Node, list[np.ndarray]] = {}
        for units in classes:
            for member in units.members:
                key = member.value, member.axis.axis
                layer = self._layers.get(member.value)
                if layer is not None and key[1] not in layer.sizes:
                    layer.sizes[key[1]] = member.axis.size
                    layer.fixed //= member.axis.size
            option = self._option(units, energy, floor, scores)
            if option is not None:
                self._options.append(option)
        self._total = sum(layer.cost({}) for layer in self._layers.values())

    def _option(
        self, units: ChannelClass, energy: Mapping[ir.Node, np.ndarray], floor: float,
        scores: dict[ir.Node, list[np.ndarray]],
    ) -> _Option | None:  # fmt: skip
        shares = []
        for use in (*units.producers, *units.consumers):
            axis = use.member.axis.axis
            score = _axis_score(use, energy, scores)
            if score is not None:
                shares.append(((use.member.value, axis), score[use.member.positions].sum(axis=1)))
                self._left[use.member.value, axis] = 1.0
        if not shares:
            return None
        total = np.sum([share for _, share in shares], axis=0)
        least = max(self._width, -(-int(np.ceil(floor * units.size)) // self._width) * self._width)
        option = _Option(units, np.argsort(total, kind="stable"), shares, least)
        for member in units.members:
            if member.value in self._layers:
                option.copies[member.value, member.axis.axis] = member.positions.shape[1]
        return option

    def _next(self, option: _Option) -> int:
        """Units of the next bundle, 0 if the class has given all it may."""
        left = option.units.size - option.gone
        bundle = left % self._width or self._width
        return bundle if left - bundle >= option.least else 0

    def _price(self, option: _Option, bundle: int) -> tuple[float, float]:
        """Damage and saving of the bundle."""
        chosen = option.order[option.gone : option.gone + bundle]
        damage = 0.0
        for key, share in option.shares:
            left = self._left[key]
            damage -= np.log(max(left - float(share[chosen].sum()), 1e-12) / max(left, 1e-12))
        less: dict[ir.Value, dict[int, int]] = {}
        for (value, axis), copies in option.copies.items():
            less.setdefault(value, {})[axis] = copies * bundle
        saved = sum(self._layers[v].cost({}) - self._layers[v].cost(a) for v, a in less.items())
        return damage, saved

    def run(self, target: float, context: Context) -> float:
        """Remove bundles until `target` of the cost is gone or nothing more may go; the share that is gone."""
        gone = 0.0
        while gone < target * self._total:
            best: tuple[float, _Option, int, float] | None = None
            for option in self._options:
                bundle = self._next(option)
                if bundle:
                    damage, saved = self._price(option, bundle)
                    rate = damage / saved if saved > 0 else np.inf
                    if best is None or rate < best[0]:
                        best = rate, option, bundle, saved
            if best is None:
                break
            _, option, bundle, saved = best
            chosen = option.order[option.gone : option.gone + bundle]
            for key, share in option.shares:
                self._left[key] -= float(share[chosen].sum())
            for (value, axis), copies in option.copies.items():
                self._layers[value].sizes[axis] -= copies * bundle
            option.gone += bundle
            gone += saved
            context.tell("choose channels", min(int(1000 * gone / (target * self._total)), 1000), 1000)
        return gone / self._total

    def removals(self) -> list[Removal]:
        """What to cut."""
        made = []
        for option in self._options:
            if option.gone:
                removed = np.zeros(option.units.size, bool)
                removed[option.order[: option.gone]] = True
                made.append((option.units, removed))
        return made


def _axis_score(
    use: WeightAxis, energy: Mapping[ir.Node, np.ndarray], scores: dict[ir.Node, list[np.ndarray]]
) -> np.ndarray | None:
    """Share of a layer's energy at every position of the axis, None for a weight that is not constant."""
    array = constant(use.node.inputs[use.index])
    if array is None:
        return None
    if use.node not in scores:
        score = np.square(array.astype(np.float64))
        inputs = energy.get(use.node)
        if inputs is not None:
            score *= _spread(use.node, use.index, inputs, score)
        score /= max(float(score.sum()), 1e-300)
        axes = range(score.ndim)
        scores[use.node] = [score.sum(axis=tuple(b for b in axes if b != a)) for a in axes]
    return scores[use.node][use.member.axis.axis]


def _spread(node: ir.Node, index: int, inputs: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Energies [groups, IC] in the form of the stored weight, to be multiplied with it."""
    if node.op_type == "Conv":
        rows = np.repeat(inputs, weight.shape[0] // len(inputs), axis=0)
        return rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))
    flat = inputs.reshape(-1)
    across = (node.op_type == "Gemm" and node.attributes.get_int("transB", 0)) or (
        node.op_type == "MatMul" and index == 0
    )
    return flat[None, :] if across else flat[:, None]
