"""Checks calls of device kernels against references: emulated in both orders of threads, and compiled for devices.

All kernels of a check are one library, so that the compiler starts once.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from cuda_emulator import EmulatedLibrary
from harness import Room

from sparsec.cuda import nvrtc
from sparsec.cuda.source import cuda_source, launch_of
from sparsec.kernels.cuda.base import DeviceCall, Gpu
from sparsec.program import Kernel

# Round figures of one device; what kernels compute does not depend on them, which tile is chosen does.
GPU = Gpu("sm_90", 132, 1.75, 3350, 5500, 50 << 20, 228 << 10, threads=2048, tensor_fma=1270)
ORIN = Gpu("sm_87", 16, 1.3, 204, 600, 4 << 20, 164 << 10, tensor_fma=1024)
ARCHS = ("sm_87", "sm_90")


@dataclass
class DeviceLayer:
    """Calls in order, what the activations hold before, and what some of them must hold after."""

    calls: tuple[DeviceCall, ...]
    expected: np.ndarray
    tolerance: np.ndarray | float
    given: dict[str, np.ndarray]
    rooms: dict[str, tuple[int, str]] = field(default_factory=dict)  # values between the calls

    def __post_init__(self) -> None:
        self.expected = np.asarray(self.expected)


def round_to(element: str, *arrays: np.ndarray) -> list[np.ndarray]:
    """Arrays as the device stores them."""
    return [np.asarray(array, np.float32).astype(element) for array in arrays]


def kernels_of(layers: Sequence[DeviceLayer]) -> list[Kernel]:
    """Every kernel of the layers, once."""
    found = {}
    for layer in layers:
        for call in layer.calls:
            assert call.launch == launch_of(call.func)
            found.setdefault(call.name, Kernel(call.name, call.func, call.text, call.launch))
    return list(found.values())


def check_device_layers(layers: Sequence[DeviceLayer], element: str) -> None:
    """Run every layer emulated, threads ascending and descending, and compare role "y" with what is expected."""
    library = EmulatedLibrary(kernels_of(layers))
    for i, layer in enumerate(layers):
        names = ", ".join(call.name for call in layer.calls)
        results = []
        for order in (0, 1):
            rooms = {role: Room(array) for role, array in layer.given.items()}
            rooms["y"] = Room(np.full(layer.expected.shape, np.nan, element))
            for name, (size, dtype) in layer.rooms.items():
                rooms[name] = Room(np.full(size, np.nan, dtype))
            for call in layer.calls:
                own = {name: Room(np.full(size, np.nan, dtype)) for name, (size, dtype) in call.rooms.items()}
                own |= {role: Room(array) for role, array in call.constants.items()}
                bound = [(own | rooms)[role] for role in call.roles]
                library.run(call.name, [room.array.ctypes.data for room in bound], call.launch, order)
                for role, room in zip(call.roles, bound, strict=True):
                    room.check(f"layer {i}, {call.name}, {role}")
            results.append(rooms["y"].array)
        assert results[0].tobytes() == results[1].tobytes(), f"layer {i}, {names}: depends on the order of threads"
        difference = np.abs(results[0].astype(np.float64) - layer.expected)
        excess = np.nanmax(difference / layer.tolerance) if difference.size else 0.0
        assert not np.isnan(difference).any(), f"layer {i}, {names}: NaN at {np.argwhere(np.isnan(difference))[0]}"
        assert excess <= 1, f"layer {i}, {names}: {excess:.2f} times the tolerance at {np.argmax(difference)}"


def resources(kernels: Sequence[Kernel], arch: str) -> dict[str, tuple[int, int, int]]:
    """Registers, bytes of local memory (stack and spills) and bytes of static shared memory of each kernel, by ptxas."""
    library, program = nvrtc._library(), ctypes.c_void_p()
    source = cuda_source(tuple(kernels), arch).encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None) == 0
    flags = [f"--gpu-architecture={arch}", "--std=c++17", f"--include-path={nvrtc.include_folder()}", "-default-device",
             "--ptxas-options=-v", "-w"]  # fmt: skip
    failed = library.nvrtcCompileProgram(
        program, len(flags), (ctypes.c_char_p * len(flags))(*[f.encode() for f in flags])
    )
    log = nvrtc._text(program, "ProgramLog").decode()
    library.nvrtcDestroyProgram(ctypes.byref(program))
    assert not failed, log
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        frame, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", part).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = re.search(r"(\d+) bytes smem", part)
        found[part.partition("'")[0]] = (registers, frame + stores + loads, int(shared[1]) if shared else 0)
    return found


def check_resources(layers: Sequence[DeviceLayer], arch: str) -> dict[str, tuple[int, int, int]]:
    """Compile for a device; no kernel may use local memory, nor more than 48 KiB of shared memory."""
    kernels = kernels_of(layers)
    found = resources(kernels, arch)
    assert set(found) == {kernel.name for kernel in kernels}
    spilled = {name: facts for name, facts in found.items() if facts[1] or facts[2] > 48 << 10}
    assert not spilled, f"registers, local bytes, shared bytes: {spilled}"
    return found
