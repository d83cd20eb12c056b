"""Arm without an Arm machine: instructions retired for one inference, and cycles of the hot loops by llvm-mca.

Instructions: the artifact's static `bench` runs under a counting emulator, n and n + 1 inferences; the difference is one
inference. The counter is any command that runs a program and prints `insns N fma N load N store N` on stderr.
Cycles: the innermost loops with multiply-adds, taken from the kernels' object, priced by llvm-mca.
"""

from __future__ import annotations

import inspect
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sparsec
from bench.models import Missing, find_case, prepare
from bench.turns import Say
from sparsec.building.codegen import compile_kernels
from sparsec.errors import SparsecError
from sparsec.loading.load import load_model
from sparsec.lowering import lower
from sparsec.targets import Target, find_target

CASES = ("mbv1-dense", "mbv1-80-4x1", "mbv1-80-1x1")
CYCLE_CASES = ("mbv1-dense", "mbv1-80-4x1")
# CPU: whose schedule llvm-mca has for its core. LLVM prices cortex-a76 as an A57; the Neoverse N1 is an A76 for servers,
# with a schedule of its own since LLVM 17.
CPUS = {"cortex-a55": "cortex-a55", "cortex-a76": "neoverse-n1"}
TOP = 8  # kernels listed; the mean is over all, by predicted time
COUNT_SECONDS = 600

# Other engines' aarch64 wheels on the same network, counted the same way (dense unless said), in millions.
PEERS = (
    ("ONNX Runtime 1.31", 246.4, 147.9),
    ("LiteRT 2.3 (XNNPACK)", 202.1, 144.9),
    ("MNN 3.6", 172.0, 131.8),
    ("MNN 3.6, 80% 4x1 (--detectSparseSpeedUp)", 101.8, 34.7),
    ("MNN 3.6, 80% unstructured (--detectSparseSpeedUp)", 93.7, 34.7),
)


# --- instructions ---------------------------------------------------------------------------------------------------


def parse_counts(text: str) -> dict[str, int]:
    """The last `insns N fma N load N store N` line.

    >>> parse_counts("noise\\ninsns 10 fma 4 load 3 store 1\\n")
    {'insns': 10, 'fma': 4, 'load': 3, 'store': 1}
    """
    lines = [line for line in text.splitlines() if re.fullmatch(r"(\w+ \d+ ?)+", line.strip()) and "insns" in line]
    if not lines:
        raise Missing("the counter printed no `insns N fma N load N store N`")
    words = lines[-1].split()
    return {name: int(number) for name, number in zip(words[::2], words[1::2], strict=True)}


def count(program: Path, counter: str) -> dict[str, int]:
    """Instructions of one inference of an artifact's `bench`."""

    def run(runs: int) -> dict[str, int]:
        command = [*shlex.split(counter), str(program), "--runs", str(runs), "--warmup", "0", "--no-check", "--json"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COUNT_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Missing(f"the counter does not run: {error}") from error
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise Missing(f"the counter fails: {lines[-1] if lines else f'exit status {done.returncode}'}")
        return parse_counts(done.stderr)

    one, two = run(1), run(2)
    return {key: two[key] - one[key] for key in one}


def instructions(counter: str, say: Say) -> dict[str, Any]:
    """Counts by case and precision."""
    if not counter:
        return {"missing": "no counter: give --icount COMMAND (docs/benchmarks/README.md)"}
    half = "precision" in inspect.signature(sparsec.compile).parameters
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="sparsec-bench-") as folder:
        for name in CASES:
            for precision in ("f32", "f16"):
                key = f"{name} {precision}"
                options: dict[str, Any] = {} if precision == "f32" else {"precision": precision}
                if options and not half:
                    found[key] = {"missing": "this version compiles to float32 only"}
                    continue
                say(f"Arm instructions: {key}")
                try:
                    output = Path(folder, f"{name}-{precision}.sparsec")
                    artifact = sparsec.compile(
                        prepare(find_case(name)).model, "arm", os="linux", output=output, **options
                    )
                    found[key] = count(artifact.path / "bench", counter)
                except (Missing, SparsecError) as error:
                    found[key] = {"missing": str(error)}
    return found


# --- cycles ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its instructions, the backward branch last."""

    body: tuple[str, ...]

    @property
    def fmas(self) -> int:
        """Vector multiply-adds of one iteration."""
        return sum(line.split()[0] in ("fmla", "fmls") for line in self.body)

    @property
    def text(self) -> str:
        """Assembly in which every branch goes to the loop's head."""
        return ".Lhead:\n" + "\n".join(re.sub(r"0x[0-9a-f]+( <.*>)?$", ".Lhead", line) for line in self.body) + "\n"


_LINE = re.compile(r"\s*([0-9a-f]+):\s+(\S.*)")
_BRANCH = re.compile(r"(?:b\.\w+|cbn?z|tbn?z)\s.*?0x([0-9a-f]+)")


def innermost_loops(assembly: str) -> list[Loop]:
    """Loops of one function's disassembly (llvm-objdump) that hold no other loop."""
    lines = [(int(m[1], 16), " ".join(m[2].split())) for m in map(_LINE.match, assembly.splitlines()) if m]
    position = {address: i for i, (address, _) in enumerate(lines)}
    spans = []
    for i, (_, text) in enumerate(lines):
        branch = _BRANCH.match(text)
        target = position.get(int(branch[1], 16)) if branch else None
        if target is not None and target <= i:
            spans.append((target, i))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [Loop(tuple(text for _, text in lines[start : end + 1])) for start, end in inner]


def loop_cycles(loop: Loop, cpu: str, attributes: str) -> float:
    """Cycles of one iteration, by llvm-mca over many. Raises Missing."""
    command = [
        tool("llvm-mca"),
        "-mtriple=aarch64",
        f"-mcpu={CPUS[cpu]}",
        f"-mattr={attributes}",
        "-iterations=200",
        "-",
    ]
    done = subprocess.run(command, input=loop.text, capture_output=True, text=True, check=False)
    found = dict(re.findall(r"^(Iterations|Total Cycles):\s+(\d+)", done.stdout, re.MULTILINE))
    if done.returncode or len(found) != 2:
        lines = done.stderr.strip().splitlines()
        raise Missing(f"llvm-mca: {lines[0] if lines else f'exit status {done.returncode}'}")
    return int(found["Total Cycles"]) / int(found["Iterations"])


def tool(name: str) -> str:
    """The newest `name-NN` on the PATH, else `name`, else nothing."""
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    found = {int(path.name.rpartition("-")[2]): path for folder in folders for path in folder.glob(f"{name}-[0-9]*")}
    return str(found[max(found)]) if found else shutil.which(name) or ""


_ATTRIBUTES = "+v8.2a,+dotprod,+fullfp16"


def peak_cycles(target: Target) -> float:
    """Cycles of one vector multiply-add at best: as llvm-mca has 24 independent ones, but not below the target's own."""
    loop = Loop(tuple(f"fmla v{i}.4s, v30.4s, v31.s[0]" for i in range(24)))
    return max(1 / target.machine.fma, loop_cycles(loop, target.cpu, _ATTRIBUTES) / loop.fmas)


def hot_loops(name: str, target: Target) -> dict[str, Any]:
    """For the layers with multiply-adds: cycles a multiply-add of the largest inner loop, and its share of the peak."""
    program = lower(load_model(prepare(find_case(name)).model), target, "bench")
    with tempfile.TemporaryDirectory(prefix="sparsec-bench-") as folder:
        compile_kernels(program.kernels, target, Path(folder, "kernels.o"))
        command = [tool("llvm-objdump"), "-d", "--no-show-raw-insn", f"--mattr={_ATTRIBUTES}", "kernels.o"]
        listing = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^[0-9a-f]+ <(\S+)>:$", listing, flags=re.MULTILINE)
    functions = dict(zip(parts[1::2], parts[2::2], strict=True))
    best = peak_cycles(target)
    rows: dict[str, dict[str, Any]] = {}
    for layer in program.layers:
        if layer.kernel in rows:
            rows[layer.kernel]["layers"] += 1
            rows[layer.kernel]["predicted_us"] += layer.predicted_us
            continue
        loops = [loop for loop in innermost_loops(functions.get(layer.kernel, "")) if loop.fmas]
        if not loops:
            continue
        loop = max(loops, key=lambda loop: loop.fmas)
        each = loop_cycles(loop, target.cpu, _ATTRIBUTES) / loop.fmas
        rows[layer.kernel] = {
            "kernel": layer.kernel, "first_layer": layer.name, "layers": 1, "instructions": len(loop.body),
            "fmas": loop.fmas, "cycles_per_fma": round(each, 3), "share_of_peak": round(min(1.0, best / each), 3),
            "predicted_us": layer.predicted_us,
        }  # fmt: skip
    ordered = sorted(rows.values(), key=lambda row: -row["predicted_us"])
    total = sum(row["predicted_us"] for row in ordered)
    mean = sum(row["share_of_peak"] * row["predicted_us"] for row in ordered) / total if total else 0.0
    for row in ordered:
        row["predicted_us"] = round(row["predicted_us"], 1)
    return {"loops": ordered[:TOP], "mean_share_of_peak": round(mean, 3), "peak_cycles_per_fma": round(best, 3)}


def cycles(say: Say) -> dict[str, Any]:
    """Hot loops by case and CPU."""
    lacking = [name for name in ("llvm-mca", "llvm-objdump") if not tool(name)]
    if lacking:
        return {"missing": f"{' and '.join(lacking)} not on the PATH (Debian: apt-get install llvm)"}
    version = subprocess.run([tool("llvm-mca"), "--version"], capture_output=True, text=True, check=False).stdout
    number = re.search(r"LLVM version (\S+)", version)
    found: dict[str, Any] = {"llvm": number[1] if number else "unknown", "cases": {}}
    for name in CYCLE_CASES:
        for cpu in CPUS:
            say(f"Arm cycles: {name} on {cpu}")
            try:
                found["cases"][f"{name} {cpu}"] = hot_loops(name, find_target("arm", cpu, "linux"))
            except (Missing, SparsecError) as error:
                found["cases"][f"{name} {cpu}"] = {"missing": str(error)}
    return found


def measure(counter: str, say: Say) -> dict[str, Any]:
    """Instructions and cycles, and the peers' instructions beside them."""
    peers = [{"engine": name, "insns": int(1e6 * all_), "fma": int(1e6 * fma)} for name, all_, fma in PEERS]
    return {"instructions": instructions(counter, say), "peers": peers, "cycles": cycles(say)}
