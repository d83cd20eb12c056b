"""Fit the cost model's constants to this machine and print the CPU's stanza for sparsec/targets.toml.

The clock is measured by a chain of dependent additions, one a cycle. The other constants are fitted: convolutions over a
grid of shapes, formats and densities are timed on one thread as `sparsec tune` times them, and the constants that
`conv.predict_us` takes from its machine are moved, one after the other, until the logarithms of predicted / measured are
smallest. Constants that the measurements do not determine stay where they are. Every second layer is held out and only
judges the result. Run it on a quiet machine.

    python tools/calibrate.py --seconds 120 --json calibration.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sparsec import measure, tuner
from sparsec.building.build import run_zig
from sparsec.errors import RuntimeUnavailable, SparsecError
from sparsec.kernels import conv
from sparsec.kernels.base import Machine
from sparsec.lowering.prices import Prices, Way
from sparsec.lowering.rules.convolution import price_conv
from sparsec.targets import Target, find_target, host_model, missing_features
from sparsec.tuning import Entry, Measured

FITTED = ("fma", "loads", "uops", "l2_bytes_per_cycle", "group_cycles", "row_cycles")
PRIOR = 0.002  # weight of the squared logarithm of a constant's change: holds what the data leave open
WORST = 10  # predictions shown
QUIET = 0.5  # load average below which a machine counts as quiet

# OC, IC, kernel, pixels a side, stride: pointwise and 3x3 layers of MobileNets and ResNets.
LAYERS = (
    (64, 32, 1, 112, 1), (128, 128, 1, 56, 1), (256, 256, 1, 28, 1), (512, 512, 1, 14, 1), (1024, 1024, 1, 7, 1),
    (64, 256, 1, 56, 1), (96, 16, 1, 56, 1), (320, 960, 1, 7, 1), (32, 192, 1, 14, 1), (256, 64, 1, 20, 1),
    (64, 64, 3, 56, 1), (128, 128, 3, 28, 1), (256, 256, 3, 14, 1), (512, 512, 3, 7, 1), (128, 64, 3, 56, 2),
    (32, 3, 3, 224, 2), (16, 16, 3, 32, 1), (64, 32, 5, 14, 1),
)  # fmt: skip
PATTERNS = ((1, 0.2), (1, 0.1), (4, 0.5), (4, 0.2), (4, 0.1), (8, 0.3))  # block rows, density


@dataclass(frozen=True)
class Observation:
    """One candidate's time. `columns`: what it stores, as `conv.predict_us` takes it."""

    layer: int
    geometry: conv.Geometry
    form: conv.Format
    tiling: conv.Tiling
    columns: float
    measured_us: float

    def predicted_us(self, machine: Machine) -> float:
        """By the model, with a machine's constants."""
        return conv.predict_us(machine, self.geometry, self.tiling, self.columns, self.form.sparse)


def weights(geometry: conv.Geometry, rows: int, density: float, seed: int) -> np.ndarray:
    """Random [OC, IC, KH, KW] in which `density` of the blocks of `rows` output channels remain."""
    rng = np.random.default_rng(seed)
    oc, *rest = geometry.w_shape
    kept = rng.random((-(-oc // rows), *rest)) < density
    return (rng.standard_normal(geometry.w_shape) * kept.repeat(rows, 0)[:oc]).astype(np.float32)


def cases() -> list[tuple[conv.Geometry, int, float]]:
    """(geometry, block rows, density) of everything that is measured; rows 0 is dense."""
    found: list[tuple[conv.Geometry, int, float]] = []
    for oc, ic, k, side, stride in LAYERS:
        pad = k // 2
        geometry = conv.Geometry((1, ic, side, side), (oc, ic, k, k), (stride, stride), (pad, pad, pad, pad))
        found.append((geometry, 0, 1.0))
        if ic > 3:
            found += [(geometry, rows, density) for rows, density in PATTERNS]
    return found


def candidates(prices: Prices) -> list[Way]:
    """Of each format that comes near the cheapest: the tiling that the model prefers, and one that it does not."""
    limit, found = tuner.WITHIN * prices.cheapest.predicted_us, []
    for kernel in dict.fromkeys(way.kernel for way in prices.ways):
        ranked = sorted((way for way in prices.ways if way.kernel == kernel), key=lambda way: way.predicted_us)
        found += [way for way in dict.fromkeys((ranked[0], ranked[len(ranked) // 3])) if way.predicted_us <= limit]
    return found


def observe(target: Target, seconds: float, say: Callable[[str], None]) -> list[Observation]:
    """Measure the grid in about `seconds`; compiling takes a minute or two on top."""
    grid = cases()
    found: list[Observation] = []
    for i, (geometry, rows, density) in enumerate(grid):
        w = weights(geometry, max(rows, 1), density, i)
        prices = price_conv(target.machine, geometry, w)
        say(f"{i + 1}/{len(grid)}: {geometry.w_shape} {rows}x1 {density:.0%}")
        ways = candidates(prices)
        trials = tuner.make_trials(prices, target, ways)
        measure.race(trials, seconds / len(grid), retire=math.inf)
        for way, trial in zip(ways, trials, strict=True):
            columns = conv.stored_columns(w, way.form, target.machine, geometry)[way.tiling.rows]
            found.append(Observation(i, geometry, way.form, way.tiling, columns, trial.us))
    return found


# --- clock ------------------------------------------------------------------------------------------------------------

_CHAIN = """
void chain(long rounds) {
    unsigned long value = 1;
    while (rounds--) {
#if defined(__x86_64__)
        __asm__ volatile(".rept 1000\\n add %0, %0\\n .endr" : "+r"(value));
#else
        __asm__ volatile(".rept 1000\\n add %0, %0, %0\\n .endr" : "+r"(value));
#endif
    }
}
"""


def clock_ghz(target: Target) -> float:
    """Cycles a nanosecond while one core works: the best of many runs of a chain of dependent additions."""
    rounds = 3000
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "chain.c").write_text(_CHAIN)
        run_zig(["cc", "-target", target.zig_triple, "-O2", "-shared", "-o", "chain.so", "chain.c"], Path(folder))
        chain = ctypes.CDLL(str(Path(folder, "chain.so"))).chain
    chain.argtypes, chain.restype = [ctypes.c_long], None
    best = math.inf
    for _ in range(100):
        start = time.perf_counter_ns()
        chain(rounds)
        best = min(best, time.perf_counter_ns() - start)
    return 1000 * rounds / best


# --- fit --------------------------------------------------------------------------------------------------------------


def loss(machine: Machine, start: Machine, observations: Sequence[Observation]) -> float:
    """Mean of |log(predicted / measured)|, squared where it is small, and a little for leaving `start`."""
    error = np.array([math.log(o.predicted_us(machine) / o.measured_us) for o in observations])
    size = np.abs(error)
    moved = sum(math.log(getattr(machine, key) / getattr(start, key)) ** 2 for key in FITTED)
    return float(np.where(size < 0.2, size**2, 0.4 * size - 0.04).mean()) + PRIOR * moved


def fit(start: Machine, observations: Sequence[Observation]) -> Machine:
    """The machine with the constants of FITTED moved to where `loss` is least: coordinates in turn, shrinking steps."""
    best, least, step = start, loss(start, start, observations), 0.4
    while step > 0.004:
        before = least
        for key in FITTED:
            for factor in (math.exp(step), math.exp(-step)):
                while (moved := replace(best, **{key: getattr(best, key) * factor})) and (
                    value := loss(moved, start, observations)
                ) < least - 1e-9:
                    best, least = moved, value
        if least >= before * (1 - 1e-4):
            step /= 2
    return best


def judge(machine: Machine, observations: Sequence[Observation]) -> dict[str, float | int | None]:
    """`tuner.summary` of the predictions with these constants."""
    layers: dict[int, list[Measured]] = {}
    for o in observations:
        row = Measured(
            o.form.name,
            o.tiling.rows,
            o.tiling.vectors,
            o.tiling.lanes,
            o.tiling.depth,
            o.predicted_us(machine),
            o.measured_us,
        )
        layers.setdefault(o.layer, []).append(row)
    return tuner.summary([Entry({}, tuple(rows)) for rows in layers.values()])


def stanza(target: Target, machine: Machine) -> str:
    """The lines of targets.toml that change."""
    lines = [f'[cpu."{target.cpu}"]', f"ghz = {machine.ghz:.2f}"]
    lines += [f"{key} = {getattr(machine, key):.3g}" for key in FITTED]
    return "\n".join([*lines, f'source = "measured on {host_model()} by tools/calibrate.py"']) + "\n"


def report(target: Target, fitted: Machine, observations: Sequence[Observation]) -> dict[str, Any]:
    """Constants before and after, and how well each predicts what was fitted and what was held out."""
    parts = {
        "fitted": [o for o in observations if o.layer % 2 == 0],
        "held out": [o for o in observations if o.layer % 2],
    }
    machines = {"before": target.machine, "after": fitted}
    return {
        "model": host_model(),
        "cpu": target.cpu,
        "constants": {when: {key: getattr(m, key) for key in ("ghz", *FITTED)} for when, m in machines.items()},
        "fit": {when: {part: judge(m, rows) for part, rows in parts.items()} for when, m in machines.items()},
        "formats": {
            name: {when: judge(m, [o for o in observations if o.form.name == name]) for when, m in machines.items()}
            for name in sorted({o.form.name for o in observations})
        },
        "worst": [
            {
                "layer": "x".join(map(str, o.geometry.w_shape)) + " on " + "x".join(map(str, o.geometry.x_shape[2:])),
                "kernel": o.form.name,
                "tile": f"{o.tiling.rows}x{o.tiling.width}",
                "ratio": round(o.measured_us / o.predicted_us(fitted), 3),
            }
            for o in sorted(observations, key=lambda o: -abs(math.log(o.measured_us / o.predicted_us(fitted))))[:WORST]
        ],
        "load": os.getloadavg()[0],
    }


def print_fit(result: dict[str, Any], console: Console) -> None:
    """How well the constants predict: `tuner.summary` by part and by format, and the worst predictions."""
    keys = ("ratio", "spread", "rank_correlation", "regret", "candidates")
    table = Table("constants", "of", *(key.replace("_", " ") for key in keys))
    for part in ("fitted", "held out"):
        for when in ("before", "after"):
            table.add_row(when, part, *(str(result["fit"][when][part][key]) for key in keys))
    for name, row in result["formats"].items():
        for when in ("before", "after"):
            table.add_row(when, name.removeprefix("conv_f32_"), *(str(row[when][key]) for key in keys))
    console.print(table)
    worst = Table("worst predictions", "kernel", "tile", "measured / predicted")
    for row in result["worst"]:
        worst.add_row(row["layer"], row["kernel"], row["tile"], str(row["ratio"]))
    console.print(worst)


def main() -> int:
    """Measure, fit, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", help="stanza to calibrate (default: this machine's)")
    parser.add_argument("--seconds", type=float, default=120.0, help="time for measuring (default: 120)")
    parser.add_argument("--json", metavar="FILE", help="write constants and fit there")
    options = parser.parse_args()
    console = Console(stderr=True)
    try:
        target = find_target("host", options.cpu)
        if missing := missing_features(target):
            raise RuntimeUnavailable(f"this CPU lacks {', '.join(missing)}", "--cpu")
        if (load := os.getloadavg()[0]) > QUIET:
            console.print(f"note: this machine is busy (load {load:.1f}); the constants will be off")
        start = replace(target.machine, ghz=clock_ghz(target))
        with console.status("") as status:
            observations = observe(target, options.seconds, status.update)
    except SparsecError as error:
        console.print(f"error: {error}")
        return error.exit_code
    fitted = fit(start, [o for o in observations if o.layer % 2 == 0])
    result = report(target, fitted, observations)
    print_fit(result, console)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(stanza(target, fitted), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
