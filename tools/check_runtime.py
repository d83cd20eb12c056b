"""The C runtime under valgrind and gcc's sanitizers: `python tools/check_runtime.py MODEL.onnx [--pass SPEC]...`

A dynamic gcc build (valgrind sees no leaks in static musl programs) of the runtime, the model's tables and its kernels,
the latter for x86-64-v3 (valgrind knows no AVX-512). `check_runtime.c` drives it: several instances, threads, memory of
every alignment, damaged weights; then `bench` compares with ONNX Runtime. Kernels are not instrumented by the
sanitizers; under valgrind they are seen.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparsec.building.build import KERNEL_PREFIX, LIBRARY_SOURCES, kernel_object, runtime_sources
from sparsec.building.emit import pack_parity, program_digest, program_source, weights_blob
from sparsec.program import Program
from sparsec.targets import find_target

CPU = "x86-64-v3"
WARNINGS = ("-std=c11", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror")
MODES = {
    "valgrind": ("-O1",),
    "address": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    "thread": ("-O1", "-fsanitize=thread"),
    "thread-without-futex": ("-O1", "-fsanitize=thread", "-DSPARSEC_NO_FUTEX"),
}


def prepare(
    program: Program,
    inputs: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    tolerances: Sequence[float],
    folder: Path,
) -> None:
    """Everything that a build needs, into `folder`: runtime, tables, kernels, weights, one sample."""
    runtime_sources(folder)
    shutil.copy(Path(__file__).with_suffix(".c"), folder / "check.c")
    code = kernel_object(program, folder / "kernels.o")
    digest = program_digest(program, [code])
    (folder / "program.c").write_text(program_source(program, KERNEL_PREFIX, digest), encoding="utf-8")
    (folder / "weights.bin").write_bytes(weights_blob(program, digest))
    (folder / "parity.bin").write_bytes(pack_parity(inputs, outputs, tolerances))
    (folder / "inputs").write_bytes(b"".join(np.ascontiguousarray(x).tobytes() for x in inputs))


def check(folder: Path, mode: str) -> tuple[int, str]:
    """(exit status, what the tool said) of the driver and of bench, built by gcc for `mode` in a prepared `folder`."""
    runtime = [*LIBRARY_SOURCES, "program.c"]
    said = ""
    tool = ["valgrind", "--quiet", "--leak-check=full", "--show-leak-kinds=all", "--errors-for-leak-kinds=all"]
    tool = [*tool, "--error-exitcode=99"] if mode == "valgrind" else []
    for main, arguments in (("check.c", ["weights.bin", "inputs"]), ("bench.c", ["--runs", "2", "--threads", "4"])):
        command = [
            "gcc",
            *WARNINGS,
            "-g",
            *MODES[mode],
            main,
            *runtime,
            "kernels.o",
            "-o",
            f"run-{mode}",
            "-lm",
            "-lpthread",
        ]
        built = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if built.returncode:
            return built.returncode, built.stderr
        command = [*tool, str(folder / f"run-{mode}"), *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        said += done.stdout + done.stderr
        if done.returncode:
            return done.returncode, said
    return 0, said


def lower_model(model: str, passes: Sequence[str], folder: Path) -> None:
    """Prepare `folder` for an ONNX file."""
    from sparsec.compiler import rewrite
    from sparsec.loading.load import model_bytes
    from sparsec.lowering import lower
    from sparsec.ports import InputSpec
    from sparsec.proving.samples import parity_sample
    from sparsec.proving.tolerance import tolerances

    target = find_target("host", CPU)
    rewritten = rewrite(model, passes=passes)
    program = lower(rewritten, target, Path(model).stem)
    specs = [InputSpec(t.name, t.shape, t.dtype) for t in program.inputs]
    inputs, outputs = parity_sample(model_bytes(rewritten), specs, None)
    allowed = tolerances(rewritten, target)
    prepare(program, inputs, outputs, [allowed[t.name] for t in program.outputs], folder)


def main() -> int:
    """The command line. Exit status 0: every mode is clean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pass", action="append", default=[], dest="passes", metavar="SPEC")
    parser.add_argument("--mode", action="append", choices=list(MODES))
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        lower_model(options.model, options.passes, Path(folder))
        for mode in options.mode or MODES:
            status, said = check(Path(folder), mode)
            print(f"{mode}: {'clean' if status == 0 else f'FAILED ({status})'}\n{said}", flush=True)
            failed |= status != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
