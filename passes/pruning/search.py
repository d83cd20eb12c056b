"""Search for the levels of all layers that do the least damage to the whole model under a budget.

Damages of single layers add up only while they are small; here the fitness is the damage D of the model with all layers
pruned (KL to the original for classifiers). Evolution, one parent g, g_l the level of layer l:

    mutate   1 to 3 level switches: a random layer one level denser, then random other layers one level sparser until
             sum c_l(g_l) <= B; what is left of B makes random layers denser again
    select   OFFSPRING children on few samples, the better quarter on half of them, the best two on all; the best
             becomes the parent if its D is less than the parent's on all samples

    random   the baseline: as many allocations of log-normal densities that hold the budget, selected the same way

The state after each generation, the random generator's included, is kept in the journal: a search that was stopped ends as
one that was not.

EvoPress: Sieberling et al. 2024, arXiv:2410.14649.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsec.errors import RecipeError
from sparsec.passes.measure.journal import Journal
from sparsec.passes.measure.knapsack import SLACK, Level
from sparsec.passes.measure.trial import Trials

GENERATIONS = 30
OFFSPRING = 16
FEW, FEWEST = 8, 8  # samples / FEW on the first step of selection, but at least FEWEST
TRIES = 50  # mutations that miss the budget before one is taken back

Genes = np.ndarray  # int [layers]: the index of each layer's level, sparsity ascending


@dataclass(frozen=True)
class Searched:
    """The best levels by name, and their measured damage; `tried`: allocations looked at."""

    levels: dict[str, Level]
    damage: float
    tried: int


def evolve(
    trials: Trials, levels: Mapping[str, Sequence[Level]], budget: float, start: Mapping[str, Level],
    generations: int = GENERATIONS, seed: int = 0, journal: Journal | None = None,
    tell: Callable[[str, int, int], None] | None = None,
) -> Searched:  # fmt: skip
    """The best allocation after `generations`, from `start`; its cost is at most `budget`."""
    space = Space(levels, budget)
    first = np.array([space.levels[i].index(start[name]) for i, name in enumerate(space.names)])
    return _run("search", trials, space, first, space.mutate, generations, seed, journal, tell)


def random_search(
    trials: Trials, levels: Mapping[str, Sequence[Level]], budget: float,
    generations: int = GENERATIONS, seed: int = 0, journal: Journal | None = None,
    tell: Callable[[str, int, int], None] | None = None,
) -> Searched:  # fmt: skip
    """The best of as many random allocations as `evolve` looks at."""
    space = Space(levels, budget)
    first = space.draw(np.random.default_rng(seed))
    return _run("random-search", trials, space, first, lambda rng, g: space.draw(rng), generations, seed, journal, tell)


class Space:
    """The allocations that hold a budget. RecipeError: there is none."""

    def __init__(self, levels: Mapping[str, Sequence[Level]], budget: float) -> None:
        self.names = list(levels)
        self.levels = [sorted(ways, key=lambda v: v.sparsity) for ways in levels.values()]
        self.budget = budget
        self._limit = budget * (1 + SLACK) + SLACK
        self._costs = [np.array([v.cost for v in ways]) for ways in self.levels]
        self._top = np.array([len(ways) - 1 for ways in self.levels])
        least = sum(float(c.min()) for c in self._costs)
        if least > self._limit:
            raise RecipeError(
                f"the budget of {budget:.6g} cannot be held: the cheapest levels together cost {least:.6g}"
            )

    def cost(self, genes: Genes) -> float:
        """Of all layers together."""
        return float(sum(c[g] for c, g in zip(self._costs, genes, strict=True)))

    def mutate(self, rng: np.random.Generator, genes: Genes) -> Genes:
        """A child of `genes` that holds the budget."""
        for _ in range(TRIES):
            child = genes.copy()
            switched: list[int] = []
            for _ in range(min(rng.integers(1, 4), rng.integers(1, 4))):
                sparse = np.flatnonzero(child > 0)
                if len(sparse):
                    switched.append(int(rng.choice(sparse)))
                    child[switched[-1]] -= 1
            if self._repair(rng, child, switched):
                return child
        return genes.copy()

    def draw(self, rng: np.random.Generator) -> Genes:
        """A random allocation: densities in log-normal proportions, rounded to levels, that hold the budget."""
        rates = np.exp(rng.standard_normal(len(self.names)))
        low, high = 0.0, 1.0 / float(rates.min())
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(self._nearest(middle * rates)) <= self.budget else (low, middle)
        genes = self._nearest(low * rates)
        if self.cost(genes) > self._limit and not self._repair(rng, genes, []):
            genes = np.array([int(np.argmin(c)) for c in self._costs])
        self._fill(rng, genes, set())
        return genes

    def _nearest(self, densities: np.ndarray) -> Genes:
        wanted = 1 - np.minimum(1, densities)
        return np.array([
            int(np.argmin([abs(v.sparsity - s) for v in ways])) for ways, s in zip(self.levels, wanted, strict=True)
        ])  # fmt: skip

    def _repair(self, rng: np.random.Generator, child: Genes, kept: Sequence[int]) -> bool:
        """Make random layers sparser until the budget holds, then use what is left; False if it cannot be held."""
        cost, lowered = self.cost(child), set()
        while cost > self._limit:
            open_layers = [i for i in np.flatnonzero(child < self._top) if i not in kept]
            if not open_layers:
                return False
            i = int(rng.choice(open_layers))
            cost += float(self._costs[i][child[i] + 1] - self._costs[i][child[i]])
            child[i] += 1
            lowered.add(i)
        self._fill(rng, child, lowered)
        return True

    def _fill(self, rng: np.random.Generator, child: Genes, lowered: set[int]) -> None:
        cost = self.cost(child)
        for i in rng.permutation(len(child)):
            more = float(self._costs[i][child[i] - 1] - self._costs[i][child[i]]) if child[i] else np.inf
            if i not in lowered and cost + more <= self._limit:
                child[i] -= 1
                cost += more


def _run(
    rule: str, trials: Trials, space: Space, first: Genes, child: Callable[[np.random.Generator, Genes], Genes],
    generations: int, seed: int, journal: Journal | None, tell: Callable[[str, int, int], None] | None,
) -> Searched:  # fmt: skip
    rng = np.random.default_rng(seed)
    facts = [rule, space.names, [[(v.sparsity, v.cost) for v in w] for w in space.levels], space.budget, seed]
    entry = (
        f"{rule} {hashlib.sha256(json.dumps([*facts, first.tolist(), OFFSPRING, len(trials)]).encode()).hexdigest()}"
    )
    journal = journal or Journal("", "")
    known: dict[str, Any] | None = journal.get(entry)
    if known is not None:
        parent, best, done = np.array(known["genes"]), float(known["damage"]), int(known["generation"])
        rng.bit_generator.state = known["rng"]
    else:
        parent, best, done = first, float(trials.damages(_sparsities(space, first)).mean()), 0
    for generation in range(done, generations):
        if tell is not None:
            tell(f"{rule}, damage {best:.4g}", generation, generations)
        children = [child(rng, parent) for _ in range(OFFSPRING)]
        winner, damage = _select(trials, space, children, rng)
        if damage < best:
            parent, best = winner, damage
        state = {"generation": generation + 1, "genes": parent.tolist(), "damage": best, "rng": rng.bit_generator.state}
        journal.put(entry, state)
    chosen = {name: space.levels[i][parent[i]] for i, name in enumerate(space.names)}
    return Searched(chosen, best, 1 + OFFSPRING * max(generations, done))


def _sparsities(space: Space, genes: Genes) -> dict[str, float]:
    return {name: space.levels[i][genes[i]].sparsity for i, name in enumerate(space.names)}


def _select(trials: Trials, space: Space, children: Sequence[Genes], rng: np.random.Generator) -> tuple[Genes, float]:
    """The best child, and its damage on all samples."""
    count = len(trials)
    order = rng.permutation(count)
    rest = list({tuple(c.tolist()): c for c in children}.values())
    few = min(count, max(FEWEST, count // FEW))
    for size, keep in ((few, -(-len(children) // 4)), (max(few, count // 2), 2), (count, 1)):
        if len(rest) > keep or size == count:
            rows = np.sort(order[:size]).tolist()
            damages = np.array(trials.damages_of([_sparsities(space, genes) for genes in rest], rows))
            best = np.argsort(damages, kind="stable")[:keep]
            rest, damages = [rest[i] for i in best], damages[best]
    return rest[0], float(damages[0])
