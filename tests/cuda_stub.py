"""The stub of the CUDA driver (`cuda/stub_driver.c`) as libcuda.so.1, for processes that find it by LD_LIBRARY_PATH."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("cuda") / "stub_driver.c"


@cache
def stub_folder(*absent: str) -> Path:
    """A folder with the stub, built without the functions named `absent`, as an older driver would be."""
    folder = Path(tempfile.mkdtemp(prefix="sparsec-stub-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    compiler = [shutil.which("gcc")] if shutil.which("gcc") else [sys.executable, "-m", "ziglang", "cc"]
    flags = ["-std=gnu11", "-O1", "-g", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1"]
    flags += [f"-D{name}=absent_{name}" for name in absent]
    command = [*compiler, *flags, str(SOURCE), "-o", str(folder / "libcuda.so.1"), "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def environment(*absent: str, **settings: str | Path) -> dict[str, str]:
    """Variables of a process that finds the stub. `settings`: emulation=PATH, log=PATH, fail=N, set=PROPERTIES."""
    own = {f"SPARSEC_STUB_{name.upper()}": str(value) for name, value in settings.items()}
    return {**os.environ, "LD_LIBRARY_PATH": str(stub_folder(*absent)), **own}


def without_driver() -> dict[str, str]:
    """Variables of a process that finds no driver by LD_LIBRARY_PATH."""
    return {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}


@contextlib.contextmanager
def emulation_of_what_is_compiled(folder: Path) -> Iterator[list[Path]]:
    """What is compiled for CUDA inside becomes, as the same texts, libraries in `folder`: in the list when it ends."""
    from cuda_emulator import build_emulation

    from sparsec.cuda import build

    texts: list[str] = []
    libraries: list[Path] = []
    real = build.cuda_source

    def recorded(*arguments: Any) -> str:
        texts.append(real(*arguments))
        return texts[-1]

    build.cuda_source = recorded  # type: ignore[assignment]
    try:
        yield libraries
    finally:
        build.cuda_source = real
    for i, text in enumerate(texts):
        with tempfile.TemporaryDirectory() as work:
            libraries.append(Path(shutil.move(build_emulation(text, Path(work)), folder / f"emulation{i}.so")))
