from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.errors import RecipeError
from sparsec.passes.measure.journal import Journal
from sparsec.passes.measure.knapsack import Level
from sparsec.passes.measure.trial import Trials
from sparsec.passes.pruning.allocate import RULES, Seen, allocate, nondominated, positions, random_rates, scale_rates
from sparsec.passes.pruning.search import Space, evolve, random_search
from tests.passes.allocation import NAMES, by_magnitude, chosen, data, network

LEVELS = (0.25, 0.5, 0.75, 0.9)


def run(rule: str, sparsity: float = 0.4, **options):
    made = network()
    options = {"levels": LEVELS, "generations": 2, **options}
    return allocate(made, chosen(made), rule, sparsity, by_magnitude, data(), **options)


def removed(sparsities: dict[str, float], unit: str = "weights") -> float:
    """The share of weights or multiply-adds that are gone."""
    worth = {v.name: v.size * (positions(v) if unit == "flops" else 1) for v in chosen(network())}
    return sum(sparsities[n] * worth[n] for n in worth) / sum(worth.values())


# ---- rules


def test_positions_are_pixels_or_rows() -> None:
    assert [positions(layer) for layer in chosen(network())] == [36, 36, 36, 1]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("unit", ["weights", "flops"])
@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.7])
def test_the_budget_is_held_and_used(rule: str, unit: str, sparsity: float) -> None:
    found = run(rule, sparsity, unit=unit)
    assert tuple(found.sparsities) == NAMES
    assert all(0 <= s <= 1 for s in found.sparsities.values())
    assert removed(found.sparsities, unit) == pytest.approx(sparsity, abs=0.003)  # weights are whole numbers
    json.dumps(found.record())


def test_uniform_and_erk_follow_their_formulas() -> None:
    assert run("uniform", 0.3).sparsities == pytest.approx(dict.fromkeys(NAMES, 0.3))
    layers = chosen(network())
    densities = [1 - s for s in run("erk", 0.5).sparsities.values()]
    rates = [sum(layer.shape) / np.prod(layer.shape) for layer in layers]
    below = [i for i, d in enumerate(densities) if d < 1]
    assert below
    ratios = [densities[i] / rates[i] for i in below]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    assert all(rates[i] * ratios[0] >= 1 - 1e-9 for i in range(len(layers)) if i not in below)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 5), st.floats(1, 1000)), min_size=1, max_size=8), st.floats(0, 1))
def test_rates_are_scaled_to_the_budget(layers, share: float) -> None:
    rates, costs = np.array([r for r, _ in layers]), np.array([c for _, c in layers])
    budget = share * costs.sum()
    found = scale_rates(rates, lambda s: float(((1 - s) * costs).sum()), budget)
    assert ((1 - found) * costs).sum() == pytest.approx(budget, rel=1e-6, abs=1e-6)


def test_random_is_the_seed_s() -> None:
    np.testing.assert_array_equal(random_rates(4, 3), random_rates(4, 3))
    assert run("random", seed=1).sparsities == run("random", seed=1).sparsities
    assert run("random", seed=1).sparsities != run("random", seed=2).sparsities


def test_measured_rules_do_less_damage_than_uniform_and_search_the_least() -> None:
    made = network()
    trials = Trials(made, chosen(made), by_magnitude, data())
    damages = {rule: float(trials.damages(run(rule, 0.4, generations=8).sparsities).mean()) for rule in RULES}
    assert damages["sensitivity"] < damages["uniform"]
    assert damages["search"] <= damages["sensitivity"]
    assert damages["search"] < damages["random"]


def test_record_says_what_was_measured_and_the_front() -> None:
    record = run("search", 0.4).record()
    assert record["allocation"] == "search"
    assert record["measure"] == "y: KL of the softmax, 5 classes; side: relative squared error"
    assert record["samples"] == 10
    assert record["chosen"]["share"] == 0.4
    shares = [point["share"] for point in record["front"]]
    assert shares == sorted(shares)
    damages = [point["damage"] for point in record["front"]]
    assert damages == sorted(damages)
    assert all(0 <= point["changed"] <= 1 for point in record["front"])


def test_front_keeps_what_no_point_dominates() -> None:
    points = [Seen(0.1, damage=0.2), Seen(0.2, damage=0.1), Seen(0.3, damage=0.5), Seen(0.3, damage=0.4)]
    assert nondominated(points) == (points[1], points[3])


def test_latency_needs_a_price_and_holds_it() -> None:
    with pytest.raises(RecipeError, match="needs a target"):
        run("uniform", unit="latency")

    def price(layer, weight: np.ndarray) -> float:  # no gain before half of the weights are gone
        density = np.count_nonzero(weight) / weight.size
        return layer.size * min(1.0, 2 * density)

    layers = {v.name: v for v in chosen(network())}
    full = sum(layer.size for layer in layers.values())
    for rule in ("uniform", "erk", "sensitivity", "search"):
        found = run(rule, 0.4, unit="latency", price=price)
        cost = sum(price(layers[n], by_magnitude(layers[n], s)) for n, s in found.sparsities.items())
        assert cost <= 0.6 * full * 1.01
    assert all(s == 0 or s > 0.5 for s in found.sparsities.values())  # nothing is given for nothing


def test_refusals() -> None:
    with pytest.raises(RecipeError, match="allocation must be one of uniform, erk"):
        run("even")
    with pytest.raises(RecipeError, match="a budget is of weights, flops, latency"):
        run("uniform", unit="bytes")
    with pytest.raises(RecipeError, match="cannot be held"):
        run("sensitivity", 0.95)
    made = network()
    with pytest.raises(RecipeError, match="measures damage and needs --calibration"):
        allocate(made, chosen(made), "search", 0.5, by_magnitude)


# ---- search


COSTS = st.lists(st.lists(st.floats(1, 100), min_size=1, max_size=6), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(COSTS, st.floats(0, 1), st.integers(0, 1000))
def test_every_child_and_every_draw_holds_the_budget(costs, where: float, seed: int) -> None:
    levels = {
        f"l{i}": [Level(k / 10, k, c) for k, c in enumerate(sorted(ways, reverse=True))] for i, ways in enumerate(costs)
    }
    low, high = sum(min(w) for w in costs), sum(max(w) for w in costs)
    space = Space(levels, low + where * (high - low))
    rng = np.random.default_rng(seed)
    genes = space.draw(rng)
    for _ in range(10):
        assert space.cost(genes) <= space.budget * (1 + 1e-8) + 1e-8
        assert all(0 <= g < len(w) for g, w in zip(genes, costs, strict=True))
        genes = space.mutate(rng, genes)


def setup(seed: int = 0):
    made = network(seed)
    layers = chosen(made)
    trials = Trials(made, layers, by_magnitude, data())
    levels = {
        v.name: [Level(s, round(s * v.size), v.size - round(s * v.size)) for s in (0.0, 0.15, 0.3, 0.5, 0.7, 0.85)]
        for v in layers
    }
    return trials, levels, 0.6 * sum(v.size for v in layers)


def test_evolution_finds_the_best_of_all_allocations_that_use_the_budget() -> None:
    trials, levels, budget = setup()

    def cost(ways) -> float:
        return sum(v.cost for v in ways)

    def full(ways) -> bool:
        """No layer can be one level denser."""
        pairs = [(v, layer[layer.index(v) - 1]) for v, layer in zip(ways, levels.values(), strict=True) if v.sparsity]
        return all(cost(ways) - v.cost + denser.cost > budget for v, denser in pairs)

    fitting = [ways for ways in itertools.product(*levels.values()) if cost(ways) <= budget and full(ways)]
    assert len(fitting) > 10
    named = [dict(zip(levels, ways, strict=True)) for ways in fitting]
    damages = trials.damages_of([{n: v.sparsity for n, v in ways.items()} for ways in named], range(10))
    found = evolve(trials, levels, budget, named[int(np.argmax(damages))], generations=12)
    assert found.damage == pytest.approx(min(damages), rel=1e-6)
    assert cost(found.levels.values()) <= budget


@pytest.mark.parametrize("search", ["evolve", "random_search"])
def test_a_search_that_was_stopped_ends_as_one_that_was_not(search: str, tmp_path) -> None:
    trials, levels, budget = setup()
    start = {name: ways[-1] for name, ways in levels.items()}

    def go(generations: int, journal: Journal | None = None, tell=None):
        if search == "evolve":
            return evolve(trials, levels, budget, start, generations, 3, journal, tell)
        return random_search(trials, levels, budget, generations, 3, journal, tell)

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    path = tmp_path / "state.json"
    with pytest.raises(KeyboardInterrupt):
        go(5, Journal(path, "k"), stop)
    said: list[int] = []
    found = go(5, Journal(path, "k"), lambda what, done, total: said.append(done))
    assert said == [2, 3, 4]
    assert found == go(5)
    assert go(5, Journal(path, "k")) == found
