"""Random valid graphs against ONNX Runtime, with random passes in between. `python -m fuzz.graphs --graphs N`

A graph has 1 to 8 operators (`elementwise`, `layers`, `moves`, `quantized`) over values of rank 0 to 5 (`draft`) of one
family: float32, float16, float64, whole numbers, or quantized; every operator's shape rule is applied here, so that graphs
are valid by construction (and checked by loading). Several graphs are parts of one model (`models`), which shares one code
generation: they do not touch each other. What results may differ by: `compare`. A failing model is shrunk by hypothesis to
the graph and the nodes that matter.
"""

from __future__ import annotations

import math
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
from hypothesis import HealthCheck, Phase, given, seed, settings

from fuzz.graphs.compare import Mismatch, compare
from fuzz.graphs.models import Drawn, models

__all__ = ["Mismatch", "compare", "draw", "models", "run"]


def run(
    graphs: int, start: int, together: int = 8, shrink: bool = True, keep: Path | None = None, examples: int = 5,
    seconds: float = math.inf, counts: Counter[str] | None = None,
) -> Counter[str]:  # fmt: skip
    """At least `graphs` graphs, or `seconds`. Raises what failed, shrunk; the last failing model is written to `keep`."""
    counts = Counter() if counts is None else counts
    end = time.monotonic() + seconds
    while counts["graphs"] < graphs and time.monotonic() < end:
        batch(start, counts, together, shrink, keep, examples)
        start += 1
    return counts


def batch(
    start: int,
    counts: Counter[str],
    together: int = 8,
    shrink: bool = True,
    keep: Path | None = None,
    examples: int = 5,
) -> None:
    """The models of one seed."""

    def check(drawn: Drawn) -> None:
        name = f"graphs-{start}"
        if keep is not None:  # before: what ends the process leaves no trace
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{name}.onnx").write_bytes(drawn.model.SerializeToString())
            (keep / f"{name}.txt").write_text(f"passes {drawn.passes}\n")
        try:
            compare(drawn.model, drawn.passes, counts)
        except Exception:
            if keep is not None:
                text = f"passes {drawn.passes}\n{onnx.printer.to_text(drawn.model)}\n{traceback.format_exc()}"
                (keep / f"{name}.txt").write_text(text)
            raise
        if keep is not None:
            for kind in ("onnx", "txt"):
                (keep / f"{name}.{kind}").unlink()
        counts["graphs"] += drawn.graphs
        counts["models"] += 1
        counts["nodes"] += len(drawn.model.graph.node)

    _each(check, start, together, shrink, examples)


def draw(graphs: int, start: int, together: int = 8) -> Counter[str]:
    """What `graphs` graphs consist of, without computing anything."""
    facts: Counter[str] = Counter()

    def count(drawn: Drawn) -> None:
        facts.update(drawn.facts)
        facts.update(f"pass {name.partition(':')[0]}" for name in drawn.passes)
        facts["graphs"] += drawn.graphs

    while facts["graphs"] < graphs:
        _each(count, start, together, False, 20)
        start += 1
    return facts


def _each(check: Callable[[Drawn], None], start: int, together: int, shrink: bool, examples: int) -> None:
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)

    @seed(start)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=phases, suppress_health_check=list(HealthCheck)
    )
    @given(models(together))
    def one(drawn: Drawn) -> None:
        check(drawn)

    one()
