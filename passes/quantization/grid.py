"""Weights on a grid of integers: the scale, and which neighbour each weight is rounded to.

A weight w[n, k] of a layer becomes (q - z) * s with q an integer in low..high, s and z of its row n or of a group of
columns in it. Symmetric: z = 0, so 0 stays 0. What rounding does to the layer's output is, for an input with second
moments H = E[x x^T] (of the centred input where the bias makes up for the mean),

    E |(w - v) x|^2 = (w - v) H (w - v)^T

Scales: the largest |w| on the last integer, or the shrunk one of least sum_k H_kk (w_k - v_k)^2. Rounding, each a
better minimum of the form above than the one before:

    nearest     v_k nearest to w_k: the optimum only if H is diagonal
    feedback    column after column, the error of each is given to the columns that are still to come
    descent     feedback, then coordinate descent: each v_k in turn to the best integer given all others, until none
                moves; the choice between the two neighbours that AdaRound learns, made exactly

All take W [G, N, K] and H [G, K, K], G groups of a convolution. Weights that are 0 (pruned) stay 0: their columns take
no part, and what feedback gives them is passed on.

GPTQ: Frantar et al. 2022, arXiv:2210.17323. AdaRound: Nagel et al. 2020, arXiv:2004.10568. Coordinate descent: CDQuant,
Nair and Suggala 2024, arXiv:2406.17542. Joint with a mask: SparseGPT, arXiv:2301.00774.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Rounding = Literal["nearest", "feedback", "descent"]
Scales = Literal["max", "mse"]

SHRINK = np.linspace(0.5, 1.0, 26)  # of the scale of the largest weight, that `mse` tries
SWEEPS = 10  # of descent, at most; it ends when a sweep moves nothing
PANEL = 64  # columns whose updates of the others are gathered into one product
TINY = 1e-12


@dataclass(frozen=True)
class Grid:
    """(q - zero) * scale, q in low..high; `scale`, `zero` [G, N, K] or broadcast to it."""

    scale: np.ndarray = field(repr=False)
    zero: np.ndarray = field(repr=False)
    low: int = -127
    high: int = 127

    def codes(self, w: np.ndarray, columns: slice | int | np.ndarray = slice(None)) -> np.ndarray:
        """The integers q of `w`, which holds these columns; float64."""
        scale, zero = self._of(columns)
        return np.clip(np.rint(w / scale) + zero, self.low, self.high)

    def round(self, w: np.ndarray, columns: slice | int | np.ndarray = slice(None)) -> np.ndarray:
        """The nearest values of the grid."""
        scale, zero = self._of(columns)
        return (np.clip(np.rint(w / scale) + zero, self.low, self.high) - zero) * scale

    def _of(self, columns: slice | int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wide = self.scale.shape[-1] > 1
        return (self.scale[..., columns], self.zero[..., columns]) if wide else self._narrow(columns)

    def _narrow(self, columns: slice | int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (self.scale[..., 0], self.zero[..., 0]) if isinstance(columns, int) else (self.scale, self.zero)


def row_grid(w: np.ndarray, power: np.ndarray | None, scales: Scales = "mse", least: np.ndarray | None = None) -> Grid:
    """Symmetric int8, one scale a row. `w` [G, N, K]; `power` [G, K]: H_kk; `least` [G, N]: no scale below it."""
    scale = _float32(np.abs(w).max(axis=2, keepdims=True) / 127)
    scale = np.where(scale > TINY, scale, 1.0 if least is None else TINY)
    grid = Grid(scale, np.zeros((1, 1, 1)))
    if scales == "mse":
        grid = _shrunk(w, power, grid)
    if least is not None:
        grid = Grid(_float32(np.maximum(grid.scale, least[..., None])), grid.zero)
    return grid


def group_grid(
    w: np.ndarray, power: np.ndarray | None, group: int, bits: int, asymmetric: bool = False, scales: Scales = "mse"
) -> Grid:
    """One scale for `group` columns of a row. Symmetric: -(2^(b-1) - 1) ... 2^(b-1) - 1; asymmetric: 0 ... 2^b - 1."""
    starts = np.arange(0, w.shape[2], group)
    width = np.diff(np.r_[starts, w.shape[2]])
    high = (1 << bits) - 1 if asymmetric else (1 << (bits - 1)) - 1
    top = np.maximum.reduceat(np.maximum(w, 0) if asymmetric else np.abs(w), starts, axis=2)
    bottom = np.minimum.reduceat(np.minimum(w, 0), starts, axis=2) if asymmetric else np.zeros_like(top)
    scale = _float32((top - bottom) / high)
    scale = np.where(scale > TINY, scale, 1.0)
    zero = np.rint(-bottom / scale)
    grid = Grid(np.repeat(scale, width, axis=2), np.repeat(zero, width, axis=2), 0 if asymmetric else -high, high)
    return _shrunk(w, power, grid, starts) if scales == "mse" else grid


def _shrunk(w: np.ndarray, power: np.ndarray | None, grid: Grid, starts: np.ndarray | None = None) -> Grid:
    """The grid with each scale shrunk by the factor of `SHRINK` of least weighted square error."""
    importance = np.ones(w.shape[2]) if power is None else np.maximum(power, 0)[:, None, :]
    best, chosen = None, None
    for factor in SHRINK[::-1]:
        scale = _float32(grid.scale * factor)
        tried = Grid(scale, grid.zero, grid.low, grid.high)
        error = importance * np.square(tried.round(w) - w)
        if starts is None:
            error = error.sum(axis=2, keepdims=True)
        else:
            error = np.repeat(np.add.reduceat(error, starts, axis=2), np.diff(np.r_[starts, w.shape[2]]), axis=2)
        if best is None or chosen is None:
            best, chosen = error, scale
        else:
            better = error < best * (1 - 1e-9)
            best, chosen = np.where(better, error, best), np.where(better, scale, chosen)
    assert chosen is not None
    return Grid(chosen, grid.zero, grid.low, grid.high)


def _float32(scale: np.ndarray) -> np.ndarray:
    """As it will be stored, so that the integers fit the stored scale."""
    return scale.astype(np.float32).astype(np.float64)


def round_weights(
    w: np.ndarray, grid: Grid, keep: np.ndarray, rounding: Rounding, h: np.ndarray | None, t: np.ndarray | None = None
) -> np.ndarray:
    """`w` [G, N, K] on the grid, 0 where not `keep`. `t` [G, N, K]: the objective is v h v - 2 t v; None: t = w h."""
    nearest = np.where(keep, grid.round(w), 0.0)
    if rounding == "nearest" or h is None:
        return nearest
    t = w @ h if t is None else t
    given = np.where(keep, feedback(w, grid, keep, h), 0.0)
    # Feedback through a mask is an approximation; on a short row rounding to nearest may be better.
    better = (_objective(given, h, t) < _objective(nearest, h, t))[..., None]
    chosen = np.where(better, given, nearest)
    return chosen if rounding == "feedback" else descend(chosen, grid, keep, h, t)


def _objective(v: np.ndarray, h: np.ndarray, t: np.ndarray) -> np.ndarray:
    return np.einsum("gnk,gnk->gn", v @ h - 2 * t, v)


def feedback(w: np.ndarray, grid: Grid, keep: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Columns of most power first; what rounding one misses goes to the others by H's inverse. H positive definite."""
    order = np.argsort(-np.diagonal(h, axis1=1, axis2=2).mean(axis=0), kind="stable")
    w, keep = w[..., order].copy(), keep[..., order]
    # U with inv(H) = U^T U is inv(L) read from its end, where H read from its end is L L^T: no inverse that rounding made
    # indefinite has to be factored.
    lower = np.linalg.cholesky(h[:, order][:, :, order][:, ::-1, ::-1])
    upper = np.linalg.inv(lower)[:, ::-1, ::-1]
    out = np.zeros_like(w)
    for first in range(0, w.shape[2], PANEL):
        last = min(first + PANEL, w.shape[2])
        errors = np.zeros((*w.shape[:2], last - first))
        for k in range(first, last):
            out[..., k] = np.where(keep[..., k], grid.round(w[..., k], int(order[k])), 0.0)
            error = (w[..., k] - out[..., k]) / upper[:, k, k][:, None]
            w[..., k:last] -= error[..., None] * upper[:, None, k, k:last]
            errors[..., k - first] = error
        w[..., last:] -= errors @ upper[:, first:last, last:]
    result = np.empty_like(out)
    result[..., order] = out
    return result


def descend(
    v: np.ndarray, grid: Grid, keep: np.ndarray, h: np.ndarray, t: np.ndarray, sweeps: int = SWEEPS
) -> np.ndarray:
    """Coordinate descent of v h v - 2 t v on the grid from `v`; every row's objective falls or stays."""
    v = v.copy()
    diagonal = np.diagonal(h, axis1=1, axis2=2)
    for _ in range(sweeps):
        gradient, moved = t - v @ h, False  # afresh each sweep: no rounding gathers
        for first in range(0, v.shape[2], PANEL):
            last = min(first + PANEL, v.shape[2])
            changes = np.zeros((*v.shape[:2], last - first))
            for k in range(first, last):
                target = v[..., k] + gradient[..., k] / diagonal[:, k][:, None]
                change = np.where(keep[..., k], grid.round(target, k) - v[..., k], 0.0)
                # Of two integers equally good the one that is there stays.
                gain = change * (2 * gradient[..., k] - change * diagonal[:, k][:, None])
                change = np.where(gain > 1e-9 * np.abs(change * gradient[..., k]), change, 0.0)
                if change.any():
                    moved = True
                    v[..., k] += change
                    gradient[..., k:last] -= change[..., None] * h[:, None, k, k:last]
                    changes[..., k - first] = change
            gradient[..., last:] -= changes @ h[:, first:last, last:]
        if not moved:
            break
    return v
