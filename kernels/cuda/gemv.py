"""Few rows times a constant weight on CUDA devices: bound by reading the weights once.

    y[m, n] = act(bias[n] + sum over k of x[m, k] * w[n, k])          m < 8 or so

A warp has `columns` columns of y; its lanes read 16 bytes of each column's weights at a time, neighbours neighbours, several
in flight, and add up products with x from L1 for all rows; shuffles combine the lanes' sums. With few columns the warps of
a block share them and each takes a part of the depth. Weights [N'][K'], K' whole chunks of 16 bytes; sums are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit as tir
from sparsec.kernels.base import Format, unique
from sparsec.kernels.cuda import emit
from sparsec.kernels.cuda.base import DeviceCall, Gpu
from sparsec.kernels.epilogue import NONE, Activation, Residual, finish
from sparsec.kernels.gemm import reference
from sparsec.program import Launch

__all__ = ["MAX_ROWS", "TABLE", "Plan", "bind", "pack", "plans", "predict_us", "reference", "unpack"]

TABLE: tuple[Format, ...] = (
    Format("cuda_gemv_f32", "Gemm, MatMul", "dense", "float32", "few rows times a constant weight, a warp a few columns",
           "constant weight, rank 2, at most 8 rows"),
)  # fmt: skip

MAX_ROWS = 8
WARPS = 4  # of a block
FLIGHT = 8  # chunks of weights of a lane that are read before the first is used
LATENCY_US = 0.5  # of reads from memory that are in flight together


@dataclass(frozen=True)
class Plan:
    """`columns` of a warp; the depth cut in `parts`, one a warp of the block."""

    columns: int
    parts: int

    @property
    def block_columns(self) -> int:
        """Columns of a block."""
        return self.columns * WARPS // self.parts

    def __str__(self) -> str:
        return f"{self.columns} columns a warp" + (f", depth in {self.parts} parts" if self.parts > 1 else "")


def plans(gpu: Gpu, m: int, k: int, n: int) -> list[tuple[float, Plan]]:
    """Predicted microseconds of each plan, cheapest first."""
    each = 16 // gpu.item
    moved = gpu.item * (n * k + m * k + m * n)
    rate = (gpu.l2_gbps if moved <= gpu.l2_bytes / 2 else gpu.memory_gbps) * 1e3
    found = []
    for columns in (1, 2, 4):
        for parts in (1, WARPS):
            plan = Plan(columns, parts)
            blocks = -(-n // plan.block_columns)
            rounds = -(-k // (each * emit.WARP * parts))
            batches = -(-rounds * columns // FLIGHT)
            waves = -(-blocks // (gpu.multiprocessors * gpu.threads // (emit.WARP * WARPS)))
            # Reads of x hit L1: 128 bytes a cycle.
            from_l1 = gpu.item * m * k * n / columns / (128.0 * gpu.multiprocessors * gpu.ghz * 1e3)
            work = m * k * n / (gpu.fma * gpu.multiprocessors * gpu.ghz * 1e3) * (2.0 if gpu.item == 2 else 1.2)
            found.append((max(moved / rate, from_l1, work, waves * (batches * LATENCY_US + 0.2)) + gpu.launch_us, plan))
    return sorted(found, key=lambda way: way[0])


def predict_us(gpu: Gpu, m: int, k: int, n: int) -> float:
    """Time of the best plan."""
    return plans(gpu, m, k, n)[0][0]


def pack(gpu: Gpu, w: np.ndarray, plan: Plan) -> np.ndarray:
    """w [N, K] -> [N'][K'], whole blocks and chunks."""
    each = 16 // gpu.item
    whole = np.zeros(
        (-(-w.shape[0] // plan.block_columns) * plan.block_columns, -(-w.shape[1] // each) * each), np.float32
    )
    whole[: w.shape[0], : w.shape[1]] = w
    return gpu.array(whole)


def unpack(packed: np.ndarray, n: int, k: int) -> np.ndarray:
    """The inverse of `pack`: w [N, K]."""
    return packed[:n, :k]


def bind(
    gpu: Gpu, *, m: int, w: np.ndarray, bias: np.ndarray | None = None, activation: Activation = NONE,
    residual: Residual = "none", plan: Plan | None = None,
) -> DeviceCall:  # fmt: skip
    """The call for `act(x @ w.T + bias)`. x [m, K], m <= MAX_ROWS, w [N, K] float32, bias [N].

    Roles (x, y[, residual], weights, bias).
    """
    if not 0 < m <= MAX_ROWS:
        raise ValueError(f"at most {MAX_ROWS} rows, got {m}")
    n, k = w.shape
    plan = plan or plans(gpu, m, k, n)[0][1]
    packed = pack(gpu, w, plan)
    held = np.zeros(packed.shape[0], np.float32)
    held[:n] = 0 if bias is None else bias
    each, pitch, wide = 16 // gpu.item, packed.shape[1], plan.columns
    chunks, flight = pitch // each, max(1, FLIGHT // plan.columns)
    stride = emit.WARP * plan.parts  # chunks that all lanes of all parts read at once
    kind = emit.C_NAMES[gpu.element]

    def body(*arguments: Any) -> None:
        *buffers, (block,), (thread,) = arguments
        named = dict(zip(roles, buffers, strict=True))
        lane, warp = T.bind(thread % emit.WARP), T.bind(thread // emit.WARP)
        part = warp if plan.parts > 1 else 0
        first = T.bind(block * plan.block_columns + (0 if plan.parts > 1 else warp * wide))
        begin = T.bind(part * emit.WARP + lane)
        sums = emit.local(m * wide)
        for i in range(m * wide):
            T.buffer_store(sums, T.float32(0), [i])
        weights = emit.local(flight * wide * each, gpu.element)
        values = emit.local(each, gpu.element)

        def read(u: int, chunk: Any) -> None:
            for c in range(wide):
                source = emit.address(named["weights"], (first + c) * pitch + chunk * each)
                emit.call(f"sparsec_get16<{kind}>", emit.address(weights, (u * wide + c) * each), source)

        def multiply(u: int, chunk: Any) -> None:
            for row in range(m):
                source = emit.address(named["x"], row * k + chunk * each)
                emit.call(f"sparsec_read<{kind}, {each}>", emit.address(values, 0), source, k - chunk * each)
                for c in range(wide):
                    for e in range(each):
                        weight = tir.convert(weights[(u * wide + c) * each + e], "float32")
                        term = tir.convert(values[e], "float32") * weight
                        T.buffer_store(sums, sums[row * wide + c] + term, [row * wide + c])

        whole = chunks // (stride * flight)
        if whole:
            with T.serial(0, whole) as i:
                at = [T.bind(begin + (i * flight + u) * stride) for u in range(flight)]
                for u in range(flight):
                    read(u, at[u])
                for u in range(flight):
                    multiply(u, at[u])
        if whole * flight * stride < chunks:
            with T.serial(0, -(-(chunks - whole * flight * stride) // stride)) as i:
                chunk = T.bind(begin + (whole * flight + i) * stride)
                with T.If(chunk < chunks), T.Then():
                    read(0, chunk)
                    multiply(0, chunk)
        for i in range(m * wide):
            emit.call("sparsec_warp_sum", emit.address(sums, i))
        if plan.parts > 1:
            shared = emit.shared(WARPS * m * wide)
            for i in range(m * wide):
                with T.If(lane == i), T.Then():
                    T.buffer_store(shared, sums[i], [warp * (m * wide) + i])
            emit.barrier()
            for i in range(m * wide):
                T.buffer_store(sums, shared[i], [i])
                for other in range(1, WARPS):
                    T.buffer_store(sums, sums[i] + shared[other * (m * wide) + i], [i])
        for i in range(m * wide):
            column = first + i % wide
            mine = lane == i
            with T.If(mine if plan.parts == 1 else thread == i), T.Then(), T.If(column < n), T.Then():
                at = i // wide * n + column
                other = tir.convert(named["residual"][at], "float32") if residual != "none" else None
                value = finish(sums[i] + named["bias"][column], activation, residual, other)
                T.buffer_store(named["y"], tir.convert(value, gpu.element), [at])

    sizes = {
        "x": (m * k, gpu.element), "y": (m * n, gpu.element), "residual": (m * n, gpu.element),
        "weights": (packed.size, gpu.element), "bias": (held.size, "float32"),
    }  # fmt: skip
    roles = ("x", "y", "residual", "weights", "bias") if residual != "none" else ("x", "y", "weights", "bias")
    grid = -(-n // plan.block_columns)
    func = emit.function([(role, *sizes[role]) for role in roles], grid, emit.WARP * WARPS, body)
    name = unique(f"{gpu.named(TABLE[0].name)}_{wide}x{plan.parts}", m, k, n, plan, activation, residual, gpu.element)
    text = f"{m}x{k} times {k}x{n}, {plan}, {activation.name}, residual {residual}"
    launch = Launch((grid, 1, 1), (emit.WARP * WARPS, 1, 1))
    return DeviceCall(name, func, roles, {"weights": packed, "bias": held}, launch, {}, text)
