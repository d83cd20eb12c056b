"""Weights as integers with a scale for each group of inputs: what they mean, and how they lie in memory.

    w[n, k] = (q[n, k] - zero[n, g]) * scale[n, g]        g = k // group; the last group may be shorter

By blocks of output columns (`sparsec.kernels.gemm.blocks_of`), in the order they are read:

    8 bits   weights[block][k][column]
    4 bits   weights[block][word][column], int32        a word holds the eight neighbours k = 8 word + i, i from its low end;
                                                        every group begins a word, so a group's last word may be short
    scales[block][g][column]   zeros[block][g][column], int8   bias[block][column]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparsec.kernels import gemm
from sparsec.kernels.gemm import Tiling, blocks_of
from sparsec.kernels.parts import span

BITS = (8, 4)
NIBBLES = 8  # in a word


@dataclass(frozen=True)
class Stored:
    """A weight as integers: w[n, k] = (q[n, k] - zero[n, g]) * scale[n, g], g = k // group; the last group may be shorter.

    q: int8 [N, K], of 4 bits -8..7. scale: float32 [N, G]. zero: int8 [N, G], or None where all are 0.
    """

    bits: int
    group: int
    q: np.ndarray = field(repr=False)
    scale: np.ndarray = field(repr=False)
    zero: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        n, k = self.q.shape
        if self.bits not in BITS or not 0 < self.group <= k or self.scale.shape != (n, -(-k // self.group)):
            raise ValueError(f"{self.bits} bits, groups of {self.group}, scales {self.scale.shape}: not of {n}x{k}")

    @property
    def groups(self) -> int:
        """Groups of an output."""
        return self.scale.shape[1]

    @property
    def units(self) -> int:
        """What is stored of a full group for one output: bytes, or words of nibbles."""
        return self.group if self.bits == 8 else -(-self.group // NIBBLES)

    @property
    def depth(self) -> int:
        """Bytes or words of one output."""
        last = self.q.shape[1] - (self.groups - 1) * self.group
        return (self.groups - 1) * self.units + (last if self.bits == 8 else -(-last // NIBBLES))

    @property
    def bytes(self) -> int:
        """Stored bytes, without what fills up the last block of columns."""
        n = self.q.shape[0]
        return n * (self.depth * (1 if self.bits == 8 else 4) + self.groups * (4 if self.zero is None else 5))

    def real(self) -> np.ndarray:
        """float32 [N, K], as DequantizeLinear gives it."""

        def spread(parameter: np.ndarray) -> np.ndarray:
            return np.repeat(parameter, self.group, axis=1)[:, : self.q.shape[1]]

        whole = self.q.astype(np.int32) - (0 if self.zero is None else spread(self.zero).astype(np.int32))
        return np.asarray(whole.astype(np.float32) * spread(self.scale))


def columns_of(rows: np.ndarray, tiling: Tiling) -> np.ndarray:
    """[depth, N] by blocks of columns, each [depth][columns], surplus columns zero: flat."""
    packed, column = [], 0
    for parts, count in blocks_of(rows.shape[1], tiling):
        width = parts[-1].at + parts[-1].valid
        for _ in range(count):
            block = np.zeros((rows.shape[0], span(parts)), rows.dtype)
            block[:, :width] = rows[:, column : column + width]
            packed.append(block.reshape(-1))
            column += width
    return np.concatenate(packed)


def words_of(stored: Stored) -> np.ndarray:
    """q of 4 bits as int32 words [N, depth]."""
    n, k = stored.q.shape
    words = np.zeros((n, stored.depth), np.uint32)
    for g in range(stored.groups):
        part = stored.q[:, g * stored.group : min(k, (g + 1) * stored.group)].astype(np.uint32) & 15
        for i in range(part.shape[1]):
            words[:, g * stored.units + i // NIBBLES] |= part[:, i] << np.uint32(4 * (i % NIBBLES))
    return words.view(np.int32)


def pack(stored: Stored, bias: np.ndarray | None, tiling: Tiling) -> dict[str, np.ndarray]:
    """weights, scales, zeros where there are any, and bias; see the module's head."""
    n = stored.q.shape[0]
    rows = stored.q if stored.bits == 8 else words_of(stored)
    packed = {"weights": rows.T, "scales": stored.scale.astype(np.float32).T}
    if stored.zero is not None:
        packed["zeros"] = stored.zero.T
    packed["bias"] = (np.zeros(n, np.float32) if bias is None else bias.astype(np.float32))[None]
    return {role: columns_of(np.asarray(array), tiling) for role, array in packed.items()}


def unpack(weights: np.ndarray, stored: Stored, tiling: Tiling) -> np.ndarray:
    """q [N, K] out of the packed weights; of `stored` only the sizes are read."""
    n, k = stored.q.shape
    columns, at = [], 0
    for parts, count in blocks_of(n, tiling):
        for _ in range(count):
            block = weights[at : at + stored.depth * span(parts)].reshape(stored.depth, -1)
            columns.append(block[:, : parts[-1].at + parts[-1].valid].T)
            at += block.size
    rows = np.concatenate(columns)
    if stored.bits == 8:
        return rows
    nibbles = (rows[:, :, None] << (28 - 4 * np.arange(NIBBLES, dtype=np.int32))) >> 28
    inside = np.arange(k)
    at_k = inside // stored.group * (stored.units * NIBBLES) + inside % stored.group
    return np.asarray(nibbles.reshape(n, -1)[:, at_k].astype(np.int8))


def reference(stored: Stored, x: np.ndarray, bias: np.ndarray | None = None, **epilogue: Any) -> np.ndarray:
    """x [M, K] times the real weight transposed, in float64."""
    n, k = stored.q.shape
    group = np.arange(k) // stored.group
    zero = np.zeros((n, stored.groups)) if stored.zero is None else stored.zero.astype(np.float64)
    w = stored.scale.astype(np.float64)[:, group] * (stored.q - zero[:, group])
    return gemm.reference(x, w, bias, **epilogue)
