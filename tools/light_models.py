"""The light models of `onnx.backend.test` (AlexNet ... VGG-19) against sparsec as a backend, one process a model.

    python tools/light_models.py [--models squeezenet vgg19 ...]

Each twice: by ONNX's own test (equal weights, its input and its expected output), and with drawn weights against ONNX
Runtime within the tolerance derived from the model. Exit code 1 if one fails.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from backend import light  # noqa: E402

COLUMNS = ("model", "ONNX's test", "drawn weights: error", "tolerance", "CPU s", "peak MB", "")


def check(name: str) -> list[str]:
    """A row of the table."""
    from sparsec.backend import Backend
    from sparsec.loading.load import load_model
    from sparsec.proving.parity import errors
    from sparsec.proving.tolerance import derive_tolerance
    from sparsec.runtimes.ort import OrtSession

    started = time.process_time()
    try:
        light.run(name)
        suite = "pass"
    except Exception as error:  # whatever it is, it is ours
        suite = f"{type(error).__name__}: {' '.join(str(error).split())}"
    model = light.drawn(name)
    (value,) = model.graph.input
    feeds = {
        value.name: np.random.default_rng(1).random([d.dim_value for d in value.type.tensor_type.shape.dim], np.float32)
    }
    with OrtSession(model.SerializeToString(), where=name) as session:
        expected = session.run(feeds)
    results = Backend.prepare(model, limits=light.LIMITS).run(feeds)
    worst = max(errors(a, b)[1] for a, b in zip(results, expected.values(), strict=True))
    allowed = derive_tolerance(load_model(model, limits=light.LIMITS))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    verdict = "ok" if suite == "pass" and worst <= allowed else "FAILED"
    seconds = time.process_time() - started
    return [name, suite, f"{worst:.1e}", f"{allowed:.1e}", f"{seconds:.0f}", str(peak), verdict]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=light.names(), default=light.names())
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("\t".join(check(options.one)))
        return 0
    table, failed = Table(*COLUMNS), 0
    for name in options.models:
        command = [sys.executable, "-W", "ignore", __file__, "--one", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines() if done.returncode == 0 else []
        why = (done.stderr.strip().splitlines() or ["no output"])[-1]
        row = lines[-1].split("\t") if lines else [name, why, *["-"] * 4, "FAILED"]
        failed += row[-1] != "ok"
        print("\t".join(row), file=sys.stderr, flush=True)
        table.add_row(*row)
    Console(width=140).print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
