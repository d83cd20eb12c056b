"""Prune and grow: swap a weight that is there for one that is not, as long as the layer's error falls.

A mask drawn by one order of all weights need not be the best one for the weights that are refitted under it. For rows
w_r with common support S, moments H and goals t_r (`sparsec.passes.pruning.reconstruct`), the error of the refitted rows is
E(S) = const - sum_r t_r,S H_SS^-1 t_r,S. A principal pivot transform on S of H, with t beside it, holds all that a swap
needs:

    M = [ Z        Z H_SN             ]     B = [ w_S = Z t_S         ]     Z = H_SS^-1
        [ -H_NS Z  H_NN - H_NS Z H_SN ]         [ g_N = t_N - H_NS w_S ]

    growing u     E falls by  sum_r B_r,u M_uu^-1 B_r,u       (g^2 over what u adds that S does not hold yet)
    pruning u     E rises by  sum_r B_r,u M_uu^-1 B_r,u       (w^2 / Z_uu, the loss of optimal brain surgeon)

and either is one pivot on u, a rank-|u| update. A step grows the unit with the largest fall less the least rise, prunes
what then costs least, exactly, and is taken back if that gains nothing. So E falls with every swap. u is a column, or C
neighbouring ones for RxC blocks; under N:M both are of one group. The share of zeros of every row of blocks stays.

Swaps by reconstruction error: DSnoT, Zhang et al. 2023, arXiv:2310.08915, which estimates both from means and variances
and leaves the weights; there the sum of errors falls, here the refitted optimum.
"""

from __future__ import annotations

import numpy as np

from sparsec.passes.pruning.importance import LIMIT, Units
from sparsec.passes.pruning.masks import Pattern

WINDOW = 96  # units among which swaps are made one by one; the rest follows in one product
ROUNDS = 6  # windows, at most
PATIENCE = 3  # steps that gained nothing, one after another
GAIN = 0.01  # a swap pays if pruning costs less than growing gained by this part
CHUNK = 1 << 27  # bytes of tableaus at once


def regrow(
    mask: np.ndarray, hessian: np.ndarray, goals: np.ndarray, shape: tuple[int, ...], pattern: Pattern
) -> np.ndarray:
    """A mask [N, K] with as many zeros in each row of blocks and no larger refitted error than `mask` [N, K].

    hessian: [K, K] positive definite; goals: [N, K]; shape: (N, IC, KH, KW) of the rows. Rows of blocks that are empty,
    full, or no blocks stay as they are, and so do layers that are too large (`sparsec.passes.pruning.importance.LIMIT`).
    """
    units, height = Units.of(shape, pattern), pattern.rows
    if -(-len(mask) // height) * float(units.order.size) ** 3 > LIMIT:
        return mask
    inner = units.spread(hessian)
    scale = float(np.diagonal(hessian).mean()) or 1.0
    inner /= scale
    rows = -(-len(mask) // height)
    t = np.zeros((rows * height, units.order.size))
    t[: len(mask), units.real] = goals[:, units.order[units.real]] / scale
    t = t.reshape(rows, height, -1)
    support = np.zeros((rows * height, units.order.size), bool)
    support[: len(mask), units.real] = mask[:, units.order[units.real]]
    support[len(mask) :] = support[len(mask) - 1]
    support = support.reshape(rows, height, -1)
    alive = np.logical_or.reduce(support[:, 0].reshape(rows, -1, units.span), axis=2)  # [G, U]
    wide = np.repeat(alive, units.span, axis=1)
    wide[:, units.order < 0] = False
    whole = (support == wide[:, None]).all(axis=(1, 2)) & alive.any(axis=1) & ~alive.all(axis=1)
    chosen, size = np.flatnonzero(whole), max(1, CHUNK // (4 * units.order.size**2))
    for start in range(0, len(chosen), size):
        part = chosen[start : start + size]
        alive[part] = _Tableaus(inner, t[part], alive[part], units, bool(pattern.keep)).swapped()
    changed = np.repeat(np.repeat(alive, units.span, axis=1), height, axis=0)[: len(mask)]
    result = mask.copy()
    swapped = np.repeat(whole, height)[: len(mask)]
    result[np.ix_(swapped, units.order[units.real])] = changed[swapped][:, units.real]
    return result


class _Tableaus:
    """The pivot transforms M [G, K, K] and B [G, K, R] of rows of blocks with supports `alive` [G, U]."""

    def __init__(self, hessian: np.ndarray, goals: np.ndarray, alive: np.ndarray, units: Units, groups: bool) -> None:
        self._span, self._alive = units.span, alive.copy()
        self._group = units.group[:: units.span] if groups else np.zeros(alive.shape[1], np.int64)
        self._fixed = (units.order < 0).reshape(-1, units.span).any(axis=1)  # ragged, of fewer weights
        self._groups = groups
        count, height, k = goals.shape
        self._m, self._b = np.empty((count, k, k), np.float32), np.empty((count, k, height), np.float32)
        for g in range(count):
            inside = np.repeat(alive[g], units.span)
            s, n = np.flatnonzero(inside), np.flatnonzero(~inside)
            z = np.linalg.inv(hessian[np.ix_(s, s)])
            v, w = z @ hessian[np.ix_(s, n)], z @ goals[g][:, s].T
            self._m[g][np.ix_(s, s)], self._m[g][np.ix_(s, n)], self._m[g][np.ix_(n, s)] = z, v, -v.T
            self._m[g][np.ix_(n, n)] = hessian[np.ix_(n, n)] - hessian[np.ix_(n, s)] @ v
            self._b[g, s], self._b[g, n] = w, goals[g][:, n].T - hessian[np.ix_(n, s)] @ w

    def swapped(self) -> np.ndarray:
        """The supports [G, U] after all swaps that pay."""
        going = np.arange(len(self._alive))
        for _ in range(ROUNDS):
            window = self._window(going)
            places = (window[:, :, None] * self._span + np.arange(self._span)).reshape(len(going), -1)
            m = self._m[going[:, None, None], places[:, :, None], places[:, None, :]]
            b = self._b[going[:, None], places]
            before = np.take_along_axis(self._alive[going], window, 1)
            after = _swaps(m, b, before.copy(), self._group[window], self._fixed[window], self._span)
            for g, units, moved in zip(going.tolist(), window, before != after, strict=True):
                self._alive[g, units[moved]] ^= True
                self._pivot(g, (units[moved][:, None] * self._span + np.arange(self._span)).reshape(-1))
            going = going[(before != after).any(axis=1)]
            if not going.size:
                break
        return self._alive

    def _window(self, going: np.ndarray) -> np.ndarray:
        """The units [G, V] to look at: those inside that cost least and those outside that gain most, half of each; of
        N:M the groups where the one is most above the other."""
        alive = self._alive[going]
        changes = _changes(self._m[going], self._b[going], self._span)
        low, high = np.where(alive, changes, np.inf), np.where(alive, np.inf, -changes)
        if self._groups:
            priority = _ranks(_least(low, self._group) + _least(high, self._group))[:, self._group]
        else:
            priority = np.where(alive, _ranks(low), _ranks(high))
        return np.argsort(priority, axis=1, kind="stable")[:, :WINDOW]

    def _pivot(self, g: int, columns: np.ndarray) -> None:
        """Move `columns` in or out at once: the transform of M[g] and B[g] on them."""
        m, b = self._m[g], self._b[g]
        inverse = np.linalg.inv(m[np.ix_(columns, columns)].astype(np.float64)).astype(np.float32)
        left, rows, goals = m[:, columns].copy(), inverse @ m[columns], inverse @ b[columns]
        m -= left @ rows
        b -= left @ goals
        m[columns], b[columns] = rows, goals
        m[:, columns] = -left @ inverse
        m[np.ix_(columns, columns)] = inverse


def _swaps(
    m: np.ndarray, b: np.ndarray, alive: np.ndarray, group: np.ndarray, fixed: np.ndarray, span: int
) -> np.ndarray:
    """`alive` [G, V] after swaps one by one; m [G, K, K] and b [G, K, R] are of these units alone and overwritten.

    group, fixed: [G, V], of each unit.
    """
    result, rows, tried = alive.copy(), np.arange(len(alive)), fixed.copy()
    failed = np.zeros(len(rows), np.int64)
    for _ in range(alive.shape[1]):
        each, changes = np.arange(len(rows)), _changes(m, b, span)
        low = np.where(alive & ~fixed, changes, np.inf)
        least = np.take_along_axis(_least(low, group), group, 1)
        value = np.where(alive | tried | ~np.isfinite(least), -np.inf, changes - np.where(np.isfinite(least), least, 0))
        grown = value.argmax(axis=1)
        open_, gain = np.isfinite(value[each, grown]), changes[each, grown]
        _pivot_each(m, b, grown, span)
        losses = np.where(alive & ~fixed & (group == group[each, grown][:, None]), _changes(m, b, span), np.inf)
        pruned = losses.argmin(axis=1)
        pays = open_ & (losses[each, pruned] < (1 - GAIN) * gain)
        _pivot_each(m, b, np.where(pays, pruned, grown), span)
        alive[each[pays], grown[pays]], alive[each[pays], pruned[pays]] = True, False
        result[rows] = alive
        tried[each, grown] = True
        tried[pays] = fixed[pays]
        failed = np.where(pays, 0, failed + 1)
        going = open_ & (failed < PATIENCE)
        if not going.any():
            break
        if not going.all():
            m, b, alive, group, fixed = m[going], b[going], alive[going], group[going], fixed[going]
            rows, tried, failed = rows[going], tried[going], failed[going]
    return result


def _changes(m: np.ndarray, b: np.ndarray, span: int) -> np.ndarray:
    """What pivoting on each unit does to the error, [G, U]: its fall for units outside, its rise for those inside."""
    if span == 1:
        return np.square(b).sum(axis=2) / np.diagonal(m, axis1=1, axis2=2)
    of = np.arange(m.shape[1]).reshape(-1, span)
    blocks, goals = m[:, of[:, :, None], of[:, None, :]], b.reshape(len(b), -1, span, b.shape[2])
    return (goals * np.linalg.solve(blocks, goals)).sum(axis=(2, 3))


def _least(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The least of `values` [G, U] in every group, [G, groups]; `group` [U] or [G, U]."""
    least = np.full((len(values), int(group.max()) + 1), np.inf)
    np.minimum.at(least, (np.arange(len(values))[:, None], np.broadcast_to(group, values.shape)), values)
    return least


def _ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value in its row, the least first."""
    return np.argsort(np.argsort(values, axis=1, kind="stable"), axis=1, kind="stable")


def _pivot_each(m: np.ndarray, b: np.ndarray, unit: np.ndarray, span: int) -> None:
    """Move `unit` [G] of each row in or out, a column after another."""
    each = np.arange(len(m))
    for j in range(span):
        c = unit * span + j
        pivot, column = m[each, c, c][:, None], m[each, :, c]
        row, goal = m[each, c] / pivot, b[each, c] / pivot
        m -= column[:, :, None] * row[:, None, :]
        b -= column[:, :, None] * goal[:, None, :]
        m[each, c], b[each, c] = row, goal
        m[each, :, c] = -column / pivot
        m[each, c, c] = 1 / pivot[:, 0]
