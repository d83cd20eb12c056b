"""inspect: what it says of a model before building is what the artifact says after."""

from __future__ import annotations

import io
import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from rich.console import Console
from samples import pair_artifact, pair_model

import sparsec
from sparsec.inspection import inspect_artifact, inspect_model, layer_choices, print_report, weight_counts
from sparsec.loading.load import load_model
from sparsec.targets import find_target

KEYS = {"name", "op", "shape", "zeros", "structure", "kernel", "reason", "candidates", "bytes"}


def pruned() -> onnx.ModelProto:
    """`pair_model` with three of four blocks of 4x1 in `second` zero."""
    model = pair_model()
    for tensor in model.graph.initializer:
        if tensor.name == "w1":
            weight = numpy_helper.to_array(tensor).copy()
            for i in range(16):
                keep = i % 4
                mask = np.zeros(16, bool)
                mask[4 * keep : 4 * keep + 4] = True
                weight[~mask, i] = 0
            tensor.CopyFrom(numpy_helper.from_array(weight, "w1"))
    return model


@pytest.mark.parametrize("target", ["host", "arm"])
def test_model_and_artifact_agree(target: str) -> None:
    system = "linux" if target == "arm" else None
    before = inspect_model(load_model(pair_model()), find_target(target, os=system), "pair")
    after = inspect_artifact(pair_artifact(target))
    assert before["layers"] == after["layers"]
    for key in ("weights", "zeros", "arena_bytes", "predicted_us", "generic_share", "raw_bytes"):
        assert before["totals"][key] == after["totals"][key]
    assert before["totals"]["code_bytes"] is None
    assert after["totals"]["code_bytes"] == (pair_artifact(target).path / "libmodel.so").stat().st_size


def test_rows_have_the_contract_keys() -> None:
    report = json.loads(json.dumps(inspect_artifact(pair_artifact()), allow_nan=False))
    assert report["layers"]
    for row in report["layers"]:
        assert set(row) >= KEYS
        for candidate in row["candidates"]:
            assert set(candidate) == {"kernel", "predicted_us"}
    named = {name for row in report["layers"] for name in row["nodes"]} | {row["name"] for row in report["layers"]}
    assert {"first", "second", "head", "double"} <= named


def test_structure_and_zeros_are_found() -> None:
    report = inspect_model(load_model(pruned()), find_target("host"))
    row = next(row for row in report["layers"] if row["name"] == "second")
    assert row["zeros"] == 0.75
    assert row["structure"].startswith("4x1")
    assert len(row["candidates"]) > 1
    counts = weight_counts(ir.to_proto(load_model(pruned())).SerializeToString())
    assert counts["weight_zeros"] == 192
    assert report["totals"]["zeros"] == pytest.approx(192 / counts["weights"], abs=1e-6)


def test_sizes_follow_the_files() -> None:
    artifact = pair_artifact()
    totals = inspect_artifact(artifact)["totals"]
    assert totals["packed_bytes"] == (artifact.path / "weights.bin").stat().st_size
    assert totals["raw_bytes"] == 4 * (16 * 27 + 16 + 256 + 64 + 4 + 1)
    assert totals["ram_bytes"] >= totals["arena_bytes"] + artifact.manifest["weights_bytes"]
    assert 0 < totals["gzip_bytes"] < totals["packed_bytes"] + totals["code_bytes"]
    assert 0 <= totals["generic_share"] < 1


def test_printed_table_names_every_layer() -> None:
    text = io.StringIO()
    print_report(inspect_artifact(pair_artifact()), Console(file=text, width=200), verbose=True)
    for row in pair_artifact().report["layers"]:
        assert row["name"] in text.getvalue()
    assert "generic route" in text.getvalue()


def test_a_pruned_artifact_is_smaller() -> None:
    dense, sparse = pair_artifact(), sparsec.compile(pruned())
    assert sparse.bytes["weights"] < dense.bytes["weights"]


def test_what_passes_chose_is_shown_with_the_reason_why_others_stay() -> None:
    passes = [
        {"name": "prune", "details": [{"layer": "a", "weights": 8, "zeros": 4, "changed": True}]},
        {"name": "factorize", "details": [
            {"budget": "parameters", "share": 0.5},
            {"layer": "a", "form": "svd 4", "predicted_error": 0.0123, "error": 0.02},
            {"layer": "b", "kept": "no form is predicted to run faster"},
        ]},
        {"name": "compress", "details": [
            {"layer": "c", "choice": "dense, int8", "predicted_error": 1e-4, "measured_error": 2e-4},
        ]},
    ]  # fmt: skip
    rows = layer_choices(passes)
    assert [(r["layer"], r["pass"], r["choice"]) for r in rows] == [
        ("a", "factorize", "svd 4"), ("b", "factorize", "as it is"), ("c", "compress", "dense, int8")
    ]  # fmt: skip
    assert [(r["predicted_error"], r["measured_error"]) for r in rows] == [(0.0123, 0.02), (None, None), (1e-4, 2e-4)]
    result = inspect_artifact(pair_artifact())
    assert result["choices"] == []
    stream = io.StringIO()
    print_report({**result, "choices": rows}, Console(file=stream, width=200))
    printed = stream.getvalue()
    assert "no form is predicted to run faster" in printed and "0.012" in printed and "dense, int8" in printed
