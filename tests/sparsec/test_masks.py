"""Masks as files and soups: round trips, what is refused, what an average keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from command_line import Run
from samples import pair_model

from sparsec.errors import DataError, ModelError
from sparsec.loading.load import load_model, model_bytes
from sparsec.masks_io import apply_masks, export_masks, read_masks, write_masks
from sparsec.npz import write_npz
from sparsec.passes import Prune
from sparsec.passes.layers import weighted_layers
from sparsec.soup import average, check_alike, soup


def pruned(block: str = "4x1", sparsity: float = 0.5) -> ir.Model:
    model = load_model(pair_model())
    Prune(sparsity=sparsity, block=block, include=("second",))(model)
    head = model.graph.initializers["w2"]
    blocks = np.indices((1, 16)).sum(0) % 2 == 0  # one block of four rows in two
    head.const_value = ir.Tensor(np.where(blocks, head.const_value.numpy(), np.float32(0)), name="w2")
    return model


def weights(model: ir.Model) -> dict[str, np.ndarray]:
    return {str(layer.weight.name): layer.tensor.numpy() for layer in weighted_layers(model)}


def shifted(model: ir.Model, seed: int) -> ir.Model:
    """A copy with other values under the same mask, as training leaves it."""
    copy = ir.from_proto(ir.to_proto(model))
    rng = np.random.default_rng(seed)
    for name, value in copy.graph.initializers.items():
        array = value.const_value.numpy()
        if array.dtype == np.float32 and array.ndim:
            noise = rng.standard_normal(array.shape).astype(np.float32)
            changed = array + 0.1 * noise * ((array != 0) if array.ndim > 1 else 1)
            value.const_value = ir.Tensor(changed.astype(np.float32), name=name)
    return copy


def test_masks_survive_the_file_and_make_a_dense_model_pruned(tmp_path: Path) -> None:
    model = pruned()
    masks, rows = export_masks(model)
    assert set(masks) == {"w1", "w2"}  # the dense first layer is left out
    assert {row.weight: row.structure.split(",")[0] for row in rows} == {
        "w1": "4x1 blocks",
        "w2": "whole channels (8 of 16 input)",
    }
    write_masks(tmp_path / "m.npz", masks)
    with np.load(tmp_path / "m.npz", allow_pickle=False) as archive:
        assert {name: archive[name].dtype for name in archive.files} == {"w1": np.dtype(bool), "w2": np.dtype(bool)}
        assert archive["w1"].shape == (16, 16, 1, 1)
    dense = load_model(pair_model())
    done = apply_masks(dense, read_masks(tmp_path / "m.npz"))
    assert sum(row.changed for row in done) == sum(row.zeros for row in rows) > 0
    for name, array in weights(dense).items():
        np.testing.assert_array_equal(array, weights(model)[name])
    before = model_bytes(dense)
    assert all(row.changed == 0 for row in apply_masks(dense, masks))
    assert model_bytes(dense) == before


def test_every_layer_on_request() -> None:
    assert set(export_masks(pruned(), every=True)[0]) == {"w0", "w1", "w2"}
    with pytest.raises(ModelError, match="nothing to export"):
        export_masks(load_model(pair_model()))


def test_a_node_name_stands_for_its_weight() -> None:
    model = load_model(pair_model())
    mask = np.ones((16, 16, 1, 1), bool)
    mask[::2] = False
    (row,) = apply_masks(model, {"second": mask})
    assert (row.weight, row.zeros) == ("w1", 128)
    assert row.structure.startswith("whole channels (8 of 16 output)")


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        ({"w9": np.ones((16, 16, 1, 1), bool)}, "'w9' is no weight of the model"),
        ({"w1": np.ones((16, 16), bool)}, r"'w1' has shape \[16, 16\], its weight \[16, 16, 1, 1\]"),
        (
            {"w1": np.zeros((16, 16, 1, 1), bool), "second": np.ones((16, 16, 1, 1), bool)},
            "another mask, which differs",
        ),
        ({"w1": np.ones(3, bool), "x": np.ones(3, bool)}, "'w1' has shape .*; 'x' is no weight"),
    ],
)
def test_masks_that_do_not_fit_are_refused_in_one_line(masks: dict[str, np.ndarray], says: str) -> None:
    model = load_model(pair_model())
    before = model_bytes(model)
    with pytest.raises(DataError, match=says) as caught:
        apply_masks(model, masks)
    assert "\n" not in str(caught.value)
    assert model_bytes(model) == before


def test_files_of_other_things_are_refused(tmp_path: Path) -> None:
    write_npz(tmp_path / "floats.npz", {"w1": np.full((16, 16, 1, 1), 0.5)})
    with pytest.raises(DataError, match="not all 0 or 1"):
        read_masks(tmp_path / "floats.npz")
    write_npz(tmp_path / "ints.npz", {"w1": np.eye(4, dtype=np.uint8)})
    assert read_masks(tmp_path / "ints.npz")["w1"].dtype == bool
    write_npz(tmp_path / "empty.npz", {})
    with pytest.raises(DataError, match="empty"):
        read_masks(tmp_path / "empty.npz")
    np.savez(tmp_path / "objects.npz", w1=np.array([{}], object))
    with pytest.raises(DataError):
        read_masks(tmp_path / "objects.npz")


def test_soup_is_the_mean_and_keeps_the_zeros() -> None:
    base = pruned()
    models = [shifted(base, seed) for seed in range(3)]
    made, ingredients = soup(models, ["a", "b", "c"])
    assert ingredients.taken == (0, 1, 2)
    for name, array in weights(made).items():
        parts = [weights(m)[name] for m in models]
        np.testing.assert_allclose(array, np.mean(parts, axis=0), rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(array == 0, parts[0] == 0)
    onnx.checker.check_model(model_bytes(made), full_check=True)
    np.testing.assert_array_equal(weights(models[0])["w1"], weights(shifted(base, 0))["w1"])  # inputs untouched


def test_greedy_soup_leaves_out_what_hurts() -> None:
    base = pruned()
    good, better, bad = shifted(base, 1), base, shifted(shifted(base, 2), 3)
    target = weights(base)["w1"]

    def damage(model: ir.Model) -> float:
        return float(np.abs(weights(model)["w1"] - target).sum())

    made, ingredients = soup([good, bad, better], ["a", "b", "c"], damage)
    assert ingredients.taken == (2,)
    assert ingredients.damage == 0.0
    np.testing.assert_array_equal(weights(made)["w1"], target)
    # two errors of opposite sign cancel: both are taken
    plus, minus = shifted(base, 1), average([base])
    value = minus.graph.initializers["w1"]
    value.const_value = ir.Tensor((2 * target - weights(plus)["w1"]).astype(np.float32), name="w1")
    assert set(soup([plus, minus], ["a", "b"], damage)[1].taken) == {0, 1}


def test_soup_refuses_what_does_not_share_a_mask_or_a_graph() -> None:
    with pytest.raises(ModelError, match=r"b: the masks differ from a: 'w\d' is zero in other places"):
        check_alike([pruned(), pruned(sparsity=0.25)], ["a", "b"])
    with pytest.raises(ModelError, match="at least two"):
        check_alike([pruned()], ["a"])
    other = pair_model()
    other.graph.node[1].op_type = "Sigmoid"
    with pytest.raises(ModelError, match="b: is another graph than a"):
        check_alike([load_model(pair_model()), load_model(other)], ["a", "b"])


def test_verbs(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(pair_model(), "dense.onnx")
    base = pruned()
    Path("pruned.onnx").write_bytes(model_bytes(base))
    code, out, err = run("mask", "export", "pruned.onnx", "-o", "m.npz")
    assert (code, err) == (0, "")
    assert "m.npz  2 layers, 50.0% of their weights are zero" in out
    assert run("mask", "export", "pruned.onnx", "-o", "m.npz")[0] == 2  # not without --overwrite
    code, out, err = run("mask", "apply", "dense.onnx", "m.npz", "-o", "again.onnx", "--json")
    assert code == 0
    assert Path("again.onnx").read_bytes() == model_bytes(base)
    code, out, err = run("mask", "apply", "again.onnx", "pruned.onnx", "-o", "x.onnx")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert not Path("x.onnx").exists()

    Path("a.onnx").write_bytes(model_bytes(shifted(base, 1)))
    Path("b.onnx").write_bytes(model_bytes(shifted(base, 2)))
    assert run("soup", "a.onnx", "b.onnx", "-o", "soup.onnx")[0] == 0
    soup_model = load_model("soup.onnx")
    np.testing.assert_array_equal(weights(soup_model)["w1"] == 0, weights(base)["w1"] == 0)
    data: dict[str, Any] = {"x": np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)}
    write_npz(Path("d.npz"), data)
    against = ("--against", "pruned.onnx", "--data", "d.npz")
    code, out, err = run("soup", "a.onnx", "pruned.onnx", "-o", "best.onnx", *against, "--json")
    assert code == 0
    assert '"pruned.onnx": 0.0' in out
    assert run("soup", "a.onnx", "-o", "one.onnx")[0] == 2
    assert run("soup", "a.onnx", "b.onnx", "-o", "c.onnx", "--against", "dense.onnx")[0] == 2
    code, out, err = run("soup", "a.onnx", "dense.onnx", "-o", "c.onnx")
    assert (code, err.count("\n")) == (2, 1)
    assert "the masks differ" in err
