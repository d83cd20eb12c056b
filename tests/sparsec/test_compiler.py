"""The straight line: from a model to an artifact that is proved, the same every time, or to an error and nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from programs import feeds_of, onnx_runtime, parse

import sparsec
from sparsec import compiler
from sparsec.artifact import Artifact
from sparsec.errors import (
    CheckError,
    ModelError,
    RecipeError,
    RuntimeUnavailable,
    TargetError,
    UnsupportedError,
    UsageError,
)
from sparsec.program import Program

# Every kernel family, both routes, joins and views, tails and batches; several outputs.
BROAD = """broad (float[1,3,17,15] x, float[2,6,20] s, float[16,3,3,3] w0, float[16] w1, float[16,1,3,3] w2, float[24,16,1,1] w3,
    float[24,24,3,3] w4, float[24,12,1,1] w5, float[10,40] w6, float[10] w7, float[6,20] w8)
=> (float[1,10] y, float[1,40,9,8] joined, float[2,6,6] attention, float[1,24,9,8] grouped)
<int64[2] flat = {1, -1}, float zero = {0.0}, float six = {6.0}, float scale = {0.25}, int64[2] hw = {2, 3}> {
    a0 = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w0, w1)
    a = Clip(a0, zero, six)
    b0 = Conv<pads=[1,1,1,1], group=16>(a, w2)
    b = HardSwish(b0)
    c = Conv(b, w3)
    d0 = Conv<pads=[1,1,1,1]>(c, w4)
    d1 = Add(d0, c)
    d = Relu(d1)
    joined = Concat<axis=1>(d, a)
    grouped = Conv<group=2>(d, w5)
    p = ReduceMean(joined, hw)
    q = Reshape(p, flat)
    y0 = Gemm<transB=1>(q, w6, w7)
    y = Softmax<axis=-1>(y0)
    k = Elu(s)
    kt = Transpose<perm=[0,2,1]>(k)
    t = Add(s, w8)
    m = MatMul(t, kt)
    attention = Mul(m, scale)
}"""
SMALL = """small (float[N,4,6,6] x, float[8,4,3,3] w0, float[16,8,3,3] w1, float[5,16,1,1] w2) => (float[N,5,6,6] y) {
    a = Conv<pads=[1,1,1,1]>(x, w0) b = Conv<pads=[1,1,1,1]>(a, w1) y = Conv(b, w2)
}"""


def broad(zeros: float = 0.7) -> onnx.ModelProto:
    return parse(BROAD, zeros)


def small(batch: str = "1") -> onnx.ModelProto:
    model = parse(SMALL.replace("[N,", f"[{batch},"))
    for node, name in zip(model.graph.node, ("first", "middle", "last"), strict=True):
        node.name = name
    return model


def files_of(artifact: Artifact) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in artifact.path.iterdir()}


def check_outputs(artifact: Artifact, model: onnx.ModelProto, **options: Any) -> None:
    feeds = feeds_of(model, seed=5)
    expected = onnx_runtime((artifact.path / "model.onnx").read_bytes(), feeds)
    outputs = artifact.run(feeds, **options)
    assert list(outputs) == [output.name for output in model.graph.output]
    for name, value in expected.items():
        error = np.abs(outputs[name].astype(np.float64) - value).max() / np.abs(value).max()
        assert error <= artifact.manifest["tolerances"][name], name


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return sparsec.compile(broad(), output=tmp_path_factory.mktemp("broad") / "broad.sparsec")


@pytest.mark.parametrize("threads", [1, 4])
def test_every_kind_of_layer(artifact, threads):
    check_outputs(artifact, broad(), threads=threads)


def test_the_artifact_is_proved(artifact):
    assert artifact.manifest["parity"]["passed"]
    assert artifact.verify().passed
    assert sparsec.load(artifact.path).manifest == artifact.manifest


@pytest.mark.parametrize("cpu", ["armv8.2-a", "generic"])
@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="no qemu-aarch64")
def test_every_kind_of_layer_for_arm(cpu):
    artifact = sparsec.compile(broad(), "arm", cpu=cpu, os="linux")
    assert artifact.manifest["parity"]["passed"]
    check_outputs(artifact, broad())


def test_the_same_model_gives_the_same_bytes(artifact, tmp_path):
    """Compiled again by another process, in another folder, with another order of hashes."""
    onnx.save(broad(), tmp_path / "broad.onnx")
    code = "import sparsec; sparsec.compile('broad.onnx', output='again/')"
    root = Path(sparsec.__file__).parents[1]
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    ours, others = files_of(artifact), files_of(sparsec.load(tmp_path / "again" / "broad.sparsec"))
    assert sorted(ours) == sorted(others)
    digests = [json.loads(files["manifest.json"])["digests"] for files in (ours, others)]
    assert [name for name in ours if ours[name] != others[name]] == []
    assert digests[0] == digests[1]


# --- passes, recipes, plugins

PLUGIN = '''
"""A pass of a user's own."""
from dataclasses import dataclass
import onnx_ir
import sparsec

@dataclass(frozen=True)
class Halve(sparsec.Pass):
    """Halve a weight."""
    name = "halve"
    weight: str = "w2"

    def call(self, model):
        value = model.graph.initializers[self.weight]
        value.const_value = onnx_ir.tensor(value.const_value.numpy() * 0.5, name=self.weight)
        return sparsec.PassResult(model, True)
'''


def layer_of(artifact: Artifact, name: str) -> dict[str, Any]:
    return next(layer for layer in artifact.report["layers"] if layer["name"] == name)


def test_a_pass(tmp_path):
    model = small()
    before = model.SerializeToString()
    artifact = sparsec.compile(model, passes=["prune:sparsity=0.8,block=4x1"])
    assert model.SerializeToString() == before
    assert [record["name"] for record in artifact.manifest["passes"]] == ["prune"]
    layer = layer_of(artifact, "middle")
    assert layer["zeros"] == pytest.approx(0.8, abs=0.02)
    assert "4x1" in layer["structure"]
    assert layer_of(artifact, "first")["zeros"] == 0
    check_outputs(artifact, model)


def test_recipe_plugin_and_dump(tmp_path):
    """A recipe file with a plugin's pass and a built-in one, in this order, then the pass given beside it."""
    (tmp_path / "own.py").write_text(PLUGIN, encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\npasses:\n  - halve\n  - prune: {sparsity: 0.5, block: 1x1}\n", encoding="utf-8")
    artifact = sparsec.compile(
        small(), recipe=recipe, plugins=[tmp_path / "own.py"], passes=["halve:weight=w0"], dump=tmp_path / "dump",
    )  # fmt: skip
    assert [r["name"] for r in artifact.manifest["passes"]] == ["halve", "prune", "halve"]
    written = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(artifact.path / "model.onnx").graph.initializer}
    original = {i.name: onnx.numpy_helper.to_array(i) for i in small().graph.initializer}
    np.testing.assert_array_equal(written["w2"], original["w2"] * np.float32(0.5))
    np.testing.assert_array_equal(written["w0"], original["w0"] * np.float32(0.5))
    assert np.mean(written["w1"] == 0) == pytest.approx(0.5, abs=0.01)
    dumped = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert {"10-load.onnx", "20-halve.onnx", "40-program.txt", "50-kernels.py"} <= set(dumped)
    assert "step 0" in (tmp_path / "dump" / "40-program.txt").read_text()
    kernels = {layer["kernel"] for layer in artifact.report["layers"]}
    assert all(kernel in (tmp_path / "dump" / "50-kernels.py").read_text() for kernel in kernels)


def test_a_pass_object_and_an_onnx_ir_model():
    model = onnx_ir.from_proto(small())
    assert sparsec.compile(model, passes=[sparsec.passes.Prune(sparsity=0.5)]).manifest["passes"][0]["name"] == "prune"
    assert np.count_nonzero(model.graph.initializers["w1"].const_value.numpy() == 0) == 0


def test_rewrite_only():
    rewritten = sparsec.rewrite(small(), passes=["prune:sparsity=0.75"])
    weight = rewritten.graph.initializers["w1"].const_value
    assert np.mean(weight.numpy() == 0) == pytest.approx(0.75, abs=0.01)
    onnx.checker.check_model(onnx_ir.to_proto(rewritten))


# --- shapes, threads, bound inputs


def test_a_symbolic_batch_becomes_one_and_that_is_said():
    artifact = sparsec.compile(small("batch"))
    assert artifact.inputs[0].shape == (1, 4, 6, 6)
    assert any("batch" in note and "became 1" in note for note in artifact.manifest["notes"])


def test_a_batch_of_three_in_two_threads():
    artifact = sparsec.compile(small("batch"), shapes={"x": (3, 4, 6, 6)}, threads=2, embed_weights=True)
    assert artifact.outputs[0].shape == (3, 5, 6, 6)
    assert artifact.manifest["threads"] == 2
    assert artifact.manifest["notes"] == []
    check_outputs(artifact, small("3"))


# --- what goes wrong


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"passes": ["no-such-pass"]}, RecipeError),
        ({"passes": ["prune:sparsity=2"]}, RecipeError),
        ({"recipe": {"version": 9, "passes": []}}, RecipeError),
        ({"target": "toaster"}, TargetError),
        ({"cpu": "z80"}, TargetError),
        ({"threads": 0}, UsageError),
        ({"shapes": {"z": (1, 4, 6, 6)}}, UsageError),
        ({"shapes": {"x": (1, 4, 7, 6)}}, UsageError),
        ({"model": b"not a model"}, ModelError),
        ({"model": "missing.onnx"}, ModelError),
        ({"plugins": ["missing.py"]}, RecipeError),
    ],
)
def test_an_error_leaves_nothing(tmp_path, options, error):
    model = options.pop("model", small())
    with pytest.raises(error) as caught:
        sparsec.compile(model, output=tmp_path / "model.sparsec", **options)
    assert "\n" not in str(caught.value)
    assert left(tmp_path) == []


def test_what_cannot_be_compiled_is_listed_together():
    model = parse(
        "g (float[2,3] x) => (string[2,3] y, float[2,3] z, string[2,3] u) { y = Cast<to=8>(x) z = Relu(x) u = Cast<to=8>(z) }"
    )
    with pytest.raises(UnsupportedError, match=r"'y'.*'u'"):
        sparsec.compile(model)


def test_a_wrong_result_is_never_delivered(tmp_path, monkeypatch):
    """One weight of the lowered program off by one part in a hundred: the proof against ONNX Runtime fails."""
    honest = compiler.lower

    def careless(*arguments: Any) -> Program:
        program = honest(*arguments)
        largest = max(range(len(program.constants)), key=lambda i: program.constants[i].data.nbytes)
        constants = list(program.constants)
        data = constants[largest].data.copy()
        data[np.abs(data).argmax()] *= 1.01
        constants[largest] = replace(constants[largest], data=data)
        return replace(program, constants=tuple(constants))

    monkeypatch.setattr(compiler, "lower", careless)
    with pytest.raises(CheckError, match="differs from ONNX Runtime") as caught:
        sparsec.compile(small(), output=tmp_path / "model.sparsec")
    assert caught.value.exit_code == 1
    assert left(tmp_path) == []


def test_a_target_that_cannot_run_here_is_noted(monkeypatch):
    def unavailable(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeUnavailable("no emulator")

    monkeypatch.setattr(compiler, "verify", unavailable)
    artifact = sparsec.compile(small())
    assert artifact.manifest["parity"] is None
    assert artifact.manifest["notes"] == ["not run on this machine: no emulator"]


def test_an_artifact_is_replaced_only_on_request(tmp_path):
    path = tmp_path / "model.sparsec"
    first = files_of(sparsec.compile(small(), output=path))
    with pytest.raises(UsageError, match="overwrite"):
        sparsec.compile(small(), passes=["prune:sparsity=0.9"], output=path)
    assert files_of(sparsec.load(path)) == first
    again = sparsec.compile(small(), passes=["prune:sparsity=0.9"], output=path, overwrite=True)
    assert again.path == path
    assert files_of(again)["weights.bin"] != first["weights.bin"]


def test_a_temporary_artifact_goes_with_its_object():
    artifact = sparsec.compile(small())
    path = artifact.path
    assert path.is_dir()
    del artifact
    assert not path.exists()
