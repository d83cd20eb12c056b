"""The device part of a program as sources for the linker: cubin and PTX as data, the table of launches as C."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparsec.cuda.nvrtc import compile_cuda
from sparsec.cuda.source import cuda_source
from sparsec.cuda.table import cuda_table, device_kernels
from sparsec.program import Program

# The device's code as read-only data of the host's.
_EMBED = """\
    .section .rodata.sparsec_cuda, "a"
    .globl sparsec_cuda_cubin
    .hidden sparsec_cuda_cubin
    .globl sparsec_cuda_ptx
    .hidden sparsec_cuda_ptx
    .balign 64
sparsec_cuda_cubin:
    .incbin "device.cubin"
    .balign 64
sparsec_cuda_ptx:
    .incbin "device.ptx"
    .byte 0
    .section .note.GNU-stack, "", %progbits
"""


@dataclass(frozen=True)
class DeviceCode:
    """What goes into the library for the device: sources in the work folder, and the bytes that they stand for."""

    sources: tuple[str, ...]
    parts: tuple[bytes, ...]


def device_code(program: Program, work: Path, kernel_prefix: str, say: Callable[[str], None]) -> DeviceCode:
    """Compile the device kernels of `program` into the folder `work`. Raises BuildError."""
    kernels, arch = device_kernels(program), program.target.cpu
    cubin, ptx = b"", b""
    if kernels:
        say(f"writing {len(kernels)} kernels for {arch}")
        text = cuda_source(kernels, arch)
        say(f"compiling {len(kernels)} kernels for {arch}")
        cubin, ptx = compile_cuda(text, arch)
    (work / "device.cubin").write_bytes(cubin)
    (work / "device.ptx").write_bytes(ptx.rstrip(b"\0"))
    (work / "device_code.S").write_text(_EMBED, encoding="utf-8")
    table = cuda_table(program, kernel_prefix, len(cubin))
    (work / "device.c").write_text(table, encoding="utf-8")
    return DeviceCode(("device.c", "device_code.S"), (cubin, ptx, table.encode()))
