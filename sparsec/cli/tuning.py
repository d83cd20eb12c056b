"""`sparsec tune`: choices measured on this machine, kept in a file that `compile --tuning` reads."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from sparsec.cli.options import REPORT, SHAPES, Fixed, only_for_models
from sparsec.errors import UsageError
from sparsec.terminal import note, print_json, progress, stdout


@click.command("tune")
@click.argument("path", metavar="ARTIFACT|MODEL.onnx")
@click.option("--target", metavar="NAME", help="Only host: kernels are measured where this runs.  [default: host]")
@click.option("--cpu", metavar="NAME", help="The CPU to compile for; see `sparsec targets`.")
@click.option("--cache", metavar="FILE", help="Where choices are kept.  [default: a file for this CPU]")
@click.option("--time-limit", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Stop then.")
@click.option("--again", is_flag=True, help="Measure layers too that the file has already.")
@SHAPES
@REPORT
def tune_verb(
    path: str, target: str | None, cpu: str | None, cache: str | None, time_limit: float | None, again: bool,
    fixed: Fixed, as_json: bool, verbose: bool,
) -> None:  # fmt: skip
    """Measure candidate kernels on this machine, one thread; `compile --tuning FILE` then uses the fastest."""
    from sparsec.targets import find_target

    if find_target(target or "host", cpu).name != "host":
        raise UsageError(f"{target!r} cannot be measured here; only host can", "--target")
    model: Any = path
    if Path(path).is_dir():
        from sparsec.artifact import load

        only_for_models(fixed)
        model = load(path)
    from sparsec.tuner import print_tuned, tune

    start, notes = time.perf_counter(), list[str]()
    with progress() as say:
        result = tune(model, cpu, cache, time_limit, again, fixed.shapes, fixed.bind, notes, say, fixed.limits)
    for text in notes:
        note(text)
    if result.skipped:
        note(f"not measured for lack of time: {', '.join(result.skipped)}; run it again to go on")
    if as_json:
        print_json({**result.json(), "seconds": round(time.perf_counter() - start, 3)})
    else:
        print_tuned(result, stdout(), verbose)
