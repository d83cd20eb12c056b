"""Remove whole channels, through every layer that they are coupled with.

A unit u of a class (`couple(graph, cut=True)`) is one channel: rows of the layers that make it, columns of those that
read it. Each of these axes of a layer's weight W has an energy, sum of s over the rows or columns that are left, with
s = w^2, or with calibration data w^2 E[x^2] of the input x that the weight multiplies. Removing units costs

    D = - sum over layers and both axes of log(energy left / energy of all)

so halving one layer costs as much as halving another, and emptying one costs more than thinning several. Greedily, the
least important units of a class (least sum of their shares of energy) go in bundles; of all classes the bundle with the
least D per saving goes first, until the asked share of multiply-adds or of weights is gone. Bundles leave every count a
multiple of `round_to`, by default what the target's vectors hold.

With `dead`, nothing is chosen: only channels of an already masked model go that nobody would miss, because every column
that reads them is zero, or they hold a constant (`constant_channels`) that the reading layer's bias can take over

    b'[o] = b[o] + sum over k of W[o, u, k] c[u]          (not where c != 0 meets padding: that channel stays)

and the function stays. The cut model equals the model with the same rows and columns set to zero (`cut.silence`).
DepGraph: Fang et al. 2023, arXiv:2301.12900; OTO: Chen et al. 2023, arXiv:2305.18030; energy of inputs: Wanda, Sun et
al. 2023, arXiv:2306.11695.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from sparsec.errors import RecipeError
from sparsec.passes.constant_channels import Channels, constant_channels, is_padded
from sparsec.passes.coupling import ChannelClass, WeightAxis, couple
from sparsec.passes.cut import Removal, cut, zero
from sparsec.passes.fold_constants import constant, static_shape
from sparsec.passes.initializers import add_initializer
from sparsec.passes.layers import WeightedLayer, weighted_layers
from sparsec.passes.statistics import Activations, input_of
from sparsec.passes_api import Context, Pass, PassResult

DEFAULT_FLOPS = 0.5
DEFAULT_WIDTH = 8  # float32 lanes without a target
WEIGHT_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove whole channels through all layers they are coupled with; the model gets smaller and faster anywhere.

    `flops`: share of multiply-adds to remove (0.5 if nothing is asked for), or `sparsity`: share of weights. `dead`:
    only channels that carry nothing in a masked model. `round_to`: counts that stay are multiples of it; 0: the
    target's vector width, 8 without one. `floor`: share of its channels that a class keeps. `importance`: magnitude or
    activation (needs calibration data); empty: activation if there is data. `include`, `exclude`: globs over the nodes
    that make the channels.
    """

    name: ClassVar[str] = "prune-channels"

    flops: float = 0.0
    sparsity: float = 0.0
    dead: bool = False
    round_to: int = 0
    floor: float = 0.1
    importance: Literal["", "magnitude", "activation"] = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("flops", "sparsity", "floor"):
            if not 0 <= getattr(self, key) < 1:
                raise RecipeError(f"prune-channels: {key} is a share from 0 to below 1, got {getattr(self, key)}")
        if (self.flops > 0) + (self.sparsity > 0) + self.dead > 1:
            raise RecipeError("prune-channels: give one of flops, sparsity and dead")
        if self.round_to < 0:
            raise RecipeError(f"prune-channels: round_to is a number of channels, got {self.round_to}")
        if self.importance not in ("", "magnitude", "activation"):
            raise RecipeError(f"prune-channels: importance must be magnitude or activation, got {self.importance!r}")

    @property
    def exact(self) -> bool:  # type: ignore[override]  # a constant of other passes; here `dead` keeps the function
        """Whether the outputs stay equal."""
        return self.dead

    def call(self, model: ir.Model) -> PassResult:
        context = Context.of(model)
        before = work(model.graph)
        removals = self.choose(model, context)
        if self.dead and removals:
            _fold(model.graph, removals)  # may make biases, which are cut as well
            removals = _dead(self._classes(model), self._width(context), {})
        cut(model.graph, removals)
        after = work(model.graph)
        for units, removed in removals:
            gone = int(removed.sum())
            context.records.append({"channels of": units.name, "before": units.size, "after": units.size - gone})
        context.records.append(
            {"multiply_adds": [before.multiply_adds, after.multiply_adds], "weights": [before.weights, after.weights]}
        )
        return PassResult(model, bool(removals))

    def choose(self, model: ir.Model, context: Context) -> list[Removal]:
        """The channels that go, of one coupling of the graph as it is; nothing is changed."""
        classes, width = self._classes(model), self._width(context)
        if self.dead:
            return _dead(classes, width, constant_channels(model.graph))
        if self.importance == "activation" and context.calibration is None:
            raise RecipeError("prune-channels: importance=activation needs calibration data (--calibration)")
        energy = {}
        if self.importance != "magnitude" and context.calibration is not None:
            energy = input_energy(model, context)
        choice = _Choice(model.graph, classes, energy, width, self.floor, self.sparsity > 0)
        target = self.sparsity or self.flops or DEFAULT_FLOPS
        reached = choice.run(target, context)
        if reached < target:
            what = "weights" if self.sparsity else "multiply-adds"
            raise RecipeError(
                f"at most {reached:.3f} of the {what} can be removed with floor={self.floor} and round_to={width}, "
                f"got {target}; lower one of them"
            )
        return choice.removals()

    def _width(self, context: Context) -> int:
        return self.round_to or (context.target.machine.lanes if context.target is not None else DEFAULT_WIDTH)

    def _classes(self, model: ir.Model) -> list[ChannelClass]:
        """Classes that may be thinned; RecipeError with the most frequent reasons if there is none."""
        classes, refused = [], Counter[str]()
        for units in couple(model.graph, cut=True).classes:
            names = [str(use.node.name) for use in units.producers]
            if units.pinned:
                refused[units.pinned] += 1
            elif not units.consumers:
                refused["are read by no layer with a weight"] += 1
            elif any(fnmatch.fnmatchcase(n, glob) for glob in self.exclude for n in names):
                refused[f"are excluded by {'+'.join(self.exclude)}"] += 1
            elif self.include and not any(fnmatch.fnmatchcase(n, glob) for glob in self.include for n in names):
                refused[f"are not named by include={'+'.join(self.include)}"] += 1
            else:
                classes.append(units)
        if not classes:
            why = "; ".join(f"{count} {reason}" for reason, count in refused.most_common(3)) or "it has no weights"
            raise RecipeError(f"no class of channels may be removed: {why}")
        return classes


# ---- what a network costs


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


class _Choice:
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


# ---- dead channels


def _dead(classes: Sequence[ChannelClass], width: int, known: Mapping[ir.Value, Channels]) -> list[Removal]:
    """Units that no column needs, as many as leave multiples of `width`."""
    removals = []
    for units in classes:
        spare = np.ones(units.size, bool)
        for use in units.consumers:
            spare &= _spare_columns(use, known)[use.member.positions].all(axis=1)
        stay = max(width, -(-(units.size - int(spare.sum())) // width) * width)
        if units.size > stay:
            removed = np.zeros(units.size, bool)
            removed[np.flatnonzero(spare)[::-1][: units.size - stay]] = True
            removals.append((units, removed))
    return removals


def _fold(graph: ir.Graph, removals: Sequence[Removal]) -> None:
    """Put what constant units contribute into the biases of their readers, and zero the columns that read them."""
    known = constant_channels(graph)
    for units, removed in removals:
        for use in units.consumers:
            _fold_columns(graph, use, known, use.member.positions[removed].ravel())
    for units, removed in removals:
        for use in units.consumers:
            zero(use.member.value, use.member.axis.axis, use.member.positions[removed].ravel())


def _columns(use: WeightAxis) -> np.ndarray | None:
    """The weight as [columns, others...]; None if it is not constant."""
    array = constant(use.node.inputs[use.index])
    return None if array is None else np.moveaxis(array, use.member.axis.axis, 0)


def _inputs(use: WeightAxis, known: Mapping[ir.Value, Channels]) -> np.ndarray | None:
    """Known constants of what the columns multiply, [groups, columns], NaN where unknown."""
    node = use.node
    x = node.inputs[1 - use.index] if node.op_type == "MatMul" else node.inputs[0]
    found = known.get(x) if x is not None else None
    if x is None or found is None:
        return None
    rank = len(static_shape(x) or ())
    axis = {"Conv": 1, "ConvTranspose": 1, "Gemm": 0 if node.attributes.get_int("transA", 0) else 1}.get(
        node.op_type, rank - 2 if use.index == 0 else rank - 1
    )
    if found.axis != axis or node.op_type not in WEIGHT_OPS:
        return None
    return found.values.reshape(node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1, -1)


def _spare_columns(use: WeightAxis, known: Mapping[ir.Value, Channels]) -> np.ndarray:
    """Columns that may go: zero, or multiplied with a constant that is zero or that the bias can take, [columns]."""
    columns = _columns(use)
    spare = np.zeros(use.member.axis.size, bool)
    if columns is not None:
        spare |= (columns.reshape(len(columns), -1) == 0).all(axis=1)
    inputs = _inputs(use, known)
    if inputs is not None:
        fine = inputs == 0
        if _takes_bias(use) and columns is not None:
            fine |= ~np.isnan(inputs)
        spare |= fine.all(axis=0)
    return spare


def _takes_bias(use: WeightAxis) -> bool:
    node = use.node
    if node.op_type not in ("Conv", "Gemm") or (node.op_type == "Conv" and is_padded(node)):
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    rows = (static_shape(node.outputs[0]) or (0, 0))[1]
    given = constant(bias)
    return bias is None or (given is not None and given.size == rows)


def _fold_columns(graph: ir.Graph, use: WeightAxis, known: Mapping[ir.Value, Channels], positions: np.ndarray) -> None:
    """Add what the removed columns contribute to the layer's bias."""
    columns, inputs = _columns(use), _inputs(use, known)
    if columns is None or inputs is None:
        return
    node = use.node
    nonzero = (columns[positions].reshape(positions.size, -1) != 0).any(axis=1)
    positions = positions[nonzero]
    if not positions.size or not np.nan_to_num(inputs[:, positions]).any():
        return
    taps = columns[positions].astype(np.float64)  # [p, OC, taps...], as axis 0 was taken out of [OC, IC, ...] or [K, N]
    taps = taps.reshape(*taps.shape[:2], -1).sum(axis=2)
    rows = taps.shape[1]
    values = np.repeat(inputs[:, positions], rows // len(inputs), axis=0)  # [OC, p]
    extra = (values * taps.T).sum(axis=1)
    if node.op_type == "Gemm":
        extra = extra * node.attributes.get_float("alpha", 1.0) / (node.attributes.get_float("beta", 1.0) or 1.0)
    old = node.inputs[2] if len(node.inputs) > 2 else None
    dtype = node.inputs[use.index].dtype
    assert dtype is not None
    given = constant(old)
    new = extra if given is None else given.astype(np.float64).reshape(-1) + extra
    bias = add_initializer(graph, f"{node.name}_bias", new.astype(dtype.numpy()), dtype)
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, bias)
