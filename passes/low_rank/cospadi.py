"""A matrix as a sparse combination of few directions: a dense dictionary and coefficients with s nonzeros a row.

    W [OC, K] ~ S D        D [a, K] dense: the atoms;   S [OC, a]: exactly s nonzeros in each row

A rank r has every output in one space of r directions; here every output picks s of a. First D runs, then S, a weight
with zeros. a K + s OC weights. In whitened coordinates the loss is |(W - S D) L|_F^2, H = L L^T, with rows of W L as
signals. Rounds of

    OMP      each row, from nothing: the atom of largest <residual, atom> / |atom| joins, all coefficients are solved
             again; a row keeps its old coefficients if those are better
    K-SVD    each atom with the rows that use it: E = rows without the atom, (coefficients, atom) <- rank 1 of E L

neither of which raises the loss. L is never inverted: of rank 1 of E L = p s q^T the atom is p^T E.

CoSpaDi, arXiv:2509.22075; K-SVD: Aharon et al. 2006; OMP: Pati et al. 1993.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsec.passes.low_rank.decompositions import Form, Shape, Svd
from sparsec.passes.low_rank.factors import Factors
from sparsec.passes.low_rank.metric import Metric, Objective, Spectrum

ROUNDS = 8
RATIO = 2  # atoms for each nonzero of a row


@dataclass(frozen=True)
class Dictionary:
    """`atoms` directions, `nonzeros` of them in each output."""

    atoms: int
    nonzeros: int

    def __str__(self) -> str:
        return f"dictionary {self.atoms}, {self.nonzeros} each"

    @property
    def rough(self) -> Form:
        """A cheap form that loses about as much for the same reasons."""
        return Svd(self.nonzeros)

    def parameters(self, shape: Shape) -> int:
        """a K + s OC."""
        oc, ic, kh, kw = shape
        return self.atoms * ic * kh * kw + self.nonzeros * oc

    def build(self, goal: Objective) -> Factors:
        """OMP and K-SVD in turn."""
        w, metric = goal.matrix, goal.metric
        atoms = start(goal, self.atoms)
        codes = omp(w, atoms, metric, self.nonzeros)
        for _ in range(ROUNDS):
            codes, atoms = ksvd(w, codes, atoms, metric)
            fresh = omp(w, atoms, metric, self.nonzeros)
            better = _losses(w - fresh @ atoms, metric) < _losses(w - codes @ atoms, metric)
            codes = np.where(better[:, None], fresh, codes)
        d, s = atoms.reshape(-1, *goal.shape[1:]), codes[:, :, None, None]
        return Factors(str(self), ((("d", d), ("s", s)),))


def start(goal: Objective, count: int) -> np.ndarray:
    """First atoms [a, K]: half of them principal directions, the rest rows of W, spread evenly; as far as there are any."""
    _, principal = goal.spectrum.factors(max(1, count // 2))
    norms = np.sqrt(np.maximum(_losses(goal.matrix, goal.metric), 1e-300))
    rows = goal.matrix[np.argsort(-norms, kind="stable")]
    more = rows[np.linspace(0, len(rows) - 1, max(count - len(principal), 0)).round().astype(int)]
    return _unit(np.concatenate([principal, more]), goal.metric)


def omp(w: np.ndarray, atoms: np.ndarray, metric: Metric, nonzeros: int) -> np.ndarray:
    """Coefficients [OC, a] of every row of `w` [OC, K], `nonzeros` each; all rows take their steps together."""
    weighted = metric.times(atoms)
    gram, goals = weighted @ atoms.T, weighted @ w.T  # [a, a], [a, OC]
    scale = 1 / np.sqrt(np.maximum(np.diagonal(gram), 1e-300))
    each = np.arange(len(w))
    chosen = np.empty((len(w), 0), int)
    taken = np.zeros((len(w), len(atoms)), bool)
    solution = np.zeros((len(w), 0))
    for _ in range(min(nonzeros, len(atoms))):
        seen = goals.T - np.einsum("ns,nsa->na", solution, gram[chosen]) if chosen.shape[1] else goals.T
        value = np.where(taken, -1.0, np.abs(seen) * scale)
        best = value.argmax(axis=1)
        taken[each, best] = True
        chosen = np.concatenate([chosen, best[:, None]], axis=1)
        system = gram[chosen[:, :, None], chosen[:, None, :]]
        ridge = 1e-10 * np.einsum("nss->ns", system).max(axis=1, initial=1e-300)
        system = system + ridge[:, None, None] * np.eye(chosen.shape[1])
        right = np.take_along_axis(goals.T, chosen, 1)
        solution = np.linalg.solve(system, right[:, :, None])[:, :, 0]
    codes = np.zeros((len(w), len(atoms)))
    np.put_along_axis(codes, chosen, solution, 1)
    return codes


def ksvd(w: np.ndarray, codes: np.ndarray, atoms: np.ndarray, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    """Codes and atoms after one pass over the atoms; an atom that nobody uses becomes the row that is missed most."""
    codes, atoms = codes.copy(), atoms.copy()
    rest = w - codes @ atoms
    for a in range(len(atoms)):
        users = np.flatnonzero(codes[:, a])
        if not users.size:
            atoms[a] = _unit(rest[np.argmax(_losses(rest, metric))][None], metric)[0]
            continue
        own = rest[users] + codes[users, a][:, None] * atoms[a]
        u, v = Spectrum.of(own, metric).factors(1)
        codes[users, a], atoms[a] = u[:, 0], v[0]
        rest[users] = own - u @ v
    norms = np.sqrt(np.maximum(_losses(atoms, metric), 1e-300))
    return codes * norms, atoms / norms[:, None]


def _losses(rows: np.ndarray, metric: Metric) -> np.ndarray:
    return np.einsum("nk,nk->n", metric.times(rows), rows)


def _unit(rows: np.ndarray, metric: Metric) -> np.ndarray:
    return rows / np.sqrt(np.maximum(_losses(rows, metric), 1e-300))[:, None]


def dictionary_forms(shape: Shape, budget: float) -> list[Form]:
    """The form with RATIO atoms for each nonzero that holds the budget."""
    oc, ic, kh, kw = shape
    nonzeros = int(budget // (RATIO * ic * kh * kw + oc))
    return [Dictionary(RATIO * nonzeros, nonzeros)] if nonzeros > 0 and RATIO * nonzeros < oc * RATIO else []
