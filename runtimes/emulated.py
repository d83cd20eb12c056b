"""`emulated`: the artifact's own `bench` under qemu-aarch64, for checks without a device. Its times mean nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from sparsec.errors import RuntimeUnavailable
from sparsec.runtimes.base import Compiled, Runtime, machine_arch
from sparsec.runtimes.batch import BenchSession, Done, call

EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
# The emulated CPU has no more features than the target promises, so that a wrong instruction is found here.
_QEMU_CPU = {"generic": "cortex-a53", "cortex-a53": "cortex-a53", "armv8.6-a": "max"}
_DEFAULT_CPU = "cortex-a76"


def find_emulator() -> str | None:
    """Path of qemu's user emulator for aarch64, or None."""
    return next((path for path in map(shutil.which, EMULATORS) if path), None)


class EmulatedSession(BenchSession):
    """Files go through a temporary directory, one start for many samples."""

    def __init__(self, artifact: Compiled, threads: int | None, prefix: list[str]) -> None:
        super().__init__(artifact, threads, "emulated")
        self._folder = tempfile.TemporaryDirectory(prefix="sparsec-")
        bench = artifact.path.resolve() / "bench"
        if not os.access(bench, os.X_OK):  # a copy may have lost the mode
            folder = Path(self._folder.name)
            for name in ("bench", "weights.bin", "parity.bin"):
                if (bench.parent / name).exists():
                    shutil.copyfile(bench.parent / name, folder / name)
            bench = folder / "bench"
            bench.chmod(0o755)
        self._command = [*prefix, str(bench)]

    def _start(self, arguments: list[str], samples: bytes | None) -> Done:
        source, sink = Path(self._folder.name, "input.bin"), Path(self._folder.name, "output.bin")
        if samples is not None:
            source.write_bytes(samples)
            sink.unlink(missing_ok=True)
            arguments = [*arguments, "--input", str(source), "--output", str(sink)]
        done = call([*self._command, *arguments], self._where)
        output = sink.read_bytes() if samples is not None and sink.exists() else b""
        return Done(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"), output)

    def close(self) -> None:
        self._folder.cleanup()


class Emulated(Runtime):
    """qemu-aarch64 on this machine; on a 64-bit Arm machine `bench` runs as it is."""

    name = "emulated"

    def open(self, artifact: Compiled, threads: int | None = None) -> EmulatedSession:
        target = artifact.manifest["target"]
        if target["runtime"] == "cuda":
            raise RuntimeUnavailable("there is no emulator for CUDA devices; use --runtime cuda", str(artifact.path))
        if target["arch"] == machine_arch():
            return EmulatedSession(artifact, threads, [])
        if target["arch"] != "aarch64":
            raise RuntimeUnavailable(
                f"there is no emulator for {target['arch']} here, only for aarch64", str(artifact.path)
            )
        emulator = find_emulator()
        if emulator is None:
            raise RuntimeUnavailable("qemu-aarch64 is not installed: apt-get install qemu-user", "emulated")
        return EmulatedSession(artifact, threads, [emulator, "-cpu", _QEMU_CPU.get(target["cpu"], _DEFAULT_CPU)])
