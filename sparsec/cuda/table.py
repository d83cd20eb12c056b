"""Program -> the C table of its device part, `sparsec_cuda` of `runtimes/c/cuda.h`.

A step launches a kernel of the cubin, or calls a kernel on the host. For those the table says which bytes of the arena go
down to the host's mirror before it and up to the device after it: what the kernel loads and what it stores.
"""

from __future__ import annotations

from sparsec.building.codegen import argument_bytes
from sparsec.building.emit import c_string, place
from sparsec.errors import BuildError
from sparsec.kernels.cuda.emit import MAX_GRID, MAX_THREADS
from sparsec.lowering.loops import accesses_of
from sparsec.program import MAX_ARGS, Kernel, Program, Step


def device_kernels(program: Program) -> tuple[Kernel, ...]:
    """Kernels that run on the device, in the order of the table."""
    return tuple(kernel for kernel in program.kernels if kernel.launch is not None)


def host_kernels(program: Program) -> tuple[Kernel, ...]:
    """Kernels that run on the processor beside it."""
    return tuple(kernel for kernel in program.kernels if kernel.launch is None)


def cuda_table(program: Program, kernel_prefix: str, cubin_bytes: int) -> str:
    """C text that defines `sparsec_cuda`. Host kernels are functions called `kernel_prefix` + name.

    The symbols `sparsec_cuda_cubin` [cubin_bytes] and `sparsec_cuda_ptx` are defined elsewhere.
    """
    kernels = device_kernels(program)
    index = {kernel.name: i for i, kernel in enumerate(kernels)}
    own = {kernel.name: kernel for kernel in program.kernels}
    names = [f"    {c_string(kernel.name)}," for kernel in kernels]
    steps = [_step(step, own[step.kernel], index.get(step.kernel, -1), kernel_prefix) for step in program.steps]
    lines = [
        '#include "cuda.h"',
        "",
        "#pragma GCC visibility push(hidden)",
        *(f"sparsec_kernel {kernel_prefix}{kernel.name};" for kernel in host_kernels(program)),
        f"extern const unsigned char sparsec_cuda_cubin[{max(cubin_bytes, 1)}];",
        "extern const char sparsec_cuda_ptx[];",
        "#pragma GCC visibility pop",
        "",
        "static const char *const kernel_names[] = {",
        *(names or ["    0,"]),
        "};",
        "",
        "static const sparsec_cuda_step cuda_steps[] = {",
        *(steps or ["    {0},"]),
        "};",
        "",
        "const sparsec_cuda_table sparsec_cuda = {",
        f"    .arch = {c_string(program.target.cpu)},",
        "    .cubin = sparsec_cuda_cubin,",
        f"    .cubin_bytes = {cubin_bytes},",
        "    .ptx = sparsec_cuda_ptx,",
        f"    .kernels_count = {len(kernels)},",
        f"    .steps_count = {len(program.steps)},",
        "    .kernel_names = kernel_names,",
        "    .steps = cuda_steps,",
        "};",
    ]
    return "\n".join(lines) + "\n"


def _step(step: Step, kernel: Kernel, index: int, kernel_prefix: str) -> str:
    if len(step.args) > MAX_ARGS:
        raise BuildError(f"a step takes at most {MAX_ARGS} pointers, got {len(step.args)}", step.kernel)
    places = _padded([place(arg) for arg in step.args], "SPARSEC_NOWHERE")
    if kernel.launch is not None:
        grid, block = kernel.launch.grid, kernel.launch.block
        threads = block[0] * block[1] * block[2]
        if threads > MAX_THREADS or any(not 0 < g <= most for g, most in zip(grid, MAX_GRID, strict=True)):
            raise BuildError(f"a launch of {grid} blocks of {block} threads is beyond what CUDA takes", step.kernel)
        shared = kernel.launch.shared
        return f"    {{{index}, {_braced(grid)}, {_braced(block)}, {shared}, 0, 0, {places}, {{0}}, 0, 0}},"
    down, up, sizes = 0, 0, []
    accesses = accesses_of(kernel.func.body)
    for i, (arg, buffer, size) in enumerate(zip(step.args, kernel.func.params, argument_bytes(kernel), strict=False)):
        uses = accesses.get(buffer, []) if arg.space == "arena" else []
        down |= any(not write for write, _ in uses) << i
        up |= any(write for write, _ in uses) << i
        sizes.append(str(size if uses else 0))
    name = f"{kernel_prefix}{step.kernel}"
    return (
        f"    {{-1, {{1, 1, 1}}, {{1, 1, 1}}, 0, {name}, {step.tiles}, {places}, {_padded(sizes, '0')}, {down}, {up}}},"
    )


def _padded(items: list[str], filler: str) -> str:
    return _braced([*items, *[filler] * (MAX_ARGS - len(items))])


def _braced(items: object) -> str:
    return f"{{{', '.join(map(str, items))}}}"  # type: ignore[call-overload]
