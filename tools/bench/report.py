"""Results as Markdown tables: once for docs/benchmarks, and the same rows through rich on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.engines import ENGINES
from bench.goals import Results, verdicts
from bench.models import CASES, Case
from bench.networks import REFERENCE
from bench.turns import Spread

TITLES = {REFERENCE: "ONNX Runtime, dense", **{engine.name: engine.title for engine in ENGINES}}


@dataclass(frozen=True)
class Grid:
    """One table: the first column is text, the others are numbers or short words. `notes` stand below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """As a Markdown section."""
        lines = [f"## {self.title}", "", "| " + " | ".join(self.columns) + " |"]
        lines += ["|" + " --- |" + " ---: |" * (len(self.columns) - 1)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows]
        lines += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"

    def print(self, console: Console) -> None:
        """On a terminal."""
        table = Table(title=self.title, title_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(escape(column), justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for note in self.notes:
            console.print(f"  {note}", markup=False, highlight=False)


def spread(stored: Mapping[str, Any], digits: int = 2) -> str:
    """`1.23 (1.20-1.27)`: median, 10th and 90th percentile."""
    return f"{stored['median']:.{digits}f} ({stored['p10']:.{digits}f}-{stored['p90']:.{digits}f})"


def goal_grid(results: Results) -> Grid:
    """Every goal, what was measured, and whether it is met."""
    rows = []
    for verdict in verdicts(results):
        goal, figure = verdict.goal, verdict.figure
        bar = f"{'<=' if goal.at_most else '>='} {goal.bar:g}{goal.unit}"
        shown = ""
        if isinstance(figure, Spread):
            shown = f"{figure.median:.3g}{goal.unit}"
            if figure.p10 != figure.p90:
                shown += f" ({figure.p10:.3g}-{figure.p90:.3g})"
        rows.append((goal.what, bar, shown, verdict.text))
    return Grid("Goals", ("what", "bar", "measured", "verdict"), tuple(rows))


def _measured_cases(models: Mapping[str, Any]) -> Iterator[tuple[Case, Mapping[str, Any]]]:
    for case in CASES:
        if case.name in models:
            yield case, models[case.name]


def model_grids(models: Mapping[str, Any]) -> list[Grid]:
    """Milliseconds and speed-up by case and engine, then memory and predicted time."""
    names = [e.name for e in ENGINES]
    times, ratios, memory, notes = [], [], [], []
    for case, row in _measured_cases(models):
        title = f"{case.title}, {case.state}"
        if "missing" in row:
            notes.append(f"{title}: {row['missing']}")
            continue
        found = row["engines"]
        for name, facts in found.items():
            if "missing" in facts:
                notes.append(f"{title}, {TITLES[name]}: {facts['missing']}")
        have = {name: facts for name, facts in found.items() if "missing" not in facts}
        times.append((title, *(spread(have[n]["ms"]) if n in have else "-" for n in names)))
        ratios.append((title, *(spread(have[n]["speedup"]) if "speedup" in have.get(n, {}) else "-" for n in names)))
        sizes = [have[n]["growth_bytes"] if n in have else None for n in names]
        own = row.get("memory", {}).get("total")
        memory.append((title, f"{own / 1e6:.1f}" if own else "-", *(f"{b / 1e6:.1f}" if b else "-" for b in sizes)))
    columns = tuple(TITLES[name] for name in names)
    labels = [f"{engine.title}: {engine.label}" for engine in ENGINES if engine.label]
    return [
        Grid(
            "Speed-up over ONNX Runtime on the dense model", ("model", *columns), tuple(ratios), tuple(labels + notes)
        ),
        Grid("Milliseconds of one inference, one thread", ("model", *columns), tuple(times)),
        Grid(
            "Memory, MB: what sparsec plans (arena, scratch, weights), then growth of each process from load to first runs",
            ("model", "planned", *columns),
            tuple(memory),
        ),
    ]


def layer_grids(layers: Mapping[str, Any], largest: int = 12) -> list[Grid]:
    """Sums of all models, then the slowest layers of each."""
    sums: list[tuple[str, ...]] = []
    grids = []
    for case, row in _measured_cases(layers):
        title = f"{case.title}, {case.state}"
        if "missing" in row:
            sums.append((title, "-", "-", "-", row["missing"]))
            continue
        numbers = (row["predicted_us"], row["measured_us"], row["predicted_us"] / row["measured_us"])
        sums.append((title, *(f"{n:.2f}" if n < 10 else f"{n:.0f}" for n in numbers), f"{row['generic_share']:.1%}"))
        ordered = sorted(row["layers"], key=lambda layer: -layer["measured_us"])[:largest]
        cells = tuple(
            (
                layer["name"][-48:], layer["op"][:24], layer["kernel"].rsplit("_", 1)[0],
                f"{layer['predicted_us']:.1f}", f"{layer['measured_us']:.1f}",
                f"{layer['predicted_us'] / layer['measured_us']:.2f}",
            )
            for layer in ordered
        )  # fmt: skip
        columns = ("layer", "operators", "kernel", "predicted us", "measured us", "ratio")
        grids.append(Grid(f"Slowest layers of {title}", columns, cells))
    head = ("model", "predicted us", "measured us", "ratio", "generic route")
    return [Grid("Predicted against measured, layers called one by one", head, tuple(sums)), *grids]


def curve_grids(curves: Mapping[str, Any]) -> list[Grid]:
    """Break-even of every shape and block, then times by density."""
    even, grids = [], []
    for shape, found in curves.items():
        base = f"dense {spread(found['dense']['us'], 0)} us, ONNX Runtime dense {spread(found['ort']['us'], 0)} us"
        points = next(iter(found["blocks"].values()))["points"]
        columns = ("block", *(f"density {p['density']:g}" for p in points))
        rows = []
        for block, facts in found["blocks"].items():
            shares = {p["density"]: f"{100 * p['ideal_share']['median']:.0f}%" for p in facts["points"]}
            predicted = facts["predicted_break_even"]
            even.append(
                (
                    f"{shape}, {block}",
                    f"{facts['break_even']:.2f}",
                    f"{predicted:.2f}",
                    *(shares[d] for d in (0.5, 0.2, 0.1)),
                )
            )
            rows.append((block, *(f"{spread(p['us'], 0)} / {p['predicted_us']:.0f}" for p in facts["points"])))
        grids.append(Grid(f"{shape}: microseconds measured / predicted", columns, tuple(rows), (base,)))
    head = ("layer, block", "break-even", "predicted", "of ideal at 0.5", "at 0.2", "at 0.1")
    text = "break-even: density at which the sparse kernel takes as long as our dense one; 1 means it never does"
    return [Grid("Break-even densities", head, tuple(even), (text,)), *grids]


def thread_grid(threads: Mapping[str, Any]) -> Grid:
    """Scaling from one to two threads."""
    rows, notes = [], []
    for name, found in threads.items():
        if isinstance(found, str) or "missing" in found:
            notes.append(f"{name}: {found if isinstance(found, str) else found['missing']}")
            continue
        for engine, facts in found.items():
            cells = (spread(facts["ms_1"]), spread(facts["ms_2"]), spread(facts["scaling"]))
            rows.append((f"{name}, {TITLES[engine]}", *cells))
    return Grid("Threads", ("model, engine", "1 thread, ms", "2 threads, ms", "ratio"), tuple(rows), tuple(notes))


def arm_grids(arm: Mapping[str, Any]) -> list[Grid]:
    """Instructions beside the peers', then the hot loops."""
    rows, notes = [], []
    counted = arm["instructions"]
    if "missing" in counted:
        notes.append(f"sparsec: {counted['missing']}")
    for key, facts in counted.items():
        if not isinstance(facts, Mapping):
            continue
        if "missing" in facts:
            notes.append(f"{key}: {facts['missing']}")
            continue
        numbers = (facts[k] / 1e6 for k in ("insns", "fma", "load", "store"))
        rows.append((f"sparsec, {key}", *(f"{n:.1f}" for n in numbers)))
    rows += [
        (peer["engine"], f"{peer['insns'] / 1e6:.1f}", f"{peer['fma'] / 1e6:.1f}", "", "") for peer in arm["peers"]
    ]
    columns = ("MobileNetV1-224", "instructions, M", "multiply-adds, M", "loads, M", "stores, M")
    grids = [Grid("Arm: instructions of one inference", columns, tuple(rows), tuple(notes))]
    cycles = arm["cycles"]
    if "missing" in cycles:
        return [*grids, Grid("Arm: hot loops", ("kernel",), (), (cycles["missing"],))]
    for key, found in cycles["cases"].items():
        title = f"Arm: hot loops of {key} by llvm-mca {cycles['llvm']}"
        if "missing" in found:
            grids.append(Grid(title, ("kernel",), (), (found["missing"],)))
            continue
        cells = tuple(
            (
                row["kernel"].rsplit("_", 1)[0], row["first_layer"], str(row["layers"]), str(row["instructions"]),
                str(row["fmas"]), f"{row['cycles_per_fma']:.2f}", f"{row['share_of_peak']:.0%}",
            )
            for row in found["loops"]
        )  # fmt: skip
        head = ("kernel", "first layer", "layers", "instructions", "multiply-adds", "cycles each", "of peak")
        mean = f"mean over all layers by predicted time: {found['mean_share_of_peak']:.0%} of the peak,"
        mean += f" which is {found['peak_cycles_per_fma']:g} cycles a multiply-add in llvm-mca's model of this CPU"
        grids.append(Grid(title, head, cells, (mean,)))
    return grids


def grids_of(results: Results) -> dict[str, Sequence[Grid]]:
    """Tables by file name without ending."""
    found: dict[str, Sequence[Grid]] = {"goals": [goal_grid(results)]}
    makers: dict[str, Callable[[Mapping[str, Any]], Sequence[Grid]]]
    makers = {"models": model_grids, "layers": layer_grids, "curves": curve_grids, "arm": arm_grids}
    found |= {part: make(results[part]) for part, make in makers.items() if part in results}
    if "threads" in results:
        found["threads"] = [thread_grid(results["threads"])]
    return found
