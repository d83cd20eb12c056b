"""Whole models: every engine on every case, in turns, with ONNX Runtime on the dense model as the common reference."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import sparsec
from bench.engines import ENGINES, Engine, Worker
from bench.models import Case, Missing, compiled, dense_of, prepare
from bench.turns import Say, Spread, cpus, ratio, take_turns
from sparsec.errors import SparsecError

REFERENCE = "ort-dense"  # ONNX Runtime on the network before pruning


def measure_case(
    case: Case,
    engines: Sequence[Engine],
    rounds: int,
    say: Say,
    tflite: Mapping[str, Path] = MappingProxyType({}),
    tuning: Path | None = None,
) -> dict[str, Any]:
    """One case. `tflite`: files for LiteRT by case; `tuning`: of `sparsec tune`, for sparsec.

    Returns `{"engines": {name: facts or {"missing": reason}}, "predicted_us": ..., "memory": ...}`.
    """
    made, dense = prepare(case, tuning), prepare(dense_of(case))
    found: dict[str, dict[str, Any]] = {}
    workers: dict[str, Worker] = {}
    pinned = cpus(1)
    with contextlib.ExitStack() as stack:

        def start(key: str, engine: Engine, model: Any, given: Path | None = None) -> None:
            say(f"{case.name}: {engine.title}")
            try:
                workers[key] = stack.enter_context(Worker(engine, model, pinned, model=given))
            except (Missing, SparsecError) as error:
                found[key] = {"missing": str(error)}

        ort = next(engine for engine in ENGINES if engine.name == "ort")
        if not case.dense or ort not in engines:
            start(REFERENCE, ort, dense)
        for engine in engines:
            if engine.pruned_only and case.dense:
                continue
            start(engine.name, engine, made, tflite.get(case.name) if engine.name == "litert" else None)
        say(f"{case.name}: timing {len(workers)} engines, {rounds} rounds")
        seconds, lost = _turns(workers, rounds)
        found.update(lost)
        reference = seconds.get(REFERENCE) or (seconds.get("ort") if case.dense else None)
        for key, values in seconds.items():
            worker = workers[key]
            facts: dict[str, Any] = {"ms": Spread.of([1e3 * s for s in values]).json()}
            facts |= {"version": worker.version, "note": worker.note, "error": float(f"{worker.error:.3g}")}
            facts["growth_bytes"] = worker.growth
            if reference is not None:
                facts["speedup"] = ratio(reference, values).json()
            if key != "sparsec" and "sparsec" in seconds:
                facts["sparsec_is"] = ratio(values, seconds["sparsec"]).json()
            found[key] = facts
    order = [REFERENCE, *(engine.name for engine in ENGINES)]
    row: dict[str, Any] = {"engines": {key: found[key] for key in order if key in found}}
    if "ms" in found.get("sparsec", {}):
        row |= _own_facts(compiled(made))
    return row


def _turns(workers: dict[str, Worker], rounds: int) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Seconds by name; an engine that dies while it is timed is left out, with the reason, and the others start again."""
    lost: dict[str, dict[str, Any]] = {}
    while True:
        failed: list[str] = []

        def burst(name: str, runs: int, failed: list[str] = failed) -> list[float]:
            try:
                return workers[name].run(runs)
            except Missing:
                failed.append(name)
                raise

        bursts = {name: lambda runs, name=name: burst(name, runs) for name in workers if name not in lost}
        try:
            return take_turns(bursts, rounds), lost
        except Missing as error:
            lost[failed[0]] = {"missing": f"fails while it runs: {error}"}


def _own_facts(artifact: Path) -> dict[str, Any]:
    """What the artifact says of itself: predicted time, and memory as arena, scratch and weights."""
    manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    totals = sparsec.load(artifact).report["totals"]
    sizes = {key: int(manifest[f"{key}_bytes"]) for key in ("arena", "scratch", "weights")}
    return {"predicted_us": totals["predicted_us"], "memory": {**sizes, "total": sum(sizes.values())}}


def measure(cases: Sequence[Case], engines: Sequence[Engine], rounds: int, say: Say, **options: Any) -> dict[str, Any]:
    """All cases; one that cannot be prepared is `{"missing": reason}`. `options` as of `measure_case`."""
    found: dict[str, Any] = {}
    for case in cases:
        try:
            found[case.name] = measure_case(case, engines, rounds, say, **options)
        except (Missing, SparsecError) as error:
            found[case.name] = {"missing": str(error)}
    return found
