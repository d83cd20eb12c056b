"""R x C blocks: the stored form of a matrix most of which is zero.

A matrix [N, K] is cut into groups of R rows, the last one filled up with zero rows, and each group into blocks of C columns.
Of each group the blocks that hold any nonzero are stored, in the order of their columns:

    pointers[g] <= b < pointers[g + 1]                        the blocks of group g
    values[b][c][r] = w[g * R + r, index[b] + c]              index[b]: the block's first column

R rows share one index, and the R values of a column lie together: a multiply-add takes them from one vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Blocks:
    """A matrix in stored form; see the module's head."""

    rows: int  # R
    columns: int  # C
    pointers: np.ndarray  # int32 [groups + 1]
    index: np.ndarray  # uint16, int32 beyond 65,536 columns [blocks]
    values: np.ndarray  # float32, or int32 words [blocks, C, R]
    shape: tuple[int, int]  # N, K

    @property
    def groups(self) -> int:
        """Groups of rows."""
        return self.pointers.size - 1

    @property
    def blocks(self) -> int:
        """Stored blocks."""
        return int(self.pointers[-1])

    @property
    def bytes(self) -> int:
        """Stored bytes."""
        return self.pointers.nbytes + self.index.nbytes + self.values.nbytes


def fitting(columns: int, extent: int) -> int:
    """Columns of a block where `extent` of them are neighbours: a ragged last block is stored by single columns."""
    return columns if extent % columns == 0 else 1


def index_type(columns: int) -> type[np.generic]:
    """The type of indices into `columns` columns."""
    return np.uint16 if columns <= 1 << 16 else np.int32


def cut(w: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """w [N, K] as [groups, R, K / C, C]; C divides K."""
    n, k = w.shape
    groups = -(-n // rows)
    padded = np.zeros((groups * rows, k), w.dtype)
    padded[:n] = w
    return padded.reshape(groups, rows, k // columns, columns)


def kept(w: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Which blocks of w [N, K] hold any nonzero: bool [groups, K / C]."""
    return np.asarray(cut(w != 0, rows, columns).any(axis=(1, 3)))


def pack(w: np.ndarray, rows: int, columns: int, every: bool = False) -> Blocks:
    """w [N, K] in stored form; `every`: zero blocks too, which makes it the stored form of a dense matrix."""
    mask = kept(w, rows, columns)
    group, block = np.nonzero(mask | every)
    pointers = np.concatenate([[0], np.cumsum((mask | every).sum(axis=1))]).astype(np.int32)
    values = cut(w, rows, columns)[group, :, block, :].transpose(0, 2, 1)
    index = (block * columns).astype(index_type(w.shape[1]))
    element = np.int32 if w.dtype == np.int32 else np.float32
    return Blocks(rows, columns, pointers, index, np.ascontiguousarray(values, element), w.shape)


def unpack(packed: Blocks) -> np.ndarray:
    """The inverse of `pack`: w [N, K]."""
    n, k = packed.shape
    w = np.zeros((packed.groups, packed.rows, k), packed.values.dtype)
    group = np.repeat(np.arange(packed.groups), np.diff(packed.pointers))
    for c in range(packed.columns):
        w[group, :, packed.index.astype(np.int64) + c] = packed.values[:, c]
    return w.reshape(packed.groups * packed.rows, k)[:n]
