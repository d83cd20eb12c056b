"""Few rows times a weight that stays in 8 or 4 bits: read as integers, widened in registers, summed in float32.

    y[m, n] = act(bias[n] + sum over groups g of scale[n, g] * (sum over k in g of x[m, k] * q[n, k]  -  zero[n, g] * X[m, g]))
    X[m, g] = sum over k in g of x[m, k]                                     only where there are zero points

A layer of few rows takes as long as its weights take to arrive: a byte a weight instead of four, or half a byte. Lanes are
outputs, as in `sparsec.kernels.gemm`; a register tile is R rows of x times V vectors of outputs, with a second set of sums
for the group that is being read. The stored form is that of `sparsec.kernels.integers`.

Eight bits are sign-extended and converted as they are loaded. Four bits become a float by a shift and, where a vector has
16 lanes, one permutation of the 16 values there are (vpermps reads only the low four bits of an index); elsewhere two
shifts and a conversion.

In float16 x is widened once into scratch, sums are float32 and the result is rounded once.

Written out by hand: the weights' type changes between memory and registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels.base import Format, KernelCall, Machine, unique
from sparsec.kernels.epilogue import NONE, Activation, Residual, finish
from sparsec.kernels.gemm import Tiling, blocks_of, choose_case
from sparsec.kernels.integers import BITS, NIBBLES, Stored, pack
from sparsec.kernels.parts import Part, span

LINE = 64  # bytes of a cache line
AHEAD = 8192  # bytes: weights from memory are asked for so far ahead (docs/decisions/006)

TABLE: tuple[Format, ...] = tuple(
    Format(f"gemm_f32_w{bits}", "Gemm, MatMul", f"int{bits}", "float32", f"few rows times a weight kept in {bits} bits",
           f"DequantizeLinear of a constant int{bits} weight, by groups of inputs or by output")
    for bits in BITS
)  # fmt: skip


def form_of(stored: Stored) -> Format:
    """The row of the table for a weight."""
    return next(row for row in TABLE if row.format == f"int{stored.bits}")


# --- cost ------------------------------------------------------------------------------------------------------------


def _permutes(machine: Machine, lanes: int) -> bool:
    return lanes == 16 and not machine.lane_fma and machine.vector_bytes == 64


def _widening(machine: Machine, bits: int) -> float:
    """Instructions that make a vector of float32 out of stored weights."""
    if bits == 8:
        return 2.5 if machine.lane_fma else 2.0  # Arm widens 16 bytes in six steps, then converts
    return 2.0 if _permutes(machine, machine.lanes) else 3.0


def ranked_tilings(machine: Machine, m: int, stored: Stored) -> list[tuple[float, Tiling]]:
    """Predicted microseconds of each register tile on one thread, cheapest first: arithmetic, or streaming the weights."""
    machine = machine.single()
    n, k = stored.q.shape
    lanes = machine.lanes
    while lanes > 4 and n <= lanes // 2:
        lanes //= 2
    bytes_us = stored.bytes / (machine.memory_gbps * 1e3)
    if stored.bytes <= machine.l2_bytes:
        bytes_us = stored.bytes / (machine.l2_bytes_per_cycle * machine.ghz * 1e3)
    found: list[tuple[float, Tiling]] = []
    for rows in range(1, min(m, 8) + 1):
        for vectors in range(1, 9):
            if 2 * rows * vectors + vectors + 2 > machine.registers or (vectors > 1 and (vectors - 1) * lanes >= n):
                continue
            tiling = Tiling(rows, vectors, lanes)
            cycles = sum(
                row_count * columns * _tile_cycles(machine, r, len(parts), k, stored)
                for r, row_count in ((rows, m // rows), (m % rows, 1 if m % rows else 0))
                if row_count
                for parts, columns in blocks_of(n, tiling)
            )
            found.append((max(cycles / (machine.ghz * 1e3), bytes_us), tiling))
    return sorted(found, key=lambda item: (item[0], -item[1].rows * item[1].vectors))


def _tile_cycles(machine: Machine, rows: int, vectors: int, k: int, stored: Stored) -> float:
    """Cycles of a register tile: for each k the widening and the multiply-adds, at the end of each group the scaling."""
    widening = _widening(machine, stored.bits)
    scalars = rows / 4 if machine.lane_fma else 0.0  # on x86 a multiply-add broadcasts what it reads
    each = max(
        vectors * (rows + widening / 2) / machine.fma,
        (vectors * (rows + widening) + scalars) / machine.uops,
        4.0 / _chains(rows, vectors),  # latency
    )
    return each * k + stored.groups * vectors * (2 * rows + 1) / machine.fma + 20.0 + 2 * rows * vectors


def _chains(rows: int, vectors: int) -> int:
    """Sums of one group that are set apart, so that multiply-adds need not wait for each other."""
    return max(1, 4 // (rows * vectors))


# --- binding ---------------------------------------------------------------------------------------------------------


def bind(
    machine: Machine,
    *,
    m: int,
    stored: Stored,
    bias: np.ndarray | None = None,
    activation: Activation = NONE,
    residual: Residual = "none",
    tiling: Tiling | None = None,
) -> KernelCall:
    """The call for x [m, K] times a stored weight [N, K] transposed.

    Roles (x, y[, residual], weights, scales[, zeros], bias[, scratch]). Tiles: column blocks times row blocks. y must not
    overlap x or residual.
    """
    n, k = stored.q.shape
    single = machine.single()
    tiling = tiling or ranked_tilings(machine, m, stored)[0][1]
    constants = pack(stored, bias, tiling)
    row_blocks = -(-m // tiling.rows)
    blocks = blocks_of(n, tiling)
    widened = m * k if machine.element != "float32" else 0
    sums = m * stored.groups if stored.zero is not None else 0

    sizes = {role: (array.size, str(array.dtype)) for role, array in constants.items()}
    sizes |= {"x": (m * k, machine.element), "y": (m * n, machine.element), "residual": (m * n, machine.element)}
    sizes["scratch"] = (widened + sums, "float32")
    roles = ["x", "y", *(["residual"] if residual != "none" else []), *constants]
    roles += ["scratch"] if widened + sums else []

    def body(*buffers: Any) -> None:
        named = dict(zip(roles, buffers, strict=False))
        begin, end = buffers[-2:]
        layer = _Layer(single, stored, named, m, widened)
        if widened + sums:
            with T.If(begin < end), T.Then():
                layer.prepare()

        def one(row: Any, rows: int, column_block: Any, parts: Sequence[Part]) -> None:
            out = T.bind(row * n + column_block * tiling.width)

            def done(r: int, part: Part, value: Any) -> None:
                at = out + r * n + part.at
                other = emit.load_float(named["residual"], at, part.lanes) if residual != "none" else None
                value = emit.convert(finish(value, activation, residual, other), machine.element)
                emit.store(named["y"], at, value, part.lanes, part.valid)

            sums = layer.tile(row, rows, column_block, tiling.width, parts)
            for r in range(rows):
                for p, part in enumerate(parts):
                    done(r, part, sums.get(r, p))

        with T.serial(begin, end) as t:
            column_block = T.bind(t // row_blocks)
            row = T.bind(t % row_blocks)

            def rows_of(parts: Sequence[Part]) -> None:
                cases: list[tuple[int, Any]] = []
                for rows, count in ((tiling.rows, m // tiling.rows), (m % tiling.rows, 1 if m % tiling.rows else 0)):
                    if count:
                        cases.append((count, lambda rows=rows: one(row * tiling.rows, rows, column_block, parts)))
                choose_case(row, cases)

            choose_case(column_block, [(count, lambda parts=parts: rows_of(parts)) for parts, count in blocks])

    func = emit.function([(role, *sizes[role]) for role in roles], body)
    facts = (m, k, n, stored.bits, stored.group, stored.zero is None, tiling, activation, residual, machine)
    name = unique(f"{machine.named(form_of(stored).name)}_{tiling.rows}x{tiling.width}", *facts)
    text = (
        f"{m}x{k} times {k}x{n} in {stored.bits} bits, groups of {stored.group}{'' if stored.zero is None else ' with zero points'}, "
        f"{activation.name}, residual {residual}"
    )
    tiles = row_blocks * sum(count for _, count in blocks)
    return KernelCall(name, func, tuple(roles), constants, tiles, 4 * (widened + sums), text)


@dataclass(frozen=True)
class _Layer:
    """Emits the code of one layer. `widened`: elements of x as float32 at the start of scratch; sums of groups follow."""

    machine: Machine  # in float32
    stored: Stored
    buffers: dict[str, Any]
    m: int
    widened: int

    def prepare(self) -> None:
        """x as float32, and the sum of each of its groups, into scratch."""
        x, scratch, lanes = self.buffers["x"], self.buffers["scratch"], self.machine.lanes
        if self.widened:
            _runs(
                self.m * self.stored.q.shape[1],
                lanes,
                lambda at, size: emit.store(scratch, at, emit.load_float(x, at, size), size),
            )
        if self.stored.zero is None:
            return
        k, group, groups = self.stored.q.shape[1], self.stored.group, self.stored.groups
        source = scratch if self.widened else x
        whole, rest = divmod(k, group)
        with T.serial(0, self.m) as row:
            if whole:
                with T.serial(0, whole) as g:
                    self._sum(source, row * k + g * group, group, self.widened + row * groups + g)
            if rest:
                self._sum(source, row * k + whole * group, rest, self.widened + row * groups + whole)

    def _sum(self, source: Any, start: Any, count: int, at: Any) -> None:
        """scratch[at] = sum of `count` elements of `source`."""
        lanes = self.machine.lanes
        total, one = emit.registers(1, lanes), emit.registers(1, 1)
        T.buffer_store(total, emit.constant(0, lanes), [0])
        T.buffer_store(one, emit.constant(0), [0])

        def add(i: Any, size: int) -> None:
            into = total if size == lanes else one
            T.buffer_store(into, into[0] + emit.load(source, start + i, size), [0])

        _runs(count, lanes, add)
        values = [T.Shuffle([total[0]], [i]) for i in range(lanes)]
        while len(values) > 1:
            values = [a + b for a, b in zip(values[::2], values[1::2], strict=True)]
        T.buffer_store(self.buffers["scratch"], values[0] + one[0], [at])

    def tile(self, row: Any, rows: int, column_block: Any, full_width: int, parts: Sequence[Part]) -> emit.Accumulators:
        """The sums of a register tile, bias included."""
        stored, width = self.stored, span(parts)
        k, groups = stored.q.shape[1], stored.groups
        lanes = [part.lanes for part in parts]
        total = emit.Accumulators([rows] * len(parts), lanes, "float32")
        chains = _chains(rows, len(parts))
        group_sums = emit.Accumulators([rows * chains] * len(parts), lanes, "float32")
        total.fill(
            lambda _, p: emit.load(self.buffers["bias"], column_block * full_width + parts[p].at, parts[p].lanes)
        )
        weights = T.bind(column_block * (stored.depth * full_width))
        scales = T.bind(column_block * (groups * full_width))
        bases = [T.bind((row + r) * k) for r in range(rows)]

        ahead = max(1, AHEAD // (stored.units * width * (1 if stored.bits == 8 else 4)))  # groups

        def one_group(g: Any, size: int) -> None:
            group_sums.fill(lambda _, p: emit.constant(0, lanes[p]))
            first = T.bind(weights + g * (stored.units * width))
            self._terms(
                group_sums, rows, chains, parts, size, first, [T.bind(base + g * stored.group) for base in bases]
            )
            at = T.bind(scales + g * width)
            self._fetch("scales", at, width, 4, ahead * 4 * width)
            factors = [T.bind(self._sum_of_group(row + r, g)) for r in range(rows)] if stored.zero is not None else []
            for p, part in enumerate(parts):
                scale = T.bind(emit.load(self.buffers["scales"], at + part.at, part.lanes))
                zero = T.bind(emit.load_float(self.buffers["zeros"], at + part.at, part.lanes)) if factors else None
                for r in range(rows):
                    value = group_sums.get(r, p)
                    for chain in range(1, chains):
                        value = value + group_sums.get(chain * rows + r, p)
                    if zero is not None:
                        value = value - zero * emit.splat(factors[r], part.lanes)
                    total.set(r, p, total.get(r, p) + scale * value)

        whole, rest = divmod(k, stored.group)
        if whole == 1:
            one_group(0, stored.group)
        elif whole:
            with T.serial(0, whole) as g:
                one_group(g, stored.group)
        if rest:
            one_group(whole, rest)
        return total

    def _sum_of_group(self, row: Any, g: Any) -> Any:
        return self.buffers["scratch"][self.widened + row * self.stored.groups + g]

    def _terms(
        self, sums: emit.Accumulators, rows: int, chains: int, parts: Sequence[Part], size: int, first: Any,
        bases: Sequence[Any],
    ) -> None:  # fmt: skip
        """Add a group's `size` products; `first`: its weights, `bases`: its elements of x."""
        x = self.buffers["scratch" if self.widened else "x"]
        weights, width = self.buffers["weights"], span(parts)

        def add(u: int, factors: Sequence[emit.Scalars], vectors: Sequence[Any]) -> None:
            for p, part in enumerate(parts):
                for r in range(rows):
                    slot = u % chains * rows + r
                    sums.set(slot, p, sums.get(slot, p) + factors[r](u, part.lanes) * vectors[p])

        def bytes_at(at: Any, count: int) -> None:
            factors = [emit.Scalars(x, base + at, count, self.machine.lane_fma) for base in bases]
            self._fetch("weights", first + at * width, count * width, 1, AHEAD)
            for u in range(count):
                add(u, factors, [
                    T.bind(emit.load_float(weights, first + (at + u) * width + part.at, part.lanes)) for part in parts
                ])  # fmt: skip

        def words_at(word: Any, count: int) -> None:
            factors = [emit.Scalars(x, base + word * NIBBLES, count, self.machine.lane_fma) for base in bases]
            words = [T.bind(emit.load(weights, first + word * width + part.at, part.lanes)) for part in parts]
            self._fetch("weights", first + word * width, width, 4, AHEAD)
            for u in range(count):
                add(
                    u,
                    factors,
                    [T.bind(self._nibble(value, u, part.lanes)) for value, part in zip(words, parts, strict=True)],
                )

        if self.stored.bits == 8:
            emit.in_rounds(size, min(size, 8), bytes_at)
            return
        if size >= NIBBLES:
            with T.serial(0, size // NIBBLES) as word:
                words_at(word, NIBBLES)
        if size % NIBBLES:
            words_at(size // NIBBLES, size % NIBBLES)

    def _fetch(self, role: str, at: Any, count: int, size: int, ahead: int) -> None:
        """Ask for what lies `ahead` bytes behind `count` elements of `size` bytes, if it comes from memory."""
        if self.stored.bytes > self.machine.l2_bytes:
            for line in range(0, count, LINE // size):
                emit.prefetch(self.buffers[role], at + line + ahead // size)

    def _nibble(self, words: Any, i: int, lanes: int) -> Any:
        """Nibble i of each word, a number from -8 to 7 as float32."""
        if _permutes(self.machine, lanes):
            values = T.Shuffle([emit.constant(v - 16 if v > 7 else v) for v in range(16)], list(range(16)))
            index = words >> _int(4 * i, lanes) if i else words
            return T.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.permvar.sf.512", values, index)
        high = words << _int(28 - 4 * i, lanes) if i < NIBBLES - 1 else words
        return T.Cast(emit.vector_type(lanes), high >> _int(28, lanes))


def _runs(count: int, lanes: int, one: Callable[[Any, int], None]) -> None:
    """`one(first, lanes)` for whole vectors of `count` elements, then `one(i, 1)` for those left over."""
    whole = count // lanes
    if whole:
        with T.serial(0, whole) as i:
            one(i * lanes, lanes)
    if count % lanes:
        with T.serial(whole * lanes, count) as i:
            one(i, 1)


def _int(value: int, lanes: int) -> Any:
    return emit.splat(tirx.const(value, "int32"), lanes)
