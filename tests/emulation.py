"""Kernels for Arm, run under qemu for tests: one emulated process answers one request after the other."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparsec.program import ALIGNMENT
from sparsec.runtimes.emulated import find_emulator

Place = tuple[np.ndarray, int]  # bytes, and where in them a pointer points
_DRIVER = Path(__file__).with_name("emulation.c")
# As in `sparsec.runtimes.emulated`: no more features than the target promises.
_CPUS = {"generic": "cortex-a53", "cortex-a53": "cortex-a53", "armv8.6-a": "max"}


class Emulation:
    """A program of the kernels in `folder`/kernels.o, linked there and started."""

    def __init__(self, names: Sequence[str], cpu: str, folder: Path) -> None:
        emulator = find_emulator()
        assert emulator is not None, "ask `find_emulator` first"
        self._number = {name: i for i, name in enumerate(names)}
        declared = "".join(f"kernel {name};\n" for name in names)
        table = f"kernel *const kernels[] = {{{', '.join(names)}}};\n"
        (folder / "driver.c").write_text(_DRIVER.read_text() + declared + table, encoding="utf-8")
        command = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-O1", "-static", "-s"]
        subprocess.run([*command, "-o", "driver", "driver.c", "kernels.o", "-lm"], cwd=folder, check=True)
        command = [emulator, "-cpu", _CPUS.get(cpu, "cortex-a76"), "driver"]
        self._child = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._child.stdout is not None
        assert self._child.stdout.read(1) == b"!", "the emulator did not start"  # from now on the file is not needed

    def run(self, name: str, places: Sequence[Place], spans: Sequence[tuple[int, int]]) -> None:
        """Run a kernel over `spans`; memory changes in place."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        memories: list[np.ndarray] = []
        numbers = []
        for memory, _ in places:
            found = [i for i, known in enumerate(memories) if known is memory]
            numbers.append(found[0] if found else len(memories))
            memories.extend(() if found else (memory,))
        request = struct.pack("<4I", self._number[name], len(memories), len(places), len(spans))
        for memory in memories:
            request += struct.pack("<2Q", memory.nbytes, memory.ctypes.data % ALIGNMENT)
        request += b"".join(memory.tobytes() for memory in memories)
        request += b"".join(struct.pack("<2q", number, at) for number, (_, at) in zip(numbers, places, strict=True))
        request += b"".join(struct.pack("<2i", *span) for span in spans)
        self._child.stdin.write(request)
        self._child.stdin.flush()
        for memory in memories:
            data = self._child.stdout.read(memory.nbytes)
            assert len(data) == memory.nbytes, f"{name} crashed under the emulator"
            memory[...] = np.frombuffer(data, np.uint8)

    def close(self) -> None:
        """End the process."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()
        self._child.stdout.close()
        self._child.wait()
