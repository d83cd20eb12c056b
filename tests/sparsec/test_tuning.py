"""Compiling with measured choices: which layer a measurement speaks for, what is followed and refused, the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from measured_chain import chain_model, entry, plant, prices_of, pruned
from samples import pair_model

import sparsec
from sparsec import cli, tuner, tuning
from sparsec.errors import TuningError
from sparsec.lowering.prices import choose
from sparsec.targets import Target
from sparsec.tuning import Entry, Lookup, Measured, Tuning


def test_a_layer_is_known_by_geometry_and_structure(host: Target) -> None:
    w = pruned((16, 16, 1, 1), 0.25, 4, 1)
    facts = prices_of(host, w).facts
    assert prices_of(host, w * 3).facts == facts
    assert prices_of(host, w[:, ::-1].copy()).facts == facts
    for other in (
        prices_of(host, w, side=7),
        prices_of(host, pruned((16, 16, 1, 1), 0.5, 4, 1)),
        prices_of(host, pruned((16, 16, 1, 1), 0.25, 1, 1)),
        prices_of(host, np.ones_like(w)),
    ):
        assert tuning.distance(other.facts, facts) > tuning.ALIKE
        assert tuning.layer_key(other.facts) != tuning.layer_key(facts)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [({"a": 50, "b": 20}, 1.0), ({"a": 55, "b": 21}, 1.1), ({"a": 50, "b": 10}, 2.0), ({"a": 50}, float("inf")), (3, float("inf"))],
)  # fmt: skip
def test_distance_is_the_largest_ratio(stored: Any, expected: float) -> None:
    facts = {"op": "Conv", "x_shape": [1], "stored": {"a": 50, "b": 20}}
    other = {**facts, "stored": stored}
    assert tuning.distance(facts, other) == pytest.approx(expected)
    assert tuning.distance(other, facts) == pytest.approx(expected)
    assert tuning.distance({**facts, "x_shape": [2]}, other) == float("inf")
    assert tuning.distance({"op": "Conv", "stored": {"a": 0}}, {"op": "Conv", "stored": {"a": 1}}) == 1.0


def test_the_most_similar_measured_layer_speaks_for_another() -> None:
    def found(percent: int) -> Entry:
        return replace(entry((1, percent)), layer={"op": "Conv", "stored": {"a": percent}})

    known = [found(50), found(54), found(80)]
    held = Tuning("m", "c", "k", {tuning.layer_key(e.layer): e for e in known})
    for percent, expected in ((50, 50), (51, 50), (53, 54), (58, 54), (60, None), (76, 80), (90, None)):
        answer = held.nearest({"op": "Conv", "stored": {"a": percent}})
        assert (answer and answer.layer["stored"]["a"]) == expected
    assert held.nearest({"op": "Gemm", "stored": {"a": 50}}) is None


def test_the_best_of_a_kernel() -> None:
    rows = [("conv_f32_dense", 3.0), ("conv_f32_4x1", 2.0), ("conv_f32_2x1", 1.0), ("conv_f32_dense", 2.5)]
    found = Entry({}, tuple(Measured(kernel, 4, 1, 16, 0, 1.0, us) for kernel, us in rows))
    dense, other = found.best("conv_f32_dense".__eq__), found.best("conv_f32_2x1".__ne__)
    assert dense is not None
    assert dense.measured_us == 2.5
    assert other is not None
    assert other.kernel == "conv_f32_4x1"
    assert found.best("conv_f32_8x1".__eq__) is None


def test_a_choice_is_followed_against_the_prediction(tuned: tuner.Tuned, tmp_path: Path, host: Target) -> None:
    [one, _] = tuned.layers
    free, _, _ = choose(prices_of(host, pruned((16, 16, 1, 1), 0.25, 4, 1)))
    other = next(c for c in one.entry.candidates if c.kernel == "conv_f32_dense")
    assert free.kernel != other.kernel
    path = plant(tuned, tmp_path / "t.json", kernel=other.kernel, rows=other.rows, vectors=other.vectors)
    artifact = sparsec.compile(chain_model(), tuning=path)
    layers = {row["name"]: row for row in artifact.report["layers"]}
    for name in ("one", "two"):
        assert layers[name]["kernel"].startswith("conv1x1_f32_dense")
        assert layers[name]["reason"].startswith(f"measured {other.measured_us:.1f} us, best sparse conv_f32_")
        price = next(c["predicted_us"] for c in layers[name]["candidates"] if c["kernel"] == "conv_f32_dense")
        assert layers[name]["predicted_us"] == pytest.approx(price, abs=2e-3)
    assert artifact.manifest["parity"]["passed"]
    assert artifact.manifest["digests"]["tuning"] == tuning.read_tuning(path).digest
    assert artifact.manifest["notes"] == []


def test_sparse_choices_say_what_dense_would_take(tuned: tuner.Tuned, tmp_path: Path) -> None:
    path = plant(tuned, tmp_path / "t.json", kernel="conv_f32_4x1")
    artifact = sparsec.compile(chain_model(), tuning=str(path))
    reason = next(row["reason"] for row in artifact.report["layers"] if row["name"] == "one")
    assert reason.startswith("measured ")
    assert ", dense measured " in reason
    assert next(row["reason"] for row in artifact.report["layers"] if row["name"] == "three").endswith(" us")


def test_the_same_file_gives_the_same_bytes(tuned: tuner.Tuned, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}" / "m.sparsec" for i in range(2)]
    for path in paths:
        sparsec.compile(chain_model(), tuning=tuned.path, output=path)
    for name in ("manifest.json", "report.json", "libmodel.so", "weights.bin"):
        assert (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes(), name


def test_layers_that_were_not_measured_are_said(tuned: tuner.Tuned) -> None:
    artifact = sparsec.compile(pair_model(), tuning=tuned.path)
    assert artifact.manifest["notes"] == ["tuning: 3 of 3 layers were not measured and are chosen by prediction"]
    assert sparsec.compile(chain_model()).manifest["digests"]["tuning"] is None


def test_a_file_for_other_code_is_refused(tuned: tuner.Tuned, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"measured for .*, compiling for armv8.2-a"):
        sparsec.compile(chain_model(), "arm", tuning=tuned.path)
    path = tmp_path / "t.json"
    path.write_text(json.dumps({**json.loads(tuned.path.read_text()), "kernels": "older"}))
    with pytest.raises(TuningError, match="other kernels than this version"):
        sparsec.compile(chain_model(), tuning=path)


def test_a_choice_that_does_not_exist_is_refused(tuned: tuner.Tuned, host: Target) -> None:
    prices = prices_of(host, pruned((16, 16, 1, 1), 0.25, 4, 1))
    good = Measured("conv_f32_4x1", 4, 1, host.machine.lanes, 0, 1.0, 1.0)
    assert prices.find(good.kernel, good.tile) is not None
    for bad in (replace(good, kernel="conv_f32_7x7"), replace(good, rows=8), replace(good, vectors=99)):
        found = Entry(prices.facts, (bad,))
        lookup = Lookup(Tuning("m", host.cpu, "k", {tuning.layer_key(found.layer): found}, "t.json"))
        with pytest.raises(TuningError, match="which this version does not offer for one"):
            lookup.find("one", prices)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(chain_model(), "chain.onnx")
    assert cli.run(["tune", "chain.onnx", "--cache", "t.json", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tuning"] == "t.json"
    assert [layer["names"] for layer in found["layers"]] == [["one", "two"], ["three"]]
    assert found["summary"]["layers"] == 2
    assert {"kernel", "tile", "predicted_us", "measured_us"} == set(found["layers"][0]["candidates"][0])
    assert cli.run(["compile", "chain.onnx", "--tuning", "t.json", "--json"]) == 0
    compiled = json.loads(capsys.readouterr().out)
    assert [row["reason"][:8] for row in compiled["layers"] if row["op"].startswith("Conv")] == ["measured"] * 3
    assert cli.run(["tune", "chain.sparsec", "--cache", "t.json"]) == 0
    text = capsys.readouterr().out
    assert "chosen, from the file" in text
    assert "rank" in text
    assert "kept in  t.json" in text


def test_command_line_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(chain_model(), "chain.onnx")
    for arguments, says in (
        (["tune", "chain.onnx", "--target", "arm"], "only host"),
        (["tune", "chain.onnx", "--time-limit", "0"], "--time-limit"),
        (["tune", "none.onnx", "--cache", "t.json"], "none.onnx"),
        (["tune", "chain.onnx", "--cache", "chain.onnx"], "chain.onnx"),
        (["compile", "chain.onnx", "--tuning", "none.json"], "none.json"),
    ):
        assert cli.run(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("error: ")
        assert says in captured.err


def test_interrupt_says_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuner, "tune", stop)
    monkeypatch.chdir(tmp_path)
    onnx.save(chain_model(), "chain.onnx")
    assert cli.run(["tune", "chain.onnx"]) == 130
    assert capsys.readouterr().err == "error: interrupted; what was measured is kept\n"
