"""The command line: contract of flags, JSON keys, exit codes and files; one clear line for every mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from samples import pair_artifact, pair_inputs, pair_model

from sparsec.cli.arguments import parse_binds, parse_inputs, parse_shapes
from sparsec.errors import UsageError
from sparsec.manifest import FILES
from sparsec.runtimes.emulated import find_emulator

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with pair.onnx in it."""
    onnx.save(pair_model(), tmp_path / "pair.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(result: tuple[int, str, str], code: int = 2, *says: str) -> None:
    """One line on stderr that names everything in `says`, nothing on stdout."""
    assert result[0] == code, result
    assert result[1] == ""
    assert result[2].startswith("error: ")
    assert result[2].count("\n") == 1, result[2]
    assert "Traceback" not in result[2]
    for text in says:
        assert text in result[2]


def parsed(result: tuple[int, str, str], code: int = 0) -> dict[str, Any]:
    """The one JSON object on stdout."""
    assert result[0] == code, result
    return json.loads(result[1], parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


# --- verbs ------------------------------------------------------------------------------------------------------------


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


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_unknown_names_get_the_nearest(run: Run, folder: Path) -> None:
    refused(run("comple", "pair.onnx"), 2, "did you mean 'compile'")
    refused(run("compile", "pair.onnx", "--taget", "arm"), 2, "--target")
    refused(run("compile", "pair.onnx", "--target", "amr"), 2, "did you mean 'arm'")
    refused(run("compile", "pair.onnx", "--target", "arm", "--cpu", "cortex-a75"), 2, "did you mean 'cortex-a7")
    refused(run("compile", "pair.onnx", "--target", "arm", "--os", "androd"), 2, "did you mean 'android'")
    refused(run("compile", "pair.onnx", "--pass", "prnue:sparsity=0.5"), 2, "did you mean 'prune'")
    refused(run("compile", "pair.onnx", "--pass", "prune:sparsty=0.5"), 2, "did you mean 'sparsity'")
    refused(run("verify", pair_artifact().path, "--runtime", "emulatd"), 2, "did you mean 'emulated'")
    refused(run("bench", pair_artifact().path, "--against", "otr"), 2, "did you mean 'ort'")
    assert os.listdir() == ["pair.onnx"]


def test_models_that_are_none(run: Run, folder: Path) -> None:
    Path("text.onnx").write_text("hello, I am no model")
    Path("empty.onnx").write_bytes(b"")
    Path("cut.onnx").write_bytes(Path("pair.onnx").read_bytes()[:700])
    Path("folder.onnx").mkdir()
    before = sorted(os.listdir())
    for name in ("absent.onnx", "text.onnx", "empty.onnx", "cut.onnx", "folder.onnx"):
        for verb in (("compile", name), ("rewrite", name, "-o", "out.onnx")):
            refused(run(*verb), 2, name)
    for verb in ("inspect", "bench"):
        refused(run(verb, "cut.onnx"), 2, "cut.onnx")
    assert sorted(os.listdir()) == before


def test_unsupported_operator(run: Run, folder: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Mystery", ["x"], ["y"], "riddle", domain="com.example")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), "odd.onnx")
    refused(run("compile", "odd.onnx"), 2, "Mystery", "riddle")
    assert sorted(os.listdir()) == ["odd.onnx", "pair.onnx"]


def symbolic_model() -> onnx.ModelProto:
    model = pair_model()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    return model


def test_symbolic_dimension_needs_a_shape(run: Run, folder: Path) -> None:
    onnx.save(symbolic_model(), "symbolic.onnx")
    refused(run("compile", "symbolic.onnx"), 2, "height", "--shape")
    refused(run("compile", "symbolic.onnx", "--shape", "x:1x3x8x9"), 2, "x")
    refused(run("compile", "symbolic.onnx", "--shape", "xx:1x3x8x8"), 2, "did you mean 'x'")
    assert run("compile", "symbolic.onnx", "--shape", "x:1x3x8x8")[0] == 0


def test_shapes_and_binds(run: Run, folder: Path) -> None:
    assert parse_shapes(["a:0:1x2", "b:3"]) == {"a:0": (1, 2), "b": (3,)}
    assert parse_binds(["a=1", "b=c=2"]) == {"a": "1", "b=c": "2"}
    assert parse_inputs(["a=b=c.npy"], ["a", "a=b"]) == {"a=b": "c.npy"}
    for wrong in ("x", "x:", "x:1xx2", "x:-1", "x:0x3", ":1x2", "x:1x2x"):
        with pytest.raises(UsageError, match="--shape"):
            parse_shapes([wrong])
    for wrong in ("x", "=1", "x="):
        with pytest.raises(UsageError, match="--bind"):
            parse_binds([wrong])
    refused(run("compile", "pair.onnx", "--shape", "x"), 2, "--shape")
    refused(run("compile", "pair.onnx", "--bind", "nothing=1"), 2, "nothing")
    assert run("compile", "pair.onnx", "--bind", "state=0.5")[0] == 0
    manifest = json.loads(Path("pair.sparsec/manifest.json").read_text())
    assert manifest["bind"] == {"state": "0.5"}
    assert [t["name"] for t in manifest["inputs"]] == ["x"]


def test_existing_artifact_is_refused_before_any_work(run: Run, folder: Path) -> None:
    assert run("compile", "pair.onnx", "-o", "m.sparsec")[0] == 0
    before = {p.name: p.read_bytes() for p in Path("m.sparsec").iterdir()}
    start = time.perf_counter()
    refused(run("compile", "pair.onnx", "-o", "m.sparsec"), 2, "m.sparsec", "--overwrite")
    assert time.perf_counter() - start < 0.5
    assert {p.name: p.read_bytes() for p in Path("m.sparsec").iterdir()} == before
    assert run("compile", "pair.onnx", "-o", "m.sparsec", "--overwrite", "--embed-weights")[0] == 0
    assert not Path("m.sparsec/weights.bin").exists()
    assert sorted(os.listdir()) == ["m.sparsec", "pair.onnx"]


def test_failed_overwrite_keeps_the_old_artifact(run: Run, folder: Path) -> None:
    shutil.copytree(pair_artifact().path, "pair.sparsec")
    before = {p.name: p.read_bytes() for p in Path("pair.sparsec").iterdir()}
    Path("pair.onnx").write_bytes(b"broken")
    refused(run("compile", "pair.onnx", "--overwrite"), 2)
    assert {p.name: p.read_bytes() for p in Path("pair.sparsec").iterdir()} == before
    assert sorted(os.listdir()) == ["pair.onnx", "pair.sparsec"]


def test_errors_as_json(run: Run, folder: Path) -> None:
    for arguments in (
        ("compile", "absent.onnx"),
        ("compile", "pair.onnx", "--target", "amr"),
        ("compile", "pair.onnx", "--no-such-option"),
        ("verify", "absent.sparsec"),
        ("nonsense",),
    ):
        code, out, err = run(*arguments, "--json")
        found = json.loads(out)["error"]
        assert set(found) == {"kind", "message", "where"}
        assert code == 2
        assert err == ""


def test_damaged_artifact(run: Run, folder: Path) -> None:
    shutil.copytree(pair_artifact().path, "m.sparsec")
    (Path("m.sparsec") / "weights.bin").write_bytes(b"\0" * 64)
    for verb in ("verify", "bench", "inspect", "run"):
        refused(run(verb, "m.sparsec"), 2, "weights.bin", "checksum")


def test_wrong_inputs(run: Run, folder: Path) -> None:
    np.save("x.npy", np.zeros((1, 3, 8, 9), np.float32))
    path = pair_artifact().path
    refused(run("run", path, "--input", "y=x.npy"), 2, "'y'")
    refused(run("run", path, "--input", "x"), 2, "--input")
    refused(run("run", path, "--input", "x=absent.npy"), 2, "absent.npy")
    refused(run("run", path, "--input", "x=x.npy", "--input", "state=x.npy"), 2, "[1, 3, 8, 8]", "[1, 3, 8, 9]")
    refused(run("run", path), 2, "missing")
    refused(run("verify", path, "--data", "absent.npz"), 2, "absent.npz")
    refused(run("verify", path, "--preprocess", "resize=8"), 2, "--data")
    refused(run("bench", path, "--runs", "0"), 2, "--runs")
    refused(run("bench", path, "--runs", "many"), 2, "--runs")
    refused(run("compile", "pair.onnx", "--threads", "0"), 2, "--threads")


def test_missing_environment_exits_3(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = pair_artifact("arm").path
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    refused(run("verify", path), 3, "apt-get install qemu-user")
    refused(run("verify", path, "--runtime", "adb"), 3, "adb")


def test_an_own_mistake_is_one_line_too(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr("sparsec.artifact.load", broken)
    refused(run("verify", "m.sparsec"), 1, "internal error: RuntimeError: first")
    code, _, err = run("verify", "m.sparsec", "-v")
    assert code == 1
    assert "Traceback" in err


# --- interruption and disks -------------------------------------------------------------------------------------------


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`sparsec` in a process of its own, its work slowed down once the temporary directory is there."""
    script = (
        "import signal, sys, time, sparsec.build\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a suite in the background inherits it as ignored
        "real = sparsec.build.build\n"
        "def slow(*a, **k):\n"
        "    real(*a, **k)\n"
        "    print('built', flush=True)\n"
        "    time.sleep(60)\n"
        "sparsec.build.build = slow\n"
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
