"""bench: numbers in order, runtimes in turns, names checked."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import numpy as np
import pytest
from samples import pair_artifact

from sparsec.bench import Timing, _take_turns, bench, comparable_names
from sparsec.errors import RuntimeUnavailable, UsageError
from sparsec.runtimes.base import Session, Stats


def test_against_ort() -> None:
    timing = pair_artifact().bench(runs=9, against=["ort"])
    assert isinstance(timing, Timing)
    found = json.loads(json.dumps(timing.json(), allow_nan=False))
    keys = {"runs", "median_ms", "p10_ms", "p90_ms", "min_ms", "peak_bytes"}
    assert set(found) == keys | {"runtime", "threads", "against"}
    assert (found["runtime"], found["threads"], found["runs"]) == ("native", 1, 9)
    assert set(found["against"]) == {"ort"}
    for numbers in (found, found["against"]["ort"]):
        assert keys <= set(numbers)
        assert 0 < numbers["min_ms"] <= numbers["p10_ms"] <= numbers["median_ms"] <= numbers["p90_ms"]
        assert 1e5 < numbers["peak_bytes"] < 1e9


def test_ort_as_the_runtime() -> None:
    timing = bench(pair_artifact(), runs=3, runtime="ort", against=["ort"])
    assert timing.runtime == "ort"
    assert timing.against == {}


def test_threads() -> None:
    assert bench(pair_artifact(), runs=3, threads=2).threads == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"runs": 0}, "at least 1"),
        ({"threads": 0}, "1 to 256"),
        ({"against": ["orrt"]}, "did you mean 'ort'"),
        ({"against": ["adb"]}, "cannot compare"),
        ({"against": ["tourch:cpu"]}, "'tourch:cpu'.* did you mean 'torch'"),
        ({"against": ["ort:1"]}, "takes no argument"),
        ({"runtime": "nativ"}, "did you mean 'native'"),
    ],
)
def test_wrong_options(options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        bench(pair_artifact(), **options)  # type: ignore[arg-type]


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "sparsec.runtimes.torch", raising=False)
    with pytest.raises(RuntimeUnavailable, match=r'missing: pip install "sparsec\[torch\]"') as caught:
        bench(pair_artifact(), runs=3, against=["torch"])
    assert caught.value.exit_code == 3


def test_comparable() -> None:
    assert "ort" in comparable_names()
    assert not {"adb", "ssh", "emulated", "native"} & set(comparable_names())


def test_sessions_take_turns_in_changing_order() -> None:
    log: list[str] = []
    settled: list[str] = []

    class Logging(Session):
        interleaves = True

        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {}

        def time(self, inputs: dict[str, np.ndarray], runs: int, warmup: int = 1) -> Stats:
            raise AssertionError("timed in one go")

        def once(self, inputs: dict[str, np.ndarray]) -> Callable[[], object]:
            return lambda: log.append(self.name)

        def settle(self) -> None:
            settled.append(log[-1])

    told: list[int] = []
    stats = _take_turns(
        {"a": Logging("a"), "b": Logging("b")}, {}, runs=5, progress=lambda what, done, total: told.append(done)
    )
    assert stats["a"].runs == stats["b"].runs == 5
    assert told == [1, 2, 3, 4, 5]
    pairs = ["".join(log[i : i + 2]) for i in range(0, len(log), 2)]
    assert pairs == ["ab", "ba"] * 4  # 3 untimed rounds and 5 timed ones
    assert settled == log  # each before the next one runs
