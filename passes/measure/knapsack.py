"""Choose one level of each layer: the least sum of damages under a budget of cost.

    min over k  sum_l d_l(k_l)   subject to   sum_l c_l(k_l) <= B

Damages are taken for additive. Solved by dynamic programming over the nondominated pairs (cost, damage) of the first l
layers. Where there are more than STATES of them, the best of each of STATES equal intervals of cost and of damage stay,
with their true costs: the budget is held exactly, the damage is within that rounding of optimal.

Nemhauser and Ullmann 1969, "Discrete dynamic programming and capital allocation".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparsec.errors import RecipeError

STATES = 20_000
SLACK = 1e-9  # of the budget: what summing floats in another order may add


@dataclass(frozen=True)
class Level:
    """One way to prune a layer. `zeros`: weights that are zero; `cost`: in the budget's unit; `damage`: see sensitivity."""

    sparsity: float
    zeros: int
    cost: float
    damage: float = 0.0


@dataclass(frozen=True)
class Point:
    """What a choice of one level a layer costs and damages, all layers together."""

    cost: float
    damage: float


def knapsack(levels: Mapping[str, Sequence[Level]], budget: float) -> dict[str, Level]:
    """One level of each layer with the least sum of damages among those whose costs add up to at most `budget`.

    On equal damage the cheaper. RecipeError if the cheapest levels together cost more.
    """
    names = list(levels)
    _require_levels(levels)
    cheapest = [min(v.cost for v in levels[name]) for name in names]
    if sum(cheapest) > budget * (1 + SLACK) + SLACK:
        text = f"the budget of {budget:.6g} cannot be held: the sparsest levels together cost {sum(cheapest):.6g}"
        raise RecipeError(f"{text}; allow higher levels or ask for less")
    steps = _frontier([levels[name] for name in names], budget)
    chosen: dict[str, Level] = {}
    state = len(steps[-1].cost) - 1  # the last is the least damage
    for name, step in zip(reversed(names), reversed(steps), strict=True):
        chosen[name] = levels[name][int(step.level[state])]
        state = int(step.parent[state])
    return {name: chosen[name] for name in names}


def frontier(levels: Mapping[str, Sequence[Level]]) -> list[Point]:
    """Every nondominated pair of total cost and total damage, cost ascending (at most STATES)."""
    _require_levels(levels)
    last = _frontier(list(levels.values()), float("inf"))[-1]
    return [Point(float(c), float(d)) for c, d in zip(last.cost, last.damage, strict=True)]


def _require_levels(levels: Mapping[str, Sequence[Level]]) -> None:
    if not levels:
        raise RecipeError("there is no layer to divide the budget among")
    for name, ways in levels.items():
        if not ways:
            raise RecipeError("has no level to choose from", name)


@dataclass(frozen=True)
class _Step:
    """Nondominated states after some layers, cost ascending and damage falling, with the choice that led there."""

    cost: np.ndarray
    damage: np.ndarray
    level: np.ndarray
    parent: np.ndarray


def _frontier(layers: Sequence[Sequence[Level]], budget: float) -> list[_Step]:
    least = np.array([min(v.cost for v in ways) for ways in layers])
    rest = np.concatenate([np.cumsum(least[::-1])[::-1][1:], [0.0]])  # cheapest cost of the layers behind each
    cost, damage = np.zeros(1), np.zeros(1)
    steps = []
    for ways, behind in zip(layers, rest, strict=True):
        costs = (cost[:, None] + np.array([v.cost for v in ways])).reshape(-1)
        damages = (damage[:, None] + np.array([v.damage for v in ways])).reshape(-1)
        index = np.flatnonzero(costs + behind <= budget * (1 + SLACK) + SLACK)
        index = index[np.lexsort((damages[index], costs[index]))]
        best = np.minimum.accumulate(np.concatenate(([np.inf], damages[index])))
        index = _thin(costs, damages, index[damages[index] < best[:-1]])
        cost, damage = costs[index], damages[index]
        steps.append(_Step(cost, damage, index % len(ways), index // len(ways)))
    return steps


def _thin(costs: np.ndarray, damages: np.ndarray, index: np.ndarray) -> np.ndarray:
    """At most about STATES of the states `index`: of each interval of cost the last, which has the least damage there,
    and of each interval of damage the first, which is the cheapest there; always both ends."""
    if len(index) <= STATES:
        return index
    keep = np.zeros(len(index), bool)
    keep[[0, -1]] = True
    for values in (costs[index], damages[index]):
        span = abs(float(values[-1] - values[0])) or 1.0
        cell = np.floor(np.abs(values - values[0]) / span * (STATES / 2)).astype(np.int64)
        changes = np.flatnonzero(np.diff(cell))
        keep[changes if values[0] < values[-1] else changes + 1] = True
    return index[keep]
