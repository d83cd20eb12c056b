"""Words of neighbours: the bytes of a row that one vector of 8-bit sums multiplies, and how they are loaded.

    word[u, i] = row[(p + i) * sw - left + (T u + k) * dw]  for k = 0..T-1          i: lane, T <= 4 taps of a kernel row

A window slides by a byte or two from lane to lane, so that a load of 16 bytes holds the words of four lanes and more, and
one byte shuffle spreads them (`sparsec.kernels.bytes`). Taps outside the row are nobody's bytes: a mask takes their
weights away, and what they would have added, the zero point, is known in advance. So nothing is done to edges in a loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels.base import Machine
from sparsec.kernels.bytes import as_type, joined, pick, pick_words
from sparsec.kernels.dots import WORD
from sparsec.kernels.planes import Window

ANY = -1  # a byte that is multiplied by zero


@dataclass(frozen=True)
class Segment:
    """`vectors` of `lanes` neighbouring output columns from `start` on, of which the first `valid` exist."""

    start: int
    vectors: int
    lanes: int
    valid: int


def segments(lanes: int, width: int) -> list[Segment]:
    """Runs of 16 columns (or as many as there are), and what remains, overlapping its neighbour where it has to."""
    if width < 16:
        vectors = -(-width // lanes)
        return [Segment(0, vectors, lanes, width)]
    found = [Segment(i, 16 // lanes, lanes, 16) for i in range(0, width - 15, 16)]
    rest = -(-(width % 16) // lanes)
    return found + ([Segment(width - rest * lanes, rest, lanes, rest * lanes)] if rest else [])


@dataclass(frozen=True)
class Pick:
    """How a vector of words is made: loads of `size` bytes from columns `columns`, words spread by `spread`, then `order`."""

    columns: tuple[int, ...]
    size: int
    order: tuple[int, ...]
    spread: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reader:
    """How rows of `window` become words on `machine`: `taps` of a kernel row in a word, `lanes` words in a vector."""

    machine: Machine
    window: Window
    lanes: int
    taps: int

    @property
    def words(self) -> int:
        """Words of a kernel row."""
        return -(-self.window.kernel[1] // self.taps)

    def columns(self, segment: Segment) -> np.ndarray:
        """Input columns [vectors, words, lanes, 4], ANY where there is no tap; they may lie outside the row."""
        window, count = self.window, segment.vectors * segment.lanes
        tap = np.arange(self.words)[:, None] * self.taps + np.arange(WORD)
        real = (np.arange(WORD) < self.taps) & (tap < window.kernel[1])
        at = segment.start + np.arange(count)
        found = at[:, None, None] * window.strides[1] - window.pads[1] + tap * window.dilations[1]
        exists = real & (np.arange(count) < segment.valid)[:, None, None]
        found = np.where(exists, found, np.iinfo(np.int32).min)
        return found.reshape(segment.vectors, segment.lanes, self.words, WORD).transpose(0, 2, 1, 3)

    def outside(self, segment: Segment) -> np.ndarray:
        """bool [vectors, words, lanes, 4]: taps of existing outputs that lie outside the row."""
        found = self.columns(segment)
        return (found != np.iinfo(np.int32).min) & ((found < 0) | (found >= self.window.width))

    def picks(self, segment: Segment) -> list[list[Pick]] | None:
        """One for each vector and word, or None where a vector's bytes lie too far apart for its loads."""
        found = self.columns(segment)
        inside = np.where((found >= 0) & (found < self.window.width), found, ANY)
        loads: list[tuple[int, int]] = []
        result = []
        for vector in inside:
            row = [_pick(self.machine, word, loads) for word in vector]
            if any(p is None for p in row):
                return None
            result.append([p for p in row if p is not None])
        return result

    def fits(self) -> bool:
        """Whether every segment of the window can be read so."""
        return all(self.picks(s) is not None for s in segments(self.lanes, self.window.shape[1]))


def _extent(columns: np.ndarray) -> tuple[int, int]:
    """First and last column that is wanted; (0, 0) if none is."""
    real = columns[columns != ANY]
    return (int(real.min()), int(real.max())) if real.size else (0, 0)


def _load(loads: list[tuple[int, int]], first: int, last: int, size: int) -> int:
    """The column of a load of `size` bytes with columns first..last in it: one there is already, or a new one."""
    for column, known in loads:
        if known == size and column <= first and last < column + size:
            return column
    loads.append((first, size))
    return first


def _pick(machine: Machine, columns: np.ndarray, loads: list[tuple[int, int]]) -> Pick | None:
    """The bytes `columns` [lanes, 4] as words."""
    first, last = _extent(columns)
    quads = columns.reshape(-1, 16)
    ends = [_extent(quad) for quad in quads]
    ends = [(a, b) if (quad != ANY).any() else (first, first) for (a, b), quad in zip(ends, quads, strict=True)]
    if len(quads) == 4:
        size = 32 if last - first < 32 else 64
        if last - first >= size:
            return None
        base = _load(loads, first, last, size)
        if machine.byte_permute:
            return Pick((base,), size, _distances(columns, [base] * 4))
        words = [(a - base) // WORD for a, _ in ends]
        starts = [base + WORD * w for w in words]
        if any(b - s >= 16 for (_, b), s in zip(ends, starts, strict=True)):
            return None
        spread = tuple(min(w + i, size // WORD - 1) for w in words for i in range(4))
        return Pick((base,), size, _distances(columns, starts), spread)
    if last - first < 16:
        base = _load(loads, first, last, 16)
        return Pick((base,), 16, _distances(columns, [base] * len(quads)))
    if any(b - a >= 16 for a, b in ends):
        return None
    bases = [_load(loads, a, b, 16) for a, b in ends]
    return Pick(tuple(bases), 16, _distances(columns, bases))


def _distances(columns: np.ndarray, starts: list[int]) -> tuple[int, ...]:
    quads = columns.reshape(len(starts), 16)
    return tuple(int(v) for v in np.where(quads == ANY, 0, quads - np.asarray(starts)[:, None]).reshape(-1))


def reader(machine: Machine, window: Window) -> Reader | None:
    """The one with fewest words, then with the widest vectors; None where a window strides or dilates too far."""
    width = 4
    while width < min(machine.lanes, window.shape[1]):
        width *= 2
    for taps in range(min(WORD, window.kernel[1]), 0, -1):
        lanes = width
        while lanes >= 4:
            found = Reader(machine, window, lanes, taps)
            if found.fits():
                return found
            lanes //= 2
    return None


def pack(reader: Reader, w: np.ndarray) -> np.ndarray:
    """w int8 [OC, 1, KH, KW] -> [OC, KH, words, 4], zeros behind the taps of a word."""
    count, _, rows, taps = w.shape
    padded = np.zeros((count, rows, reader.words * reader.taps), np.int8)
    padded[:, :, :taps] = w[:, 0]
    found = np.zeros((count, rows, reader.words, WORD), np.int8)
    found[..., : reader.taps] = padded.reshape(count, rows, reader.words, reader.taps)
    return found


class Patterns:
    """Vectors of bytes that kernels load instead of writing them in code; equal ones are stored once."""

    def __init__(self) -> None:
        self._at: dict[bytes, int] = {}
        self._size = 0

    def add(self, values: Any, dtype: str = "uint8") -> int:
        """Where a vector lies, in bytes."""
        data = np.ascontiguousarray(values).astype(dtype).tobytes()
        if data not in self._at:
            self._at[data] = self._size
            self._size += -(-len(data) // 64) * 64
        return self._at[data]

    def array(self) -> np.ndarray:
        """All of them: uint8."""
        found = np.zeros(max(self._size, 64), np.uint8)
        for data, at in self._at.items():
            found[at : at + len(data)] = np.frombuffer(data, np.uint8)
        return found


class Row:
    """The words of one row of x, whose column 0 is element `base`; loaded and spread once, when first asked for.

    `pattern(values, dtype, lanes)`: a stored pattern. `change`: what is done to bytes as they are loaded.
    """

    def __init__(
        self, reader: Reader, x: Any, base: Any, pattern: Callable[[Any, str], Any], change: Callable[[Any], Any]
    ) -> None:
        self.reader, self.x, self.base, self.pattern, self.change = reader, x, base, pattern, change
        self._loaded: dict[tuple[int, int], Any] = {}
        self._made: dict[Pick, Any] = {}

    def _load(self, column: int, size: int) -> Any:
        if (column, size) not in self._loaded:
            self._loaded[column, size] = T.bind(self.change(emit.load(self.x, self.base + column, size)))
        return self._loaded[column, size]

    def words(self, how: Pick) -> Any:
        """A vector of words: int32."""
        if how not in self._made:
            size = len(how.order)
            source = joined([self._load(column, how.size) for column in how.columns], size)
            if how.spread:
                source = pick_words(source, self.pattern(how.spread, "int32"))
            self._made[how] = T.bind(
                as_type(pick(self.reader.machine, source, self.pattern(how.order, "uint8")), "int32")
            )
        return self._made[how]
