"""Run the benchmarks: `python tools/bench/run.py --all --out docs/benchmarks` writes every table and plot there.

Parts measured now replace their part in OUT/results.json (with --case: only those models); tables and plots are made
from all of that file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from bench import arm, curves, layers, networks, plots, report, threads
from bench.engines import ENGINES
from bench.models import CASES, Missing
from bench.turns import ROUNDS, cpus
from sparsec.errors import SparsecError

PARTS = ("models", "layers", "curves", "threads", "arm")


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text(errors="replace").splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    packages = ("sparsec", "onnxruntime", "apache-tvm", "numpy")
    versions = {name: metadata.version(name) for name in packages}
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "pinned_to": cpus(1),
        "system": platform.system(),
        "versions": versions,
    }


def measure(options: argparse.Namespace, parts: list[str], console: Console) -> dict[str, Any]:
    """The parts asked for, in an order that keeps the timing ones together."""
    start = time.monotonic()

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - start:6.0f} s  {text}", markup=False, highlight=False)

    cases = [case for case in CASES if not options.case or case.name in options.case]
    engines = [engine for engine in ENGINES if not options.engine or engine.name in options.engine]
    tflite = dict(given.split("=", 1) for given in options.tflite)
    files = {name: Path(path).resolve() for name, path in tflite.items()}
    rounds = options.rounds
    makers = {
        "models": lambda: networks.measure(cases, engines, rounds, say, tflite=files, tuning=options.tuning),
        "layers": lambda: layers.measure(cases, rounds, say),
        "curves": lambda: curves.measure(rounds, say),
        "threads": lambda: threads.measure(rounds, say, options.tuning),
        "arm": lambda: arm.measure(options.icount, say),
    }
    return {part: makers[part]() for part in PARTS if part in parts}


def publish(results: dict[str, Any], out: Path, console: Console) -> None:
    """Tables to the terminal, OUT/results.md and OUT/layers.md, plots beside them."""
    facts = results["machine"]
    head = [
        "# Benchmark results", "",
        f"{facts['cpu']}, {facts['cpus']} CPUs, {facts['system']}; "
        + ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        + ("; sparsec's kernels chosen by `sparsec tune`" if facts["tuned"] else ""),
        "", "Median (10th-90th percentile) over rounds in which all engines take turns. How to reproduce: README.md.", "",
    ]  # fmt: skip
    text = "\n".join(head)
    layers_text = "# The slowest layers of every model\n\nPredicted and measured, one thread; sums are in results.md.\n"
    drawings = {"models": plots.plot_models, "curves": plots.plot_curves}
    for part, grids in report.grids_of(results).items():
        for number, grid in enumerate(grids):
            if part == "layers" and number:
                layers_text += "\n" + grid.markdown()
                continue
            grid.print(console)
            text += "\n" + grid.markdown()
        if part in drawings:
            try:
                drawings[part](results[part], out / f"{part}.svg")
                text += f"\n![{part}]({part}.svg)\n"
            except Missing as error:
                console.print(str(error), markup=False)
    (out / "results.md").write_text(text, encoding="utf-8")
    if "layers" in results:
        (out / "layers.md").write_text(layers_text, encoding="utf-8")


def main() -> int:
    """Exit code 0 if everything asked for ran, whatever the figures say."""
    names, known = [case.name for case in CASES], [engine.name for engine in ENGINES]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="every part")
    parser.add_argument("--part", action="append", default=[], choices=PARTS, help="one part (repeatable)")
    parser.add_argument("--case", action="append", default=[], choices=names, help="only these models (repeatable)")
    parser.add_argument("--engine", action="append", default=[], choices=known, help="only these engines (repeatable)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds of turns (default: {ROUNDS})")
    parser.add_argument("--tflite", action="append", default=[], metavar="CASE=FILE", help="a .tflite of your own")
    parser.add_argument("--tuning", type=Path, metavar="FILE", help="choices of `sparsec tune` for sparsec's artifacts")
    parser.add_argument("--icount", default=os.environ.get("SPARSEC_ICOUNT", ""), metavar="COMMAND",
                        help="command that runs an aarch64 program and prints its instruction counts")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="folder (default: out/benchmarks)")
    options = parser.parse_args()
    wrong = [given for given in options.tflite if given.partition("=")[0] not in names or "=" not in given]
    if wrong:
        parser.error(f"--tflite takes CASE=FILE with a case of {', '.join(names)}; got {wrong[0]!r}")
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    parts = list(PARTS) if options.all else options.part
    if not parts:
        parser.error("give --all or --part")
    console = Console(width=None if sys.stdout.isatty() else 260)
    options.out.mkdir(parents=True, exist_ok=True)
    stored = options.out / "results.json"
    results: dict[str, Any] = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    for part, found in measure(options, parts, Console(stderr=True)).items():
        kept = results.get(part, {}) if options.case and part in ("models", "layers") else {}
        results[part] = {**kept, **found}
    results["machine"] = {**machine(), "tuned": options.tuning is not None}
    stored.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    publish(results, options.out, console)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SparsecError as error:
        sys.exit(f"error: {error}")
