"""The file of measured choices is untrusted."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from measured_chain import chain_model

from sparsec import tuner, tuning
from sparsec.errors import TuningError


def _change(*where: Any, value: Any) -> Any:
    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for key in where[:-1]:
            place = next(iter(place.values())) if key == "first" else place[key]
        place[where[-1]] = value

    return change


def _drop(*where: Any) -> Any:
    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for key in where[:-1]:
            place = next(iter(place.values())) if key == "first" else place[key]
        del place[where[-1]]

    return change


def _layer(**facts: Any) -> Any:
    """Another layer, under its right key."""

    def change(document: dict[str, Any]) -> None:
        layer = {"op": "Conv", **facts}
        rows = next(iter(document["layers"].values()))["candidates"]
        document["layers"][tuning.layer_key(layer)] = {"layer": layer, "candidates": rows}

    return change


CANDIDATE = ("layers", "first", "candidates", 0)
DAMAGE = {
    "schema": _change("schema", value=tuning.SCHEMA + 1),
    "schema true": _change("schema", value=True),
    "no schema": _drop("schema"),
    "extra": _change("extra", value=1),
    "model": _change("model", value=["x"]),
    "long model": _change("model", value="x" * 1000),
    "cpu": _change("cpu", value=None),
    "kernels": _change("kernels", value=""),
    "layers": _change("layers", value=[]),
    "layer": _change("layers", "abc", value=1),
    "key": _change("layers", "abc\x1b[31m", value={"layer": {}, "candidates": []}),
    "facts": _change("layers", "first", "layer", "op", value="Gemm"),
    "stored": _layer(stored=[1]),
    "no stored": _layer(),
    "percent": _layer(stored={"conv_f32_4x1": -1}),
    "percent text": _layer(stored={"conv_f32_4x1": "25"}),
    "no facts": _drop("layers", "first", "layer"),
    "no candidates": _change("layers", "first", "candidates", value=[]),
    "candidates": _change("layers", "first", "candidates", value="x"),
    "candidate": _change(*CANDIDATE, value=None),
    "kernel": _change(*CANDIDATE, "kernel", value=3),
    "no kernel": _drop(*CANDIDATE, "kernel"),
    "more": _change(*CANDIDATE, "path", value="/"),
    "rows": _change(*CANDIDATE, "rows", value=-1),
    "vectors": _change(*CANDIDATE, "vectors", value=1.0),
    "lanes": _change(*CANDIDATE, "lanes", value=True),
    "depth": _change(*CANDIDATE, "depth", value=-1),
    "many lanes": _change(*CANDIDATE, "lanes", value=1 << 40),
    "time": _change(*CANDIDATE, "measured_us", value=0),
    "time text": _change(*CANDIDATE, "measured_us", value="1"),
    "nan": _change(*CANDIDATE, "measured_us", value=float("nan")),
    "infinity": _change(*CANDIDATE, "predicted_us", value=float("inf")),
    "huge": _change(*CANDIDATE, "predicted_us", value=10**400),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_one_line(damage: Any, tuned: tuner.Tuned, tmp_path: Path) -> None:
    document = copy.deepcopy(json.loads(tuned.path.read_text()))
    damage(document)
    path = tmp_path / "t.json"
    path.write_text(json.dumps(document))
    with pytest.raises(TuningError) as caught:
        tuning.read_tuning(path)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert len(caught.value.message) < 300
    assert caught.value.where == str(path)


@pytest.mark.parametrize("raw", [b"", b"\xff\xfe", b"{", b"[]", b"3", b"null", b"[" * 100_000, b'{"schema": 1}'])
def test_what_is_no_such_file(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(raw)
    with pytest.raises(TuningError):
        tuning.read_tuning(path)
    with pytest.raises(TuningError):
        tuner.tune(chain_model(), cache=path)
    assert path.read_bytes() == raw


def test_a_missing_file_or_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(TuningError, match="cannot read"):
            tuning.read_tuning(path)
