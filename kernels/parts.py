"""The vectors that cover the width of a register tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Some columns (pixels, in a convolution) of a tile, from column `at`, and the vectors that accumulate them.

    Straight: one vector of `lanes` columns for each row of the tile, of which the first `valid` exist. Turned: one vector
    of `lanes` rows for each of the `valid` columns; cheaper where fewer columns than rows are left over.
    """

    at: int
    lanes: int
    valid: int
    turned: bool = False

    def vectors(self, rows: int) -> int:
        """Accumulators, and multiply-adds of one term of the sums."""
        return self.valid if self.turned else rows


def parts_of(width: int, lanes: int, narrow: int = 4) -> tuple[Part, ...]:
    """Vectors that cover `width` columns; the last may be narrower, down to `narrow` lanes or a single one."""
    parts = [Part(i, lanes, lanes) for i in range(0, width - lanes + 1, lanes)]
    rest = width % lanes
    if rest:
        least = 1 if rest == 1 else min(lanes, max(narrow, 1 << (rest - 1).bit_length()))
        parts.append(Part(width - rest, least, rest))
    return tuple(parts)


def span(parts: Sequence[Part]) -> int:
    """Columns stored for `parts`, the surplus lanes of the last included."""
    return parts[-1].at + parts[-1].lanes
