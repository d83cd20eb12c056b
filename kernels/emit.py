"""Building TIR from Python: small words over TVM's IRBuilder.

Kernels here are written as loops over *vector values* (`float32x16`), so that the register tile is what the code says it
is; LLVM keeps a local buffer of vectors with constant indices in registers. Ordinary Python loops unroll.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T


def function(arguments: list[tuple[str, int, str]], body: Callable[..., None]) -> Any:
    """A PrimFunc over flat buffers `(name, elements, dtype)`; `body(*buffers, begin, end)` emits its statements."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("kernel")
        buffers = [T.arg(name, T.buffer((max(size, 1),), dtype)) for name, size, dtype in arguments]
        begin, end = T.arg("begin", T.int32()), T.arg("end", T.int32())
        body(*buffers, begin, end)
    return builder.get()


def vector_type(lanes: int) -> str:
    """`float32x8`, or `float32` for one lane."""
    return "float32" if lanes == 1 else f"float32x{lanes}"


def registers(count: int, lanes: int) -> Any:
    """`count` float32 vectors of `lanes`, to be indexed with constants only."""
    return T.alloc_buffer((count,), vector_type(lanes), scope="local")


def splat(value: Any, lanes: int) -> Any:
    """`value` in every lane."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def at(start: Any, lanes: int) -> Any:
    """The index of `lanes` consecutive elements."""
    return start if lanes == 1 else T.ramp(start, 1, lanes)


def load(buffer: Any, start: Any, lanes: int) -> Any:
    """`lanes` consecutive elements from `start`; no alignment needed."""
    return buffer[at(start, lanes)]


def store(buffer: Any, start: Any, value: Any, lanes: int, valid: int | None = None) -> None:
    """Write the first `valid` (default all) of `lanes` lanes of `value` from `start` on, and nothing beyond."""
    valid = lanes if valid is None else valid
    if valid == lanes:
        T.buffer_store(buffer, value, [at(start, lanes)])
        return
    done = 0
    while done < valid:
        part = 1 << ((valid - done).bit_length() - 1)
        T.buffer_store(buffer, T.Shuffle([value], list(range(done, done + part))), [at(start + done, part)])
        done += part


def lane(vector: Any, index: int, width: int) -> Any:
    """Lane `index` of a vector in all of `width` lanes: an FMA's by-element operand on Arm."""
    return T.Shuffle([vector] * max(1, width // lanes_of(vector)), [index] * width)


def dtype_of(value: Any) -> str:
    """Element type of an expression, `float32x4` or such."""
    return str(value.ty.dtype if hasattr(value.ty, "dtype") else value.dtype)


def lanes_of(value: Any) -> int:
    """Lanes of an expression."""
    return int(dtype_of(value).partition("x")[2] or 1)


class Scalars:
    """`count` consecutive elements of a buffer as factors of multiply-adds.

    By lanes (Arm): loaded as vectors of 16 and 8 bytes, of which an FMA takes one element; else each is broadcast.
    """

    def __init__(self, buffer: Any, start: Any, count: int, by_lanes: bool) -> None:
        self.buffer, self.start = buffer, start
        self._lanes: list[tuple[Any, int]] = []  # vector and lane of each element
        size = np.dtype(str(buffer.dtype)).itemsize
        for width in (16 // size, 8 // size):
            while by_lanes and count - len(self._lanes) >= width:
                vector = load(buffer, start + len(self._lanes), width)
                self._lanes.extend((vector, i) for i in range(width))

    def __call__(self, index: int, width: int) -> Any:
        """Element `index` in all of `width` lanes."""
        if index < len(self._lanes):
            return lane(*self._lanes[index], width)
        return splat(self.buffer[self.start + index], width)
