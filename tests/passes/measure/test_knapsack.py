from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.errors import RecipeError
from sparsec.passes.measure import knapsack as module
from sparsec.passes.measure.knapsack import Level, frontier, knapsack

NUMBERS = st.one_of(st.integers(0, 20).map(float), st.floats(0, 50, allow_subnormal=False))
LAYERS = st.lists(
    st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=4), min_size=1, max_size=5
)  # (cost, damage) of the levels of each layer


def levels_of(layers: list[list[tuple[float, float]]]) -> dict[str, list[Level]]:
    return {
        f"layer{i}": [Level(k / 10, k, cost, damage) for k, (cost, damage) in enumerate(ways)]
        for i, ways in enumerate(layers)
    }


def every_choice(layers: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    return [(sum(c for c, _ in ways), sum(d for _, d in ways)) for ways in itertools.product(*layers)]


@settings(max_examples=200, deadline=None)
@given(LAYERS, st.floats(0, 1))
def test_is_the_best_of_all_choices(layers, where: float) -> None:
    costs = [cost for cost, _ in every_choice(layers)]
    budget = min(costs) + where * (max(costs) - min(costs))
    found = knapsack(levels_of(layers), budget)
    assert list(found) == list(levels_of(layers))
    assert all(level in levels_of(layers)[name] for name, level in found.items())
    assert sum(level.cost for level in found.values()) <= budget * (1 + 2e-9) + 2e-9
    best = min(damage for cost, damage in every_choice(layers) if cost <= budget * (1 + 1e-10))
    assert sum(level.damage for level in found.values()) <= best + 1e-9


@settings(max_examples=100, deadline=None)
@given(LAYERS)
def test_frontier_is_what_no_choice_dominates(layers) -> None:
    points = [(p.cost, p.damage) for p in frontier(levels_of(layers))]
    assert points == sorted(points)
    assert all(a[1] > b[1] for a, b in itertools.pairwise(points))
    for cost, damage in every_choice(layers):
        assert any(c <= cost + 1e-9 and d <= damage + 1e-9 for c, d in points)
    for c, d in points:
        assert any(abs(c - cost) < 1e-9 and abs(d - damage) < 1e-9 for cost, damage in every_choice(layers))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 0.9))
def test_with_few_states_the_budget_still_holds_and_little_is_lost(seed: int, share: float) -> None:
    import numpy as np

    rng = np.random.default_rng(seed)
    layers = [
        [(float(size * (1 - s)), float(rng.random() * s**2 * 10)) for s in np.arange(10) / 10]
        for size in rng.integers(10, 1000, 12)
    ]
    budget = share * sum(ways[0][0] for ways in layers)
    try:
        best = sum(level.damage for level in knapsack(levels_of(layers), budget).values())
    except RecipeError:
        assert sum(ways[-1][0] for ways in layers) > budget
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STATES", 400)
        found = knapsack(levels_of(layers), budget)
    assert sum(level.cost for level in found.values()) <= budget * (1 + 1e-8)
    assert best - 1e-9 <= sum(level.damage for level in found.values()) <= 1.25 * best + 1e-9


def test_of_equal_damage_the_cheaper() -> None:
    ways = [Level(0.0, 0, 10.0, 1.0), Level(0.5, 5, 5.0, 1.0), Level(0.9, 9, 1.0, 2.0)]
    assert knapsack({"a": ways}, 10.0) == {"a": ways[1]}


def test_refuses_what_cannot_be_held_and_nothing_to_divide() -> None:
    with pytest.raises(RecipeError, match=r"the budget of 4 cannot be held: the sparsest levels together cost 5"):
        knapsack({"a": [Level(0.0, 0, 5.0)]}, 4.0)
    with pytest.raises(RecipeError, match="no layer"):
        knapsack({}, 4.0)
    with pytest.raises(RecipeError, match="a: has no level"):
        knapsack({"a": []}, 4.0)
