"""Races of candidates, and what they say of the predictions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from measured_chain import entry, prices_of, pruned

from sparsec import measure, tuner
from sparsec.targets import Target


class Runner:
    """A trial whose times are `times`, over and over."""

    def __init__(self, name: str, times: Sequence[float], log: list[str]) -> None:
        self.samples: list[float] = []
        self._name, self._times, self._log = name, times, log

    def run(self) -> None:
        self.samples.append(1e9)  # the warm-up must not count

    def sample(self) -> None:
        self._log.append(self._name)
        self.samples.append(self._times[len(self.samples) % len(self._times)])

    @property
    def us(self) -> float:
        return float(np.median(self.samples))


def test_the_hopeless_retire_and_a_clear_winner_ends_the_race() -> None:
    log: list[str] = []
    slow, good, close = Runner("s", [9.0], log), Runner("g", [1.0, 1.01, 1.02], log), Runner("c", [1.2, 1.21], log)
    measure.race([slow, good, close], seconds=60)  # type: ignore[list-item]
    assert (len(slow.samples), len(good.samples), len(close.samples)) == (5, 15, 15)
    assert log[:6] == ["s", "g", "c", "c", "g", "s"]
    assert good.us == 1.01


def test_equals_race_to_the_end() -> None:
    log: list[str] = []
    a, b = Runner("a", [1.0, 2.0, 3.0], log), Runner("b", [2.0, 1.0, 3.0], log)
    measure.race([a, b], seconds=60, most=21)  # type: ignore[list-item]
    assert len(a.samples) == len(b.samples) == 21


def test_time_ends_a_race_after_three_rounds() -> None:
    a, b = Runner("a", [1.0], []), Runner("b", [1.0], [])
    measure.race([a, b], seconds=0)  # type: ignore[list-item]
    assert len(a.samples) == len(b.samples) == 3


def test_times_grow_with_the_work(host: Target) -> None:
    def us(channels: int) -> float:
        prices = prices_of(host, pruned((channels, channels, 1, 1), 1.0, 4, 1), side=14)
        trials = tuner.make_trials(prices, host, tuner.shortlist(prices)[:1])
        measure.race(trials, seconds=1)
        return min(trials[0].samples)

    small, large = us(64), us(256)  # 16 times the multiplications
    assert 4 * small < large < 100 * small


def test_summary_of_a_model_that_is_off_by_a_factor() -> None:
    found = tuner.summary([entry((1, 2), (2, 4), (3, 6)), entry((5, 10))])
    assert found == {
        "layers": 2, "candidates": 4, "ratio": 2.0, "spread": 1.0, "rank_correlation": 1.0, "regret": 1.0,
    }  # fmt: skip


def test_summary_of_a_model_that_ranks_backwards() -> None:
    found = tuner.summary([entry((1, 4), (2, 2), (4, 1))])
    assert found["rank_correlation"] == -1.0
    assert found["regret"] == 4.0
    assert found["ratio"] == 1.0
    assert found["spread"] == pytest.approx(np.exp(np.std(np.log([4, 1, 0.25]))), abs=1e-4)


def test_equal_values_share_a_rank() -> None:
    assert tuner._ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
