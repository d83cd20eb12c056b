"""Interruption, full and read-only disks, closed pipes: nothing half done stays."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import Run, refused
from samples import pair_artifact


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`sparsec` in a process of its own, its work slowed down once the temporary directory is there."""
    script = (
        "import signal, sys, time, sparsec.building.build\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a suite in the background inherits it as ignored
        "real = sparsec.building.build.build\n"
        "def slow(*a, **k):\n"
        "    real(*a, **k)\n"
        "    print('built', flush=True)\n"
        "    time.sleep(60)\n"
        "sparsec.building.build.build = slow\n"
        "from sparsec import cli\n"
        "cli.main()\n"
    )
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("number", "code", "old"), [(signal.SIGINT, 130, False), (signal.SIGTERM, 143, True)])
def test_interrupted(folder: Path, number: signal.Signals, code: int, old: bool) -> None:
    if old:
        shutil.copytree(pair_artifact().path, folder / "pair.sparsec")
    before = sorted(os.listdir(folder))
    process = start(folder, "compile", "pair.onnx", "--overwrite")
    assert process.stdout is not None
    assert process.stdout.readline() == "built\n"
    assert any(name.endswith(".partial") for name in os.listdir(folder))  # else this test proves nothing
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert sorted(os.listdir(folder)) == before
    assert "Traceback" not in err
    if number == signal.SIGINT:
        assert err.startswith("error: interrupted")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small file system with the given options."""
    made: list[Path] = []

    def make(options: str) -> Path:
        point = tmp_path / f"disk{len(made)}"
        point.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        made.append(point)
        return point

    yield make
    for point in made:
        subprocess.run(["umount", str(point)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
@pytest.mark.parametrize("options", ["nr_inodes=1", "size=8k", "size=60k", "size=150k"])
def test_full_disk(run: Run, folder: Path, mount: Callable[[str], Path], options: str) -> None:
    """Too small for the directory, for the first file, for the libraries, for the last file."""
    disk = mount(options)
    refused(run("compile", "pair.onnx", "-o", disk), 3, "the disk is full")
    assert os.listdir(disk) == []


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
def test_full_disk_for_one_file(run: Run, folder: Path, mount: Callable[[str], Path]) -> None:
    disk = mount("size=8k")
    (disk / "filler").write_bytes(b"x" * 8192)
    refused(run("rewrite", "pair.onnx", "-o", disk / "out.onnx"), 3, "the disk is full")
    assert os.listdir(disk) == ["filler"]


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
def test_read_only_disk(run: Run, folder: Path, mount: Callable[[str], Path]) -> None:
    disk = mount("ro")
    refused(run("compile", "pair.onnx", "-o", disk), 2, "Read-only file system")
    refused(run("rewrite", "pair.onnx", "-o", disk / "out.onnx"), 2, "Read-only file system")


def test_output_below_a_file(run: Run, folder: Path) -> None:
    refused(run("compile", "pair.onnx", "-o", "pair.onnx/deeper"), 2, "cannot write")
    refused(run("rewrite", "pair.onnx", "-o", "absent/out.onnx"), 2, "cannot write")
    assert os.listdir() == ["pair.onnx"]


def test_closed_pipe(folder: Path) -> None:
    command = f"{sys.executable} -m sparsec.cli models | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
