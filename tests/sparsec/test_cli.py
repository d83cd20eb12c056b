"""Every verb of the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Run, parsed, refused
from samples import pair_artifact, pair_inputs

from sparsec.manifest import FILES
from sparsec.runtimes.emulated import find_emulator


def test_compile(run: Run, folder: Path) -> None:
    found = parsed(run("compile", "pair.onnx", "--target", "host", "-o", "out", "--json"))
    assert {"artifact", "target", "bytes", "layers", "parity", "seconds"} <= set(found)
    assert found["artifact"] == "out/pair.sparsec"
    assert found["target"] == "host"
    assert set(found["bytes"]) == {"weights", "code", "onnx"}
    assert {"passed", "max_relative_error", "tolerance"} <= set(found["parity"])
    assert found["parity"]["passed"] is True
    assert found["parity"]["max_relative_error"] <= found["parity"]["tolerance"]
    assert set(os.listdir("out/pair.sparsec")) == {*FILES["elf"], "weights.bin", "manifest.json"}
    assert os.listdir("out") == ["pair.sparsec"]


def test_compile_to_a_named_artifact_with_underscored_options(run: Run, folder: Path) -> None:
    code, out, err = run("compile", "pair.onnx", "-o", "named.sparsec", "--embed_weights", "--threads", "2")
    assert (code, err) == (0, "")
    assert "named.sparsec" in out
    assert not Path("named.sparsec/weights.bin").exists()
    assert json.loads(Path("named.sparsec/manifest.json").read_text())["threads"] == 2


def test_compile_is_reproducible(run: Run, folder: Path) -> None:
    options = ("--pass", "prune:sparsity=0.5,block=4x1")
    for name in ("a", "b"):
        Path(name).mkdir()
        shutil.copy("pair.onnx", f"{name}/pair.onnx")
        assert run("compile", f"{name}/pair.onnx", "-o", f"{name}/out", *options)[0] == 0
    for file in Path("a/out/pair.sparsec").iterdir():
        assert file.read_bytes() == (Path("b/out/pair.sparsec") / file.name).read_bytes(), file.name


def test_compile_for_arm(run: Run, folder: Path) -> None:
    found = parsed(run("compile", "pair.onnx", "--target", "arm", "--cpu", "cortex-a53", "--os", "linux", "--json"))
    assert found["target"] == "arm"
    if find_emulator() is None:
        assert found["parity"] is None
        assert any("qemu-user" in text for text in found["notes"])
    else:
        assert found["parity"]["passed"] is True


def test_plugin_and_recipe(run: Run, folder: Path) -> None:
    Path("mine.py").write_text(
        '''"""A pass of one's own."""
from dataclasses import dataclass
from sparsec import Pass, PassResult


@dataclass(frozen=True)
class Rename(Pass):
    """Name the graph."""

    name = "rename"
    to: str = "renamed"

    def call(self, model):
        model.graph.name = self.to
        return PassResult(model, True)
'''
    )
    Path("recipe.yaml").write_text("version: 1\npasses:\n  - rename: {to: from-recipe}\n")
    assert "rename" in run("passes", "--plugin", "mine.py")[1]
    code, _, err = run("compile", "pair.onnx", "--plugin", "mine.py", "--recipe", "recipe.yaml")
    assert (code, err) == (0, "")
    manifest = json.loads(Path("pair.sparsec/manifest.json").read_text())
    assert [record["name"] for record in manifest["passes"]] == ["rename"]
    assert onnx.load("pair.sparsec/model.onnx").graph.name == "from-recipe"


def test_rewrite(run: Run, folder: Path) -> None:
    found = parsed(run("rewrite", "pair.onnx", "-o", "out.onnx", "--pass", "prune:sparsity=0.9", "--json"))
    assert found["model"] == "out.onnx"
    onnx.checker.check_model(onnx.load("out.onnx"))
    assert found["zeros"] == pytest.approx(0.9 * 256 / (16 * 27 + 256 + 64), abs=0.01)  # of them `second` is pruned
    refused(run("rewrite", "pair.onnx", "-o", "out.onnx"), 2, "out.onnx", "--overwrite")
    assert run("rewrite", "pair.onnx", "-o", "out.onnx", "--overwrite")[0] == 0


def test_inspect_model_and_artifact(run: Run, folder: Path) -> None:
    for path in ("pair.onnx", pair_artifact().path):
        found = parsed(run("inspect", path, "--json"))
        assert {"layers", "totals"} <= set(found)
        code, out, _ = run("inspect", path)
        assert code == 0
        assert "second" in out
    refused(run("inspect", pair_artifact().path, "--target", "arm"), 2, "--target")


def test_verify(run: Run, folder: Path) -> None:
    samples = pair_inputs(4)
    x, state = np.concatenate([s["x"] for s in samples]), np.stack([s["state"] for s in samples])
    np.savez("data.npz", x=x, state=state, label=np.zeros(4, int))
    found = parsed(run("verify", pair_artifact().path, "--data", "data.npz", "--against", "pair.onnx", "--json"))
    assert found["passed"] is True
    assert set(found["fidelity"]) == {"top1_agreement", "snr_db"}
    assert set(found["accuracy"]) == {"reference", "artifact", "samples"}
    code, out, _ = run("verify", pair_artifact().path)
    assert code == 0
    assert "parity" in out


def test_verify_exits_1_when_it_fails(run: Run, folder: Path) -> None:
    """An artifact whose manifest allows no error at all."""
    shutil.copytree(pair_artifact().path, "m.sparsec")
    manifest = json.loads(Path("m.sparsec/manifest.json").read_text())
    manifest["tolerances"] = {"y": 0.0, "next": 0.0}
    Path("m.sparsec/manifest.json").write_text(json.dumps(manifest))
    samples = pair_inputs(20)
    np.savez("d.npz", x=np.concatenate([s["x"] for s in samples]))
    found = parsed(run("verify", "m.sparsec", "--data", "d.npz", "--json"), code=1)
    assert found["passed"] is False
    assert "FAILED" in run("verify", "m.sparsec", "--data", "d.npz")[1]


def test_bench_artifact_and_model(run: Run, folder: Path) -> None:
    keys = {"runtime", "threads", "runs", "median_ms", "p10_ms", "p90_ms", "min_ms", "peak_bytes", "against"}
    for path in (pair_artifact().path, "pair.onnx"):
        found = parsed(run("bench", path, "--runs", "5", "--threads", "2", "--against", "ort", "--json"))
        assert set(found) == keys
        assert (found["runs"], found["threads"], found["runtime"]) == (5, 2, "native")
        assert found["against"]["ort"]["median_ms"] > 0
    code, out, _ = run("bench", pair_artifact().path, "--runs", "3", "--against", "ort")
    assert code == 0
    assert "ort" in out
    assert sorted(os.listdir()) == ["pair.onnx"]


def test_run(run: Run, folder: Path) -> None:
    sample = pair_inputs(1)[0]
    for name, array in sample.items():
        np.save(f"{name}=1.npy", array)
    inputs = ("--input", "x=x=1.npy", "--input", "state=state=1.npy")
    code, out, err = run("run", pair_artifact().path, *inputs, "-o", "out.npz")
    assert (code, err) == (0, "")
    assert "next" in out
    expected = pair_artifact().run(sample)
    with np.load("out.npz") as found:
        assert set(found.files) == set(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
    assert parsed(run("run", pair_artifact().path, *inputs, "--json"))["outputs"][0]["name"] == "y"


def test_models(run: Run, folder: Path) -> None:
    listed = parsed(run("models", "--json"))["models"]
    assert {"mobilenet_v1", "resnet50", "demo"} <= {row["name"] for row in listed}
    assert run("models", "demo", "-o", "demo.onnx", "--data", "held.npz", "--count", "10")[0] == 0
    onnx.checker.check_model(onnx.load("demo.onnx"))
    with np.load("held.npz") as data:
        assert len(data["label"]) == 10
    refused(run("models", "demo", "-o", "demo.onnx"), 2, "--overwrite")
    refused(run("models", "demo", "--data", "held.npz"), 2, "--overwrite")
    refused(run("models", "mobilenet_v3", "-o", "x.onnx"), 2, "did you mean 'mobilenet_v")
    refused(run("models", "resnet18", "--data", "x.npz"), 2, "--data")
    refused(run("models", "demo"), 2, "-o")


@pytest.mark.parametrize(("verb", "name"), [("passes", "prune"), ("targets", "arm"), ("kernels", "conv_f32_4x1")])
def test_listings(run: Run, verb: str, name: str) -> None:
    code, out, err = run(verb)
    assert (code, err) == (0, "")
    assert name in out
    assert name in {row["name"] for row in parsed(run(verb, "--json"))[verb]}


def test_help_needs_no_compiler() -> None:
    start = time.perf_counter()
    script = "import sys; from sparsec import cli; cli.run(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 5  # 0.1 s on an idle machine
    loaded = done.stdout.splitlines()[-1]
    for heavy in ("'tvm'", "'onnxruntime'", "'onnx'", "'onnx_ir'", "'numpy'"):
        assert heavy not in loaded
    for verb in (
        "compile",
        "rewrite",
        "inspect",
        "verify",
        "bench",
        "tune",
        "run",
        "models",
        "passes",
        "targets",
        "kernels",
    ):
        assert verb in done.stdout
