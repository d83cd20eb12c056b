"""A layer as low rank plus sparse, W ~ U V + S, and as S alone.

Low rank is bad at a few large weights that stand alone, sparsity at many small ones that say the same; together they need
fewer weights than either. In the metric H of the layer's inputs (`sparsec.passes.low_rank.metric`)

    min over U, V, S   tr((W - U V - S) H (W - U V - S)^T)        rank(U V) = r,  S in a pruning pattern with n nonzeros

by rounds: U V is the closed form for W - S, then a mask is drawn for S and S is the least-squares solution on it for
E = W - U V (`sparsec.passes.pruning.masks` knows the patterns). A mask is drawn in one of two ways. Both look one weight at a time:

    prune    all of E is stored but one weight, the others of its row make up for it:      e_j^2 / (H^-1)_jj
    swap     S + one more weight, and U V follows. With G = (E - S) H, the gradient, and what of a weight's direction
             U V cannot take over,                                        d_ij = (1 - |U_i|^2) (H_jj - H_j V^T (V H V^T)^-1 V H_j)
             a weight at its own best lowers the loss by                  (S_ij + G_ij / d_ij)^2 d_ij

The second is the curvature normal to the tangent space of the matrices of rank r at U V (U orthonormal). Without it S takes
what the next round's U V would explain anyway. Where S holds most weights the first is better, where it holds few the second.
With a mask that stays both steps only lower the loss; a new mask may raise it, and going on from there finds better ones
than stopping. The best of all rounds is kept and polished with its mask held. With n = OC K the result is exact.

The nodes are the chain `v`, `u`, the layer of the same kind `s` with the zeros in its weight, and their sum.

SLTrain, arXiv:2406.02214; LOST, arXiv:2508.02668; outliers beside a compressed rest: SpQR, arXiv:2306.03078; one-step losses:
Hassibi & Stork 1993.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from sparsec.passes.low_rank.decompositions import Form, Shape
from sparsec.passes.low_rank.factors import Factors
from sparsec.passes.low_rank.metric import Metric, Objective, solve
from sparsec.passes.pruning.masks import Pattern, draw_masks
from sparsec.passes.pruning.reconstruct import Problem

PRUNES = 4  # rounds of the first way
SWAPS = 12  # rounds of the second
POLISH = 4  # rounds with the best mask
ROUGH = 0.0  # of `work`: the fewest rounds, to compare forms before one is chosen
WORK = 3e9  # multiply-adds of all rounds together, about; larger layers get fewer
LEAST = 1e-3  # of a direction's curvature: what a low-rank part takes over at most


@dataclass(frozen=True)
class Sparse:
    """S alone: `density` of the weights, refitted; `work`: multiply-adds for the search of its mask, about."""

    density: float
    pattern: Pattern = field(default_factory=Pattern)
    work: float = WORK

    def __str__(self) -> str:
        return f"sparse {self.pattern} {100 * self.density:.0f}%"

    @property
    def fine(self) -> Form:
        """The same form, searched in full."""
        return replace(self, work=WORK)

    def parameters(self, shape: Shape) -> int:
        """Nonzero weights."""
        return round(self.density * float(np.prod(shape)))

    def build(self, goal: Objective) -> Factors:
        """Masks in rounds, the best refitted."""
        _, s = search(goal, None, self.density, self.pattern, self.work)
        return Factors(str(self), ((("s", s),),))


@dataclass(frozen=True)
class LowRankPlusSparse:
    """U V + S: `low` and `density` of the weights; `work`: multiply-adds for the search, about."""

    low: Form
    density: float
    pattern: Pattern = field(default_factory=Pattern)
    work: float = WORK

    def __str__(self) -> str:
        return f"{self.low} + {Sparse(self.density, self.pattern)}"

    @property
    def rough(self) -> Form:
        """A cheap form that loses about as much for the same reasons."""
        return self.low

    @property
    def fine(self) -> Form:
        """The same form, searched in full."""
        return replace(self, work=WORK)

    def parameters(self, shape: Shape) -> int:
        """Those of the chain and the nonzeros of S."""
        return self.low.parameters(shape) + Sparse(self.density, self.pattern).parameters(shape)

    def build(self, goal: Objective) -> Factors:
        """Alternate; the best of all rounds."""
        low, s = search(goal, self.low, self.density, self.pattern, self.work)
        assert low is not None
        return Factors(str(self), (*low.chains, (("s", s),)))


@dataclass(frozen=True)
class Found:
    """What a round ends with; `s`, `mask` [OC, IC, KH, KW]."""

    loss: float
    low: Factors | None
    s: np.ndarray = field(repr=False)
    mask: np.ndarray = field(repr=False)


def search(
    goal: Objective, low: Form | None, density: float, pattern: Pattern, work: float = WORK
) -> tuple[Factors | None, np.ndarray]:
    """The low-rank part (None: without one) and S [OC, IC, KH, KW] of least loss that the rounds find."""
    less = min(1.0, work / ((PRUNES + 2 * SWAPS) * round_work(goal.shape)))
    prunes, swaps = (max(2, round(n * less)) for n in (PRUNES, SWAPS))
    firsts, polish = (prunes, 0), POLISH if low is not None else 0
    if (
        work <= ROUGH and goal.shape[2] * goal.shape[3] > 1
    ):  # three kinds of low rank are looked at here, each for less long
        firsts, swaps, polish = (1,), 1, 0
    starts = (found for first in firsts for found in rounds(goal, low, density, pattern, first, swaps))
    best = min(starts, key=lambda found: found.loss)
    part, s = best.low, best.s
    for _ in range(polish):
        part, rest = split(goal, low, s)
        s = on_mask(rest, best.mask)
    return part, s


def round_work(shape: Shape) -> float:
    """Multiply-adds of a round, about: an SVD and a refit."""
    oc, k = shape[0], int(np.prod(shape[1:]))
    return 12.0 * oc * k * min(oc, k) + 4.0 * oc * k * k


def rounds(
    goal: Objective, low: Form | None, density: float, pattern: Pattern, prunes: int, swaps: int
) -> Iterator[Found]:
    """From S = 0, first with masks by pruning, then by swapping; each until its mask stays."""
    s = np.zeros(goal.shape)
    for count, draw_mask in ((prunes, pruned), (swaps, swapped)):
        before: np.ndarray | None = None
        for _ in range(count):
            part, rest = split(goal, low, s)
            mask = draw_mask(rest, part, s, density, pattern)
            if before is not None and np.array_equal(mask, before):
                break
            before, s = mask, on_mask(rest, mask)
            yield Found(rest.metric.loss((rest.weight - s).reshape(len(s), -1)), part, s, mask)


def split(goal: Objective, low: Form | None, s: np.ndarray) -> tuple[Factors | None, Objective]:
    """The low-rank part for what S leaves, and what that leaves for S."""
    if low is None:
        return None, goal
    part = low.build(goal.minus(s))
    return part, goal.minus(part.dense())


def pruned(rest: Objective, part: Factors | None, s: np.ndarray, density: float, pattern: Pattern) -> np.ndarray:
    """The mask of the weights of all that is left that cost most alone."""
    return draw(rest, density, pattern)


def swapped(rest: Objective, part: Factors | None, s: np.ndarray, density: float, pattern: Pattern) -> np.ndarray:
    """The mask of the weights that lower the loss most, each at its own best; `s`: as they are."""
    h, flat = rest.metric.h, s.reshape(len(s), -1)
    gradient = rest.metric.times(rest.matrix - flat)
    power = np.ones(flat.shape[1]) if h is None else np.diagonal(h)
    rows, columns = np.ones(len(s)), power
    factors = [] if part is None else [f for _, f in part.chains[0]]
    if len(factors) == 2 and factors[0].shape[1:] == s.shape[1:]:  # U V and nothing between
        v, u = (f.reshape(len(f), -1).astype(np.float64) for f in factors)
        seen = rest.metric.times(v)
        rows = rows - np.einsum("nr,rn->n", u, np.linalg.pinv(u))
        columns = power - np.einsum("rk,rk->k", seen, solve(seen @ v.T, seen))
    curve = np.outer(np.maximum(rows, LEAST), np.maximum(columns, LEAST * power))
    curve = np.maximum(curve, 1e-300)
    return _masked((flat + gradient / curve) ** 2 * curve, rest.shape, density, pattern)


def draw(goal: Objective, density: float, pattern: Pattern) -> np.ndarray:
    """True where S may be nonzero, by the loss of one step."""
    scores = goal.weight.astype(np.float64) ** 2
    if goal.metric.h is not None:
        scores = scores / goal.metric.inverse_diagonal.reshape(1, *goal.shape[1:])
    return _masked(scores, goal.shape, density, pattern)


def _masked(scores: np.ndarray, shape: Shape, density: float, pattern: Pattern) -> np.ndarray:
    counted = np.ones(shape, np.float32)
    return draw_masks([counted], [scores.reshape(shape)], pattern, 1 - density)[0]


def on_mask(goal: Objective, mask: np.ndarray) -> np.ndarray:
    """The S of least loss on `mask`, [OC, IC, KH, KW]."""
    metric: Metric = goal.metric
    if metric.h is None:
        return np.where(mask, goal.weight.astype(np.float64), 0.0)
    start = goal.matrix
    problem = Problem(metric.h, metric.times(start), start, np.zeros(len(start)))
    return problem.refit(mask.reshape(len(start), -1)).reshape(goal.shape)


def sparse_forms(shape: Shape, budget: float, pattern: Pattern) -> list[Form]:
    """S alone with at most `budget` weights; N:M fixes the share. Searched roughly, see `fine`."""
    size = float(np.prod(shape))
    density = 1 - pattern.share if pattern.keep else budget / size
    return [Sparse(density, pattern, ROUGH)] if 0 < density < 1 and density * size <= budget * (1 + 1e-9) else []


def mixed_forms(low: list[Form], shape: Shape, budget: float, pattern: Pattern) -> list[Form]:
    """What the forms of `low` leave of `budget` weights, as S; searched roughly, see `fine`."""
    size, found = float(np.prod(shape)), []
    for form in low:
        density = 1 - pattern.share if pattern.keep else (budget - form.parameters(shape)) / size
        if 0 < density < 1 and form.parameters(shape) + density * size <= budget * (1 + 1e-9):
            found.append(LowRankPlusSparse(form, density, pattern, ROUGH))
    return found  # type: ignore[return-value]
