"""The stored forms of weights: dense or R x C blocks, each with its packing and unpacking."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Format:
    """A row of the table: how weights are stored. `rows` x `columns` is the block; dense has no index."""

    name: str
    op: str
    format: str
    dtype: str
    rows: int
    columns: int
    text: str

    @property
    def sparse(self) -> bool:
        """Whether blocks of zeros are left out."""
        return self.format != "dense"


def _format(rows: int, columns: int) -> Format:
    block = f"{rows}x{columns}"
    what = "unstructured zeros" if block == "1x1" else f"{block} blocks (output x input channels)"
    return Format(f"conv_f32_{block}", "Conv", block, "float32", rows, columns, f"convolution, {what}")


DENSE = Format("conv_f32_dense", "Conv", "dense", "float32", 0, 1, "convolution, dense weights")
TABLE: tuple[Format, ...] = (
    DENSE,
    *(_format(r, c) for r, c in ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (4, 4), (8, 4), (1, 4))),
)


@dataclass(frozen=True)
class Packed:
    """Weights in stored form. `live`: panel rows that are packed, as tap numbers; `depth` of them are one pass.

    Groups follow each other within a pass: number `p * groups + g` is group g of pass p.
    """

    rows: int
    columns: int
    sparse: bool
    depth: int
    live: np.ndarray  # int32 [K']
    pointers: np.ndarray  # int32 [passes * groups + 1], in blocks
    index: np.ndarray  # uint16 (int32 beyond 65,536 rows) [blocks], panel rows
    values: np.ndarray  # float32, [block][C][R] or [k][R] by group
    shape: tuple[int, int]  # OC, K

    @property
    def groups(self) -> int:
        """Groups of rows, the last, smaller one included."""
        return -(-self.shape[0] // self.rows)

    @property
    def passes(self) -> int:
        """Passes over the panel."""
        return (self.pointers.size - 1) // self.groups

    @property
    def blocks(self) -> int:
        """Stored blocks."""
        return int(self.pointers[-1])

    @property
    def bytes(self) -> int:
        """Stored bytes."""
        return self.values.nbytes + (self.index.nbytes + self.pointers.nbytes if self.sparse else 0)


def as_matrix(w: np.ndarray) -> np.ndarray:
    """[OC, IC, KH, KW] -> [OC, K], taps in (kh, kw, ic) order: the input channels of one kernel position are neighbours."""
    return np.ascontiguousarray(w.transpose(0, 2, 3, 1).reshape(w.shape[0], -1))


def pack(w: np.ndarray, form: Format, rows: int | None = None, depth: int = 0) -> Packed:
    """Dense [OC, IC, KH, KW] to stored form. `rows`: the register tile's height for dense weights.

    `depth`: panel rows of one pass, rounded up to whole blocks; 0: all.
    """
    matrix = as_matrix(w)
    oc, taps = matrix.shape
    height = form.rows or rows or 1
    width = form.columns if w.shape[1] % form.columns == 0 else 1  # a ragged last block is stored by single columns
    live = np.arange(taps, dtype=np.int32)
    if form.sparse:
        live = np.flatnonzero(matrix.any(axis=0).reshape(-1, width).any(axis=1).repeat(width)).astype(np.int32)
    padded = np.zeros((-(-oc // height) * height, live.size), np.float32)  # a smaller last group is stored in full
    padded[:oc] = matrix[:, live]
    step = -(-depth // width) * width if 0 < depth < live.size else max(live.size, 1)
    values: list[np.ndarray] = []
    index: list[np.ndarray] = []
    counts: list[int] = []
    for first in range(0, max(live.size, 1), step):
        for top in range(0, oc, height):
            group = padded[top : top + height, first : first + step]  # [R, K of the pass]
            if not form.sparse:
                values.append(group.T.reshape(-1))
                counts.append(group.shape[1])
                continue
            blocks = np.flatnonzero(group.any(axis=0).reshape(-1, width).any(axis=1))
            index.append(first + blocks * width)
            values.append(group.reshape(height, -1, width)[:, blocks].transpose(1, 2, 0).reshape(-1))
            counts.append(blocks.size)
    index_type = np.uint16 if live.size <= 1 << 16 else np.int32
    return Packed(
        height, width, form.sparse, step, live,
        np.cumsum([0, *counts]).astype(np.int32),
        np.concatenate(index).astype(index_type) if index else np.zeros(0, index_type),
        np.concatenate(values),
        (oc, taps),
    )  # fmt: skip


def unpack(packed: Packed, w_shape: tuple[int, int, int, int]) -> np.ndarray:
    """Stored form to dense [OC, IC, KH, KW]: the inverse of `pack`."""
    oc, taps = packed.shape
    matrix = np.zeros((oc, taps), np.float32)
    position = 0
    for number in range(len(packed.pointers) - 1):
        lo, hi = int(packed.pointers[number]), int(packed.pointers[number + 1])
        p, g = divmod(number, packed.groups)
        first = g * packed.rows
        height = min(packed.rows, oc - first)
        width = packed.columns if packed.sparse else 1
        stored = packed.values[position : position + (hi - lo) * width * packed.rows].reshape(-1, width, packed.rows)
        position += stored.size
        for b in range(hi - lo):
            start = int(packed.index[lo + b]) if packed.sparse else p * packed.depth + b
            matrix[first : first + height, packed.live[start : start + width]] = stored[b].T[:height]
    w = matrix.reshape(oc, w_shape[2], w_shape[3], w_shape[1])
    return np.ascontiguousarray(w.transpose(0, 3, 1, 2))
