"""Mistakes on the command line: one line, the right exit code, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Run, refused
from onnx import TensorProto, helper
from samples import pair_artifact, pair_model

from sparsec.cli.arguments import parse_binds, parse_inputs, parse_shapes
from sparsec.errors import UsageError


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
