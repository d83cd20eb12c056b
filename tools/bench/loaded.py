"""Kernels called alone: a bound call and its time, over `sparsec.measure`'s libraries and buffers."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence

import numpy as np

from sparsec.measure import Library, Room
from sparsec.program import MAX_ARGS

Call = Callable[[int, int], None]  # begin, end


def room_of(array: np.ndarray) -> Room:
    """A copy of `array` where kernels may touch it."""
    flat = np.ascontiguousarray(array).reshape(-1)
    room = Room(flat.size, str(flat.dtype))
    room.array[:] = flat
    return room


def bind(library: Library, name: str, pointers: Sequence[int]) -> Call:
    """Kernel `name` on these addresses; the caller keeps the memory."""
    function = library.function(name)
    arguments = [*map(ctypes.c_void_p, pointers), *[None] * (MAX_ARGS - len(pointers))]
    return lambda begin, end: function(*arguments, begin, end)


def seconds(call: Call, tiles: int) -> float:
    """Of one call, without what Python's way into it costs (measured on an empty range)."""
    start = time.perf_counter_ns()
    call(0, 0)
    middle = time.perf_counter_ns()
    call(0, tiles)
    end = time.perf_counter_ns()
    return max(1, (end - middle) - (middle - start)) * 1e-9
