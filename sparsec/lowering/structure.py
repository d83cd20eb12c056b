"""What the zeros of a weight look like: blocks of RxC, N:M, unstructured, or none worth the name.

Detected from the numbers alone, never from a tag, so a model pruned by any tool profits. Definitions (weight
`[OC, IC, KH, KW]`):

    block RxC   R consecutive output channels x C consecutive input channels at one kernel position; the last block of
                an axis may be smaller
    density(RxC) = (blocks with any nonzero) * R * C / (OC * IC * KH * KW)   what a kernel of that block shape stores
    N:M         at most N nonzeros in every M consecutive input channels; the last group may be smaller
    channels    output channels (rows) and input channels (columns) that are zero at every position: what structured
                pruning leaves, and what can be cut out of the model. A name for people: kernels see the blocks

A block shape *explains* the zeros when most zeros lie in blocks that are wholly zero and the blocks that are kept are
almost full. Zeros that happen to be inside a kept block (1.6 % of the weights of a model that was once int8) do not
spoil it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

BLOCKS: tuple[tuple[int, int], ...] = (
    (1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (1, 4), (4, 4), (8, 4),
)  # fmt: skip
PATTERNS: tuple[tuple[int, int], ...] = ((1, 4), (1, 2), (2, 4), (4, 8))

_KEPT_FULL = 0.9  # nonzeros / elements of kept blocks; random zeros of share s in blocks of n fill (1-s)/(1-s^n) < 0.9
_IN_ZERO_BLOCKS = 0.5  # share of the zeros that lie in zero blocks
_WORTH_A_NAME = 0.05  # fewer zeros than this are dense: no sparse kernel gains from them


@dataclass(frozen=True)
class Structure:
    """The zeros of one weight."""

    shape: tuple[int, ...]
    nonzeros: int
    zeros: float  # share of zeros, 0..1
    blocks: dict[tuple[int, int], float] = field(repr=False)  # stored density; above 1 where padding outweighs zeros
    nm: tuple[int, int] | None  # N:M that every group keeps and nearly fills, or None
    name: str  # "dense", "1x1", "4x1", "2:4", ...
    channels: tuple[int, int] = (0, 0)  # output and input channels that are wholly zero

    @property
    def block(self) -> tuple[int, int] | None:
        """The block shape that explains the zeros; None for dense. N:M is stored as 1x1."""
        if self.name == "dense":
            return None
        if ":" in self.name:
            return (1, 1)
        rows, columns = self.name.split("x")
        return int(rows), int(columns)

    @property
    def _channels_hold_zeros(self) -> bool:
        rows, columns = self.channels
        oc, ic = self.shape[:2]
        inside = (oc * ic - (oc - rows) * (ic - columns)) / (oc * ic)  # share of the weights in zero channels
        return inside >= _KEPT_FULL * self.zeros > 0

    def __str__(self) -> str:
        share = f"{100 * self.zeros:.1f}% zero"
        if self.name == "dense":
            return "dense" if self.zeros == 0 else f"dense, {share}"
        if self._channels_hold_zeros:
            ends = [("output", 0), ("input", 1)]
            parts = [f"{self.channels[i]} of {self.shape[i]} {end}" for end, i in ends if self.channels[i]]
            return f"whole channels ({' and '.join(parts)}), {share}"
        if self.name == "1x1":
            return f"unstructured, {share}"
        return f"{self.name}, {share}" if ":" in self.name else f"{self.name} blocks, {share}"


def _fold(mask: np.ndarray, count: int, axis: int) -> np.ndarray:
    """OR over `count` neighbours along `axis`; the last group may be smaller."""
    if count == 1:
        return mask
    moved = np.moveaxis(mask, axis, 0)
    folded = moved[::count].copy()
    for i in range(1, count):
        rest = moved[i::count]
        folded[: len(rest)] |= rest
    return np.moveaxis(folded, 0, axis)


def _elements(shape: tuple[int, int, int], rows: int, columns: int, kept: np.ndarray) -> int:
    """Real elements (no padding) inside the kept blocks."""
    oc, ic, _ = shape
    tall = np.full(kept.shape[0], rows)
    tall[-1] = oc - rows * (kept.shape[0] - 1)
    wide = np.full(kept.shape[1], columns)
    wide[-1] = ic - columns * (kept.shape[1] - 1)
    return int(tall @ np.count_nonzero(kept, axis=2) @ wide)


def _pattern(mask: np.ndarray, nonzeros: int) -> tuple[int, int] | None:
    """The tightest of PATTERNS that every group of M input channels keeps; none if its slots are mostly empty."""
    ic = mask.shape[1]
    for n, m in PATTERNS:
        if ic < m or nonzeros < _KEPT_FULL * mask.size * n / m:
            continue
        counts = np.add.reduceat(mask, np.arange(0, ic, m), axis=1, dtype=np.uint8)
        if int(counts.max()) <= n:
            return n, m
    return None


def detect_structure(weight: np.ndarray, blocks: tuple[tuple[int, int], ...] = BLOCKS) -> Structure:
    """Find the structure of `weight` `[OC, IC, ...]` (a Gemm or MatMul weight is `[OC, IC]`).

    Cost: about 10 ms for two million elements.

    >>> w = np.ones((8, 4, 1, 1), np.float32)
    >>> w[:4, 1:] = 0
    >>> str(detect_structure(w))
    '4x1 blocks, 37.5% zero'
    """
    if weight.ndim < 2:
        raise ValueError(f"a weight has output and input channels, got shape {weight.shape}")
    total = weight.size
    if total == 0:
        return Structure(tuple(weight.shape), 0, 0.0, dict.fromkeys(blocks, 0.0), None, "dense")
    mask = np.ascontiguousarray(weight != 0).reshape(weight.shape[0], weight.shape[1], -1)
    shape = (mask.shape[0], mask.shape[1], mask.shape[2])
    nonzeros = int(np.count_nonzero(mask))

    missing = total - nonzeros
    densities: dict[tuple[int, int], float] = {}
    explaining: list[tuple[int, int]] = []
    tall: dict[int, np.ndarray] = {1: mask}
    for rows, columns in blocks:
        if rows not in tall:
            half = rows // 2
            tall[rows] = _fold(tall[half], 2, 0) if rows % 2 == 0 and half in tall else _fold(mask, rows, 0)
        kept = _fold(tall[rows], columns, 1)
        densities[rows, columns] = int(np.count_nonzero(kept)) * rows * columns / total
        if rows > shape[0] or columns > shape[1]:
            continue
        stored = _elements(shape, rows, columns, kept)
        if missing and total - stored >= _IN_ZERO_BLOCKS * missing and nonzeros >= _KEPT_FULL * stored:
            explaining.append((rows, columns))

    zeros = missing / total
    nm = _pattern(mask, nonzeros) if zeros >= 0.5 else None
    name = "dense"
    if zeros >= _WORTH_A_NAME:
        coarsest = max(explaining, key=lambda b: (b[0] * b[1], b[0]), default=(1, 1))
        name = f"{nm[0]}:{nm[1]}" if nm and coarsest == (1, 1) else f"{coarsest[0]}x{coarsest[1]}"
    dead = (int(np.count_nonzero(~mask.any(axis=(1, 2)))), int(np.count_nonzero(~mask.any(axis=(0, 2)))))
    return Structure(tuple(weight.shape), nonzeros, zeros, densities, nm, name, dead)
