"""Latency of an artifact, beside other runtimes on the same model in the same minutes.

Runtimes of this process take turns run by run (and change order each round), so that clock changes and other load hit
all of them; each uses the same number of threads. What runs elsewhere (adb, ssh, emulated) is timed there by the
artifact's `bench`.
"""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.errors import RuntimeUnavailable, UsageError
from sparsec.proving.samples import read_parity
from sparsec.runtimes.base import DeviceTime, Session, Stats, find_runtime, runtime_names
from sparsec.targets import suggest

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from sparsec.artifact import Artifact

WARMUP = 3  # runs of each, untimed
ELSEWHERE = ("adb", "ssh", "native", "cuda", "emulated")  # not to compare with: other machines, or the artifact itself


@dataclass(frozen=True)
class Timing:
    """Latencies in ms of single runs, from host memory to host memory; `against`: of other runtimes on model.onnx.

    device: by an accelerator's own clock, copies left out; None where there is none. `against_device`: of the others.
    """

    runtime: str
    threads: int
    runs: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    min_ms: float
    peak_bytes: int | None
    against: dict[str, Stats] = field(default_factory=dict)
    device: DeviceTime | None = None
    against_device: dict[str, DeviceTime] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """The object of `bench --json`."""
        own = Stats(self.runs, self.median_ms, self.p10_ms, self.p90_ms, self.min_ms, self.peak_bytes).json()
        others = {name: stats.json() | _device(self.against_device.get(name)) for name, stats in self.against.items()}
        return {"runtime": self.runtime, "threads": self.threads, **own, **_device(self.device), "against": others}


def _device(found: DeviceTime | None) -> dict[str, Any]:
    return {} if found is None else {"device": found.json()}


def comparable_names() -> list[str]:
    """Runtimes that `--against` accepts, some with an argument behind a colon."""
    return [name for name in runtime_names() if name not in ELSEWHERE]


def check_options(runs: int, threads: int | None, against: Sequence[str]) -> None:
    """Raise UsageError for a number out of range or an unknown runtime in `against`."""
    if runs < 1:
        raise UsageError(f"expected at least 1, got {runs}", "--runs")
    if threads is not None and not 1 <= threads <= 256:
        raise UsageError(f"expected 1 to 256, got {threads}", "--threads")
    for spec in against:
        name = spec.partition(":")[0]
        if name not in comparable_names():
            raise UsageError(f"cannot compare with {spec!r}{suggest(name, comparable_names())}", "--against")


def bench(
    artifact: Artifact,
    runs: int = 50,
    threads: int | None = None,
    runtime: str | None = None,
    against: Sequence[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> Timing:
    """Time single runs of `artifact` on the parity sample, `threads` workers (default: the artifact's).

    Raises UsageError for an unknown name, RuntimeUnavailable if a runtime is not here.
    """
    check_options(runs, threads, against)
    place = find_runtime(runtime, artifact)
    workers = threads or artifact.manifest["threads"]
    sample = read_parity(artifact)
    with contextlib.ExitStack() as stack:
        if "ort" in (*against, place.name):
            from sparsec.proving.ort_session import limited_as_artifact

            stack.enter_context(limited_as_artifact())
        sessions: dict[str, Session] = {str(place): stack.enter_context(place.open(artifact, workers))}
        for name in dict.fromkeys(against):
            if name != str(place):
                sessions[name] = stack.enter_context(find_runtime(name, artifact).open(artifact, workers))
        if not all(getattr(session, "optimized", True) for session in sessions.values()):
            text = "fails on this model with its optimizations, without which it is not timed; leave it out"
            raise RuntimeUnavailable(f"ONNX Runtime {text}", "--against ort")
        turns = {name: session for name, session in sessions.items() if session.interleaves}
        stats = _take_turns(turns, sample, runs, progress)
        for name, session in sessions.items():
            if name not in turns:
                stats[name] = session.time(sample, runs, WARMUP)
        devices = {name: session.device_time(sample, runs, WARMUP) for name, session in sessions.items()}
        peaks = {name: session.peak_bytes() for name, session in turns.items()}
    if "ort" in turns:
        peaks["ort"] = _ort_peak(artifact.path / "model.onnx", workers)
    for name, peak in peaks.items():
        s = stats[name]
        stats[name] = Stats(s.runs, s.median_ms, s.p10_ms, s.p90_ms, s.min_ms, peak)
    own, device = stats.pop(str(place)), devices.pop(str(place))
    return Timing(
        runtime=str(place), threads=workers, runs=own.runs, median_ms=own.median_ms, p10_ms=own.p10_ms,
        p90_ms=own.p90_ms, min_ms=own.min_ms, peak_bytes=own.peak_bytes,
        against={name: stats[name] for name in dict.fromkeys(against) if name in stats},
        device=device,
        against_device={name: found for name, found in devices.items() if found is not None},
    )  # fmt: skip


def faster(before: Artifact, after: Artifact, runs: int = 50) -> float:
    """How many times as fast `after` runs as `before`: the ratio of medians, both timed in turns on this machine."""
    with contextlib.ExitStack() as stack:
        sessions = {
            name: stack.enter_context(find_runtime(None, artifact).open(artifact, artifact.manifest["threads"]))
            for name, artifact in (("before", before), ("after", after))
        }
        stats = _take_turns(sessions, read_parity(before), runs, None)
    return stats["before"].median_ms / stats["after"].median_ms


def _take_turns(
    sessions: dict[str, Session],
    sample: dict[str, np.ndarray],
    runs: int,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, Stats]:
    calls = {name: session.once(sample) for name, session in sessions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls.items())
    enabled = gc.isenabled()
    gc.disable()
    try:
        for i in range(-WARMUP, runs):
            for name, call in order:
                start = time.perf_counter()
                call()
                elapsed = time.perf_counter() - start
                if i >= 0:
                    seconds[name].append(elapsed)
                sessions[name].settle()
            order.reverse()
            if progress is not None and i >= 0:
                progress("timing", i + 1, runs)
    finally:
        if enabled:
            gc.enable()
    return {name: Stats.of(times) for name, times in seconds.items()}


_ORT_PEAK = """
import sys
import numpy as np
import onnxruntime as ort
def field(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))
before = field("VmRSS")
options = ort.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = int(sys.argv[2]), 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
kinds = {"float": "float32", "double": "float64"}
feed = {}
for node in session.get_inputs():
    kind = node.type[7:-1]
    feed[node.name] = np.zeros([d if isinstance(d, int) else 1 for d in node.shape], kinds.get(kind, kind))
session.run(None, feed)
print(field("VmHWM") - before)
"""


def _ort_peak(model: Path, threads: int) -> int | None:
    """Memory that ONNX Runtime needs for one run beyond a Python with ONNX Runtime imported."""
    try:
        command = [sys.executable, "-c", _ORT_PEAK, str(model), str(threads)]
        done = subprocess.run(command, capture_output=True, timeout=120, check=True)
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def print_timing(timing: Timing, console: Console) -> None:
    """The timing as a table; the last column is how many times faster the artifact is."""
    from rich.markup import escape
    from rich.table import Table

    title = f"{timing.runs} runs, {timing.threads} thread{'s' if timing.threads > 1 else ''}"
    table = Table(title=title, title_justify="left")
    table.add_column("runtime")
    for column in ("median ms", "p10", "p90", "min", "peak MB", "artifact is"):
        table.add_column(column, justify="right")
    own = Stats(timing.runs, timing.median_ms, timing.p10_ms, timing.p90_ms, timing.min_ms, timing.peak_bytes)
    rows: list[tuple[str, Stats, Stats | None]] = [(timing.runtime, own, None)]  # the last: what it is compared with
    if timing.device is not None:
        rows.append((f"{timing.device.name}, without copies", timing.device.stats, None))
    for name, stats in timing.against.items():
        rows.append((name, stats, own))
        if (other := timing.against_device.get(name)) is not None:
            same = None if timing.device is None else timing.device.stats
            rows.append((f"{name} on {other.name}, without copies", other.stats, same))
    for name, stats, compared in rows:
        peak = f"{stats.peak_bytes / 1e6:.1f}" if stats.peak_bytes is not None else "-"
        times = [f"{value:.3f}" for value in (stats.median_ms, stats.p10_ms, stats.p90_ms, stats.min_ms)]
        ratio = "" if compared is None else f"{stats.median_ms / compared.median_ms:.2f}x"
        table.add_row(escape(name), *times, peak, ratio)
    console.print(table)
