"""Products on CUDA cores, a tile of the result a block: float32 throughout.

    D[rows, columns] += A[rows, k] B[k, columns]

A lies in shared memory as [rows][depth], B as [columns][depth] (`turned`) or [depth][columns]. A thread holds `lanes` rows x
columns of D in registers; of A, and of a turned B, it reads 4 neighbours along the depth at once, of B in rows 4
neighbouring columns. Rows of [..][depth] are 4 elements longer than they need be, so that those of neighbouring threads
lie in different banks. `stages` slots are filled by asynchronous copies while one is computed on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsec.kernels.cuda import emit
from sparsec.kernels.cuda.base import Gpu, overlapped
from sparsec.kernels.cuda.operands import Operand, Placement

EACH = 4  # float32 of a chunk


@dataclass(frozen=True)
class CoreTile:
    """A block's tile of `rows` x `columns`, `depth` a step; a thread holds `lanes` of it."""

    rows: int
    columns: int
    depth: int
    lanes: tuple[int, int]
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth}"

    @property
    def grid(self) -> tuple[int, int]:
        """Threads along rows and columns."""
        return self.rows // self.lanes[0], self.columns // self.lanes[1]

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.grid[0] * self.grid[1]

    @property
    def shared(self) -> int:
        """Bytes of shared memory, at most: B turned or not."""
        rows = self.rows + self.columns
        return (
            4
            * self.stages
            * max(rows * (self.depth + EACH), self.rows * (self.depth + EACH) + self.columns * self.depth)
        )

    @property
    def dynamic(self) -> int:
        """Bytes of it that a launch must make room for: none."""
        return 0

    @property
    def registers(self) -> int:
        """Of a thread, about: sums, fragments of four of the depth, addresses."""
        return min(255, self.lanes[0] * self.lanes[1] + 4 * (self.lanes[0] + self.lanes[1]) + 32)

    def left(self) -> Placement:
        """A in shared memory."""
        return Placement(self.rows, self.depth // EACH, self.depth + EACH, 4)

    def right(self, turned: bool) -> Placement:
        """B in shared memory."""
        if turned:
            return Placement(self.columns, self.depth // EACH, self.depth + EACH, 4)
        return Placement(self.depth, self.columns // EACH, self.columns, 4)

    def step_cycles(self, gpu: Gpu) -> float:
        """Cycles of a multiprocessor for one step of a tile: multiply-adds, or reads of shared memory."""
        warps, (high, wide) = self.threads / emit.WARP, self.lanes
        reads = warps * self.depth * (high + wide) / 4
        issued = (self.rows * self.columns * self.depth / emit.WARP + reads) * emit.WARP / gpu.fma
        return overlapped(1.05 * issued, 2.0 * reads)  # 16 bytes a lane take two cycles


Finish = Callable[[list[Any]], Callable[[Any, list[Any]], None]]


def product(tile: CoreTile, steps: Any, a: Operand, b: Operand, turned: bool, thread: Any, finish: Finish) -> None:
    """What one thread does for one tile: `steps` steps of the depth, known or not, then `finish(columns)(row, values)`
    for its sums.

    `values`: up to 4 float32 of the tile's `columns`, neighbours unless B is turned.
    """
    high, wide = tile.lanes
    left, right = a.placement.size, b.placement.size
    room_a, room_b = emit.shared(tile.stages * left), emit.shared(tile.stages * right)
    # A warp is 4 x 8 threads where the tile allows, so that both sides are read by several threads at once.
    down, along = tile.grid
    over = min(8, along)
    lane, warp = T.bind(thread % 32), T.bind(thread // 32)
    across = along // over
    x = T.bind(warp % across * over + lane % over)
    y = T.bind(warp // across * (32 // over) + lane // over)
    sums = emit.local(high * wide)
    held_a, held_b = emit.local(high * 4), emit.local(wide * 4)
    for i in range(high * wide):
        T.buffer_store(sums, T.float32(0), [i])

    def issue(step: Any, slot: Any) -> None:
        a.issue(step, room_a, slot * left)
        b.issue(step, room_b, slot * right)

    def settle(slot: Any) -> None:
        a.settle(room_a, slot * left)
        b.settle(room_b, slot * right)

    def load(to: Any, at: int, room: Any, index: Any) -> None:
        emit.call("sparsec_load4", emit.address(to, at), emit.address(room, index))

    def multiply(slot: Any) -> None:
        for quad in range(tile.depth // 4):
            for i in range(high):
                load(held_a, 4 * i, room_a, slot * left + a.placement.at(y + down * i, quad))
            if turned:
                for j in range(wide):
                    load(held_b, 4 * j, room_b, slot * right + b.placement.at(x + along * j, quad))
            for k in range(4):
                if not turned:
                    for j in range(0, wide, 4):
                        index = slot * right + b.placement.at(4 * quad + k, x + along * (j // 4))
                        load(held_b, j, room_b, index)
                for i in range(high):
                    for j in range(wide):
                        other = held_b[4 * j + k] if turned else held_b[j]
                        T.buffer_store(sums, sums[i * wide + j] + held_a[4 * i + k] * other, [i * wide + j])

    ahead = tile.stages - 1
    more = not isinstance(steps, int) or steps > ahead
    for step in range(ahead):
        emit.when(step < steps, lambda step=step: (issue(step, step), settle(step)))
        emit.call("sparsec_commit")
    with T.serial(0, steps) as step:
        emit.call(f"sparsec_wait<{tile.stages - 2}>")
        emit.barrier()
        free = T.bind((step + ahead) % tile.stages)
        if more:
            emit.when(step + ahead < steps, lambda: issue(step + ahead, free))
        emit.call("sparsec_commit")
        multiply(T.bind(step % tile.stages))
        if more:
            emit.when(step + ahead < steps, lambda: settle(free))

    for j in range(0, wide, 4):
        one = finish([T.bind(x + along * (j + c) if turned else (x + along * (j // 4)) * 4 + c) for c in range(4)])
        for i in range(high):
            one(y + down * i, [sums[i * wide + j + c] for c in range(4)])
