"""Products and convolutions on CUDA devices whose weights are zero in blocks: R outputs share a list of kept columns.

    gemm   y[m, n] = act(bias[n] + sum over kept columns k of n's group of x[m, k] * w[n, k])
    conv   y[i, oc, p] = act(bias[oc] + sum over kept (tap, c) of oc's group of w[oc, c, tap] * x[i, c, pixel of p at tap])

A group of R outputs and a tile of columns (pixels, or rows of x) is a block of threads: a dense product as in
`tensor_tiles` and `core_tiles`, with as many steps as the group's list takes, whose right side gathers the kept columns
(`kept_columns`). R x C blocks of any C are R x 1 here; for `gemm` lists of 8 neighbours are read in whole chunks. Groups
with most steps run first, so that the last blocks to end are short ones.

Where blocks are lower than a tile needs them, rows that keep nearly the same columns are gathered into groups (`likeness`):
the zeros this adds cost less than narrow tiles. Their outputs are scattered as they are stored.

Stored form: `kept`. Sources: OVW (NeurIPS 2022) for rows that share their index, and for gathering like ones; Gray et al.,
GPU Kernels for Block-Sparse Weights (2017), for blocks on tensor cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsec.kernels.base import Format, unique
from sparsec.kernels.conv.stored import as_matrix
from sparsec.kernels.cuda import emit, gemm, kept, kept_columns
from sparsec.kernels.cuda.base import DeviceCall, Gpu
from sparsec.kernels.cuda.conv import Shape
from sparsec.kernels.cuda.core_tiles import CoreTile
from sparsec.kernels.cuda.gemm import Tile
from sparsec.kernels.cuda.kept import Kept
from sparsec.kernels.cuda.operands import CHUNK, Chunks, Operand, Placement
from sparsec.kernels.cuda.stores import PlaneStore, RowStore
from sparsec.kernels.cuda.tensor_tiles import TensorTile
from sparsec.kernels.epilogue import NONE, Activation, Residual
from sparsec.program import Launch

WIDE = 8  # neighbours of a unit that is read in whole chunks


def _formats() -> tuple[Format, ...]:
    found = []
    for rows in (128, 64, 32):
        for width in (WIDE, 1):
            text = f"rows times a weight in {rows}x{width} blocks (outputs x inputs)"
            found.append((f"cuda_gemm_f32_{rows}x{width}", "Gemm, MatMul", rows, width, text))
    for rows in (128, 64, 32, 16):
        text = f"convolution, {rows}x1 blocks (output x input channels at a tap)"
        found.append((f"cuda_conv_f32_{rows}x1", "Conv", rows, 1, text))
    return tuple(
        Format(name, op, f"{rows}x{width}", "float32", text, "constant weight", rows, width)
        for name, op, rows, width, text in found
    )


TABLE = _formats()
GEMM_TABLE = tuple(form for form in TABLE if form.op != "Conv")
CONV_TABLE = tuple(form for form in TABLE if form.op == "Conv")

# Tiles of a product are [rows of x][outputs], of a convolution [output channels][pixels].
GEMM_TILES: dict[str, tuple[Tile, ...]] = {
    "float16": (
        TensorTile(128, 128, 32, (2, 4), 3), TensorTile(64, 128, 32, (2, 2), 4), TensorTile(32, 128, 64, (1, 4), 2),
        TensorTile(256, 64, 32, (4, 2), 2), TensorTile(128, 64, 32, (2, 2), 4), TensorTile(32, 64, 64, (2, 2), 4),
        TensorTile(256, 32, 32, (8, 1), 2), TensorTile(128, 32, 32, (4, 1), 4), TensorTile(32, 32, 64, (2, 1), 4),
    ),
    "float32": (
        CoreTile(128, 128, 8, (8, 8), 4), CoreTile(64, 128, 16, (8, 8), 3), CoreTile(16, 128, 16, (4, 4), 3),
        CoreTile(128, 64, 16, (8, 8), 3), CoreTile(64, 64, 16, (4, 8), 3), CoreTile(16, 64, 16, (2, 4), 4),
        CoreTile(128, 32, 16, (8, 4), 3), CoreTile(32, 32, 16, (4, 4), 4),
    ),
}  # fmt: skip
PICK_TILES: dict[str, tuple[Tile, ...]] = {  # single columns wait in registers
    "float16": (
        TensorTile(128, 128, 32, (2, 4), 3), TensorTile(32, 128, 32, (1, 4), 4),
        TensorTile(128, 64, 32, (4, 2), 3), TensorTile(32, 64, 32, (2, 2), 4),
        TensorTile(128, 32, 32, (4, 1), 4), TensorTile(32, 32, 32, (2, 1), 4),
    ),
    "float32": (
        CoreTile(128, 128, 8, (8, 8), 4), CoreTile(32, 128, 16, (8, 8), 3),
        CoreTile(64, 64, 16, (4, 8), 3), CoreTile(32, 64, 16, (4, 8), 3),
        CoreTile(64, 32, 16, (4, 4), 3), CoreTile(32, 32, 16, (4, 4), 4),
    ),
}  # fmt: skip
CONV_TILES: dict[str, tuple[Tile, ...]] = {
    "float16": (
        TensorTile(128, 128, 32, (2, 4), 3), TensorTile(128, 64, 32, (2, 2), 4),
        TensorTile(64, 128, 32, (2, 2), 4), TensorTile(64, 64, 32, (2, 2), 4),
        TensorTile(32, 256, 32, (1, 4), 2), TensorTile(32, 128, 32, (1, 4), 4), TensorTile(32, 64, 64, (2, 2), 3),
        TensorTile(16, 128, 32, (1, 4), 4), TensorTile(16, 64, 64, (1, 2), 4),
    ),
    "float32": (
        CoreTile(128, 128, 8, (8, 8), 4), CoreTile(128, 64, 16, (8, 8), 3),
        CoreTile(64, 128, 16, (8, 8), 3), CoreTile(64, 64, 16, (4, 8), 3),
        CoreTile(32, 128, 16, (4, 8), 3), CoreTile(32, 64, 16, (4, 4), 4),
        CoreTile(16, 128, 16, (4, 4), 3), CoreTile(16, 64, 16, (2, 4), 4),
    ),
}  # fmt: skip
GATHER_TILES: tuple[TensorTile, ...] = (
    TensorTile(128, 128, 32, (2, 4), 3), TensorTile(128, 64, 32, (4, 2), 3),
    TensorTile(64, 128, 32, (2, 4), 3), TensorTile(64, 64, 32, (2, 2), 4),
    TensorTile(32, 128, 32, (1, 4), 4), TensorTile(32, 64, 32, (1, 2), 4),
    TensorTile(16, 128, 32, (1, 4), 4), TensorTile(16, 64, 32, (1, 2), 4),
)  # fmt: skip
MOST_LIKENESS = 5e8  # comparisons of rows, each as long as its columns, for gathering like ones
GATHER = {"float16": 4.0, "float32": 10.0}  # instructions of a thread for one element that it gathers


def gemm_tiles(form: Format, element: str) -> tuple[Tile, ...]:
    """The tiles of a product's format: as many columns as a group has outputs."""
    tiles = (GEMM_TILES if form.columns == WIDE else PICK_TILES)[element]
    return tuple(tile for tile in tiles if tile.columns == form.rows)


def conv_tiles(form: Format, shape: Shape, element: str) -> tuple[Tile, ...]:
    """The tiles of a convolution's format: as many rows as a group has outputs."""
    tiles: tuple[Tile, ...] = CONV_TILES[element]
    if element == "float16" and not shape.direct(element):
        tiles = GATHER_TILES
    return tuple(tile for tile in tiles if tile.rows == form.rows)


# --- cost ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A tile, and which rows are a group (int32 [groups, R]) where they were gathered by likeness."""

    tile: Tile
    rows: Any = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.tile}{', like rows gathered' if self.rows is not None else ''}"


def tile_us(
    gpu: Gpu, tile: Tile, steps: np.ndarray, height: int, across: int, columns: int, moved: float, gathers: bool
) -> float:
    """Time of a layer: the dense model (`gemm.tile_us`) for blocks of unequal length.

    steps: of each group of `height` outputs. columns: of the right side, of which a tile has `across`. moved: bytes of
    activations. gathers: elements pass through registers.
    """
    blocks = np.sort(np.repeat(steps, -(-columns // across)))[::-1]
    resident = max(1, gpu.resident(tile.threads, tile.registers, tile.shared))
    together = min(resident, -(-blocks.size // gpu.multiprocessors))
    more = GATHER[gpu.element] * across * tile.depth / 128 if gathers else 0.0
    each = max(tile.step_cycles(gpu) + more, gemm.STEP_LATENCY / together)
    # Blocks go to multiprocessors in turn, longest first: the first one has the longest of each round.
    rounds = blocks[:: gpu.multiprocessors]
    busy = float((rounds * each + gemm.TILE_CYCLES / together).sum()) / (gpu.ghz * 1e3)
    from_l2 = gpu.item * float(blocks.sum()) * tile.depth * (height + across) / (gpu.l2_gbps * 1e3)
    moved += float(steps.sum()) * tile.depth * (gpu.item * height + 4)
    rate = gpu.l2_gbps if moved <= gpu.l2_bytes / 2 else gpu.memory_gbps
    return max(busy, from_l2, moved / (rate * 1e3)) + gpu.launch_us


def gemm_plans(gpu: Gpu, m: int, w: np.ndarray, form: Format) -> list[tuple[float, Plan]]:
    """Predicted microseconds of x [m, K] times w [N, K] transposed, cheapest first."""
    mask = kept.group_mask(kept.unit_mask(w, form.columns), form.rows)
    n, k = w.shape
    found = []
    for tile in gemm_tiles(form, gpu.element):
        steps = kept.steps_of(mask, form.columns, tile.depth)
        moved = gpu.item * float(m * k + m * n)
        us = tile_us(gpu, tile, steps, form.rows, tile.rows, m, moved, form.columns != WIDE)
        found.append((us, Plan(tile)))
    return sorted(found, key=lambda item: item[0])


def conv_plans(gpu: Gpu, shape: Shape, w: np.ndarray, form: Format, likeness: bool = True) -> list[tuple[float, Plan]]:
    """Predicted microseconds of a convolution, cheapest first. likeness: whether rows may be gathered."""
    units = kept.unit_mask(as_matrix(w), 1)
    ways: list[Any] = [None]
    if likeness and (rows := like_rows(units, form.rows)) is not None:
        ways.append(rows)
    found = []
    for rows in ways:
        mask = kept.group_mask(units, form.rows, rows)
        for tile in conv_tiles(form, shape, gpu.element):
            steps = kept.steps_of(mask, 1, tile.depth)
            columns = shape.x[0] * shape.pitch(gpu.element)
            moved = gpu.item * float(np.prod(shape.x) + shape.x[0] * shape.w[0] * shape.pixels)
            gathers = not shape.direct(gpu.element)
            us = tile_us(gpu, tile, steps, form.rows, tile.columns, columns, moved, gathers)
            found.append((us, Plan(tile, rows)))
    return sorted(found, key=lambda item: item[0])


def like_rows(units: np.ndarray, height: int) -> np.ndarray | None:
    """Rows gathered so that those of a group keep nearly the same columns: int32 [groups, R], N where a group is not full.

    Greedy: a group begins with the row that keeps most and takes the row that adds the fewest columns, rows that keep the
    same ones together. units: bool [N, columns]. None where that saves less than a twentieth, or there are too many rows.
    """
    n = units.shape[0]
    same, inverse = np.unique(units, axis=0, return_inverse=True)
    members = [list(np.flatnonzero(inverse.reshape(-1) == i)) for i in range(same.shape[0])]
    if n <= height or float(same.shape[0]) ** 2 * same.shape[1] > MOST_LIKENESS:
        return None
    left, sizes = same.astype(np.float32), same.sum(axis=1)
    free = np.ones(same.shape[0], bool)
    groups: list[list[int]] = []
    while free.any():
        seed = int(np.argmax(np.where(free, sizes, -1)))
        group: list[int] = []
        union = same[seed].copy()
        kind = seed
        while True:
            take = members[kind][: height - len(group)]
            members[kind] = members[kind][len(take) :]
            group += take
            union |= same[kind]
            free[kind] = bool(members[kind])
            if len(group) == height or not free.any():
                break
            added = left @ (~union).astype(np.float32)
            # Of those that add equally little, the one that keeps most.
            kind = int(np.argmin(np.where(free, added - sizes / (sizes.max() + 1.0), np.inf)))
        groups.append(group + [n] * (height - len(group)))
    rows = np.array(groups, np.int32)
    if kept.group_mask(units, height, rows).sum() > 0.95 * kept.group_mask(units, height).sum():
        return None
    return rows


# --- binding ---------------------------------------------------------------------------------------------------------


def bind_gemm(
    gpu: Gpu, *, m: int, w: np.ndarray, form: Format, bias: np.ndarray | None = None, activation: Activation = NONE,
    residual: Residual = "none", plan: Plan | None = None,
) -> DeviceCall:  # fmt: skip
    """The call for x [m, K] times w [N, K] transposed. Roles (x, y[, residual], values, columns, pointers, order, bias)."""
    plan = plan or gemm_plans(gpu, m, w, form)[0][1]
    tile, (n, k) = plan.tile, w.shape
    packed = kept.pack(w, form.rows, form.columns, tile.depth)
    tensor = isinstance(tile, TensorTile)
    values = packed.values if tensor else packed.values.transpose(0, 2, 1)
    constants = _constants(gpu, packed, values, packed.columns, bias)
    wide = -(-m // tile.rows)

    def body(named: dict[str, Any], group: Any, column: Any, thread: Any) -> None:
        begin, steps = _steps(named, group)
        first = (T.bind(column * tile.rows), T.bind(named["order"][group] * form.rows))
        a: Operand
        facts = (named["x"], named["columns"], begin, m, k, first[0])
        if form.columns == WIDE:
            a = kept_columns.Units(tile.left(), *facts, packed, gpu.item, tile.threads, thread)
        else:
            a = kept_columns.Picks(tile.left(), *facts, tile.threads, thread)
        b = _weights(tile.right(tensor), named["values"], begin, tile, thread)
        store = RowStore(
            m, n, first, 0, named["y"], whole=(m % tile.rows == 0, n % form.rows == 0), in_row=True, bias=named["bias"],
            other=named.get("residual"), residual=residual, activation=activation,
        )  # fmt: skip
        gemm.run_product(tile, steps, a, b, tensor, thread, store)

    text = f"{m}x{k} times {k}x{n} in {form.format} blocks, {packed.steps} steps of {tile.depth}, tiles {plan}"
    sizes = (m * k, m * n)
    return _call(gpu, form, plan, packed, wide, sizes, constants, activation, residual, body, (m, k, n), text)


def bind_conv(
    gpu: Gpu, shape: Shape, *, w: np.ndarray, form: Format, bias: np.ndarray | None = None, activation: Activation = NONE,
    residual: Residual = "none", plan: Plan | None = None,
) -> DeviceCall:  # fmt: skip
    """The call for a convolution of one group, w [OC, C, KH, KW]. Roles (x, y[, residual], values, columns, pointers, order,
    bias)."""
    plan = plan or conv_plans(gpu, shape, w, form)[0][1]
    tile, element = plan.tile, gpu.element
    packed = kept.pack(as_matrix(w), form.rows, 1, tile.depth, plan.rows)
    direct = shape.direct(element)
    columns = packed.columns if direct else kept_columns.words_of(packed, shape)
    constants = _constants(gpu, packed, packed.values, columns, bias)
    n, oc, pixels, pitch = shape.x[0], shape.w[0], shape.pixels, shape.pitch(element)
    turned = isinstance(tile, TensorTile) and not direct
    place = tile.right(turned)

    def body(named: dict[str, Any], group: Any, column: Any, thread: Any) -> None:
        begin, steps = _steps(named, group)
        at = T.bind(column * tile.columns)
        facts = (named["x"], named["columns"], begin, shape)
        b: Operand
        if direct:
            b = kept_columns.Planes(place, *facts, at, tile.depth, gpu.item, tile.threads, thread)
        else:
            kind = kept_columns.Pixels if turned else kept_columns.Elements
            down = place.chunks if turned else tile.depth
            b = kind(place, *facts, at, 0, tile.columns, down, tile.threads, thread)
        a = _weights(tile.left(), named["values"], begin, tile, thread)
        gathered = plan.rows is not None
        first = T.bind(group * form.rows if gathered else named["order"][group] * form.rows)
        store = PlaneStore(
            n, oc, pixels, pitch, oc, (0 if gathered else first, at), 0, named["y"],
            whole_rows=not gathered and oc % form.rows == 0, bias=named["bias"], other=named.get("residual"),
            residual=residual, activation=activation,
        )  # fmt: skip
        gemm.run_product(
            tile, steps, a, b, turned, thread, _scattered(store, named["order"], first) if gathered else store
        )

    kernel = f"{shape.w[2]}x{shape.w[3]}s{shape.strides[0]}{shape.strides[1]}"
    what = f"convolution {kernel}, {shape.x[1]} to {oc} channels, {n} x {shape.plane[0]}x{shape.plane[1]}"
    text = f"{what} in {form.format} blocks, {packed.steps} steps of {tile.depth}, tiles {plan}"
    sizes = (int(np.prod(shape.x)), n * oc * pixels)
    wide = -(-n * pitch // tile.columns)
    return _call(gpu, form, plan, packed, wide, sizes, constants, activation, residual, body, (shape,), text)


def _scattered(store: PlaneStore, rows: Any, first: Any) -> Callable[[list[Any]], Callable[[Any, list[Any]], None]]:
    """The store of rows that lie anywhere: row r of the tile is rows[first + r]; beyond the last output nothing is stored."""

    def columns(found: list[Any]) -> Callable[[Any, list[Any]], None]:
        one = store(found)
        return lambda row, values: one(T.bind(rows[first + row]), values)

    return columns


def _steps(named: dict[str, Any], group: Any) -> tuple[Any, Any]:
    """First step of a group, and how many it has."""
    begin = T.bind(named["pointers"][group])
    return begin, T.bind(named["pointers"][group + 1] - begin)


def _weights(place: Placement, values: Any, begin: Any, tile: Tile, thread: Any) -> Chunks:
    """The group's weights: a step's lie as the slot does, row by row."""
    each, row_length = CHUNK // place.item, place.chunks * CHUNK // place.item

    def source(step: Any, row: Any, chunk: Any) -> tuple[Any, Any]:
        return (begin + step) * (place.rows * row_length) + row * row_length + chunk * each, each

    return Chunks(place, values, source, CHUNK, tile.threads, thread, packed=True)


def _constants(
    gpu: Gpu, packed: Kept, values: np.ndarray, columns: np.ndarray, bias: np.ndarray | None
) -> dict[str, np.ndarray]:
    n = packed.shape[0]
    order = packed.order if packed.rows is None else packed.rows.reshape(-1)
    held = np.zeros(packed.groups * packed.height, np.float32)
    held[:n] = 0 if bias is None else bias
    columns = np.pad(columns, ((0, 1), (0, 0)))  # a step more: numbers are read ahead
    values = values.reshape(-1) if values.size else np.zeros(1, np.float32)  # an empty array has no address
    found = {"values": gpu.array(values), "columns": np.asarray(columns, np.int32).reshape(-1)}
    return found | {"pointers": packed.pointers, "order": np.asarray(order, np.int32), "bias": held}


def _call(
    gpu: Gpu, form: Format, plan: Plan, packed: Kept, wide: int, size: tuple[int, int], constants: dict[str, np.ndarray],
    activation: Activation, residual: Residual, body: Callable[[dict[str, Any], Any, Any, Any], None],
    facts: tuple[Any, ...], text: str,
) -> DeviceCall:  # fmt: skip
    tile = plan.tile
    others = ("residual",) if residual != "none" else ()
    roles = ("x", "y", *others, *constants)
    sizes = {"x": (size[0], gpu.element), "y": (size[1], gpu.element), "residual": (size[1], gpu.element)}
    sizes |= {role: (array.size, str(array.dtype)) for role, array in constants.items()}

    def whole(*arguments: Any) -> None:
        *buffers, (block,), (thread,) = arguments
        group, column = gemm.tile_of_block(block, packed.groups, wide)
        body(dict(zip(roles, buffers, strict=True)), group, column, thread)

    grid = packed.groups * wide
    func = emit.function([(role, *sizes[role]) for role in roles], grid, tile.threads, whole)
    name = unique(
        f"{gpu.named(form.name)}_{tile}", *facts, form, tile, plan.rows is not None, packed.groups, packed.steps,
        gpu.element, activation, residual,
    )  # fmt: skip
    launch = Launch((grid, 1, 1), (tile.threads, 1, 1))
    text = f"{text}, {activation.name}, residual {residual}"
    return DeviceCall(name, func, roles, constants, launch, {}, text)
