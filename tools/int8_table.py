"""Quantized models on one thread: our artifacts beside ONNX Runtime, and layers predicted beside measured.

    python tools/int8_table.py mb1_q.onnx mb1s_q.onnx mb1.onnx [--rounds 31] [--layers 12]

Every model is compiled for this machine and opened in both engines; all run in turns (`bench.turns`). Medians, and each
column "over NAME" is ONNX Runtime on that model against the row, round by round. `--layers N`: the N layers of each model that
take longest, instead.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from bench.layers import layer_times
from bench.turns import Burst, pinned, ratio, take_turns
from rich.console import Console
from rich.table import Table

import sparsec
from sparsec.loading.load import load_model
from sparsec.lowering import lower
from sparsec.runtimes.native import Native
from sparsec.targets import find_target

Feed = dict[str, np.ndarray]


def feed_of(session: ort.InferenceSession) -> Feed:
    """Random inputs of a model with float32 inputs."""
    rng = np.random.default_rng(0)
    shapes = {value.name: [n if isinstance(n, int) else 1 for n in value.shape] for value in session.get_inputs()}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def timed(call: Callable[[], object]) -> Burst:
    """Bursts of `call`."""

    def burst(runs: int) -> list[float]:
        call()
        found = []
        for _ in range(runs):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return found

    return burst


def peer(model: Path) -> ort.InferenceSession:
    """ONNX Runtime with every optimization, one thread."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.log_severity_level = 3
    return ort.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])


def compiled(model: Path, folder: Path, cpu: str | None) -> sparsec.Artifact:
    """The artifact of a model, from an earlier run if it is there."""
    output = folder / f"{model.stem}.sparsec"
    return sparsec.load(output) if output.exists() else sparsec.compile(model, "host", cpu=cpu, output=output)


def whole_models(models: list[Path], rounds: int, folder: Path, cpu: str | None) -> Table:
    """Milliseconds of both engines and ratios."""
    bursts: dict[str, Burst] = {}
    keep: list[object] = []
    for model in models:
        session = peer(model)
        feed = feed_of(session)
        ours = Native().open(compiled(model, folder, cpu), 1)
        names = [output.name for output in session.get_outputs()]
        bursts[f"sparsec {model.stem}"] = timed(ours.once(feed))
        bursts[f"ort {model.stem}"] = timed(lambda s=session, n=names, f=feed: s.run(n, f))
        keep += [session, ours]
    with pinned():
        seconds = take_turns(bursts, rounds)
    peers = [name for name in bursts if name.startswith("ort ")]
    table = Table("", "ms", *(f"over {name}" for name in peers))
    for name, found in seconds.items():
        ratios = [ratio(seconds[other], found) for other in peers]
        cells = [f"{r.median:.2f} ({r.p10:.2f}-{r.p90:.2f})" for r in ratios]
        table.add_row(name, f"{1e3 * float(np.median(found)):.3f}", *cells)
    return table


def layers(model: Path, rounds: int, most: int, cpu: str | None) -> Table:
    """The layers that take longest, and the sum of all."""
    feed = feed_of(peer(model))
    rows = layer_times(lower(load_model(model), find_target("host", cpu), model.stem), feed, rounds)
    table = Table("layer", "kernel", "shape", "predicted us", "measured us", "measured / predicted", title=model.name)
    for row in sorted(rows, key=lambda row: -row["measured_us"])[:most]:
        share = row["measured_us"] / max(row["predicted_us"], 1e-3)
        shape = "x".join(map(str, row["shape"]))
        kernel = row["kernel"].rpartition("_")[0]
        table.add_row(
            row["name"][-24:], kernel, shape, f"{row['predicted_us']:.1f}", f"{row['measured_us']:.1f}", f"{share:.2f}"
        )
    total = [sum(row[key] for row in rows) for key in ("predicted_us", "measured_us")]
    table.add_row("all", "", "", f"{total[0]:.0f}", f"{total[1]:.0f}", f"{total[1] / total[0]:.2f}")
    return table


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--cpu")
    parser.add_argument("--keep", type=Path, help="folder of artifacts, which the next run takes as they are")
    options = parser.parse_args()
    console = Console(width=200 if not sys.stdout.isatty() else None)
    if options.layers:
        for model in options.models:
            console.print(layers(model, options.rounds, options.layers, options.cpu))
        return
    with tempfile.TemporaryDirectory() as folder:
        console.print(whole_models(options.models, options.rounds, options.keep or Path(folder), options.cpu))


if __name__ == "__main__":
    main()
