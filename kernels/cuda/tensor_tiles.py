"""Products on tensor cores, a tile of the result a block: float16 factors, float32 sums.

    D[rows, columns] += A[rows, k] B[k, columns]

A lies in shared memory as [rows][depth]; B as [columns][depth] (`turned`: its depth is contiguous) or [depth][columns].
`stages` slots are filled by asynchronous copies while one is computed on. Warps hold (rows / warps[0]) x (columns /
warps[1]) of D in registers as fragments of 16 x 8 and load fragments of the next 16 along the depth while they multiply.
Chunks of 16 bytes are XORed with bits of their row, so that the 8 rows of an 8 x 8 matrix lie in different banks.

Fragments own columns 8 t + 2 f and the next (lane t of a quad, fragment f of four), not 8 f + 2 t as the instruction
numbers them, so that a lane ends with 8 neighbours of a row: the rows of a turned B are read in that order, otherwise the
quad exchanges its sums at the end.

Source: CUTLASS's multistage mainloop; Permutations of shared memory as in its efficient GEMM notes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsec.kernels.cuda import emit
from sparsec.kernels.cuda.base import Gpu, overlapped
from sparsec.kernels.cuda.operands import Operand, Placement

EACH = 8  # float16 of a chunk


class WarpTile:
    """A tile that is divided among warps: what its kinds have in common."""

    rows: int
    columns: int
    depth: int
    warps: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth}"

    @property
    def threads(self) -> int:
        """Of a block."""
        return emit.WARP * self.warps[0] * self.warps[1]

    @property
    def warp(self) -> tuple[int, int]:
        """Rows and columns of a warp."""
        return self.rows // self.warps[0], self.columns // self.warps[1]


@dataclass(frozen=True)
class TensorTile(WarpTile):
    """A block's tile of `rows` x `columns`, `depth` a step, `warps` along rows and columns."""

    rows: int
    columns: int
    depth: int
    warps: tuple[int, int]
    stages: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return 2 * self.stages * self.depth * (self.rows + self.columns)

    @property
    def dynamic(self) -> int:
        """Bytes of it that a launch must make room for; 0 where arrays of the code do."""
        return self.shared if self.shared > emit.STATIC_SHARED else 0

    @property
    def registers(self) -> int:
        """Of a thread, about: sums, two sets of fragments, addresses."""
        rows, columns = self.warp
        return min(255, rows * columns // 32 + 2 * (rows // 4 + columns // 4) + 64)

    def left(self) -> Placement:
        """A in shared memory."""
        bits = 3 if self.depth >= 64 else 2
        return Placement(self.rows, self.depth // EACH, self.depth, 2, lambda row: (row >> (3 - bits)) & (2**bits - 1))

    def right(self, turned: bool) -> Placement:
        """B in shared memory."""
        if not turned:
            return Placement(self.depth, self.columns // EACH, self.columns, 2, lambda row: row & 7)
        return Placement(self.columns, self.depth // EACH, self.depth, 2, self._mix)

    def _mix(self, row: Any) -> Any:
        pair = ((row >> 1) ^ (row >> 3)) & 3
        return (row & 1) + 2 * pair if self.depth >= 64 else pair

    def step_cycles(self, gpu: Gpu) -> float:
        """Cycles of a multiprocessor for one step of a tile: tensor cores, or shared memory at 128 bytes a cycle."""
        rows, columns = self.warp
        warps = self.warps[0] * self.warps[1]
        moved = 2 * self.depth * (warps * (rows + columns) + self.rows + self.columns)
        return overlapped(self.rows * self.columns * self.depth / gpu.tensor_fma, moved / 128)


Finish = Callable[[Any], Callable[[Any, list[Any]], None]]


def product(tile: TensorTile, steps: Any, a: Operand, b: Operand, turned: bool, thread: Any, finish: Finish) -> None:
    """What one thread does for one tile: `steps` steps of the depth, known or not, then `finish(column)(row, values)` for
    its sums.

    `values`: 8 float32 of columns from `column` on; row and column are the tile's own.
    """
    rows, columns = tile.warp
    count, fragments, slices = rows // 16, columns // 8, tile.depth // 16
    left, right = a.placement.size, b.placement.size
    room_a: Any = emit.Room(0, 2)
    room_b: Any = emit.Room(2 * tile.stages * left, 2)
    if not tile.dynamic:
        room_a, room_b = emit.shared(tile.stages * left, "float16"), emit.shared(tile.stages * right, "float16")
    lane, warp = T.bind(thread % 32), T.bind(thread // 32)
    row0, column0 = T.bind(warp // tile.warps[1] * rows), T.bind(warp % tile.warps[1] * columns)
    sums = emit.local(count * fragments * 4)
    held_a = [emit.local(count * 4, "uint32") for _ in range(2)]
    held_b = [emit.local(fragments * 2, "uint32") for _ in range(2)]
    for i in range(count * fragments * 4):
        T.buffer_store(sums, T.float32(0), [i])

    row = row0 + lane % 16
    from_a = [T.bind(a.placement.at(row, 2 * k + lane // 16)) for k in range(slices)]
    if turned:
        column = column0 + lane % 8 // 2 * 8 + lane // 16 * 2 + lane % 2
        from_b = [T.bind(b.placement.at(column, 2 * k + lane // 8 % 2)) for k in range(slices)]
    else:
        chunk = column0 // 8 + lane // 16
        from_b = [T.bind(b.placement.at(lane % 16, chunk + 2 * j)) for j in range(fragments // 2)]

    def load(k: int, slot: Any) -> None:
        """Fragments of slice k."""
        for i in range(count):
            at = slot * left + from_a[k] + i * 16 * tile.depth
            emit.call("sparsec_ldmatrix4", emit.address(held_a[k % 2], i * 4), emit.address(room_a, at))
        for j in range(fragments // 2):
            if turned:  # fragments 2 j and 2 j + 1: their bits of the row join the XOR
                start = from_b[k ^ (j % 2 * (slices // 2))]
                at = slot * right + start + (j // 2 * 32 + j % 2 * 4) * tile.depth
            else:
                at = slot * right + from_b[j] + k * 16 * tile.columns
            name = "sparsec_ldmatrix4" if turned else "sparsec_ldmatrix4_trans"
            emit.call(name, emit.address(held_b[k % 2], j * 4), emit.address(room_b, at))

    def multiply(k: int) -> None:
        for i in range(count):
            for f in range(fragments):
                emit.call(
                    "sparsec_mma_f16", emit.address(sums, (i * fragments + f) * 4),
                    emit.address(held_a[k % 2], i * 4), emit.address(held_b[k % 2], f * 2),
                )  # fmt: skip

    def issue(step: Any, slot: Any) -> None:
        a.issue(step, room_a, slot * left)
        b.issue(step, room_b, slot * right)

    def settle(slot: Any) -> None:
        a.settle(room_a, slot * left)
        b.settle(room_b, slot * right)

    ahead = tile.stages - 1
    for step in range(ahead):
        emit.when(step < steps, lambda step=step: (issue(step, step), settle(step)))
        emit.call("sparsec_commit")
    emit.call(f"sparsec_wait<{tile.stages - 2}>")
    emit.barrier()
    load(0, 0)

    def when_more(step: Any, then: Callable[[], None]) -> None:
        if not isinstance(steps, int) or steps > ahead:
            emit.when(step + ahead < steps, then)

    with T.serial(0, steps) as step:
        slot = T.bind(step % tile.stages)
        following, free = T.bind((step + 1) % tile.stages), T.bind((step + ahead) % tile.stages)
        for k in range(slices):
            if k == slices - 1:
                when_more(step, lambda: settle(free))
                emit.call(f"sparsec_wait<{tile.stages - 2}>")
                emit.barrier()
                load(0, following)
            else:
                load(k + 1, slot)
            if k == 0:
                when_more(step, lambda: issue(step + ahead, free))
                emit.call("sparsec_commit")
            multiply(k)

    for q in range(columns // 32):
        one = finish(T.bind(column0 + q * 32 + lane % 4 * 8))
        for i in range(count):
            for h in range(2):
                first = [(i * fragments + 4 * q + s) * 4 + 2 * h for s in range(4)]
                values = [sums[first[j // 2] + j % 2] for j in range(8)]
                if not turned:
                    parts = [emit.local(4) for _ in range(2)]
                    for e, part in enumerate(parts):
                        for s in range(4):
                            T.buffer_store(part, sums[first[s] + e], [s])
                        emit.call("sparsec_quad_transpose", emit.address(part, 0))
                    values = [parts[j % 2][j // 2] for j in range(8)]
                one(row0 + i * 16 + h * 8 + lane // 4, values)
