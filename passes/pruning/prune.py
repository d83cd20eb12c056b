"""Prune weights: unstructured, in RxC blocks, or N of M along the input axis.

Without calibration data the least important weights are those of least magnitude, and nothing else happens:

    score = w^2;   masks by `sparsec.passes.pruning.masks`;   W' = mask * W

With calibration data (activations only, no labels) each step has a better answer, and an option that goes back:

    importance   second order: the error that zeroing adds if the rest is re-optimized      `sparsec.passes.pruning.importance`
    allocation   each layer's share from the damage that pruning it does to the outputs     `sparsec.passes.pruning.allocate`
    refit        the weights left and all biases, against the original's outputs            `sparsec.passes.pruning.reconstruct`
    regrow       before a layer is refitted, swaps that lower its error                     `sparsec.passes.pruning.regrow`
    repair       the same for layers that are not pruned themselves

`sparsity` is the zero share over the matched layers together, whatever the allocation. A model that has so many zeros
in the pattern already is left as it is; where enough zeros were there before but scattered over the blocks, the pass
refuses. Never changed: shapes; without calibration data also biases and layers that do not match.

Magnitude pruning: Han et al. 2015, arXiv:1506.02626.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from sparsec.errors import RecipeError
from sparsec.passes.layers import WEIGHTED, WeightedLayer, block_sums, select_layers, spread_blocks
from sparsec.passes.pruning.allocate import MEASURED, allocate
from sparsec.passes.pruning.masks import Pattern, draw_masks, draw_masks_globally, draw_masks_in_turn, supports
from sparsec.passes.pruning.oneshot import OneShot
from sparsec.passes.pruning.reconstruct import RIDGE, reconstruct
from sparsec.rewriting.passes_api import Context, Pass, PassResult

DEFAULT_SPARSITY = 0.5
MANY = 1 << 27  # weights: more are pruned layer by layer where that gives the same
SCATTERED = 0.75  # zeros count as scattered if blocks of zeros are less than this part of the share asked for


@dataclass(frozen=True)
class Prune(Pass):
    """Zero the least important weights: unstructured, RxC blocks or N:M; with calibration data the rest makes up for it.

    `sparsity`: zero share over the matched layers together. `block`: output x input channels. `nm`: N:M
    instead of `sparsity` and `block`. `scope`: masks layer by layer, or by one order of all layers' scores, each layer
    keeping `floor` of its blocks. `include`, `exclude`: globs over node names. `types`: operators considered.
    `importance`, `allocation`: auto is second-order and sensitivity with calibration data, magnitude and uniform
    without. `budget`: what the allocation divides. `samples`: of the calibration data, for the allocation. `state`: a
    file that keeps what the allocation measured. `refit`: re-optimize what is left, each layer alone or the network in
    graph order, pulled to the original weights with strength `ridge`, making up for earlier layers' errors by the share
    `trust` (auto: chosen on held-out samples); `rescale`: give each channel the original's variance; `repair`: refit
    layers that are not pruned, too; `regrow`: swap pruned weights for others where that lowers the error of a layer.
    """

    name: ClassVar[str] = "prune"

    sparsity: float = DEFAULT_SPARSITY
    block: str = "1x1"
    nm: str = ""
    scope: Literal["layer", "global"] = "layer"
    floor: float = 0.05
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    types: tuple[str, ...] = WEIGHTED
    importance: Literal["auto", "magnitude", "activation", "second-order"] = "auto"
    allocation: Literal["auto", "uniform", "erk", "random", "sensitivity", "search", "random-search"] = "auto"
    budget: Literal["weights", "flops", "latency"] = "weights"
    samples: int = 64
    state: str = field(default="", metadata={"recorded": False})
    refit: Literal["network", "layer", "none"] = "network"
    repair: bool = True
    ridge: float = RIDGE
    trust: Literal["auto"] | float = "auto"
    rescale: bool = True
    regrow: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise RecipeError(f"prune: sparsity is a share from 0 to 1, got {self.sparsity}")
        if not 0 <= self.floor <= 1:
            raise RecipeError(f"prune: floor is a share from 0 to 1, got {self.floor}")
        if self.scope not in ("layer", "global"):
            raise RecipeError(f"prune: scope must be layer or global, got {self.scope!r}")
        if self.trust != "auto" and not 0 <= self.trust <= 1:
            raise RecipeError(f"prune: trust is auto or a share from 0 to 1, got {self.trust}")
        if self.samples < 1 or not self.ridge > 0:
            raise RecipeError(f"prune: samples and ridge are above 0, got {self.samples} and {self.ridge}")
        Pattern.parse(self.block, self.nm)
        if self.nm and (self.block != "1x1" or self.sparsity != DEFAULT_SPARSITY):
            raise RecipeError("prune: nm fixes the pattern and the share; give it without block and sparsity")
        if self.allocation not in ("auto", "uniform") and (self.nm or self.scope == "global"):
            fixed = "nm fixes every layer's share" if self.nm else "scope=global divides by scores"
            raise RecipeError(f"prune: {fixed}; leave out allocation={self.allocation}")
        unknown = [t for t in self.types if t not in WEIGHTED]
        if unknown or not self.types:
            raise RecipeError(f"prune: types must be some of {'+'.join(WEIGHTED)}, got {'+'.join(self.types)!r}")

    def call(self, model: ir.Model) -> PassResult:
        selection = select_layers(model, self.include, self.exclude, self.types)
        selection.require()
        layers, context = selection.layers, Context.of(model)
        pattern = Pattern.parse(self.block, self.nm)
        if context.calibration is not None and self._is_done(layers, pattern):
            return PassResult(model, False)
        importance = self.importance
        if importance == "auto":
            importance = "magnitude" if context.calibration is None else "second-order"
        if importance != "magnitude" and context.calibration is None:
            raise RecipeError(f"prune: importance={importance} looks at activations and needs --calibration")
        plain = self.scope == "layer" and self.allocation in ("auto", "uniform") and self.budget == "weights"
        if plain and importance == "magnitude" and context.calibration is None and sum(x.size for x in layers) > MANY:
            return PassResult(model, self._in_turn(layers, pattern, context))
        before = {layer.name: layer.read().copy() for layer in layers}
        alone = OneShot(model, layers, context.calibration, pattern, importance, self.refit != "none")
        shares = self._shares(model, layers, alone, context)
        refit = self.refit != "none" and context.calibration is not None
        weights = [supports(weight, refit) for weight in before.values()]
        scores = [alone.scores[layer.name] for layer in layers]
        if self.scope == "global" and not self.nm:
            masks = draw_masks_globally(weights, scores, pattern, self.sparsity, self.floor)
        else:
            masks = draw_masks(weights, scores, pattern, shares)
        if not self.nm:
            self._refuse_scattered(layers, masks, pattern)
        named = {layer.name: mask & support for layer, mask, support in zip(layers, masks, weights, strict=True)}
        errors: dict[str, float | None] = {}
        if refit and self.refit == "layer":
            alone.write(layers, named)
        elif refit and context.calibration is not None:
            del alone  # its moments
            trust = None if self.trust == "auto" else self.trust
            grow = pattern if self.regrow else None
            done = reconstruct(model, named, context.calibration, self.ridge, trust, self.rescale, self.repair, grow)
            errors = {refitted.layer.name: refitted.error for refitted in done}
        else:
            apply_masks(layers, named, context)
        modified = bool(set(errors) - set(named))
        for layer in layers:
            modified |= _record(layer, before[layer.name], errors.get(layer.name), context)
        return PassResult(model, modified)

    def _in_turn(self, layers: Sequence[WeightedLayer], pattern: Pattern, context: Context) -> bool:
        """The plainest case layer by layer, for weights that fill the memory: nothing is held but the result."""
        modified, total, zeros, filled = False, 0, 0, 0
        masks = draw_masks_in_turn((layer.read() for layer in layers), pattern, self.sparsity)
        for done, layer in enumerate(layers, 1):
            mask = next(masks)
            weight = layer.read()
            mask &= weight != 0
            total, zeros = total + weight.size, zeros + weight.size - int(np.count_nonzero(weight))
            left = int(np.count_nonzero(mask))
            changed = left < int(np.count_nonzero(weight))
            filled += 0 if modified or changed or pattern.keep else _filled(weight, pattern)
            if changed:
                layer.write(np.where(mask, weight, np.zeros((), weight.dtype)))
            context.tell(f"prune {layer.name}", done, len(layers))
            context.records.append(
                {"layer": layer.name, "weights": layer.size, "zeros": layer.size - left, "changed": changed}
            )
            modified |= changed
        if not modified and not pattern.keep:
            self._refuse_shares(zeros / total, filled / total)
        return modified

    def _shares(
        self, model: ir.Model, layers: Sequence[WeightedLayer], alone: OneShot, context: Context
    ) -> list[float] | float:
        """The sparsity of each layer."""
        rule: str = self.allocation
        if rule == "auto":
            measured = context.calibration is not None and not self.nm and self.scope == "layer"
            rule = "sensitivity" if measured and 0 < self.sparsity < 1 and len(layers) > 1 else "uniform"
        if rule == "uniform" and self.budget == "weights":
            return self.sparsity
        if rule in MEASURED and context.calibration is None:
            raise RecipeError(f"prune: allocation={rule} measures damage and needs --calibration")
        found = allocate(
            model, layers, rule, self.sparsity, alone.prune_layer, context.calibration, unit=self.budget,
            price=context.price, samples=self.samples, pattern=str(alone), state=self.state,
            tell=context.tell,
        )  # fmt: skip
        context.records.append(found.record())
        shares = [found.sparsities[layer.name] for layer in layers]
        return scaled(shares, [layer.size for layer in layers], self.sparsity) if self.budget == "weights" else shares

    def _is_done(self, layers: Sequence[WeightedLayer], pattern: Pattern) -> bool:
        """Whether the layers have the zeros asked for, in the pattern, up to half a block."""
        weights = [layer.read() for layer in layers]
        if pattern.keep:
            kept = draw_masks(weights, [np.abs(w) for w in weights], pattern, 0.0)
            return not any(np.any(w[~mask] != 0) for w, mask in zip(weights, kept, strict=True))
        filled = sum(_filled(w, pattern) for w in weights)
        half = max(pattern.rows * pattern.columns / 2, 0.5)
        return filled + half >= self.sparsity * sum(w.size for w in weights) and self.sparsity > 0

    def _refuse_scattered(self, layers: Sequence[WeightedLayer], masks: Sequence[np.ndarray], pattern: Pattern) -> None:
        """RecipeError if the zeros asked for exist already, but not in blocks: nothing would change, silently."""
        weights = [layer.read() for layer in layers]
        if any(np.any(w[~mask] != 0) for w, mask in zip(weights, masks, strict=True)):
            return
        total = sum(w.size for w in weights)
        zeros = sum(w.size - int(np.count_nonzero(w)) for w in weights) / total
        filled = sum(_filled(w, pattern) for w in weights)
        self._refuse_shares(zeros, filled / total)

    def _refuse_shares(self, zeros: float, filled: float) -> None:
        if zeros >= self.sparsity and filled < SCATTERED * self.sparsity:
            text = f"the matched layers are {zeros:.3f} zero already, but {self.block} blocks hold only"
            raise RecipeError(f"{text} {filled:.3f} of the weights; ask for a sparsity above {zeros:.3f}")


def scaled(shares: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
    """`shares` times one factor, each at most 1, so that sum(share * size) = sparsity * sum(size).

    >>> scaled([0.2, 0.4], [100, 100], 0.6)
    [0.4, 0.8]
    """
    result, free = list(shares), set(range(len(shares)))
    while free:
        open_ = sparsity * sum(sizes) - sum(sizes[i] for i in range(len(sizes)) if i not in free)
        now = sum(shares[i] * sizes[i] for i in free)
        factor = open_ / now if now > 0 else 0.0
        over = {i for i in free if factor * shares[i] > 1}
        for i in over or free:
            result[i] = 1.0 if over else factor * shares[i]
        if not over:
            break
        free -= over
    return result


def prune_to(
    model: ir.Model,
    layers: Sequence[WeightedLayer],
    sparsities: Mapping[str, float],
    pattern: Pattern,
    importance: str = "second-order",
    refit: bool = True,
    repair: bool = True,
    ridge: float = RIDGE,
    trust: float | None = None,
    rescale: bool = True,
    regrow: bool = False,
) -> None:
    """Prune `layers` in place, each to its sparsity by name, with the calibration data of the model's context."""
    context = Context.of(model)
    alone = OneShot(model, layers, context.calibration, pattern, importance, refit)
    masks = {layer.name: alone.mask(layer, sparsities[layer.name]) for layer in layers}
    if refit and context.calibration is not None:
        grow = pattern if regrow else None
        for _ in reconstruct(model, masks, context.calibration, ridge, trust, rescale, repair, grow):
            pass
    else:
        apply_masks(layers, masks, context)


def apply_masks(layers: Sequence[WeightedLayer], masks: Mapping[str, np.ndarray], context: Context) -> None:
    """W' = mask * W; layers without anything to zero are not written."""
    for done, layer in enumerate(layers, 1):
        weight, mask = layer.read(), masks[layer.name]
        if np.any(weight[~mask] != 0):
            layer.write(np.where(mask, weight, np.zeros((), weight.dtype)))
        context.tell(f"prune {layer.name}", done, len(layers))


def _filled(weight: np.ndarray, pattern: Pattern) -> int:
    """Weights in blocks that hold zeros only."""
    dead = block_sums((weight != 0).astype(np.int64), pattern.rows, pattern.columns) == 0
    return int(spread_blocks(dead, pattern.rows, pattern.columns, weight.shape).sum())


def _record(layer: WeightedLayer, before: np.ndarray, error: float | None, context: Context) -> bool:
    after = layer.read()
    changed = not np.array_equal(before, after)
    zeros = layer.size - int(np.count_nonzero(after))
    record = {"layer": layer.name, "weights": layer.size, "zeros": zeros, "changed": changed}
    if error is not None:
        record["error"] = float(f"{error:.4g}")  # of the layer's output, after refitting
    context.records.append(record)
    return changed
