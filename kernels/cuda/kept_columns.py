"""Right sides of products with block-sparse weights: x, of which a step takes the columns of W that its group of rows keeps.

    units      x [P, K]: runs of neighbouring columns, in chunks of 16 bytes
    picks      x [P, K]: single columns, eight (of float32 four) of a row gathered into a chunk
    planes     1x1 convolution: kept channels, in chunks of pixels
    pixels     any other convolution, float16: eight kept (tap, channel) of a pixel gathered into a chunk
    elements   the same in float32: asynchronous copies of 4 bytes

A gathered convolution reads of each kept column one word, 32 * its offset in an image + its tap: a thread knows from the
start which taps of its pixels lie inside x, so that a load costs one bit test and one addition.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels.cuda import conv, emit, operands
from sparsec.kernels.cuda.conv import Shape
from sparsec.kernels.cuda.kept import Kept
from sparsec.kernels.cuda.operands import CHUNK, Placement

TAPS = 32  # words tell so many apart; the last stands for no column


def refusal(shape: Shape) -> str | None:
    """Why a convolution's columns have no words, or None."""
    if shape.groups > 1:
        return f"{shape.groups} groups"
    if shape.taps >= TAPS:
        return f"{shape.taps} taps: below {TAPS} are taken"
    if int(np.prod(shape.x[1:])) >= 1 << 26:
        return f"images of {int(np.prod(shape.x[1:])):,} values: below {1 << 26:,} are taken"
    return None


def words_of(packed: Kept, shape: Shape) -> np.ndarray:
    """The word of each kept column [steps, depth], columns counted as (tap, channel)."""
    tap, channel = np.divmod(packed.columns.astype(np.int64), shape.w[1])
    row, column = np.divmod(tap, shape.w[3])
    _, _, h, w = shape.x
    offset = channel * (h * w) + row * shape.dilations[0] * w + column * shape.dilations[1]
    return np.asarray(np.where(packed.columns < 0, TAPS - 1, offset * TAPS + tap), np.int32)


class _Listed:
    """Chunks whose place depends on a number of the list of kept columns: read a step ahead, so that no copy waits for it.

    The list is followed by one step more, which is read and not used.
    """

    def __init__(self, placement: Placement, x: Any, columns: Any, begin: Any, per_step: int, unit: int, threads: int,
                 thread: Any) -> None:  # fmt: skip
        self.placement, self.x, self.columns, self.begin, self.per_step = placement, x, columns, begin, per_step
        total = placement.rows * placement.chunks
        assert total % threads == 0 or total < threads
        self.whole = total >= threads
        indices = [thread + first for first in range(0, total, threads)]
        self.places = [(T.bind(index // placement.chunks), T.bind(index % placement.chunks)) for index in indices]
        self.numbers = self._numbers()
        self.held = emit.local(len(set(self.numbers)), "int32")
        self.name = f"sparsec_copy16<{unit}, {placement.item}>"

    def _numbers(self) -> list[int]:
        """Of each of a thread's chunks, which of its held numbers it needs."""
        raise NotImplementedError

    def _at(self, row: Any, chunk: Any) -> Any:
        """Where in a step's list a chunk's number is."""
        raise NotImplementedError

    def _source(self, number: Any, row: Any, chunk: Any) -> tuple[Any, Any]:
        """First element and how many there are, of a chunk with that number."""
        raise NotImplementedError

    def _load(self, step: Any) -> None:
        for i in sorted(set(self.numbers)):
            row, chunk = self.places[self.numbers.index(i)]
            at = (self.begin + step) * self.per_step + self._at(row, chunk)
            T.buffer_store(self.held, self.columns[at], [i])

    def issue(self, step: Any, shared: Any, slot: Any) -> None:
        """Start the copies of `step`; steps are issued in order."""
        if isinstance(step, int) and step == 0:
            emit.when(self._mine(), lambda: self._load(0))

        def copy() -> None:
            for (row, chunk), i in zip(self.places, self.numbers, strict=True):
                start, valid = self._source(T.bind(self.held[i]), row, chunk)
                target = emit.address(shared, slot + self.placement.at(row, chunk))
                emit.call(self.name, target, emit.address(self.x, start), valid * self.placement.item)
            self._load(step + 1)

        emit.when(self._mine(), copy)

    def _mine(self) -> Any:
        """Whether this thread has chunks."""
        return True if self.whole else self.places[0][0] < self.placement.rows

    def settle(self, shared: Any, slot: Any) -> None:
        """Nothing is left to do."""


class Units(_Listed):
    """x [p, k] from row `first` on, kept units of columns; the steps of `columns` from `begin` on."""

    def __init__(
        self, place: Placement, x: Any, columns: Any, begin: Any, p: int, k: int, first: Any, packed: Kept, item: int,
        threads: int, thread: Any,
    ) -> None:  # fmt: skip
        self.p, self.k, self.first, self.each = p, k, first, CHUNK // item
        self.per_unit = packed.width // self.each
        unit = operands.unit_of(k, packed.width, item=item)
        super().__init__(place, x, columns, begin, packed.depth // packed.width, unit, threads, thread)

    def _numbers(self) -> list[int]:
        return [0] * len(self.places)  # the number of threads is a multiple of a row's chunks

    def _at(self, row: Any, chunk: Any) -> Any:
        return chunk // self.per_unit

    def _source(self, number: Any, row: Any, chunk: Any) -> tuple[Any, Any]:
        column = number + chunk % self.per_unit * self.each
        inside = tirx.all(number >= 0, self.first + row < self.p)
        valid = T.if_then_else(inside, operands.within(self.k - column, self.each), 0)
        return T.if_then_else(inside, (self.first + row) * self.k + T.min(column, self.k - 1), 0), valid


class Picks:
    """x [p, k] from row `first` on, single kept columns."""

    def __init__(
        self, placement: Placement, x: Any, columns: Any, begin: Any, p: int, k: int, first: Any, threads: int, thread: Any
    ) -> None:  # fmt: skip
        self.placement, self.x, self.columns, self.begin, self.p, self.k = placement, x, columns, begin, p, k
        self.first, self.threads, self.thread = first, threads, thread
        self.each = CHUNK // placement.item
        self.count = placement.rows * placement.chunks // threads
        assert self.count * threads == placement.rows * placement.chunks
        self.dtype = "float16" if placement.item == 2 else "float32"
        self.held = emit.local(self.count * self.each, self.dtype)

    def _places(self) -> list[tuple[Any, Any]]:
        chunks = self.placement.chunks
        indices = [self.thread + i * self.threads for i in range(self.count)]
        return [(index // chunks, index % chunks) for index in indices]

    def issue(self, step: Any, shared: Any, slot: Any) -> None:
        """Load the values of `step` into registers."""
        depth, words = self.placement.chunks * self.each, emit.local(self.each, "int32")
        chunk = self._places()[0][1]  # of all of a thread's: the number of threads is a multiple of a row's chunks
        for i in range(0, self.each, 4):
            at = (self.begin + step) * depth + chunk * self.each + i
            emit.call("sparsec_get<16>", emit.address(words, i), emit.address(self.columns, at))
        for i, (row, _) in enumerate(self._places()):
            at = T.bind(self.first + row)
            start = T.bind(at * self.k)
            for c in range(self.each):
                exists = T.Cast("int32", tirx.all(words[c] >= 0, at < self.p))
                target = emit.address(self.held, i * self.each + c)
                emit.call("sparsec_load_if", target, emit.address(self.x, start + words[c]), exists)

    def settle(self, shared: Any, slot: Any) -> None:
        """Store them as chunks."""
        for i, (row, chunk) in enumerate(self._places()):
            target = emit.address(shared, slot + self.placement.at(row, chunk))
            emit.call("sparsec_put16", target, emit.address(self.held, i * self.each))


class Planes(_Listed):
    """x of a 1x1 convolution from tile column `first` on, kept channels."""

    def __init__(
        self, place: Placement, x: Any, columns: Any, begin: Any, shape: Shape, first: Any, depth: int, item: int,
        threads: int, thread: Any,
    ) -> None:  # fmt: skip
        self.shape, self.first, self.each = shape, first, CHUNK // item
        self.pitch = shape.pitch("float16" if item == 2 else "float32")
        super().__init__(place, x, columns, begin, depth, operands.unit_of(shape.pixels, item=item), threads, thread)

    def _numbers(self) -> list[int]:
        return list(range(len(self.places)))

    def _at(self, row: Any, chunk: Any) -> Any:
        return row

    def _source(self, number: Any, row: Any, chunk: Any) -> tuple[Any, Any]:
        n, c, _, _ = self.shape.x
        pixels, column = self.shape.pixels, self.first + chunk * self.each
        image = column // self.pitch if n > 1 else 0
        pixel = column % self.pitch if n > 1 else column
        inside = tirx.all(number >= 0, column < n * self.pitch)
        valid = T.if_then_else(inside, operands.within(pixels - pixel, self.each), 0)
        return T.if_then_else(inside, (image * c + number) * pixels + pixel, 0), valid


class _Kept(conv.Gathered):
    """What `Pixels` and `Elements` share: which taps of a thread's pixels lie inside x."""

    def __init__(self, placement: Placement, x: Any, words: Any, begin: Any, shape: Shape, *arguments: Any) -> None:
        super().__init__(placement, x, shape, shape.pitch("float16" if placement.item == 2 else "float32"), *arguments)
        self.words, self.begin = words, begin
        self.inside: dict[int, Any] = {}
        for _, pixels in self.columns:
            mask = emit.local(1, "int32")
            T.buffer_store(mask, 0, [0])
            for tap in range(shape.taps):
                T.buffer_store(mask, mask[0] | T.if_then_else(pixels.at(tap)[1], 1 << tap, 0), [0])
            self.inside[id(pixels)] = T.bind(mask[0])

    def at(self, pixels: Any, word: Any) -> tuple[Any, Any]:
        """Index of a kept column at a pixel, and whether it lies inside x."""
        return pixels.origin + (word >> 5), (self.inside[id(pixels)] >> (word & 31) & 1) != 0


class Pixels(_Kept):
    """float16: 8 kept columns of a pixel at a time, as a chunk of [columns][depth]."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.held = emit.local(len(self.units) * 8, "float16")

    def issue(self, step: Any, shared: Any, slot: Any) -> None:
        """Load the values of `step` into registers."""
        depth, words = self.placement.chunks * 8, emit.local(8, "int32")
        for i, (_, pixels, unit) in enumerate(self.units):
            for part in range(0, 8, 4):
                at = (self.begin + step) * depth + unit * 8 + part
                emit.call("sparsec_get<16>", emit.address(words, part), emit.address(self.words, at))
            for c in range(8):
                index, inside = self.at(pixels, words[c])
                target = emit.address(self.held, i * 8 + c)
                emit.call("sparsec_load_if", target, emit.address(self.memory, index), T.Cast("int32", inside))

    def settle(self, shared: Any, slot: Any) -> None:
        """Store them as chunks."""
        for i, (column, _, unit) in enumerate(self.units):
            target = emit.address(shared, slot + self.placement.at(column, unit))
            emit.call("sparsec_put16", target, emit.address(self.held, i * 8))


class Elements(_Kept):
    """float32: one element at a time to [depth][columns]."""

    def issue(self, step: Any, shared: Any, slot: Any) -> None:
        """Start the copies of `step`."""
        for column, pixels, unit in self.units:
            word = T.bind(self.words[(self.begin + step) * self.placement.rows + unit])
            index, inside = self.at(pixels, word)
            inside = T.bind(inside)
            target = emit.address(shared, slot + unit * self.placement.pitch + column)
            source = emit.address(self.memory, T.if_then_else(inside, index, 0))
            emit.call("sparsec_copy4", target, source, T.if_then_else(inside, 1, 0))

    def settle(self, shared: Any, slot: Any) -> None:
        """Nothing is left to do."""
