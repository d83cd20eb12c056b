"""Where a model runs. A runtime opens an artifact and gives a session: load, run, time.

Registered by name here, and by installed packages through the entry-point group `sparsec.runtimes` (name -> class).
What stands behind a colon in `adb:SERIAL` or `ssh:HOST` is the class's one argument.
"""

from __future__ import annotations

import importlib
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from sparsec.errors import RuntimeUnavailable, UsageError
from sparsec.ports import InputSpec
from sparsec.targets import suggest

Arrays = dict[str, np.ndarray]

BUILT_IN = {
    "native": "sparsec.runtimes.native:Native",
    "cuda": "sparsec.runtimes.cuda:Cuda",
    "emulated": "sparsec.runtimes.emulated:Emulated",
    "adb": "sparsec.runtimes.adb:Adb",
    "ssh": "sparsec.runtimes.ssh:Ssh",
    "node": "sparsec.runtimes.node:Node",
    "chromium": "sparsec.runtimes.chromium:Chromium",
    "ort": "sparsec.runtimes.ort:Ort",
    "torch": "sparsec.runtimes.torch:Torch",
}


class Compiled(Protocol):
    """What a runtime needs of an artifact."""

    path: Path
    manifest: dict[str, Any]

    @property
    def inputs(self) -> tuple[InputSpec, ...]: ...

    @property
    def outputs(self) -> tuple[InputSpec, ...]: ...


@dataclass(frozen=True)
class Stats:
    """Latencies in milliseconds over `runs` runs; `peak_bytes`: memory at its highest, None where it is not known."""

    runs: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    min_ms: float
    peak_bytes: int | None = None

    @staticmethod
    def of(seconds: Sequence[float], peak_bytes: int | None = None) -> Stats:
        """Summary of single measurements."""
        ms = np.asarray(seconds, np.float64) * 1e3
        p10, median, p90 = np.percentile(ms, [10, 50, 90])
        return Stats(len(ms), float(median), float(p10), float(p90), float(ms.min()), peak_bytes)

    def json(self) -> dict[str, Any]:
        """The keys of `bench --json`, in ms rounded to 0.1 us."""
        numbers = {key: round(getattr(self, key), 4) for key in ("median_ms", "p10_ms", "p90_ms", "min_ms")}
        return {"runs": self.runs, **numbers, "peak_bytes": self.peak_bytes}


@dataclass(frozen=True)
class DeviceTime:
    """Latencies by the clock of an accelerator called `name`: its own work, without copies from and to the host."""

    name: str
    stats: Stats

    def json(self) -> dict[str, Any]:
        """The key `device` of `bench --json`."""
        times = self.stats.json()
        del times["peak_bytes"]
        return {"name": self.name, **times}


class Session(ABC):
    """An opened model. Use as a context manager; one thread at a time."""

    interleaves: ClassVar[bool] = False  # whether `once` exists: runs in this process, one by one

    @abstractmethod
    def run(self, inputs: Arrays) -> Arrays:
        """Outputs by name of one sample; `inputs` have the exact shapes and dtypes of the signature."""

    def run_many(self, samples: Iterable[Arrays]) -> Iterator[Arrays]:
        """Outputs of each sample in order; a session with a costly start does many at once."""
        for sample in samples:
            yield self.run(sample)

    def time(self, inputs: Arrays, runs: int, warmup: int = 1) -> Stats:
        """Latency of one run, `runs` times after `warmup` runs. A session that has no `once` measures in its own way."""
        call = self.once(inputs)
        seconds = []
        for i in range(-warmup, runs):
            start = time.perf_counter()
            call()
            if i >= 0:
                seconds.append(time.perf_counter() - start)
        return Stats.of(seconds, self.peak_bytes())

    def once(self, inputs: Arrays) -> Callable[[], object]:
        """A function without arguments that runs the model once; only where `interleaves`."""
        raise NotImplementedError(type(self).__name__)

    def settle(self) -> None:  # noqa: B027  (most leave nothing running)
        """Return when threads that a run left spinning sleep, so that what is timed next has the processor."""

    def device_time(self, inputs: Arrays, runs: int, warmup: int = 1) -> DeviceTime | None:
        """What an accelerator needs of a run, `runs` times after `warmup` runs; None where there is none."""
        return None

    def peak_bytes(self) -> int | None:
        """Memory that the model needs at its highest, if known."""
        return None

    def close(self) -> None:  # noqa: B027  (many sessions hold nothing)
        """Release what the session holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Runtime(ABC):
    """A place to run artifacts. `argument` is what stood behind the colon."""

    name: ClassVar[str]
    takes_argument: ClassVar[bool] = False

    def __init__(self, argument: str = "") -> None:
        self.argument = argument

    def __str__(self) -> str:
        return f"{self.name}:{self.argument}" if self.argument else self.name

    @abstractmethod
    def open(self, artifact: Compiled, threads: int | None = None) -> Session:
        """A session with `threads` workers (default: the artifact's). Raises RuntimeUnavailable: what is missing."""


def runtime_names() -> list[str]:
    """Every known runtime."""
    return [*BUILT_IN, *(p.name for p in metadata.entry_points(group="sparsec.runtimes") if p.name not in BUILT_IN)]


def runtime_class(name: str) -> type[Runtime]:
    """The class registered as `name`. Raises UsageError with the nearest known name."""
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    for point in metadata.entry_points(group="sparsec.runtimes"):
        if point.name == name:
            try:
                return point.load()
            except Exception as error:  # a foreign package may fail in any way
                raise RuntimeUnavailable(f"cannot be imported: {type(error).__name__}: {error}", name) from error
    raise UsageError(f"unknown runtime {name!r}{suggest(name, runtime_names())}", "--runtime")


def find_runtime(spec: str | None, artifact: Compiled) -> Runtime:
    """The runtime that `spec` (`NAME[:ARGUMENT]`) means; None: the artifact's own on this machine."""
    if spec is None:
        spec = default_runtime(artifact)
    name, colon, argument = spec.partition(":")
    cls = runtime_class(name)
    if colon and not cls.takes_argument:
        raise UsageError(f"runtime {name!r} takes no argument, got {spec!r}", "--runtime")
    return cls(argument)


def default_runtime(artifact: Compiled) -> str:
    """`native` where this machine can load the artifact's library, else what its target names."""
    target = artifact.manifest["target"]
    if target["runtime"] == "cuda":
        return "cuda"
    if target["arch"] == machine_arch() and target["os"] == "linux":
        return "native"
    return "emulated" if target["runtime"] == "native" and target["arch"] == "aarch64" else target["runtime"]


def machine_arch() -> str:
    """This machine's architecture by the name targets use."""
    arch = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(arch, arch)
