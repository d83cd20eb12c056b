"""One engine in a process of its own, speaking one JSON object a line over stdin and stdout.

    {"do": "load", "model": PATH, "inputs": NPZ, "outputs": NPZ to write, "threads": N, "options": {...}}
        -> {"version": TEXT, "note": TEXT, "growth": bytes of memory that loading and two runs added}
    {"do": "run", "runs": N}   -> {"seconds": [...]}, one untimed run before them
    {"do": "quit"}
    anything that fails        -> {"error": TEXT}

Standard library and NumPy only: it runs inside the peers' environments. Engines print to stdout as they like; the
protocol has a descriptor of its own.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Arrays = dict[str, Any]  # NumPy arrays by name
# (run once to the results in memory of ours, results by name, a remark on how it runs)
Opened = tuple[Callable[[], object], Callable[[], Arrays], str]


def _status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def _reset_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _pin() -> None:
    """Onto the CPUs in $BENCH_CPUS, before the engine's libraries start threads."""
    cpus = {int(cpu) for cpu in os.environ.get("BENCH_CPUS", "").split(",") if cpu}
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)


def serve(open_model: Callable[[str, Arrays, int, dict[str, Any]], Opened], version: Callable[[], str]) -> None:
    """Answer requests until "quit" or the end of input."""
    _pin()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    import numpy as np

    call: Callable[[], object] | None = None
    keep: list[object] = []  # what `call` uses by address: the session, the inputs

    def load(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal call
        with np.load(request["inputs"], allow_pickle=False) as stored:
            feed = {name: np.ascontiguousarray(stored[name]) for name in stored.files}
        text = version()  # imports the engine
        gc.collect()
        known, before = _reset_peak(), _status("VmRSS")
        call, fetch, note = open_model(request["model"], feed, request["threads"], request["options"])
        keep[:] = [feed, fetch]
        call()
        call()
        growth = _status("VmHWM") - before if known else None
        np.savez(request["outputs"], **{name: np.asarray(value) for name, value in fetch().items()})
        gc.disable()
        return {"version": text, "note": note, "growth": growth}

    def run(runs: int) -> dict[str, Any]:
        assert call is not None, "load first"
        call()
        seconds = []
        for _ in range(runs):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "quit":
            break
        try:
            answer = load(request) if request["do"] == "load" else run(request["runs"])
        except Exception as error:  # engines raise what they like
            lines = [text.strip() for text in str(error).splitlines() if text.strip()]
            answer = {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
