"""Convolutions in float32 on CUDA devices whose weights are zero in 4x1 or 8x1 vectors: R outputs share a list of columns.

    y[i, oc, p] = act(bias[oc] + sum over kept (tap, c) of oc's group of w[oc, c, tap] * x[i, c, pixel of p at tap])

Groups this low would read as many elements of x as they multiply. A block of threads therefore takes the rows of several
groups, 16 a warp, and the columns that any of them keeps, step by step through shared memory as in `block_sparse`; in each
step a group multiplies the columns of its own list. A lane holds 16 rows of 4 neighbouring pixels: a kept column costs it
one read of x from shared memory, one of R weights, which all lanes read together, and 4 R multiply-adds.

Stored form: the columns of a block of rows as in `kept`, and of its groups

    tables[s * groups + j] <= e < tables[s * groups + j + 1]        what group j multiplies in step s
    index[e]                                                        the column's place in the step, as an element of the slot
    values[e][R]

In float16 tensor cores multiply rows by 16 (`block_sparse`), where like rows are gathered. Source: OVW (NeurIPS 2022).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit as tir
from sparsec.kernels.base import Format, unique
from sparsec.kernels.conv.stored import as_matrix
from sparsec.kernels.cuda import emit, gemm, kept, kept_columns
from sparsec.kernels.cuda.base import DeviceCall, Gpu
from sparsec.kernels.cuda.conv import Shape, reference
from sparsec.kernels.cuda.kept import Kept
from sparsec.kernels.cuda.operands import Operand, Placement
from sparsec.kernels.cuda.stores import PlaneStore
from sparsec.kernels.epilogue import NONE, Activation, Residual
from sparsec.program import Launch

__all__ = ["TABLE", "Tiling", "bind", "pack", "predict_us", "ranked_tilings", "reference", "refusal", "unpack"]

TALL = 16  # rows of a warp
EACH = 4  # pixels of a lane
DEPTH = 32  # columns of a step
COLUMNS = emit.WARP * EACH  # pixels of a block
ROUND = 16  # weights whose loads are issued together, of 4 columns of 4x1 or 2 of 8x1: more of these spill registers
REGISTERS = 128  # of a thread, in the largest blocks
UNEVEN = 1.15  # warps of a block wait for the one with the most columns of a step
TABLE: tuple[Format, ...] = tuple(
    Format(f"cuda_conv_f32_{rows}x1", "Conv", f"{rows}x1", "float32",
           f"convolution, {rows}x1 blocks (output x input channels at a tap) on CUDA cores", "float32", rows, 1)
    for rows in (8, 4)
)  # fmt: skip
refusal = kept_columns.refusal


@dataclass(frozen=True)
class Tiling:
    """Blocks of `warps` warps, `stages` steps of x in shared memory."""

    warps: int
    stages: int = 2

    def __str__(self) -> str:
        return f"{self.rows}x{COLUMNS}x{DEPTH}"

    @property
    def rows(self) -> int:
        """Of a block."""
        return TALL * self.warps

    @property
    def threads(self) -> int:
        """Of a block."""
        return emit.WARP * self.warps

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return 4 * self.stages * DEPTH * COLUMNS


TILINGS = (Tiling(8), Tiling(4), Tiling(2))


@dataclass(frozen=True)
class Packed:
    """The stored form; see the module's head."""

    blocks: Kept
    rows: int  # R
    tables: np.ndarray = field(repr=False)  # int32 [steps * groups + 1]
    index: np.ndarray = field(repr=False)  # int32 [entries]
    values: np.ndarray = field(repr=False)  # float32 [entries, R]

    @property
    def groups(self) -> int:
        """Of a block of rows."""
        return self.blocks.height // self.rows


def pack(w: np.ndarray, form: Format, tiling: Tiling) -> Packed:
    """w [OC, C, KH, KW] to stored form."""
    blocks = kept.pack(as_matrix(w), tiling.rows, 1, DEPTH)
    groups = tiling.rows // form.rows
    by_group = blocks.values.reshape(-1, groups, form.rows, DEPTH)
    step, group, column = np.nonzero(by_group.any(axis=2))
    counts = np.bincount(step * groups + group, minlength=blocks.steps * groups)
    tables = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    values = np.ascontiguousarray(by_group[step, group, :, column], np.float32)
    return Packed(blocks, form.rows, tables, (column * COLUMNS).astype(np.int32), values)


def unpack(packed: Packed, w_shape: tuple[int, int, int, int]) -> np.ndarray:
    """The inverse of `pack`."""
    blocks, groups = packed.blocks, packed.groups
    values = np.zeros((blocks.steps, groups, packed.rows, DEPTH), np.float32)
    step, group = np.divmod(np.repeat(np.arange(blocks.steps * groups), np.diff(packed.tables)), groups)
    values[step, group, :, packed.index // COLUMNS] = packed.values
    whole = Kept(
        blocks.height, 1, DEPTH, blocks.shape, blocks.pointers, blocks.columns, values.reshape(-1, blocks.height, DEPTH),
        blocks.order,
    )  # fmt: skip
    oc, c, kh, kw = w_shape
    return np.ascontiguousarray(kept.unpack(whole).reshape(oc, kh, kw, c).transpose(0, 3, 1, 2))


# --- cost ------------------------------------------------------------------------------------------------------------


def predict_us(gpu: Gpu, shape: Shape, w: np.ndarray, form: Format, tiling: Tiling) -> float:
    """Microseconds: kept columns by what bounds them, and the steps that bring x; the fullest multiprocessor counts."""
    units = kept.unit_mask(as_matrix(w), 1)
    steps = kept.steps_of(kept.group_mask(units, tiling.rows), 1, DEPTH)
    entries = kept.group_mask(units, form.rows).sum(axis=1)
    per_block = np.add.reduceat(entries, np.arange(0, entries.size, tiling.rows // form.rows))
    rows = form.rows
    # Multiply-adds; reads of x and of weights and their places, 128 bytes a cycle; instructions, 4 a cycle.
    column = max(rows * COLUMNS / gpu.fma, 4 + rows / 4 + 1, (EACH * rows + rows / 4 + 4) / 4)
    copies = DEPTH * COLUMNS / (4.0 if shape.direct("float32") else 1.0) * 10.0 / 128
    wide = -(-shape.x[0] * shape.pitch("float32") // COLUMNS)
    resident = max(1, gpu.resident(tiling.threads, REGISTERS, tiling.shared))
    together = min(resident, -(-steps.size * wide // gpu.multiprocessors))
    least = gemm.STEP_LATENCY / together
    cycles = np.maximum(per_block * column * UNEVEN + steps * copies, steps * least) + gemm.TILE_CYCLES / together
    blocks = np.sort(np.repeat(cycles, wide))[::-1]
    busy = float(blocks[:: gpu.multiprocessors].sum()) / (gpu.ghz * 1e3)
    from_l2 = 4.0 * wide * (float(steps.sum()) * DEPTH * COLUMNS + float(entries.sum()) * (rows + 1))
    moved = 4.0 * (np.prod(shape.x) + shape.x[0] * shape.w[0] * shape.pixels + float(entries.sum()) * (rows + 1))
    rate = gpu.l2_gbps if moved <= gpu.l2_bytes / 2 else gpu.memory_gbps
    return max(busy, from_l2 / (gpu.l2_gbps * 1e3), float(moved) / (rate * 1e3)) + gpu.launch_us


def ranked_tilings(gpu: Gpu, shape: Shape, w: np.ndarray, form: Format) -> list[tuple[float, Tiling]]:
    """Predicted microseconds of each tiling, cheapest first."""
    return sorted(((predict_us(gpu, shape, w, form, tiling), tiling) for tiling in TILINGS), key=lambda found: found[0])


# --- binding ---------------------------------------------------------------------------------------------------------


def bind(
    gpu: Gpu, shape: Shape, *, w: np.ndarray, form: Format, bias: np.ndarray | None = None, activation: Activation = NONE,
    residual: Residual = "none", tiling: Tiling | None = None,
) -> DeviceCall:  # fmt: skip
    """The call for a convolution of one group in float32, w [OC, C, KH, KW].

    Roles (x, y[, residual], values, numbers, bias).
    """
    tiling = tiling or ranked_tilings(gpu, shape, w, form)[0][1]
    packed = pack(w, form, tiling)
    blocks, direct = packed.blocks, shape.direct("float32")
    n, oc, pixels, pitch = shape.x[0], shape.w[0], shape.pixels, shape.pitch("float32")
    words = blocks.columns if direct else kept_columns.words_of(blocks, shape)
    held = np.zeros(blocks.groups * blocks.height, np.float32)
    held[:oc] = 0 if bias is None else bias
    # Kernels have few arguments: one array of numbers, the columns first.
    numbers = (np.pad(words, ((0, 1), (0, 0))).reshape(-1), blocks.pointers, blocks.order, packed.tables, packed.index)
    starts = dict(
        zip(
            ("columns", "pointers", "order", "tables", "index"),
            np.cumsum([0, *map(len, numbers)]).tolist(),
            strict=False,
        )
    )
    values = packed.values.reshape(-1) if packed.values.size else np.zeros(1, np.float32)
    constants = {"values": values, "numbers": np.concatenate(numbers).astype(np.int32), "bias": held}
    others = ("residual",) if residual != "none" else ()
    roles = ("x", "y", *others, *constants)
    wide = -(-n * pitch // COLUMNS)
    size = n * oc * pixels
    sizes = {"x": (int(np.prod(shape.x)), "float32"), "y": (size, "float32"), "residual": (size, "float32")}
    sizes |= {role: (array.size, str(array.dtype)) for role, array in constants.items()}

    def body(*arguments: Any) -> None:
        *buffers, (block,), (thread,) = arguments
        named = dict(zip(roles, buffers, strict=True))
        group, column = gemm.tile_of_block(block, blocks.groups, wide)
        begin, end = (T.bind(named["numbers"][starts["pointers"] + group + i]) for i in range(2))
        first = T.bind(named["numbers"][starts["order"] + group] * tiling.rows)
        at = T.bind(column * COLUMNS)
        place = Placement(DEPTH, COLUMNS // EACH, COLUMNS, 4)
        facts = (named["x"], named["numbers"], begin, shape, at)
        b: Operand
        if direct:
            b = kept_columns.Planes(place, *facts, DEPTH, 4, tiling.threads, thread)
        else:
            b = kept_columns.Elements(place, *facts, 0, COLUMNS, DEPTH, tiling.threads, thread)
        store = PlaneStore(
            n, oc, pixels, pitch, oc, (first, at), 0, named["y"], whole_rows=oc % tiling.rows == 0, bias=named["bias"],
            other=named.get("residual"), residual=residual, activation=activation,
        )  # fmt: skip
        _product(packed, tiling, named, starts, begin, T.bind(end - begin), b, thread, store)

    grid = blocks.groups * wide
    func = emit.function([(role, *sizes[role]) for role in roles], grid, tiling.threads, body)
    facts = (shape, form, tiling, blocks.groups, blocks.steps, packed.index.size, activation, residual)
    kernel = f"{shape.w[2]}x{shape.w[3]}s{shape.strides[0]}{shape.strides[1]}"
    text = (
        f"convolution {kernel}, {shape.x[1]} to {oc} channels, {n} x {shape.plane[0]}x{shape.plane[1]} in {form.format} "
        f"blocks, {packed.index.size} of them, tiles {tiling}, {activation.name}, residual {residual}"
    )
    launch = Launch((grid, 1, 1), (tiling.threads, 1, 1))
    return DeviceCall(unique(f"{form.name}_{tiling}", *facts), func, roles, constants, launch, {}, text)


def _product(
    packed: Packed, tiling: Tiling, named: dict[str, Any], starts: dict[str, int], begin: Any, steps: Any, b: Operand,
    thread: Any, store: PlaneStore,
) -> None:  # fmt: skip
    """What one thread does: sums of TALL rows and EACH columns over all steps, then `store`."""
    rows, own, each = packed.rows, TALL // packed.rows, ROUND // packed.rows
    size = DEPTH * COLUMNS
    room = emit.shared(tiling.stages * size)
    lane, warp = T.bind(thread % emit.WARP), T.bind(thread // emit.WARP)
    sums = emit.local(TALL * EACH)
    x, weights = emit.local(each * EACH), emit.local(ROUND)
    for i in range(TALL * EACH):
        T.buffer_store(sums, T.float32(0), [i])

    def columns(j: int, slot: Any, begin: Any, end: Any) -> None:
        """Multiply kept columns `begin` to `end` of group j."""

        def some(first: Any, count: int) -> None:
            first = T.bind(begin + first)
            for u in range(count):
                at = T.bind(named["numbers"][starts["index"] + first + u] + slot + lane * EACH)
                emit.call("sparsec_load4", emit.address(x, u * EACH), emit.address(room, at))
                for r in range(0, rows, 4):
                    source = emit.address(named["values"], (first + u) * rows + r)
                    emit.call("sparsec_load4", emit.address(weights, u * rows + r), source)
            for u in range(count):
                for r in range(rows):
                    for c in range(EACH):
                        i = (j * rows + r) * EACH + c
                        T.buffer_store(sums, weights[u * rows + r] * x[u * EACH + c] + sums[i], [i])

        tir.in_rounds(end - begin, each, some)

    ahead = tiling.stages - 1
    for step in range(ahead):
        emit.when(step < steps, lambda step=step: (b.issue(step, room, step * size), b.settle(room, step * size)))
        emit.call("sparsec_commit")
    with T.serial(0, steps) as step:
        emit.call(f"sparsec_wait<{tiling.stages - 2}>")
        emit.barrier()
        free = T.bind((step + ahead) % tiling.stages * size)
        emit.when(step + ahead < steps, lambda: (b.issue(step + ahead, room, free), b.settle(room, free)))
        emit.call("sparsec_commit")
        slot = T.bind(step % tiling.stages * size)
        table = T.bind((begin + step) * packed.groups + warp * own + starts["tables"])
        for j in range(own):
            columns(j, slot, T.bind(named["numbers"][table + j]), T.bind(named["numbers"][table + j + 1]))
    one = store([lane * EACH + c for c in range(EACH)])
    for i in range(TALL):
        one(warp * TALL + i, [sums[i * EACH + c] for c in range(EACH)])
