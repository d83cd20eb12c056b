"""A short run of each fuzzer, and that each can fail. Longer ones: `make fuzz`."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fuzz import campaign, graphs, run, targets
from fuzz.c import run as c_run
from fuzz.mutations import mutate_bytes, mutate_model
from sparsec.errors import ModelError
from sparsec.rewriting.pass_specs import parse_spec

RUNS = {"model": 15}


@pytest.mark.parametrize("name", targets.TARGETS)
def test_readers(name: str) -> None:
    runs = RUNS.get(name, 120)
    assert run.fuzz(name, runs, 1000.0, seed=1)["executions"] == runs


@pytest.mark.parametrize("name", run.READERS)
def test_what_coverage_guides_is_there(name: str) -> None:
    assert import_module(name)


def test_a_reader_that_fails_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(data: bytes) -> None:
        with targets.one_line():
            if len(data) > 60:
                raise ModelError("one line\nand another")

    monkeypatch.setitem(run.TARGETS, "careless", targets.Target(careless, lambda: [b"short"]))
    with pytest.raises(targets.FuzzFailure, match="2 lines"):
        run.fuzz("careless", 10_000, 1000.0, seed=1)


def test_mutations_repeat_and_mostly_parse() -> None:
    seeds = targets.TARGETS["model"].seeds()
    first, second = ([mutate_model(s, random.Random(i), seeds) for i, s in enumerate(seeds * 5)] for _ in range(2))
    assert first == second
    assert sum(a != b for a, b in zip(first, seeds * 5, strict=True)) > len(first) / 2
    for data in first:
        onnx.ModelProto().ParseFromString(data)
    assert mutate_bytes(b"abc", random.Random(1), [b"xyz"]) == mutate_bytes(b"abc", random.Random(1), [b"xyz"])


def test_random_graphs() -> None:
    counts = graphs.run(8, start=5, together=4, examples=3)
    assert counts["outputs"] >= 8


def test_passes_that_are_drawn_are_passes() -> None:
    module = import_module("fuzz.graphs.models")  # the package has a function of that name
    for spec in {spec for specs in (*module.EXACT, *module.OF_WEIGHTS) for spec in specs} - {"quantized-ports"}:
        parse_spec(spec)


def test_random_graphs_vary() -> None:
    facts = graphs.draw(250, start=3)
    kinds = {
        kind: {name for name in facts if name.startswith(kind + " ")} for kind in ("family", "type", "opset", "rank")
    }
    assert {kind: len(names) for kind, names in kinds.items()} == {"family": 5, "type": 8, "opset": 10, "rank": 6}
    assert sum(name.startswith("operator ") for name in facts) > 70
    assert facts["broadcasts"] > 25
    assert sum(name.startswith("pass ") for name in facts) > 7


def test_a_wrong_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsec import inprocess

    text = """<ir_version: 8, opset_import: ["" : 21]> g (float[3,4] x, int32[5] i, float16[8,8] h)
        => (float[3,4] y, int32[5] j, float16[8,8] k, uint8[3,4] q) <float s = {0.05}, uint8 z = {131}>
        { y = Exp(x) j = Neg(i) k = Neg(h) t = Tanh(x) q = QuantizeLinear(t, s, z) }"""
    model, good = onnx.parser.parse_model(text), inprocess.InProcess.run
    graphs.compare(model, (), Counter())
    for name, wrong in (
        ("y", lambda a: a * np.float32(1 + 1e-5)),
        ("j", lambda a: a + np.arange(5, dtype=a.dtype) // 4),
        ("k", lambda a: a * np.float16(1.02)),
        ("q", lambda a: a + np.uint8(2)),
    ):

        def run_wrongly(self: Any, feeds: Any, name: str = name, wrong: Any = wrong) -> Any:
            outputs = good(self, feeds)
            return {**outputs, name: wrong(outputs[name])}

        monkeypatch.setattr(inprocess.InProcess, "run", run_wrongly)
        with pytest.raises(graphs.Mismatch, match=name):
            graphs.compare(model, (), Counter())


def test_a_campaign_counts_and_goes_on(tmp_path: Path) -> None:
    good = campaign.Harness("good", 0.5, "fuzz.run tuning --runs 20 --seconds {seconds} --seed {seed} --keep {keep}")
    bad = campaign.Harness("bad", 0.5, "fuzz.run --no-such-option {seed}{seconds}{keep}")
    log = tmp_path / "log"
    first = [next(campaign.slices(log, 10, [good, bad], 60, tmp_path)) for _ in range(2)]
    assert [(r["harness"], r["seed"], bool(r["status"])) for r in first] == [("good", 1, False), ("bad", 1, True)]
    assert first[0]["executions"] == 20
    assert 0 < first[0]["cpu"] < 30
    third = next(campaign.slices(log, 10, [good, bad], 60, tmp_path, resume=True))
    assert third["seed"] == 2
    assert campaign.read(log) == [*first, third]
    assert "| bad | 0 |" in campaign.summary(campaign.read(log))


@pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")), reason="neither gcc nor clang is here")
def test_readers_of_the_c_runtime() -> None:
    assert "executions" in c_run.fuzz(2)
