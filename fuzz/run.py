"""`python -m fuzz.run TARGET... [--runs N | --seconds S] [--seed N] [--keep DIR] [--atheris] [--replay FILE]`; without TARGET, all of them.

Without atheris, seeds are damaged at random, without knowledge of coverage: quick, the same on every machine, part of the
test suite. With it (the extra `fuzz`; a target at a time) libFuzzer looks for inputs that reach new lines of the Python
code; what follows `--` goes to libFuzzer. An input that fails is written to `--keep`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path

from fuzz.targets import TARGETS, FuzzFailure

HANGS = 30.0  # seconds of processor time for one input
MEMORY = 4 << 30  # bytes of address space

READERS = tuple(  # whose coverage guides atheris
    f"sparsec.{name}"
    for name in ("loading.external_data", "manifest", "npz", "loading.reading", "rewriting.recipe", "tuning")
)


def fuzz(
    name: str, runs: int, seconds: float, seed: int, keep: Path | None = None, counts: Counter[str] | None = None
) -> Counter[str]:
    """Execute a target on damaged seeds: how often it did. Raises what a failing input raised."""
    counts = Counter() if counts is None else counts
    target = TARGETS[name]
    seeds = target.seeds()
    rng = random.Random(f"{name} {seed}")
    corpus = list(seeds)
    end = time.monotonic() + seconds
    for data in seeds:
        target.run(data)
    while counts["executions"] < runs and time.monotonic() < end:
        data = target.mutate(rng.choice(corpus), rng, seeds)
        try:
            began = _processor()
            target.run(data)
            if _processor() - began > HANGS:
                raise FuzzFailure(f"{_processor() - began:.0f} seconds of processor time")
        except BaseException:
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                path = keep / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
                path.write_bytes(data)
                print(f"{name}: fails on {path}", file=sys.stderr)
            raise
        counts["executions"] += 1
        if rng.random() < 0.05 and len(corpus) < 200:
            corpus.append(data)  # damage upon damage
    return counts


def _processor() -> float:
    """Seconds of this process and those that it waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def with_atheris(name: str, arguments: list[str], keep: Path) -> None:
    """Hand a target to libFuzzer; does not return."""
    import atheris

    with atheris.instrument_imports(include=["yaml", *READERS]):
        import sparsec.loading.load
        import sparsec.manifest
        import sparsec.npz
        import sparsec.rewriting.recipe
        import sparsec.tuning  # noqa: F401
    target = TARGETS[name]
    seeds = target.seeds()
    corpus = Path("fuzz/corpus", name)
    corpus.mkdir(parents=True, exist_ok=True)
    for data in seeds:
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)

    def custom(data: bytes, size: int, seed: int) -> bytes:
        return target.mutate(data, random.Random(seed), seeds)[:size]

    arguments = [f"-timeout={HANGS:.0f}", f"-artifact_prefix={keep}/{name}-", "-print_final_stats=1", *arguments]
    atheris.Setup([sys.argv[0], *arguments, str(corpus)], target.run, custom_mutator=custom)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="*", choices=[*TARGETS, []], help=", ".join(TARGETS))
    parser.add_argument("--runs", type=int, default=1 << 40)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz/failures"))
    parser.add_argument("--atheris", action="store_true")
    parser.add_argument("--replay", type=Path, help="execute one target on this file")
    given, rest = parser.parse_known_args()
    names = given.target or list(TARGETS)
    if given.replay is not None:
        TARGETS[names[0]].run(given.replay.read_bytes())
        return
    if given.atheris:
        more = [f"-max_total_time={int(given.seconds)}", f"-seed={given.seed}", *[a for a in rest if a != "--"]]
        given.keep.mkdir(parents=True, exist_ok=True)
        with_atheris(names[0], more, given.keep)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for name in names:
        start, used = time.monotonic(), time.process_time()
        counts: Counter[str] = Counter()
        try:
            fuzz(name, given.runs, given.seconds, given.seed, given.keep, counts)
        finally:
            times = f"{time.monotonic() - start:.0f} s, {time.process_time() - used:.0f} s of this process"
            print(f"{name:12} {counts['executions']:>9} executions, {times}", flush=True)


if __name__ == "__main__":
    main()
