"""Kernels of this machine run alone: compiled, linked, loaded into this process and timed in turns."""

from __future__ import annotations

import ctypes
import gc
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsec.building.build import run_zig
from sparsec.building.codegen import compile_kernels
from sparsec.errors import BuildError
from sparsec.kernels.base import KernelCall
from sparsec.program import ALIGNMENT, MAX_ARGS, SLACK, Kernel
from sparsec.targets import Target

BURST_SECONDS = 20e-6  # a sample repeats shorter calls until it takes about as long: the clock's error stays below 1%
_IDLE_CALLS = 9  # bursts of calls over no tile; their least is the price of calling from Python


class Room:
    """One zeroed buffer as the runtime would place it: 64-byte aligned, SLACK bytes behind it."""

    def __init__(self, elements: int, dtype: str) -> None:
        size = elements * np.dtype(dtype).itemsize
        memory = np.zeros(size + SLACK + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        self.array = memory[start : start + size].view(dtype)  # [elements]; keeps `memory` alive
        self.pointer = ctypes.c_void_p(memory.ctypes.data + start)


class Library:
    """Kernels as a loaded shared library. The target must be this machine; see `targets.missing_features`."""

    def __init__(self, kernels: Sequence[Kernel], target: Target) -> None:
        distinct = {kernel.name: kernel for kernel in kernels}
        with tempfile.TemporaryDirectory(prefix="sparsec-") as folder:
            compile_kernels(tuple(distinct.values()), target, Path(folder, "kernels.o"))
            command = ["cc", "-target", target.zig_triple, "-shared", "-s", "-o", "kernels.so", "kernels.o"]
            run_zig([*command, "-lm", "-Wl,-z,defs"], Path(folder))
            try:
                # PyDLL keeps the interpreter's lock: no other thread of it runs inside a measurement.
                self._library = ctypes.PyDLL(str(Path(folder, "kernels.so")))
            except OSError as error:
                raise BuildError(f"cannot load what was built: {error}", folder) from error

    def function(self, name: str) -> Any:
        """Kernel `name` as a ctypes function."""
        function = self._library[name]
        function.restype = None
        function.argtypes = [ctypes.c_void_p] * MAX_ARGS + [ctypes.c_int32, ctypes.c_int32]
        return function


class Stage:
    """Activations that trials share, by name. `fresh`: what value "x" holds whenever a sample begins."""

    def __init__(self, fresh: np.ndarray) -> None:
        self.fresh = np.ascontiguousarray(fresh).reshape(-1)
        self.rooms: dict[str, Room] = {}
        self.room("x", self.fresh.size, str(fresh.dtype)).array[:] = self.fresh

    def room(self, name: str, elements: int, dtype: str) -> Room:
        """The buffer of value `name`, larger than before if need be."""
        known = self.rooms.get(name)
        if known is None or known.array.size < elements or known.array.dtype != dtype:
            known = self.rooms[name] = Room(elements, dtype)
        return known

    def refresh(self) -> None:
        """Write x again, as the layer before would: it lies in the cache as after that layer."""
        self.rooms["x"].array[: self.fresh.size] = self.fresh


class Trial:
    """Kernel calls in a row, bound to memory: one way to compute a layer, on one thread."""

    def __init__(
        self, library: Library, calls: Sequence[tuple[KernelCall, Mapping[str, str]]], stage: Stage, expected_us: float
    ) -> None:
        """`calls`: each with the name of the value bound to each role that is neither constant nor scratch."""
        self.samples: list[float] = []  # microseconds
        self._repeats = max(1, round(BURST_SECONDS * 1e6 / max(expected_us, 0.1)))
        self._stage = stage
        self._rooms: list[Room] = []
        self._runs: list[tuple[Any, list[Any]]] = []
        for call, bound in calls:
            pointers = [
                self._place(call, role, param, bound).pointer
                for role, param in zip(call.roles, call.func.params, strict=False)
            ]
            arguments = [*pointers, *[None] * (MAX_ARGS - len(pointers)), 0]
            self._runs.append((library.function(call.name), [*arguments, call.tiles]))
        idle = [(function, [*arguments[:-1], 0]) for function, arguments in self._runs]
        self._overhead = min(self._time(idle * self._repeats) for _ in range(_IDLE_CALLS)) / self._repeats

    def _place(self, call: KernelCall, role: str, param: Any, bound: Mapping[str, str]) -> Room:
        elements, dtype = int(np.prod([int(size) for size in param.shape])), str(param.dtype)
        if role in call.constants:
            array = call.constants[role].reshape(-1)
            room = Room(max(elements, array.size), str(array.dtype))
            room.array[: array.size] = array
        else:
            room = self._stage.room(role if role == "scratch" else bound[role], elements, dtype)
        self._rooms.append(room)
        return room

    @staticmethod
    def _time(runs: list[tuple[Any, list[Any]]]) -> float:
        start = time.perf_counter()
        for function, arguments in runs:
            function(*arguments)
        return time.perf_counter() - start

    def run(self) -> None:
        """All calls once, over all their tiles."""
        self._time(self._runs)

    def sample(self) -> None:
        """Add one measurement to `samples`."""
        self._stage.refresh()
        seconds = self._time(self._runs * self._repeats)
        self.samples.append(max(seconds / self._repeats - self._overhead, 1e-9) * 1e6)

    @property
    def us(self) -> float:
        """Median of the samples, microseconds."""
        return statistics.median(self.samples)


_FIRST = 5  # rounds before the slow ones retire
_LEAST = 15  # rounds before a clear winner ends the race


def race(trials: Sequence[Trial], seconds: float, most: int = 61, retire: float = 1.25) -> None:
    """Sample trials in turns, until one leads clearly, `most` rounds are done, or `seconds` are over (after 3 rounds).

    Turns change direction each round, so that a drifting clock and other load hit all trials alike. One whose
    best sample is above `retire` times the fastest median cannot win any more and retires early.
    """
    alive = list(trials)
    for trial in alive:
        trial.run()
        trial.samples.clear()
    end = time.perf_counter() + seconds
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(1, most + 1):
            for trial in alive if done % 2 else reversed(alive):
                trial.sample()
            if done >= 3 and time.perf_counter() > end:
                return
            if done % _FIRST == 0:
                best = min(trial.us for trial in alive)
                alive = [trial for trial in alive if min(trial.samples) < retire * best]
            if done >= _LEAST and _decided(alive):
                return
    finally:
        if collecting:
            gc.enable()


def _decided(alive: Sequence[Trial]) -> bool:
    """Whether the leader's upper quartile is below the lower quartile of all others."""
    leader = min(alive, key=lambda trial: trial.us)
    upper = statistics.quantiles(leader.samples, n=4)[2]
    return all(upper < statistics.quantiles(t.samples, n=4)[0] for t in alive if t is not leader)
