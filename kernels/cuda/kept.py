"""The stored form of weights most of which are zero in blocks, for products tile by tile (`block_sparse`).

A matrix [N, K] is cut into groups of R rows, each with its own list of kept columns: units of `width` neighbours of which
any weight of the group is not zero. A list is filled up to whole steps of `depth` columns, and its weights lie step by step
as a tile's product reads them:

    pointers[g] <= s < pointers[g + 1]              the steps of group g; groups with most steps come first
    columns[s][unit]                                first column of a unit of step s, -1 where the list has ended
    values[s][r][unit * width + c]                  w[rows[g][r], columns[s][unit] + c], 0 beyond K and behind the end

`order[g]`: rows order[g] * R ... are group g's; or, where rows were gathered into groups by likeness, `rows[g][r]` are, N for
those that fill up the last group.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Kept:
    """A matrix in stored form; see the module's head."""

    height: int  # R
    width: int
    depth: int
    shape: tuple[int, int]  # N, K
    pointers: np.ndarray = field(repr=False)  # int32 [groups + 1]
    columns: np.ndarray = field(repr=False)  # int32 [steps, depth / width]
    values: np.ndarray = field(repr=False)  # float32 [steps, R, depth]
    order: np.ndarray = field(repr=False)  # int32 [groups]
    rows: np.ndarray | None = field(repr=False, default=None)  # int32 [groups, R]

    @property
    def groups(self) -> int:
        """Groups of rows."""
        return self.order.size

    @property
    def steps(self) -> int:
        """Of all groups."""
        return int(self.pointers[-1])


def unit_mask(w: np.ndarray, width: int) -> np.ndarray:
    """Which units of each row hold any nonzero: bool [N, K / width], the last unit may be short."""
    n, k = w.shape
    padded = np.zeros((n, -(-k // width) * width), bool)
    padded[:, :k] = w != 0
    return np.asarray(padded.reshape(n, -1, width).any(axis=2))


def group_mask(mask: np.ndarray, height: int, rows: np.ndarray | None = None) -> np.ndarray:
    """Which units each group of rows keeps, of `unit_mask`: bool [groups, units]. `rows`: see `Kept`."""
    n, units = mask.shape
    groups = -(-n // height)
    padded = np.zeros((max(groups * height, n + 1), units), bool)
    padded[:n] = mask
    if rows is not None:
        return np.asarray(padded[rows].any(axis=1))
    return np.asarray(padded[: groups * height].reshape(groups, height, units).any(axis=1))


def steps_of(kept: np.ndarray, width: int, depth: int) -> np.ndarray:
    """Steps of each group: int [groups]."""
    return np.asarray(-(-kept.sum(axis=1) * width // depth))


def pack(w: np.ndarray, height: int, width: int, depth: int, rows: np.ndarray | None = None) -> Kept:
    """w [N, K] to stored form. `rows`: int [groups, R], which rows are a group, by default neighbours."""
    n, k = w.shape
    kept = group_mask(unit_mask(w, width), height, rows)
    counts = steps_of(kept, width, depth)
    order = np.argsort(-counts, kind="stable").astype(np.int32)
    kept = kept[order]
    groups, units = kept.shape
    pointers = np.concatenate([[0], np.cumsum(counts[order])]).astype(np.int32)
    each = depth // width

    group, unit = np.nonzero(kept)
    position = np.arange(group.size) - np.repeat(np.cumsum(kept.sum(axis=1)) - kept.sum(axis=1), kept.sum(axis=1))
    slot = pointers[group].astype(np.int64) * each + position
    columns = np.full(int(pointers[-1]) * each, -1, np.int32)
    columns[slot] = unit * width

    whole = np.zeros((max(groups * height, n + 1), units * width), np.float32)
    whole[:n, :k] = w
    members = rows[order] if rows is not None else order[:, None] * height + np.arange(height)
    values = np.zeros((int(pointers[-1]) * each, height, width), np.float32)
    by_unit = whole.reshape(whole.shape[0], units, width)
    values[slot] = by_unit[members[group], unit[:, None]]
    values = values.reshape(-1, each, height, width).transpose(0, 2, 1, 3).reshape(-1, height, depth)
    return Kept(
        height, width, depth, (n, k), pointers, columns.reshape(-1, each), np.ascontiguousarray(values), order,
        None if rows is None else np.ascontiguousarray(rows[order], np.int32),
    )  # fmt: skip


def unpack(packed: Kept) -> np.ndarray:
    """The inverse of `pack`: w [N, K]."""
    n, k = packed.shape
    height, width = packed.height, packed.width
    members = packed.rows if packed.rows is not None else packed.order[:, None] * height + np.arange(height)
    whole = np.zeros((max(packed.groups * height, n + 1), k + width), packed.values.dtype)
    group = np.repeat(np.arange(packed.groups), np.diff(packed.pointers))
    for unit in range(packed.depth // width):
        first = packed.columns[:, unit]
        there = first >= 0
        for c in range(width):
            rows, column = members[group[there]], first[there, None] + c
            whole[rows, column] = packed.values[there, :, unit * width + c]
    return whole[:n, :k]
