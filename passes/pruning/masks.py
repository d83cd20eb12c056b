"""Masks from scores: unstructured, RxC blocks, or N of M along the input axis.

A score says how much each weight of W[OC, IC, KH, KW] is worth; a block b of |b| weights (a ragged last block has
fewer) is worth the mean of its weights' scores, and blocks are zeroed in ascending order of that (ties: graph order,
then row-major order) until zeros are the asked share of all weights, those counted that were zero before:

    layer    zeros(W) = share of the layer * |W| in every layer, what rounding to a block left carried to the next layer
    global   over all layers together, each keeping at least `floor` of its blocks, the most important ones
    N:M      of M consecutive weights along IC at one kernel position the N of largest score stay (a ragged rest keeps
             <= N)

The total misses sparsity * sum |W| by at most half a block, unless there were more zeros before. Drawing masks for what
is masked already changes nothing, because zero blocks come first and add no zero.

Blocks: Gray et al. 2017, "GPU kernels for block-sparse weights". N:M: Mishra et al. 2021, arXiv:2104.08378. Layer
collapse: Tanaka et al. 2020, arXiv:2006.05467.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sparsec.errors import RecipeError
from sparsec.passes.layers import block_sums, parse_block, spread_blocks

PRUNED = 0.05  # a layer with a larger share of zeros was pruned before: its zeros stay; fewer are accidents


@dataclass(frozen=True)
class Pattern:
    """Which weights live and die together: blocks of rows x columns, or `keep` of `group` along the input axis."""

    rows: int = 1
    columns: int = 1
    keep: int = 0  # N of N:M; 0: blocks
    group: int = 0  # M

    @classmethod
    def parse(cls, block: str = "1x1", nm: str = "") -> Pattern:
        """From the options `block=RxC` and `nm=N:M`. Raises RecipeError.

        >>> Pattern.parse("4x1").rows, Pattern.parse(nm="2:4").share
        (4, 0.5)
        """
        try:
            rows, columns = parse_block(block)
        except ValueError:
            expected = "RxC (output x input channels), such as 4x1"
            raise RecipeError(f"prune: block must be {expected}, got {block!r}") from None
        if not nm:
            return cls(rows, columns)
        keep, _, group = nm.partition(":")
        if not (keep.isdigit() and group.isdigit() and 0 < int(keep) < int(group)):
            raise RecipeError(f"prune: nm must be N:M with 0 < N < M, such as 2:4, got {nm!r}")
        return cls(1, 1, int(keep), int(group))

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}" if self.keep else f"{self.rows}x{self.columns}"

    @property
    def share(self) -> float:
        """The share of zeros that N:M implies; 0 for blocks."""
        return 1 - self.keep / self.group if self.keep else 0.0


def draw_masks(
    weights: Sequence[np.ndarray], scores: Sequence[np.ndarray], pattern: Pattern, sparsities: Sequence[float] | float
) -> list[np.ndarray]:
    """True where the weight stays, [OC, IC, KH, KW] each. `sparsities`: zero share of each layer (ignored for N:M)."""
    if pattern.keep:
        return [n_of_m_mask(score, pattern.keep, pattern.group) for score in scores]
    grids = [_grid(w, s, pattern) for w, s in zip(weights, scores, strict=True)]
    shares = [sparsities] * len(grids) if isinstance(sparsities, (int, float)) else list(sparsities)
    return _spread(_keep_by_layer(grids, shares), grids, weights, pattern)


def draw_masks_in_turn(weights: Iterable[np.ndarray], pattern: Pattern, sparsity: float) -> Iterator[np.ndarray]:
    """`draw_masks` by magnitude with one share for all, holding one layer at a time."""
    carry = 0.0
    for weight in weights:
        if pattern.keep:
            yield n_of_m_mask(magnitude(weight), pattern.keep, pattern.group)
            continue
        grid = _grid(weight != 0, magnitude(weight), pattern)
        keep, carry = _keep(grid, sparsity, carry)
        yield _spread([keep], [grid], [weight], pattern)[0]


def draw_masks_globally(
    weights: Sequence[np.ndarray], scores: Sequence[np.ndarray], pattern: Pattern, sparsity: float, floor: float
) -> list[np.ndarray]:
    """The same with one order over all layers, each keeping `floor` of its blocks. RecipeError if that is too many."""
    grids = [_grid(w, s, pattern) for w, s in zip(weights, scores, strict=True)]
    return _spread(_keep_globally(grids, sparsity, floor), grids, weights, pattern)


def magnitude(weight: np.ndarray) -> np.ndarray:
    """Scores w^2."""
    return np.square(weight, dtype=np.float64)


def supports(weight: np.ndarray, refit: bool) -> np.ndarray:
    """True where a weight may be nonzero: a refit fills zeros that are there by accident, so they do not count as zeros."""
    nonzero = weight != 0
    return np.ones_like(nonzero) if refit and nonzero.mean() >= 1 - PRUNED else nonzero


def n_of_m_mask(scores: np.ndarray, keep: int, group: int) -> np.ndarray:
    """True where the score's size is among the `keep` largest of its `group` consecutive input channels (ties: first)."""
    oc, ic, kh, kw = scores.shape
    groups = -(-ic // group)
    padded = np.full((oc, groups * group, kh, kw), -1.0)
    padded[:, :ic] = np.abs(scores)
    rank = np.argsort(np.argsort(-padded.reshape(oc, groups, group, kh, kw), axis=2, kind="stable"), axis=2)
    return (rank < keep).reshape(padded.shape)[:, :ic]


@dataclass(frozen=True)
class _Grid:
    """One layer's blocks in row-major order."""

    shape: tuple[int, ...]  # of the block grid
    weights: int
    score: np.ndarray  # importance of each block
    nonzeros: np.ndarray  # of each block: the zeros that zeroing it adds
    block: int  # weights of the largest block


def _grid(weight: np.ndarray, scores: np.ndarray, pattern: Pattern) -> _Grid:
    rows, columns = pattern.rows, pattern.columns
    size = block_sums(np.ones(weight.shape, np.int64), rows, columns)
    score = block_sums(scores.astype(np.float64, copy=False), rows, columns) / size
    nonzeros = block_sums((weight != 0).astype(np.int64), rows, columns)
    return _Grid(score.shape, weight.size, score.reshape(-1), nonzeros.reshape(-1), int(size.max()))


def _prefix(nonzeros: np.ndarray, more: float) -> int:
    """How many of the ordered blocks to zero for the number of new zeros nearest to `more`; the fewest on a tie."""
    sums = np.concatenate(([0], np.cumsum(nonzeros)))
    return int(np.argmin(np.abs(sums - more)))


def _spread(
    kept: Sequence[np.ndarray], grids: Sequence[_Grid], weights: Sequence[np.ndarray], pattern: Pattern
) -> list[np.ndarray]:
    blocks = [k.reshape(grid.shape) for k, grid in zip(kept, grids, strict=True)]
    shapes = [w.shape for w in weights]
    return [spread_blocks(b, pattern.rows, pattern.columns, shape) for b, shape in zip(blocks, shapes, strict=True)]


def _keep_by_layer(grids: Sequence[_Grid], sparsities: Sequence[float]) -> list[np.ndarray]:
    kept, carry = [], 0.0
    for grid, sparsity in zip(grids, sparsities, strict=True):
        keep, carry = _keep(grid, sparsity, carry)
        kept.append(keep)
    return kept


def _keep(grid: _Grid, sparsity: float, carry: float) -> tuple[np.ndarray, float]:
    """The blocks that stay, and how many zeros are missing: the next layer makes up for them."""
    order = np.argsort(grid.score, kind="stable")
    ordered = grid.nonzeros[order]
    more = sparsity * grid.weights + carry - (grid.weights - int(ordered.sum()))
    count = _prefix(ordered, more)
    keep = np.ones(order.size, bool)
    keep[order[:count]] = False
    # Clipped, so that a layer with too many zeros does not make the next one denser.
    return keep, float(np.clip(more - int(ordered[:count].sum()), -grid.block, grid.block))


def _keep_globally(grids: Sequence[_Grid], sparsity: float, floor: float) -> list[np.ndarray]:
    free = []  # of each layer: indices of the blocks that may be zeroed, all but the `floor` most important
    for grid in grids:
        order = np.argsort(grid.score, kind="stable")
        free.append(np.sort(order[: order.size - int(np.ceil(floor * order.size))]))
    score = np.concatenate([g.score[f] for g, f in zip(grids, free, strict=True)])
    nonzeros = np.concatenate([g.nonzeros[f] for g, f in zip(grids, free, strict=True)])
    total = sum(g.weights for g in grids)
    zeros = total - sum(int(g.nonzeros.sum()) for g in grids)
    more = sparsity * total - zeros
    if int(nonzeros.sum()) + max(int(g.nonzeros.max()) for g in grids) < more:
        most = (zeros + int(nonzeros.sum())) / total
        raise RecipeError(f"prune: floor={floor} allows at most sparsity={most:.3f}, got {sparsity}; lower the floor")
    order = np.argsort(score, kind="stable")
    zeroed = np.zeros(score.size, bool)
    zeroed[order[: _prefix(nonzeros[order], more)]] = True
    kept, start = [], 0
    for grid, f in zip(grids, free, strict=True):
        keep = np.ones(grid.score.size, bool)
        keep[f[zeroed[start : start + f.size]]] = False
        start += f.size
        kept.append(keep)
    return kept
