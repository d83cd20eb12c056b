"""The stored forms of weights: dense or R x C blocks, each with its packing and unpacking."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsec.kernels import blocks
from sparsec.kernels.base import Format


def _format(rows: int, columns: int) -> Format:
    block = f"{rows}x{columns}"
    what = "unstructured zeros" if block == "1x1" else f"{block} blocks (output x input channels)"
    return Format(f"conv_f32_{block}", "Conv", block, "float32", f"convolution, {what}", rows=rows, columns=columns)


DENSE = Format("conv_f32_dense", "Conv", "dense", "float32", "convolution, dense weights")
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
    values: np.ndarray  # float32 or int32 words, [block][C][R] or [k][R] by group
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
    height, width = form.rows or rows or 1, blocks.fitting(form.columns, w.shape[1])
    live = np.arange(taps, dtype=np.int32)
    if form.sparse:
        live = np.flatnonzero(matrix.any(axis=0).reshape(-1, width).any(axis=1).repeat(width)).astype(np.int32)
    step = -(-depth // width) * width if 0 < depth < live.size else max(live.size, 1)
    firsts = range(0, max(live.size, 1), step)
    passes = [blocks.pack(matrix[:, live[at : at + step]], height, width, every=not form.sparse) for at in firsts]
    counts = np.concatenate([np.diff(one.pointers) for one in passes])
    index = np.concatenate([at + one.index.astype(np.int32) for at, one in zip(firsts, passes, strict=True)])
    return Packed(
        height, width, form.sparse, step, live,
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        (index if form.sparse else index[:0]).astype(blocks.index_type(live.size)),
        np.concatenate([one.values.reshape(-1) for one in passes]),
        (oc, taps),
    )  # fmt: skip


def unpack(packed: Packed, w_shape: tuple[int, int, int, int]) -> np.ndarray:
    """Stored form to dense [OC, IC, KH, KW]: the inverse of `pack`."""
    oc, taps = packed.shape
    values = packed.values.reshape(-1, packed.columns, packed.rows)
    compact = np.zeros((oc, packed.live.size), values.dtype)
    for p in range(packed.passes):
        pointers = packed.pointers[p * packed.groups : (p + 1) * packed.groups + 1]
        low, high = int(pointers[0]), int(pointers[-1])
        if packed.sparse:
            index = packed.index[low:high]
        else:
            index = p * packed.depth + np.tile(np.arange((high - low) // packed.groups), packed.groups)
        one = blocks.Blocks(packed.rows, packed.columns, pointers - low, index, values[low:high], compact.shape)
        compact += blocks.unpack(one)
    matrix = np.zeros((oc, taps), values.dtype)
    matrix[:, packed.live] = compact
    w = matrix.reshape(oc, w_shape[2], w_shape[3], w_shape[1])
    return np.ascontiguousarray(w.transpose(0, 3, 1, 2))
