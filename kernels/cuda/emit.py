"""Building TIR for CUDA from Python: a kernel is one block's program, its threads numbered in one or more axes.

The words of `sparsec.kernels.emit` for loads, constants and conversions serve here too, and so does
`sparsec.kernels.epilogue`. Ordinary Python loops unroll; `T.serial` loops stay loops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

WARP = 32  # threads
MAX_THREADS = 1024  # of a block
MAX_GRID = ((1 << 31) - 1, 65535, 65535)  # blocks by axis: CUDA C++ Programming Guide, compute capabilities
AXES = ("x", "y", "z")
SHARED = "sparsec.shared"  # a function's attribute: bytes of `Room`s
C_NAMES = {"float16": "half", "float32": "float"}  # of elements, in template arguments
STATIC_SHARED = 48 << 10  # bytes that a function's own arrays may take

Argument = tuple[str, int, str]  # name, elements, dtype


def function(
    arguments: Sequence[Argument],
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    body: Callable[..., None],
    shared: int = 0,
) -> Any:
    """A PrimFunc over flat buffers, run by `grid` blocks of `block` threads.

    `body(*buffers, blocks, threads)` emits what one thread does; `blocks` and `threads` are tuples of indices, as many as
    `grid` and `block` have axes. `shared`: bytes that the body's `Room`s lie in. Raises ValueError beyond CUDA's limits.
    """
    grid, block = _axes(grid), _axes(block)
    threads = 1
    for extent in block:
        threads *= extent
    if not 0 < threads <= MAX_THREADS or any(not 0 < g <= most for g, most in zip(grid, MAX_GRID, strict=False)):
        raise ValueError(f"a launch of {grid} blocks of {block} threads is beyond what CUDA takes")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("kernel")
        if shared:
            T.func_attr({SHARED: shared})
        buffers = [T.arg(name, T.buffer((max(size, 1),), dtype)) for name, size, dtype in arguments]
        _launch([("blockIdx." + a, g) for a, g in zip(AXES, grid, strict=False)], [], lambda blocks: _launch(
            [("threadIdx." + a, b) for a, b in zip(AXES, block, strict=False)], [],
            lambda threads: body(*buffers, tuple(blocks), tuple(threads)),
        ))  # fmt: skip
    return builder.get()


def _axes(extents: int | tuple[int, ...]) -> tuple[int, ...]:
    return (extents,) if isinstance(extents, int) else extents


def _launch(axes: list[tuple[str, int]], found: list[Any], then: Callable[[list[Any]], None]) -> None:
    if not axes:
        then(found)
        return
    (tag, extent), *rest = axes
    with T.launch_thread(tag, extent) as index:
        _launch(rest, [*found, index], then)


def shared(count: int, dtype: str = "float32") -> Any:
    """`count` elements that the threads of a block share; undefined at the start of a block."""
    return _whole(T.alloc_buffer((count,), dtype, scope="shared"), count)


def local(count: int, dtype: str = "float32") -> Any:
    """`count` elements of one thread: registers where every index is a constant."""
    return _whole(T.alloc_buffer((count,), dtype, scope="local"), count)


def _whole(buffer: Any, count: int) -> Any:
    """`buffer`, kept at its size: TVM shrinks it to the elements it sees, and does not see what a function gets by address."""
    for index in {0, count - 1}:
        T.evaluate(address(buffer, index))
    return buffer


@dataclass(frozen=True)
class Room:
    """An array of a block's shared memory that the launch makes room for, from byte `offset` on; for `address` only."""

    offset: int
    item: int  # bytes of an element


def barrier() -> None:
    """All threads of the block arrive before any goes on; what they wrote to shared memory is seen by all."""
    T.evaluate(T.tvm_storage_sync("shared"))


def when(condition: Any, then: Callable[[], Any]) -> None:
    """`then()` where the condition holds; one that is known already leaves no trace in the code."""
    if not isinstance(condition, bool):
        with T.If(condition), T.Then():
            then()
    elif condition:
        then()


def call(name: str, *arguments: Any) -> None:
    """A device function of `device.h` that returns nothing."""
    T.evaluate(T.call_extern("void", name, *arguments))


def address(buffer: Any, index: Any) -> Any:
    """Pointer to an element of a buffer or a `Room`, for `call`."""
    if isinstance(buffer, Room):
        return T.call_extern("handle", "sparsec_room_at", buffer.offset + index * buffer.item)
    return T.address_of(buffer[index])
