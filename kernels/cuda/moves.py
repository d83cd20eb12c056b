"""Copies and conversions on a CUDA device: y[i] = x[i], in bytes or from one element type to another.

A block moves `UNITS` elements a thread; neighbouring threads move neighbours, so that a warp's accesses are whole lines.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit as tir
from sparsec.kernels.cuda import emit
from sparsec.kernels.cuda.base import DeviceCall
from sparsec.program import Launch

THREADS = 256  # of a block
UNITS = 4  # elements of a thread


def bind_copy(size: int, aligned: bool = True) -> DeviceCall:
    """`size` bytes from x to y. aligned: both begin at a multiple of four bytes."""
    unit = "int32" if size % 4 == 0 and aligned else "uint8"
    count = size // np.dtype(unit).itemsize
    return _bind(f"cuda_copy_{unit}_{count}", count, unit, unit, f"copy {size} bytes")


def bind_cast(*, size: int, source: str, target: str) -> DeviceCall:
    """`size` elements of x as another type in y."""
    return _bind(f"cuda_cast_{source}_{target}_{size}", size, source, target, f"{size} {source} to {target}")


def _bind(name: str, count: int, source: str, target: str, text: str) -> DeviceCall:
    grid = max(1, -(-count // (THREADS * UNITS)))

    def body(x: Any, y: Any, blocks: Any, threads: Any) -> None:
        (block,), (thread,) = blocks, threads
        for unit in range(UNITS):
            i = block * (THREADS * UNITS) + unit * THREADS + thread
            with T.If(i < count), T.Then():
                T.buffer_store(y, x[i] if source == target else tir.convert(x[i], target), [i])

    func = emit.function([("x", count, source), ("y", count, target)], grid, THREADS, body)
    launch = Launch((grid, 1, 1), (THREADS, 1, 1))
    return DeviceCall(name, func, ("x", "y"), {}, launch, text=text)
