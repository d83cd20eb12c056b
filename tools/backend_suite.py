"""Run every node test of `onnx.backend.test` against sparsec and compare with tests/backend/expected_failures.txt.

    python tools/backend_suite.py --jobs 2 --table docs/operators.md

Exit code 1 if a result is wrong or the file says something else. `--record` rewrites the file: what is refused goes in,
with the reason given, what passes goes out; a wrong result is never recorded.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from backend.cases import EXPECTED, Outcome, collected, expected_failures, run, unexpected  # noqa: E402

HEAD = """# Operators

Node tests of `onnx.backend.test` that sparsec passes as a backend, by operator: those of the standard domain up to opset 26 whose inputs
and outputs are float16/32/64, integer or bool tensors. Made by `python tools/backend_suite.py --table docs/operators.md`.

{share} No result is wrong: what does not pass is refused, with the reason given. By rounding: elements
differ by more than the test's tolerance, and are no farther from the result in float64 than ONNX's own.

| operator | passed | of | refused, and why |
|---|---|---|---|
"""


def outcomes(jobs: int, limit: int) -> list[Outcome]:
    """Of every test, in order; `jobs` processes, each with its part."""
    command = [sys.executable, "-W", "ignore", __file__, "--limit", str(limit), "--part"]
    found: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:  # pipes would fill while another one is read
        files = [Path(folder, f"{i}.jsonl") for i in range(jobs)]
        running = []
        for i, file in enumerate(files):
            with file.open("wb") as stream:
                running.append(subprocess.Popen([*command, f"{i}/{jobs}"], stdout=stream, cwd=ROOT))
        for process, file in zip(running, files, strict=True):
            process.wait()
            for line in file.read_text(encoding="utf-8").splitlines():
                if line.startswith("{"):
                    outcome = Outcome(**json.loads(line))
                    found[outcome.name] = outcome
    return [found.get(name, Outcome(name, "", "wrong", "the process ended")) for name in _names(limit)]


def _names(limit: int) -> list[str]:
    return list(collected())[: limit or None]


def table(results: list[Outcome], reasons: dict[str, str]) -> str:
    """docs/operators.md."""
    rows = collections.defaultdict(list)
    for outcome in results:
        rows[outcome.operator].append(outcome)
    passed = sum(outcome.passed for outcome in results)
    share = f"**{passed} of {len(results)} pass, {100 * passed / len(results):.1f} %.**"
    lines = [HEAD.format(share=share)]
    for operator, group in sorted(rows.items()):
        why = collections.Counter(reasons.get(o.name, o.why) for o in group if not o.passed)
        text = "; ".join(f"{reason} ({count})" if count > 1 else reason for reason, count in why.items())
        rounded = sum(outcome.kind == "rounding" for outcome in group)
        text = "; ".join(filter(None, [f"{rounded} by rounding" if rounded else "", text]))
        count = sum(outcome.passed for outcome in group)
        lines.append(f"| {operator} | {count} | {len(group)} | {text.replace('|', ' or ')} |\n")
    return "".join(lines)


def record(results: list[Outcome], entries: dict[str, str]) -> None:
    """Write the file anew; reasons that stand in it stay."""
    head = [line for line in EXPECTED.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    body = [f"{o.name}: {entries.get(o.name) or _short(o.why)}" for o in results if o.kind == "refused"]
    EXPECTED.write_text("\n".join([*head, "", *sorted(body)]) + "\n", encoding="utf-8")


def _short(why: str) -> str:
    """The reason without what only names the node."""
    return re.sub(r"^.*?nodes?: \S+ \(\w+\): |^model: ", "", why)[:160]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=int, default=0, help="only the first N tests")
    parser.add_argument("--table", type=Path, help="write docs/operators.md")
    parser.add_argument("--record", action="store_true", help="write the expected failures anew")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part, parts = map(int, options.part.split("/"))
        for outcome in run(_names(options.limit)[part::parts]):
            print(json.dumps(vars(outcome)), flush=True)
        return 0
    results = outcomes(options.jobs, options.limit)
    entries = expected_failures()
    if options.record:
        record(results, entries)
        entries = expected_failures()
    if options.table:
        options.table.write_text(table(results, entries), encoding="utf-8")
    problems = unexpected(results, entries)
    counts = collections.Counter(outcome.kind for outcome in results)
    print(f"{len(results)} tests: " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    print(f"{100 * sum(o.passed for o in results) / max(1, len(results)):.1f} % pass")
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
