"""Program -> model.wasm, model.js, model.d.ts, weights.bin: what an artifact for browsers and Node holds.

The module is the C runtime, the generated table and the kernels, linked against wasi-libc for `malloc` and the functions
of math.h. It imports nothing: weights and tensors are put into its memory by model.js (`runtimes/js/model.js`), which is
the same file for every model and reads names, shapes and types from manifest.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path

from sparsec.building.build import (
    COMMON_SOURCES,
    EXPORTS,
    HEADERS,
    KERNEL_PREFIX,
    compile_sources,
    run_zig,
    runtime_objects,
    runtime_sources,
)
from sparsec.building.codegen import compile_kernels
from sparsec.building.emit import program_digest, program_source, weights_blob
from sparsec.errors import UsageError
from sparsec.program import Program, Tensor

SOURCES = ("runtime.c", *COMMON_SOURCES, "alone.c")
STACK_BYTES = 1 << 18
ARRAYS = {
    "float32": "Float32Array", "float64": "Float64Array", "float16": "Uint16Array", "int8": "Int8Array",
    "uint8": "Uint8Array", "bool": "Uint8Array", "int16": "Int16Array", "uint16": "Uint16Array", "int32": "Int32Array",
    "uint32": "Uint32Array", "int64": "BigInt64Array", "uint64": "BigUint64Array",
}  # fmt: skip


def build_wasm(
    program: Program, work: Path, directory: Path, threads: int, embed_weights: bool, say: Callable[[str], None]
) -> None:
    """Write the files of a WebAssembly artifact into `directory`; `work`: an empty folder. Raises BuildError, UsageError."""
    if threads > 1:
        raise UsageError(f"the target {program.target.name!r} runs on one thread, got {threads}", "--threads")
    if embed_weights:
        raise UsageError(f"the target {program.target.name!r} keeps weights in weights.bin", "--embed-weights")
    target = program.target
    runtime_sources(work, HEADERS)
    say(f"compiling {len(program.kernels)} kernels for {target.cpu}")
    kernels = tuple(replace(kernel, name=KERNEL_PREFIX + kernel.name) for kernel in program.kernels)
    compile_kernels(kernels, target, work / "kernels.o")

    say("writing weights")
    digest = program_digest(program, [(work / "kernels.o").read_bytes()])
    (directory / "weights.bin").write_bytes(weights_blob(program, digest))
    (work / "program.c").write_text(program_source(program, KERNEL_PREFIX, digest), encoding="utf-8")
    compile_sources(work, ["program.c"], target.zig_triple)
    objects = ["program.o", "kernels.o", *runtime_objects(target.zig_triple, SOURCES, work / "runtime")]

    say("linking")
    command = ["cc", "-target", target.zig_triple, "-mexec-model=reactor", "-s", "-o", "model.wasm", *objects, "-lm"]
    command += ["-Wl,--no-entry", "-Wl,--gc-sections", f"-Wl,-z,stack-size={STACK_BYTES}"]
    command += [
        f"-Wl,--export={name}" for name in (*(n for n in EXPORTS if n != "sparsec_open_file"), "malloc", "free")
    ]
    run_zig(command, work)
    (directory / "model.wasm").write_bytes((work / "model.wasm").read_bytes())
    (directory / "model.js").write_bytes(resources.files("sparsec.runtimes.js").joinpath("model.js").read_bytes())
    (directory / "model.d.ts").write_text(declarations(program), encoding="utf-8")


def declarations(program: Program) -> str:
    """model.d.ts: the types of model.js with this model's inputs and outputs."""

    def fields(tensors: tuple[Tensor, ...]) -> str:
        lines = [f"  /** {_comment(t)} */\n  {json.dumps(t.name)}: {ARRAYS[t.dtype]};" for t in tensors]
        return "\n".join(lines)

    head = resources.files("sparsec.runtimes.js").joinpath("model.d.ts").read_text(encoding="utf-8")
    sides = (("Inputs", program.inputs), ("Outputs", program.outputs))
    return "\n".join(f"export interface {name} {{\n{fields(tuple(tensors))}\n}}\n" for name, tensors in sides) + head


def _comment(tensor: Tensor) -> str:
    shape = " x ".join(map(str, tensor.shape)) or "a scalar"
    return f"{tensor.dtype}, {shape}"
