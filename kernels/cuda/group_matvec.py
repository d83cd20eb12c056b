"""Few rows times integers with a scale for each group of inputs, groups of zeros left out: y = x W^T for 1 to 8 rows of x.

    y[m, n] = act(bias[n] + sum over stored groups (n, g) of scale[n, g] * sum over k in g of x[m, k] * (q[n, k] - zero[n, g]))

Such a layer takes as long as its weights take to arrive, so everything serves that: 4 or 8 bits a weight, nothing of a
group that is zero, loads of several tiles in flight, and the same number of stored groups for every block of threads.

A tile is 16 stored groups of any outputs: an operand A of tensor cores, [16][group]. Its columns of B are inputs, 8 / m of
them groups (`slots`) of all m rows of x, so that the 16 groups of a tile may be of as many different places: d[i][column]
is wanted only where the column is of i's slot. Groups are sorted by place, then by output, so a tile has few places and
never two groups of one output. Sums of a warp's tiles gather in shared memory, [warp][output][m], and join in the order of
warps: the result does not depend on timing.

In float32 the same tiles are multiplied without tensor cores: every group's own inputs, sums across the 4 lanes of a quad.

Work is cut into `bands` of neighbouring outputs with equally many stored groups, and where outputs are few the tiles of a
band into `splits` blocks; these leave their sums in a room [split][m][n], which a second small kernel adds in order.

Stored form: `sparsec.kernels.cuda.group_tiles`. Sources: GQSA (arXiv 2412.17560) for groups of zeros and even shares of
work; Marlin (arXiv 2408.11743) for widening in registers: 1024 + u is u in the low bits of a float16, exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit as tir
from sparsec.kernels import integers
from sparsec.kernels.base import Format, unique
from sparsec.kernels.cuda import emit
from sparsec.kernels.cuda.base import DeviceCall, Gpu
from sparsec.kernels.cuda.gemm import bind_parts
from sparsec.kernels.cuda.group_tiles import (
    MOST_ROWS,
    SLOT,
    TALL,
    UNIT,
    Packed,
    Tiling,
    bands_of,
    cut,
    group_of,
    kept_groups,
    pack,
    slots_of,
)  # fmt: skip
from sparsec.kernels.epilogue import NONE, Activation, Residual, finish
from sparsec.kernels.integers import Stored
from sparsec.program import Launch

WORDS = 16  # of a lane that are on their way, about
REGISTERS = 96  # of a thread, about
SHARED = 48 << 10  # bytes of a block
LATENCY_US = 0.8  # of memory; also what a kernel takes until its first weights are there
TABLE: tuple[Format, ...] = tuple(
    Format(
        f"cuda_matvec_f32_w{bits}{suffix}", "Gemm, MatMul", f"int{bits}{form}", "float32",
        f"1 to {MOST_ROWS} rows times a weight in {bits} bits{text}",
        f"DequantizeLinear of a constant int{bits} weight, groups of a multiple of 16 inputs", rows,
    )
    for bits in (8, 4)
    for suffix, form, text, rows in (("", "", "", 0), ("_groups", ", groups", ", groups of zeros left out", 1))
)  # fmt: skip
reference = integers.reference


def form_of(stored: Stored, sparse: bool) -> Format:
    """The row of the table for a weight; `sparse`: groups of zeros are left out."""
    return next(row for row in TABLE if row.sparse == sparse and row.format.partition(",")[0] == f"int{stored.bits}")


def refusal(m: int, stored: Stored) -> str | None:
    """Why the product of m rows cannot run here, or None."""
    if not 1 <= m <= MOST_ROWS:
        return f"{m} rows: 1 to {MOST_ROWS} are taken"
    k = stored.q.shape[1]
    if stored.group % 16 and stored.group != k:
        return f"groups of {stored.group} inputs: a multiple of 16 is taken"
    if -(-k // group_of(stored)) > 1 << 15:
        return f"{k} inputs in groups of {group_of(stored)}: more than {1 << 15} groups"
    return None


# --- cost ------------------------------------------------------------------------------------------------------------


def _stored_groups(stored: Stored, sparse: bool) -> np.ndarray:
    """Of each output."""
    if sparse:
        return np.asarray(kept_groups(stored).sum(axis=1))
    return np.full(stored.q.shape[0], cut(stored).groups)


def ranked_tilings(gpu: Gpu, m: int, stored: Stored, sparse: bool) -> list[tuple[float, Tiling]]:
    """Predicted microseconds of ways to cut the work, cheapest first."""
    kept = _stored_groups(stored, sparse)
    least = -(-kept.size * 4 * m * 8 // SHARED)  # bands whose sums fit
    found = []
    for warps in (8, 4):
        for share in (1, 2, 3, 4, 6, 8):
            for splits in (1, 2, 4, 8):
                bands = max(1, gpu.multiprocessors * share // splits, 2 * least)
                bands = min(bands, -(-kept.size // (1 if sparse else TALL)))
                tiling = Tiling(bands, splits, warps)
                if all(tiling != other for _, other in found):
                    found.append((predict_us(gpu, m, stored, tiling, sparse, kept), tiling))
    return sorted(found, key=lambda item: (item[0], item[1].splits, item[1].bands))


def predict_us(gpu: Gpu, m: int, stored: Stored, tiling: Tiling, sparse: bool, kept: np.ndarray | None = None) -> float:
    """Microseconds: weights from memory, as far as enough of them are on their way, or widening them, whichever is longer;
    the fullest multiprocessor counts. `kept`: stored groups of each output."""
    kept = _stored_groups(stored, sparse) if kept is None else kept
    stored = cut(stored)
    n, k = stored.q.shape
    bands = bands_of(kept, tiling.bands, 1 if sparse else TALL)
    if sparse:
        groups, heights = np.add.reduceat(kept, bands[:-1]).astype(float), np.diff(bands)
        places = np.maximum(np.minimum(groups, stored.groups), 1.0)
        # A tile ends after TALL groups, `slots` places, or where an output comes again: rarely where a place fills one.
        slots = slots_of(m) if gpu.element == "float16" else TALL
        each = groups / places
        fill = np.where(each < TALL, np.minimum(TALL, each + heights / np.maximum(each, 1e-9)), TALL)
        fill = np.minimum(fill, each * slots) if slots > 1 else each / np.ceil(np.maximum(each, 1.0) / TALL)
        tiles = np.ceil(groups / np.maximum(fill, 1e-9))
    else:
        slots, tiles = 0, -(-np.diff(bands) // TALL) * float(stored.groups)
    blocks = np.sort(np.repeat(tiles / tiling.splits, tiling.splits))[::-1]
    # Blocks go to multiprocessors in turn: the first one has the fullest of each round; its warps take whole tiles.
    fullest = float((np.ceil(blocks[:: gpu.multiprocessors] / tiling.warps) * tiling.warps).sum())
    even = max(float(tiles.sum()) / gpu.multiprocessors, 1e-9)
    zeros = 2 * TALL if stored.zero is not None else 0
    tile = stored.group * TALL * stored.bits // 8 + TALL * gpu.item + (4 * TALL if slots else 0) + zeros
    moved = tile * float(tiles.sum()) + gpu.item * m * (k + n)
    rate = gpu.l2_gbps if moved <= gpu.l2_bytes / 2 else gpu.memory_gbps
    shared = 4 * tiling.warps * m * int(np.diff(bands).max())
    resident = min(max(1, gpu.resident(32 * tiling.warps, REGISTERS, shared)), -(-blocks.size // gpu.multiprocessors))
    flying = resident * tiling.warps * ahead_of(stored.group, stored.bits) * tile
    share = min(1.0, flying * gpu.multiprocessors / (rate * LATENCY_US * 1e3))
    arrival = moved / (0.9 * rate * share * 1e3) * max(1.0, fullest / even) ** 0.5  # others' bandwidth helps a late one
    issue = _tile_instructions(gpu, m, stored) * fullest / 4 / (gpu.ghz * 1e3)
    joined = (gpu.launch_us + 8 * m * n * tiling.splits / (gpu.l2_gbps * 1e3)) if tiling.splits > 1 else 0.0
    return max(arrival, issue) + LATENCY_US + gpu.launch_us + joined


def ahead_of(group: int, bits: int) -> int:
    """Tiles of a warp that are on their way."""
    return max(2, min(4, WORDS * 64 // (group * bits)))


def _tile_instructions(gpu: Gpu, m: int, stored: Stored) -> float:
    """Instructions that a warp issues for a tile."""
    slabs = stored.group / 16
    if gpu.element == "float16":
        return slabs * (18 if stored.bits == 4 else 14) + 30
    return slabs * ((24 if stored.bits == 4 else 20) + m * 10) + 30 + 12 * m


# --- binding ---------------------------------------------------------------------------------------------------------


def bind(
    gpu: Gpu,
    *,
    m: int,
    stored: Stored,
    sparse: bool,
    bias: np.ndarray | None = None,
    activation: Activation = NONE,
    residual: Residual = "none",
    tiling: Tiling | None = None,
) -> tuple[DeviceCall, ...]:
    """The calls for x [m, K] times a stored weight [N, K] transposed: one, or two where tiles of a band are split.

    Roles (x, y[, residual], ...constants); of two calls the first writes "parts", float32 [splits, m, N], which the second
    reads. Raises ValueError where `refusal` has a reason.
    """
    if reason := refusal(m, stored):
        raise ValueError(reason)
    n, k = stored.q.shape
    tiling = tiling or ranked_tilings(gpu, m, stored, sparse)[0][1]
    packed = pack(stored, m, tiling, sparse, gpu.element)
    codes = [array for array in (packed.rows, packed.centres, packed.places) if array is not None]
    constants = {"weights": packed.words.reshape(-1), "scales": packed.scales.reshape(-1)}
    if codes:  # kernels have few arguments: one array of 16-bit words
        words = np.concatenate([array.reshape(-1).view(np.int16) for array in codes])
        constants["codes"] = np.pad(words, (0, -words.size % 8))  # 16 bytes and multiples, as they are read
    # An empty array has no address; one zero stands for it.
    constants = {role: array if array.size else np.zeros(1, array.dtype) for role, array in constants.items()}
    constants["tables"] = np.concatenate([packed.bands, packed.pointers])
    biases = {"bias": np.zeros(n, np.float32) if bias is None else bias.astype(np.float32)}
    split = tiling.splits > 1
    constants |= {} if split else biases
    others = [] if residual == "none" else ["residual"]
    sizes = {"x": (m * k, gpu.element), "y": (m * n, gpu.element), "residual": (m * n, gpu.element)}
    sizes["parts"] = (tiling.splits * m * n, "float32")
    form = form_of(stored, sparse)
    facts = (
        m, stored.bits, packed.group, packed.shape, packed.slots, stored.zero is None, sparse, tiling, packed.tiles,
        packed.bands.tobytes(), activation, residual, gpu.element, str(packed.scales.dtype),
    )  # fmt: skip
    text = f"{m}x{k} times {k}x{n} in {stored.bits} bits, {packed.tiles} tiles of {TALL} groups of {packed.group}"
    roles = ["x", "parts"] if split else ["x", "y", *others]
    roles += constants
    sizes |= {role: (array.size, str(array.dtype)) for role, array in constants.items()}
    grid, threads = (packed.pointers.size - 1,), 32 * tiling.warps

    def body(*arguments: Any) -> None:
        named = dict(zip(roles, arguments, strict=False))

        def done(row: Any, b: Any, value: Any) -> None:
            if split:
                at = ((arguments[-2][0] % tiling.splits) * m + b) * n + row
                T.buffer_store(named["parts"], value, [at])
            else:
                _store(named, gpu, b * n + row, value + named["bias"][row], activation, residual)

        _Block(gpu, packed, m, tiling, named, *(axes[0] for axes in arguments[-2:])).emit(done)

    func = emit.function([(role, *sizes[role]) for role in roles], grid, threads, body)
    launch = Launch((*grid, 1, 1), (threads, 1, 1))
    name = unique(f"{gpu.named(form.name)}_{tiling.warps}w", *facts)
    main = DeviceCall(name, func, tuple(roles), constants, launch, text=text)
    if not split:
        return (main,)
    bias = biases["bias"]
    return main, bind_parts(
        gpu, rows=m, columns=n, splits=tiling.splits, bias=bias, activation=activation, residual=residual
    )


def _store(named: dict[str, Any], gpu: Gpu, at: Any, value: Any, activation: Activation, residual: Residual) -> None:
    other = tir.convert(named["residual"][at], "float32") if residual != "none" else None
    T.buffer_store(named["y"], tir.convert(finish(value, activation, residual, other), gpu.element), [at])


class _Block:
    """Emits what one thread of a block does."""

    def __init__(
        self, gpu: Gpu, packed: Packed, m: int, tiling: Tiling, buffers: dict[str, Any], block: Any, thread: Any
    ) -> None:
        self.packed, self.m, self.tiling, self.buffers = packed, m, tiling, buffers
        self.half = gpu.element == "float16"
        self.block, self.thread = block, thread
        self.tallest = -(-int(np.diff(packed.bands).max()) // TALL) * TALL
        self.runs, self.wide = packed.words.shape[1], packed.words.shape[3]
        self.words = self.runs * self.wide
        # Where the centres and places begin in the array of codes.
        sizes = [0 if array is None else array.nbytes // 2 for array in (packed.rows, packed.centres)]
        self.starts = sizes[0], sum(sizes)
        self.ahead = ahead_of(packed.group, packed.bits)
        self.unit = int(np.gcd(packed.group, UNIT))

    def emit(self, done: Any) -> None:
        """`done(row, b, value)`: what to do with the sum of an output and a row of x."""
        packed, tiling, m = self.packed, self.tiling, self.m
        warps, threads = tiling.warps, 32 * tiling.warps
        self.lane, self.warp = T.bind(self.thread % 32), T.bind(self.thread // 32)
        self.g, self.t = T.bind(self.lane // 4), T.bind(self.lane % 4)
        band = T.bind(self.block // tiling.splits)
        self.first = T.bind(self.buffers["tables"][band])
        outputs = T.bind(self.buffers["tables"][band + 1] - self.first)
        begin, end = (T.bind(self.buffers["tables"][packed.bands.size + self.block + i]) for i in range(2))
        if packed.rows is None:
            self.low = T.bind(self.buffers["tables"][packed.bands.size + band * tiling.splits])
            self.tall = T.bind((outputs + (TALL - 1)) // TALL)
        self.sums = emit.shared(warps * self.tallest * m)
        size = warps * self.tallest * m
        with T.serial(0, -(-size // threads)) as i:
            at = T.bind(i * threads + self.thread)
            with T.If(at < size), T.Then():
                T.buffer_store(self.sums, T.float32(0), [at])
        emit.barrier()
        self._registers()
        with T.serial(0, (end - begin + (warps * self.ahead - 1)) // (warps * self.ahead) + 1) as turn:
            # In turn i the tiles of turn i - 1 are multiplied, each making room for one of turn i.
            for u in range(self.ahead):
                tile = T.bind(begin + self.warp + (turn * self.ahead + u) * warps)
                before = T.bind(tile - self.ahead * warps)
                with T.If(tir_all(turn > 0, before < end)), T.Then():
                    self._multiply(u, before)
                with T.If(tile < end), T.Then():
                    self._load(u, tile)
        emit.barrier()
        with T.serial(0, -(-self.tallest * m // threads)) as i:
            at = T.bind(i * threads + self.thread)
            with T.If(at < outputs * m), T.Then():
                value = self.sums[at]
                for other in range(1, warps):
                    value = value + self.sums[other * (self.tallest * m) + at]
                done(self.first + at // m, at % m, value)

    def _registers(self) -> None:
        """What is on its way."""
        packed = self.packed
        self.held = emit.local(self.ahead * self.words, "int32")
        self.scales = emit.local(self.ahead * 2, str(packed.scales.dtype))
        self.codes = emit.local(self.ahead * 2, str(packed.rows.dtype)) if packed.rows is not None else None
        self.place = emit.local(self.ahead, "int32")
        self.centres = emit.local(self.ahead * 2 if packed.centres is not None else 2, "float16")
        if packed.centres is None:
            for i in range(2):
                T.buffer_store(self.centres, T.float16(1032 if packed.bits == 4 else 1152), [i])

    def _fetch(self, local: Any, at: int, role: str, index: Any, count: int, size: int) -> None:
        """`count` elements of `size` bytes into registers at once."""
        emit.call(f"sparsec_get<{count * size}>", emit.address(local, at), emit.address(self.buffers[role], index))

    def _load(self, u: int, tile: Any) -> None:
        packed = self.packed
        for run in range(self.runs):
            index = ((tile * self.runs + run) * 32 + self.lane) * self.wide
            self._fetch(self.held, u * self.words + run * self.wide, "weights", index, self.wide, 4)
        pair = T.bind(tile * TALL + self.g * 2)
        self._fetch(self.scales, 2 * u, "scales", pair, 2, packed.scales.itemsize)
        if packed.centres is not None:
            self._fetch(self.centres, 2 * u, "codes", self.starts[0] + pair, 2, 2)
        if self.codes is not None and packed.rows is not None:
            self._fetch(self.codes, 2 * u, "codes", pair * (packed.rows.itemsize // 2), 2, packed.rows.itemsize)
        if packed.places is not None:
            slot = self.g // (MOST_ROWS // packed.slots)
            place = self.buffers["codes"][self.starts[1] + tile * packed.slots + slot]
            T.buffer_store(self.place, T.Cast("int32", place), [u])
        elif self.codes is None:
            T.buffer_store(self.place, (tile - self.low) // self.tall, [u])

    def _row(self, u: int, tile: Any, half: int) -> tuple[Any, Any, Any]:
        """Of group g + 8 half: whether there is one, its output within the band, and its slot or place."""
        if self.codes is None:
            return self.lane >= 0, T.bind((tile - self.low) % self.tall * TALL + self.g + 8 * half), 0
        code = T.bind(T.Cast("int32", self.codes[2 * u + half]))
        return code >= 0, code & (SLOT - 1), T.bind(code >> (SLOT.bit_length() - 1))

    def _add(self, row: Any, b: Any, value: Any) -> None:
        at = (self.warp * self.tallest + row) * self.m + b
        emit.call("sparsec_add", emit.address(self.sums, at), value)

    def _multiply(self, u: int, tile: Any) -> None:
        if self.half:
            self._tensor(u, tile)
        else:
            self._plain(u, tile)
        emit.call("__syncwarp")

    def _inputs(self, local: Any, at: int, b: Any, place: Any, first: int, wanted: Any) -> None:
        """A lane's run of a unit of row b of x; zeros unless `wanted` and beyond K."""
        k, each = self.packed.shape[1], self.unit // 4
        start = T.bind(place * self.packed.group + first + self.t * each)
        count = each if k % self.packed.group == 0 else T.min(each, T.max(0, k - start))
        where = tirx.Select(wanted, b * k + T.min(start, k - 1), 0)
        emit.call(
            f"sparsec_read<{'half' if self.half else 'float'}, {each}>", emit.address(local, at),
            emit.address(self.buffers["x"], where), tirx.Select(wanted, count, 0),
        )  # fmt: skip

    def _tensor(self, u: int, tile: Any) -> None:
        packed, m = self.packed, self.m
        columns = MOST_ROWS // packed.slots  # of a place
        right, left = emit.local(self.unit // 4, "float16"), emit.local(4, "uint32")
        d = emit.local(4)
        for i in range(4):
            T.buffer_store(d, T.float32(0), [i])
        b, place = self.g % columns, T.bind(self.place[u])
        wanted = T.bind(tir_all(place >= 0, b < m) if packed.places is not None else b < m)
        each = packed.bits // 4
        for first in range(0, packed.group, self.unit):
            self._inputs(right, 0, b, place, first, wanted)
            for slab in range(self.unit // 16):
                word = u * self.words + (first // 16 + slab) * each
                centre = 2 * u if packed.centres is not None else 0
                emit.call(
                    f"sparsec_widen{packed.bits}", emit.address(left, 0), emit.address(self.held, word),
                    emit.address(self.centres, centre),
                )  # fmt: skip
                emit.call("sparsec_mma_f16", emit.address(d, 0), emit.address(left, 0), emit.address(right, 4 * slab))
        for half in range(2):
            there, row, slot = self._row(u, tile, half)
            scale = tir.convert(self.scales[2 * u + half], "float32")
            if columns == 1:
                value = T.bind(tirx.Select(slot & 1 == 0, d[2 * half], d[2 * half + 1]))
                with T.If(tir_all(there, self.t == slot >> 1)), T.Then():
                    self._add(row, 0, value * scale)
                continue
            lanes = columns // 2  # that hold a place's columns
            for e in range(2):
                b = T.bind(self.t % lanes * 2 + e)
                inside = [there, self.t // lanes == slot] if packed.slots > 1 else [there]
                with T.If(tir_all(*inside, b < m)), T.Then():
                    self._add(row, b, d[2 * half + e] * scale)

    def _plain(self, u: int, tile: Any) -> None:
        packed, m, own = self.packed, self.m, self.codes is not None
        each, run = packed.bits // 4, self.unit // 4
        rows = [self._row(u, tile, half) for half in range(2)]
        inputs, totals, widened = emit.local(run), emit.local(2), emit.local(2 * run)
        for first in range(0, packed.group, self.unit):
            for half in range(2):
                centre = T.Cast("int32", self.centres[(2 * u if packed.centres is not None else 0) + half])
                centre = T.bind(centre - 1024)
                for e in range(run):
                    register = half + 2 * (e % 4 // 2)
                    at = u * self.words + (first // 16 + e // 4) * each
                    if packed.bits == 4:
                        value = (self.held[at] >> (4 * register + 16 * (e % 2))) & 15
                    else:
                        value = (self.held[at + register // 2] >> (16 * (register % 2) + 8 * (e % 2))) & 255
                    T.buffer_store(widened, T.Cast("float32", value - centre), [half * run + e])
            with T.serial(0, m) as b:
                for half, (there, _, place) in enumerate(rows):
                    if own or half == 0:
                        self._inputs(inputs, 0, b, place if own else self.place[u], first, there)
                    T.buffer_store(totals, T.float32(0), [half])
                    for e in range(run):
                        T.buffer_store(totals, inputs[e] * widened[half * run + e] + totals[half], [half])
                for half, (there, row, _) in enumerate(rows):
                    emit.call("sparsec_quad_sum", emit.address(totals, half))
                    with T.If(tir_all(there, self.t == half)), T.Then():
                        self._add(row, b, totals[half] * self.scales[2 * u + half])


def tir_all(*conditions: Any) -> Any:
    """All of the conditions."""
    whole = conditions[0]
    for condition in conditions[1:]:
        whole = T.And(whole, condition)
    return whole


__all__ = [
    "TABLE", "Packed", "Tiling", "bind", "form_of", "kept_groups", "pack", "predict_us", "ranked_tilings", "reference",
    "refusal",
]  # fmt: skip
