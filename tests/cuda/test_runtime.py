"""The executor for CUDA devices against the stub driver: calls, results, faults; and that the stub notices misuse."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import hand_cuda
import pytest
from cuda_stub import environment, stub_folder, without_driver

from sparsec.building.build import runtime_sources

pytest.importorskip("nvidia.cuda_nvrtc", reason="needs NVIDIA's compiler library: pip install 'sparsec[cuda]'")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import misuse  # noqa: E402
from checks import CHECKS  # noqa: E402

ON_HOST = {"host_steps", "each_call_fails_once_when_running", "each_call_fails_once_when_closing", "two_threads"}
ONLY_HOST = {"host_steps"}
ABSENT = {
    "an_old_driver": ("cuStreamGetCtx",),
    "launches_without_graph_functions": ("cuGraphLaunch",),
}


@pytest.fixture(scope="module")
def device_only(tmp_path_factory) -> Path:
    return hand_cuda.build_with_emulation(hand_cuda.program(), tmp_path_factory.mktemp("cuda") / "device")


@pytest.fixture(scope="module")
def with_host_step(tmp_path_factory) -> Path:
    return hand_cuda.build_with_emulation(hand_cuda.program(on_host=True), tmp_path_factory.mktemp("cuda") / "host")


def start(script: str, *arguments: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("name", sorted(set(CHECKS) - ONLY_HOST - {"no_driver"}))
def test_device_steps(device_only, name):
    env = environment(*ABSENT.get(name, ()), emulation=device_only / "emulation.so")
    done = start("checks.py", name, device_only, env=env)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(ON_HOST))
def test_host_steps(with_host_step, name):
    env = environment(emulation=with_host_step / "emulation.so")
    done = start("checks.py", name, with_host_step, env=env)
    assert done.returncode == 0, done.stderr


no_driver = pytest.mark.skipif(
    subprocess.run(["ldconfig", "-p"], capture_output=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin"}, check=False)
    .stdout.decode()
    .count("libcuda.so.1")
    > 0,
    reason="this machine has a CUDA driver",
)


@no_driver
def test_no_driver(device_only):
    done = start("checks.py", "no_driver", device_only, env=without_driver())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(misuse.MISUSES))
def test_the_stub_notices(name):
    done = start("misuse.py", name, env=environment())
    if name == "touching_device_memory":
        assert done.returncode == -signal.SIGSEGV
    else:
        assert done.returncode == -signal.SIGABRT, done.stderr
        assert done.stderr.startswith("stub driver: misuse: ")


def bench(folder: Path, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [str(folder / "bench"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_bench_times_twice(device_only, tmp_path):
    env = environment(emulation=device_only / "emulation.so", log=tmp_path / "log")
    done = bench(device_only, "--runs", "5", "--warmup", "2", "--json", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["check"]["passed"]
    assert report["runs"] == 5
    device = report["device"]
    assert device["name"] == "stub device 0"
    assert 0 <= device["min_ms"] <= device["p10_ms"] <= device["median_ms"] <= device["p90_ms"]
    calls = (tmp_path / "log").read_text().splitlines()
    assert calls.count("cuGraphLaunch") == 1 + 2 + 5 + 5  # the check, warm-up, by the clock, by events
    assert calls.count("cuEventElapsedTime") == 5
    assert calls[-1] == "live 0"
    text = bench(device_only, "--runs", "3", env=env)
    assert text.returncode == 0
    assert "copies included\non stub device 0: min " in text.stdout


def test_bench_finds_a_wrong_result(device_only, tmp_path):
    shutil.copytree(device_only, tmp_path / "copy")
    parity = bytearray((tmp_path / "copy" / "parity.bin").read_bytes())
    parity[64 + 8 + 3] ^= 0x80  # the sign of the first input
    (tmp_path / "copy" / "parity.bin").write_bytes(parity)
    done = bench(tmp_path / "copy", env=environment(emulation=device_only / "emulation.so"))
    assert done.returncode == 1
    assert "check FAILED" in done.stdout


@no_driver
def test_bench_without_a_driver(device_only):
    done = bench(device_only, "--json", env=without_driver())
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("bench: CUDA: the accelerator failed: no CUDA driver: libcuda.so.1: ")
    assert done.stderr.count("\n") == 1


def test_bench_of_a_failing_device(device_only):
    done = bench(device_only, env=environment(fail=40))
    assert done.returncode == 3
    assert done.stderr.startswith("bench: ")
    assert "CUDA_ERROR_UNKNOWN" in done.stderr


@pytest.mark.skipif(shutil.which("valgrind") is None or shutil.which("gcc") is None, reason="needs valgrind and gcc")
@pytest.mark.parametrize("on_host", [False, True])
def test_nothing_leaks_when_calls_fail(request, tmp_path, on_host):
    folder = request.getfixturevalue("with_host_step" if on_host else "device_only")
    runtime_sources(tmp_path)
    shutil.copy(HERE / "faults.c", tmp_path)
    libraries = ["-L", str(folder), "-lmodel", f"-L{stub_folder()}", "-l:libcuda.so.1", f"-Wl,-rpath,{folder}"]
    command = ["gcc", "-std=c11", "-g", "-O1", "-Wall", "-Wextra", "faults.c", "-o", "faults", *libraries]
    subprocess.run(command, cwd=tmp_path, check=True)
    tool = ["valgrind", "--quiet", "--leak-check=full", "--errors-for-leak-kinds=all", "--error-exitcode=99"]
    command = [*tool, str(tmp_path / "faults"), str(folder / "weights.bin")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" 0 left\n")


STATIC = """
#include "model.h"
int main(int argc, char **argv) {
    sparsec_model *model;
    int code = hand_sparsec_open_file(argv[argc - 1], 0, &model);
    float x[24 * 64] = {0}, y[24 * 64], row[64], steps[3];
    const void *in[] = {x};
    void *out[] = {y, row};
    if (!code && hand_sparsec_step_count(model) == 3) code = hand_sparsec_run_steps(model, in, out, steps);
    hand_sparsec_close(model);
    return code ? -code : y[0] != 2 * row[63];
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_the_static_library(device_only, tmp_path):
    (tmp_path / "main.c").write_text(STATIC)
    command = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{device_only}", "main.c", "-o", "main"]
    libraries = [str(device_only / "libmodel.a"), "-ldl", "-lm", "-lpthread"]
    subprocess.run([*command, *libraries], cwd=tmp_path, check=True)
    env = environment(emulation=device_only / "emulation.so")
    assert subprocess.run([tmp_path / "main", device_only / "weights.bin"], env=env, check=False).returncode == 0
    assert subprocess.run([tmp_path / "main", "absent"], env=env, check=False).returncode == 6


def test_only_the_driver_is_not_linked(device_only):
    from sparsec.building import elf

    for name in ("libmodel.so", "bench"):
        data = (device_only / name).read_bytes()
        assert set(elf.needed(data)) <= {
            "libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1",
        }, name  # fmt: skip
    exported = {s.name for s in elf.symbols((device_only / "libmodel.so").read_bytes(), dynamic=True) if s.defined}
    assert {"sparsec_run_device", "sparsec_run_timed", "sparsec_device_name", "sparsec_run"} <= exported
    assert all(name.startswith("sparsec_") for name in exported)
    assert os.access(device_only / "bench", os.X_OK)
