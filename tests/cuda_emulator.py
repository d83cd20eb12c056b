"""Runs CUDA kernels on a CPU: the CUDA C that would go to NVRTC, compiled as C++ with `cuda/emulate.h` in place of CUDA.

What is tested is therefore the text that the device compiler gets, but not the device compiler. Memory is guarded as in
`harness`; threads run in ascending and in descending order, and both must agree bit by bit.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import Room

from sparsec.cuda.source import PRELUDE, cuda_source, launch_of
from sparsec.program import Kernel, Launch, Program, Step
from sparsec.runtimes.base import machine_arch

HEADER = Path(__file__).with_name("cuda") / "emulate.h"
FLAGS = (
    "-nostdinc++", "-O1", "-std=c++17", "-fPIC", "-shared", "-w", "-fno-exceptions", "-fno-rtti",
    "-ffp-contract=fast", "-fno-sanitize=all", "-fsanitize=alignment,array-bounds", "-fsanitize-minimal-runtime",
    "-fno-sanitize-recover=alignment,array-bounds",
)  # fmt: skip
_SIGNATURE = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(([^)]*)\) \{')


def emulation_source(source: str) -> str:
    """CUDA C as `cuda_source` makes it -> C++ with one `emulated_NAME(pointers, grid, block, order)` a kernel.

    `arguments_NAME` is the number of its pointers.
    """
    body = source.removeprefix(PRELUDE)
    runs = []
    for name, parameters in _SIGNATURE.findall(body):
        types = [
            re.sub(r"\s*\w+$", "", p.replace("__restrict__", "").strip()) for p in parameters.split(",") if p.strip()
        ]
        arguments = ", ".join(f"({kind})a[{i}]" for i, kind in enumerate(types))
        runs.append(
            f'extern "C" __attribute__((visibility("default"))) void emulated_{name}(void **pointers, dim3 grid, '
            f"dim3 block, int order) {{\n    emulate(grid, block, order, [](void *data) {{ void **a = (void **)data; "
            f"(void)a; {name}({arguments}); }}, pointers);\n}}\n"
            f'extern "C" __attribute__((visibility("default"))) const int arguments_{name} = {len(types)};\n'
        )
    return f'#include "{HEADER}"\n{body}\n{"".join(runs)}'


def build_emulation(source: str, folder: Path) -> Path:
    """A shared library of `emulation_source(source)`."""
    (folder / "kernels.cpp").write_text(emulation_source(source), encoding="utf-8")
    machine = ["-mfma", "-mf16c"] if machine_arch() == "x86_64" else []
    command = [sys.executable, "-m", "ziglang", "cc", *FLAGS, *machine, "kernels.cpp", "-o", "kernels.so", "-lm"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "kernels.so"


class Dim3(ctypes.Structure):
    """CUDA's dim3."""

    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint)]


class EmulatedLibrary:
    """Kernels as a library that emulates them."""

    def __init__(self, kernels: Sequence[Kernel], arch: str = "sm_90") -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.source = cuda_source(tuple(kernels), arch)
            self._library = ctypes.CDLL(str(build_emulation(self.source, Path(folder))))

    def run(self, name: str, pointers: Sequence[int], launch: Launch, order: int = 0) -> None:
        """Run kernel `name` on addresses. order 0: threads and blocks ascending, 1: descending."""
        array = (ctypes.c_void_p * max(1, len(pointers)))(*pointers)
        function = self._library[f"emulated_{name}"]
        function.restype = None
        function.argtypes = [ctypes.c_void_p, Dim3, Dim3, ctypes.c_int]
        ctypes.c_uint.in_dll(self._library, "emulated_room_bytes").value = launch.shared
        function(array, Dim3(*launch.grid), Dim3(*launch.block), order)


def run_cuda(func: Any, arrays: Sequence[np.ndarray], arch: str = "sm_90") -> list[np.ndarray]:
    """Copies of `arrays` (one per buffer parameter, outputs included, these filled with garbage) after `func` ran."""
    launch = launch_of(func)
    library = EmulatedLibrary([Kernel("kernel_under_test", func, "", launch)], arch)
    results = []
    for order in (0, 1):
        rooms = [Room(array) for array in arrays]
        library.run("kernel_under_test", [room.array.ctypes.data for room in rooms], launch, order)
        for i, room in enumerate(rooms):
            room.check(f"argument {i}")
        results.append([room.array for room in rooms])
    for i, (up, down) in enumerate(zip(*results, strict=True)):
        assert up.tobytes() == down.tobytes(), f"argument {i} depends on the order of threads: a barrier is missing"
    return results[0]


def run_program(program: Program, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a program for CUDA: its kernels emulated, steps for the host on this CPU.

    In both orders of threads and blocks, which must agree bit by bit; memory as in `programs.execute`.
    """
    from harness import Library, ranges
    from programs import execute

    device = EmulatedLibrary([k for k in program.kernels if k.launch is not None], program.target.gpu.arch)
    launches = {kernel.name: kernel.launch for kernel in program.kernels}
    own = [kernel for kernel in program.kernels if kernel.launch is None]
    host = Library(own, program.target) if own else None
    results = []
    for order in (0, 1):

        def run(step: Step, spaces: Mapping[str, np.ndarray], order: int = order) -> None:
            launch = launches[step.kernel]
            if launch is None:
                for span in ranges(step.tiles, 3):
                    host.run(step.kernel, [(spaces[arg.space], arg.offset) for arg in step.args], [span])
            else:
                device.run(step.kernel, [spaces[a.space].ctypes.data + a.offset for a in step.args], launch, order)

        results.append(execute(program, feeds, run))
    for name, value in results[0].items():
        assert value.tobytes() == results[1][name].tobytes(), f"{name} depends on the order of threads"
    return results[0]
