"""Two threads against one, in turns; ONNX Runtime's own ratio beside ours."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.engines import ENGINES, Worker
from bench.models import Missing, find_case, prepare
from bench.turns import Say, Spread, cpus, ratio, take_turns
from sparsec.errors import SparsecError

CASES = ("mbv1-dense", "mbv1-80-4x1")
COUNTS = (1, 2)


def measure(rounds: int, say: Say, tuning: Path | None = None, names: Sequence[str] = CASES) -> dict[str, Any]:
    """For each case and engine: milliseconds with 1 and 2 threads, and the ratio."""
    if len(cpus(COUNTS[-1])) < COUNTS[-1]:
        return {"missing": "this process may use one CPU only"}
    found: dict[str, Any] = {}
    for name in names:
        say(f"threads: {name}")
        try:
            found[name] = _measure_case(name, rounds, tuning)
        except (Missing, SparsecError) as error:
            found[name] = {"missing": str(error)}
    return found


def _measure_case(name: str, rounds: int, tuning: Path | None) -> dict[str, Any]:
    made = prepare(find_case(name), tuning)
    engines = [engine for engine in ENGINES if engine.name in ("sparsec", "ort")]
    with contextlib.ExitStack() as stack:
        workers = {
            (engine.name, count): stack.enter_context(Worker(engine, made, cpus(count), count))
            for engine in engines
            for count in COUNTS
        }
        times = take_turns({f"{engine} {count}": worker.run for (engine, count), worker in workers.items()}, rounds)
    return {
        engine.name: {
            **{f"ms_{count}": Spread.of([1e3 * s for s in times[f"{engine.name} {count}"]]).json() for count in COUNTS},
            "scaling": ratio(times[f"{engine.name} 1"], times[f"{engine.name} 2"]).json(),
        }
        for engine in engines
    }
