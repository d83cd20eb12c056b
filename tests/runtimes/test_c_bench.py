"""The artifact's `bench`: answers, figures, exit codes; natively and under qemu-aarch64."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from pathlib import Path

import c_api
import hand_programs
import numpy as np
import pytest

from sparsec.building.emit import pack_parity
from sparsec.targets import find_target

QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
SAMPLE_BYTES = hand_programs.ROWS * hand_programs.COLUMNS * 4


def emulator(target: str) -> list[str]:
    """What runs `bench` of a target here."""
    if target == "host" or platform.machine() == "aarch64":
        return []
    if QEMU is None:
        pytest.skip("qemu-aarch64 is not installed (apt-get install qemu-user)")
    return [QEMU]


TARGETS = [("host", None), ("arm", "android"), ("arm", "linux")]


def run(folder: Path, *arguments: str, target: str = "host") -> subprocess.CompletedProcess[str]:
    command = [*emulator(target), str(folder / "bench"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("target", "os"), TARGETS)
@pytest.mark.parametrize("threads", [1, 3])
def test_checks_itself_and_reports(target, os, threads):
    arguments = ["--runs", "7", "--warmup", "2", "--threads", str(threads), "--json"]
    done = run(c_api.built(target, os), *arguments, target=target)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["runs"], report["warmup"], report["threads"]) == (7, 2, threads)
    assert 0 <= report["min_ms"] <= report["median_ms"] <= report["p90_ms"]
    assert report["min_ms"] <= report["mean_ms"]
    assert report["peak_bytes"] > report["model_bytes"] > 3 * SAMPLE_BYTES
    assert report["check"] == {"passed": True, "max_relative_error": 0, "tolerance": pytest.approx(1e-6)}


@pytest.mark.parametrize(("target", "os"), TARGETS)
def test_several_samples_from_a_file(target, os, tmp_path):
    xs = [hand_programs.sample(i) for i in range(5)]
    (tmp_path / "in").write_bytes(b"".join(x.tobytes() for x in xs))
    files = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    done = run(c_api.built(target, os), *files, "--no-check", "--warmup", "0", "--json", target=target)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["runs"] == 5
    assert "check" not in json.loads(done.stdout)
    made = hand_programs.program(find_target(target, os=os))
    wanted = b"".join(array.tobytes() for x in xs for array in hand_programs.reference(made, x))
    assert (tmp_path / "out").read_bytes() == wanted


def test_more_runs_than_samples(tmp_path):
    (tmp_path / "in").write_bytes(hand_programs.sample().tobytes())
    files = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    done = run(c_api.built(), *files, "--runs", "9", "--json")
    assert json.loads(done.stdout)["runs"] == 9
    assert (tmp_path / "out").stat().st_size == SAMPLE_BYTES + hand_programs.COLUMNS * 4


def test_text_report():
    done = run(c_api.built(), "--runs", "3")
    assert done.returncode == 0
    assert "median" in done.stdout
    assert "check passed" in done.stdout


def copy(tmp_path: Path, **change: bytes | None) -> Path:
    """The built folder with `change`d files: new content, or None for a missing one."""
    folder = tmp_path / "copy"
    shutil.copytree(c_api.built(), folder)
    for name, content in change.items():
        path = folder / f"{name}.bin"
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    return folder


def parity(factor: float, tolerance: float) -> bytes:
    x = hand_programs.sample()
    y, row = hand_programs.reference(hand_programs.program(), x)
    return pack_parity([x], [y * np.float32(factor), row], [tolerance, 0.0])


def test_a_result_outside_its_tolerance_fails(tmp_path):
    done = run(copy(tmp_path, parity=parity(1.01, 1e-3)), "--json")
    assert done.returncode == 1
    check = json.loads(done.stdout)["check"]
    assert check["passed"] is False
    assert check["max_relative_error"] == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert check["tolerance"] == pytest.approx(1e-3)
    assert "FAILED" in run(tmp_path / "copy").stdout
    assert run(tmp_path / "copy", "--no-check").returncode == 0


def test_a_result_within_its_tolerance_passes(tmp_path):
    assert run(copy(tmp_path, parity=parity(1.01, 0.011)), "--json").returncode == 0


@pytest.mark.parametrize("output", [0, 1])
def test_not_a_number_never_passes(tmp_path, output):
    x = hand_programs.sample()
    wanted = hand_programs.reference(hand_programs.program(), x)
    wanted[output] = wanted[output].copy()
    wanted[output].flat[3] = np.nan
    done = run(copy(tmp_path, parity=pack_parity([x], wanted, [1e30, 1e30])), "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["check"]["max_relative_error"] is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--runs", "0"], ["--runs", "x"], ["--runs", "1x"], ["--runs"], ["--warmup", "-1"], ["--threads", "0"],
        ["--threads", "999"], ["--frobnicate"], ["--input", "a"], ["--output", "a"], ["--input"], [""],
        ["--runs", "99999999999999999999"],
    ],
)  # fmt: skip
def test_usage(arguments):
    done = run(c_api.built(), *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("size", [0, 1, SAMPLE_BYTES - 1, SAMPLE_BYTES + 1])
def test_an_input_file_of_a_wrong_size(tmp_path, size):
    (tmp_path / "in").write_bytes(bytes(size))
    done = run(c_api.built(), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert str(SAMPLE_BYTES) in done.stderr


def test_missing_and_unwritable_files(tmp_path):
    assert run(c_api.built(), "--input", str(tmp_path / "none"), "--output", str(tmp_path / "out")).returncode == 3
    (tmp_path / "in").write_bytes(bytes(SAMPLE_BYTES))
    assert run(c_api.built(), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "no/out")).returncode == 3
    assert run(c_api.built(), "--input", str(tmp_path / "in"), "--output", "/dev/full").returncode == 3
    assert run(c_api.built(), "--input", str(tmp_path), "--output", str(tmp_path / "out")).returncode == 3


@pytest.mark.parametrize("name", ["weights", "parity"])
@pytest.mark.parametrize("content", [None, b"", b"SPARSECP" + bytes(20), b"SPARSECW" + bytes(200)])
def test_missing_or_damaged_files_beside_it(tmp_path, name, content):
    done = run(copy(tmp_path, **{name: content}))
    assert done.returncode == 3
    assert f"{name}.bin" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_parity_of_another_size(tmp_path):
    good = parity(1, 1)
    for cut in (len(good) - 1, 70, 64, 63):
        assert run(copy(tmp_path / str(cut), parity=good[:cut])).returncode == 3
    assert run(copy(tmp_path / "more", parity=good + b"x")).returncode == 3


def test_without_a_sample_zeros_are_timed(tmp_path):
    assert run(copy(tmp_path, parity=None), "--no-check").returncode == 0


def test_a_missing_feature_is_named(tmp_path):
    folder = c_api.build_program(hand_programs.program(features=("quantum", "more")))
    done = run(folder)
    assert done.returncode == 3
    assert "'quantum'" in done.stderr


@pytest.mark.skipif(QEMU is None, reason="qemu-aarch64 is not installed (apt-get install qemu-user)")
@pytest.mark.parametrize(("emulated", "built_for", "missing"), [
    ("cortex-a53", "armv8.2-a", True), ("cortex-a76", "armv8.2-a", False), ("cortex-a53", "cortex-a53", False),
])  # fmt: skip
def test_an_older_cpu_is_noticed_before_it_crashes(emulated, built_for, missing):
    folder = c_api.build_program(hand_programs.program(find_target("arm", built_for)))
    done = subprocess.run(
        [QEMU, "-cpu", emulated, folder / "bench"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == (3 if missing else 0)
    assert ("'dotprod'" in done.stderr) == missing


def test_embedded_weights_need_no_file():
    folder = c_api.build_program(hand_programs.program(), embed_weights=True)
    assert run(folder).returncode == 0
