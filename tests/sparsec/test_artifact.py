"""Artifacts: whole or absent, checked before use, the same bytes for the same content."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsec.artifact import Facts, artifact_path, load, write_artifact
from sparsec.errors import ArtifactError, BuildError, UsageError
from sparsec.manifest import FILES
from sparsec.program import Arg, Candidate, Layer, Program, Tensor
from sparsec.staging import staged, staged_file
from sparsec.targets import find_target


def model_bytes() -> bytes:
    weight = np.eye(4, dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def program() -> Program:
    layer = Layer(
        name="product", op="MatMul", shape=(1, 4), route="native", kernel="gemm_f32", reason="dense is cheapest",
        zeros=0.75, structure="dense", candidates=(Candidate("gemm_f32", 1.5),), bytes=64, predicted_us=1.5,
    )  # fmt: skip
    return Program(
        name="tiny", target=find_target("host"), kernels=(), steps=(), buffers=(), constants=(),
        inputs=(Tensor("x", (1, 4), "float32", Arg("arena", 0)),),
        outputs=(Tensor("y", (1, 4), "float32", Arg("arena", 512)),),
        arena_bytes=1024, scratch_bytes=0, weights_bytes=64, layers=(layer,),
    )  # fmt: skip


FACTS = Facts(digests={"model": "0" * 64}, tolerances={"y": 1e-6}, passes=[{"name": "prune", "sparsity": 0.75}])


def fill(directory: Path) -> dict[str, Any]:
    """An artifact whose library is not one: enough for everything but running it."""
    for name in ("libmodel.so", "libmodel.a", "model.h", "bench", "weights.bin", "parity.bin"):
        (directory / name).write_bytes(name.encode())
    return write_artifact(directory, program=program(), model_bytes=model_bytes(), facts=FACTS)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.sparsec"
    with staged(path) as stage:
        fill(stage)
    return path


def test_write_then_load(made: Path) -> None:
    artifact = load(made)
    assert {p.name for p in made.iterdir()} == {*FILES["elf"], "weights.bin", "manifest.json"}
    assert artifact.inputs[0].shape == (1, 4)
    assert artifact.bytes == {"weights": 11, "code": 11, "onnx": len(model_bytes())}
    assert artifact.manifest["passes"] == [{"name": "prune", "sparsity": 0.75}]
    assert artifact.report["totals"]["zeros"] == 0.75
    assert onnx.load(made / "model.onnx").graph.name == "tiny"
    assert str(made) not in (made / "manifest.json").read_text() + (made / "report.json").read_text()


def test_same_bytes_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with staged(tmp_path / f"{name}.sparsec") as stage:
            fill(stage)
    for file in (tmp_path / "a.sparsec").iterdir():
        assert file.read_bytes() == (tmp_path / "b.sparsec" / file.name).read_bytes(), file.name


def test_where_an_artifact_goes() -> None:
    assert artifact_path(None, "m") == Path("m.sparsec")
    assert artifact_path("out", "m") == Path("out/m.sparsec")
    assert artifact_path("out/other.sparsec", "m") == Path("out/other.sparsec")


def test_existing_artifact_is_kept_without_overwrite(made: Path) -> None:
    before = (made / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match="--overwrite"), staged(made):
        pytest.fail("work was done")
    assert (made / "manifest.json").read_bytes() == before


def test_overwrite_replaces_and_leaves_nothing_else(made: Path) -> None:
    (made / "stray.txt").write_text("old")
    with staged(made, overwrite=True) as stage:
        fill(stage)
    assert not (made / "stray.txt").exists()
    assert os.listdir(made.parent) == [made.name]


def test_overwrite_without_an_atomic_exchange(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsec.staging._exchange", lambda a, b: False)
    (made / "stray.txt").write_text("old")
    with staged(made, overwrite=True) as stage:
        fill(stage)
    assert not (made / "stray.txt").exists()
    assert os.listdir(made.parent) == [made.name]


def test_overwrite_refuses_what_is_no_artifact(tmp_path: Path) -> None:
    folder = tmp_path / "holiday.sparsec"
    folder.mkdir()
    (folder / "photo.jpg").write_text("precious")
    with pytest.raises(UsageError, match="not an artifact"), staged(folder, overwrite=True):
        pytest.fail("work was done")
    assert (folder / "photo.jpg").read_text() == "precious"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_interrupted_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with staged(tmp_path / "new" / "deep" / "m.sparsec") as stage:
            (stage / "half").write_text("written")
            raise error

    with pytest.raises(error):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_interrupted_overwrite_keeps_the_old(made: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged(made, overwrite=True):
        raise KeyboardInterrupt
    assert load(made).name == "tiny"
    assert os.listdir(made.parent) == [made.name]


def test_full_disk_and_read_only(tmp_path: Path) -> None:
    def failing(number: int) -> None:
        with staged(tmp_path / "m.sparsec"):
            raise OSError(number, os.strerror(number))

    with pytest.raises(BuildError, match="the disk is full"):
        failing(errno.ENOSPC)
    with pytest.raises(UsageError, match="cannot write: Read-only file system"):
        failing(errno.EROFS)
    with pytest.raises(UsageError, match="cannot write"), staged(Path("/proc/none/m.sparsec")):
        pytest.fail("work was done")
    assert os.listdir(tmp_path) == []


def test_staged_file(tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    with staged_file(path) as stage:
        stage.write_text("one")
    with pytest.raises(UsageError, match="--overwrite"), staged_file(path):
        pytest.fail("work was done")

    def interrupted() -> None:
        with staged_file(path, overwrite=True) as stage:
            stage.write_text("two")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "one"
    with staged_file(path, overwrite=True) as stage:
        stage.write_text("two")
    assert path.read_text() == "two"
    assert os.listdir(tmp_path) == ["out.onnx"]
    assert path.stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize("name", [*FILES["elf"], "weights.bin"])
def test_every_file_is_checked(made: Path, name: str) -> None:
    content = (made / name).read_bytes()
    (made / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="checksum"):
        load(made)
    (made / name).unlink()
    with pytest.raises(ArtifactError, match="missing"):
        load(made)


def test_not_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "absent.sparsec", tmp_path / "file", tmp_path):
        with pytest.raises(ArtifactError) as caught:
            load(path)
        assert "\n" not in str(caught.value)


CHANGES: list[tuple[tuple[str | int, ...], object]] = [
    (("schema",), 99),
    (("schema",), True),
    (("name",), 7),
    (("target",), []),
    (("target", "cpu"), None),
    (("inputs",), {}),
    (("inputs", 0, "shape"), [1, -4]),
    (("inputs", 0, "shape"), [1 << 30, 1 << 30]),
    (("inputs", 0, "shape"), [1.0]),
    (("inputs", 0, "dtype"), "object"),
    (("outputs",), []),
    (("arena_bytes",), -1),
    (("threads",), 0),
    (("embed_weights",), 1),
    (("bind",), {"x": 3}),
    (("digests", "model"), "zz"),
    (("passes",), [{"options": {}}]),
    (("tolerances",), {}),
    (("tolerances", "y"), float("nan")),
    (("parity",), {"passed": "yes"}),
    (("files",), {"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
    (("files", "bench", "sha256"), "short"),
    (("surprise",), 1),
]


@pytest.mark.parametrize(("keys", "value"), CHANGES, ids=lambda v: str(v)[:40])
def test_manifest_is_untrusted(made: Path, keys: tuple[str | int, ...], value: object) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    inner = manifest
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (made / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"manifest\.json") as caught:
        load(made)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"schema": 1}', "\xff"])
def test_manifest_that_is_no_manifest(made: Path, text: str) -> None:
    (made / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError):
        load(made)


def test_a_copy_elsewhere_loads(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere").name == "tiny"
