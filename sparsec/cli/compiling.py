"""`sparsec compile` and `sparsec rewrite`: what makes an artifact or a model out of a model."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsec.cli.curves import budget_table, show_fronts, show_points
from sparsec.cli.options import MACHINE, REPORT, REWRITE, SHAPES, Fixed, Machine, Rewriting
from sparsec.terminal import note, print_json, progress, stdout

if TYPE_CHECKING:
    from sparsec.artifact import Artifact
    from sparsec.limits import Limits


@click.command("compile")
@click.argument("model", metavar="MODEL.onnx")
@MACHINE
@click.option("-o", "--output", default=".", metavar="PATH", help="NAME.sparsec, or the folder for it.  [default: .]")
@click.option("--overwrite", is_flag=True, help="Replace an existing artifact.")
@REWRITE
@SHAPES
@click.option(
    "--threads", default=1, show_default=True, metavar="N", help="The artifact's default; run time may differ."
)
@click.option("--embed-weights", is_flag=True, help="Put the weights into the code instead of weights.bin.")
@click.option(
    "--io",
    type=click.Choice(["float", "quantized"]),
    default="float",
    show_default=True,
    help="Inputs and outputs: as the model has them, or in 8 bits where it quantizes them.",
)
@click.option("--tuning", metavar="FILE", help="Measured choices, of `sparsec tune`, before predicted ones.")
@click.option(
    "--budget", metavar="PROMISE", help="accuracy=1% or speedup=2x: choose the pruning (needs --calibration)."
)
@click.option("--budget-data", metavar="DATA", help="Measures the drop, instead of a part of the calibration data.")
@REPORT
def compile_verb(
    model: str, machine: Machine, output: str, overwrite: bool, rewriting: Rewriting, fixed: Fixed, threads: int,
    embed_weights: bool, io: str, tuning: str | None, budget: str | None, budget_data: str | None, as_json: bool, verbose: bool,
) -> None:  # fmt: skip
    """An ONNX model into an artifact for one target."""
    _early(model, output, overwrite, machine, fixed.limits)
    from sparsec.budget import BudgetMissed
    from sparsec.compiler import compile

    start = time.perf_counter()
    try:
        with progress() as say:
            artifact = compile(
                model, **machine.arguments, **rewriting.arguments, **fixed.arguments, output=output,
                overwrite=overwrite, threads=threads, embed_weights=embed_weights, io=io, tuning=tuning, budget=budget,
                budget_data=budget_data, progress=say,
            )  # fmt: skip
    except BudgetMissed as missed:
        show_points(missed.points)
        raise
    show_fronts(artifact.manifest["passes"])
    seconds = time.perf_counter() - start
    for text in artifact.manifest["notes"]:
        note(text)
    if as_json:
        print_json(_compiled_json(artifact, seconds))
    else:
        _print_compiled(artifact, seconds, verbose)


def _early(model: str, output: str, overwrite: bool, machine: Machine, limits: Limits) -> None:
    """The cheap mistakes, said before TVM is imported; the process that reads the model starts meanwhile."""
    from sparsec.artifact import artifact_path
    from sparsec.loading import isolation
    from sparsec.manifest import SUFFIX
    from sparsec.staging import check_output

    if machine.target is not None or machine.precision is not None:
        machine.find()
    if os.path.isfile(model):
        check_output(artifact_path(output, Path(model).name.removesuffix(".onnx").removesuffix(SUFFIX)), overwrite)
        if limits.isolate and isolation.available():
            isolation.start("sparsec.loading.load")


def _compiled_json(artifact: Artifact, seconds: float) -> dict[str, Any]:
    manifest = artifact.manifest
    budgets = [record["budget"] for record in manifest["passes"] if "budget" in record]
    return {
        "artifact": str(artifact.path),
        "target": manifest["target"]["name"],
        "cpu": manifest["target"]["cpu"],
        "precision": manifest["target"]["precision"],
        "bytes": artifact.bytes,
        "layers": artifact.report["layers"],
        "passes": manifest["passes"],
        "parity": _parity_json(manifest),
        "notes": manifest["notes"],
        "seconds": round(seconds, 3),
        **({"budget": budgets[0]} if budgets else {}),
    }


def _parity_json(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """`{passed, max_relative_error, tolerance}` of the output nearest to its tolerance; null if it was not run."""
    record = manifest["parity"]
    if record is None:
        return None
    worst = max(record["outputs"], key=lambda p: p["max_relative_error"] or 0.0)
    keys = ("max_relative_error", "tolerance")
    return {"passed": record["passed"], **{key: worst[key] for key in keys}, "runtime": record["runtime"]}


def _print_compiled(artifact: Artifact, seconds: float, verbose: bool) -> None:
    from sparsec.inspection import inspect_artifact, print_report

    if verbose:
        print_report(inspect_artifact(artifact), stdout(), verbose=True)
    target, size, totals = artifact.manifest["target"], artifact.bytes, artifact.report["totals"]
    click.echo(f"{artifact.path}  for {target['name']} ({target['cpu']}, {target['os']}), {seconds:.1f} s")
    click.echo(
        f"  {totals['layers']} layers, {100 * totals['zeros']:.1f}% of the weights are zero;"
        f" {size['weights']:,} B weights + {size['code']:,} B code (floats were {totals['raw_bytes']:,} B)"
    )
    for record in artifact.manifest["passes"]:
        if "budget" in record:
            found, chosen = record["budget"], record["budget"]["chosen"]
            click.echo(
                f"  holds {found['budget']}: {chosen['block']} blocks, {100 * chosen['zeros']:.1f}% zero, drop"
                f" {100 * chosen['drop']:.2f}% on {found['samples']} samples, {chosen['speedup']:.2f}x predicted"
            )
            stdout().print(budget_table(found))
    parity = _parity_json(artifact.manifest)
    if parity is not None:
        error, allowed = parity["max_relative_error"], parity["tolerance"]
        click.echo(f"  equals ONNX Runtime: relative error {error:.3g}, allowed {allowed:.3g} ({parity['runtime']})")


@click.command("rewrite")
@click.argument("model", metavar="MODEL.onnx")
@click.option("-o", "--output", required=True, metavar="OUT.onnx", help="The rewritten model.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@REWRITE
@SHAPES
@REPORT
def rewrite_verb(
    model: str, output: str, overwrite: bool, rewriting: Rewriting, fixed: Fixed, as_json: bool, verbose: bool
) -> None:
    """An ONNX model into an ONNX model."""
    from sparsec.staging import check_output

    start = time.perf_counter()
    check_output(Path(output), overwrite)
    from sparsec.compiler import rewrite
    from sparsec.inspection import count_weights
    from sparsec.loading.saving import save_model

    records: list[dict[str, Any]] = []
    with progress() as say:
        result = rewrite(model, **rewriting.arguments, **fixed.arguments, records=records, progress=say)
    show_fronts(records)
    size = save_model(result, Path(output), overwrite)
    counts = count_weights(result)
    zeros = counts["weight_zeros"] / counts["weights"] if counts["weights"] else 0.0
    seconds = time.perf_counter() - start
    if as_json:
        facts = {"model": output, "bytes": {"onnx": size}, "weights": counts["weights"], "zeros": round(zeros, 6)}
        print_json({**facts, "nodes": len(list(result.graph)), "seconds": round(seconds, 3)})
    else:
        click.echo(f"{output}  {size:,} B, {100 * zeros:.1f}% of the weights are zero, {seconds:.1f} s")
