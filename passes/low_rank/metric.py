"""How much of a layer's outputs another weight loses, and the SVD in coordinates where that loss is a plain distance.

For a layer with weight W [OC, K], K = IC*KH*KW, whose inputs x have the second moments H = E[x x^T] [K, K] (of x - E[x]
where a bias takes up the mean: b' = b + (W - W') E[x]), damped by a diagonal ridge,

    E |(W - W') x|^2 = tr((W - W') H (W - W')^T) = |(W - W') L|_F^2            H = L L^T  (Cholesky)

so the best W' of rank r is the truncated SVD in whitened coordinates, W L = P diag(s) Q^T, and L need not be inverted:

    U = P[:, :r]  [OC, r],      V = U^T W  [r, K],      loss = sum of s_i^2 over i > r

Without data H = I, which is plain SVD. Whitened factors are never worse on the data that made H: with H = G + R, R the
ridge, loss_H(white) <= loss_H(plain); where R = c I, plain SVD has the least loss_R, so loss_G(white) <= loss_G(plain).
Where a part of W' = C A is fixed as A [A, K], the best C is W H A^T (A H A^T)^-1.

SVD-LLM, arXiv:2403.07378 (Cholesky whitening); ASVD, arXiv:2312.05821; LoRD, arXiv:2309.14021.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from sparsec.passes.low_rank.factors import Factors

TINY = 1e-12  # of the largest, added to a diagonal before it is inverted


@dataclass(frozen=True)
class Metric:
    """H [K, K], positive definite; None: the identity."""

    h: np.ndarray | None = field(repr=False, default=None)

    @cached_property
    def root(self) -> np.ndarray | None:
        """L, lower triangular with H = L L^T."""
        return None if self.h is None else cholesky(self.h)

    @cached_property
    def inverse_diagonal(self) -> np.ndarray:
        """The diagonal of H^-1, [K]."""
        assert self.h is not None and self.root is not None
        inverse = np.linalg.inv(self.root)
        return np.einsum("jk,jk->k", inverse, inverse)

    def times(self, w: np.ndarray) -> np.ndarray:
        """w H, for w [., K]."""
        return w if self.h is None else w @ self.h

    def white(self, w: np.ndarray) -> np.ndarray:
        """w L, for w [., K]."""
        return w if self.root is None else w @ self.root

    def loss(self, w: np.ndarray) -> float:
        """tr(w H w^T)."""
        return float(np.einsum("nk,nk->", self.times(w), w))

    def behind(self, w: np.ndarray, a: np.ndarray) -> np.ndarray:
        """The C with the least loss of w - C a, for a [A, K]."""
        ah = self.times(a)
        return solve(ah @ a.T, (ah @ w.T)).T

    def marginal(self, shape: tuple[int, ...], axes: tuple[int, ...]) -> Metric:
        """H over the axes `axes` of K = `shape`, summed over the diagonal of the others."""
        if self.h is None:
            return self
        names = "abcdef"[: len(shape)]
        other = "".join(n.upper() if i in axes else n for i, n in enumerate(names))
        kept = "".join(names[i] for i in axes)
        size = int(np.prod([shape[i] for i in axes]))
        summed = np.einsum(f"{names}{other}->{kept}{kept.upper()}", self.h.reshape(*shape, *shape))
        return Metric(summed.reshape(size, size))


def cholesky(h: np.ndarray) -> np.ndarray:
    """The lower factor of `h`, with a diagonal raised until there is one."""
    extra, mean = 0.0, float(np.diagonal(h).mean()) or 1.0
    while True:
        try:
            return np.linalg.cholesky(h + extra * np.eye(len(h)) if extra else h)
        except np.linalg.LinAlgError:
            extra = max(10 * extra, TINY * mean)


def solve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a^-1 b for a positive semidefinite `a`."""
    a = a.copy()
    a[np.diag_indices_from(a)] += TINY * max(float(np.diagonal(a).max(initial=0.0)), 1e-300)
    return np.linalg.solve(a, b)


@dataclass(frozen=True)
class Spectrum:
    """The SVD of a whitened weight: factors of every rank, and what each loses."""

    weight: np.ndarray = field(repr=False)  # [OC, K]
    left: np.ndarray = field(repr=False)  # P [OC, R]
    energies: np.ndarray = field(repr=False)  # s^2 [R], descending

    @classmethod
    def of(cls, weight: np.ndarray, metric: Metric) -> Spectrum:
        """Of `weight` [OC, K]."""
        white = metric.white(weight)
        left, values, _ = np.linalg.svd(white, full_matrices=False)
        return cls(weight, left, values**2)

    def factors(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """U [OC, r], V [r, K]."""
        u = self.left[:, :rank]
        return u, u.T @ self.weight

    def loss(self, rank: int) -> float:
        """What rank `rank` loses."""
        return float(self.energies[rank:].sum())

    def rank_of(self, energy: float) -> int:
        """The least rank that keeps the share `energy` of the output."""
        total = np.cumsum(self.energies)
        return int(np.searchsorted(total, energy * total[-1] * (1 - 1e-12)) + 1) if total[-1] > 0 else 1


@dataclass(frozen=True)
class Objective:
    """A weight [OC, IC, KH, KW] to be approximated, and what counts."""

    weight: np.ndarray = field(repr=False)
    metric: Metric = field(default_factory=Metric, repr=False)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """OC, IC, KH, KW."""
        oc, ic, kh, kw = self.weight.shape
        return oc, ic, kh, kw

    @cached_property
    def matrix(self) -> np.ndarray:
        """[OC, K], float64."""
        return self.weight.reshape(len(self.weight), -1).astype(np.float64)

    @cached_property
    def spectrum(self) -> Spectrum:
        """Of the matrix."""
        return Spectrum.of(self.matrix, self.metric)

    @cached_property
    def power(self) -> float:
        """The loss of a weight of zeros."""
        return self.metric.loss(self.matrix)

    def loss(self, factors: Factors) -> float:
        """What `factors` lose."""
        return self.metric.loss(self.matrix - factors.dense().reshape(self.matrix.shape))

    def minus(self, weight: np.ndarray) -> Objective:
        """What is left to approximate when [OC, IC, KH, KW] is taken off."""
        return Objective(self.weight - weight, self.metric)
