"""A matrix as two block-diagonal ones with a permutation between them: Monarch.

W [OC, IC] in q x b tiles, tile (j, k) of l_j rows and i_k columns. A Monarch matrix has tiles of rank 1 (here: of rank r),

    W[j, k] = L[j, k] R[k, j]        L[j, k] [l_j, r],   R[k, j] [r, i_k]

that is W = L P R with R block-diagonal over k (x_k -> z_kj, all j), P the permutation (k, j) -> (j, k), and L block-diagonal
over j. r (b OC + q IC) weights, for b = q = sqrt(n) 2 r n sqrt(n) instead of n^2. The paper also permutes the rows of W, which
only renames outputs; the tiles here are of neighbours. P is not computed: L P is one weight with zeros in it, whose
nonzeros of each group of rows share their columns, and so is R.

The projection of any W in Frobenius norm is the truncated SVD of every tile, each alone. In the metric H of the inputs
tiles of one row are coupled. One tile X = W[j, k] at a time, the others held, has

    tr(X H_kk X^T) - 2 tr(X G^T),    G = ((W_j - others) H)[:, k]        so X* = G H_kk^-1, then rank r in the metric H_kk

which cannot raise the loss; sweeps begin at the plain projection.

Dao et al. 2022, arXiv:2204.00595.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sparsec.passes.low_rank.decompositions import Form, Shape
from sparsec.passes.low_rank.factors import Factors
from sparsec.passes.low_rank.metric import Metric, Objective, Spectrum, solve

SWEEPS = 4


@dataclass(frozen=True)
class Monarch:
    """`rows` x `columns` tiles of rank `rank`; matrices and 1 x 1 convolutions only."""

    rows: int
    columns: int
    rank: int = 1

    def __str__(self) -> str:
        return f"monarch {self.rows}x{self.columns} rank {self.rank}"

    def parameters(self, shape: Shape) -> int:
        """r (columns OC + rows IC)."""
        return self.rank * (self.columns * shape[0] + self.rows * shape[1])

    def build(self, goal: Objective) -> Factors:
        """The plain projection, then sweeps over the tiles in the metric."""
        oc, ic = goal.matrix.shape
        tops, lefts = cut(oc, self.rows), cut(ic, self.columns)
        size = self.rank * self.rows * self.columns
        left_factor, right_factor = np.zeros((oc, size)), np.zeros((size, ic))
        metrics = [_part(goal.metric, k) for k in lefts]
        for j, top in enumerate(tops):
            u, v = _tiles(goal.matrix[top], goal.metric, metrics, lefts, self.rank)
            for k, left in enumerate(lefts):
                z = (k * self.rows + j) * self.rank  # of the values between: first by k, as R gives them
                left_factor[top, z : z + u[k].shape[1]] = u[k]
                right_factor[z : z + v[k].shape[0], left] = v[k]
        return Factors(str(self), ((("r", right_factor[:, :, None, None]), ("l", left_factor[:, :, None, None])),))


def cut(n: int, parts: int) -> list[slice]:
    """0..n in `parts` runs whose lengths differ by at most 1."""
    ends = [n * p // parts for p in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]


def _part(metric: Metric, at: slice) -> Metric:
    return metric if metric.h is None else Metric(metric.h[at, at])


def _tiles(
    w: np.ndarray, metric: Metric, metrics: list[Metric], lefts: list[slice], rank: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """U [l, r] and V [r, i_k] of every tile of one row of tiles `w` [l, IC]."""
    found = [Spectrum.of(w[:, left], Metric()).factors(rank) for left in lefts]
    if metric.h is not None:
        x = np.concatenate([u @ v for u, v in found], axis=1)
        for _ in range(SWEEPS):
            for k, left in enumerate(lefts):
                rest = w - x
                rest[:, left] += x[:, left]
                best = solve(metrics[k].h, (rest @ metric.h[:, left]).T).T  # type: ignore[arg-type]
                found[k] = Spectrum.of(best, metrics[k]).factors(rank)
                x[:, left] = found[k][0] @ found[k][1]
    return [u for u, _ in found], [v for _, v in found]


def monarch_forms(shape: Shape, budget: float) -> list[Form]:
    """Square-ish tilings that divide the matrix, with the largest rank that holds the budget."""
    oc, ic, kh, kw = shape
    if kh * kw != 1:
        return []
    found: list[Form] = []
    for tiles in (4, 8, 16):
        if oc % tiles or ic % tiles or tiles * tiles > oc * ic // 16:
            continue
        rank = min(int(budget // (tiles * (oc + ic))), min(oc, ic) // tiles - 1)
        if rank > 0:
            found.append(Monarch(tiles, tiles, rank))
    return found
