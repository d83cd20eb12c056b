"""How blocks of a matrix come from global into shared memory, for products tile by tile (`tensor_tiles`, `core_tiles`).

An operand is one side of a tile's product, `rows` x depth or depth x `columns`, of which a slot in shared memory holds one
step along the depth. It is filled in two calls: `issue` starts the loads of a step and `settle`, later in the same step of
the pipeline, finishes what could not be left to asynchronous copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tvm.tirx.script.builder import ir as T

from sparsec.kernels.cuda import emit

CHUNK = 16  # bytes of the largest copy


@dataclass(frozen=True)
class Placement:
    """Where chunks of 16 bytes lie in a slot: `rows` rows of `chunks` chunks, `pitch` elements apart.

    `mix(row)`: chunk c of a row lies where chunk c XOR mix(row) would, so that what a warp reads or writes at once has no
    bank in common.
    """

    rows: int
    chunks: int
    pitch: int
    item: int
    mix: Callable[[Any], Any] | None = None

    @property
    def size(self) -> int:
        """Elements of a slot."""
        return self.rows * self.pitch

    def at(self, row: Any, chunk: Any) -> Any:
        """Element where a chunk begins."""
        mixed = chunk if self.mix is None else chunk ^ self.mix(row)
        return row * self.pitch + mixed * (CHUNK // self.item)


class Operand(Protocol):
    """One side of a product."""

    placement: Placement

    def issue(self, step: Any, shared: Any, slot: Any) -> None:
        """Start the loads of `step` into the elements of `shared` from `slot` on."""

    def settle(self, shared: Any, slot: Any) -> None:
        """Finish them."""


Source = Callable[[Any, Any, Any], tuple[Any, Any]]


class Chunks:
    """An operand whose chunks lie in one piece in global memory.

    `source(step, row, chunk)`: the first element's index and how many of the chunk's elements exist (others are zero).
    `unit`: bytes that every chunk's address is a multiple of where the buffer's is. `packed`: the buffer is a constant,
    whose address is a multiple of a chunk.
    """

    def __init__(
        self, placement: Placement, memory: Any, source: Source, unit: int, threads: int, thread: Any,
        packed: bool = False,
    ) -> None:  # fmt: skip
        self.placement, self.memory, self.source = placement, memory, source
        self.unit, self.threads, self.thread, self.packed = unit, threads, thread, packed

    def issue(self, step: Any, shared: Any, slot: Any) -> None:
        """Start the loads of `step`."""
        place = self.placement
        total = place.rows * place.chunks
        name = f"sparsec_copy16<{self.unit}, {self.unit if self.packed else place.item}>"
        for first in range(0, total, self.threads):
            index = self.thread + first

            def copy(index: Any = index) -> None:
                row, chunk = index // place.chunks, index % place.chunks
                start, valid = self.source(step, row, chunk)
                target = emit.address(shared, slot + place.at(row, chunk))
                emit.call(name, target, emit.address(self.memory, start), valid * place.item)

            if total - first < self.threads:
                with T.If(index < total), T.Then():
                    copy()
            else:
                copy()

    def settle(self, shared: Any, slot: Any) -> None:
        """Nothing is left to do."""


def unit_of(*pitches: int, item: int) -> int:
    """Bytes that any sum of multiples of `pitches` elements is a multiple of, at most a chunk."""
    return math.gcd(CHUNK, *(pitch * item for pitch in pitches))


def within(count: Any, limit: int) -> Any:
    """`count` clamped to 0..limit."""
    return T.max(0, T.min(count, limit))


def matrix(base: Any, pitch: int, depth: int, item: int, first: Any, rows: int, step_depth: int, whole: bool) -> Source:
    """The source of a matrix with rows along the depth: tile rows from `first` on, of `rows`; `depth` elements a row.

    `whole`: nothing of a tile lies outside, packed weights above all.
    """
    each = CHUNK // item

    def source(step: Any, row: Any, chunk: Any) -> tuple[Any, Any]:
        at, k = first + row, step * step_depth + chunk * each
        if whole:
            return base + at * pitch + k, each
        valid = within(depth - k, each)
        inside = at < rows
        start = base + T.if_then_else(inside, at, 0) * pitch + T.min(k, depth - 1)
        return start, T.if_then_else(inside, valid, 0)

    return source


def across(
    base: Any, pitch: int, depth: int, item: int, first: Any, columns: int, step_depth: int, whole: bool
) -> Source:
    """The source of a matrix with rows across the depth: tile columns from `first` on, of `columns`; `depth` rows."""
    each = CHUNK // item

    def source(step: Any, row: Any, chunk: Any) -> tuple[Any, Any]:
        k, at = step * step_depth + row, first + chunk * each
        if whole:
            return base + k * pitch + at, each
        valid = within(columns - at, each)
        inside = k < depth
        start = base + T.if_then_else(inside, k, 0) * pitch + T.min(at, columns - 1)
        return start, T.if_then_else(inside, valid, 0)

    return source
