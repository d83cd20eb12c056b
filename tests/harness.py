"""Runs kernels alone: compile with `sparsec.building.codegen`, link with the C compiler, call through ctypes.

Shared by the tests of kernels and of the generic route. Every buffer gets only what the runtime promises
(`sparsec.program`): it is aligned to its elements, as a part of a Concat is, and has readable slack behind it, filled with
NaN bytes, of which a kernel must write none; behind the slack nothing may be read. Tiles run in uneven ranges, last range
first, so that a kernel whose tiles depend on each other fails.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from emulation import Emulation, Place

from sparsec.building.codegen import compile_kernels
from sparsec.program import MAX_ARGS, SLACK, Kernel
from sparsec.runtimes.base import machine_arch
from sparsec.targets import Target, find_target

_FILL = 0xFF  # NaN as float32, -1 as integer
_LIBC = ctypes.CDLL(None)


def _guarded(size: int) -> np.ndarray:
    """At least `size` bytes between two pages that must not be touched."""
    page = mmap.PAGESIZE
    inside = -(-size // page) * page
    memory = np.frombuffer(mmap.mmap(-1, inside + 2 * page), np.uint8)
    for guard in (0, page + inside):
        status = _LIBC.mprotect(ctypes.c_void_p(memory.ctypes.data + guard), ctypes.c_size_t(page), 0)
        assert status == 0
    memory = memory[page : page + inside]
    memory[...] = _FILL
    return memory


class Room:
    """One buffer as the runtime may place it: aligned to its elements only, and SLACK bytes behind it.

    Reading past the slack, or in front of the buffer where it is `first` in its memory, ends the process.
    """

    def __init__(self, array: np.ndarray, first: bool = False) -> None:
        array = np.asarray(array)
        self.size = array.nbytes
        self.memory = _guarded(self.size + SLACK)
        self.start = 0 if first else self.memory.size - SLACK - self.size
        self.array = self.memory[self.start : self.start + self.size].view(array.dtype).reshape(array.shape)
        self.array[...] = array

    @property
    def place(self) -> Place:
        """The first element."""
        return self.memory, self.start

    def check(self, what: str) -> None:
        """Raise AssertionError if something was written outside the buffer: there may be another one."""
        assert (self.memory[: self.start] == _FILL).all(), f"{what}: written in front of the buffer"
        assert (self.memory[self.start + self.size :] == _FILL).all(), f"{what}: written behind the buffer"


def ranges(tiles: int, splits: int) -> list[tuple[int, int]]:
    """`[0, tiles)` in at most `splits` uneven ranges, last first."""
    parts = max(1, min(splits, tiles))
    cuts = sorted({0, tiles, *(tiles * i * i // (parts * parts) for i in range(1, parts))})
    return list(itertools.pairwise(cuts))[::-1]


class Library:
    """Kernels as a loaded shared library for the target; one for another machine runs under its emulator."""

    def __init__(self, kernels: Sequence[Kernel], target: Target | None = None) -> None:
        self.target = target or find_target("host")
        self._emulation: Emulation | None = None
        with tempfile.TemporaryDirectory() as folder:
            compile_kernels(tuple(kernels), self.target, Path(folder, "kernels.o"))
            if self.target.arch != machine_arch():
                self._emulation = Emulation([kernel.name for kernel in kernels], self.target.cpu, Path(folder))
                weakref.finalize(self, self._emulation.close)
                return
            compiler = [shutil.which("gcc")] if shutil.which("gcc") else [sys.executable, "-m", "ziglang", "cc"]
            command = [*compiler, "-shared", "-o", "kernels.so", "kernels.o", "-lm", "-Wl,-z,defs"]
            subprocess.run(command, cwd=folder, check=True)
            self._library = ctypes.CDLL(str(Path(folder, "kernels.so")))

    def run(self, name: str, places: Sequence[Place], spans: Sequence[tuple[int, int]]) -> None:
        """Run kernel `name` over the tile ranges `spans` with pointers to `places`, in place."""
        if self._emulation is not None:
            self._emulation.run(name, places, spans)
            return
        function = self._library[name]
        function.restype = None
        function.argtypes = [ctypes.c_void_p] * MAX_ARGS + [ctypes.c_int32, ctypes.c_int32]
        pointers = [ctypes.c_void_p(memory.ctypes.data + at) for memory, at in places]
        for begin, end in spans:
            function(*pointers, *[None] * (MAX_ARGS - len(places)), begin, end)

    def call(self, name: str, rooms: Sequence[Room], tiles: int, splits: int = 3) -> None:
        """Run kernel `name` over all tiles in `splits` uneven ranges, in place."""
        self.run(name, [room.place for room in rooms], ranges(tiles, splits))
        for i, room in enumerate(rooms):
            room.check(f"{name}, argument {i}")


def run_region(
    region: Any, feeds: Mapping[str, np.ndarray], outputs: Mapping[str, tuple[tuple[int, ...], str]], splits: int = 3
) -> dict[str, np.ndarray]:
    """Run the steps of a `GenericRegion` in order. `outputs`: shape and dtype of every value that steps write."""
    rooms = {name: Room(array) for name, array in {**region.constants, **feeds}.items()}
    own = {buffer.name: (buffer.shape, buffer.dtype) for step in region.steps for buffer in step.scratch}
    for name, (shape, dtype) in {**region.temporaries, **own, **outputs}.items():
        garbage = np.frombuffer(bytes([_FILL]) * (int(np.prod(shape)) * np.dtype(dtype).itemsize), np.uint8)
        rooms[name] = Room(garbage.view(dtype).reshape(shape) if dtype != "bool" else np.zeros(shape, bool))
    kernels = {step.kernel.name: step.kernel for step in region.steps}
    library = Library(list(kernels.values()))
    for step in region.steps:
        names = [*step.inputs, *step.outputs, *(buffer.name for buffer in step.scratch)]
        library.call(step.kernel.name, [rooms[name] for name in names], step.tiles, splits)
    return {name: rooms[name].array for name in outputs}


def run_kernel(
    kernel: Any, arrays: Sequence[np.ndarray], tiles: int, target: Target | None = None, splits: int = 3
) -> list[np.ndarray]:
    """Copies of `arrays` (one per buffer parameter, outputs included) after `kernel` ran over `tiles` tiles.

    `kernel` is a `Kernel` or a PrimFunc. Give outputs and scratch as arrays filled with garbage.
    """
    if not isinstance(kernel, Kernel):
        kernel = Kernel("kernel_under_test", kernel)
    rooms = [Room(array) for array in arrays]
    Library([kernel], target).call(kernel.name, rooms, tiles, splits)
    return [room.array for room in rooms]
