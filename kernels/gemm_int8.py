"""Rows times a constant weight in 8 bits: Gemm, MatMul and fully connected layers between quantized tensors.

    acc[m, n] = start[n] + sum over words k of dot(x[m, k], w[n, k])                      int32, exact
    y[m, n] = requantized acc * multiplier[n]                                             (`sparsec.kernels.quantized`)

A word is four neighbours of a row, which lie together in x as it is: nothing is packed or moved. A register tile is R rows
of x times V vectors of output columns: for each word V loads of weights, R words of x broadcast and R * V sums of four
products. Few accumulators are made several, each with every second or fourth word, so that a single row of x runs as fast
as its weights arrive: sums of integers may be taken in any order.

Weights are stored by blocks of columns in the order they are read, `block[word][V * lanes]`. Where K is not a multiple of
four, the last word of a row of x holds what follows the row, times zeros.

Source: the GEBP register tile (Goto and van de Geijn, 2008) of `sparsec.kernels.gemm`, counted in words.
Written out by hand: the register tile's shape is chosen for the machine and both edges.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import bytes as vectors
from sparsec.kernels import dots, emit, gemm, quantized
from sparsec.kernels.base import Format, KernelCall, Machine, unique
from sparsec.kernels.dots import WORD
from sparsec.kernels.gemm import Tiling, blocks_of, choose_case
from sparsec.kernels.parts import Part, span
from sparsec.kernels.quantized import QuantType, Requantize

DENSE = Format(
    "gemm_i8_dense", "Gemm, MatMul", "dense", "int8", "rows times a constant weight in 8 bits",
    "quantized input and constant weights, rank 2",
)  # fmt: skip
TABLE: tuple[Format, ...] = (DENSE,)

_CHAINS = 8  # sums in flight that cover the latency of `dot`


def words_of(w: np.ndarray) -> np.ndarray:
    """Weights [N, K] int8 as words of four inputs, zeros behind the last: int32 [N, ceil(K / 4)]."""
    n, k = w.shape
    full = np.zeros((n, -(-k // WORD) * WORD), np.int8)
    full[:, :k] = w
    return quantized.words(full)


# --- cost ------------------------------------------------------------------------------------------------------------


def ranked_tilings(machine: Machine, m: int, k: int, n: int) -> list[tuple[float, Tiling]]:
    """Predicted microseconds of each register tile on one thread, cheapest first."""
    words = machine.words()
    found = gemm.ranked_tilings(words, m, -(-k // WORD), n)
    if machine.dot in dots.WHOLE:
        return found
    # A word is taken apart before it is multiplied: two registers for each vector of weights, and some for parts.
    fits = [(us, t) for us, t in found if t.rows * t.vectors + 2 * t.vectors + 5 <= machine.registers]
    return fits or found[:1]


def predict_us(machine: Machine, m: int, k: int, n: int) -> float:
    """Time of the best tile on one thread."""
    return ranked_tilings(machine, m, k, n)[0][0]


# --- reference and packing -------------------------------------------------------------------------------------------


def reference(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, x_type: QuantType) -> np.ndarray:
    """The sums, exact: x [M, K] and w [N, K] integers, bias [N] -> int64 [M, N]."""
    acc = (x.astype(np.int64) - x_type.zero_point) @ w.astype(np.int64).T
    return acc if bias is None else acc + np.asarray(bias, np.int64)


def pack(words: np.ndarray, tiling: Tiling) -> np.ndarray:
    """Words [N, K] -> flat blocks [K][columns], surplus columns zero."""
    n, k = words.shape
    packed, column = [], 0
    for parts, count in blocks_of(n, tiling):
        width = parts[-1].at + parts[-1].valid
        for _ in range(count):
            block = np.zeros((k, span(parts)), np.int32)
            block[:, :width] = words[column : column + width].T
            packed.append(block.reshape(-1))
            column += width
    return np.concatenate(packed)


def unpack(packed: np.ndarray, n: int, k: int, tiling: Tiling) -> np.ndarray:
    """The inverse of `pack`: words [N, K]."""
    columns, at = [], 0
    for parts, count in blocks_of(n, tiling):
        for _ in range(count):
            block = packed[at : at + k * span(parts)].reshape(k, -1)
            columns.append(block[:, : parts[-1].at + parts[-1].valid])
            at += block.size
    return np.concatenate(columns, axis=1).T.copy()


# --- the register tile -----------------------------------------------------------------------------------------------


class RowWords:
    """`count` consecutive words of a row of bytes, packed for the machine's `dot`, each in all lanes of a vector.

    Arm takes one lane of a register as factor: there they are loaded as vectors, else each is broadcast.
    """

    def __init__(self, machine: Machine, x: Any, start: Any, count: int, flip: bool) -> None:
        self.x, self.start, self.flip = x, start, flip
        self._lanes: list[tuple[Any, int]] = []  # vector and lane of each word
        for width in (4, 2):
            while machine.lane_fma and count - len(self._lanes) >= width:
                vector = T.bind(self._packed(load_words(x, start + WORD * len(self._lanes), width)))
                self._lanes.extend((vector, i) for i in range(width))

    def __call__(self, index: int, width: int) -> Any:
        """Word `index` in all of `width` lanes."""
        if index < len(self._lanes):
            return emit.lane(*self._lanes[index], width)
        return self._packed(emit.splat(load_words(self.x, self.start + WORD * index, 1), width))

    def _packed(self, words: Any) -> Any:
        return quantized.flip(words) if self.flip else words


def load_words(x: Any, start: Any, count: int) -> Any:
    """`count` words of a buffer of bytes from byte `start` on: int32 lanes."""
    return tirx.reinterpret(emit.vector_type(count, "int32"), emit.load(x, start, WORD * count))


def register_tile(
    machine: Machine, rows: int, parts: Sequence[Part], depth: int, row_words: Callable[[int, Any, int], RowWords],
    weights: Callable[[Any, Part], Any], start: Callable[[Part], Any], done: Callable[[int, list[Any]], None],
) -> None:  # fmt: skip
    """Accumulate `depth` words. `row_words(r, k, count)`: words of row r from word k; `weights(k, part)`: a vector.

    `done(r, sums of the parts)` for each row.
    """
    tile = rows * len(parts)
    chains = max(1, min(_CHAINS // tile, depth))
    acc = emit.Accumulators([rows * chains] * len(parts), [part.lanes for part in parts], "int32")
    for p, part in enumerate(parts):
        value = T.bind(start(part))
        for i in range(rows * chains):
            acc.set(i, p, value if i < rows else emit.splat(tirx.const(0, "int32"), part.lanes))
    unroll = min(depth, 4 if machine.lane_fma else max(1, min(4, 24 // tile)))
    unroll = max(unroll, chains)

    def steps(k: Any, count: int) -> None:
        factors = [row_words(r, k, count) for r in range(rows)]
        for u in range(count):
            loaded = [T.bind(weights(k + u, part)) for part in parts]
            first = u % chains * rows
            for r in range(rows):
                for p, part in enumerate(parts):
                    total = dots.dot(machine, acc.get(first + r, p), factors[r](u, part.lanes), loaded[p])
                    acc.set(first + r, p, total)

    if depth:
        emit.in_rounds(depth, unroll, steps)
    for r in range(rows):
        done(r, [balanced([acc.get(c * rows + r, p) for c in range(chains)]) for p in range(len(parts))])


def balanced(terms: list[Any]) -> Any:
    """Their sum, by halves."""
    half = len(terms) // 2
    return balanced(terms[:half]) + balanced(terms[half:]) if half else terms[0]


# --- binding ---------------------------------------------------------------------------------------------------------


def column_constants(
    machine: Machine, w: np.ndarray, bias: np.ndarray | None, x: QuantType, w_scale: np.ndarray, steps: Requantize,
    columns: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """What each of `columns` columns starts with and is multiplied with; those beyond w's are zero."""
    n = w.shape[0]
    starts, multipliers = np.zeros(columns, np.int32), np.zeros(columns, np.float32)
    starts[:n] = quantized.correction(machine, w, bias, x)
    multipliers[:n] = steps.multipliers(x, np.broadcast_to(w_scale, (n,)))
    return {"starts": starts, "multipliers": multipliers}


def _together(machine: Machine, steps: Requantize, parts: Sequence[Part]) -> list[tuple[int, int]]:
    """(first, count) of the parts whose sums are stored at a time: four equal vectors make one of bytes."""
    found = []
    for lanes, same in itertools.groupby(enumerate(parts), key=lambda pair: pair[1].lanes):
        numbers = [i for i, _ in same]
        most = WORD if steps.y is not None and lanes >= WORD and vectors.picks(machine) else 1
        found += [(some[0], len(some)) for some in (numbers[i : i + most] for i in range(0, len(numbers), most))]
    return found


def bind(
    machine: Machine,
    *,
    m: int,
    w: np.ndarray,
    x: QuantType,
    w_scale: np.ndarray,
    steps: Requantize,
    bias: np.ndarray | None = None,
    tiling: Tiling | None = None,
) -> KernelCall:
    """The call for x [m, K] times w [N, K] int8 transposed; leading dimensions of x fold into m.

    bias: [N] integers in units of x.scale * w_scale. Roles (x, y[, residual], weights, starts, multipliers). Tiles: column
    blocks times row blocks. y must not overlap x or residual. Raises ValueError where a sum could leave 32 bits.
    """
    n, k = w.shape
    tiling = tiling or ranked_tilings(machine, m, k, n)[0][1]
    words = machine.words()
    packed, depth = pack(words_of(w), tiling), -(-k // WORD)
    row_blocks = -(-m // tiling.rows)
    blocks = blocks_of(n, tiling)
    column_blocks = sum(count for _, count in blocks)
    columns = sum(span(parts) * count for parts, count in blocks)
    constants = {"weights": packed, **column_constants(machine, w, bias, x, w_scale, steps, columns)}
    bounded = quantized.largest(w, bias, constants["multipliers"][:n]) >= 2.0**30
    flip = quantized.flipped(machine, x)
    roles = ("x", "y", *(("residual",) if steps.residual != "none" else ()), *constants)
    sizes = {"x": (m * k, x.dtype), "y": (m * n, steps.element), "residual": (m * n, steps.other_element)}
    sizes |= {role: (array.size, str(array.dtype)) for role, array in constants.items()}

    def body(*buffers: Any) -> None:
        named = dict(zip(roles, buffers, strict=False))
        begin, end = buffers[-2:]

        def one(row: Any, rows: int, column_block: Any, parts: Sequence[Part]) -> None:
            width = span(parts)
            base = T.bind(column_block * (depth * tiling.width))
            column = T.bind(column_block * tiling.width)
            out = T.bind(row * n + column)
            row_starts = [T.bind((row + r) * k) for r in range(rows)]
            factors = [T.bind(emit.load(named["multipliers"], column + part.at, part.lanes)) for part in parts]

            def done(r: int, sums: list[Any]) -> None:
                at = out + r * n
                for first, count in _together(words, steps, parts):
                    some = slice(first, first + count)
                    others = [
                        emit.load(named["residual"], at + part.at, part.lanes) if steps.residual != "none" else None
                        for part in parts[some]
                    ]
                    if count == 1:
                        finished = steps.finish(words, sums[first], factors[first], others[0])
                    else:
                        finished = steps.finish_bytes(words, sums[some], factors[some], others, bounded)
                    valid = sum(part.valid for part in parts[some])
                    emit.store(named["y"], at + parts[first].at, finished, count * parts[first].lanes, valid)

            register_tile(
                words, rows, parts, depth,
                lambda r, at, count: RowWords(words, named["x"], row_starts[r] + WORD * at, count, flip),
                lambda at, part: emit.load(named["weights"], base + at * width + part.at, part.lanes),
                lambda part: emit.load(named["starts"], column + part.at, part.lanes), done,
            )  # fmt: skip

        with T.serial(begin, end) as t:
            column_block = T.bind(t // row_blocks)
            row = T.bind(t % row_blocks)

            def rows_of(parts: Sequence[Part]) -> None:
                cases: list[tuple[int, Callable[[], None]]] = []
                for rows, count in ((tiling.rows, m // tiling.rows), (m % tiling.rows, 1 if m % tiling.rows else 0)):
                    if count:
                        cases.append((count, lambda rows=rows: one(row * tiling.rows, rows, column_block, parts)))
                choose_case(row, cases)

            choose_case(column_block, [(count, lambda parts=parts: rows_of(parts)) for parts, count in blocks])

    func = emit.function([(role, *sizes[role]) for role in roles], body)
    name = unique(f"gemm_i8_dense_{tiling.rows}x{tiling.width}", m, k, n, tiling, steps, bounded, x.dtype, machine)
    text = f"{m}x{k} times {k}x{n} in 8 bits, tiles {tiling.rows}x{tiling.width}, {steps.activation.name}, residual {steps.residual}"
    return KernelCall(name, func, roles, constants, row_blocks * column_blocks, 0, text)
