"""Products and convolutions with 2:4 weights on the sparse tensor cores of CUDA devices: float16, float32 sums.

    gemm   y[m, n] = act(bias[n] + sum over k of x[m, k] * w[n, k])
    conv   y[i, oc, p] = act(bias[oc] + sum over (tap, c) of w[oc, c, tap] * x[i, c, pixel of p at tap])

where of every 4 neighbours of w along k (along the input channels of a tap) at most 2 are not zero. The instruction takes
the sparse side as operand A, so outputs are the rows of a tile in both; it multiplies 32 of the depth in the time of 16.

Weights are read in fragments straight from global memory, a slice ahead of their use: half the bytes of dense ones, each
once a warp row. Only x goes through shared memory, as for dense products (`operands`, `conv`). For `gemm` a warp's rows are
dealt so that a lane ends with neighbouring outputs of one row of x, and stores them at once.

Stored form: `two_four_form`. Source: Mishra et al., Accelerating Sparse Deep Neural Networks (arXiv 2104.08378).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsec.kernels.base import Format, unique
from sparsec.kernels.cuda import conv, emit, gemm, operands, two_four_form
from sparsec.kernels.cuda.base import DeviceCall, Gpu
from sparsec.kernels.cuda.conv import Shape
from sparsec.kernels.cuda.gemm import Plan
from sparsec.kernels.cuda.operands import Operand, Placement
from sparsec.kernels.cuda.stores import PlaneStore, RowStore
from sparsec.kernels.cuda.tensor_tiles import EACH, WarpTile
from sparsec.kernels.cuda.two_four_form import SLICE, STEP
from sparsec.kernels.epilogue import NONE, Activation, Residual
from sparsec.program import Launch

TABLE: tuple[Format, ...] = (
    Format("cuda_gemm_f16_2_4", "Gemm, MatMul", "2:4", "float16", "rows times a 2:4 weight on sparse tensor cores",
           "at most 2 of 4 neighbouring inputs not zero"),
    Format("cuda_conv_f16_2_4", "Conv", "2:4", "float16", "convolution with 2:4 weights on sparse tensor cores",
           "at most 2 of 4 neighbouring input channels not zero"),
)  # fmt: skip
SPEEDUP = 1.6  # of an instruction over the dense ones it stands for: 2 on sm_8x; on sm_90 1.4 (arXiv 2402.13499)


@dataclass(frozen=True)
class SparseTile(WarpTile):
    """A block's tile of `rows` outputs x `columns`, 64 of the depth a step, `warps` along rows and columns."""

    rows: int
    columns: int
    warps: tuple[int, int]
    stages: int
    depth: int = STEP

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return 2 * self.stages * self.depth * self.columns

    @property
    def registers(self) -> int:
        """Of a thread, about: sums, two slices of weights and their metadata, one fragment ahead of x, addresses."""
        rows, columns = self.warp
        return min(255, rows * columns // 32 + rows // 2 + rows // 8 + 8 + 56)

    def right(self, turned: bool) -> Placement:
        """x in shared memory: [columns][depth], or [depth][columns]."""
        if not turned:  # 8 rows of one chunk lie in different banks
            wide = self.columns >= 64
            return Placement(
                self.depth, self.columns // EACH, self.columns, 2, lambda row: row & 7 if wide else (row >> 1) & 3
            )
        # A warp reads rows 8 a + 2 f + b at once, a and b varying: all of them in different banks.
        mix: Callable[[Any], Any] = lambda row: (row & 1) + 2 * (((row >> 1) ^ (row >> 3)) & 3)  # noqa: E731
        return Placement(self.columns, self.depth // EACH, self.depth, 2, mix)

    def step_cycles(self, gpu: Gpu) -> float:
        """Cycles of a multiprocessor for one step: tensor cores, or what shared memory and the first cache pass on."""
        rows, columns = self.warp
        warps = self.warps[0] * self.warps[1]
        moved = 2 * self.depth * (warps * (0.5625 * rows + columns) + self.columns)
        return max(self.rows * self.columns * self.depth / (SPEEDUP * gpu.tensor_fma), moved / 128)


TILES: tuple[SparseTile, ...] = (
    SparseTile(256, 128, (4, 2), 3),
    SparseTile(128, 128, (2, 2), 3),
    SparseTile(128, 64, (2, 2), 4),
    SparseTile(64, 64, (2, 2), 4),
    SparseTile(64, 32, (2, 1), 4),
)
GATHER_TILES: tuple[SparseTile, ...] = (
    SparseTile(256, 64, (8, 1), 3),
    SparseTile(128, 64, (4, 2), 3),
    SparseTile(64, 64, (2, 2), 3),
    SparseTile(64, 32, (2, 1), 3),
)


def tile_us(gpu: Gpu, tile: SparseTile, m: int, k: int, n: int, more: float = 0.0) -> float:
    """Time for m outputs, n columns, depth k, by the dense model (`gemm.tile_us`) with what the weights' form saves."""
    blocks = -(-m // tile.rows) * -(-n // tile.columns)
    resident = max(1, gpu.resident(tile.threads, tile.registers, tile.shared))
    together = min(resident, -(-blocks // gpu.multiprocessors))
    steps = -(-k // tile.depth)
    cycles = steps * max(tile.step_cycles(gpu) + more, gemm.STEP_LATENCY / together) + gemm.TILE_CYCLES / together
    busy = -(-blocks // gpu.multiprocessors) * cycles / (gpu.ghz * 1e3)
    from_l2 = blocks * steps * tile.depth * (1.125 * tile.rows + 2 * tile.columns)
    moved = 1.125 * m * k + 2 * (n * k + m * n)
    rate = gpu.l2_gbps if moved <= gpu.l2_bytes / 2 else gpu.memory_gbps
    return max(busy, from_l2 / (gpu.l2_gbps * 1e3), moved / (rate * 1e3)) + gpu.launch_us


@cache
def gemm_tiles(gpu: Gpu, m: int, k: int, n: int) -> tuple[tuple[float, SparseTile], ...]:
    """Predicted microseconds of each tile for x [m, k] times w [n, k] transposed, cheapest first."""
    return tuple(sorted(((tile_us(gpu, tile, n, k, m), tile) for tile in TILES), key=lambda found: found[0]))


@cache
def conv_tiles(gpu: Gpu, shape: Shape) -> tuple[tuple[float, SparseTile], ...]:
    """Predicted microseconds of each tile for a convolution, cheapest first."""
    direct = shape.direct("float16")
    found = []
    for tile in TILES if direct else GATHER_TILES:
        gathered = 0.0 if direct else conv.GATHER["float16"] * tile.columns * tile.depth / 128
        columns = shape.x[0] * shape.pitch("float16")
        found.append((tile_us(gpu, tile, shape.rows, shape.depth("float16"), columns, gathered), tile))
    return tuple(sorted(found, key=lambda found: found[0]))


def matrix_of(w: np.ndarray, shape: Shape) -> np.ndarray:
    """w [OC, C, KH, KW] with its depth in the order that a convolution's right side has: [OC, depth]."""
    tile = SparseTile(shape.rows, 1, (1, 1), 1, shape.depth("float16"))
    return conv.pack(_HALF, w, shape, Plan(tile))[0]  # type: ignore[arg-type]


_HALF = Gpu("", 1, 1.0, 1.0, 1.0, 1, 1, element="float16")


def refusal(w: np.ndarray, shape: Shape | None = None) -> str | None:
    """Why a weight [N, K], or [OC, C, KH, KW] of a convolution, has no 2:4 form, or None."""
    if shape is not None and shape.groups > 1:
        return f"{shape.groups} groups"
    if not two_four_form.fits(w if shape is None else w.transpose(0, 2, 3, 1).reshape(-1, w.shape[1])):
        return "more than 2 of 4 neighbouring inputs are not zero"
    return None


def whole(matrix: np.ndarray, tile: SparseTile, dealt: bool) -> np.ndarray:
    """[N, K] filled up to whole tiles. `dealt`: the rows of a warp so that lane group g has neighbours."""
    n, k = matrix.shape
    full = np.zeros((-(-n // tile.rows) * tile.rows, -(-k // tile.depth) * tile.depth), matrix.dtype)
    full[:n, :k] = matrix
    return full[deal(full.shape[0], tile.warp[0])] if dealt else full


def deal(rows: int, warp: int) -> np.ndarray:
    """Which output each row of a tile's fragments is: row 16 i + 8 h + g of a warp is its output g * warp / 8 + 2 i + h."""
    i, h, g = np.meshgrid(np.arange(warp // 16), np.arange(2), np.arange(8), indexing="ij")
    inside = (g * (warp // 8) + 2 * i + h).reshape(-1)
    return np.asarray((np.arange(0, rows, warp)[:, None] + inside).reshape(-1))


# --- kernels ---------------------------------------------------------------------------------------------------------

Finish = Callable[["_Sums"], None]


@dataclass(frozen=True)
class _Sums:
    """The sums of a thread. Fragment (i, f), register 2 h + e: row row0 + 16 i + 8 h + g, and of columns, by `turned`, that
    of `column`."""

    values: Any
    row0: Any
    column0: Any
    lane: Any
    counts: tuple[int, int]

    def at(self, i: int, f: int, h: int, e: int) -> Any:
        """One sum."""
        return self.values[(i * self.counts[1] + f) * 4 + 2 * h + e]


def product(
    tile: SparseTile, steps: int, weights: Any, metadata: Any, first: Any, b: Operand, turned: bool, thread: Any
) -> _Sums:
    """What one thread does for one tile, whose rows begin at row `first` of the weights."""
    rows, columns = tile.warp
    count, fragments, slices = rows // 16, columns // 8, tile.depth // SLICE
    size = b.placement.size
    room = emit.shared(tile.stages * size, "float16")
    lane, warp = T.bind(thread % 32), T.bind(thread // 32)
    row0, column0 = T.bind(warp // tile.warps[1] * rows), T.bind(warp % tile.warps[1] * columns)
    sums = emit.local(count * fragments * 4)
    for i in range(count * fragments * 4):
        T.buffer_store(sums, T.float32(0), [i])
    held_a = [emit.local(count * 4, "uint32") for _ in range(2)]
    held_e = [emit.local(count, "uint32") for _ in range(2)]
    held_b = [emit.local(4, "uint32") for _ in range(2)]
    row_tile = T.bind((first + row0) // 16)
    # One slice and one step more are stored than there are, so that loading ahead never leaves the array.
    from_a = T.bind(row_tile * ((steps * slices + 1) * 32 * EACH) + lane * EACH)
    from_e = T.bind(row_tile * ((steps + 1) * 32) + lane)
    if turned:
        row = column0 + lane % 8 // 2 * 8 + lane % 2
        # Fragment f of four is 2 f columns further: bits 1 and 2 of the row, which join the XOR.
        from_b = [T.bind(b.placement.at(row + 2 * f, 4 * s + lane // 8)) for s in range(slices) for f in range(4)]
    else:
        from_b = [T.bind(b.placement.at(lane, column0 // EACH + f)) for f in range(fragments)]

    def load_a(s: int, index: Any) -> None:
        for i in range(count):
            at = from_a + (i * (steps * slices + 1) + index) * (32 * EACH)
            emit.call("sparsec_get<16>", emit.address(held_a[s % 2], i * 4), emit.address(weights, at))

    def load_e(parity: int, step: Any) -> None:
        for i in range(count):
            at = from_e + (i * (steps + 1) + step) * 32
            emit.call("sparsec_get<4>", emit.address(held_e[parity], i), emit.address(metadata, at))

    def load_b(number: int, s: int, f: int, slot: Any) -> None:
        if turned:
            at, name = slot * size + from_b[4 * s + f % 4] + f // 4 * 32 * tile.depth, "sparsec_ldmatrix4"
        else:
            at, name = slot * size + from_b[f] + s * SLICE * tile.columns, "sparsec_ldmatrix4_trans"
        emit.call(name, emit.address(held_b[number % 2], 0), emit.address(room, at))

    ahead = tile.stages - 1
    load_a(0, 0)
    load_e(0, 0)
    for step in range(ahead):
        if step < steps:
            b.issue(step, room, step * size)
            b.settle(room, step * size)
        emit.call("sparsec_commit")
    with T.serial(0, steps) as step:
        emit.call(f"sparsec_wait<{tile.stages - 2}>")
        emit.barrier()
        slot, free = T.bind(step % tile.stages), T.bind((step + ahead) % tile.stages)
        load_b(0, 0, 0, slot)
        if steps > ahead:
            with T.If(step + ahead < steps), T.Then():
                b.issue(step + ahead, room, free * size)
        emit.call("sparsec_commit")
        load_e(1, step + 1)
        for s in range(slices):
            load_a(s + 1, step * slices + s + 1)
            for f in range(fragments):
                number = s * fragments + f
                if number + 1 < slices * fragments:
                    load_b(number + 1, (number + 1) // fragments, (number + 1) % fragments, slot)
                for i in range(count):
                    emit.call(
                        f"sparsec_mma_sparse<{s}>", emit.address(sums, (i * fragments + f) * 4),
                        emit.address(held_a[s % 2], i * 4), emit.address(held_b[number % 2], 0), held_e[0][i],
                    )  # fmt: skip
        for i in range(count):
            T.buffer_store(held_e[0], held_e[1][i], [i])
        if steps > ahead:
            with T.If(step + ahead < steps), T.Then():
                b.settle(room, free * size)
    return _Sums(sums, row0, column0, lane, (count, fragments))


def finish_rows(sums: _Sums, store: RowStore) -> None:
    """Sums of a turned B to y [column, row]: a lane has 2 or more neighbouring rows of every column."""
    count, fragments = sums.counts
    each = 2 * count
    one = store([sums.row0 + sums.lane // 4 * each + c for c in range(each)])
    for f in range(fragments):
        for e in range(2):
            column = sums.column0 + f // 4 * 32 + sums.lane % 4 * 8 + 2 * (f % 4) + e
            one(column, [sums.at(c // 2, f, c % 2, e) for c in range(each)])


def finish_planes(sums: _Sums, store: PlaneStore, turned: bool) -> None:
    """Sums to planes: a lane has 8 neighbouring columns of a row; where B is not turned, its quad exchanges them."""
    count, fragments = sums.counts
    for q in range(fragments // 4):
        one = store([sums.column0 + q * 32 + sums.lane % 4 * 8 + c for c in range(EACH)])
        for i in range(count):
            for h in range(2):
                values = [sums.at(i, 4 * q + c // 2, h, c % 2) for c in range(EACH)]
                if not turned:
                    parts = []
                    for e in range(2):
                        part = emit.local(4)
                        for s in range(4):
                            T.buffer_store(part, sums.at(i, 4 * q + s, h, e), [s])
                        emit.call("sparsec_quad_transpose", emit.address(part, 0))
                        parts.append(part)
                    values = [parts[c % 2][c // 2] for c in range(EACH)]
                one(sums.row0 + i * 16 + h * 8 + sums.lane // 4, values)


def bind_gemm(
    gpu: Gpu, *, m: int, w: np.ndarray, bias: np.ndarray | None = None, activation: Activation = NONE,
    residual: Residual = "none", tile: SparseTile | None = None,
) -> DeviceCall:  # fmt: skip
    """The call for x [m, K] times the 2:4 weight w [N, K] transposed. Roles (x, y[, residual], weights, metadata, bias).

    Raises ValueError where w is not 2:4.
    """
    n, k = w.shape
    tile = tile or gemm_tiles(gpu, m, k, n)[0][1]
    high, wide = -(-n // tile.rows), -(-m // tile.columns)
    constants = _constants(whole(w, tile, True), bias)
    steps = -(-k // tile.depth)

    def body(named: dict[str, Any], block: Any, thread: Any) -> None:
        row, column = gemm.tile_of_block(block, high, wide)
        first = (T.bind(row * tile.rows), T.bind(column * tile.columns))
        full = (m % tile.columns == 0, n % tile.rows == 0)
        source = operands.matrix(0, k, k, 2, first[1], m, tile.depth, full[0] and k % tile.depth == 0)
        b = operands.Chunks(tile.right(True), named["x"], source, operands.unit_of(k, item=2), tile.threads, thread)
        store = RowStore(
            m, n, (first[1], first[0]), 0, named["y"], whole=full, in_row=True, bias=named["bias"],
            other=named.get("residual"), residual=residual, activation=activation,
        )  # fmt: skip
        finish_rows(product(tile, steps, named["weights"], named["metadata"], first[0], b, True, thread), store)

    facts = (m, k, n, tile, activation, residual)
    text = f"{m}x{k} times {k}x{n}, 2:4, tiles {tile}, {activation.name}, residual {residual}"
    return _call(TABLE[0], tile, high * wide, m * k, m * n, constants, residual, body, facts, text)


def bind_conv(
    gpu: Gpu, shape: Shape, *, w: np.ndarray, bias: np.ndarray | None = None, activation: Activation = NONE,
    residual: Residual = "none", tile: SparseTile | None = None,
) -> DeviceCall:  # fmt: skip
    """The call for one convolution of one group, w [OC, C, KH, KW] 2:4 along C. Roles (x, y[, residual], weights, metadata,
    bias). Raises ValueError where w is not 2:4."""
    tile = tile or conv_tiles(gpu, shape)[0][1]
    n, oc, pixels, pitch = shape.x[0], shape.w[0], shape.pixels, shape.pitch("float16")
    direct = shape.direct("float16")
    constants = _constants(whole(matrix_of(w, shape), tile, False), bias)
    steps = -(-shape.depth("float16") // tile.depth)
    high, wide = -(-oc // tile.rows), -(-n * pitch // tile.columns)

    def body(named: dict[str, Any], block: Any, thread: Any) -> None:
        row, column = gemm.tile_of_block(block, high, wide)
        first = (T.bind(row * tile.rows), T.bind(column * tile.columns))
        b = right_side(tile, named["x"], shape, first[1], thread)
        store = PlaneStore(
            n, oc, pixels, pitch, oc, first, 0, named["y"], whole_rows=oc % tile.rows == 0, bias=named["bias"],
            other=named.get("residual"), residual=residual, activation=activation,
        )  # fmt: skip
        sums = product(tile, steps, named["weights"], named["metadata"], first[0], b, not direct, thread)
        finish_planes(sums, store, not direct)

    kernel = f"{shape.w[2]}x{shape.w[3]}s{shape.strides[0]}{shape.strides[1]}"
    text = f"convolution {kernel}, {shape.x[1]} to {oc} channels, {n} x {shape.plane[0]}x{shape.plane[1]}, 2:4, tiles {tile}"
    size = (int(np.prod(shape.x)), n * oc * pixels)
    return _call(
        TABLE[1], tile, high * wide, *size, constants, residual, body, (shape, tile, activation, residual), text
    )


def right_side(tile: SparseTile, x: Any, shape: Shape, first: Any, thread: Any) -> Operand:
    """x as a convolution's right side, tile columns from `first` on."""
    pitch, direct = shape.pitch("float16"), shape.direct("float16")
    place = tile.right(not direct)
    if direct:
        source = conv.direct_operand(shape, "float16", 2, pitch, first, 0, tile.depth)
        unit = operands.unit_of(shape.pixels, item=2)
        return operands.Chunks(place, x, source, unit, tile.threads, thread)
    run = shape.run("float16")
    facts = (x, shape, pitch, first, 0, tile.columns, place.chunks, tile.threads, thread)
    return conv.Runs(place, *facts, run=run, depth=tile.depth)


def _constants(matrix: np.ndarray, bias: np.ndarray | None) -> dict[str, np.ndarray]:
    values, metadata = two_four_form.pack(matrix)
    held = np.zeros(matrix.shape[0], np.float32)
    if bias is not None:
        held[: bias.size] = bias
    return {"weights": values.reshape(-1), "metadata": metadata.reshape(-1), "bias": held}


def _call(
    form: Format, tile: SparseTile, grid: int, x: int, y: int, constants: dict[str, np.ndarray], residual: Residual,
    body: Callable[[dict[str, Any], Any, Any], None], facts: tuple[Any, ...], text: str,
) -> DeviceCall:  # fmt: skip
    others = ("residual",) if residual != "none" else ()
    roles = ("x", "y", *others, *constants)
    sizes = {"x": (x, "float16"), "y": (y, "float16"), "residual": (y, "float16")}
    sizes |= {role: (array.size, str(array.dtype)) for role, array in constants.items()}

    def whole_body(*arguments: Any) -> None:
        *buffers, (block,), (thread,) = arguments
        body(dict(zip(roles, buffers, strict=True)), block, thread)

    func = emit.function([(role, *sizes[role]) for role in roles], grid, tile.threads, whole_body)
    launch = Launch((grid, 1, 1), (tile.threads, 1, 1))
    return DeviceCall(unique(f"{form.name}_{tile}", *facts), func, roles, constants, launch, {}, text)
