"""`Program`: what lowering makes and building consumes. A frozen value one can print.

A program is a straight line of steps over one arena. Each step calls one kernel on up to `MAX_ARGS` pointers and a tile
range; nothing is allocated while it runs and no TVM runtime is needed to execute it.

Kernel ABI (plain C, the same for every kernel):

    void kernel(void *a0, ..., void *a7, int32_t begin, int32_t end);

computes the independent tiles `begin <= t < end`; unused pointers are null. Buffers, constants and scratch are 64-byte
aligned, but a pointer may be any element of a buffer (a part of a Concat or Split), so a kernel assumes the alignment of
an element. It may read SLACK bytes behind what it is given and writes only its outputs: behind them may lie another value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from sparsec.ports import Quantization

MAX_ARGS = 8
ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
MAX_ELEMENTS = (1 << 31) - (1 << 16)  # of a tensor: kernels index with 32 bits, and tiles may reach past its end
SLACK = 256  # readable bytes behind every buffer and constant: vector loads may run past a tail

Space = Literal["arena", "weights", "scratch"]
Route = Literal["native", "generic", "free"]  # free: no code at all (a view, an in-place concatenation)


@dataclass(frozen=True)
class Arg:
    """Where one pointer of a step points.

    `arena`: activations, offset in bytes from the arena's start. `weights`: offset in the payload of weights.bin.
    `scratch`: offset in the calling worker's private scratch area.
    """

    space: Space
    offset: int


@dataclass(frozen=True)
class Launch:
    """How a kernel runs on a CUDA device: blocks, and threads of a block, along x, y, z.

    `shared`: bytes of shared memory of a block besides what its code declares.
    """

    grid: tuple[int, ...] = (1, 1, 1)
    block: tuple[int, ...] = (1, 1, 1)
    shared: int = 0

    @property
    def blocks(self) -> int:
        """Blocks of the grid."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class Kernel:
    """One piece of code. `func` is a `tvm.tirx.PrimFunc` whose parameters are buffers, then `begin` and `end` (int32).

    With a `launch` it runs on a CUDA device: its parameters are buffers only, and it binds its threads itself.
    """

    name: str  # C identifier, unique in the program, a pure function of what the kernel computes
    func: Any = field(repr=False)
    text: str = field(default="", repr=False)  # what it computes, one line
    launch: Launch | None = None


@dataclass(frozen=True)
class Step:
    """One kernel call: `tiles` independent tiles over `args`."""

    kernel: str
    args: tuple[Arg, ...]
    tiles: int
    nodes: tuple[str, ...]  # names of the ONNX nodes it came from


@dataclass(frozen=True)
class Buffer:
    """An activation in the arena, alive from step `first` to step `last` inclusive (-1: before the first step)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int  # bytes
    size: int  # bytes, without slack
    first: int
    last: int


@dataclass(frozen=True)
class Constant:
    """A packed array in weights.bin."""

    name: str
    data: np.ndarray = field(repr=False)
    offset: int  # bytes, a multiple of ALIGNMENT


@dataclass(frozen=True)
class Tensor:
    """An input or output of the program: a dense row-major tensor of `dtype` (NumPy's name) at `location`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    location: Arg
    quantization: Quantization | None = None  # of a port of 8 bits

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Candidate:
    """A kernel that could run a layer. `predicted_us` is the cost model's time on one thread of the target."""

    kernel: str
    predicted_us: float


@dataclass(frozen=True)
class Layer:
    """What `inspect` prints of one step or group of steps."""

    name: str  # the main ONNX node
    op: str  # its operator, with what was fused: "Conv+Clip"
    shape: tuple[int, ...]  # of the output
    route: Route
    kernel: str
    reason: str
    zeros: float = 0.0  # share of zeros of the weight; 0 where there is none
    structure: str = ""  # e.g. "4x1 blocks, 80.0% zero", "dense", "2:4"
    candidates: tuple[Candidate, ...] = ()
    bytes: int = 0  # stored bytes of the packed weights and indices
    predicted_us: float = 0.0
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """A lowered model. Printable with `sparsec compile --dump`."""

    name: str
    target: Any  # sparsec.targets.Target
    kernels: tuple[Kernel, ...]
    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    constants: tuple[Constant, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    arena_bytes: int  # activations
    scratch_bytes: int  # for each worker, a multiple of ALIGNMENT
    weights_bytes: int  # payload of weights.bin
    layers: tuple[Layer, ...]

    def __str__(self) -> str:
        lines = [f"program {self.name} for {self.target.name} ({self.target.cpu})"]
        for side, tensors in (("input ", self.inputs), ("output", self.outputs)):
            for t in tensors:
                meaning = f", {t.quantization}" if t.quantization is not None else ""
                lines.append(f"  {side} {t.name}: {t.dtype}{list(t.shape)} at {t.location}{meaning}")
        lines.append(
            f"  arena {self.arena_bytes} B, scratch {self.scratch_bytes} B a worker, weights {self.weights_bytes} B"
        )
        for b in self.buffers:
            lines.append(
                f"  buffer {b.name}: {b.dtype}{list(b.shape)} [{b.offset}, +{b.size}) steps {b.first}..{b.last}"
            )
        for i, s in enumerate(self.steps):
            args = ", ".join(f"{a.space}+{a.offset}" for a in s.args)
            lines.append(f"  step {i}: {s.kernel}({args}) x {s.tiles}  # {' '.join(s.nodes)}")
        return "\n".join(lines) + "\n"
