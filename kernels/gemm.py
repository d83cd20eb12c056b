"""Dense matrix products: with a constant weight (`gemm`: Gemm, MatMul, fully connected) and of two activations (`matmul`).

    gemm     y[m, n] = act(bias[n] + sum over k of x[m, k] * w[n, k])
    matmul   y[b, m, n] = sum over k of a[b, m, k] * c[b, k, n]          or c[b, n, k], transposed

A register tile is R rows of x times V vectors of output columns: for each k, V loads of weights, R broadcast elements of x
and R * V multiply-adds. Weights are stored by blocks of columns in the order they are read, `block[k][V * lanes]` with the
bias as row 0; blocks and tiles at the right and lower edge are as narrow as what is left. Tiles follow columns outside and
rows inside, so that a block of weights stays in L2 while the rows pass.

Source: the GEBP register tile (Goto and van de Geijn, 2008) without packing x, which is small or read once.
Written out by hand: the register tile's shape is chosen for the machine and both edges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels.base import Format, KernelCall, Machine, unique
from sparsec.kernels.epilogue import NONE, Activation, Residual, finish, reference_finish
from sparsec.kernels.parts import Part, parts_of, span

TABLE: tuple[Format, ...] = (
    Format("gemm_f32_dense", "Gemm, MatMul", "dense", "float32", "rows times a constant weight", "constant weight, rank 2"),
    Format("matmul_f32", "MatMul", "dense", "float32", "batched product of two activations",
           "equal batch, or one side shared by the whole batch"),
)  # fmt: skip


@dataclass(frozen=True)
class Tiling:
    """Register tile of `rows` x `vectors` vectors of `lanes`."""

    rows: int
    vectors: int
    lanes: int

    @property
    def width(self) -> int:
        """Columns of a full block."""
        return self.vectors * self.lanes


def tile_cycles(machine: Machine, rows: int, parts: Sequence[Part]) -> float:
    """Cycles for one k of a register tile: the larger of the FMA, load and issue bounds."""
    # A vector narrower than the machine's counts as half where the units split (16 lanes), else in full.
    share = sum(max(p.lanes / machine.lanes, 0.5 if machine.vector_bytes == 64 else 1.0) for p in parts)
    scalars = rows / 4 if machine.lane_fma else rows / (2 if machine.vector_bytes == 64 else 1)
    latency = 4.0 / 2  # a chain of four cycles, two iterations in flight
    bounds = (
        rows * share / machine.fma,
        (share + scalars) / machine.loads,
        (rows * len(parts) + len(parts) + scalars + 0.5) / machine.uops,
    )
    return max(*bounds, latency)


def choose_tiling(machine: Machine, m: int, k: int, n: int) -> tuple[Tiling, float]:
    """The cheapest register tile and the predicted cycles for m x k x n."""
    cycles, tiling = _ranked_cycles(machine, m, k, n)[0]
    return tiling, cycles


def _ranked_cycles(machine: Machine, m: int, k: int, n: int) -> list[tuple[float, Tiling]]:
    """Predicted cycles of each register tile, cheapest first; the larger tile among equals."""
    lanes = machine.lanes
    while lanes > 4 and n <= lanes // 2:
        lanes //= 2
    found: list[tuple[float, Tiling]] = []
    for rows in range(1, min(m, 14) + 1):
        for vectors in range(1, 9):
            quads = rows if machine.lane_fma else 1
            if rows * vectors + vectors + quads > machine.registers - (0 if machine.vector_bytes == 64 else 1):
                continue
            if vectors > 1 and (vectors - 1) * lanes >= n:
                continue
            tiling = Tiling(rows, vectors, lanes)
            cycles = sum(
                count * (tile_cycles(machine, r, parts) * k + 10 + 2 * r * len(parts))
                for r, row_count in ((rows, m // rows), (m % rows, 1 if m % rows else 0))
                for parts, columns in blocks_of(n, tiling)
                for count in [row_count * columns]
                if count
            )
            found.append((cycles, tiling))
    return sorted(found, key=lambda item: (item[0], -item[1].rows * item[1].vectors))


def ranked_tilings(machine: Machine, m: int, k: int, n: int) -> list[tuple[float, Tiling]]:
    """Predicted microseconds of each register tile on one thread, cheapest first: arithmetic, or streaming the weights."""
    weights = machine.item * k * n
    if weights <= machine.l2_bytes:
        stream = weights / (machine.l2_bytes_per_cycle * machine.ghz * 1e3)
    else:
        stream = weights / (machine.memory_gbps * 1e3)
    return [(max(cycles / (machine.ghz * 1e3), stream), tiling) for cycles, tiling in _ranked_cycles(machine, m, k, n)]


def predict_us(machine: Machine, m: int, k: int, n: int) -> float:
    """Time of the best tile on one thread."""
    return ranked_tilings(machine, m, k, n)[0][0]


def blocks_of(n: int, tiling: Tiling) -> list[tuple[tuple[Part, ...], int]]:
    """(parts, how many) of the full column blocks and of the narrower last one."""
    full, rest = divmod(n, tiling.width)
    found = [(parts_of(tiling.width, tiling.lanes), full)] if full else []
    return found + ([(parts_of(rest, tiling.lanes), 1)] if rest else [])


# --- reference and packing -------------------------------------------------------------------------------------------


def reference(
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None = None,
    activation: Activation = NONE,
    residual: Residual = "none",
    other: np.ndarray | None = None,
) -> np.ndarray:
    """x [M, K] times w [N, K] transposed, in float64."""
    y = x.astype(np.float64) @ w.astype(np.float64).T
    return reference_finish(y if bias is None else y + bias, activation, residual, other)


def reference_matmul(a: np.ndarray, b: np.ndarray, transposed: bool = False) -> np.ndarray:
    """a [B, M, K] times b [B, K, N] (or [B, N, K]) in float64; a batch of 1 serves all."""
    b = b.astype(np.float64)
    return a.astype(np.float64) @ (b.swapaxes(1, 2) if transposed else b)


def pack(w: np.ndarray, bias: np.ndarray | None, tiling: Tiling) -> np.ndarray:
    """w [N, K], bias [N] or None -> flat blocks [1 + K][columns], row 0 the bias, surplus columns zero."""
    n, k = w.shape
    rows = np.zeros((k + 1, n), np.float32)
    rows[0] = 0 if bias is None else bias
    rows[1:] = w.T
    packed, column = [], 0
    for parts, count in blocks_of(n, tiling):
        width = parts[-1].at + parts[-1].valid
        for _ in range(count):
            block = np.zeros((k + 1, span(parts)), np.float32)
            block[:, :width] = rows[:, column : column + width]
            packed.append(block.reshape(-1))
            column += width
    return np.concatenate(packed)


def unpack(packed: np.ndarray, n: int, k: int, tiling: Tiling) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `pack`: w [N, K] and bias [N]."""
    rows, at = [], 0
    for parts, count in blocks_of(n, tiling):
        for _ in range(count):
            block = packed[at : at + (k + 1) * span(parts)].reshape(k + 1, -1)
            rows.append(block[:, : parts[-1].at + parts[-1].valid])
            at += block.size
    whole = np.concatenate(rows, axis=1)
    return whole[1:].T.copy(), whole[0].copy()


# --- the register tile -----------------------------------------------------------------------------------------------


def register_tile(
    machine: Machine, rows: int, parts: Sequence[Part], depth: int, x: Any, x_at: Callable[[int], Any],
    weights: Callable[[Any, Part], Any], start: Callable[[Part], Any], done: Callable[[int, Part, Any], None],
) -> None:  # fmt: skip
    """Accumulate `depth` products. `x_at(r)`: element of `x` where row r begins; `weights(k, part)`: a vector of row k."""
    acc = emit.Accumulators([rows] * len(parts), [part.lanes for part in parts], machine.element)
    for p, part in enumerate(parts):
        value = T.bind(start(part))
        for r in range(rows):
            acc.set(r, p, value)
    bases = [T.bind(x_at(r)) for r in range(rows)]
    unroll = 16 // machine.item if machine.lane_fma else max(1, min(4, 24 // (rows * len(parts))))
    unroll = min(unroll, depth)

    def steps(k: Any, count: int) -> None:
        factors = [emit.Scalars(x, base + k, count, machine.lane_fma) for base in bases]
        for u in range(count):
            loaded = [T.bind(weights(k + u, part)) for part in parts]
            for r in range(rows):
                for p, part in enumerate(parts):
                    acc.set(r, p, acc.get(r, p) + factors[r](u, part.lanes) * loaded[p])

    if depth:
        emit.in_chains(
            acc, depth, machine.chain(depth),
            lambda first, count: emit.in_rounds(count, unroll, lambda at, size: steps(first + at, size)),
        )  # fmt: skip
    for r in range(rows):
        for p, part in enumerate(parts):
            done(r, part, acc.get(r, p))


def choose_case(index: Any, cases: Sequence[tuple[int, Callable[[], None]]]) -> None:
    """Emit `index < cases[0][0] ? cases[0] : cases[1]`, or the one case there is."""
    if len(cases) == 1:
        cases[0][1]()
        return
    with T.If(index < cases[0][0]):
        with T.Then():
            cases[0][1]()
        with T.Else():
            cases[1][1]()


# --- constant weight -------------------------------------------------------------------------------------------------


def bind(
    machine: Machine,
    *,
    m: int,
    w: np.ndarray,
    bias: np.ndarray | None = None,
    activation: Activation = NONE,
    residual: Residual = "none",
    tiling: Tiling | None = None,
) -> KernelCall:
    """The call for x [m, K] times w [N, K] transposed: leading dimensions of x fold into m, alpha and beta into w and bias.

    Roles (x, y[, residual], weights). Tiles: column blocks times row blocks. y must not overlap x or residual.
    """
    n, k = w.shape
    tiling = tiling or choose_tiling(machine, m, k, n)[0]
    packed = machine.array(pack(w, bias, tiling))
    late = bias is not None and machine.bias_last(k)
    row_blocks = -(-m // tiling.rows)
    blocks = blocks_of(n, tiling)
    column_blocks = sum(count for _, count in blocks)

    def body(*buffers: Any) -> None:
        x, y, weights = buffers[0], buffers[1], buffers[-3]
        begin, end = buffers[-2:]

        def one(row: Any, rows: int, column_block: Any, parts: Sequence[Part]) -> None:
            width = span(parts)
            base = T.bind(column_block * ((k + 1) * tiling.width))
            out = T.bind(row * n + column_block * tiling.width)

            def bias_of(part: Part) -> Any:
                return emit.load(weights, base + part.at, part.lanes)

            def done(r: int, part: Part, value: Any) -> None:
                at = out + r * n + part.at
                other = emit.load(buffers[2], at, part.lanes) if residual != "none" else None
                total = value + bias_of(part) if late else value
                emit.store(y, at, finish(total, activation, residual, other), part.lanes, part.valid)

            def start(part: Part) -> Any:
                return emit.constant(0, part.lanes, machine.element) if late else bias_of(part)

            register_tile(
                machine, rows, parts, k, x, lambda r: (row + r) * k,
                lambda kk, part: emit.load(weights, base + (kk + 1) * width + part.at, part.lanes), start, done,
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

    sizes = {"x": m * k, "y": m * n, "residual": m * n, "weights": packed.size}
    roles = ("x", "y", "residual", "weights") if residual != "none" else ("x", "y", "weights")
    func = emit.function([(role, sizes[role], machine.element) for role in roles], body)
    name = unique(
        machine.named(f"gemm_f32_dense_{tiling.rows}x{tiling.width}"),
        m,
        k,
        n,
        late,
        tiling,
        activation,
        residual,
        machine,
    )
    text = f"{m}x{k} times {k}x{n}, tiles {tiling.rows}x{tiling.width}, {activation.name}, residual {residual}"
    return KernelCall(name, func, roles, {"weights": packed}, row_blocks * column_blocks, 0, text)


# --- two activations -------------------------------------------------------------------------------------------------


def transpose_panel(load: Callable[[int, Any, int], Any], rows: int, depth: int, panel: Any, pitch: int) -> None:
    """panel[k * pitch + i] = element k of row i for i < rows, k < depth: squares of 4 x 4 through registers.

    `load(i, k, lanes)`: elements of row i from k on.
    """

    def square(k: Any, i: int) -> None:
        loaded = [T.bind(load(i + j, k, 4)) for j in range(4)]
        for c in range(4):
            emit.store(panel, (k + c) * pitch + i, T.Shuffle(loaded, [4 * j + c for j in range(4)]), 4)

    whole = rows - rows % 4
    if whole and depth >= 4:
        with T.serial(0, depth // 4) as q:
            for i in range(0, whole, 4):
                square(q * 4, i)
    for i in range(rows):
        first = depth - depth % 4 if i < whole else 0
        if first < depth:
            with T.serial(first, depth) as k:
                T.buffer_store(panel, load(i, k, 1), [k * pitch + i])


def bind_matmul(
    machine: Machine,
    *,
    batch: int,
    m: int,
    k: int,
    n: int,
    transposed: bool = False,
    a_shared: bool = False,
    b_shared: bool = False,
    scale: float = 1.0,
    activation: Activation = NONE,
) -> KernelCall:
    """The call for `act(scale * a @ b)` of two activations: a [batch, m, k], b [batch, k, n], or [batch, n, k] if `transposed`.

    `a_shared`, `b_shared`: that side has no batch axis, or one of length 1. Roles (a, b, y[, scratch]). Tiles: batch
    times column blocks times chunks of rows. A transposed block of b is turned in scratch once and serves all rows.
    """
    tiling = choose_tiling(machine, m, k, n)[0]
    column_blocks = -(-n // tiling.width)
    full = n // tiling.width
    scratch = k * tiling.width * machine.item if transposed else 0
    full_rows = m // tiling.rows
    # Few tiles are cut by rows too, so that threads have work; each thread turns a block of b for itself, once.
    per_chunk = max(1, full_rows // max(1, -(-8 // (batch * column_blocks))))
    chunks = max(1, -(-full_rows // per_chunk))

    def body(*buffers: Any) -> None:
        a, b, y = buffers[:3]
        panel = buffers[3] if transposed else None
        begin, end = buffers[-2:]

        turned: Any = None
        if transposed and chunks > 1:
            turned = T.alloc_buffer((1,), "int32", scope="local")
            T.buffer_store(turned, -1, [0])

        def turn(b_base: Any, parts: Sequence[Part]) -> None:
            width = parts[-1].at + parts[-1].valid
            transpose_panel(
                lambda i, at, lanes: emit.load(b, b_base + i * k + at, lanes), width, k, panel, tiling.width
            )

        def one(number: Any, item: Any, column: Any, parts: Sequence[Part], chunk: Any) -> None:
            a_base = 0 if a_shared else T.bind(item * (m * k))
            b_base = T.bind((0 if b_shared else item * (k * n)) + (column * k if transposed else column))
            out = T.bind(item * (m * n) + column)
            if turned is not None:  # the chunks of a block follow one another
                with T.If(turned[0] != number), T.Then():
                    turn(b_base, parts)
                    T.buffer_store(turned, number, [0])
            elif transposed:
                turn(b_base, parts)

            def weights(kk: Any, part: Part) -> Any:
                if transposed:
                    return emit.load(panel, kk * tiling.width + part.at, part.lanes)
                return emit.load(b, b_base + kk * n + part.at, part.lanes)

            def rows_from(row: Any, rows: int) -> None:
                def done(r: int, part: Part, value: Any) -> None:
                    scaled = value if scale == 1.0 else value * emit.constant(scale, part.lanes, machine.element)
                    emit.store(y, out + (row + r) * n + part.at, finish(scaled, activation), part.lanes, part.valid)

                register_tile(
                    machine, rows, parts, k, a, lambda r: a_base + (row + r) * k, weights,
                    lambda part: emit.constant(0, part.lanes, machine.element), done,
                )  # fmt: skip

            if full_rows:
                with T.serial(chunk * per_chunk, T.min((chunk + 1) * per_chunk, full_rows)) as i:
                    rows_from(i * tiling.rows, tiling.rows)
            if m % tiling.rows and chunks == 1:
                rows_from(m - m % tiling.rows, m % tiling.rows)
            elif m % tiling.rows:
                with T.If(chunk == chunks - 1), T.Then():
                    rows_from(m - m % tiling.rows, m % tiling.rows)

        with T.serial(begin, end) as t:
            chunk = T.bind(t % chunks) if chunks > 1 else 0
            number = T.bind(t // chunks)
            item = T.bind(t // (column_blocks * chunks))
            block = T.bind(t // chunks % column_blocks)
            cases: list[tuple[int, Callable[[], None]]] = []
            if full:
                whole = parts_of(tiling.width, tiling.lanes)
                cases.append((full, lambda: one(number, item, block * tiling.width, whole, chunk)))
            if n % tiling.width:
                last = parts_of(n % tiling.width, tiling.lanes)
                cases.append((column_blocks, lambda: one(number, item, full * tiling.width, last, chunk)))
            choose_case(block, cases)

    b_size = (1 if b_shared else batch) * k * n
    element = machine.element
    arguments = [
        ("a", (1 if a_shared else batch) * m * k, element),
        ("b", b_size, element),
        ("y", batch * m * n, element),
    ]
    if transposed:
        arguments.append(("scratch", scratch // machine.item, element))
    func = emit.function(arguments, body)
    facts = (batch, m, k, n, transposed, a_shared, b_shared, scale, activation, tiling, machine)
    stem = machine.named("matmul_f32") + f"{'_t' if transposed else ''}_{tiling.rows}x{tiling.width}"
    text = f"{batch} x {m}x{k} times {k}x{n}{' transposed' if transposed else ''}, tiles {tiling.rows}x{tiling.width}"
    roles = tuple(argument[0] for argument in arguments)
    return KernelCall(unique(stem, *facts), func, roles, {}, batch * column_blocks * chunks, scratch, text)
