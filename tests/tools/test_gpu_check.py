"""tools/gpu_check: a small pack is made, and run on the stub driver by a Python that sees nothing of the project."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_stub import emulation_of_what_is_compiled, environment, without_driver

from sparsec.targets import host_arch

pytest.importorskip("nvidia.cuda_nvrtc", reason="needs NVIDIA's compiler library: pip install 'sparsec[cuda]'")
TOOLS = Path(__file__).parents[2] / "tools"
ITEMS = ("demo_f32_b2", "matmul_dense", "matmul_2_4", "matmul_blocks_128_80", "matvec_int4_groups_50")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Path, str]:
    """The pack and the emulation of all its kernels."""
    folder = tmp_path_factory.mktemp("gpu")
    sys.path.insert(0, str(TOOLS))
    try:
        import gpu_check
    finally:
        sys.path.remove(str(TOOLS))
    with emulation_of_what_is_compiled(folder) as libraries:
        gpu_check.pack(folder / "pack", "sm_90", host_arch(), ",".join(ITEMS), small=True)
    return folder / "pack", ":".join(map(str, libraries))


def run(
    packed: tuple[Path, str], *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    folder, emulation = packed
    command = [sys.executable, str(folder / "run.py"), "--runs", "2", "--skip", "torch", *arguments]
    env = dict(environment(emulation=emulation) if env is None else env)
    env.pop("PYTHONPATH", None)
    return subprocess.run(command, cwd=folder.parent, env=env, capture_output=True, text=True, timeout=600, check=False)


def test_a_pack_runs_where_the_project_is_not(packed, tmp_path):
    done = run(packed, "--json", str(tmp_path / "report.json"))
    assert done.returncode in (0, 1), done.stderr
    assert done.stderr == ""
    rows = {row["what"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    for name in ITEMS:
        (parity,) = [row for what, row in rows.items() if what.startswith(f"{name}: parity")]
        assert parity["passed"], parity
        assert 0 <= parity["value"] < 2e-2
        assert any(what.startswith(f"{name}: device ms") for what in rows)
        assert rows[f"{name}: memcheck"]["asked"] == "0 errors"
    assert rows["matmul_2_4: to matmul_dense"]["asked"] == ">= 1.25x"
    assert rows["matmul_2_4: to matmul_dense"]["value"] > 0
    assert "as asked; " in done.stdout.splitlines()[-1]
    assert "artifacts for sm_90" in done.stdout.splitlines()[0]


def test_a_wrong_device_is_found(packed):
    """Without the emulation kernels do nothing."""
    done = run(packed, "--skip", "timing,sanitizer,torch", env=environment())
    assert done.returncode == 1
    assert done.stdout.count("NOT MET") == len(ITEMS)


def test_only_some_items(packed):
    done = run(packed, "--skip", "timing,sanitizer", "--only", "matmul_*")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": parity") == sum(name.startswith("matmul_") for name in ITEMS)


def test_a_failing_driver_is_a_row(packed):
    done = run(packed, "--skip", "timing,sanitizer", env=environment(emulation=packed[1], fail=12))
    assert done.returncode == 1
    assert "CUDA_ERROR_UNKNOWN" in done.stdout
    assert done.stdout.count("NOT MET") == 1


def test_no_gpu(packed):
    done = run(packed, env=without_driver())
    if done.returncode != 3:
        pytest.skip("this machine has a CUDA driver")
    assert done.stderr.startswith("gpu_check: no GPU to check on: ")
    assert done.stdout == ""


def test_a_folder_that_is_there_stays(tmp_path):
    command = [sys.executable, str(TOOLS / "gpu_check.py"), "pack", str(tmp_path), "--small"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is there already" in done.stderr
    assert list(tmp_path.iterdir()) == []
