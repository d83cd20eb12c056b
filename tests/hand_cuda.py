"""A small program for CUDA assembled by hand, for tests of building and of the runtime: no lowering involved."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from sparsec.cuda.source import launch_of
from sparsec.kernels.cuda import emit
from sparsec.program import Arg, Buffer, Constant, Kernel, Program, Step, Tensor
from sparsec.targets import find_target, host_arch

ROWS, COLUMNS = 24, 64
_SIZE = ROWS * COLUMNS
_ROOM = 60 << 10  # where a row lies in shared memory: beyond what a launch has unasked
_PITCH = _SIZE * 4 + 256  # a buffer and its slack; a multiple of 64


@cache
def _relu():
    def body(x, y, blocks, threads):
        i = blocks[0] * 128 + threads[0]
        B.buffer_store(y, B.max(x[i], B.float32(0)), [i])

    return emit.function([("x", _SIZE, "float32"), ("y", _SIZE, "float32")], _SIZE // 128, 128, body)


@cache
def _add_row():
    def body(x, row, y, blocks, threads):
        i = blocks[0] * COLUMNS + threads[0]
        B.buffer_store(y, x[i] + row[threads[0]], [i])

    arguments = [("x", _SIZE, "float32"), ("row", COLUMNS, "float32"), ("y", _SIZE, "float32")]
    return emit.function(arguments, ROWS, COLUMNS, body)


@cache
def _reverse_rows():
    def body(x, y, blocks, threads):
        (b,), (t,) = blocks, threads
        room, held = emit.Room(_ROOM, 4), emit.local(1)
        B.buffer_store(held, x[b * COLUMNS + t] * B.float32(2), [0])
        emit.call("sparsec_write<float, 1>", emit.address(room, t), emit.address(held, 0), 1)
        emit.barrier()
        emit.call("sparsec_read<float, 1>", emit.address(held, 0), emit.address(room, COLUMNS - 1 - t), 1)
        B.buffer_store(y, held[0], [b * COLUMNS + t])

    arguments = [("x", _SIZE, "float32"), ("y", _SIZE, "float32")]
    return emit.function(arguments, ROWS, COLUMNS, body, shared=_ROOM + COLUMNS * 4)


@T.prim_func(s_tir=True)
def _host_add_row(
    x: T.Buffer((1536,), "float32"), row: T.Buffer((64,), "float32"), y: T.Buffer((1536,), "float32"), begin: T.int32,
    end: T.int32,
):  # fmt: skip
    for t in T.serial(begin, end):
        for i in T.vectorized(64):
            y[t * 64 + i] = x[t * 64 + i] + row[i]


def _kernel(name: str, func: object) -> Kernel:
    return Kernel(name, func, name, launch_of(func))


def program(on_host: bool = False, seed: int = 0, arch: str = "sm_90") -> Program:
    """x -> 2 * reversed(relu(x) + row) -> y, and the row itself -> row. on_host: the processor adds the row."""
    row = np.random.default_rng(seed).standard_normal(COLUMNS).astype(np.float32)
    a, b, c = (Arg("arena", i * _PITCH) for i in range(3))
    weights = Arg("weights", 64)
    add = Kernel("add_row", _host_add_row) if on_host else _kernel("add_row", _add_row())
    return Program(
        name="hand",
        target=find_target("cuda", arch=arch, host=host_arch()),
        kernels=(_kernel("relu", _relu()), add, _kernel("reverse_rows", _reverse_rows())),
        steps=(
            Step("relu", (a, b), _SIZE // 128, ("Relu_0",)),
            Step("add_row", (b, weights, c), ROWS, ("Add_1",)),
            Step("reverse_rows", (c, a), ROWS, ("Flip_2",)),
        ),
        buffers=tuple(
            Buffer(name, (ROWS, COLUMNS), "float32", i * _PITCH, _SIZE * 4, 0, 2) for i, name in enumerate("xrs")
        ),
        constants=(Constant("row", row, 64),),
        inputs=(Tensor("x", (ROWS, COLUMNS), "float32", a),),
        outputs=(Tensor("y", (ROWS, COLUMNS), "float32", a), Tensor("row", (COLUMNS,), "float32", weights)),
        arena_bytes=3 * _PITCH,
        scratch_bytes=0,
        weights_bytes=64 + COLUMNS * 4,
        layers=(),
    )


def reference(made: Program, x: np.ndarray) -> list[np.ndarray]:
    """What `program` computes, by NumPy."""
    row = made.constants[0].data
    return [(2 * (np.maximum(x, 0) + row))[:, ::-1].copy(), row]


def sample(seed: int = 1) -> np.ndarray:
    """An input of `program`."""
    return np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32)


def device_kernels(made: Program) -> tuple[Kernel, ...]:
    """The kernels that the emulation must have."""
    return tuple(kernel for kernel in made.kernels if kernel.launch is not None)


def build_with_emulation(made: Program, folder: Path, **options: object) -> Path:
    """What `build` makes of `made`, a parity.bin and emulation.so, in the new `folder`."""
    from cuda_emulator import build_emulation

    from sparsec.building.build import build, pack_parity
    from sparsec.cuda.source import cuda_source

    folder.mkdir()
    build(made, folder, **options)  # type: ignore[arg-type]
    x = sample()
    (folder / "parity.bin").write_bytes(pack_parity([x], reference(made, x), [1e-6, 0.0]))
    work = folder / "work"
    work.mkdir()
    build_emulation(cuda_source(device_kernels(made), made.target.cpu), work).rename(folder / "emulation.so")
    return folder
