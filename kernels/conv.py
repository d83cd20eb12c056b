"""Convolution, dense and sparse: one family for 1x1 and kxk, any stride and dilation, and R x C blocks of zeros.

Index formula, NCHW, one image:

    y[oc, p] = act(bias[oc] + sum over taps k = (kh, kw, ic) of w[oc, k] * panel[k, p])     p = oy * OW + ox
    panel[k, p] = x[ic, oy * sh + kh * dh - top, ox * sw + kw * dw - left], zero outside

A tile is T consecutive output pixels. Its panel, K x T, is packed into the worker's scratch (it stays in L1 or L2), then
each group of R output channels is a register tile of R x P vectors: for each stored block one 16-bit panel row, P panel
loads, R weights, R * P multiply-adds. Tiles follow the flattened pixels, so ragged rows cost nothing; only the last tile
of a plane is narrower, and it computes and stores just its pixels.

Sources: the panel is im2col by tiles as in MNN's sparse kernels; R rows sharing one index is the block pattern of Fast
Sparse ConvNets (arXiv 1911.09723) and OVW (NeurIPS 2022).

Strides and padding are resolved once, before tiling: `prepare` copies x into phase planes (row and column phases of the
stride, with the halo's zeros), where every tap is a constant offset and every access has unit stride.

Stored form, by row group g (R consecutive output channels, the last group may be smaller):
    dense:  values[g][k][R]                                     k over all live taps
    RxC:    pointers[g], index[block] (uint16 panel row), values[block][C][R]
Live taps are those that any output channel uses; dead ones are neither packed nor stored.

The register tile is written out by hand: the trip count and the panel row are data, which TVM's schedules cannot tile.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels.base import KernelCall, Machine
from sparsec.kernels.epilogue import NONE, Activation, Residual, finish, reference_finish


@dataclass(frozen=True)
class Format:
    """A row of the table: how weights are stored. `rows` x `columns` is the block; dense has no index."""

    name: str
    op: str
    format: str
    dtype: str
    rows: int
    columns: int
    text: str

    @property
    def sparse(self) -> bool:
        """Whether blocks of zeros are left out."""
        return self.format != "dense"


def _format(rows: int, columns: int) -> Format:
    block = f"{rows}x{columns}"
    what = "unstructured zeros" if block == "1x1" else f"{block} blocks (output x input channels)"
    return Format(f"conv_f32_{block}", "Conv", block, "float32", rows, columns, f"convolution, {what}")


DENSE = Format("conv_f32_dense", "Conv", "dense", "float32", 0, 1, "convolution, dense weights")
TABLE: tuple[Format, ...] = (
    DENSE,
    *(_format(r, c) for r, c in ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (4, 4), (8, 4), (1, 4))),
)


@dataclass(frozen=True)
class Geometry:
    """Shape facts of one convolution, groups 1. `pads`: top, left, bottom, right."""

    x_shape: tuple[int, int, int, int]  # N, C, H, W
    w_shape: tuple[int, int, int, int]  # OC, IC, KH, KW
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)

    @cached_property
    def y_shape(self) -> tuple[int, int, int, int]:
        """N, OC, OH, OW."""
        n, _, h, w = self.x_shape
        oc, _, kh, kw = self.w_shape
        oh = (h + self.pads[0] + self.pads[2] - self.dilations[0] * (kh - 1) - 1) // self.strides[0] + 1
        ow = (w + self.pads[1] + self.pads[3] - self.dilations[1] * (kw - 1) - 1) // self.strides[1] + 1
        return n, oc, oh, ow

    @property
    def pixels(self) -> int:
        """Output pixels of one image."""
        return self.y_shape[2] * self.y_shape[3]

    @property
    def taps(self) -> int:
        """K: products summed for one output."""
        return int(np.prod(self.w_shape[1:]))

    @property
    def pointwise(self) -> bool:
        """Whether the panel is just x: 1x1 taps (after `prepare`), planes as wide as the output's."""
        return self.phase_shape[1:] == self.y_shape[2:] and len(self.phases) == 1

    @cached_property
    def phases(self) -> tuple[tuple[int, int], ...]:
        """(row, column) phases of the stride that taps use, in plane order."""
        rows = sorted({kh * self.dilations[0] % self.strides[0] for kh in range(self.w_shape[2])})
        columns = sorted({kw * self.dilations[1] % self.strides[1] for kw in range(self.w_shape[3])})
        return tuple((r, c) for r in rows for c in columns)

    @cached_property
    def phase_shape(self) -> tuple[int, int, int]:
        """Phases, rows and columns of one channel's phase planes."""
        rows = (self.w_shape[2] - 1) * self.dilations[0] // self.strides[0] + self.y_shape[2]
        columns = (self.w_shape[3] - 1) * self.dilations[1] // self.strides[1] + self.y_shape[3]
        return len(self.phases), rows, columns

    @cached_property
    def needs_prepare(self) -> bool:
        """Whether x itself is not already the one phase plane that taps index."""
        return self.strides != (1, 1) or self.pads != (0, 0, 0, 0)

    @property
    def prepared_shape(self) -> tuple[int, int, int, int, int]:
        """N, C, phases, rows, columns of what `prepare` writes; x viewed so if it need not run."""
        return (self.x_shape[0], self.x_shape[1], *self.phase_shape)

    def tap_offsets(self) -> np.ndarray:
        """Offset of each tap's first pixel in a prepared image, elements, taps in (kh, kw, ic) order."""
        _, rows, columns = self.phase_shape
        ic = np.arange(self.w_shape[1])[None, None, :] * len(self.phases) * rows * columns
        kh = np.arange(self.w_shape[2]) * self.dilations[0]
        kw = np.arange(self.w_shape[3]) * self.dilations[1]
        number = {phase: i for i, phase in enumerate(self.phases)}
        plane = np.array([[number[(int(a) % self.strides[0], int(b) % self.strides[1])] for b in kw] for a in kh])
        at = plane * rows * columns + (kh[:, None] // self.strides[0]) * columns + kw[None, :] // self.strides[1]
        return (at[:, :, None] + ic).reshape(-1).astype(np.int32)


@dataclass(frozen=True)
class Tiling:
    """How one layer is cut: `rows` output channels x `vectors` vectors of pixels a register tile.

    `narrow`: lanes that a last, narrower vector of several pixels has at least.
    """

    rows: int
    vectors: int
    lanes: int
    pixels: int
    narrow: int = 4

    @property
    def width(self) -> int:
        """Pixels of a full tile; also the pitch of the panel."""
        return self.vectors * self.lanes

    @property
    def full(self) -> int:
        """Number of full tiles."""
        return self.pixels // self.width

    @property
    def tail(self) -> int:
        """Pixels of the last, narrower tile; 0 if there is none."""
        return self.pixels % self.width

    @property
    def count(self) -> int:
        """Tiles of one image."""
        return self.full + (self.tail > 0)

    def shape_of(self, pixels: int) -> tuple[tuple[int, int, int], ...]:
        """(offset, lanes computed, lanes stored) of each vector that covers `pixels`."""
        parts = [(i * self.lanes, self.lanes, self.lanes) for i in range(pixels // self.lanes)]
        rest = pixels % self.lanes
        if rest:
            parts.append(
                (
                    pixels - rest,
                    min(self.lanes, max(self.narrow, 1 << (rest - 1).bit_length())) if rest > 1 else 1,
                    rest,
                )
            )
        return tuple(parts)


# --- reference -------------------------------------------------------------------------------------------------------


def reference(
    geometry: Geometry,
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None = None,
    activation: Activation = NONE,
    residual: Residual = "none",
    other: np.ndarray | None = None,
) -> np.ndarray:
    """The convolution in float64, by definition. x [N,C,H,W], w [OC,IC,KH,KW] -> [N,OC,OH,OW]."""
    (sh, sw), (dh, dw) = geometry.strides, geometry.dilations
    top, left, bottom, right = geometry.pads
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    n, oc, oh, ow = geometry.y_shape
    y = np.zeros((n, oc, oh, ow))
    for kh in range(w.shape[2]):
        for kw in range(w.shape[3]):
            window = padded[
                :, :, kh * dh : kh * dh + (oh - 1) * sh + 1 : sh, kw * dw : kw * dw + (ow - 1) * sw + 1 : sw
            ]
            y += np.einsum("oc,nchw->nohw", w[:, :, kh, kw].astype(np.float64), window)
    if bias is not None:
        y += bias[None, :, None, None]
    return reference_finish(y, activation, residual, other)


# --- packing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """Weights in stored form; see the module's head. `live`: panel rows that are packed, as tap numbers."""

    rows: int
    columns: int
    sparse: bool
    live: np.ndarray  # int32 [K']
    pointers: np.ndarray  # int32 [groups + 1], in blocks
    index: np.ndarray  # uint16 (int32 beyond 65,536 rows) [blocks]
    values: np.ndarray  # float32, see above
    shape: tuple[int, int]  # OC, K

    @property
    def blocks(self) -> int:
        """Stored blocks."""
        return int(self.pointers[-1])

    @property
    def bytes(self) -> int:
        """Stored bytes."""
        return self.values.nbytes + (self.index.nbytes + self.pointers.nbytes if self.sparse else 0)


def as_matrix(w: np.ndarray) -> np.ndarray:
    """[OC, IC, KH, KW] -> [OC, K], taps in (kh, kw, ic) order: the input channels of one kernel position are neighbours."""
    return np.ascontiguousarray(w.transpose(0, 2, 3, 1).reshape(w.shape[0], -1))


def pack(w: np.ndarray, form: Format, rows: int | None = None) -> Packed:
    """Dense [OC, IC, KH, KW] to stored form. `rows`: the register tile's height for dense weights."""
    matrix = as_matrix(w)
    oc, taps = matrix.shape
    height = form.rows or rows or 1
    width = form.columns if w.shape[1] % form.columns == 0 else 1  # a ragged last block is stored by single columns
    live = np.flatnonzero(matrix.any(axis=0).reshape(-1, width).any(axis=1).repeat(width)).astype(np.int32)
    if not form.sparse or live.size == 0:
        live = np.arange(taps, dtype=np.int32) if not form.sparse else live
    groups = -(-oc // height)
    compact = matrix[:, live]
    values: list[np.ndarray] = []
    index: list[np.ndarray] = []
    pointers = np.zeros(groups + 1, np.int32)
    for g in range(groups):
        group = compact[g * height : (g + 1) * height]  # [R', K']
        if not form.sparse:
            values.append(group.T.reshape(-1))
            pointers[g + 1] = pointers[g] + group.shape[1]
            continue
        blocks = np.flatnonzero(group.any(axis=0).reshape(-1, width).any(axis=1))
        index.append(blocks * width)
        values.append(group.reshape(group.shape[0], -1, width)[:, blocks].transpose(1, 2, 0).reshape(-1))
        pointers[g + 1] = pointers[g] + blocks.size
    index_type = np.uint16 if live.size <= 1 << 16 else np.int32
    flat = np.concatenate(index).astype(index_type) if index else np.zeros(0, index_type)
    packed_values = np.concatenate(values).astype(np.float32) if values else np.zeros(0, np.float32)
    return Packed(height, width, form.sparse, live, pointers, flat, packed_values, (oc, taps))


def unpack(packed: Packed, w_shape: tuple[int, int, int, int]) -> np.ndarray:
    """Stored form to dense [OC, IC, KH, KW]: the inverse of `pack`."""
    oc, taps = packed.shape
    matrix = np.zeros((oc, taps), np.float32)
    position = 0
    for g in range(len(packed.pointers) - 1):
        lo, hi = int(packed.pointers[g]), int(packed.pointers[g + 1])
        first = g * packed.rows
        height = min(packed.rows, oc - first)
        width = packed.columns if packed.sparse else 1
        stored = packed.values[position : position + (hi - lo) * width * height].reshape(-1, width, height)
        position += stored.size
        for b in range(hi - lo):
            start = int(packed.index[lo + b]) if packed.sparse else b
            matrix[first : first + height, packed.live[start : start + width]] = stored[b].T
    w = matrix.reshape(oc, w_shape[2], w_shape[3], w_shape[1])
    return np.ascontiguousarray(w.transpose(0, 3, 1, 2))


# --- cost ------------------------------------------------------------------------------------------------------------


def tile_cycles(
    machine: Machine, rows: int, parts: tuple[tuple[int, int, int], ...], indexed: bool, panel_bytes: int
) -> float:
    """Cycles for one stored column of a register tile: FMA, load, issue and L2 bounds; the largest wins."""
    shares = [max(lanes / machine.lanes, 0.5 if machine.vector_bytes == 64 else 1.0) for _, lanes, _ in parts]
    fmas = rows * sum(shares) / machine.fma
    weights = -(-rows // 4) if machine.lane_fma else rows / 2
    loads = (sum(shares) + weights + indexed) / machine.loads
    issue = (rows * len(parts) + len(parts) + weights + 2 * indexed + 1) / machine.uops
    from_l2 = (
        machine.item * sum(lanes for _, lanes, _ in parts) / machine.l2_bytes_per_cycle
        if panel_bytes > machine.l1_bytes
        else 0.0
    )
    return max(fmas, loads, issue, from_l2)


def predict_us(machine: Machine, geometry: Geometry, tiling: Tiling, columns: float, indexed: bool) -> float:
    """Time of the layer on one thread. `columns`: stored columns (R x 1) summed over all row groups."""
    n, oc, _, _ = geometry.y_shape
    groups = -(-oc // tiling.rows)
    live = min(geometry.taps, columns)
    cycles = 0.0
    for count, pixels in ((tiling.full, tiling.width), (1 if tiling.tail else 0, tiling.tail)):
        if not count:
            continue
        parts = tiling.shape_of(pixels)
        compute = columns * tile_cycles(machine, tiling.rows, parts, indexed, int(machine.item * live * tiling.width))
        # Start, epilogue and store of each register tile; copying the panel.
        overhead = groups * (machine.group_cycles + 2.0 * tiling.rows * len(parts) / machine.loads)
        copies = len(parts) if geometry.pointwise else len(parts) + -(-pixels // geometry.y_shape[3])
        cycles += count * (compute + overhead + live * (machine.row_cycles + 2.0 * copies / machine.loads))
    prepare = 0.0
    if geometry.needs_prepare:
        prepare = 2.0 * np.prod(geometry.prepared_shape) / machine.lanes
    return (n * cycles + prepare) / (machine.ghz * 1e3)


def max_vectors(machine: Machine, rows: int) -> int:
    """Most pixel vectors a register tile of `rows` rows can hold: accumulators, one activation, weights."""
    weights = -(-rows // 4) if machine.lane_fma else 1
    spare = machine.registers - weights - (0 if machine.vector_bytes == 64 else 1)
    return max(1, min(12, (spare - 1) // rows if rows > 1 else (spare - 2) // 2))


def tilings(machine: Machine, geometry: Geometry, form: Format) -> list[Tiling]:
    """Register tiles worth considering for a layer."""
    heights = [form.rows] if form.sparse else sorted({min(r, geometry.w_shape[0]) for r in (4, 6, 8, 12)})
    pixels = geometry.pixels
    lanes = machine.lanes
    while lanes > 4 and pixels < lanes:
        lanes //= 2
    # Where vectors of 16 and of 8 bytes took the same weight, LLVM would spread it over a register of its own.
    narrow = lanes if machine.lane_fma else 4
    found = []
    for rows in heights:
        widest = max_vectors(machine, rows)
        for vectors in range(1, min(widest, -(-pixels // lanes)) + 1):
            found.append(Tiling(rows, vectors, lanes, pixels, narrow))
    return found


def ranked_tilings(
    machine: Machine, geometry: Geometry, form: Format, columns: dict[int, float]
) -> list[tuple[float, Tiling]]:
    """Predicted microseconds of every tiling, cheapest first. `columns`: stored columns for each tile height."""
    priced = [
        (predict_us(machine, geometry, t, columns[t.rows], form.sparse), i, t)
        for i, t in enumerate(tilings(machine, geometry, form))
    ]
    return [(cost, tiling) for cost, _, tiling in sorted(priced, key=lambda item: item[:2])]


def best_tiling(machine: Machine, geometry: Geometry, form: Format, columns: dict[int, float]) -> tuple[Tiling, float]:
    """The cheapest tiling and its predicted microseconds. `columns`: stored columns for each tile height."""
    cost, tiling = ranked_tilings(machine, geometry, form, columns)[0]
    return tiling, cost


def stored_columns(w: np.ndarray, form: Format, machine: Machine, geometry: Geometry) -> dict[int, float]:
    """Columns of R x 1 that each admissible tile height stores, over all row groups."""
    oc, taps = w.shape[0], geometry.taps
    if not form.sparse:
        return {t.rows: float(-(-oc // t.rows) * taps) for t in tilings(machine, geometry, form)}
    matrix = as_matrix(w) != 0
    padded = np.zeros((-(-oc // form.rows) * form.rows, taps), bool)
    padded[:oc] = matrix
    width = form.columns if w.shape[1] % form.columns == 0 else 1
    kept = padded.reshape(-1, form.rows, taps // width, width).any(axis=(1, 3))
    return {form.rows: float(kept.sum() * width)}


# --- binding ---------------------------------------------------------------------------------------------------------


def bind(
    machine: Machine,
    geometry: Geometry,
    w: np.ndarray,
    *,
    form: Format = DENSE,
    bias: np.ndarray | None = None,
    activation: Activation = NONE,
    residual: Residual = "none",
    tiling: Tiling | None = None,
) -> tuple[KernelCall | None, KernelCall]:
    """The calls for one layer: `prepare` (or None), then the convolution.

    w [OC, IC, KH, KW] float32, bias [OC] or None; `residual` "none", "before" or "after" the activation. The first call
    has roles (x, prepared), the second (prepared or x, y, [residual,] ...). Tiles are independent.
    """
    if tiling is None:
        tiling, _ = best_tiling(machine, geometry, form, stored_columns(w, form, machine, geometry))
    packed = pack(w, form, tiling.rows)
    main = _convolution(machine, geometry, packed, bias, activation, residual, tiling)
    return (_prepare(machine, geometry) if geometry.needs_prepare else None), main


def _name(stem: str, *facts: Any) -> str:
    return f"{stem}_{hashlib.sha256(repr(facts).encode()).hexdigest()[:10]}"


def _prepare(machine: Machine, geometry: Geometry) -> KernelCall:
    """Copy x into phase planes: prepared[n, c, f, q, r] = x[n, c, q * sh + row(f) - top, r * sw + column(f) - left]."""
    n, c, h, w = geometry.x_shape
    count, rows, columns = geometry.phase_shape
    (sh, sw), (top, left, _, _) = geometry.strides, geometry.pads

    def body(x: Any, prepared: Any, begin: Any, end: Any) -> None:
        zero = emit.constant(0, element=machine.element)
        with T.serial(begin, end) as plane:
            for number, (row, column) in enumerate(geometry.phases):
                # Columns r with 0 <= r * sw + column - left < w; the others are halo.
                first = min(columns, max(0, -(-(left - column) // sw)))
                last = max(first, min(columns, -(-(w + left - column) // sw)))
                top_rows = min(rows, max(0, -(-(top - row) // sh)))
                end_rows = max(top_rows, min(rows, -(-(h + top - row) // sh)))
                out = (plane * count + number) * rows * columns
                if top_rows:
                    with T.serial(0, top_rows * columns) as i:
                        T.buffer_store(prepared, zero, [out + i])
                with T.serial(top_rows, end_rows) as q:
                    source = (plane * h + q * sh + (row - top)) * w + (column - left)
                    if first:
                        with T.serial(0, first) as r:
                            T.buffer_store(prepared, zero, [out + q * columns + r])
                    with T.serial(first, last) as r:
                        T.buffer_store(prepared, x[source + r * sw], [out + q * columns + r])
                    if last < columns:
                        with T.serial(last, columns) as r:
                            T.buffer_store(prepared, zero, [out + q * columns + r])
                if end_rows < rows:
                    with T.serial(end_rows * columns, rows * columns) as i:
                        T.buffer_store(prepared, zero, [out + i])

    size = int(np.prod(geometry.prepared_shape))
    func = emit.function([("x", n * c * h * w, machine.element), ("prepared", size, machine.element)], body)
    text = f"pad and split {c}x{h}x{w} into {count} phase planes {rows}x{columns}"
    return KernelCall(_name(machine.named("conv_prepare_f32"), geometry), func, ("x", "prepared"), {}, n * c, 0, text)


def _segments(geometry: Geometry, tiling: Tiling, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Copies that fill a panel row, by tile: pointers [tiles + 1] and (panel offset, offset in the phase plane) pairs.

    A copy moves `length` pixels and may run past its row: what it writes too much is overwritten by the next copy.
    """
    width, columns = geometry.y_shape[3], geometry.phase_shape[2]
    pointers, pairs = [0], []
    for tile in range(tiling.count):
        start, stop = tile * tiling.width, min((tile + 1) * tiling.width, tiling.pixels)
        pixel = start
        while pixel < stop:
            row, column = divmod(pixel, width)
            run = min(width - column, stop - pixel)
            for step in range(0, run, length):
                pairs.append((pixel + step - start, row * columns + column + step))
            pixel += run
        pointers.append(len(pairs))
    return np.array(pointers, np.int32), np.array(pairs, np.int32).reshape(-1)


def _chunk_groups(geometry: Geometry, tiling: Tiling, full_groups: int) -> int:
    """Row groups in each chunk that a pixel tile is cut into, so that layers of few pixels still split over threads."""
    tiles = geometry.x_shape[0] * tiling.count
    return max(1, -(-full_groups // max(1, -(-8 // tiles))))


def _convolution(
    machine: Machine,
    geometry: Geometry,
    packed: Packed,
    bias: np.ndarray | None,
    activation: Activation,
    residual: Residual,
    tiling: Tiling,
) -> KernelCall:
    n, oc, _, out_width = geometry.y_shape
    element, pixels, width = machine.element, tiling.pixels, tiling.width
    image = int(np.prod(geometry.prepared_shape[1:]))
    depth = int(packed.live.size)
    full_groups, rest_rows = divmod(oc, packed.rows)
    chunk_groups = _chunk_groups(geometry, tiling, full_groups)
    chunks = max(1, -(-full_groups // chunk_groups))
    all_live = depth == geometry.taps
    pointwise = geometry.pointwise
    length = -(-min(out_width, 16) // tiling.lanes) * tiling.lanes
    tap_table = not (pointwise and all_live)
    block = packed.rows * packed.columns
    area = packed.rows * packed.columns if packed.sparse else 2
    unroll = max(1, min(4, 8 // area)) if machine.lane_fma else 1  # LLVM unrolls by itself for x86 but not for Arm

    longest = int(np.diff(packed.pointers).max()) * packed.columns if packed.sparse else depth
    chain = machine.chain(longest) // packed.columns  # in blocks

    constants: dict[str, np.ndarray] = {"values": machine.array(packed.values)}
    # One int32 array: block pointers, taps, copy pointers, copies; each where it is needed.
    tables: list[np.ndarray] = []
    if packed.sparse:
        constants["index"] = packed.index
        tables.append(packed.pointers)
    tap_base = packed.pointers.size if packed.sparse else 0
    if tap_table:
        tables.append(geometry.tap_offsets()[packed.live])
    if not pointwise:
        tables.extend(_segments(geometry, tiling, length))
    if tables:
        constants["tables"] = np.concatenate(tables).astype(np.int32)
    pointer_base = tap_base + depth
    copy_base = pointer_base + tiling.count + 1
    if bias is not None:
        constants["bias"] = machine.array(bias)

    roles = ["x", "y"] + (["residual"] if residual != "none" else []) + list(constants) + ["scratch"]
    y_size = n * oc * pixels
    sizes: dict[str, tuple[int, str]] = {
        "x": (n * image, element), "y": (y_size, element), "residual": (y_size, element),
        "scratch": (max(depth, 1) * width + length, element),
    }  # fmt: skip
    sizes.update({role: (array.size, str(array.dtype)) for role, array in constants.items()})

    def body(*arguments: Any) -> None:
        buffers = dict(zip(roles, arguments, strict=False))
        begin, end = arguments[-2:]
        x, y, panel = buffers["x"], buffers["y"], buffers["scratch"]

        def pack_panel(source: Any, tile: Any, parts: tuple[tuple[int, int, int], ...]) -> None:
            with T.serial(0, depth) as k:
                offset = buffers["tables"][tap_base + k] if tap_table else k * pixels
                start = T.bind(source + offset)
                if pointwise:
                    for at, lanes, _ in parts:
                        emit.store(panel, k * width + at, emit.load(x, start + tile * width + at, lanes), lanes)
                else:
                    copies = buffers["tables"]
                    with T.serial(copies[pointer_base + tile], copies[pointer_base + 1 + tile]) as s:
                        to = copies[copy_base + 2 * s]
                        value = emit.load(x, start + copies[copy_base + 1 + 2 * s], length)
                        emit.store(panel, k * width + to, value, length)

        def group(first_row: Any, lo: Any, hi: Any, values_at: Any, rows: int, out: Any, parts: Any) -> None:
            """Rows first_row .. first_row + rows of one tile; stored blocks lo .. hi, their values from `values_at`."""
            acc = emit.Accumulators(rows, [lanes for _, lanes, _ in parts], element)
            zero = emit.constant(0, element=element)
            initial = [buffers["bias"][first_row + r] if bias is not None else zero for r in range(rows)]
            acc.fill(lambda r, p: emit.splat(initial[r], parts[p][1]))

            def columns(panel_at: list[Any], weights_at: Any) -> None:
                """Multiply-adds of some columns, whose values lie one behind the other."""
                weight = emit.Scalars(buffers["values"], weights_at, len(panel_at) * rows, machine.lane_fma)
                for c, start in enumerate(panel_at):
                    for p, (at, lanes, _) in enumerate(parts):
                        activations = emit.load(panel, start + at, lanes)
                        for r in range(rows):
                            acc.set(r, p, acc.get(r, p) + weight(c * rows + r, lanes) * activations)

            def blocks(first: Any, size: int) -> None:
                """Stored blocks (columns of dense weights) first .. first + size of the group."""
                if not packed.sparse:
                    columns([(first + u) * width for u in range(size)], values_at + first * rows)
                    return
                starts = [T.bind(T.cast(buffers["index"][lo + first + u], "int32") * width) for u in range(size)]
                every = [start + c * width for start in starts for c in range(packed.columns)]
                columns(every, values_at + first * (packed.columns * rows))

            emit.in_chains(
                acc, hi - lo if packed.sparse else depth, chain,
                lambda first, count: emit.in_rounds(count, unroll, lambda at, size: blocks(first + at, size)),
            )  # fmt: skip
            for r in range(rows):
                for p, (at, lanes, valid) in enumerate(parts):
                    where = out + (first_row + r) * pixels + at
                    other = emit.load(buffers["residual"], where, lanes) if residual != "none" else None
                    emit.store(y, where, finish(acc.get(r, p), activation, residual, other), lanes, valid)

        def rows_of(chunk: Any, out: Any, parts: Any) -> None:
            if full_groups:
                with T.serial(chunk * chunk_groups, T.min((chunk + 1) * chunk_groups, full_groups)) as g:
                    if packed.sparse:
                        lo, hi = T.bind(buffers["tables"][g]), T.bind(buffers["tables"][g + 1])
                        group(g * packed.rows, lo, hi, lo * block, packed.rows, out, parts)
                    else:
                        group(g * packed.rows, 0, depth, g * depth * packed.rows, packed.rows, out, parts)
            if rest_rows:

                def last() -> None:
                    lo = int(packed.pointers[full_groups])
                    hi = int(packed.pointers[full_groups + 1])
                    group(
                        full_groups * packed.rows,
                        lo,
                        hi,
                        lo * block if packed.sparse else full_groups * depth * packed.rows,
                        rest_rows,
                        out,
                        parts,
                    )

                if chunks == 1:
                    last()
                else:
                    with T.If(chunk == chunks - 1), T.Then():
                        last()

        if chunks > 1:  # the panel serves again where only the row chunk changes
            packed_tile = T.alloc_buffer((1,), "int32", scope="local")
            T.buffer_store(packed_tile, -1, [0])
        with T.serial(begin, end) as t:
            chunk = t % chunks if chunks > 1 else 0
            whole = t // chunks if chunks > 1 else t
            tile = T.bind(whole % tiling.count) if tiling.count > 1 else 0
            batch = whole // tiling.count if n > 1 else 0
            out = batch * (oc * pixels) + tile * width

            def one(parts: Any) -> None:
                def fill() -> None:
                    pack_panel(batch * image, tile, parts)

                if chunks == 1:
                    fill()
                else:
                    with T.If(packed_tile[0] != whole), T.Then():
                        fill()
                        T.buffer_store(packed_tile, whole, [0])
                rows_of(chunk, out, parts)

            full_parts, tail_parts = tiling.shape_of(width), tiling.shape_of(tiling.tail)
            if not tiling.tail:
                one(full_parts)
            elif not tiling.full:
                one(tail_parts)
            else:
                with T.If(tile < tiling.full):
                    with T.Then():
                        one(full_parts)
                    with T.Else():
                        one(tail_parts)

    func = emit.function([(role, *sizes[role]) for role in roles], body)
    form = f"{packed.rows}x{packed.columns}" if packed.sparse else "dense"
    live_shape = tuple(sizes[role] for role in roles)
    rest = tuple(int(p) for p in packed.pointers[full_groups:]) if rest_rows else ()
    facts = (
        geometry,
        tiling,
        form,
        packed.rows,
        activation,
        residual,
        live_shape,
        rest,
        chain,
        machine.element,
        machine.lanes,
        machine.lane_fma,
    )
    what = "x".join(map(str, geometry.w_shape[2:]))
    text = f"{what} convolution, {form}, tile {packed.rows} rows x {tiling.vectors} vectors of {tiling.lanes}"
    stem = machine.named(f"conv{what}_f32") + f"_{form}_{packed.rows}r{width}px"
    scratch = -(-(max(depth, 1) * width + length) * machine.item // 64) * 64
    return KernelCall(_name(stem, facts), func, tuple(roles), constants, n * tiling.count * chunks, scratch, text)


def with_tiling(tiling: Tiling, **changes: int) -> Tiling:
    """A copy of `tiling` with some fields changed; for tuners and tests."""
    return replace(tiling, **changes)
