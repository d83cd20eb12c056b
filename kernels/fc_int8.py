"""Fully connected layers in 8 bits with block-sparse weights: most of w zero in blocks of R outputs x 4 inputs.

    acc[m, n] = start[n] + sum over stored blocks b of n's row group of dot(x[m, index[b]], values[b, n mod R])     int32
    y[m, n] = requantized acc * multiplier[n]                                             (`sparsec.kernels.quantized`)

A block is R consecutive outputs of one word of x. Few rows of x (fewer than 4): a row group is a vector of R outputs, the
word of x is broadcast, and several blocks are in flight on sums of their own. More rows: the words of a tile of rows are
turned into a panel [K / 4][rows] in scratch, and the register tile is R outputs by P vectors of rows; results are turned
back as they are stored.

Stored form: `sparsec.kernels.blocks` of the matrix of words, its pointers as `tables`, with the starts behind them.

Written out by hand: trip counts and operands are data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import blocks, dots, emit, fc, quantized
from sparsec.kernels.base import Format, KernelCall, Machine, unique
from sparsec.kernels.blocks import Blocks
from sparsec.kernels.dots import WORD
from sparsec.kernels.gemm import transpose_panel
from sparsec.kernels.gemm_int8 import balanced, column_constants, load_words, words_of
from sparsec.kernels.parts import Part, parts_of
from sparsec.kernels.quantized import QuantType, Requantize
from sparsec.kernels.row_tiles import RowTiles

_CHAINS = 8  # sums in flight that cover the latency of `dot`


def _format(rows: int) -> Format:
    block = f"{rows}x{WORD}"
    return Format(
        f"fc_i8_{block}", "Gemm, MatMul", block, "int8", f"fully connected in 8 bits, {block} blocks of zeros",
        "quantized input and constant weights", rows, WORD,
    )  # fmt: skip


TABLE: tuple[Format, ...] = tuple(map(_format, (1, 4, 8, 16)))


def pack(w: np.ndarray, form: Format) -> Blocks:
    """w [N, K] int8 to stored form; sizes in words."""
    return blocks.pack(words_of(w), form.rows, 1)


def unpack(packed: Blocks, k: int) -> np.ndarray:
    """The inverse of `pack`: int8 [N, K]."""
    return np.ascontiguousarray(blocks.unpack(packed)).view(np.int8)[:, :k]


def predict_us(machine: Machine, m: int, packed: Blocks) -> float:
    """Time on one thread: a word costs here what a float32 costs there."""
    return fc.predict_us(machine.words(), m, packed)


def bind(
    machine: Machine,
    *,
    m: int,
    w: np.ndarray,
    x: QuantType,
    w_scale: np.ndarray,
    steps: Requantize,
    form: Format,
    bias: np.ndarray | None = None,
) -> KernelCall:
    """The call for x [m, K] times w [N, K] int8 transposed with w's zero blocks left out.

    bias: [N] integers in units of x.scale * w_scale. Roles (x, y[, residual], values, index, tables,
    multipliers[, scratch]). Tiles: runs of row groups, times tiles of x rows. y must not overlap x or residual. Raises
    ValueError where a sum could leave 32 bits.
    """
    n, k = w.shape
    packed, words = pack(w, form), machine.words()
    groups, depth = packed.groups, packed.shape[1]
    columns = column_constants(machine, w, bias, x, w_scale, steps, groups * packed.rows)
    constants = {
        # An empty array has no address; one zero stands for it.
        "values": packed.values.reshape(-1) if packed.blocks else np.zeros(1, np.int32),
        "index": packed.index if packed.blocks else np.zeros(1, np.uint16),
        "tables": np.concatenate([packed.pointers, columns["starts"]]),
        "multipliers": columns["multipliers"],
    }
    tiles = RowTiles(m, groups, words.lanes, () if m < fc.FEW else fc.row_parts(words, m, packed.rows), few_step=m)
    step, pitch = tiles.step, tiles.pitch

    roles = [
        "x",
        "y",
        *(["residual"] if steps.residual != "none" else []),
        *constants,
        *(["scratch"] if tiles.parts else []),
    ]
    sizes = {"x": (m * k, x.dtype), "y": (m * n, steps.element), "residual": (m * n, steps.other_element)}
    sizes |= {"scratch": (depth * pitch, "int32")}
    sizes |= {role: (array.size, str(array.dtype)) for role, array in constants.items()}
    flip = quantized.flipped(machine, x)

    def body(*buffers: Any) -> None:
        named = dict(zip(roles, buffers, strict=False))
        begin, end = buffers[-2:]
        layer = _Layer(words, packed, named, steps, k, flip)

        def few(row: Any, first: Any, last: Any) -> None:
            layer.each_group(first, last, lambda g, live: layer.few_rows(m, g, live))

        def many(row: Any, first: Any, last: Any, parts: tuple[Part, ...]) -> None:
            layer.each_group(first, last, lambda g, live: layer.many_rows(row * step, g, live, parts, pitch))

        tiles.walk(begin, end, few, lambda row, valid: layer.turn(row * step, valid, pitch), many)

    func = emit.function([(role, *sizes[role]) for role in roles], body)
    name = unique(form.name.lower(), m, n, k, packed.blocks, packed.rows, steps, x.dtype, machine)
    text = (
        f"{m}x{k} times {k}x{n} in 8 bits, {form.format} blocks, {packed.blocks} stored, {steps.activation.name}, "
        f"residual {steps.residual}"
    )
    scratch = 4 * depth * pitch
    return KernelCall(name, func, tuple(roles), constants, tiles.count, scratch, text)


@dataclass(frozen=True)
class _Layer:
    """Emits the code of one layer's row groups. `inputs`: K, bytes of a row of x."""

    machine: Machine
    packed: Blocks
    buffers: dict[str, Any]
    steps: Requantize
    inputs: int
    flip: bool

    def each_group(self, first: Any, last: Any, one: Callable[[Any, int], None]) -> None:
        """`one(g, valid outputs)` for groups first <= g < last; the ragged last group gets code of its own."""
        whole, rest = divmod(self.packed.shape[0], self.packed.rows)
        if whole:
            with T.serial(first, T.min(last, whole) if rest else last) as g:
                one(g, self.packed.rows)
        if rest:
            with T.If(last > whole), T.Then():
                one(whole, rest)

    def _words(self, start: Any, count: int) -> Any:
        words = load_words(self.buffers["x"], start, count)
        return quantized.flip(words) if self.flip else words

    def _starts(self, g: Any) -> Any:
        """Where in the tables the starts of a group lie."""
        return self.packed.groups + 1 + g * self.packed.rows

    def _blocks(self, g: Any) -> tuple[Any, Any]:
        low = T.bind(self.buffers["tables"][g])
        return low, T.bind(self.buffers["tables"][g + 1] - low)

    def few_rows(self, m: int, g: Any, live: int) -> None:
        """All rows of x, one group: vectors of R outputs, of which `live` exist."""
        n, rows = self.packed.shape[0], self.packed.rows
        values, index = self.buffers["values"], self.buffers["index"]
        # A single output is one lane of four: beside it others are summed that nobody reads.
        parts = (Part(0, 4, 1),) if rows == 1 else parts_of(rows, self.machine.lanes)
        chains = max(1, _CHAINS // (m * len(parts)))
        acc = emit.Accumulators([m * chains] * len(parts), [part.lanes for part in parts], "int32")
        acc.fill(
            lambda i, p: (
                emit.load(self.buffers["tables"], self._starts(g) + parts[p].at, parts[p].lanes)
                if i < m
                else emit.splat(tirx.const(0, "int32"), parts[p].lanes)
            )
        )
        low, count = self._blocks(g)

        def some(first: Any, size: int) -> None:
            for chain in range(size):
                b = T.bind(low + first + chain)
                word = T.bind(T.cast(index[b], "int32") * WORD)
                loaded = [T.bind(emit.load(values, b * rows + part.at, part.lanes)) for part in parts]
                for i in range(m):
                    factor = T.bind(self._words(i * self.inputs + word, 1))
                    for p, part in enumerate(parts):
                        total = acc.get(chain * m + i, p)
                        total = dots.dot(self.machine, total, emit.splat(factor, part.lanes), loaded[p])
                        acc.set(chain * m + i, p, total)

        emit.in_rounds(count, chains, some)
        for p, part in enumerate(parts):
            valid = min(part.valid, live - part.at)
            if valid <= 0:
                continue
            column = g * rows + part.at
            factors = T.bind(emit.load(self.buffers["multipliers"], column, part.lanes))
            for i in range(m):
                total = balanced([acc.get(chain * m + i, p) for chain in range(chains)])
                self._store_outputs(total, factors, i * n + column, part.lanes, valid)

    def _store_outputs(self, total: Any, factors: Any, at: Any, lanes: int, valid: int) -> None:
        """Neighbouring outputs of one row of x."""
        other = emit.load(self.buffers["residual"], at, lanes) if self.steps.residual != "none" else None
        emit.store(self.buffers["y"], at, self.steps.finish(self.machine, total, factors, other), lanes, valid)

    def turn(self, first_row: Any, rows: int, pitch: int) -> None:
        """The panel of the words of `rows` rows of x."""
        base = T.bind(first_row * self.inputs)
        transpose_panel(
            lambda i, k, lanes: self._words(base + i * self.inputs + k * WORD, lanes), rows, self.packed.shape[1],
            self.buffers["scratch"], pitch,
        )  # fmt: skip

    def many_rows(self, first_row: Any, g: Any, live: int, parts: tuple[Part, ...], pitch: int) -> None:
        """A panel of x rows, one group: R outputs by vectors of rows; `live` of the R outputs exist."""
        rows = self.packed.rows
        values, panel = self.buffers["values"], self.buffers["scratch"]
        chains = max(1, _CHAINS // (rows * len(parts)))
        acc = emit.Accumulators([rows * chains] * len(parts), [part.lanes for part in parts], "int32")
        starts = self.buffers["tables"]
        acc.fill(
            lambda i, p: emit.splat(starts[self._starts(g) + i] if i < rows else tirx.const(0, "int32"), parts[p].lanes)
        )
        low, count = self._blocks(g)

        def some(first: Any, size: int) -> None:
            for chain in range(size):
                b = T.bind(low + first + chain)
                row = T.bind(T.cast(self.buffers["index"][b], "int32") * pitch)
                weight = emit.Scalars(values, b * rows, rows, self.machine.lane_fma)
                loaded = [T.bind(emit.load(panel, row + part.at, part.lanes)) for part in parts]
                for r in range(rows):
                    for p, part in enumerate(parts):
                        total = acc.get(chain * rows + r, p)
                        total = dots.dot(self.machine, total, loaded[p], weight(r, part.lanes))
                        acc.set(chain * rows + r, p, total)

        emit.in_rounds(count, chains, some)
        for p, part in enumerate(parts):
            sums = [balanced([acc.get(chain * rows + r, p) for chain in range(chains)]) for r in range(rows)]
            self._store(sums, first_row, g * rows, live, part)

    def _store(self, columns: list[Any], first_row: Any, first_output: Any, live: int, part: Part) -> None:
        """Turn R vectors of rows into rows of R outputs and store them."""
        n, rows, steps = self.packed.shape[0], len(columns), self.steps

        def place(i: int) -> Any:
            return (first_row + part.at + i) * n + first_output

        if steps.residual != "none":  # it lies the other way round
            kept = emit.registers(rows, part.lanes, "int32")
            for r, column in enumerate(columns):
                T.buffer_store(kept, column, [r])
            factors = T.bind(emit.load(self.buffers["multipliers"], first_output, rows))
            for i in range(part.valid):
                total = _turned([kept[r] for r in range(rows)], i)
                self._store_outputs(total, factors, place(i), rows, live)
            return
        finished = []
        for r, column in enumerate(columns):
            factor = emit.splat(self.buffers["multipliers"][first_output + r], part.lanes)
            finished.append(T.bind(steps.finish(self.machine, column, factor)))
        if steps.y is not None and rows % WORD == 0:  # as words, which are fewer to move
            finished = [
                T.bind(quantized.interleave(self.machine, finished[r : r + WORD])) for r in range(0, rows, WORD)
            ]
        for i in range(part.valid):
            value = _turned(finished, i)
            if steps.y is not None and rows % WORD == 0:
                value = tirx.reinterpret(emit.vector_type(rows, steps.element), value)
            emit.store(self.buffers["y"], place(i), value, rows, live)


def _turned(vectors: list[Any], i: int) -> Any:
    """Lane i of each vector, as one vector."""
    lanes = emit.lanes_of(vectors[0])
    if lanes == 1 and len(vectors) == 1:
        return vectors[0]
    return T.Shuffle(vectors, [v * lanes + i for v in range(len(vectors))])
