"""A Program run in this process: its kernels linked into one shared object, its steps walked in Python.

What `sparsec.building.build` makes of a Program is an artifact, with the C runtime, for any target. This is the short way to the
same kernels and the same memory plan on this machine: no weights file, no runtime, one link of one object (or of many
programs together). Each step is one call of `kernel(pointers..., begin, end)` (`sparsec.program`).
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sparsec.building.codegen import compile_kernels
from sparsec.errors import BuildError, DataError, RuntimeUnavailable, one_line
from sparsec.program import ALIGNMENT, MAX_ARGS, SLACK, Kernel, Program, Tensor
from sparsec.runtimes.base import machine_arch
from sparsec.targets import Target

Arrays = Mapping[str, np.ndarray]


class Kernels:
    """Machine code of kernels, loaded. Kernels of one name are one code (`sparsec.lowering.plan`)."""

    def __init__(self, kernels: Sequence[Kernel], target: Target) -> None:
        if target.arch != machine_arch():
            raise RuntimeUnavailable(f"code for {target.arch} cannot run on {machine_arch()}", target.name)
        unique = tuple({kernel.name: kernel for kernel in kernels}.values())
        self._library = _link(unique, target) if unique else None
        self._functions: dict[str, ctypes._FuncPointer] = {}

    def function(self, name: str) -> ctypes._FuncPointer:
        """`void(void *a0, ..., void *a7, int32_t begin, int32_t end)`."""
        if name not in self._functions:
            assert self._library is not None
            function = self._library[name]
            function.restype = None
            function.argtypes = [ctypes.c_void_p] * MAX_ARGS + [ctypes.c_int32, ctypes.c_int32]
            self._functions[name] = function
        return self._functions[name]


def _link(kernels: tuple[Kernel, ...], target: Target) -> ctypes.CDLL:
    ctypes.CDLL("libm.so.6", ctypes.RTLD_GLOBAL)  # what kernels call is found there
    with tempfile.TemporaryDirectory(prefix="sparsec-") as folder:
        code, library = Path(folder, "kernels.o"), Path(folder, "kernels.so")
        compile_kernels(kernels, target, code)
        command = [sys.executable, "-m", "ziglang", "ld.lld", "-shared", str(code), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"kernels cannot be linked: {one_line(done.stderr, 400)}", target.name)
        return ctypes.CDLL(str(library))


class InProcess:
    """One program, ready to run; not for two threads at once."""

    def __init__(self, program: Program, kernels: Kernels | None = None) -> None:
        self.program = program
        kernels = kernels or Kernels(program.kernels, program.target)
        self._arena = _memory(program.arena_bytes)
        self._weights = _memory(program.weights_bytes)
        self._scratch = _memory(program.scratch_bytes + SLACK)
        for constant in program.constants:
            data = np.ascontiguousarray(constant.data).reshape(-1).view(np.uint8)
            self._weights[constant.offset : constant.offset + data.size] = data
        spaces = {"arena": self._arena, "weights": self._weights, "scratch": self._scratch}
        self._calls = []
        for step in program.steps:
            places = [spaces[arg.space].ctypes.data + arg.offset for arg in step.args]
            arguments = [*places, *[None] * (MAX_ARGS - len(places)), 0, step.tiles]
            self._calls.append((kernels.function(step.kernel), arguments))
        self._spaces = spaces

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs by name. Raises DataError for a missing input or one of another shape or type."""
        for tensor in self.program.inputs:
            array = inputs.get(tensor.name)
            if array is None or array.shape != tensor.shape or str(array.dtype) != tensor.dtype:
                got = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
                raise DataError(f"expected {tensor.dtype}{list(tensor.shape)}, got {got}", f"input {tensor.name!r}")
            self._view(tensor)[...] = array
        for function, arguments in self._calls:
            function(*arguments)
        return {tensor.name: self._view(tensor).copy() for tensor in self.program.outputs}

    def _view(self, tensor: Tensor) -> np.ndarray:
        start = tensor.location.offset
        data = self._spaces[tensor.location.space][start : start + tensor.size]
        return data.view(tensor.dtype).reshape(tensor.shape)


def _memory(size: int) -> np.ndarray:
    """`size` aligned bytes with slack behind."""
    room = np.zeros(size + SLACK + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + size]
