"""Kernels as a loaded library for this machine, with memory placed as the runtime places it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sparsec.codegen import compile_kernels
from sparsec.program import ALIGNMENT, MAX_ARGS, SLACK, Kernel
from sparsec.targets import Target

Call = Callable[[int, int], None]  # begin, end


class Memory:
    """`size` bytes at a 64-byte boundary with the slack that kernels may touch, zero at first."""

    def __init__(self, size: int, content: np.ndarray | None = None) -> None:
        self._room = np.zeros(size + SLACK + ALIGNMENT, np.uint8)
        self.address = self._room.ctypes.data + -self._room.ctypes.data % ALIGNMENT
        self.bytes = self._room[self.address - self._room.ctypes.data :][:size]
        if content is not None:
            self.bytes[: content.nbytes] = np.ascontiguousarray(content).reshape(-1).view(np.uint8)


class Loaded:
    """The kernels, compiled and linked. Close it to unload the library."""

    def __init__(self, kernels: Sequence[Kernel], target: Target) -> None:
        with tempfile.TemporaryDirectory(prefix="sparsec-bench-") as folder:
            compile_kernels(tuple(kernels), target, Path(folder, "kernels.o"))
            compiler = [shutil.which("gcc")] if shutil.which("gcc") else [sys.executable, "-m", "ziglang", "cc"]
            subprocess.run([*compiler, "-shared", "-o", "kernels.so", "kernels.o", "-lm"], cwd=folder, check=True)
            self._library = ctypes.CDLL(str(Path(folder, "kernels.so")))

    def bind(self, name: str, addresses: Sequence[int]) -> Call:
        """Kernel `name` on these pointers; the caller keeps the memory."""
        function = self._library[name]
        function.restype = None
        function.argtypes = [ctypes.c_void_p] * MAX_ARGS + [ctypes.c_int32, ctypes.c_int32]
        pointers = [ctypes.c_void_p(address) for address in addresses]
        pointers += [ctypes.c_void_p(None)] * (MAX_ARGS - len(pointers))
        return lambda begin, end: function(*pointers, begin, end)


def seconds(call: Call, tiles: int) -> float:
    """Of one call, without what Python's way into it costs (measured on an empty range)."""
    start = time.perf_counter_ns()
    call(0, 0)
    middle = time.perf_counter_ns()
    call(0, tiles)
    end = time.perf_counter_ns()
    return max(1, (end - middle) - (middle - start)) * 1e-9
