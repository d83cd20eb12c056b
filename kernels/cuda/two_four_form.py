"""The stored form of weights of which at most 2 in every 4 neighbours along K are not zero, for `mma.sp` (`two_four`).

Of every 4 columns two are stored, in order: those that are not zero, filled up with others. Rows by 16, slices of 32 columns:

    values[row tile][slice][lane][8]            operand A of mma.sp.m16n8k32: of 16 x 16 stored values lane 4 g + t holds
                                                (g, 2 t), (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8), each with its right
                                                neighbour
    metadata[row tile][pair of slices][lane]    2 bits a stored value, its column in its 4, from the low end: 8 values of
                                                columns 16 (t % 2) ... of row g, then of row g + 8; lanes with t < 2 of the
                                                pair's first slice, the others of the second (PTX ISA, sparse mma)

One slice more than there are is stored, so that a kernel may load ahead.
"""

from __future__ import annotations

import numpy as np

SLICE = 32  # columns of an instruction
STEP = 64  # columns whose metadata lie together


def fits(w: np.ndarray) -> bool:
    """Whether every 4 neighbours of a row hold at most 2 that are not zero; w [N, K]."""
    n, k = w.shape
    padded = np.zeros((n, -(-k // 4) * 4), bool)
    padded[:, :k] = w != 0
    return int(padded.reshape(n, -1, 4).sum(axis=2).max(initial=0)) <= 2


def compress(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """w [N, K], 4 divides K, to its stored values [N, K / 2] and their columns within their 4, uint8.

    Raises ValueError where more than 2 of 4 are not zero.
    """
    if not fits(w):
        raise ValueError("more than 2 of 4 neighbours along the inputs are not zero")
    fours = w.reshape(w.shape[0], -1, 4)
    # The two columns to store, in order: nonzeros first, and of the zeros the leftmost.
    chosen = np.sort(np.argsort(fours == 0, axis=2, kind="stable")[:, :, :2], axis=2)
    values = np.take_along_axis(fours, chosen, axis=2)
    return values.reshape(w.shape[0], -1), chosen.astype(np.uint8).reshape(w.shape[0], -1)


def expand(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The inverse of `compress`: w [N, K]."""
    n, half = values.shape
    w = np.zeros((n, half // 2, 4), values.dtype)
    np.put_along_axis(w, columns.reshape(n, -1, 2).astype(np.int64), values.reshape(n, -1, 2), axis=2)
    return w.reshape(n, -1)


def fragments_of(matrix: np.ndarray) -> np.ndarray:
    """[N, K] of 16-bit values as operands A of 16 x 16: [N / 16, K / 16, lane, 8]."""
    n, k = matrix.shape
    cut = matrix.reshape(n // 16, 2, 8, k // 16, 2, 4, 2)  # tile, half of rows, g, slice, half of columns, t, neighbour
    return np.ascontiguousarray(cut.transpose(0, 3, 2, 5, 4, 1, 6).reshape(n // 16, k // 16, 32, 8))


def matrix_of(fragments: np.ndarray) -> np.ndarray:
    """The inverse of `fragments_of`."""
    tiles, slices = fragments.shape[:2]
    cut = fragments.reshape(tiles, slices, 8, 4, 2, 2, 2)
    return np.ascontiguousarray(cut.transpose(0, 5, 2, 1, 4, 3, 6).reshape(tiles * 16, slices * 16))


def metadata_of(columns: np.ndarray) -> np.ndarray:
    """Columns within their 4 [N, K / 2] as words, uint32 [N / 16, K / 64, lane]."""
    n, half = columns.shape
    # tile, half of rows, g, step, slice of the step, half of the slice, value
    cut = columns.astype(np.uint32).reshape(n // 16, 2, 8, half // 32, 2, 2, 8)
    words = (cut << (2 * np.arange(8, dtype=np.uint32))).sum(axis=6, dtype=np.uint32)
    words = words[:, 0] | words[:, 1] << np.uint32(16)  # tile, g, step, slice, half
    return np.ascontiguousarray(words.transpose(0, 2, 1, 3, 4).reshape(n // 16, half // 32, 32))


def columns_of(metadata: np.ndarray) -> np.ndarray:
    """The inverse of `metadata_of`."""
    tiles, steps, _ = metadata.shape
    words = metadata.reshape(tiles, steps, 8, 2, 2)
    halves = np.stack([words & 0xFFFF, words >> 16], axis=1)  # tile, half of rows, step, g, slice, half
    cut = halves[..., None] >> (2 * np.arange(8, dtype=np.uint32)) & 3
    return np.ascontiguousarray(cut.transpose(0, 1, 3, 2, 4, 5, 6).reshape(tiles * 16, steps * 32)).astype(np.uint8)


def pack(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """w [N, K], 16 divides N and 64 divides K -> values float16 [N / 16, K / 32 + 1, 32, 8], metadata int32
    [N / 16, K / 64 + 1, 32]."""
    values, columns = compress(w)
    with np.errstate(over="ignore"):
        fragments = fragments_of(values.astype(np.float16))
    words = metadata_of(columns).view(np.int32)
    more = ((0, 0), (0, 1), (0, 0))
    # 0b0100 a nibble: columns 0 and 1, which are in order.
    return np.pad(fragments, (*more, (0, 0))), np.pad(words, more, constant_values=0x44444444)


def unpack(values: np.ndarray, metadata: np.ndarray) -> np.ndarray:
    """The inverse of `pack`: w float16 [N, K]."""
    words = np.ascontiguousarray(metadata[:, :-1]).view(np.uint32)
    return expand(matrix_of(np.ascontiguousarray(values[:, :-1])), columns_of(words))
