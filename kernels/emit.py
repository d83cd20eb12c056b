"""Building TIR from Python: small words over TVM's IRBuilder.

Kernels here are written as loops over *vector values* (`float32x16`), so that the register tile is what the code says it
is; LLVM keeps a local buffer of vectors with constant indices in registers. Ordinary Python loops unroll.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

HALF_MAX = 65504.0  # the largest float16


def function(arguments: list[tuple[str, int, str]], body: Callable[..., None]) -> Any:
    """A PrimFunc over flat buffers `(name, elements, dtype)`; `body(*buffers, begin, end)` emits its statements."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("kernel")
        buffers = [T.arg(name, T.buffer((max(size, 1),), dtype)) for name, size, dtype in arguments]
        begin, end = T.arg("begin", T.int32()), T.arg("end", T.int32())
        # Where a tile number could be negative, TVM divides it after adding a constant so large that it may overflow,
        # which LLVM takes for impossible: bounds of inner loops were lost.
        body(*buffers, T.max(begin, 0), T.max(end, 0))
    return builder.get()


def vector_type(lanes: int, element: str = "float32") -> str:
    """`float32x8`, or `float32` for one lane."""
    return element if lanes == 1 else f"{element}x{lanes}"


def registers(count: int, lanes: int, element: str = "float32") -> Any:
    """`count` vectors of `lanes`, to be indexed with constants only."""
    return T.alloc_buffer((count,), vector_type(lanes, element), scope="local")


def constant(value: float, lanes: int = 1, element: str = "float32") -> Any:
    """`value` in every lane; beyond float16's range it is infinite there."""
    if element == "float16" and abs(value) > HALF_MAX:
        value = math.copysign(math.inf, value)
    return splat(tirx.const(value, element), lanes)


def convert(value: Any, element: str) -> Any:
    """`value` with its lanes as `element`, rounded to nearest."""
    dtype = vector_type(lanes_of(value), element)
    return value if dtype_of(value) == dtype else T.Cast(dtype, value)


def splat(value: Any, lanes: int) -> Any:
    """`value` in every lane."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def at(start: Any, lanes: int) -> Any:
    """The index of `lanes` consecutive elements."""
    return start if lanes == 1 else T.ramp(start, 1, lanes)


def load(buffer: Any, start: Any, lanes: int) -> Any:
    """`lanes` consecutive elements from `start`; no alignment needed."""
    return buffer[at(start, lanes)]


def load_float(buffer: Any, start: Any, lanes: int) -> Any:
    """`lanes` consecutive elements as float32."""
    return convert(load(buffer, start, lanes), "float32")


def store(buffer: Any, start: Any, value: Any, lanes: int, valid: int | None = None, first: int = 0) -> None:
    """Write the first `valid` (default all) of `lanes` lanes of `value` from `start` on, and nothing beyond.

    The lanes are those of `value` from `first` on.
    """
    valid = lanes if valid is None else valid
    if valid == lanes == lanes_of(value):
        T.buffer_store(buffer, value, [at(start, lanes)])
        return
    done = 0
    while done < valid:
        part = 1 << ((valid - done).bit_length() - 1)
        lane = first + done
        T.buffer_store(buffer, T.Shuffle([value], list(range(lane, lane + part))), [at(start + done, part)])
        done += part


def prefetch(buffer: Any, index: Any) -> None:
    """Ask for the cache line of an element that will be read soon; nothing happens where it does not exist."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(buffer[index]), 0, 3, 1))


def lane(vector: Any, index: int, width: int) -> Any:
    """Lane `index` of a vector in all of `width` lanes: an FMA's by-element operand on Arm."""
    return T.Shuffle([vector] * max(1, width // lanes_of(vector)), [index] * width)


def dtype_of(value: Any) -> str:
    """Element type of an expression, `float32x4` or such."""
    return str(value.ty.dtype if hasattr(value.ty, "dtype") else value.dtype)


def lanes_of(value: Any) -> int:
    """Lanes of an expression."""
    return int(dtype_of(value).partition("x")[2] or 1)


def element_bytes(buffer: Any) -> int:
    """Bytes of a buffer's element."""
    return np.dtype(str(buffer.dtype)).itemsize


class Scalars:
    """`count` consecutive elements of a buffer as factors of multiply-adds.

    By lanes (Arm): loaded as vectors of 16 and 8 bytes, of which an FMA takes one element; else each is broadcast.
    """

    def __init__(self, buffer: Any, start: Any, count: int, by_lanes: bool) -> None:
        self.buffer, self.start = buffer, start
        self._lanes: list[tuple[Any, int]] = []  # vector and lane of each element
        size = element_bytes(buffer)
        for width in (16 // size, 8 // size):
            while by_lanes and count - len(self._lanes) >= width:
                vector = load(buffer, start + len(self._lanes), width)
                self._lanes.extend((vector, i) for i in range(width))

    def __call__(self, index: int, width: int) -> Any:
        """Element `index` in all of `width` lanes."""
        if index < len(self._lanes):
            return lane(*self._lanes[index], width)
        return splat(self.buffer[self.start + index], width)


class Accumulators:
    """Sums in registers: for each part p a number of vectors, `counts[p]`, all `widths[p]` lanes wide."""

    def __init__(self, counts: Sequence[int], widths: Sequence[int], element: str) -> None:
        self.counts, self.widths, self.element = tuple(counts), tuple(widths), element
        self._registers = {
            width: registers(sum(c for c, w in zip(counts, widths, strict=True) if w == width), width, element)
            for width in sorted(set(widths))
        }

    def _slot(self, i: int, p: int) -> int:
        width = self.widths[p]
        return sum(c for c, w in zip(self.counts[:p], self.widths[:p], strict=True) if w == width) + i

    def like(self) -> Accumulators:
        """Other accumulators of the same shape."""
        return Accumulators(self.counts, self.widths, self.element)

    def get(self, i: int, p: int) -> Any:
        """The value of one accumulator."""
        return self._registers[self.widths[p]][self._slot(i, p)]

    def set(self, i: int, p: int, value: Any) -> None:
        """Replace one accumulator."""
        T.buffer_store(self._registers[self.widths[p]], value, [self._slot(i, p)])

    def fill(self, value: Callable[[int, int], Any]) -> None:
        """Replace every accumulator by `value(i, p)`."""
        for p in range(len(self.widths)):
            for i in range(self.counts[p]):
                self.set(i, p, value(i, p))


def in_rounds(count: Any, size: int, one: Callable[[Any, int], None]) -> None:
    """Loop over `count` terms: `one(first, size)` where whole rounds are left, then what remains."""
    whole = count // size
    if size > 1 and not isinstance(count, int):
        whole = T.bind(whole)
    with T.serial(0, whole) as i:
        one(i * size, size)
    if isinstance(count, int):
        if count % size:
            one(count - count % size, count % size)
    elif size > 1:
        with T.serial(0, count - whole * size) as i:
            one(whole * size + i, 1)


def in_chains(sums: Accumulators, count: Any, limit: int, body: Callable[[Any, Any], None]) -> None:
    """`body(first, count)` adds terms to `sums`; no more than `limit` follow each other in one sum, if that is not 0.

    The error of a sum grows with the root of its length; in float16 long ones are made of short ones.
    """
    if not limit:
        body(0, count)
        return
    before = sums.like()
    before.fill(sums.get)
    with T.serial(0, (count + limit - 1) // limit) as i:
        sums.fill(lambda r, p: constant(0, sums.widths[p], sums.element))
        even = isinstance(count, int) and count % limit == 0
        body(i * limit, limit if even else T.min(limit, count - i * limit))
        before.fill(lambda r, p: before.get(r, p) + sums.get(r, p))
    sums.fill(before.get)
