"""Divide one budget among layers: how sparse each layer is to be, so that all together hold the budget.

Layer l at sparsity s costs c_l(s). Budgets are of what is left of the matched layers:

    weights   c_l(s) = (1 - s) * |W_l|                         nonzero weights
    flops     c_l(s) = (1 - s) * |W_l| * positions_l           multiply-adds; positions: output pixels or rows
    latency   c_l(s) = price(layer, pruned weight)             microseconds that the target's cost model predicts

B = (1 - sparsity) * sum c_l(0). Rules:

    uniform, erk, random   1 - s_l = min(1, e * r_l), e so large that sum c_l(s_l) = B, with r_l = 1,
                           (OC + IC + KH + KW) / (OC * IC * KH * KW)  (Erdos-Renyi-kernel),  exp(standard normal)
    sensitivity            the levels with the least sum of measured damages (`sparsec.passes.pruning.sensitivity`, `.knapsack`)
    search, random-search  the levels with the least damage of the whole model that were met (`sparsec.passes.pruning.search`)

`random` and `random-search` are what a cleverer rule has to beat. Measured rules look at the outputs on calibration data
only, never at labels. ERK: Evci et al. 2019, arXiv:1911.11134.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsec.errors import RecipeError
from sparsec.passes.layers import WeightedLayer
from sparsec.passes.measure.journal import Journal, digest
from sparsec.passes.measure.knapsack import SLACK, Level, frontier, knapsack
from sparsec.passes.measure.trial import PruneLayer, Trials, pick_samples, replacement
from sparsec.passes.pruning.search import GENERATIONS, evolve, random_search
from sparsec.passes.pruning.sensitivity import LEVELS, sensitivity

UNITS = ("weights", "flops", "latency")
RULES = ("uniform", "erk", "random", "sensitivity", "search", "random-search")
MEASURED = RULES[3:]  # need calibration data
CURVE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of the budget's unit removed, for the front

Price = Callable[[WeightedLayer, np.ndarray], float]  # microseconds of a layer with this weight [OC, IC, KH, KW]
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Seen:
    """A point that was looked at. `share`: of the unit removed; damages: summed over layers, measured on the model."""

    share: float
    predicted: float | None = None
    damage: float | None = None
    changed: float | None = None  # share of samples whose top class changed

    def json(self) -> dict[str, float]:
        """What is known, rounded."""
        return {key: float(f"{value:.6g}") for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Allocation:
    """The sparsity of each layer by name.

    share: of the unit to remove, as asked. chosen: what this allocation was measured to do; front: the nondominated of
    all points that were looked at, share ascending; measure: what a damage is. Empty for rules that measure nothing.
    """

    rule: str
    unit: str
    sparsities: dict[str, float]
    share: float
    measure: str = ""
    samples: int = 0
    chosen: Seen | None = None
    front: tuple[Seen, ...] = ()

    def record(self) -> dict[str, Any]:
        """The JSON for a pass's records."""
        facts: dict[str, Any] = {"allocation": self.rule, "budget": self.unit, "share": self.share}
        if self.chosen is not None:
            facts |= {"measure": self.measure, "samples": self.samples}
            facts |= {"chosen": self.chosen.json(), "front": [point.json() for point in self.front]}
        return facts


def allocate(
    model: ir.Model,
    layers: Sequence[WeightedLayer],
    rule: str,
    sparsity: float,
    prune_layer: PruneLayer,
    calibration: Any = None,
    *,
    unit: str = "weights",
    price: Price | None = None,
    levels: Sequence[float] = LEVELS,
    samples: int = 64,
    generations: int = GENERATIONS,
    pattern: str = "",
    state: str = "",
    seed: int = 0,
    tell: Tell | None = None,
) -> Allocation:
    """Sparsities with which `layers` together keep at most 1 - `sparsity` of their cost in `unit`. The model stays as it is.

    prune_layer(layer, sparsity): the pruned weight [OC, IC, KH, KW], alone or with other initializers that change with it
    (name -> array as stored). calibration: samples, for the rules in MEASURED; `samples` of them are used. price: for
    unit="latency". levels: sparsities that measured rules choose from.
    generations: of the searches. pattern: text that names what prune_layer does; a
    `state` file (JSON, what was measured) is refused if it is of another model, data or pattern. RecipeError: the budget
    cannot be held, or something needed is missing.
    """
    if rule not in RULES:
        raise RecipeError(f"allocation must be one of {', '.join(RULES)}, got {rule!r}")
    if unit not in UNITS:
        raise RecipeError(f"a budget is of {', '.join(UNITS)}, got {unit!r}")
    if rule in MEASURED and calibration is None:
        raise RecipeError(f"allocation={rule} measures damage and needs --calibration; or use uniform or erk")

    def cost(layer: WeightedLayer, weight: np.ndarray) -> float:
        return layer_cost(layer, weight, unit, price)

    full = sum(cost(layer, np.ones(layer.shape, layer.read().dtype)) for layer in layers)
    budget = (1 - sparsity) * full
    if rule not in MEASURED:
        sparsities = _by_rates(layers, rule, budget, unit, cost, prune_layer, levels, seed)
        return Allocation(rule, unit, sparsities, sparsity)

    picked = pick_samples(model, calibration, samples)
    journal = Journal(state, digest(model, picked, pattern)) if state else None
    found = sensitivity(model, layers, prune_layer, picked, levels, cost, unit, journal, tell)
    chosen = knapsack(found, budget)
    trials = Trials(model, layers, prune_layer, picked)
    points = _points(trials, found, full, sparsity, chosen)
    own = next(point for point in points if point.share == sparsity)
    if rule == "search":
        chosen = evolve(trials, found, budget, chosen, generations, seed, journal, tell).levels
    elif rule == "random-search":
        chosen = random_search(trials, found, budget, generations, seed, journal, tell).levels
    sparsities = {name: level.sparsity for name, level in chosen.items()}
    if rule != "sensitivity":
        own = Seen(sparsity, None, *trials.measured(sparsities))
    if unit != "latency":
        sparsities = _fill(found, sparsities, budget)
    front = nondominated([*points, own])
    return Allocation(rule, unit, sparsities, sparsity, trials.measure, len(picked), own, front)


# ---- what a layer costs


def positions(layer: WeightedLayer) -> int:
    """Outputs that each weight contributes to: pixels of a convolution, rows of a product."""
    shape = layer.node.outputs[0].shape
    if shape is None or not all(isinstance(d, int) for d in shape):
        raise RecipeError("its output shape is unknown, so its multiply-adds are too; load the model first", layer.name)
    return int(np.prod(shape.numpy(), dtype=np.int64)) // layer.shape[0]


def layer_cost(layer: WeightedLayer, weight: np.ndarray, unit: str, price: Price | None = None) -> float:
    """What `layer` costs in `unit` with the weight [OC, IC, KH, KW]. RecipeError: latency needs a target."""
    if unit == "latency":
        if price is None:
            raise RecipeError("a budget of latency needs a target to predict it for; compile, or use weights or flops")
        return price(layer, weight)
    nonzeros = float(np.count_nonzero(weight))
    return nonzeros * positions(layer) if unit == "flops" else nonzeros


# ---- rates


def erk_rates(layers: Sequence[WeightedLayer]) -> np.ndarray:
    """Density of each layer up to a common factor: (OC + IC + KH + KW) / (OC * IC * KH * KW)."""
    return np.array([sum(layer.shape) / layer.size for layer in layers])


def random_rates(count: int, seed: int) -> np.ndarray:
    """Densities up to a common factor, log-normal."""
    return np.exp(np.random.default_rng(seed).standard_normal(count))


def scale_rates(rates: np.ndarray, cost: Callable[[np.ndarray], float], budget: float) -> np.ndarray:
    """Sparsities 1 - min(1, e * rates) with the largest e for which `cost(sparsities)` <= `budget`.

    `cost` must not rise with sparsity. RecipeError if even zero densities cost more.
    """
    limit = budget * (1 + SLACK)
    if cost(np.zeros(len(rates))) <= limit:
        return np.zeros(len(rates))
    if cost(np.ones(len(rates))) > limit:
        raise RecipeError(f"the budget of {budget:.6g} cannot be held: the sparsest layers together cost more")
    low, high = 0.0, 1.0 / float(rates.min())
    for _ in range(100):
        middle = (low + high) / 2
        if cost(1 - np.minimum(1, middle * rates)) <= limit:
            low = middle
        else:
            high = middle
    return 1 - np.minimum(1, low * rates)


def _by_rates(
    layers: Sequence[WeightedLayer], rule: str, budget: float, unit: str, cost: Price, prune_layer: PruneLayer,
    levels: Sequence[float], seed: int,
) -> dict[str, float]:  # fmt: skip
    if rule == "erk":
        rates = erk_rates(layers)
    else:
        rates = random_rates(len(layers), seed) if rule == "random" else np.ones(len(layers))
    if unit == "latency":  # no formula: priced at the levels, straight lines between them
        curves = [_priced(layer, cost, prune_layer, levels) for layer in layers]
    else:
        curves = [_Curve((0.0, 1.0), (cost(layer, np.ones(layer.shape, bool)), 0.0)) for layer in layers]
    found = scale_rates(rates, lambda s: _sum(curves, s), budget)
    return {layer.name: float(s) for layer, s in zip(layers, found, strict=True)}


@dataclass(frozen=True)
class _Curve:
    """Cost by sparsity, straight lines between points; made to fall."""

    sparsities: Sequence[float]
    costs: Sequence[float]


def _sum(curves: Sequence[_Curve], sparsities: Sequence[float] | np.ndarray) -> float:
    pairs = zip(sparsities, curves, strict=True)
    return float(sum(np.interp(s, c.sparsities, np.minimum.accumulate(c.costs)) for s, c in pairs))


def _priced(layer: WeightedLayer, cost: Price, prune_layer: PruneLayer, levels: Sequence[float]) -> _Curve:
    grid = [0.0, *sorted(s for s in levels if s > 0)]
    weights = [layer.read(), *(replacement(layer, prune_layer(layer, s))[0] for s in grid[1:])]
    return _Curve(grid, [cost(layer, weight) for weight in weights])


# ---- measured rules


def _fill(found: Mapping[str, Sequence[Level]], sparsities: Mapping[str, float], budget: float) -> dict[str, float]:
    """What the steps of the levels left of the budget is given back: all sparsities times one factor of at most 1."""
    curves = [_Curve([v.sparsity for v in ways], [v.cost for v in ways]) for ways in found.values()]
    wanted = np.array([sparsities[name] for name in found])
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _sum(curves, middle * wanted) <= budget else (middle, high)
    return {name: float(high * s) for name, s in zip(found, wanted, strict=True)}


def _points(
    trials: Trials, found: Mapping[str, Sequence[Level]], full: float, share: float, chosen: Mapping[str, Level]
) -> list[Seen]:
    """Predicted and measured damage of the knapsack's choices at CURVE and at the share asked for."""
    least = frontier(found)[0].cost
    seen = []
    for point in sorted({*CURVE, share}):
        if point != share and (1 - point) * full < least:
            continue
        levels = chosen if point == share else knapsack(found, (1 - point) * full)
        damage, changed = trials.measured({name: level.sparsity for name, level in levels.items()})
        seen.append(Seen(point, sum(level.damage for level in levels.values()), damage, changed))
    return seen


def nondominated(points: Sequence[Seen]) -> tuple[Seen, ...]:
    """The points with less measured damage than every other that removes as much; share ascending."""
    kept: list[Seen] = []
    for point in sorted(points, key=lambda p: (-p.share, p.damage)):
        if not kept or point.damage < min(p.damage for p in kept):  # type: ignore[operator, type-var]
            kept.append(point)
    return tuple(reversed(kept))
