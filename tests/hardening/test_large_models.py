"""Models above 2 GB, with the borders moved so that a small model is one: external data in, layer by layer, external data out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hardening.making import model, save, value
from onnx import TensorProto, helper

from sparsec import cli
from sparsec.errors import UsageError
from sparsec.limits import Limits
from sparsec.loading import reading, saving
from sparsec.loading.load import load_model, model_bytes
from sparsec.loading.saving import save_model
from sparsec.passes.normalization.fold_constants import quiet_session
from sparsec.passes.pruning import prune
from sparsec.rewriting import pipeline

SHAPES = ((8, 64), (64, 40), (40, 40), (40, 8))


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four products; their weights lie in one file, at odd places."""
    monkeypatch.setattr(reading, "LAZY_BYTES", 1024)
    monkeypatch.setattr(saving, "ONE_FILE", 4096)
    monkeypatch.setattr(prune, "MANY", 0)
    rng = np.random.default_rng(3)
    tensors, nodes, name = [], [], "x"
    with (tmp_path / "w.bin").open("wb") as file:
        for i, shape in enumerate(SHAPES):
            file.write(b"\1" * (i + 1))
            tensor = TensorProto(
                name=f"w{i}", data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL
            )
            array = rng.standard_normal(shape).astype(np.float32)
            for key, text in (("location", "w.bin"), ("offset", str(file.tell())), ("length", str(array.nbytes))):
                tensor.external_data.add(key=key, value=text)
            file.write(array.tobytes())
            tensors.append(tensor)
            nodes.append(helper.make_node("MatMul", [name, f"w{i}"], [f"p{i}"], name=f"product{i}"))
            name = f"p{i}"
    return save(tmp_path, model(nodes, tensors, inputs=[value("x", [1, 8])], outputs=[value(name, None)]))


def arrays(loaded: ir.Model) -> dict[str, np.ndarray]:
    return {name: v.const_value.numpy() for name, v in loaded.graph.initializers.items() if v.const_value is not None}


def inlined(path: Path) -> bytes:
    return onnx.load(str(path)).SerializeToString()


@pytest.mark.parametrize("isolate", [0, 1])
def test_mapped_weights_are_the_same_weights(path: Path, isolate: int) -> None:
    whole = load_model(inlined(path))
    mapped = load_model(path, limits=Limits(isolate=isolate))
    assert arrays(mapped).keys() == arrays(whole).keys() == {f"w{i}" for i in range(4)}
    for name, array in arrays(whole).items():
        np.testing.assert_array_equal(arrays(mapped)[name], array)


def test_pruned_layer_by_layer_is_pruned_alike(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for many in (0, 1 << 40):
        monkeypatch.setattr(prune, "MANY", many)
        loaded = load_model(path)
        for pass_ in ("prune:sparsity=0.6,block=4x1", "prune:nm=2:4,exclude=product0"):
            loaded, records = pipeline.run_passes(loaded, (pass_,))
            assert records[0]["modified"]
        results.append((model_bytes(loaded), [r["details"] for r in records]))
    assert results[0] == results[1]


def test_a_second_run_changes_nothing(path: Path) -> None:
    loaded, _ = pipeline.run_passes(load_model(path), ("prune:sparsity=0.5,block=4x1",))
    _, records = pipeline.run_passes(loaded, ("prune:sparsity=0.5,block=4x1",))
    assert not records[0]["modified"]


def test_written_with_external_data(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.onnx"
    command = [
        "rewrite",
        str(path),
        "-o",
        str(out),
        "--pass",
        "prune:sparsity=0.5,block=4x1",
        "--dump",
        str(tmp_path / "d"),
    ]
    assert cli.run(command) == 0, capsys.readouterr().err
    assert out.stat().st_size < 4096 < (tmp_path / "out.onnx.data").stat().st_size
    pruned, _ = pipeline.run_passes(load_model(inlined(path)), ("prune:sparsity=0.5,block=4x1",))
    x = np.random.default_rng(0).standard_normal((1, 8)).astype(np.float32)
    (wanted,) = quiet_session(model_bytes(pruned)).run(None, {"x": x})
    for file in (out, tmp_path / "d" / "20-prune.onnx"):
        onnx.checker.check_model(str(file), full_check=True)
        (got,) = quiet_session(inlined(file)).run(None, {"x": x})
        np.testing.assert_array_equal(got, wanted)


def test_neither_file_is_overwritten_unasked(path: Path, tmp_path: Path) -> None:
    loaded = load_model(path)
    (tmp_path / "out.onnx.data").write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists already"):
        save_model(loaded, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").read_bytes() == b"mine"
    assert not (tmp_path / "out.onnx").exists()
    save_model(loaded, tmp_path / "out.onnx", overwrite=True)
    assert model_bytes(load_model(tmp_path / "out.onnx")) == model_bytes(loaded)
