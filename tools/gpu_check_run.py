"""All checks of a pack of `gpu_check.py` on a machine with an NVIDIA GPU, and one table of what was asked and measured.

    python DIR/run.py [--only GLOB,...] [--runs N] [--skip sanitizer,torch] [--json FILE]

Needs Python and NumPy; no compiler, no network. What is there besides is used: PyTorch for times of cuBLAS and cuDNN in the
same process, compute-sanitizer for memcheck. Exit: 0 if everything that could be measured is as asked, 1 if something is
not, 3 if there is no GPU. Times are medians of the device's own clock; a step's time is without copies from the host.
"""

from __future__ import annotations

import argparse
import ctypes
import fnmatch
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
WARMUP = 5
SANITIZER_SECONDS = 900


class Options(ctypes.Structure):
    """sparsec_options."""

    _fields_ = [
        ("arena", ctypes.c_void_p), ("arena_bytes", ctypes.c_size_t), ("threads", ctypes.c_int32),
        ("parallel_for", ctypes.c_void_p), ("parallel_data", ctypes.c_void_p), ("stream", ctypes.c_void_p),
        ("device", ctypes.c_int32), ("message", ctypes.c_void_p), ("message_bytes", ctypes.c_size_t),
    ]  # fmt: skip


class Failure(Exception):
    """A model that cannot be opened or run: what it says."""


class Model:
    """An artifact through its C API."""

    def __init__(self, folder: Path) -> None:
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.library = ctypes.CDLL(str(folder / "libmodel.so"))
        for name in ("error_string", "step_name"):
            getattr(self.library, f"sparsec_{name}").restype = ctypes.c_char_p
        self.library.sparsec_close.argtypes = [ctypes.c_void_p]
        for name, count in (("run", 3), ("run_timed", 4), ("run_steps", 4)):
            getattr(self.library, f"sparsec_{name}").argtypes = [ctypes.c_void_p] * count
        self.text = ctypes.create_string_buffer(512)
        self.handle = ctypes.c_void_p()
        options = Options(message=ctypes.addressof(self.text), message_bytes=512)
        path = str(folder / "weights.bin").encode()
        self._check(self.library.sparsec_open_file(path, ctypes.byref(options), ctypes.byref(self.handle)))

    def _check(self, code: int) -> None:
        if code:
            said = self.text.value.decode("utf-8", "replace")
            raise Failure(f"{self.library.sparsec_error_string(code).decode()}: {said}")

    def _call(self, function: str, inputs: list[np.ndarray], *more: object) -> list[np.ndarray]:
        ports = self.manifest["inputs"]
        ins = [np.ascontiguousarray(a, dtype=p["dtype"]) for a, p in zip(inputs, ports, strict=True)]
        for array, port in zip(ins, ports, strict=True):
            if list(array.shape) != port["shape"]:
                raise Failure(f"input {port['name']} has shape {list(array.shape)}, expected {port['shape']}")
        outs = [np.empty(p["shape"], p["dtype"]) for p in self.manifest["outputs"]]
        sides = [(ctypes.c_void_p * len(side))(*[a.ctypes.data for a in side]) for side in (ins, outs)]
        self._check(getattr(self.library, f"sparsec_{function}")(self.handle, *sides, *more))
        return outs

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """The outputs."""
        return self._call("run", inputs)

    def device_ms(self, inputs: list[np.ndarray]) -> float:
        """What the device needs for all steps."""
        result = ctypes.c_float()
        self._call("run_timed", inputs, ctypes.byref(result))
        return result.value

    def steps_ms(self, inputs: list[np.ndarray]) -> list[tuple[str, float]]:
        """Kernel and time of each step."""
        count = self.library.sparsec_step_count(None)
        times = (ctypes.c_float * max(count, 1))()
        self._call("run_steps", inputs, times)
        return [(self.library.sparsec_step_name(None, i).decode(), times[i]) for i in range(count)]

    def close(self) -> None:
        """sparsec_close."""
        self.library.sparsec_close(self.handle)


def device_facts() -> dict[str, float | str]:
    """Name, memory bandwidth in GB/s and bytes of the second cache, by the driver. Raises OSError or Failure without one."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, value, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    if code := driver.cuInit(0):
        raise Failure(f"cuInit: error {code}")
    if code := driver.cuDeviceGet(ctypes.byref(device), 0):
        raise Failure(f"cuDeviceGet: error {code}")
    driver.cuDeviceGetName(name, 256, device)
    found = {}
    for key, attribute in (("khz", 36), ("bits", 37), ("l2", 38), ("major", 75), ("minor", 76)):
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        found[key] = value.value
    gbps = 2 * found["khz"] * 1e3 * found["bits"] / 8 / 1e9  # two transfers a clock
    return {"name": name.value.decode(), "gbps": gbps, "l2_bytes": found["l2"],
            "arch": f"sm_{found['major']}{found['minor']}"}  # fmt: skip


class Table:
    """Rows of what was asked and measured."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def add(self, what: str, asked: str, measured: str, passed: bool | None, value: float | None = None) -> None:
        """passed None: nothing was asked, or it could not be measured."""
        self.rows.append({"what": what, "asked": asked, "measured": measured, "passed": passed, "value": value})
        verdict = {True: "ok", False: "NOT MET", None: ""}[passed]
        print(f"{what:<58} {asked:>12} {measured:>26}  {verdict}", flush=True)

    def at_least(self, what: str, asked: float, value: float | None, unit: str = "x", why: str = "") -> None:
        """A ratio that is to be `asked` or more, 0: only told; None: it could not be measured."""
        limit = f">= {asked:g}{unit}" if asked else ""
        if value is None:
            self.add(what, limit, why or "not measured", None)
        else:
            self.add(what, limit, f"{value:.3g}{unit}", value >= asked if asked else None, value)


def samples_of(item: dict) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
    """(inputs, expected outputs) of each sample; an input of {seed} is drawn, an output of {rows} is those rows only."""
    with np.load(HERE / item["samples"], allow_pickle=False) as stored:
        arrays = dict(stored)
    drawn = item.get("drawn")
    if drawn:
        x = np.random.default_rng(drawn["seed"]).standard_normal(drawn["shape"]).astype(np.float16)
        return [([x], [arrays["out0_0"]])]
    count = len({key.rpartition("_")[2] for key in arrays})
    side = {s: sorted({k.partition("_")[0] for k in arrays if k.startswith(s)}) for s in ("in", "out")}
    return [tuple([arrays[f"{k}_{i}"] for k in side[s]] for s in ("in", "out")) for i in range(count)]  # type: ignore


def check_parity(table: Table, item: dict, model: Model) -> None:
    """Largest relative error of any output of any sample, and the top class."""
    worst, same, samples = 0.0, 0, samples_of(item)
    for inputs, expected in samples:
        got = model.run(inputs)
        if "rows" in item:
            got = [got[0].reshape(-1, got[0].shape[-1])[item["rows"]]]
        for a, b in zip(got, expected, strict=True):
            a, b = a.astype(np.float64), b.astype(np.float64)
            error = float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
            worst = max(worst, error if np.isfinite(a).all() else float("inf"))
        a, b = (o[0].reshape(o[0].shape[0], -1).argmax(1) for o in (got, expected))
        same += int(np.isfinite(got[0]).all() and (a == b).all())
    limit = item["tolerance"]
    table.add(f"{item['name']}: parity, {len(samples)} samples", f"<= {limit:g}", f"{worst:.3g}", worst <= limit, worst)
    if item.get("top1"):
        table.add(f"{item['name']}: top-1 identical", f"{len(samples)}", f"{same}", same == len(samples), same)


def time_item(table: Table, item: dict, model: Model, runs: int, l2_bytes: float) -> float:
    """Milliseconds on the device: of the whole model, or of a kernel alone (`of`: "kernel"), its casts left out.

    `cold`: as many instances as it takes for weights to leave the second cache take turns.
    """
    inputs = samples_of(item)[0][0]
    if item["of"] == "model":
        times = [model.device_ms(inputs) for _ in range(WARMUP + runs)][WARMUP:]
        value, note = statistics.median(times), ""
    else:
        count = 1
        if item.get("cold"):
            bytes_ = max(1, model.manifest["weights_bytes"])
            count = int(min(32, max(1, -(-3 * l2_bytes // bytes_))))
        others = [Model(HERE / item["artifact"]) for _ in range(count - 1)]
        turns = [model, *others]
        rounds = [turns[i % count].steps_ms(inputs) for i in range(WARMUP + count + runs)][WARMUP + count :]
        kept = [i for i, (name, _) in enumerate(rounds[0]) if "cast" not in name]
        value = sum(statistics.median(r[i][1] for r in rounds) for i in kept)
        note = ", ".join(dict.fromkeys(rounds[0][i][0] for i in kept))
        for other in others:
            other.close()
    table.add(f"{item['name']}: device ms {note}"[:58], "", f"{value:.4f}", None, value)
    return value


def sanitizer() -> str | None:
    """Path of compute-sanitizer, or None."""
    places = [shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


def check_memory(table: Table, item: dict, tool: str | None) -> None:
    """memcheck over one run of the artifact's own `bench`."""
    what = f"{item['name']}: memcheck"
    if tool is None:
        table.add(what, "0 errors", "no compute-sanitizer here", None)
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", str(HERE / item["artifact"] / "bench")]
    command += ["--runs", "1", "--warmup", "0", "--no-check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SANITIZER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        table.add(what, "0 errors", f"not done in {SANITIZER_SECONDS} s", None)
        return
    lines = [line.strip("= \n") for line in (done.stdout + done.stderr).splitlines() if "ERROR SUMMARY" in line]
    said = lines[-1] if lines else f"exit {done.returncode}"
    table.add(what, "0 errors", said[-26:], done.returncode == 0)


def main() -> int:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="*", metavar="GLOB,...", help="items by name")
    parser.add_argument("--runs", type=int, default=50, metavar="N")
    parser.add_argument("--skip", default="", metavar="WHAT,...", help="sanitizer, torch, timing")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    skip = set(given.skip.split(","))
    plan = json.loads((HERE / "plan.json").read_text(encoding="utf-8"))
    items = [
        item for item in plan["items"] if any(fnmatch.fnmatch(item["name"], glob) for glob in given.only.split(","))
    ]
    try:
        device = device_facts()
    except (OSError, Failure, AttributeError) as error:
        print(f"gpu_check: no GPU to check on: {error}", file=sys.stderr)
        return 3
    print(f"{device['name']} ({device['arch']}), {device['gbps']:.0f} GB/s; artifacts for {plan['arch']}")
    table, ms = Table(), {}
    for item in items:
        try:
            model = Model(HERE / item["artifact"])
            check_parity(table, item, model)
            if "timing" not in skip:
                ms[item["name"]] = time_item(table, item, model, given.runs, float(device["l2_bytes"]))
            model.close()
        except Failure as error:
            table.add(item["name"], "runs", str(error), False)
    if "timing" not in skip:
        from compare import check_ratios

        check_ratios(table, plan, ms, device, HERE, "torch" not in skip, given.runs)
    for item in items if "sanitizer" not in skip else []:
        check_memory(table, item, sanitizer())
    asked = [row for row in table.rows if row["passed"] is not None]
    met = sum(bool(row["passed"]) for row in asked)
    print(
        f"{met} of {len(asked)} as asked; {sum(r['asked'] != '' and r['passed'] is None for r in table.rows)} not measured"
    )
    if given.json:
        Path(given.json).write_text(json.dumps({"device": device, "rows": table.rows}, indent=1) + "\n")
    return 0 if met == len(asked) else 1


if __name__ == "__main__":
    sys.exit(main())
