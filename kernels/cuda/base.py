"""What CUDA kernel families share: the facts of a device, the call a family returns for one layer, the roofline."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sparsec.program import Launch


@dataclass(frozen=True)
class Gpu:
    """The facts about a CUDA device that kernels and the cost model need.

    `shared_bytes`: shared memory of a multiprocessor that blocks may use together. `registers`: 32-bit registers of a
    multiprocessor. `threads`: resident threads of a multiprocessor. `fma`: float32 multiply-adds per cycle and
    multiprocessor. `tensor_fma`: multiply-adds of float16 per cycle and multiprocessor that `mma.sync` reaches.
    `launch_us`: from one kernel's end to the next one's work, in a stream or graph. `element`: what floating-point
    layers are stored in, float32 or float16; sums are float32 either way.
    """

    arch: str
    multiprocessors: int
    ghz: float
    memory_gbps: float
    l2_gbps: float
    l2_bytes: int
    shared_bytes: int
    registers: int = 65536
    threads: int = 1536
    fma: float = 128.0
    tensor_fma: float = 512.0
    launch_us: float = 3.0
    element: str = "float32"

    def half(self) -> Gpu:
        """The device storing float16."""
        return replace(self, element="float16")

    def single(self) -> Gpu:
        """The device storing float32."""
        return replace(self, element="float32")

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return 2 if self.element == "float16" else 4

    def named(self, text: str) -> str:
        """A name of the kernel tables, all float32, for this element: `gemm_f32` is `gemm_f16` in float16."""
        return text.replace("_f32", "_f16") if self.element == "float16" else text

    def array(self, values: np.ndarray) -> np.ndarray:
        """Weights rounded to `element`; lowering refuses those beyond its range."""
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(values, self.element)

    def resident(self, threads: int, registers: int, shared: int) -> int:
        """Blocks of `threads` threads of `registers` registers each and `shared` bytes that a multiprocessor holds."""
        by_registers = self.registers // max(1, threads * -(-registers // 8) * 8)
        by_shared = self.shared_bytes // (shared + 1024)  # the system's share of a block: CUDA Programming Guide
        return max(0, min(self.threads // threads, by_registers, by_shared, 32))


@dataclass(frozen=True)
class DeviceCall:
    """One layer bound to one device kernel.

    `func` is a `tvm.tirx.PrimFunc` over the buffers of `roles` in that order. Roles name what the caller must bind: "x",
    "y", "residual", ... are activations; the keys of `constants` are packed arrays; the keys of `rooms` are temporary
    buffers, (elements, dtype) each, undefined before and after.
    """

    name: str
    func: Any = field(repr=False)
    roles: tuple[str, ...]
    constants: dict[str, np.ndarray] = field(repr=False)
    launch: Launch
    rooms: dict[str, tuple[int, str]] = field(default_factory=dict)
    text: str = ""


def overlapped(*times: float) -> float:
    """Time of what goes on at once: the longest, and a tenth of the others, since nothing overlaps entirely."""
    return max(times) + 0.1 * (sum(times) - max(times))


def roofline_us(gpu: Gpu, flops: float, moved: float, tensor: bool = False) -> float:
    """Time by arithmetic or by `moved` bytes of memory, whichever is longer, and one launch.

    What fits in L2 comes from there. `tensor`: float16 products on tensor cores.
    """
    per_cycle = gpu.tensor_fma if tensor and gpu.element == "float16" else gpu.fma
    compute = flops / (2 * per_cycle * gpu.multiprocessors * gpu.ghz * 1e3)
    rate = gpu.l2_gbps if moved <= gpu.l2_bytes / 2 else gpu.memory_gbps
    return max(compute, moved / (rate * 1e3)) + gpu.launch_us
