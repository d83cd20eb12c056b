"""Measuring in turns: every round, each engine runs a short burst; ratios are taken inside a round.

Clock changes and other load then hit all engines alike, and the spread over rounds says how far a figure can be trusted.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ROUNDS = 31
BURST_SECONDS = 0.03
MAX_BURST = 20

Burst = Callable[[int], list[float]]  # runs -> seconds of each, one untimed run before
Say = Callable[[str], None]


@dataclass(frozen=True)
class Spread:
    """Median and 10th and 90th percentile over rounds."""

    median: float
    p10: float
    p90: float
    rounds: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of one value a round."""
        p10, median, p90 = np.percentile(np.asarray(values, np.float64), [10, 50, 90])
        return Spread(float(median), float(p10), float(p90), len(values))

    def json(self) -> dict[str, Any]:
        """Rounded to six digits."""
        return {
            "median": float(f"{self.median:.6g}"), "p10": float(f"{self.p10:.6g}"), "p90": float(f"{self.p90:.6g}"),
            "rounds": self.rounds,
        }  # fmt: skip


def take_turns(
    bursts: Mapping[str, Burst], rounds: int = ROUNDS, seconds: float = BURST_SECONDS
) -> dict[str, list[float]]:
    """For each name the median seconds of every round. The order rotates, so that nobody always follows the same one."""
    names = list(bursts)
    runs = {}
    for name in names:
        first = min(bursts[name](3))
        runs[name] = max(1, min(MAX_BURST, int(seconds / max(first, 1e-9))))
    medians: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            medians[name].append(float(np.median(bursts[name](runs[name]))))
    return medians


def ratio(reference: Sequence[float], own: Sequence[float]) -> Spread:
    """How many times faster `own` is than `reference`, round by round."""
    return Spread.of([a / b for a, b in zip(reference, own, strict=True)])


def cpus(count: int) -> list[int]:
    """The last `count` CPUs this process may use: the first ones serve interrupts and whoever started us."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return allowed[-count:]


@contextlib.contextmanager
def pinned(count: int = 1) -> Iterator[None]:
    """This thread on the last `count` CPUs while the block runs; where the system cannot, nothing happens."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus(count))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
