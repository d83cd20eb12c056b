"""`sparsec tune`: measure candidate kernels of each weighted layer on this machine and keep the fastest in a tuning file.

The model is lowered once, with a recorder in the place of measured choices. Of each distinct layer the best tilings of
each format, by the cost model, are compiled into one library and timed in turns on one thread; the layer's own weights
decide the pattern, its bias and epilogue are left plain, as they cost all candidates the same.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsec import measure, tuning
from sparsec.artifact import Artifact
from sparsec.building.build import cache_folder
from sparsec.errors import CheckError, RuntimeUnavailable, TuningError, UsageError
from sparsec.limits import DEFAULT, Limits
from sparsec.loading.load import load_model
from sparsec.lowering import lower
from sparsec.lowering.prices import Prices, Way
from sparsec.program import Kernel
from sparsec.targets import Target, find_target, host_model, missing_features
from sparsec.tuning import Entry, Measured, Tuning

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[..., None]

TILINGS = 3  # of each format, the best by prediction
WITHIN = 3.0  # times the cheapest prediction: what costs more is not measured, but the best dense one always
TIE = 0.01  # of the fastest time: within it the cost model's favourite is chosen, so that noise does not choose
NAME = 40  # characters of a layer's name in the table
LAYER_SECONDS = 5.0  # at most, without a limit


@dataclass(frozen=True)
class TunedLayer:
    """A distinct layer. `names`: the nodes that share it."""

    names: tuple[str, ...]
    entry: Entry
    reused: bool  # from the file, not measured now


@dataclass(frozen=True)
class Tuned:
    """What `tune` found. `skipped`: nodes that were left for lack of time."""

    path: Path
    model: str
    cpu: str
    layers: tuple[TunedLayer, ...]
    skipped: tuple[str, ...]

    def json(self) -> dict[str, Any]:
        """The object of `tune --json`."""
        return {
            "tuning": str(self.path),
            "model": self.model,
            "cpu": self.cpu,
            "layers": [_layer_json(layer) for layer in self.layers],
            "skipped": list(self.skipped),
            "summary": summary([layer.entry for layer in self.layers]),
        }


class _Recorder:
    """Answers nothing and remembers every question; layers that run alike are one."""

    def __init__(self) -> None:
        self.layers: list[tuple[list[str], Prices]] = []

    def find(self, name: str, prices: Prices) -> Entry | None:
        for names, known in self.layers:
            if tuning.distance(known.facts, prices.facts) <= tuning.ALIKE:
                names.append(name)
                return None
        self.layers.append(([name], prices))
        return None


def tune(
    model: Any,
    cpu: str | None = None,
    cache: str | Path | None = None,
    time_limit: float | None = None,
    again: bool = False,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    bind: Mapping[str, Any] | None = None,
    notes: list[str] | None = None,
    progress: Progress | None = None,
    limits: Limits = DEFAULT,
) -> Tuned:
    """Measure the convolutions and products of a model, or of an `Artifact`, and keep the choices in the file `cache`.

    model: as for `compile`. cpu: compile for this stanza of the target host (default: this machine's, or the
    artifact's). cache: a file of before is extended; default: one for this CPU in the user's cache folder. time_limit:
    seconds; layers that are left then are named in `skipped`. again: measure layers that the file has already. notes: a
    list to which is added what the user should know. progress: called with a text, or a text, a number and a total.
    limits: what the model may cost to read.
    Raises a `SparsecError`; what was measured until then is in the file.
    """
    say = progress or (lambda what, done=None, total=None: None)
    notes = [] if notes is None else notes
    if time_limit is not None and not 0 < time_limit < float("inf"):
        raise UsageError(f"expected seconds above 0, got {time_limit}", "--time-limit")
    source, target = _source(model, cpu)
    path = Path(cache) if cache is not None else default_path(target)
    known = _known(path, target, notes)
    say("lowering")
    recorder = _Recorder()
    lower(load_model(source, shapes, bind, notes, limits), target, "model", recorder)
    wanted = [layer for layer in recorder.layers if again or known.nearest(layer[1].facts) is None]
    wanted.sort(key=lambda layer: -len(layer[0]) * layer[1].cheapest.predicted_us)  # in case time runs out
    end = time.perf_counter() + time_limit if time_limit is not None else None
    skipped: list[str] = []
    for i, (names, prices) in enumerate(wanted):
        now = time.perf_counter()
        if end is not None and now >= end:
            skipped += names
            continue
        say(f"measuring {names[0]}", i, len(wanted))
        share = LAYER_SECONDS if end is None else min(LAYER_SECONDS, (end - now) / (len(wanted) - i))
        found = measure_layer(prices, target, share)
        known = replace(known, entries={**known.entries, tuning.layer_key(prices.facts): found})
        known.write(path)
    if not wanted:
        known.write(path)
    measured = {names[0] for names, _ in wanted}
    layers = [
        TunedLayer(tuple(names), entry, names[0] not in measured)
        for names, prices in recorder.layers
        if names[0] not in skipped and (entry := known.nearest(prices.facts)) is not None
    ]
    return Tuned(path, known.model, known.cpu, tuple(layers), tuple(skipped))


def default_path(target: Target) -> Path:
    """The tuning file of this machine's CPU in the user's cache folder."""
    words = re.sub(r"[^a-z0-9]+", "-", f"{host_model()} {target.cpu}".lower()).strip("-")
    return cache_folder() / "tuning" / f"{words}.json"


def _source(model: Any, cpu: str | None) -> tuple[Any, Target]:
    """What to load, and the target to measure on; raises unless this machine can run its code."""
    if isinstance(model, Artifact):
        stanza = model.manifest["target"]
        if stanza["name"] != "host":
            problem = f"is for {stanza['name']}; only kernels of this machine can be measured: give one for host"
            raise UsageError(problem, str(model.path))
        if cpu not in (None, stanza["cpu"]):
            raise UsageError(f"the artifact is for {stanza['cpu']}, not {cpu}; give its MODEL.onnx", "--cpu")
        model, cpu = model.path / "model.onnx", stanza["cpu"]
    target = find_target("host", cpu)
    if missing := missing_features(target):
        raise RuntimeUnavailable(f"this CPU lacks {', '.join(missing)}, so {target.cpu} cannot be measured", "--cpu")
    return model, target


def _known(path: Path, target: Target, notes: list[str]) -> Tuning:
    """What the file holds, if it is of this CPU and these kernels; else an empty one to replace it."""
    fresh = Tuning(host_model(), target.cpu, tuning.kernels_version(), {})
    if not path.exists():
        return fresh
    old = tuning.read_tuning(path)
    if (old.model, old.cpu) != (fresh.model, fresh.cpu):
        here, there = (f"{t.model} as {t.cpu}" for t in (fresh, old))
        raise TuningError(f"was measured on {there}, this is {here}; choose another --cache", str(path))
    if old.kernels != fresh.kernels:
        notes.append(f"{path}: was measured with other kernels; starting afresh")
        return fresh
    return old


# --- one layer --------------------------------------------------------------------------------------------------------


def shortlist(prices: Prices) -> list[Way]:
    """What is measured of a layer, by prediction, cheapest first."""
    kernels: dict[str, list[Way]] = {}
    for way in sorted(prices.ways, key=lambda way: way.predicted_us):
        kernels.setdefault(way.kernel, []).append(way)
    limit = WITHIN * prices.cheapest.predicted_us
    found = [
        way
        for ways in kernels.values()
        for i, way in enumerate(ways[:TILINGS])
        if way.predicted_us <= limit or (not way.sparse and i == 0)
    ]
    return sorted(found, key=lambda way: way.predicted_us)


def measure_layer(prices: Prices, target: Target, seconds: float = LAYER_SECONDS) -> Entry:
    """Compile and time the ways to run a layer; about `seconds` go to timing. Raises CheckError, BuildError."""
    ways = shortlist(prices)
    trials = make_trials(prices, target, ways)
    measure.race(trials, seconds)
    rows = [
        Measured(way.kernel, *way.tile, round(way.predicted_us, 3), round(trial.us, 3))
        for way, trial in zip(ways, trials, strict=True)
    ]
    fastest = min(row.measured_us for row in rows)
    choice = min((row for row in rows if row.measured_us <= (1 + TIE) * fastest), key=lambda row: row.predicted_us)
    rest = sorted((row for row in rows if row is not choice), key=lambda row: row.measured_us)
    return Entry(prices.facts, (choice, *rest))


def make_trials(prices: Prices, target: Target, ways: Sequence[Way]) -> list[measure.Trial]:
    """The ways as one loaded library over shared activations, run once and compared with each other."""
    bound = [prices.calls(way) for way in ways]
    kernels = [Kernel(call.name, call.func, call.text) for calls in bound for call, _ in calls]
    library = measure.Library(kernels, target)
    x, garbage, allowed = _trial_input(prices)
    stage = measure.Stage(x)
    trials = [measure.Trial(library, calls, stage, way.predicted_us) for calls, way in zip(bound, ways, strict=True)]
    y, first = stage.rooms["y"], None
    for trial, way in zip(trials, ways, strict=True):
        y.array[:] = garbage
        trial.run()
        first = y.array.copy() if first is None else first
        if not np.abs(y.array.astype(np.float64) - first).max(initial=0.0) <= allowed:
            raise CheckError(f"{way.kernel} computes something else than {ways[0].kernel}; please report it", "tune")
    return trials


def _trial_input(prices: Prices) -> tuple[np.ndarray, float, float]:
    """Random x; what y holds before a run; how far the results of two ways may differ."""
    rng, shape = np.random.default_rng(0), prices.facts["x_shape"]
    element = prices.facts.get("element", "float32")
    if element in ("uint8", "int8"):  # sums of integers are exact, and are rounded once
        return rng.integers(0, 256, shape, np.uint8).view(element), 0x5A, 0.0
    x = rng.standard_normal(shape, np.float32)
    # Rounding in any order of summation: a sum of K products is off by at most K eps times the sum of their magnitudes.
    magnitudes = np.abs(prices.weight).sum(axis=1, dtype=np.float64).max(initial=0.0) * np.abs(x).max(initial=0.0)
    return x, np.nan, float(2 * (prices.weight.shape[1] + 1) * np.finfo(np.float32).eps * magnitudes)


# --- what it says about the cost model --------------------------------------------------------------------------------


def summary(entries: Sequence[Entry]) -> dict[str, float | int | None]:
    """Prediction against measurement, over all candidates of all layers.

    ratio: geometric mean of measured / predicted; spread: geometric standard deviation of it; rank_correlation:
    Spearman's within layers, averaged; regret: geometric mean of the time of the model's favourite over the fastest.
    """
    logs, correlations, regrets = [], [], []
    for entry in entries:
        predicted = np.array([c.predicted_us for c in entry.candidates])
        measured = np.array([c.measured_us for c in entry.candidates])
        logs.append(np.log(measured / predicted))
        regrets.append(np.log(measured[predicted.argmin()] / measured.min()))
        if len(entry.candidates) >= 3 and np.ptp(predicted) > 0 and np.ptp(measured) > 0:
            correlations.append(float(np.corrcoef(_ranks(predicted), _ranks(measured))[0, 1]))
    flat = np.concatenate(logs) if logs else np.zeros(0)
    return {
        "layers": len(entries),
        "candidates": int(flat.size),
        "ratio": round(float(np.exp(flat.mean())), 4) if flat.size else None,
        "spread": round(float(np.exp(flat.std())), 4) if flat.size else None,
        "rank_correlation": round(float(np.mean(correlations)), 4) if correlations else None,
        "regret": round(float(np.exp(np.mean(regrets))), 4) if regrets else None,
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    """Position in order, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _layer_json(layer: TunedLayer) -> dict[str, Any]:
    choice = layer.entry.choice
    rows = [
        {"kernel": c.kernel, "tile": c.shape, "predicted_us": c.predicted_us, "measured_us": c.measured_us}
        for c in layer.entry.candidates
    ]
    return {
        "names": list(layer.names),
        **{key: layer.entry.layer[key] for key in ("op", "x_shape", "w_shape", "stored")},
        "kernel": choice.kernel,
        "tile": choice.shape,
        "measured_us": choice.measured_us,
        "predicted_us": choice.predicted_us,
        "reused": layer.reused,
        "candidates": rows,
    }


def print_tuned(result: Tuned, console: Console, verbose: bool = False) -> None:
    """A table of the layers with their candidates; without `verbose` the best of each format."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"{result.model} as {result.cpu}, one thread"), title_justify="left")
    for column in ("layer", "x", "weight", "candidate", "tile", "predicted us", "measured us", "ratio", ""):
        right = column in ("predicted us", "measured us", "ratio")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    for layer in result.layers:
        more = f" (+{len(layer.names) - 1})" if len(layer.names) > 1 else ""
        shapes = ("x".join(map(str, layer.entry.layer[key])) for key in ("x_shape", "w_shape"))
        name = layer.names[0]
        head = [(name if len(name) <= NAME else f"{name[: NAME - 3]}...") + more, *shapes]
        seen: set[str] = set()
        for row in layer.entry.candidates:
            if row.kernel in seen and not verbose:
                continue
            seen.add(row.kernel)
            chosen = row is layer.entry.choice
            mark = ("chosen, from the file" if layer.reused else "chosen") if chosen else ""
            numbers = [f"{row.predicted_us:.1f}", f"{row.measured_us:.1f}", f"{row.measured_us / row.predicted_us:.2f}"]
            table.add_row(*map(escape, [*head, row.kernel, row.shape, *numbers, mark]))
            head = ["", "", ""]
    console.print(table)
    facts = summary([layer.entry for layer in result.layers])
    lines = []
    if facts["candidates"]:
        lines.append(
            f"model    measured / predicted {facts['ratio']:.2f}, spread {facts['spread']:.2f}x over {facts['candidates']} candidates;"
            f" choosing by prediction alone would cost {100 * (facts['regret'] - 1):.1f}%"  # type: ignore[operator]
        )
    if facts["rank_correlation"] is not None:
        lines.append(f"ranks    correlation {facts['rank_correlation']:.2f} within layers, on average")
    lines.append(f"kept in  {result.path}")
    for line in lines:
        console.print(line, highlight=False, markup=False)
