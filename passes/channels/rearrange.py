"""Permute channels through the whole network so that blocks or N:M groups keep more.

For each class of channels that may move (`sparsec.passes.channels.coupling`) and a permutation P: every layer that produces the
class gets rows P W, P b and P of its per-channel parameters, every layer that reads it gets columns W P^T, depthwise
weights between them move along. Each layer computes the same numbers in another order, so the network's function is
unchanged up to the order of sums.

The objective is what masks will keep: with scores s of the weights (w^2; with calibration w^2 E[x^2]), the sum of s over
the blocks that stay at `sparsity`, over all matched layers that the class touches. For blocks of R output channels only
the order of rows matters, for blocks along the input and N:M only that of columns; the search is `arrange`. A model that
is pruned already (more than a fifth of the matched weights zero) is rearranged for the fewest stored blocks instead (for
N:M: the fewest nonzeros that N:M would cut). A class keeps its order unless it gains `MIN_GAIN` of its layers' sum, so
what is rearranged once mostly stays.

Whole-network permutation for blocks: SparseByteNN, arXiv:2310.19509; for N:M: Pool and Yu, NeurIPS 2021.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from sparsec.errors import RecipeError
from sparsec.passes.channels.arrange import Part, arrange
from sparsec.passes.channels.coupling import ChannelClass, WeightAxis, couple, permute
from sparsec.passes.layers import WEIGHTED, WeightedLayer, block_sums, select_layers
from sparsec.passes.measure.statistics import gather
from sparsec.passes.pruning.importance import activation_scores
from sparsec.passes.pruning.masks import Pattern, magnitude
from sparsec.rewriting.passes_api import Context, Pass, PassResult

PRUNED = 0.2  # share of zeros from which a model counts as pruned already
MIN_GAIN = 1e-3


@dataclass(frozen=True)
class Rearrange(Pass):
    """Permute channels through the whole network so that blocks or N:M keep more; the function stays.

    `block`, `nm`, `sparsity`, `include`, `exclude`, `types`: what `prune` will be asked for. `importance`: magnitude or
    activation (needs calibration data); empty: activation if there is data. `objective`: kept (importance), stored
    (fewest blocks of a pruned model), or auto by the share of zeros.
    """

    name: ClassVar[str] = "rearrange"
    exact: ClassVar[bool] = True

    block: str = "4x1"
    nm: str = ""
    sparsity: float = 0.5
    importance: Literal["", "magnitude", "activation"] = ""
    objective: Literal["auto", "kept", "stored"] = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    types: tuple[str, ...] = WEIGHTED

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise RecipeError(f"rearrange: sparsity is a share between 0 and 1, got {self.sparsity}")
        if self.importance not in ("", "magnitude", "activation"):
            raise RecipeError(f"rearrange: importance must be magnitude or activation, got {self.importance!r}")
        if self.objective not in ("auto", "kept", "stored"):
            raise RecipeError(f"rearrange: objective must be auto, kept or stored, got {self.objective!r}")
        try:
            pattern = self.pattern
        except RecipeError as error:
            raise RecipeError(error.message.replace("prune:", "rearrange:")) from None
        if pattern.rows * pattern.columns == 1 and not pattern.keep:
            raise RecipeError("rearrange: without a block (block=4x1) or nm=N:M no order is better than another")
        unknown = [t for t in self.types if t not in WEIGHTED]
        if unknown or not self.types:
            raise RecipeError(f"rearrange: types must be some of {'+'.join(WEIGHTED)}, got {'+'.join(self.types)!r}")

    @property
    def pattern(self) -> Pattern:
        """What masks will look like."""
        return Pattern.parse("1x1" if self.nm else self.block, self.nm)

    def call(self, model: ir.Model) -> PassResult:
        selection = select_layers(model, self.include, self.exclude, self.types)
        selection.require()
        context = Context.of(model)
        layers = selection.layers
        weights = [layer.read() for layer in layers]
        zeros = 1 - sum(int(np.count_nonzero(w)) for w in weights) / sum(w.size for w in weights)
        stored = self.objective == "stored" or (self.objective == "auto" and zeros > PRUNED)
        scores = [(w != 0).astype(np.float32) for w in weights] if stored else self._scores(model, layers, context)
        state = _State(self.pattern, self.sparsity, stored, layers, scores)
        coupling = couple(model.graph)
        chosen = [c for c in coupling.free if state.uses(c)]
        if not chosen:
            reasons = Counter(c.pinned for c in coupling.classes if c.pinned).most_common(3)
            why = "; ".join(reason for reason, _ in reasons) or "no class of channels reaches a matched layer"
            raise RecipeError(f"no channels that may move belong to a matched layer: {why}")
        before = state.total(range(len(layers)))
        modified = False
        pattern = self.pattern
        for sweep in range(2 if min(pattern.rows, pattern.columns) > 1 else 1):
            orders = []
            for index, units in enumerate(chosen):
                context.tell(f"rearrange {units.name}", index + sweep * len(chosen), len(chosen) * (sweep + 1))
                found = state.improve(units)
                if found is not None:
                    orders.append((units, found))
            modified |= permute(model.graph, orders)
        worth = sum(float(s.sum(dtype=np.float64)) for s in scores)
        after = state.total(range(len(layers)))
        record = {"classes": len(chosen), "objective": "stored" if stored else "kept", "pattern": str(pattern)}
        shares = {"before": round(before / worth, 6), "after": round(after / worth, 6)} if worth else {}
        context.records.append({**record, **shares})
        return PassResult(model, modified)

    def _scores(self, model: ir.Model, layers: Sequence[WeightedLayer], context: Context) -> list[np.ndarray]:
        if self.importance == "activation" and context.calibration is None:
            raise RecipeError("rearrange: importance=activation needs calibration data (--calibration)")
        if self.importance == "magnitude" or context.calibration is None:
            return [magnitude(layer.read()).astype(np.float32) for layer in layers]
        made = []
        for layer, statistics in gather(model, layers, context.calibration):
            score = activation_scores(layer.read(), statistics.gram)
            # Outputs of different layers have different units: each layer counts by its weight count.
            mean = float(score.mean())
            made.append((score / mean if mean > 0 else score).astype(np.float32))
        return made


@dataclass
class _State:
    """Scores [OC, IC, KH, KW] of the matched layers in the order found so far."""

    pattern: Pattern
    sparsity: float
    stored: bool
    layers: Sequence[WeightedLayer] = field(repr=False)
    scores: list[np.ndarray] = field(repr=False)

    def __post_init__(self) -> None:
        self._index = {layer.weight: i for i, layer in enumerate(self.layers)}

    def _axes(self, units: ChannelClass, both: bool) -> Iterable[tuple[int, int, WeightAxis]]:
        """(layer, canonical axis, use) of the class, a shared weight once; `both`: also axes of no importance."""
        seen = set()
        for axis, uses in ((0, units.producers), (1, units.consumers)):
            for use in uses:
                index = self._index.get(use.member.value)
                if index is not None and (both or self._group(axis) > 1) and (index, axis) not in seen:
                    seen.add((index, axis))
                    yield index, axis, use

    def _group(self, axis: int) -> int:
        if axis == 0:
            return self.pattern.rows
        return self.pattern.group or self.pattern.columns

    def uses(self, units: ChannelClass) -> bool:
        """Whether the order of the class matters to a matched layer."""
        return units.size > 1 and any(True for _ in self._axes(units, both=False))

    def total(self, indices: Iterable[int], scores: Sequence[np.ndarray] | None = None) -> float:
        """The objective over these layers: kept scores, minus stored blocks (counted in weights)."""
        return sum(self._value((self.scores if scores is None else scores)[i]) for i in indices)

    def _value(self, score: np.ndarray) -> float:
        pattern = self.pattern
        if pattern.keep:
            kept = np.add.reduceat(_ranked(score, pattern.group)[:, :, : pattern.keep], [0], axis=2)
            return float(kept.sum(dtype=np.float64))
        sums = block_sums(score, pattern.rows, pattern.columns).reshape(-1)
        if self.stored:
            return -float(np.count_nonzero(sums)) * pattern.rows * pattern.columns
        keep = self._keep(sums.size)
        return float(np.partition(sums, sums.size - keep)[sums.size - keep :].sum(dtype=np.float64)) if keep else 0.0

    def _keep(self, blocks: int) -> int:
        return round(blocks * (1 - self.sparsity))

    def improve(self, units: ChannelClass) -> np.ndarray | None:
        """The better order of the class, applied to the scores; None if there is none."""
        group = max(self._group(axis) for _, axis, _ in self._axes(units, both=False))
        slots = self._slots(units, group)
        if slots is None:
            return None
        parts = self._parts(units, slots)
        table = arrange(parts, group, self.pattern.keep)
        order = np.arange(units.size)
        order[slots.reshape(-1)] = slots.reshape(-1)[table.reshape(-1)]
        touched = sorted({index for index, _, _ in self._axes(units, both=True)})
        moved = list(self.scores)
        for index, axis, use in self._axes(units, both=True):
            at = np.arange(moved[index].shape[axis])
            at[use.member.positions] = use.member.positions[order]
            moved[index] = np.take(moved[index], at, axis=axis)
        old, new = self.total(touched), self.total(touched, moved)
        if new - old <= MIN_GAIN * abs(old):
            return None
        self.scores[:] = moved
        return order

    def _slots(self, units: ChannelClass, group: int) -> np.ndarray | None:
        """Units [groups, group] that stand in one block of the layer with most weights."""
        heavy = max(self._axes(units, both=False), key=lambda found: self.layers[found[0]].size)
        positions = heavy[2].member.positions[:, 0]
        order = np.argsort(positions)
        block = positions[order] // group
        starts = np.flatnonzero(np.r_[True, np.diff(block) != 0])
        full = starts[np.diff(np.r_[starts, block.size]) == group]
        return order[full[:, None] + np.arange(group)] if full.size > 1 else None

    def _parts(self, units: ChannelClass, slots: np.ndarray) -> list[Part]:
        """Features of every layer and copy whose blocks are the groups of `slots`; one at least."""
        parts = []
        group = slots.shape[1]
        flat = slots.reshape(-1)
        for index, axis, use in self._axes(units, both=False):
            score = np.moveaxis(self.scores[index], axis, 0)
            across = self._group(1 - axis) if not self.pattern.keep else 1
            score = np.add.reduceat(score, np.arange(0, score.shape[1], across), axis=1) if across > 1 else score
            score = score.reshape(len(score), -1)
            for positions in use.member.positions.T:
                blocks = positions[slots] // group
                if not (blocks == blocks[:, :1]).all() or len(np.unique(blocks[:, 0])) != len(blocks):
                    continue  # its blocks hold other sets of units: not searched for, but counted before it is accepted
                mine = positions[flat]
                rest = np.delete(score, mine, axis=0)
                others = np.zeros(0, np.float32)
                if len(rest):
                    others = np.add.reduceat(rest, np.arange(0, len(rest), group), axis=0).reshape(-1)
                features = np.ascontiguousarray(score[mine])
                if self.stored and not self.pattern.keep:
                    parts.append(Part(np.minimum(features, 1), threshold=1.0))
                else:
                    blocks_of_layer = features.size // group + len(others)
                    parts.append(Part(features, np.asarray(others, np.float32), self._keep(blocks_of_layer)))
        return parts


def _ranked(score: np.ndarray, group: int) -> np.ndarray:
    """Scores of every group of input channels in descending order, [OC, groups, group, KH, KW]; short ones padded by 0."""
    oc, ic, kh, kw = score.shape
    padded = np.zeros((oc, -(-ic // group) * group, kh, kw), score.dtype)
    padded[:, :ic] = score
    return -np.sort(-padded.reshape(oc, -1, group, kh, kw), axis=2)
