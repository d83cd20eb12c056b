"""`python -m fuzz.campaign [--minutes N] [--resume]`: every harness in turn until N minutes of processor time are spent.

One process at a time. Each slice is a harness with a seed of its own; the harness furthest behind its share is next. Every
slice leaves a line in the log: executions, processor seconds of it and all of its children, and what failed. Seeds go on
where the log ends; with `--resume` so do the minutes, for a campaign that was stopped. `--summary` prints what the log says.
What failed is in `fuzz/failures`, and a failure does not end the campaign: the next slice has another seed. The exit status
is 1 if any did.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 600.0  # wall seconds beyond its own after which a slice hangs
SLICE = (5.0, 60.0)  # seconds, least and most
LEAST = 5.0  # seconds that a slice counts for when it is decided who is next, so that one that fails at once waits too
WITH_ATHERIS = ("model-file", "model-bytes", "recipe", "manifest", "tuning", "npz", "masks", "options")


@dataclass(frozen=True)
class Harness:
    """`share` of the processor time; `arguments` of `python -m`, with {seconds}, {seed} and {keep}."""

    name: str
    share: float
    arguments: str
    unit: str = "executions"

    def command(self, seconds: float, seed: int, keep: Path) -> list[str]:
        """What to execute."""
        return [sys.executable, "-m", *self.arguments.format(seconds=int(seconds), seed=seed, keep=keep).split()]


READERS = "fuzz.run {target} --seconds {{seconds}} --seed {{seed}} --keep {{keep}}"
HARNESSES = (
    Harness("graphs", 0.5, "fuzz.graphs --seconds {seconds} --seed {seed}000 --keep {keep} --no-shrink", "graphs"),
    Harness("c", 0.08, "fuzz.c.run --seconds {seconds} --seed {seed}"),
    Harness("model", 0.12, READERS.format(target="model")),
    Harness("model-file", 0.06, READERS.format(target="model-file")),
    *(Harness(name, 0.02, READERS.format(target=name)) for name in WITH_ATHERIS[1:]),
    *(Harness(f"{name}/atheris", 0.02, READERS.format(target=name) + " --atheris") for name in WITH_ATHERIS),
)


def slices(
    log: Path, minutes: float, harnesses: Sequence[Harness], seconds: float, keep: Path, resume: bool = False
) -> Iterator[dict[str, Any]]:
    """Run for `minutes` of processor time, with `resume` those in the log included; one record a slice."""
    records = read(log)
    before = 0.0 if resume else sum(r["cpu"] for r in records)
    while sum(r["cpu"] for r in records) - before < 60 * minutes:
        used = {h.name: sum(max(LEAST, r["cpu"]) for r in records if r["harness"] == h.name) for h in harnesses}
        harness = min(harnesses, key=lambda h: used[h.name] / h.share)
        seed = 1 + sum(r["harness"] == harness.name for r in records)
        record = one(harness, seconds, seed, keep)
        records.append(record)
        with log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        yield record


def one(harness: Harness, seconds: float, seed: int, keep: Path) -> dict[str, Any]:
    """A slice, and its record."""
    began = time.monotonic()
    output = keep / f"{harness.name.replace('/', '-')}-{seed}.log"
    keep.mkdir(parents=True, exist_ok=True)
    with output.open("wb") as file:
        child = subprocess.Popen(
            harness.command(seconds, seed, keep), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        status, usage = _wait(child.pid, seconds + PATIENCE)
    child.returncode = status
    text = output.read_text(errors="replace")
    counts = re.findall(rf"(\d+)\s+{harness.unit}\b", text) or re.findall(r"number_of_executed_units: (\d+)", text)
    details = {name: int(n) for n, name in re.findall(r"^ +(\d+)  (\S.*)$", text, re.MULTILINE)}  # of graphs
    if not status:
        output.unlink()
    return {
        "harness": harness.name, "seed": seed, harness.unit: int(counts[-1]) if counts else 0, "status": status,
        "cpu": round(usage, 2), "wall": round(time.monotonic() - began, 1), **({"log": str(output)} if status else {}),
        **({"counts": details} if details else {}),
    }  # fmt: skip


def _wait(pid: int, seconds: float) -> tuple[int, float]:
    """Exit status (-9 for one that hung) and processor seconds of a process with all its children."""
    end = time.monotonic() + seconds
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.2)


def read(log: Path) -> list[dict[str, Any]]:
    """Records of the slices so far."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def summary(records: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown."""
    lines = ["| harness | executions | processor seconds | failed slices |", "|---|---|---|---|"]
    for name in dict.fromkeys(r["harness"] for r in records):
        own = [r for r in records if r["harness"] == name]
        unit = "graphs" if "graphs" in own[0] else "executions"
        count, cpu, failed = sum(r[unit] for r in own), sum(r["cpu"] for r in own), sum(bool(r["status"]) for r in own)
        lines.append(
            f"| {name} | {count:,}{' graphs' if unit == 'graphs' else ''} | {cpu:,.0f} | {failed} of {len(own)} |"
        )
    details: Counter[str] = Counter()
    for record in records:
        details.update(record.get("counts", {}))
    lines.append(f"| all | | {sum(r['cpu'] for r in records):,.0f} | |")
    return "\n".join([*lines, "", *(f"- {name}: {number:,}" for name, number in sorted(details.items()))]).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("harness", nargs="*", help="these only: " + ", ".join(h.name for h in HARNESSES))
    parser.add_argument("--minutes", type=float, default=5, help="of processor time, all harnesses together")
    parser.add_argument("--log", type=Path, default=Path("fuzz/campaign.jsonl"))
    parser.add_argument("--keep", type=Path, default=Path("fuzz/failures"))
    parser.add_argument("--slice", type=float, help="seconds of one slice; so many that every harness has its turn")
    parser.add_argument("--resume", action="store_true", help="minutes in the log count")
    parser.add_argument("--summary", action="store_true", help="print what the log says, and run nothing")
    given = parser.parse_args()
    found = (
        HARNESSES if importlib.util.find_spec("atheris") else [h for h in HARNESSES if "--atheris" not in h.arguments]
    )
    found = [h for h in found if not given.harness or h.name in given.harness]
    if given.summary:
        print(summary(read(given.log)))
        return
    seconds = given.slice or min(max(30 * given.minutes / len(found), SLICE[0]), SLICE[1])
    failed = False
    for record in slices(given.log, given.minutes, found, seconds, given.keep, given.resume):
        failed = failed or bool(record["status"])
        print(json.dumps(record), flush=True)
    print(summary(read(given.log)))
    sys.exit(failed)


if __name__ == "__main__":
    main()
