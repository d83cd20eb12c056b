"""A layer as low rank plus sparse, W ~ U V + S, and as S alone.

Low rank is bad at a few large weights that stand alone, sparsity at many small ones that say the same; together they need
fewer weights than either. In the metric H of the layer's inputs (`sparsec.passes.metric`)

    min over U, V, S   tr((W - U V - S) H (W - U V - S)^T)        rank(U V) = r,  S in a pruning pattern with n nonzeros

by rounds: U V is the closed form for W - S. The mask of S then is drawn for E = W - U V by what zeroing one weight adds
if the others of its row make up for it, e_j^2 / (H^-1)_jj (`sparsec.passes.masks` knows the patterns), and S is the
least-squares solution on its mask. With a mask that stays both steps only lower the loss; a new mask may raise it, so
the rounds' best is kept and polished with its mask held. With n = OC K the result is exact.

The nodes are the chain `v`, `u`, the layer of the same kind `s` with the zeros in its weight, and their sum.

SLTrain, arXiv:2406.02214; LOST, arXiv:2508.02668; outliers beside a compressed rest: SpQR, arXiv:2306.03078; one-step losses:
Hassibi & Stork 1993.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sparsec.passes.factors import Factors
from sparsec.passes.low_rank import Form, Shape
from sparsec.passes.masks import Pattern, draw_masks
from sparsec.passes.metric import Metric, Objective
from sparsec.passes.reconstruct import Problem

ROUNDS = 4  # with a new mask each
POLISH = 3  # with the best mask


@dataclass(frozen=True)
class Sparse:
    """S alone: `density` of the weights, refitted."""

    density: float
    pattern: Pattern = field(default_factory=Pattern)

    def __str__(self) -> str:
        return f"sparse {self.pattern} {100 * self.density:.0f}%"

    def parameters(self, shape: Shape) -> int:
        """Nonzero weights."""
        return round(self.density * float(np.prod(shape)))

    def build(self, goal: Objective) -> Factors:
        """Mask and refit."""
        mask = draw(goal, self.density, self.pattern)
        return Factors(str(self), ((("s", on_mask(goal, mask)),),))


@dataclass(frozen=True)
class LowRankPlusSparse:
    """U V + S: `low` and `density` of the weights."""

    low: Form
    density: float
    pattern: Pattern = field(default_factory=Pattern)

    def __str__(self) -> str:
        return f"{self.low} + {Sparse(self.density, self.pattern)}"

    @property
    def rough(self) -> Form:
        """A cheap form that loses about as much for the same reasons."""
        return self.low

    def parameters(self, shape: Shape) -> int:
        """Those of the chain and the nonzeros of S."""
        return self.low.parameters(shape) + Sparse(self.density, self.pattern).parameters(shape)

    def build(self, goal: Objective) -> Factors:
        """Alternate; the best of all rounds."""
        best: tuple[float, Factors, np.ndarray, np.ndarray] | None = None
        s, mask = np.zeros(goal.shape), np.zeros(goal.shape, bool)
        for round_ in range(ROUNDS + POLISH):
            if round_ == ROUNDS and best is not None:
                s, mask = best[2], best[3]
            low = self.low.build(goal.minus(s))
            rest = goal.minus(low.dense())
            if round_ < ROUNDS:
                mask = draw(rest, self.density, self.pattern)
            s = on_mask(rest, mask)
            loss = rest.metric.loss((rest.weight - s).reshape(len(s), -1))
            if best is None or loss < best[0]:
                best = loss, low, s, mask
        assert best is not None
        return Factors(str(self), (*best[1].chains, (("s", best[2]),)))


def draw(goal: Objective, density: float, pattern: Pattern) -> np.ndarray:
    """True where S may be nonzero, by the loss of one step."""
    scores = goal.weight.astype(np.float64) ** 2
    if goal.metric.h is not None:
        scores = scores / goal.metric.inverse_diagonal.reshape(1, *goal.shape[1:])
    counted = np.ones(goal.shape, np.float32)
    return draw_masks([counted], [scores], pattern, 1 - density)[0]


def on_mask(goal: Objective, mask: np.ndarray) -> np.ndarray:
    """The S of least loss on `mask`, [OC, IC, KH, KW]."""
    metric: Metric = goal.metric
    if metric.h is None:
        return np.where(mask, goal.weight.astype(np.float64), 0.0)
    start = goal.matrix
    problem = Problem(metric.h, metric.times(start), start, np.zeros(len(start)))
    return problem.refit(mask.reshape(len(start), -1)).reshape(goal.shape)


def sparse_forms(shape: Shape, budget: float, pattern: Pattern) -> list[Form]:
    """S alone with at most `budget` weights; N:M fixes the share."""
    size = float(np.prod(shape))
    density = 1 - pattern.share if pattern.keep else budget / size
    return [Sparse(density, pattern)] if 0 < density < 1 and density * size <= budget * (1 + 1e-9) else []


def mixed_forms(low: list[Form], shape: Shape, budget: float, pattern: Pattern) -> list[Form]:
    """What the forms of `low` leave of `budget` weights, as S."""
    size, found = float(np.prod(shape)), []
    for form in low:
        density = 1 - pattern.share if pattern.keep else (budget - form.parameters(shape)) / size
        if 0 < density < 1 and form.parameters(shape) + density * size <= budget * (1 + 1e-9):
            found.append(LowRankPlusSparse(form, density, pattern))
    return found  # type: ignore[return-value]
