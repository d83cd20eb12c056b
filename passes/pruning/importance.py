"""What each weight of a layer is worth: scores for `sparsec.passes.pruning.masks`, larger means keep.

For W[OC, K] with the input's second moments H = E[x x^T] (of x - E[x] where the bias takes up the mean):

    magnitude       w^2                                 Han et al. 2015, arXiv:1506.02626
    activation      w^2 * E[x_j^2]                      Wanda, Sun et al. 2023, arXiv:2306.11695 (squared)
    second order    the error tr(dW H dW^T) that zeroing adds if the weights left are re-optimized at once: OBS,
                    Hassibi & Stork 1993; rows and blocks: OBC, arXiv:2208.11580, SparseGPT, arXiv:2301.00774

Second order is a trace of greedy eliminations. R rows of one block row share their support, so they share one inverse
Z = H_SS^-1 over the columns S still alive. A unit u (a column; C of them where blocks are RxC) costs and does

    loss(u) = sum_{j in u} sum_r w_rj^2 / Z_jj          w_r -= w_rj / Z_jj * Z_j           Z -= Z_j Z_j^T / Z_jj

Per step the cheapest `WINDOW` units are eliminated greedily and exactly among themselves, half of them at most, then
all other columns are updated by one matrix product. Eliminating in ascending order makes the masks of all sparsities
nested: a unit's score is the largest loss up to its elimination, so one trace serves every sparsity, and scores compare
across the rows of a layer. N:M: a weight whose group has lost M - N in its row may not go; its score is infinite.
A layer whose traces would take more than `LIMIT` operations gets the losses of the first step instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsec.passes.pruning.masks import Pattern

WINDOW = 128  # candidate units of one step
STEPS = 12  # a step eliminates at most this part of what is alive
CHUNK = 1 << 28  # bytes of inverses at once
LIMIT = 1.5e12  # floating-point operations of one layer's traces
KINDS = ("magnitude", "activation", "second-order")


def activation_scores(weight: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """w^2 E[x^2] for [OC, IC, KH, KW] and gram [K, K]; grouped: [G, K, K]."""
    oc = weight.shape[0]
    norms = np.diagonal(gram, axis1=-2, axis2=-1).reshape(-1, gram.shape[-1])  # [G, K]
    rows = np.repeat(norms, oc // norms.shape[0], axis=0)
    return np.square(weight, dtype=np.float64) * rows.reshape(weight.shape)


@dataclass(frozen=True)
class Units:
    """The columns of [OC, IC, KH, KW] in the order (KH, KW, IC), so that those of a unit are neighbours.

    `order` [K']: the column at each place, -1 where a ragged last unit is filled up with one that is zero and that
    nothing else is correlated with. `span`: columns of a unit. `group` [K']: of N:M; without it each column its own.
    """

    order: np.ndarray
    span: int
    group: np.ndarray

    @classmethod
    def of(cls, shape: tuple[int, ...], pattern: Pattern) -> Units:
        """For a weight of `shape`."""
        _, ic, kh, kw = shape
        span = 1 if pattern.keep else pattern.columns
        wide = -(-ic // span) * span
        columns = np.arange(ic * kh * kw).reshape(ic, kh * kw).T
        order = np.pad(columns, ((0, 0), (0, wide - ic)), constant_values=-1).reshape(-1)
        position, channel = np.divmod(np.arange(order.size), wide)
        size = max(pattern.group, 1)
        return cls(order, span, position * -(-wide // size) + channel // size)

    @property
    def real(self) -> np.ndarray:
        """The places that hold a column."""
        return np.flatnonzero(self.order >= 0)

    def spread(self, square: np.ndarray) -> np.ndarray:
        """`square` [K, K] in this order, the identity where there is no column; [K', K']."""
        made = np.eye(self.order.size)
        columns = self.order[self.real]
        made[np.ix_(self.real, self.real)] = square[np.ix_(columns, columns)]
        return made


def second_order_scores(
    weight: np.ndarray, hessian: np.ndarray, pattern: Pattern, rows: np.ndarray | None = None
) -> np.ndarray:
    """Scores [OC, IC, KH, KW] from the traces of eliminations; `hessian` [K, K] positive definite.

    `rows` [OC]: how much an output channel's squared error counts (default 1 each).
    """
    oc, ic, kh, kw = weight.shape
    k, height = ic * kh * kw, pattern.rows
    units = Units.of(weight.shape, pattern)
    order, real, span = units.order, units.real, units.span
    w = np.zeros((-(-oc // height) * height, order.size), np.float32)
    w[:oc, real] = weight.reshape(oc, k)[:, order[real]]
    if rows is not None:
        w[:oc] *= np.sqrt(rows)[:, None]
    w = w.reshape(-1, height, order.size)
    inverse = np.linalg.inv(units.spread(hessian))
    scale = float(np.diagonal(inverse).mean())  # float32 from here on: keep away from its limits
    inverse = ((inverse + inverse.T) / (2 * scale)).astype(np.float32)
    trace = _Trace(inverse, span, pattern.keep, units.group)
    scores = np.empty((w.shape[0], order.size))
    size = max(1, CHUNK // (4 * order.size**2))
    exact = w.shape[0] * float(order.size) ** 3 <= LIMIT
    for start in range(0, w.shape[0], size):
        part = w[start : start + size]
        scores[start : start + size] = trace.run(part.copy()) if exact else trace.first(part)
    counts = np.minimum(height, oc - height * np.arange(w.shape[0]))
    scores /= scale * span * counts[:, None]  # per weight, as scores of blocks are means
    result = np.empty((oc, k))
    result[:, order[real]] = np.repeat(scores, height, axis=0)[:oc, real]
    return result.reshape(weight.shape)


class _Trace:
    """Eliminations of block rows w [G, R, K] over one inverse [K, K], in units of `span` neighbouring columns."""

    def __init__(self, inverse: np.ndarray, span: int, keep: int, group: np.ndarray) -> None:
        self._inverse, self._span = inverse, span
        self._group = group if keep else None  # N:M: each column's group
        self._quota = np.maximum(np.bincount(group) - keep, 0) if keep else None  # what a group may lose
        self._least = 1e-7 * float(np.diagonal(inverse).max())

    def first(self, w: np.ndarray) -> np.ndarray:
        """Losses [G, K] of eliminating one unit alone."""
        return np.repeat(self._losses(w, np.diagonal(self._inverse)[None]), self._span, axis=1)

    def run(self, w: np.ndarray) -> np.ndarray:
        """Scores [G, K]; `w` is overwritten."""
        g, s = w.shape[0], self._span
        z = np.repeat(self._inverse[None], g, axis=0)
        index = np.repeat(np.arange(w.shape[2] // s)[None], g, axis=0)  # the unit at each place
        dead = np.zeros(index.shape, bool)
        scores = np.full(index.shape, np.inf)
        level = np.zeros(g)
        quota = None if self._quota is None else np.repeat(self._quota[None], g, axis=0)
        left = index.shape[1] if self._quota is None else int(self._quota.sum())
        while left:
            loss = np.where(dead, np.inf, self._losses(w, np.diagonal(z, axis1=1, axis2=2)))
            alive = int(index.shape[1] - dead[0].sum())
            size, picks = min(WINDOW, alive), max(1, min(WINDOW // 2, alive // STEPS, left))
            if quota is not None:
                assert self._group is not None
                loss[np.take_along_axis(quota, self._group[index], 1) == 0] = np.inf
                # So many can be picked whatever the groups are, or else one at a time.
                full = int(np.isfinite(loss).sum(axis=1).min()) >= size
                picks = min(picks, max(1, size // int(np.bincount(self._group).max()))) if full else 1
            window = np.argpartition(loss, size - 1, axis=1)[:, :size] if size < loss.shape[1] else _places(loss)
            window = np.sort(window, axis=1)
            chosen, losses = self._pick(w, z, window, picks, dead, index, quota)
            for place, cost in zip(chosen.T, losses.T, strict=True):
                level = np.maximum(level, cost)
                scores[np.arange(g), index[np.arange(g), place]] = level
            np.put_along_axis(dead, chosen, True, axis=1)
            left -= picks
            if left:
                self._downdate(w, z, _columns(chosen, s))
                if int(dead[0].sum()) > 0.3 * index.shape[1]:
                    w, z, index, dead = self._compact(w, z, index, dead)
        return np.repeat(scores, s, axis=1)

    def _losses(self, w: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
        loss = np.square(w).sum(axis=1) / np.maximum(diagonal, self._least)
        return loss.reshape(loss.shape[0], -1, self._span).sum(axis=2)

    def _pick(
        self, w: np.ndarray, z: np.ndarray, window: np.ndarray, picks: int, dead: np.ndarray, index: np.ndarray,
        quota: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """Greedy and exact among the units at `window` [G, V]: places [G, picks] and what each cost. Spends `quota`."""
        g, each = w.shape[0], np.arange(w.shape[0])
        columns = _columns(window, self._span)
        zc = z[each[:, None, None], columns[:, :, None], columns[:, None, :]]
        wc = np.take_along_axis(w, columns[:, None, :], 2)
        diagonal = np.diagonal(zc, axis1=1, axis2=2).copy()
        gone = np.take_along_axis(dead, window, 1)
        units = np.take_along_axis(index, window, 1)
        chosen, losses = np.empty((g, picks), np.int64), np.empty((g, picks))
        # Z less one outer product a pick: only the rows that are picked are ever needed.
        outer, n = np.empty((g, picks * self._span, zc.shape[1]), zc.dtype), 0
        for step in range(picks):
            loss = self._losses(wc, diagonal)
            loss[gone] = np.inf
            if quota is not None:
                assert self._group is not None
                loss[np.take_along_axis(quota, self._group[units], 1) == 0] = np.inf
            best = loss.argmin(axis=1)
            chosen[:, step], losses[:, step] = window[each, best], loss[each, best]
            gone[each, best] = True
            if quota is not None and self._group is not None:
                quota[each, self._group[units[each, best]]] -= 1
            for j in range(self._span):
                c = best * self._span + j
                column = zc[each, c]
                column -= np.matmul(outer[each, :n, c][:, None], outer[:, :n])[:, 0]
                pivot = np.maximum(column[each, c], self._least)
                wc -= (wc[each, :, c] / pivot[:, None])[:, :, None] * column[:, None, :]
                outer[:, n] = column / np.sqrt(pivot)[:, None]
                diagonal -= np.square(outer[:, n])
                n += 1
        return chosen, losses

    def _downdate(self, w: np.ndarray, z: np.ndarray, columns: np.ndarray) -> None:
        """Eliminate `columns` [G, p] jointly, in place: they are zero afterwards."""
        p = columns.shape[1]
        each = np.arange(len(z))[:, None, None]
        blocks = z[each, columns[:, :, None], columns[:, None, :]].astype(np.float64)
        blocks.reshape(-1, p * p)[:, :: p + 1] += self._least * 1e-2
        inverses = np.linalg.inv(blocks).astype(np.float32)
        for i, s in enumerate(columns):
            rows = z[i, s]  # [p, K]
            solved = inverses[i] @ rows
            w[i] -= w[i][:, s] @ solved
            z[i] -= rows.T @ solved
            w[i][:, s] = 0
            z[i, s] = 0
            z[i][:, s] = 0

    def _compact(
        self, w: np.ndarray, z: np.ndarray, index: np.ndarray, dead: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Without the dead places."""
        rest = np.nonzero(~dead)[1].reshape(len(dead), -1)
        columns = _columns(rest, self._span)
        smaller = np.stack([z[i][np.ix_(c, c)] for i, c in enumerate(columns)])
        kept = np.take_along_axis(index, rest, 1)
        return np.take_along_axis(w, columns[:, None, :], 2), smaller, kept, np.zeros(rest.shape, bool)


def _columns(units: np.ndarray, span: int) -> np.ndarray:
    """The columns [G, V*span] of the units at places [G, V]."""
    return (units[:, :, None] * span + np.arange(span)).reshape(len(units), -1)


def _places(loss: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(loss.shape[1])[None], len(loss), axis=0)
