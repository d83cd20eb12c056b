"""Program -> the files that are data: weights.bin, parity.bin, model.h, and the C table that the runtime walks.

Formats are described where they are read: weights.bin in `runtimes/c/weights.c`, parity.bin in `runtimes/c/bench.c`.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata, resources

import numpy as np

from sparsec.errors import BuildError
from sparsec.program import ALIGNMENT, MAX_ARGS, SLACK, Arg, Program, Tensor

WEIGHTS_FORMAT = 1
PARITY_FORMAT = 1
HEADER_BYTES = 64
MAX_RANK = 8
_CHECKSUM_FACTOR = 0x9E3779B97F4A7C15

# NumPy's names -> ONNX's TensorProto.DataType, which the C API uses too (runtimes/c/sparsec.h).
DTYPE_CODES = {
    "float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "bool": 9, "float16": 10,
    "float64": 11, "uint32": 12, "uint64": 13,
}  # fmt: skip


def c_prefix(name: str) -> str:
    """What a model called `name` puts before its C symbols: `mobilenet-v2.1x` -> `mobilenet_v2_1x`."""
    word = re.sub(r"[^0-9A-Za-z_]", "_", name)
    return word if re.match(r"[A-Za-z]", word) else f"model_{word}".rstrip("_")


def c_string(text: str) -> str:
    """`text` as a C string literal of printable ASCII; everything else, quotes and trigraphs too, as octal escapes."""
    plain = frozenset(b" !#$%&'()*+,-./0123456789:;<=>@ABCDEFGHIJKLMNOPQRSTUVWXYZ[]^_`abcdefghijklmnopqrstuvwxyz{|}~")
    data = text.encode("utf-8", "surrogateescape")
    return '"' + "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in data) + '"'


def checksum(payload: bytes) -> int:
    """The 64-bit checksum of runtimes/c/weights.c: a polynomial over the payload's 32-bit words."""
    words = np.frombuffer(payload, "<u4")
    chunk = 1 << 16
    powers = np.ones(chunk, np.uint64)
    powers[1:] = _CHECKSUM_FACTOR
    powers = np.multiply.accumulate(powers)  # K^0, K^1, ..., modulo 2^64
    total = 1
    for start in range(0, words.size, chunk):
        part = words[start : start + chunk].astype(np.uint64)
        scale = pow(_CHECKSUM_FACTOR, part.size, 1 << 64)
        total = (total * scale + int((part * powers[: part.size][::-1]).sum(dtype=np.uint64))) % (1 << 64)
    return total


def _up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def payload_bytes(program: Program) -> int:
    """Size of the weights, SLACK bytes behind the last included, a multiple of ALIGNMENT."""
    return _up(max([program.weights_bytes, ALIGNMENT, *(c.offset + c.data.nbytes + SLACK for c in program.constants)]))


def weights_payload(program: Program) -> bytes:
    """The constants at their offsets, zeros between and behind them: `payload_bytes`."""
    payload = np.zeros(payload_bytes(program), np.uint8)
    for constant in program.constants:
        data = np.ascontiguousarray(constant.data).reshape(-1).view(np.uint8)
        payload[constant.offset : constant.offset + data.size] = data
    return payload.tobytes()


def weights_blob(program: Program, digest: bytes) -> bytes:
    """weights.bin: a 64-byte header and the payload. `digest`: 32 bytes, the same in `program_source`."""
    if len(digest) != 32:
        raise BuildError(f"a digest has 32 bytes, got {len(digest)}", "weights.bin")
    payload = weights_payload(program)
    head = struct.pack("<8sIIQQ", b"SPARSECW", WEIGHTS_FORMAT, HEADER_BYTES, len(payload), checksum(payload))
    return head + digest + payload


def arena_bytes(program: Program) -> int:
    """Bytes of activations, slack included, a multiple of ALIGNMENT."""
    return _up(max([program.arena_bytes, ALIGNMENT, *(b.offset + b.size + SLACK for b in program.buffers)]))


def scratch_bytes(program: Program) -> int:
    """Bytes of one worker's scratch, slack included, a multiple of ALIGNMENT; 0 where no step uses scratch."""
    used = program.scratch_bytes or any(a.space == "scratch" for s in program.steps for a in s.args)
    return _up(program.scratch_bytes + SLACK) if used else 0


def place(arg: Arg) -> str:
    """C text of a `sparsec_place`."""
    return f"SPARSEC_{arg.space.upper()}({arg.offset})"


def _port(tensor: Tensor) -> str:
    if tensor.dtype not in DTYPE_CODES:
        known = ", ".join(DTYPE_CODES)
        raise BuildError(f"element type {tensor.dtype} is not one of {known}", tensor.name)
    if len(tensor.shape) > MAX_RANK:
        raise BuildError(f"has {len(tensor.shape)} dimensions, at most {MAX_RANK} are supported", tensor.name)
    dims = [*tensor.shape, *[1] * (MAX_RANK - len(tensor.shape))]
    code, rank = DTYPE_CODES[tensor.dtype], len(tensor.shape)
    scale, zero = (
        (1.0, 0) if tensor.quantization is None else (tensor.quantization.scale, tensor.quantization.zero_point)
    )
    numbers = f"{float(np.float32(scale))!r}F, {zero}"  # all digits: the nearest float32 is this one
    fields = f"{c_string(tensor.name)}, {code}, {rank}, {{{', '.join(map(str, dims))}}}, {tensor.size}, {numbers}"
    return f"    {{{{{fields}}}, {place(tensor.location)}}},"


def _array(kind: str, name: str, rows: list[str], default: str) -> list[str]:
    """A C array of at least one element: C11 has no empty ones."""
    return [f"static const {kind} {name}[] = {{", *(rows or [default]), "};", ""]


def sparsec_version() -> str:
    """Version of the installed package."""
    return metadata.version("sparsec")


def program_source(
    program: Program, kernel_prefix: str, digest: bytes, *, threads: int = 1, embedded_bytes: int = 0
) -> str:
    """The generated C table of `program`. Kernels are external functions called `kernel_prefix` + name.

    A program for a CUDA device has its steps in a table of its own (`sparsec.cuda.table`).
    `embedded_bytes`: size of the symbol `sparsec_embedded_weights`, 0 where weights are a file.
    """
    for kernel in program.kernels:
        if not re.fullmatch(r"[A-Za-z_][0-9A-Za-z_]*", kernel.name):
            raise BuildError(f"{kernel.name!r} is not a C identifier", "kernel")
    if not 1 <= threads <= 256:
        raise BuildError(f"expected 1 to 256, got {threads}", "threads")
    lines = ['#include "internal.h"', "", "#pragma GCC visibility push(hidden)"]
    on_cpu = program if program.target.gpu is None else replace(program, kernels=(), steps=())
    lines += [f"sparsec_kernel {kernel_prefix}{kernel.name};" for kernel in on_cpu.kernels]
    if embedded_bytes:
        lines.append(f"extern const unsigned char sparsec_embedded_weights[{embedded_bytes}];")
    lines += ["#pragma GCC visibility pop", ""]
    steps = []
    for step in on_cpu.steps:
        if len(step.args) > MAX_ARGS:
            raise BuildError(f"a step takes at most {MAX_ARGS} pointers, got {len(step.args)}", step.kernel)
        places = [*map(place, step.args), *["SPARSEC_NOWHERE"] * (MAX_ARGS - len(step.args))]
        steps.append(f"    {{{kernel_prefix}{step.kernel}, {step.tiles}, {{{', '.join(places)}}}}},")
    lines += _array("sparsec_step", "steps", steps, "    {0}")
    lines += _array("sparsec_port", "inputs", [_port(t) for t in program.inputs], "    {{0}, 0}")
    lines += _array("sparsec_port", "outputs", [_port(t) for t in program.outputs], "    {{0}, 0}")
    lines += [
        "const sparsec_table sparsec_program = {",
        f"    .version = {c_string(sparsec_version())},",
        f"    .features = {c_string(' '.join(program.target.features))},",
        f"    .digest = {{{', '.join(map(str, digest))}}},",
        f"    .weights_bytes = {payload_bytes(program)},",
        f"    .arena_bytes = {arena_bytes(program)},",
        f"    .scratch_bytes = {scratch_bytes(program)},",
        f"    .threads = {threads},",
        f"    .steps_count = {len(on_cpu.steps)},",
        f"    .inputs_count = {len(program.inputs)},",
        f"    .outputs_count = {len(program.outputs)},",
        "    .steps = steps,",
        "    .inputs = inputs,",
        "    .outputs = outputs,",
        f"    .embedded = {'sparsec_embedded_weights' if embedded_bytes else '0'},",
        f"    .embedded_bytes = {embedded_bytes},",
        "};",
    ]
    return "\n".join(lines) + "\n"


def program_digest(program: Program, objects: Sequence[bytes]) -> bytes:
    """SHA-256 over everything that must fit together: the table, the weights, the kernels' code."""
    digest = hashlib.sha256(program_source(program, "", bytes(32)).encode())
    for part in (weights_payload(program), *objects):
        digest.update(hashlib.sha256(part).digest())
    return digest.digest()


def model_header(name: str, cuda: bool = False) -> str:
    """model.h: the API of runtimes/c/sparsec.h under the model's prefix. cuda: with what only models for CUDA have."""
    text = resources.files("sparsec.runtimes.c").joinpath("sparsec.h").read_text(encoding="utf-8")
    types = text.split("/* types: begin */\n")[1].split("/* types: end */\n")[0]
    sections = ("functions", "cuda") if cuda else ("functions",)
    parts = [text.split(f"/* {s}: begin */\n")[1].split(f"/* {s}: end */\n")[0] for s in sections]
    functions = "\n".join(parts).replace("SPARSEC_API ", "")
    names = re.findall(r"\b(sparsec_\w+)\(", functions)
    prefix = c_prefix(name)
    guard = f"{prefix.upper()}_SPARSEC_H"
    aliases = "\n".join(f"#define {prefix}_{function} {function}" for function in names)
    for function in names:
        functions = re.sub(rf"\b{function}\(", f"{prefix}_{function}(", functions)
    return f"""/* A model compiled by sparsec {sparsec_version()}.
 * Link libmodel.a; or define SPARSEC_SHARED and link libmodel.so.
 *
 * One model instance is used by one thread at a time; different instances, of the same or of different models, are
 * independent of each other. Nothing is allocated after `open`; the library has no global mutable state, prints
 * nothing and never exits the process.
 */
#ifndef {guard}
#define {guard}

{types}
#ifdef SPARSEC_SHARED /* libmodel.so exports the same functions without the model's name */
{aliases}
#endif

#ifdef __cplusplus
extern "C" {{
#endif

{functions}
#ifdef __cplusplus
}}
#endif
#endif
"""


def pack_parity(inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray], tolerances: Sequence[float]) -> bytes:
    """parity.bin: one sample's inputs and expected outputs in signature order, raw and little-endian.

    `tolerances`: for each output, the largest max |difference| / max |reference| that passes.
    """
    if len(tolerances) != len(outputs):
        raise BuildError(f"expected {len(outputs)} tolerances, got {len(tolerances)}", "parity.bin")

    def raw(arrays: Sequence[np.ndarray]) -> bytes:
        return b"".join(np.ascontiguousarray(a, a.dtype.newbyteorder("<")).tobytes() for a in arrays)

    ins, outs = raw(inputs), raw(outputs)
    head = struct.pack("<8sIIQQ", b"SPARSECP", PARITY_FORMAT, len(outputs), len(ins), len(outs))
    return head.ljust(HEADER_BYTES, b"\0") + np.asarray(tolerances, "<f4").tobytes() + ins + outs
