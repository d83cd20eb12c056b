"""The demonstration behind `make demo`: the small trained model, dense and pruned, compiled, proved and timed.

Nothing is downloaded: the model ships with sparsec and its held-out data are generated. Exit code 1 if any artifact
differs from ONNX Runtime.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import sparsec
from sparsec import models
from sparsec.artifact import Artifact
from sparsec.bench import Timing
from sparsec.errors import RuntimeUnavailable, SparsecError
from sparsec.proving.verify import Verification

VARIANTS = {
    "dense": (),
    "50% 4x1": ("prune:sparsity=0.5,block=4x1",),
    "80% 4x1": ("prune:sparsity=0.8,block=4x1",),
}
TARGETS = ("host", "arm")


@dataclass(frozen=True)
class Row:
    """One artifact and what is known about it; `missing` says why it could not be run."""

    variant: str
    artifact: Artifact
    verification: Verification | None
    timing: Timing | None
    missing: str = ""


def measure(variant: str, target: str, folder: Path, data: Path, runs: int) -> Row:
    """Compile one variant for one target, compare it on `data`, and time it where the time means something."""
    name = variant.replace("% ", "-").replace(" ", "-")
    artifact = sparsec.compile(
        models.build("demo"), target, passes=VARIANTS[variant], output=folder / f"demo-{name}-{target}.sparsec",
        overwrite=True,
    )  # fmt: skip
    try:
        verification = artifact.verify(data=data)
        timing = artifact.bench(runs=runs, against=["ort"]) if verification.runtime == "native" else None
    except RuntimeUnavailable as error:
        return Row(variant, artifact, None, None, str(error))
    return Row(variant, artifact, verification, timing)


def print_rows(rows: list[Row], samples: int, console: Console) -> None:
    """The table that the demonstration ends in."""
    table = Table(title=f"the demo model, {samples} held-out samples, one thread", title_justify="left")
    table.add_column("model")
    table.add_column("target")
    columns = ("layers", "sparsity", "weights + code", "accuracy", "parity error", "median ms", "ONNX Runtime ms")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        totals, size, target = row.artifact.report["totals"], row.artifact.bytes, row.artifact.manifest["target"]
        cells = [row.variant, f"{target['name']} ({target['cpu']})", str(totals["layers"]), f"{totals['zeros']:.1%}"]
        cells.append(f"{(size['weights'] + size['code']) / 1000:.0f} kB")
        if row.verification is None:
            cells += ["not run", "not run", "not run", ""]
        else:
            accuracy = row.verification.accuracy or {"artifact": float("nan")}
            mark = "" if row.verification.passed else " FAILED"
            cells += [f"{accuracy['artifact']:.1%}", f"{row.verification.worst.max_relative_error:.1e}{mark}"]
            if row.timing is None:
                cells += [f"{row.verification.runtime}, not timed", ""]
            else:
                cells += [f"{row.timing.median_ms:.3f}", f"{row.timing.against['ort'].median_ms:.3f}"]
        table.add_row(*map(escape, cells))
    console.print(table)
    for reason in dict.fromkeys(row.missing for row in rows if row.missing):
        console.print(f"not run: {reason}", markup=False, highlight=False)


def main() -> int:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("out"), help="folder for artifacts (default: out)")
    parser.add_argument("--samples", type=int, default=500, help="held-out samples (default: 500)")
    parser.add_argument("--runs", type=int, default=200, help="timed runs (default: 200)")
    options = parser.parse_args()
    progress = Console(stderr=True)
    rows = []
    with tempfile.TemporaryDirectory(prefix="sparsec-demo-") as folder:
        data = Path(folder) / "held-out.npz"
        models.write_data(data, options.samples)
        for target in TARGETS:
            for variant in VARIANTS:
                progress.print(f"demo, {variant}, for {target}", highlight=False)
                rows.append(measure(variant, target, options.output, data, options.runs))
    console = Console() if sys.stdout.isatty() else Console(width=140)
    print_rows(rows, options.samples, console)
    console.print(f"artifacts: {options.output}/demo-*.sparsec", markup=False, highlight=False)
    return 0 if all(row.verification is None or row.verification.passed for row in rows) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SparsecError as error:
        sys.exit(f"error: {error}")
