"""Fully connected layers with block-sparse weights: x [M, K] times w [N, K] transposed, most of w zero in R x C blocks.

    y[m, n] = act(bias[n] + sum over stored blocks b of n's row group, c < C, of values[b, c, n mod R] * x[m, index[b] + c])

A block is R consecutive outputs times C consecutive inputs. Few rows of x (fewer than 4): a row group is a vector of R
outputs, every x element is broadcast, and four blocks are in flight on accumulators of their own. More rows: a tile of x
rows is turned into a panel [K][rows] in scratch, and the register tile is R outputs by P vectors of rows; it is turned
back as it is stored.

Stored form: `sparsec.kernels.blocks`, its pointers as `tables`. The rows that fill up the last group are not stored to y.

Written out by hand: trip counts and operands are data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import blocks, emit
from sparsec.kernels.base import Format, KernelCall, Machine, unique
from sparsec.kernels.blocks import Blocks
from sparsec.kernels.epilogue import NONE, Activation, Residual, activate, finish
from sparsec.kernels.gemm import transpose_panel
from sparsec.kernels.parts import Part, parts_of
from sparsec.kernels.row_tiles import RowTiles

CHAINS = 4  # blocks in flight when x has few rows: covers the multiply-add's latency
FEW = 4  # rows of x from which panels pay


def _format(rows: int, columns: int) -> Format:
    block = f"{rows}x{columns}"
    text = "fully connected, unstructured zeros" if block == "1x1" else f"fully connected, {block} blocks of zeros"
    requires = "constant weight, K <= 65,536"
    return Format(f"fc_f32_{block}", "Gemm, MatMul", block, "float32", text, requires, rows, columns)


TABLE: tuple[Format, ...] = tuple(_format(r, c) for r, c in ((1, 1), (4, 1), (8, 1), (16, 1), (1, 4), (4, 4), (8, 4)))


def refusal(w_shape: tuple[int, int]) -> str | None:
    """Why a weight [N, K] cannot be stored, or None."""
    return f"{w_shape[1]} inputs: block indices are 16 bits" if w_shape[1] > 1 << 16 else None


def pack(w: np.ndarray, form: Format) -> Blocks:
    """w [N, K] to stored form. Where C does not divide K, single columns are stored."""
    return blocks.pack(w, form.rows, blocks.fitting(form.columns, w.shape[1]))


# --- cost ------------------------------------------------------------------------------------------------------------


def row_parts(machine: Machine, m: int, rows: int) -> tuple[Part, ...]:
    """Vectors of x rows of a full tile: as many as registers hold, cut evenly over the tiles."""
    most = max(1, min(4, (machine.registers - 3) // (rows + 1)))
    vectors = -(-m // machine.lanes)
    tiles = -(-vectors // most)
    return parts_of(min(m, -(-vectors // tiles) * machine.lanes), machine.lanes)


def predict_us(machine: Machine, m: int, packed: Blocks) -> float:
    """Time on one thread: the port model for each stored block, the panels, and streaming the weights."""
    k = packed.shape[1]
    rows, width = packed.rows, packed.columns
    groups = packed.groups
    if m < FEW:
        vectors = -(-rows // machine.lanes)
        column = max(vectors / machine.fma, (1.0 + vectors) / (2 * machine.loads), (2.0 + vectors) / machine.uops)
        cycles = m * (packed.blocks * (width * column + 1.0) + groups * 20.0)
    else:
        parts = row_parts(machine, m, rows)
        tiles = m / (parts[-1].at + parts[-1].valid)
        share = sum(max(p.lanes / machine.lanes, 0.5 if machine.vector_bytes == 64 else 1.0) for p in parts)
        weights = rows / 4 if machine.lane_fma else rows / 2
        column = max(
            rows * share / machine.fma,
            (share + weights) / machine.loads,
            (rows * len(parts) + len(parts) + weights) / machine.uops,
        )
        valid = parts[-1].at + parts[-1].valid
        # Panel elements are turned four at a time, results a row of R at a time; cycles measured on Zen 4.
        store = 3.0 if rows < 4 else 2.0 + rows / 4
        cycles = tiles * (packed.blocks * (width * column + 1.0) + groups * (20.0 + valid * store) + k * valid * 0.5)
    microseconds = cycles / (machine.ghz * 1e3)
    if packed.bytes > machine.l2_bytes:
        return max(microseconds, packed.bytes / (machine.memory_gbps * 1e3))
    return microseconds


# --- binding ---------------------------------------------------------------------------------------------------------


def bind(
    machine: Machine,
    *,
    m: int,
    w: np.ndarray,
    form: Format,
    bias: np.ndarray | None = None,
    activation: Activation = NONE,
    residual: Residual = "none",
) -> KernelCall:
    """The call for x [m, K] times w [N, K] transposed with w's zero blocks left out.

    Roles (x, y[, residual], values, index, tables, bias[, scratch]). Tiles: runs of row groups, times tiles of x rows.
    y must not overlap x or residual.
    """
    packed = pack(w, form)
    n, k = packed.shape
    groups = packed.groups
    padded_bias = np.zeros(groups * packed.rows, np.float32)
    padded_bias[:n] = 0 if bias is None else bias
    constants = {
        # An empty array has no address; one zero stands for it.
        "values": machine.array(packed.values.reshape(-1) if packed.blocks else np.zeros(1)),
        "index": packed.index if packed.blocks else np.zeros(1, np.uint16),
        "tables": packed.pointers,
        "bias": machine.array(padded_bias),
    }
    tiles = RowTiles(m, groups, machine.lanes, () if m < FEW else row_parts(machine, m, packed.rows))
    step, pitch = tiles.step, tiles.pitch
    scratch = machine.item * k * pitch

    sizes = {"x": m * k, "y": m * n, "residual": m * n, "scratch": k * pitch}
    roles = ["x", "y", *(["residual"] if residual != "none" else []), *constants, *(["scratch"] if tiles.parts else [])]
    arguments = [
        (role, constants[role].size, str(constants[role].dtype))
        if role in constants
        else (role, sizes[role], machine.element)
        for role in roles
    ]

    def body(*buffers: Any) -> None:
        named = dict(zip(roles, buffers, strict=False))
        begin, end = buffers[-2:]
        layer = _Layer(machine, packed, named, activation, residual)

        def turn(row: Any, valid: int) -> None:
            base = T.bind(row * (step * k))
            transpose_panel(
                lambda i, at, lanes: emit.load(named["x"], base + i * k + at, lanes), valid, k, named["scratch"], pitch
            )

        def few(row: Any, first: Any, last: Any) -> None:
            layer.each_group(first, last, lambda g, valid: layer.one_row(row, g, valid))

        def many(row: Any, first: Any, last: Any, parts: tuple[Part, ...]) -> None:
            layer.each_group(first, last, lambda g, live: layer.many_rows(row * step, g, live, parts, pitch))

        tiles.walk(begin, end, few, turn, many)

    func = emit.function(arguments, body)
    longest = int(np.diff(packed.pointers).max()) * packed.columns
    facts = (m, n, k, packed.blocks, longest, packed.rows, packed.columns, activation, residual, machine)
    name = unique(machine.named(form.name), *facts)
    text = (
        f"{m}x{k} times {k}x{n}, {form.format} blocks, {packed.blocks} stored, {activation.name}, residual {residual}"
    )
    return KernelCall(name, func, tuple(roles), constants, tiles.count, scratch, text)


@dataclass(frozen=True)
class _Layer:
    """Emits the code of one layer's row groups."""

    machine: Machine
    packed: Blocks
    buffers: dict[str, Any]
    activation: Activation
    residual: Residual

    def each_group(self, first: Any, last: Any, one: Callable[[Any, int], None]) -> None:
        """`one(g, valid outputs)` for groups first <= g < last; the ragged last group gets code of its own."""
        n, _ = self.packed.shape
        whole, rest = divmod(n, self.packed.rows)
        if whole:
            with T.serial(first, T.min(last, whole) if rest else last) as g:
                one(g, self.packed.rows)
        if rest:
            with T.If(last > whole), T.Then():
                one(whole, rest)

    def one_row(self, row: Any, g: Any, valid: int) -> None:
        """One row of x, one group: vectors of R outputs."""
        n, k = self.packed.shape
        rows, width = self.packed.rows, self.packed.columns
        values, index, x = self.buffers["values"], self.buffers["index"], self.buffers["x"]
        parts = parts_of(rows, self.machine.lanes)
        acc = [emit.registers(CHAINS, part.lanes, self.machine.element) for part in parts]
        for p, part in enumerate(parts):
            for chain in range(CHAINS):
                T.buffer_store(acc[p], emit.constant(0, part.lanes, self.machine.element), [chain])
        low = T.bind(self.buffers["tables"][g])
        count = T.bind(self.buffers["tables"][g + 1] - low)

        def block(b: Any, chain: int) -> None:
            at = T.bind(row * k + T.cast(index[b], "int32"))
            for c in range(width):
                for p, part in enumerate(parts):
                    weight = emit.load(values, b * (rows * width) + c * rows + part.at, part.lanes)
                    T.buffer_store(acc[p], acc[p][chain] + weight * emit.splat(x[at + c], part.lanes), [chain])

        with T.serial(0, count // CHAINS) as i:
            for chain in range(CHAINS):
                block(low + i * CHAINS + chain, chain)
        with T.serial(0, count % CHAINS) as i:
            block(low + count // CHAINS * CHAINS + i, 0)
        for p, part in enumerate(parts):
            live = min(part.lanes, valid - part.at)
            if live <= 0:
                continue
            bias = emit.load(self.buffers["bias"], g * rows + part.at, part.lanes)
            total = (acc[p][0] + acc[p][1]) + (acc[p][2] + acc[p][3]) + bias
            at = row * n + g * rows + part.at
            other = emit.load(self.buffers["residual"], at, part.lanes) if self.residual != "none" else None
            emit.store(self.buffers["y"], at, finish(total, self.activation, self.residual, other), part.lanes, live)

    def many_rows(self, first_row: Any, g: Any, live: int, parts: tuple[Part, ...], pitch: int) -> None:
        """A panel of x rows, one group: R outputs by vectors of rows; `live` of the R outputs exist."""
        rows, width = self.packed.rows, self.packed.columns
        values, panel = self.buffers["values"], self.buffers["scratch"]
        acc = emit.Accumulators([rows] * len(parts), [part.lanes for part in parts], self.machine.element)
        longest = int(np.diff(self.packed.pointers).max()) * width
        late = self.machine.bias_last(longest)

        def bias_of(r: int, p: int) -> Any:
            return emit.splat(self.buffers["bias"][g * rows + r], parts[p].lanes)

        acc.fill(lambda r, p: emit.constant(0, parts[p].lanes, self.machine.element) if late else bias_of(r, p))
        low = T.bind(self.buffers["tables"][g])
        count = T.bind(self.buffers["tables"][g + 1] - low)

        def one(first: Any, _size: int) -> None:
            b = T.bind(low + first)
            row = T.bind(T.cast(self.buffers["index"][b], "int32") * pitch)
            for c in range(width):
                at = b * (rows * width) + c * rows
                weight = emit.Scalars(values, at, rows, self.machine.lane_fma)
                loaded = [T.bind(emit.load(panel, row + c * pitch + part.at, part.lanes)) for part in parts]
                for r in range(rows):
                    for p, part in enumerate(parts):
                        acc.set(r, p, acc.get(r, p) + weight(r, part.lanes) * loaded[p])

        emit.in_chains(
            acc, count, self.machine.chain(longest) // width,
            lambda first, some: emit.in_rounds(some, 1, lambda at, size: one(first + at, size)),
        )  # fmt: skip
        if late:
            acc.fill(lambda r, p: acc.get(r, p) + bias_of(r, p))
        for p, part in enumerate(parts):
            done = [acc.get(r, p) for r in range(rows)]
            if self.residual == "none":  # full vectors of rows; a residual lies the other way round
                for r in range(live):
                    acc.set(r, p, activate(self.activation, done[r]))
            self._store(done, first_row, g * rows, live, part)

    def _store(self, columns: list[Any], first_row: Any, first_output: Any, live: int, part: Part) -> None:
        """Turn R vectors of rows into rows of R outputs and store them."""
        n, _ = self.packed.shape
        rows = len(columns)
        for i in range(part.valid):
            if part.lanes == 1 and rows == 1:
                value = columns[0]
            else:
                lanes = [r * part.lanes + i for r in range(rows)]
                value = T.Shuffle(columns, lanes)
            at = (first_row + part.at + i) * n + first_output
            if self.residual != "none":
                other = emit.load(self.buffers["residual"], at, rows)
                value = finish(value, self.activation, self.residual, other)
            emit.store(self.buffers["y"], at, value, rows, live)
