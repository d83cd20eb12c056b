"""Dense matrix products on CUDA devices: with a constant weight (`gemm`) and of two activations (`matmul`).

    gemm     y[m, n] = act(bias[n] + sum over k of x[m, k] * w[n, k])
    matmul   y[b, m, n] = act(scale * sum over k of a[b, m, k] * c[b, k, n])          or c[b, n, k], transposed

A block computes a tile of y, float16 on tensor cores (`tensor_tiles`), float32 on CUDA cores (`core_tiles`; no TF32, which
keeps 10 bits). Blocks walk over tiles in bands of rows, so that what runs at one time shares its factors in L2. A product
of few tiles is split along k: parts of a sum are stored as float32 and a second kernel adds them in a fixed order.

Weights are stored whole tiles wide and deep, zeros outside: [N][K] for tensor cores, [K][N] for CUDA cores. Which tile and
how many parts is chosen by predicted time: `predict_us`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit as tir
from sparsec.kernels.base import Format, unique
from sparsec.kernels.cuda import core_tiles, emit, operands, tensor_tiles
from sparsec.kernels.cuda.base import DeviceCall, Gpu, overlapped
from sparsec.kernels.cuda.core_tiles import CoreTile
from sparsec.kernels.cuda.stores import RowStore
from sparsec.kernels.cuda.tensor_tiles import TensorTile
from sparsec.kernels.epilogue import NONE, Activation, Residual, finish
from sparsec.kernels.gemm import reference, reference_matmul
from sparsec.program import Launch

__all__ = [
    "TABLE",
    "Plan",
    "bind",
    "bind_matmul",
    "pack",
    "plans",
    "predict_us",
    "reference",
    "reference_matmul",
    "unpack",
]

TABLE: tuple[Format, ...] = (
    Format("cuda_gemm_f32", "Gemm, MatMul", "dense", "float32", "rows times a constant weight", "constant weight, rank 2"),
    Format("cuda_matmul_f32", "MatMul", "dense", "float32", "batched product of two activations",
           "equal batch, or one side shared by the whole batch"),
)  # fmt: skip

Tile = TensorTile | CoreTile

TENSOR_TILES: tuple[TensorTile, ...] = (
    TensorTile(256, 128, 32, (4, 2), 4),
    TensorTile(128, 256, 32, (2, 4), 4),
    TensorTile(128, 128, 32, (2, 2), 3),
    TensorTile(128, 64, 32, (2, 2), 4),
    TensorTile(64, 128, 32, (2, 2), 4),
    TensorTile(64, 64, 32, (2, 2), 4),
    TensorTile(32, 64, 64, (2, 2), 4),
    TensorTile(16, 64, 64, (1, 2), 4),
)
CORE_TILES: tuple[CoreTile, ...] = (
    CoreTile(128, 128, 8, (8, 8), 4),
    CoreTile(64, 128, 16, (8, 8), 3),
    CoreTile(128, 64, 16, (8, 8), 3),
    CoreTile(64, 64, 16, (4, 8), 3),
    CoreTile(32, 64, 16, (4, 4), 4),
    CoreTile(32, 32, 16, (4, 4), 4),
    CoreTile(16, 64, 16, (2, 4), 4),
)
BAND = 8  # rows of tiles that are walked over together
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
TILE_CYCLES = 1200.0  # a tile's begin and end: latency of the first loads, epilogue
STEP_LATENCY = 350.0  # cycles of a step where a block runs alone: barrier, first reads of shared memory, dependent sums


@dataclass(frozen=True)
class Plan:
    """A tile, and into how many parts the depth is cut."""

    tile: Tile
    splits: int = 1

    def __str__(self) -> str:
        return f"{self.tile}" + (f" in {self.splits} parts" if self.splits > 1 else "")

    def steps(self, k: int) -> int:
        """Steps of one part."""
        return -(-k // (self.tile.depth * self.splits))


def tiles_of(element: str) -> tuple[Tile, ...]:
    """The tiles for an element type."""
    return TENSOR_TILES if element == "float16" else CORE_TILES


def tile_us(gpu: Gpu, plan: Plan, m: int, k: int, n: int, batch: int = 1, more: float = 0.0) -> float:
    """Time of the kernel that computes the tiles: waves of blocks, each by what bounds it, or memory.

    `more`: cycles of a multiprocessor that a step takes besides its product.
    """
    tile = plan.tile
    blocks = batch * plan.splits * -(-m // tile.rows) * -(-n // tile.columns)
    resident = max(1, gpu.resident(tile.threads, tile.registers, tile.shared))
    together = min(resident, -(-blocks // gpu.multiprocessors))
    steps = plan.steps(k)
    cycles = steps * max(tile.step_cycles(gpu) + more, STEP_LATENCY / together) + TILE_CYCLES / together
    per_processor = -(-blocks // gpu.multiprocessors)
    busy = per_processor * cycles / (gpu.ghz * 1e3)
    depth = steps * tile.depth
    from_l2 = gpu.item * blocks * depth * (tile.rows + tile.columns)
    stored = 4 * plan.splits if plan.splits > 1 else gpu.item
    moved = batch * (gpu.item * (m * k + n * k) + stored * m * n)
    rate = gpu.l2_gbps if moved <= gpu.l2_bytes / 2 else gpu.memory_gbps
    times = (busy, from_l2 / (gpu.l2_gbps * 1e3), moved / (rate * 1e3))
    return overlapped(*times) + gpu.launch_us


@cache
def plans(gpu: Gpu, m: int, k: int, n: int, batch: int = 1, splittable: bool = True) -> tuple[tuple[float, Plan], ...]:
    """Predicted microseconds of every tile, split where that helps, cheapest first."""
    found = []
    for tile in tiles_of(gpu.element):
        if not gpu.resident(tile.threads, tile.registers, tile.shared):
            continue
        best: tuple[float, Plan] | None = None
        for splits in SPLITS if splittable else SPLITS[:1]:
            if splits > 1 and k < 4 * splits * tile.depth:
                break
            plan = Plan(tile, splits)
            us = tile_us(gpu, plan, m, k, n, batch)
            if splits > 1:
                us += 4.0 * (splits + 1) * m * n / (gpu.l2_gbps * 1e3) + gpu.launch_us
            best = min(best, (us, plan), key=lambda item: item[0]) if best else (us, plan)
        assert best is not None
        found.append(best)
    return tuple(sorted(found, key=lambda item: item[0]))


def predict_us(gpu: Gpu, m: int, k: int, n: int) -> float:
    """Time of the best plan for x [m, k] times w [n, k] transposed."""
    return plans(gpu, m, k, n)[0][0]


# --- packing ---------------------------------------------------------------------------------------------------------


def pack(gpu: Gpu, w: np.ndarray, plan: Plan) -> np.ndarray:
    """w [N, K] -> [N'][K'] for tensor cores, [K'][N'] for CUDA cores, N' and K' whole tiles and parts."""
    tile = plan.tile
    n, k = -(-w.shape[0] // tile.columns) * tile.columns, plan.steps(w.shape[1]) * tile.depth * plan.splits
    whole = np.zeros((n, k), np.float32)
    whole[: w.shape[0], : w.shape[1]] = w
    return gpu.array(whole if isinstance(tile, TensorTile) else whole.T)


def unpack(packed: np.ndarray, n: int, k: int, plan: Plan) -> np.ndarray:
    """The inverse of `pack`: w [N, K]."""
    return (packed if isinstance(plan.tile, TensorTile) else packed.T)[:n, :k]


def pack_bias(bias: np.ndarray | None, n: int, tile: Tile) -> np.ndarray:
    """bias [N] or None -> float32, whole tiles wide."""
    whole = np.zeros(-(-n // tile.columns) * tile.columns, np.float32)
    whole[:n] = 0 if bias is None else bias
    return whole


# --- kernels ---------------------------------------------------------------------------------------------------------


def tile_of_block(block: Any, rows: int, columns: int) -> tuple[Any, Any]:
    """Row and column of tiles that a block computes, of `rows` x `columns`: bands of BAND rows, down first."""
    if rows <= BAND:
        return T.bind(block % rows), T.bind(block // rows)
    band, inside = block // (BAND * columns), block % (BAND * columns)
    high = T.min(BAND, rows - band * BAND)
    return T.bind(band * BAND + inside % high), T.bind(inside // high)


def run_product(
    tile: Tile, steps: int, a: operands.Operand, b: operands.Operand, turned: bool, thread: Any, store: Any
) -> None:
    """`product` of the tile's kind; `store(columns)(row, values)` with as many columns as values."""
    if isinstance(tile, CoreTile):
        core_tiles.product(tile, steps, a, b, turned, thread, store)
    else:
        tensor_tiles.product(tile, steps, a, b, turned, thread, lambda column: store([column + c for c in range(8)]))


def bind(
    gpu: Gpu, *, m: int, w: np.ndarray, bias: np.ndarray | None = None, activation: Activation = NONE,
    residual: Residual = "none", plan: Plan | None = None,
) -> tuple[DeviceCall, ...]:  # fmt: skip
    """The calls for `act(x @ w.T + bias)`, one, or two where the sums are split. x [m, K], w [N, K] float32, bias [N].

    Roles (x, y[, residual], weights, bias), or (x, weights, parts) and (parts, y[, residual], bias): "parts" is a value
    of `splits * m * N` float32.
    """
    n, k = w.shape
    plan = plan or plans(gpu, m, k, n)[0][1]
    tile, steps = plan.tile, plan.steps(k)
    packed, held = pack(gpu, w, plan), pack_bias(bias, n, tile)
    high, wide = -(-m // tile.rows), -(-n // tile.columns)
    turned = isinstance(tile, TensorTile)
    full = (m % tile.rows == 0, n % tile.columns == 0)
    deep = steps * tile.depth * plan.splits
    split = plan.splits > 1
    pitch = packed.shape[1]

    def body(*arguments: Any) -> None:
        *buffers, (block,), (thread,) = arguments
        named = dict(zip(roles, buffers, strict=True))
        row, column = tile_of_block(block % (high * wide), high, wide)
        part = T.bind(block // (high * wide)) if split else 0
        first = (T.bind(row * tile.rows), T.bind(column * tile.columns))
        start = T.bind(part * (steps * tile.depth)) if split else 0
        x_source = operands.matrix(0, k, k, gpu.item, first[0], m, tile.depth, full[0] and deep == k)

        def shifted(step: Any, r: Any, chunk: Any) -> tuple[Any, Any]:
            return x_source(step + (part * steps if split else 0), r, chunk)

        a = operands.Chunks(tile.left(), named["x"], shifted, operands.unit_of(k, item=gpu.item), tile.threads, thread)
        if turned:
            source = operands.matrix(start, pitch, deep, gpu.item, first[1], wide * tile.columns, tile.depth, True)
        else:
            source = operands.across(
                start * pitch, pitch, deep, gpu.item, first[1], wide * tile.columns, tile.depth, True
            )
        b = operands.Chunks(tile.right(turned), named["weights"], source, 16, tile.threads, thread, packed=True)
        if split:
            store = RowStore(m, n, first, part * (m * n), named["parts"], whole=full, in_row=True)
        else:
            store = RowStore(
                m, n, first, 0, named["y"], whole=full, in_row=True, bias=named["bias"], other=named.get("residual"),
                residual=residual, activation=activation,
            )  # fmt: skip
        run_product(tile, steps, a, b, turned, thread, store)

    sizes = {
        "x": (m * k, gpu.element), "y": (m * n, gpu.element), "residual": (m * n, gpu.element),
        "weights": (packed.size, gpu.element), "bias": (held.size, "float32"),
        "parts": (plan.splits * m * n, "float32"),
    }  # fmt: skip
    others = ("residual",) if residual != "none" else ()
    roles = ("x", "weights", "parts") if split else ("x", "y", *others, "weights", "bias")
    grid = high * wide * plan.splits
    func = emit.function([(role, *sizes[role]) for role in roles], grid, tile.threads, body, tile.dynamic)
    stem = f"{gpu.named(TABLE[0].name)}_{tile}"
    facts = (m, k, n, plan, gpu.element) + (() if split else (activation, residual))
    text = f"{m}x{k} times {k}x{n}, tiles {plan}"
    launch = Launch((grid, 1, 1), (tile.threads, 1, 1), tile.dynamic)
    if split:
        main = DeviceCall(unique(stem, *facts), func, roles, {"weights": packed}, launch, {}, f"{text}: parts of sums")
        last = bind_parts(
            gpu, rows=m, columns=n, splits=plan.splits, bias=held[:n], activation=activation, residual=residual
        )
        return main, last
    text += f", {activation.name}, residual {residual}"
    return (DeviceCall(unique(stem, *facts), func, roles, {"weights": packed, "bias": held}, launch, {}, text),)


PART_THREADS = 256


def bind_parts(
    gpu: Gpu, *, rows: int, columns: int, splits: int, bias: np.ndarray | None, bias_pitch: int = 1,
    activation: Activation = NONE, residual: Residual = "none",
) -> DeviceCall:  # fmt: skip
    """The call that adds parts [splits][rows][columns] in order and finishes them: y [rows, columns].

    `bias` [columns / bias_pitch]: element (r, c) takes bias[c // bias_pitch]. Roles (parts, y[, residual][, bias]).
    """
    size = rows * columns
    held = None if bias is None else np.ascontiguousarray(bias, np.float32)

    def body(*arguments: Any) -> None:
        *buffers, (block,), (thread,) = arguments
        named = dict(zip(roles, buffers, strict=True))
        i = T.bind(block * PART_THREADS + thread)
        with T.If(i < size), T.Then():
            total = emit.local(1)
            T.buffer_store(total, named["parts"][i], [0])
            for part in range(1, splits):
                T.buffer_store(total, total[0] + named["parts"][i + part * size], [0])
            value = total[0]
            if held is not None:
                value = value + named["bias"][i % columns // bias_pitch]
            other = tir.convert(named["residual"][i], "float32") if residual != "none" else None
            T.buffer_store(named["y"], tir.convert(finish(value, activation, residual, other), gpu.element), [i])

    sizes = {"parts": (splits * size, "float32"), "y": (size, gpu.element), "residual": (size, gpu.element)}
    roles: tuple[str, ...] = ("parts", "y", "residual") if residual != "none" else ("parts", "y")
    constants = {}
    if held is not None:
        roles, constants, sizes["bias"] = (*roles, "bias"), {"bias": held}, (held.size, "float32")
    grid = -(-size // PART_THREADS)
    func = emit.function([(role, *sizes[role]) for role in roles], grid, PART_THREADS, body)
    facts = (rows, columns, splits, held is None, bias_pitch, activation, residual, gpu.element)
    text = f"sum of {splits} parts of {rows}x{columns}, {activation.name}, residual {residual}"
    launch = Launch((grid, 1, 1), (PART_THREADS, 1, 1))
    return DeviceCall(unique(gpu.named("cuda_parts_f32"), *facts), func, roles, constants, launch, {}, text)


def bind_matmul(
    gpu: Gpu, *, batch: int, m: int, k: int, n: int, transposed: bool = False, a_shared: bool = False,
    b_shared: bool = False, scale: float = 1.0, activation: Activation = NONE, plan: Plan | None = None,
) -> DeviceCall:  # fmt: skip
    """The call for `act(scale * a @ b)` of two activations: a [batch, m, k], b [batch, k, n], or [batch, n, k] if `transposed`.

    `a_shared`, `b_shared`: that side has no batch axis, or one of length 1. Roles (a, b, y).
    """
    plan = plan or plans(gpu, m, k, n, batch, False)[0][1]
    tile, steps = plan.tile, plan.steps(k)
    high, wide = -(-m // tile.rows), -(-n // tile.columns)
    full = (m % tile.rows == 0, n % tile.columns == 0)
    deep = steps * tile.depth == k

    def body(a_buffer: Any, b_buffer: Any, y: Any, blocks: Any, threads: Any) -> None:
        (block,), (thread,) = blocks, threads
        row, column = tile_of_block(block % (high * wide), high, wide)
        item = T.bind(block // (high * wide)) if batch > 1 else 0
        first = (T.bind(row * tile.rows), T.bind(column * tile.columns))
        a_base, b_base = 0 if a_shared else item * (m * k), 0 if b_shared else item * (n * k)
        a_source = operands.matrix(a_base, k, k, gpu.item, first[0], m, tile.depth, full[0] and deep)
        side = operands.matrix if transposed else operands.across
        pitch = k if transposed else n
        b_source = side(b_base, pitch, k, gpu.item, first[1], n, tile.depth, full[1] and deep)
        unit_a, unit_b = operands.unit_of(k, item=gpu.item), operands.unit_of(pitch, item=gpu.item)
        a = operands.Chunks(tile.left(), a_buffer, a_source, unit_a, tile.threads, thread)
        b = operands.Chunks(tile.right(transposed), b_buffer, b_source, unit_b, tile.threads, thread)
        in_row = isinstance(tile, TensorTile) or not transposed
        store = RowStore(m, n, first, item * (m * n), y, whole=full, in_row=in_row, activation=activation, scale=scale)
        run_product(tile, steps, a, b, transposed, thread, store)

    sizes = [(1 if a_shared else batch) * m * k, (1 if b_shared else batch) * k * n, batch * m * n]
    arguments = [(role, size, gpu.element) for role, size in zip("aby", sizes, strict=True)]
    grid = batch * high * wide
    func = emit.function(arguments, grid, tile.threads, body, tile.dynamic)
    facts = (batch, m, k, n, transposed, a_shared, b_shared, scale, activation, plan, gpu.element)
    stem = f"{gpu.named(TABLE[1].name)}{'_t' if transposed else ''}_{tile}"
    text = f"{batch} x {m}x{k} times {k}x{n}{' transposed' if transposed else ''}, tiles {tile}"
    launch = Launch((grid, 1, 1), (tile.threads, 1, 1), tile.dynamic)
    return DeviceCall(unique(stem, *facts), func, ("a", "b", "y"), {}, launch, {}, text)
