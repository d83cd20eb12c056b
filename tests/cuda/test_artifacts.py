"""Whole artifacts for CUDA without a GPU: compiled, run by the runtime on the stub driver, kernels emulated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import programs
import pytest
from cuda_stub import emulation_of_what_is_compiled, environment, without_driver

import sparsec
from sparsec.errors import SparsecError
from sparsec.targets import host_arch

pytest.importorskip("nvidia.cuda_nvrtc", reason="needs NVIDIA's compiler library: pip install 'sparsec[cuda]'")

NET = """net (float[1,3,12,12] x, float[8,3,3,3] w1, float[8] wb1, float[8,1,3,3] w2, float[8] wb2, float[16,8,1,1] w3,
float[10,16] w4, float[10] wb4) => (float[1,10] y) {
  a = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w1, wb1)
  b = Relu(a)
  c = Conv <pads = [1, 1, 1, 1], group = 8> (b, w2, wb2)
  d = Add(c, b)
  e = Conv(d, w3)
  f = Clip(e)
  g = GlobalAveragePool(f)
  h = Flatten(g)
  i = Gemm <transB = 1> (h, w4, wb4)
  y = Softmax(i)
}"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    """The folder of net.sparsec and emulation0.so."""
    folder = tmp_path_factory.mktemp("artifact")
    with emulation_of_what_is_compiled(folder):
        made = sparsec.compile(
            programs.parse(NET), target="cuda", arch="sm_90", host=host_arch(), output=folder / "net.sparsec"
        )
    assert made.manifest["target"]["runtime"] == "cuda"
    return folder


USE = """
import json, sys
import numpy as np
import sparsec
from sparsec.runtimes.ort import OrtSession
artifact = sparsec.load(sys.argv[1])
report = artifact.verify()
timing = artifact.bench(runs=3, runtime=sys.argv[2])
x = np.random.default_rng(7).standard_normal((1, 3, 12, 12)).astype("f")
with OrtSession((artifact.path / "model.onnx").read_bytes()) as session:
    expected = session.run({"x": x})["y"]
got = artifact.run({"x": x})["y"]
error = float(abs(got - expected).max() / abs(expected).max())
print(json.dumps({"passed": report.passed, "timing": timing.json(), "error": error}))
"""


def use(folder: Path, runtime: str = "cuda", **settings: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", USE, str(folder / "net.sparsec"), runtime]
    return subprocess.run(
        command, env=environment(**settings), capture_output=True, text=True, timeout=300, check=False
    )


def test_agrees_with_onnx_runtime(artifact):
    done = use(artifact, "cuda:1", emulation=artifact / "emulation0.so")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["passed"]
    assert facts["error"] < 1e-5
    timing = facts["timing"]
    assert timing["runtime"] == "cuda:1"
    assert timing["device"]["name"] == "stub device 1"
    assert timing["device"]["runs"] == timing["runs"] == 3
    assert timing["peak_bytes"] > 0


FALLBACK = """net (float[4,8] x) => (float[4,8] y) {
  axis = Constant <value = int64 {1}> ()
  a = Relu(x)
  b = CumSum(a, axis)
  y = Exp(b)
}"""


LINKED = """
#include <stdio.h>
#include "net.sparsec/model.h"

int main(int argc, char **argv) {
    static float x[3 * 12 * 12], y[10];
    const void *inputs[1] = {x};
    void *outputs[1] = {y};
    sparsec_model *model = NULL;
    FILE *file = fopen("x", "rb");
    if (argc != 2 || !file || fread(x, sizeof x, 1, file) != 1) return 100;
    fclose(file);
    int code = net_sparsec_open_file(argv[1], NULL, &model);
    if (code) return -code;
    code = net_sparsec_run(model, inputs, outputs);
    net_sparsec_close(model);
    return code || fwrite(y, sizeof y, 1, stdout) != 1;
}
"""


def test_linked_statically_into_a_program(artifact):
    """libmodel.a needs no driver to link against; it is looked for when the model opens."""
    made = sparsec.load(artifact / "net.sparsec")
    x = np.random.default_rng(8).standard_normal((1, 3, 12, 12)).astype("f")
    (artifact / "x").write_bytes(x.tobytes())
    (artifact / "main.c").write_text(LINKED)
    zig = [
        sys.executable,
        "-m",
        "ziglang",
        "cc",
        "-target",
        f"{host_arch()}-linux-gnu.2.17",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    link = [*zig, "main.c", "net.sparsec/libmodel.a", "-lm", "-ldl", "-lpthread", "-o", "linked"]
    subprocess.run(link, cwd=artifact, check=True)
    command = ["./linked", made.path / "weights.bin"]
    found = environment(emulation=artifact / "emulation0.so")
    done = subprocess.run(command, cwd=artifact, env=found, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    y = np.frombuffer(done.stdout, np.float32)
    from sparsec.runtimes.ort import OrtSession

    with OrtSession((made.path / "model.onnx").read_bytes()) as session:
        np.testing.assert_allclose(y, session.run({"x": x})["y"].reshape(-1), atol=1e-5)
    done = subprocess.run(command, cwd=artifact, env=without_driver(), capture_output=True, check=False)
    assert done.returncode in (7, 0)  # SPARSEC_DEVICE, unless this machine has a GPU


def test_a_node_on_the_host(tmp_path):
    """CumSum has no schedule for a GPU: it is refused, or the processor runs it between two launches."""
    options = {"target": "cuda", "arch": "sm_90", "host": host_arch(), "output": tmp_path / "net.sparsec"}
    with pytest.raises(SparsecError, match="CumSum"):
        sparsec.compile(programs.parse(FALLBACK), **options)
    with emulation_of_what_is_compiled(tmp_path) as libraries:
        sparsec.compile(programs.parse(FALLBACK), allow_cpu_fallback=True, **options)
    command = [sys.executable, "-c", USE.replace("(1, 3, 12, 12)", "(4, 8)"), str(tmp_path / "net.sparsec"), "cuda"]
    env = environment(emulation=libraries[0])
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["passed"]
    assert facts["error"] < 1e-6


def test_a_device_that_computes_nothing_does_not_pass(artifact):
    done = use(artifact)
    assert done.returncode == 0, done.stderr
    assert not json.loads(done.stdout)["passed"]


@pytest.mark.parametrize(
    ("runtime", "said"), [("cuda:7", "CUDA_ERROR_INVALID_DEVICE"), ("cuda:x", "number of a device")]
)
def test_a_device_that_is_not_there(artifact, runtime, said):
    done = use(artifact, runtime, emulation=artifact / "emulation0.so")
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparsec.cli", *map(str, arguments)]
    return subprocess.run(command, env=without_driver(), capture_output=True, text=True, timeout=300, check=False)


def test_without_a_driver_one_line_says_so(artifact, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 12, 12), np.float32))
    done = cli("run", artifact / "net.sparsec", "--input", f"x={tmp_path / 'x.npy'}", "-o", tmp_path / "y.npz")
    if done.returncode == 0:
        pytest.skip("this machine has a CUDA driver")
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "no CUDA driver: libcuda.so.1" in done.stderr
    assert not (tmp_path / "y.npz").exists()


def test_another_processor_beside_the_gpu(artifact):
    from sparsec.artifact import Artifact
    from sparsec.errors import RuntimeUnavailable, UsageError
    from sparsec.runtimes.base import find_runtime

    made = sparsec.load(artifact / "net.sparsec")
    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[host_arch()]
    target = {**made.manifest["target"], "arch": other}
    foreign = Artifact(made.path, {**made.manifest, "target": target})
    with pytest.raises(RuntimeUnavailable, match=f"is to be {other} linux"):
        find_runtime(None, foreign).open(foreign)
    with pytest.raises(RuntimeUnavailable, match="no emulator for CUDA"):
        find_runtime("emulated", foreign).open(foreign)
    plain = Artifact(made.path, {**made.manifest, "target": {**target, "runtime": "native", "name": "host"}})
    with pytest.raises(UsageError, match="is for host"):
        find_runtime("cuda", plain).open(plain)
