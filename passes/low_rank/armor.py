"""An N:M sparse core between two block-diagonal wrappers: ARMOR.

    W [OC, IC] ~ A S B        A, B block-diagonal with d x d blocks,   S [OC, IC] with N of M consecutive weights a row

N:M alone must zero half of every group of four; the wrappers turn the space of outputs and inputs so that what is zeroed
matters less. OC d + IC d + OC IC N/M weights. The proxy loss is that of `sparsec.passes.low_rank.metric`,

    f(A, S, B) = tr((W - A S B) H (W - A S B)^T)

lowered one block at a time, beginning at A = I, B = I and S pruned N:M and refitted; so it is never above that of N:M alone:

    A    each block of rows j is a least-squares problem:      A_j = W_j H F_j^T (F_j H F_j^T)^-1,     F = S B
    S    on its mask: conjugate gradients on S -> A^T A S (B H B^T)
    B    on its blocks: conjugate gradients on B -> (A S)^T (A S) B H
    mask a gradient step without the mask, the N largest of each group kept, values solved again; taken if f falls

ARMOR, arXiv:2510.05528.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sparsec.passes.low_rank.decompositions import Form, Shape, Svd
from sparsec.passes.low_rank.factors import Factors
from sparsec.passes.low_rank.metric import Metric, Objective
from sparsec.passes.low_rank.monarch import cut
from sparsec.passes.low_rank.residual_sparse import draw, on_mask
from sparsec.passes.pruning.masks import Pattern, n_of_m_mask

ROUNDS = 6
STEPS = 12  # of conjugate gradients for a block
TRIES = 3  # lengths of the step to another mask


@dataclass(frozen=True)
class Armor:
    """Wrappers with blocks of `block` x `block` around a core in the pattern `pattern` (N:M)."""

    block: int
    pattern: Pattern = field(default_factory=lambda: Pattern(1, 1, 2, 4))

    def __str__(self) -> str:
        return f"armor {self.block}, {self.pattern}"

    @property
    def rough(self) -> Form:
        """A cheap form that loses about as much for the same reasons."""
        return Svd(4 * self.block)

    def parameters(self, shape: Shape) -> int:
        """d (OC + IC) + OC IC N / M."""
        oc, ic, _, _ = shape
        return self.block * (oc + ic) + round(oc * ic * (1 - self.pattern.share))

    def build(self, goal: Objective) -> Factors:
        """Block coordinate descent."""
        w, metric = goal.matrix, goal.metric
        oc, ic = w.shape
        rows, columns = blocks(oc, self.block), blocks(ic, self.block)
        mask = draw(goal, 1 - self.pattern.share, self.pattern)[:, :, 0, 0]
        s = on_mask(goal, mask[:, :, None, None])[:, :, 0, 0]
        a, b = np.eye(oc), np.eye(ic)
        inside = block_mask(ic, columns)
        for _ in range(ROUNDS):
            f = s @ b
            for part in rows:
                a[part, part] = metric.behind(w[part], f[part])
            a, s = _balanced(a, s)
            s = values(w, a, s, b, mask, metric)
            b = wrapper(w, a @ s, b, inside, metric)
            s, mask = other_mask(w, a, s, b, mask, metric, self.pattern)
        chain = (("b", b[:, :, None, None]), ("s", s[:, :, None, None]), ("a", a[:, :, None, None]))
        return Factors(str(self), (chain,))


def blocks(n: int, size: int) -> list[slice]:
    """0..n in runs of about `size`."""
    return cut(n, max(1, -(-n // size)))


def block_mask(n: int, parts: list[slice]) -> np.ndarray:
    """True on the diagonal blocks, [n, n]."""
    inside = np.zeros((n, n), bool)
    for part in parts:
        inside[part, part] = True
    return inside


def _balanced(a: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same product with columns of `a` of length 1, so that steps on S are of one size."""
    norms = np.linalg.norm(a, axis=0)
    norms = np.where(norms > 0, norms, 1.0)
    return a / norms, s * norms[:, None]


def values(w: np.ndarray, a: np.ndarray, s: np.ndarray, b: np.ndarray, mask: np.ndarray, metric: Metric) -> np.ndarray:
    """S of lower loss on its mask."""
    outer, inner = a.T @ a, metric.times(b) @ b.T
    goal = a.T @ metric.times(w) @ b.T
    return descend(lambda x: np.where(mask, outer @ x @ inner, 0.0), np.where(mask, goal, 0.0), np.where(mask, s, 0.0))


def wrapper(w: np.ndarray, core: np.ndarray, b: np.ndarray, inside: np.ndarray, metric: Metric) -> np.ndarray:
    """B of lower loss on its blocks, for core = A S."""
    outer = core.T @ core
    goal = core.T @ metric.times(w)
    return descend(lambda x: np.where(inside, outer @ metric.times(x), 0.0), np.where(inside, goal, 0.0), b)


def descend(product: Callable[[np.ndarray], np.ndarray], goal: np.ndarray, x: np.ndarray) -> np.ndarray:
    """STEPS conjugate gradients towards product(x) = goal from `x`; each lowers <x, product(x)> / 2 - <x, goal>."""
    r = goal - product(x)
    p, rr = r, float((r * r).sum())
    for _ in range(STEPS):
        q = product(p)
        pq = float((p * q).sum())
        if not (rr > 0 and pq > 0):
            break
        x = x + rr / pq * p
        r = r - rr / pq * q
        new = float((r * r).sum())
        p, rr = r + new / rr * p, new
    return x


def other_mask(
    w: np.ndarray, a: np.ndarray, s: np.ndarray, b: np.ndarray, mask: np.ndarray, metric: Metric, pattern: Pattern
) -> tuple[np.ndarray, np.ndarray]:
    """S and its mask after a projected gradient step that lowers the loss; as they were, if none of TRIES does."""
    before = metric.loss(w - a @ s @ b)
    residual = metric.times(w - a @ s @ b)
    gradient = a.T @ residual @ b.T
    moved = a @ gradient @ b
    curve = metric.loss(moved)
    if curve <= 0:
        return s, mask
    step = float((gradient * gradient).sum()) / curve
    # One length for all: a weight counts by what it adds through the row of B behind it.
    weight = np.sqrt(np.maximum(np.diagonal(metric.times(b) @ b.T), 0))
    for length in [step * 4.0**-i for i in range(TRIES)]:
        stepped = (s + length * gradient) * weight
        fresh = n_of_m_mask(stepped[:, :, None, None], pattern.keep, pattern.group)[:, :, 0, 0]
        if np.array_equal(fresh, mask):
            continue
        found = values(w, a, np.where(fresh, s + length * gradient, 0.0), b, fresh, metric)
        if metric.loss(w - a @ found @ b) < before:
            return found, fresh
    return s, mask


def armor_forms(shape: Shape, budget: float) -> list[Form]:
    """The widest blocks that hold the budget."""
    oc, ic, kh, kw = shape
    if kh * kw != 1 or ic % 4:
        return []
    found = [Armor(d) for d in (16, 8, 4) if max(oc, ic) > d and Armor(d).parameters(shape) <= budget]
    return found[:1]  # type: ignore[return-value]
