"""The convolution in 8 bits with zeros in columns: blocks of R output channels x 1 input that need no neighbour.

    acc[oc, p] = start[oc] + sum over stored quads q of oc's row group of dot(w[oc, q], words of panel[index[q, 0..3], p])

Any four rows of the panel that a group of R outputs uses make a word: the panel holds bytes, and words are interleaved in
registers where they are multiplied. R outputs share the eight shuffles of 4 x 64 bytes, so that masks made for float32
(4x1 blocks, or none at all) run on the instructions for sums of four products.

Interleaving within 16 bytes leaves pixels in another order, `bytes.spread_words`; packing results to bytes, which works
within 16 bytes too, puts them back. A tile is four vectors of pixels; R x V accumulators at a time, V = 4, 2 or 1 by registers.

Stored form: pointers[g] in quads, index[q][4] (panel rows), values[q][R] (words). A quad that a group does not fill repeats a
row with zero weights.

The idea is XNNPACK's sparse matrix times dense panel (arXiv 1911.09723) on dot products; written out by hand, as there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import blocks, dots, emit, quantized
from sparsec.kernels import bytes as vectors
from sparsec.kernels.base import Format, KernelCall, Machine
from sparsec.kernels.conv.geometry import Geometry, Tiling
from sparsec.kernels.conv.groups import Stage, Terms
from sparsec.kernels.conv.int8 import Quantized
from sparsec.kernels.conv.prepare import prepare
from sparsec.kernels.conv.stored import Packed, as_matrix
from sparsec.kernels.dots import WORD
from sparsec.kernels.parts import Part
from sparsec.kernels.quantized import QuantType, Requantize

_CHAINS = 8  # sums in flight that cover the latency of `dot`


def _format(rows: int) -> Format:
    block = f"{rows}x1"
    what = "unstructured zeros" if rows == 1 else f"{block} blocks (output x input channels)"
    text = f"convolution in 8 bits, {what}, interleaved in registers"
    return Format(f"conv_i8_{block}", "Conv", block, "int8", text, "quantized input and weights", rows, 1)


TABLE: tuple[Format, ...] = tuple(map(_format, (1, 4, 8)))


# --- stored form -----------------------------------------------------------------------------------------------------


def quads(w: np.ndarray, rows: int) -> int:
    """Stored quads of w int8 [OC, IC, KH, KW] over all groups of `rows` outputs."""
    kept = blocks.kept(as_matrix(w), rows, 1).sum(axis=1)
    return int((-(-kept // WORD)).sum())


def pack(w: np.ndarray, form: Format) -> Packed:
    """int8 [OC, IC, KH, KW] to stored form: blocks are quads, four panel rows each in `index`."""
    matrix = as_matrix(w)
    live = np.flatnonzero(matrix.any(axis=0)).astype(np.int32)
    cut = blocks.cut(matrix[:, live], form.rows, 1)[..., 0]  # [groups, R, K']
    index, values, counts = [], [], []
    for group in cut:
        used = np.flatnonzero(group.any(axis=0))
        count = -(-used.size // WORD)
        words = np.zeros((form.rows, count * WORD), np.int8)
        words[:, : used.size] = group[:, used]
        index.append(np.pad(used, (0, count * WORD - used.size), "edge") if count else used)
        values.append(quantized.words(words).T)
        counts.append(count)
    return Packed(
        form.rows, 1, True, max(live.size, 1), live,
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        np.concatenate(index).astype(blocks.index_type(live.size)),
        np.ascontiguousarray(np.concatenate(values)).reshape(-1).astype(np.int32),
        matrix.shape,
    )  # fmt: skip


def unpack(packed: Packed, w_shape: tuple[int, int, int, int]) -> np.ndarray:
    """The inverse of `pack`: int8 [OC, IC, KH, KW]."""
    oc, ic, kh, kw = w_shape
    compact = np.zeros((packed.groups, packed.rows, max(packed.live.size, 1)), np.int64)
    group = np.repeat(np.arange(packed.groups), np.diff(packed.pointers))
    words = np.ascontiguousarray(packed.values.reshape(-1, packed.rows)).view(np.int8).reshape(-1, packed.rows, WORD)
    index = packed.index.reshape(-1, WORD).astype(np.int64)
    for k in range(WORD):
        np.add.at(compact, (group, slice(None), index[:, k]), words[:, :, k])
    matrix = np.zeros(packed.shape, np.int8)
    matrix[:, packed.live] = compact.reshape(packed.groups * packed.rows, -1)[:oc, : packed.live.size]
    return np.ascontiguousarray(matrix.reshape(oc, kh, kw, ic).transpose(0, 3, 1, 2))


def padded(geometry: Geometry) -> Geometry:
    """The geometry as it is: rows are channels, and any four make a word."""
    return geometry


# --- cost ------------------------------------------------------------------------------------------------------------


def at_a_time(machine: Machine, rows: int) -> int:
    """Vectors of pixels that `rows` outputs accumulate at a time: half of the registers hold sums."""
    return max(v for v in (1, 2, 4) if v == 1 or rows * v <= machine.registers // 2)


def tiling_of(machine: Machine, geometry: Geometry, form: Format) -> Tiling:
    """Four vectors of pixels, no wider than the layer needs."""
    lanes, _ = cover(machine.words().lanes, geometry.pixels)
    return Tiling(form.rows, WORD, lanes, geometry.pixels)


def cover(lanes: int, pixels: int) -> tuple[int, int]:
    """The narrowest vectors, of `lanes` lanes at most, of which four hold that many pixels; and how many hold any."""
    while lanes > 4 and 2 * lanes >= pixels:
        lanes //= 2
    return lanes, WORD if lanes > 4 else min(WORD, -(-pixels // 4))


def quad_cycles(machine: Machine, rows: int, pixels: int) -> float:
    """Cycles of one quad for up to four vectors of pixels. Shuffles run where the sums do."""
    lanes, count = cover(machine.words().lanes, pixels)
    share = max(lanes / machine.words().lanes, 0.5 if machine.vector_bytes == 64 else 1.0)
    held = min(count, at_a_time(machine, rows))
    rounds = -(-count // held)
    shuffles = (2 * -(-held // 2) + held) * rounds
    vector = share * (count * rows / machine.dots + shuffles / machine.fma)
    scalar = min(1.0, machine.loads / 2)
    weights = -(-rows // 4) if machine.lane_fma else rows
    loads = (WORD * share + (weights + WORD) * scalar) * rounds / machine.loads
    issue = (count * rows + shuffles + (3 * WORD + weights + 2) * rounds) / machine.uops
    return max(vector, loads, issue)


def predict_us(machine: Machine, geometry: Geometry, form: Format, stored: int, live: int) -> float:
    """Time on one thread. `stored`: of `quads`; `live`: panel rows in use."""
    tile = tiling_of(machine, geometry, form)
    n, oc, _, columns = geometry.y_shape
    cycles = 0.0
    for count, pixels in ((tile.full, tile.width), (1 if tile.tail else 0, tile.tail)):
        if not count:
            continue
        lanes, vectors = cover(tile.lanes, pixels)
        groups = -(-oc // form.rows) * (machine.group_cycles + vectors * form.rows * 1.5)
        copies = WORD * lanes / min(WORD * lanes, machine.vector_bytes if geometry.pointwise else min(16, columns))
        panel = live * (machine.row_cycles + 2.0 * copies / machine.loads)
        cycles += count * (stored * quad_cycles(machine, form.rows, pixels) + groups + panel)
    prepare = 2.0 * float(np.prod(geometry.prepared_shape)) / machine.lanes if geometry.needs_prepare else 0.0
    return float((n * cycles + prepare) / (machine.ghz * 1e3))


# --- the kernel ------------------------------------------------------------------------------------------------------


def bind(
    machine: Machine,
    geometry: Geometry,
    w: np.ndarray,
    *,
    x: QuantType,
    w_scale: np.ndarray,
    steps: Requantize,
    form: Format,
    bias: np.ndarray | None = None,
    tiling: Tiling | None = None,
) -> tuple[KernelCall | None, KernelCall]:
    """The calls for one layer, as `int8.bind`."""
    tiling = tiling or tiling_of(machine, geometry, form)
    main = _Gathered(machine.words(), geometry, pack(w, form), w, bias, x, w_scale, steps, tiling).call()
    first = prepare(machine, geometry, x.dtype, x.zero_point) if geometry.needs_prepare else None
    return first, main


class _Gathered(Quantized):
    """Emits the kernel of one layer; see the module's head."""

    @property
    def panel_element(self) -> str:
        """The panel holds bytes of x, of the sign that `dot` wants."""
        return "uint8"

    @property
    def spacing(self) -> int:
        """Elements of x between panel rows that lie one behind the other."""
        return self.tiling.pixels

    def offsets(self) -> np.ndarray:
        """Where in a prepared image each panel row begins."""
        return self.geometry.tap_offsets()[self.packed.live]

    def parts_of(self, pixels: int, rows: int) -> tuple[Part, ...]:
        """One part, as wide as four vectors."""
        lanes, _ = cover(self.tiling.lanes, pixels)
        return (Part(0, WORD * lanes, pixels),)

    def copy(self, to: Any, start: Any, lanes: int) -> None:
        """Fill `lanes` pixels of a panel row."""
        some = min(lanes, self.machine.vector_bytes)
        for done in range(0, lanes, some):
            found = vectors.as_type(emit.load(self.buffers["x"], start + done, some), "uint8")
            if quantized.flipped(self.machine, self.x):
                found = quantized.flip(found)
            emit.store(self.buffers["scratch"], to + done, found, some)

    def name(self, form: str) -> tuple[str, tuple[Any, ...]]:
        """How the kernel's name begins, and what its code depends on."""
        stem, facts = super().name("dense")
        return f"{stem.removesuffix('dense')}{self.packed.rows}x1", (*facts, "gathered")

    def _group(self, first_row: Any, rows: int, parts: tuple[Part, ...], out: Any, terms: Terms, stage: Stage) -> None:
        """Add `terms`, quads, to rows first_row .. first_row + rows of one tile and store them."""
        (part,) = parts
        lanes = part.lanes // WORD
        _, count = cover(lanes, part.valid)
        held = at_a_time(self.machine, self.packed.rows)
        sums: list[list[Any]] = [[] for _ in range(rows)]
        for first in range(0, count, held):
            some = range(first, min(first + held, count))
            acc = self._accumulated(first_row, rows, some, lanes, terms)
            for r in range(rows):
                sums[r] += [acc.get(r, v - first) for v in some]
        for r in range(rows):
            self._store(sums[r], first_row + r, out + (first_row + r) * self.tiling.pixels, part.valid)

    def _accumulated(self, first_row: Any, rows: int, some: range, lanes: int, terms: Terms) -> emit.Accumulators:
        """Sums of vectors `some` of the tile."""
        packed, width, buffers = self.packed, self.tiling.width, self.buffers
        chains = max(1, min(WORD, _CHAINS // (rows * len(some))))
        sets = [emit.Accumulators([rows] * len(some), [lanes] * len(some), self.element) for _ in range(chains)]
        sets[0].fill(lambda r, _: emit.splat(buffers["bias"][first_row + r], lanes))
        for more in sets[1:]:
            more.fill(lambda _r, _v: emit.constant(0, lanes, self.element))

        def quads(first: Any, size: int) -> None:
            for u in range(size):
                quad = T.bind(terms.start + first + u)
                starts = [T.bind(T.cast(buffers["index"][quad * WORD + k], "int32") * width) for k in range(WORD)]
                loaded = [T.bind(emit.load(buffers["scratch"], start, WORD * lanes)) for start in starts]
                weight = emit.Scalars(buffers["values"], quad * packed.rows, packed.rows, self.machine.lane_fma)
                for i, v in enumerate(some):
                    words = T.bind(vectors.spread_words(loaded, v))
                    for r in range(rows):
                        acc = sets[u % chains]
                        acc.set(r, i, dots.dot(self.machine, acc.get(r, i), words, weight(r, lanes)))

        emit.in_rounds(terms.count, chains, quads)
        for more in sets[1:]:
            sets[0].fill(lambda r, v, more=more: sets[0].get(r, v) + more.get(r, v))
        return sets[0]

    def _store(self, sums: list[Any], row: Any, at: Any, valid: int) -> None:
        """What follows the sums of one row, from element `at` of y on."""
        steps, lanes = self.steps, emit.lanes_of(sums[0])
        multiplier = emit.splat(self._multipliers(row, 1), lanes)
        runs = range(lanes // 4)  # of four pixels, sixteen apart

        def other(v: int) -> Any:
            if steps.residual == "none":
                return None
            return vectors.joined([emit.load(self.buffers["residual"], at + 16 * q + 4 * v, 4) for q in runs], lanes)

        y, others = self.buffers["y"], [other(v) for v in range(len(sums))]
        if steps.y is not None and vectors.picks(self.machine):
            value = steps.finish_bytes(self.machine, sums, [multiplier] * len(sums), others, self.bounded, spread=True)
            emit.store(y, at, value, WORD * lanes, valid)
            return
        for v, (total, residual) in enumerate(zip(sums, others, strict=True)):
            value = T.bind(steps.finish(self.machine, total, multiplier, residual))
            for q in runs:
                left = min(4, valid - (16 * q + 4 * v))
                if left > 0:
                    emit.store(y, at + 16 * q + 4 * v, value, 4, left, 4 * q)
