"""`sparsec models`, `passes`, `targets` and `kernels`: what there is."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import click

from sparsec.cli.options import PLUGINS, REPORT
from sparsec.errors import SparsecError, UsageError
from sparsec.terminal import listing, print_json


@click.command("models")
@click.argument("name", required=False, metavar="[NAME]")
@click.option("-o", "--output", metavar="MODEL.onnx", help="Write the model NAME.")
@click.option("--data", metavar="FILE.npz", help="Write the demo model's held-out data, with labels.")
@click.option("--count", default=500, show_default=True, type=click.IntRange(1, 100_000), help="Samples of --data.")
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@REPORT
def models_verb(
    name: str | None, output: str | None, data: str | None, count: int, overwrite: bool, as_json: bool, verbose: bool
) -> None:
    """List model builders; write one; write the demo's held-out data."""
    from sparsec.models import BUILDERS, build, write_data
    from sparsec.staging import check_output, staged_file
    from sparsec.targets import suggest

    if name is not None and name not in BUILDERS:
        name = name.replace("-", "_")
    if name is not None and name not in BUILDERS:
        raise UsageError(f"unknown model {name!r}{suggest(name, list(BUILDERS))}", "models")
    if name is None and output is not None:
        raise UsageError(f"give the model's NAME too: {', '.join(BUILDERS)}", "-o")
    if name is not None and output is None and data is None:
        raise UsageError("give -o MODEL.onnx to write it", f"models {name}")
    if data is not None and name not in (None, "demo"):
        raise UsageError("only the demo model has data", "--data")
    if data is not None:
        check_output(Path(data), overwrite)
    written = {}
    if name is not None and output is not None:
        with staged_file(Path(output), overwrite) as stage:
            stage.write_bytes(build(name).SerializeToString(deterministic=True))
        written["model"] = output
    if data is not None:
        with staged_file(Path(data), overwrite) as stage:
            write_data(stage, count)
        written["data"] = data
    if not written:
        rows = [
            {"name": b.name, "input": list(b.input_shape), "summary": b.summary, "options": b.options}
            for b in BUILDERS.values()
        ]
        table = rows if as_json else [{**row, "input": "x".join(map(str, row["input"]))} for row in rows]
        listing("models", table, as_json, ("name", "input", "summary"))
    elif as_json:
        print_json(written)
    else:
        for path in written.values():
            click.echo(f"{path}  {os.path.getsize(path):,} B")


@click.command("passes")
@PLUGINS
@REPORT
def passes_verb(plugins: tuple[str, ...], as_json: bool, verbose: bool) -> None:
    """Known passes with their options and defaults."""
    from sparsec.rewriting.pass_registry import describe_passes

    listing("passes", describe_passes(plugins), as_json, ("name", "summary", "options", "origin"))


@click.command("targets")
@REPORT
def targets_verb(as_json: bool, verbose: bool) -> None:
    """Known targets with their CPUs; the first CPU and system is the default."""
    from sparsec.targets import cpu_names, host_cpu, table

    rows = []
    for name, stanza in table()["target"].items():
        cpus = cpu_names(name)
        if name == "host":
            with contextlib.suppress(SparsecError):
                own = host_cpu()
                cpus = [own, *(cpu for cpu in cpus if cpu != own)]
        row = {"name": name, "description": stanza["description"], "cpus": cpus}
        rows.append({**row, "os": list(stanza["os"]), "runtime": stanza["runtime"]})
    table_rows = rows if as_json else [{**r, "cpus": " ".join(r["cpus"]), "os": " ".join(r["os"])} for r in rows]
    listing("targets", table_rows, as_json, ("name", "description", "cpus", "os", "runtime"))


@click.command("kernels")
@REPORT
def kernels_verb(as_json: bool, verbose: bool) -> None:
    """Kernel families and their variants."""
    from sparsec.kernels import tables

    columns = ("name", "op", "format", "dtype", "text")
    listing("kernels", [{key: getattr(row, key) for key in columns} for row in tables()], as_json, columns)
