"""Times of an accelerator: out of what `bench` prints elsewhere, and into the table of `sparsec bench`."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from sparsec.bench import Timing, print_timing
from sparsec.errors import ArtifactError
from sparsec.runtimes.base import DeviceTime, Stats
from sparsec.runtimes.batch import BenchSession, Done

TIMES = {"median_ms": 2.0, "p10_ms": 1.5, "p90_ms": 3.0, "min_ms": 1.0}


class Elsewhere(BenchSession):
    """A machine whose `bench` prints `report`."""

    report: Mapping[str, Any] = MappingProxyType({})

    def _start(self, arguments: list[str], samples: bytes | None) -> Done:
        return Done(0, json.dumps(self.report), "", b"")


@pytest.fixture
def session() -> Elsewhere:
    artifact = SimpleNamespace(path=Path("model.sparsec"), manifest={"threads": 1}, inputs=(), outputs=())
    return Elsewhere(artifact, None, "elsewhere")


def test_of_a_bench_elsewhere(session):
    device = {"name": "Orin", **{key: value / 2 for key, value in TIMES.items()}}
    session.report = {**TIMES, "peak_bytes": 7, "device": device}
    assert session.time({}, 5) == Stats(5, 2.0, 1.5, 3.0, 1.0, 7)
    assert session.device_time({}, 5) == DeviceTime("Orin", Stats(5, 1.0, 0.75, 1.5, 0.5))


def test_none_where_there_is_no_accelerator(session):
    session.report = {**TIMES, "peak_bytes": 7}
    session.time({}, 5)
    assert session.device_time({}, 5) is None


def test_a_report_without_times_is_an_error(session):
    session.report = {**TIMES, "peak_bytes": 7, "device": {"name": "Orin"}}
    with pytest.raises(ArtifactError, match="no times"):
        session.time({}, 5)


def test_in_the_table_and_in_json():
    device = DeviceTime("Orin", Stats(5, 1.0, 0.75, 1.5, 0.5))
    timing = Timing("cuda", 1, 5, 2.0, 1.5, 3.0, 1.0, None, {"ort": Stats(5, 8.0, 7.0, 9.0, 6.0)}, device)
    out = io.StringIO()
    print_timing(timing, Console(file=out, width=120))
    rows = {line.split("│")[1].strip(): line for line in out.getvalue().splitlines() if line.count("│") > 2}
    assert "1.000" in rows["Orin, without copies"]
    assert "4.00x" in rows["ort"]
    assert not any("x" in rows[name].split("│")[-2] for name in ("cuda", "Orin, without copies"))
    found = timing.json()["device"]
    assert (found["name"], found["median_ms"]) == ("Orin", 1.0)
    assert "device" not in Timing("native", 1, 5, 2.0, 1.5, 3.0, 1.0, None).json()
