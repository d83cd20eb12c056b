"""One group of rows in one pass: its sums begin or go on, take the products of the stored blocks, are finished or rest.

    sums[r, p] (+)= w[r, k] * panel[k, p]      for the stored columns k of the group; r < R rows, p < P vectors of pixels

Several sets of accumulators where one would wait for itself; sums that rest between passes lie behind the panel. The bias
begins a short sum and ends a long one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels.base import Machine
from sparsec.kernels.conv.cost import chains
from sparsec.kernels.conv.geometry import Tiling
from sparsec.kernels.conv.stored import Packed
from sparsec.kernels.epilogue import Activation, Residual
from sparsec.kernels.epilogue import finish as finish_sum
from sparsec.kernels.parts import Part

AHEAD = 512  # elements: weights are asked for this early; one at a time they go by too slowly for hardware to notice


@dataclass(frozen=True)
class Terms:
    """What one group adds in one pass: `count` blocks from number `start`, their values from `values` on.

    Of dense weights: columns, from panel row `start`.
    """

    start: Any
    count: Any
    values: Any


@dataclass(frozen=True)
class Stage:
    """Whether a pass is the first and the last; expressions where there are several passes."""

    first: Any
    last: Any

    @staticmethod
    def choose(condition: Any, yes: Callable[[], None], no: Callable[[], None]) -> None:
        """Emit `yes` or `no`, or a branch between them."""
        if isinstance(condition, bool):
            (yes if condition else no)()
            return
        with T.If(condition):
            with T.Then():
                yes()
            with T.Else():
                no()


class RowGroups:
    """Emits what a group of rows does. The arithmetic stands in the methods up to `finished_rows`."""

    machine: Machine
    oc: int  # rows
    packed: Packed
    tiling: Tiling
    activation: Activation
    residual: Residual
    element: str  # of the sums
    limit: int  # blocks in one chain of additions, 0: any
    late: bool  # whether the bias is added to the finished sum
    unroll: int  # blocks
    panel: int  # elements of scratch before the sums that rest
    buffers: dict[str, Any]  # by role, while the kernel is written

    def parts_of(self, pixels: int, rows: int) -> tuple[Part, ...]:
        """What covers `pixels` of a tile in a group of `rows` rows."""
        return self.tiling.parts_of(pixels, rows)

    def multiply_add(self, total: Any, weights: Any, activations: Any) -> Any:
        """A sum and one more term."""
        return total + weights * activations

    def together(self, lanes: int) -> int:
        """How many vectors of sums `finished` takes at a time."""
        return 1

    def finished(self, totals: list[Any], others: list[Any], rows: list[Any], lanes: int) -> Any:
        """What is stored of some vectors of sums, one behind the other. `others`: residuals; `rows`: output channels."""
        return finish_sum(totals[0], self.activation, self.residual, others[0])

    def finished_rows(self, total: Any, row: Any, rows: int) -> list[Any] | None:
        """What is stored of one pixel's sums of `rows` rows from `row` on, or None: each goes through `finished`."""
        return None

    def _group(self, first_row: Any, rows: int, parts: tuple[Part, ...], out: Any, terms: Terms, stage: Stage) -> None:
        """Add `terms` to rows first_row .. first_row + rows of one tile."""
        count = 1 if self.limit else self._sets(rows, parts)
        shape = [part.vectors(rows) for part in parts], [part.lanes for part in parts]
        sets = [emit.Accumulators(*shape, self.element) for _ in range(count)]
        bias, scratch = self.buffers.get("bias"), self.buffers["scratch"]

        def zero(_: int, p: int) -> Any:
            return emit.constant(0, parts[p].lanes, self.element)

        def bias_of(i: int, p: int) -> Any:
            part = parts[p]
            return (
                emit.load(bias, first_row, part.lanes) if part.turned else emit.splat(bias[first_row + i], part.lanes)
            )

        def slot(i: int, p: int) -> Any:
            """Where a sum rests between two passes: aligned vectors behind the panel, by group."""
            before = sum(part.vectors(rows) for part in parts[:p])
            return self.panel + first_row * self.tiling.width + (before + i) * self.tiling.lanes

        def finished() -> None:
            if bias is not None and self.late:
                sets[0].fill(lambda i, p: sets[0].get(i, p) + bias_of(i, p))
            self.store_sums(sets[0].get, first_row, rows, parts, out)

        def unfinished() -> None:
            for p, part in enumerate(parts):
                for i in range(part.vectors(rows)):
                    emit.store(scratch, slot(i, p), sets[0].get(i, p), part.lanes)

        def resume() -> None:
            sets[0].fill(lambda i, p: emit.load(scratch, slot(i, p), parts[p].lanes))

        begin = zero if bias is None or self.late else bias_of
        stage.choose(stage.first, lambda: sets[0].fill(begin), resume)
        for more in sets[1:]:
            more.fill(zero)
        self._accumulate(sets, rows, parts, terms)
        for more in sets[1:]:
            sets[0].fill(lambda i, p, more=more: sets[0].get(i, p) + more.get(i, p))
        stage.choose(stage.last, finished, unfinished)

    def _sets(self, rows: int, parts: tuple[Part, ...]) -> int:
        """Sets of accumulators: in the last, narrower group as many as in others, so that equal rows have equal sums."""
        if rows < self.packed.rows <= self.oc:
            rows, parts = self.packed.rows, self.parts_of(sum(part.valid for part in parts), self.packed.rows)
        return chains(self.machine, rows, parts)

    def store_sums(
        self, get: Callable[[int, int], Any], first_row: Any, rows: int, parts: tuple[Part, ...], out: Any
    ) -> None:
        """Finish and store the sums of some rows. `get(i, p)`: of row i of straight part p, of pixel i of a turned one."""
        y = self.buffers["y"]
        other = self.buffers["residual"] if self.residual != "none" else None

        def where(r: int, at: int) -> Any:
            return out + (first_row + r) * self.tiling.pixels + at

        def finish(totals: list[Any], places: list[Any], of_rows: list[int], lanes: int) -> Any:
            others = [None if other is None else emit.load(other, at, lanes) for at in places]
            return self.finished(totals, others, [first_row + r for r in of_rows], lanes)

        def several(some: list[tuple[int, int]], lanes: int) -> None:
            """Rows and parts of some vectors: those of one row lie one behind the other."""
            places = [where(r, parts[p].at) for r, p in some]
            value = finish([get(r, p) for r, p in some], places, [r for r, _ in some], lanes)
            done = 0
            for row, run in itertools.groupby(some, lambda pair: pair[0]):
                run_parts = [parts[p] for _, p in run]
                valid = sum(part.valid for part in run_parts)
                width = lanes * len(run_parts)
                emit.store(y, where(row, run_parts[0].at), value, width, valid, done)
                done += width

        straight = [(r, p) for r in range(rows) for p, part in enumerate(parts) if not part.turned]
        for lanes in sorted({parts[p].lanes for _, p in straight}, reverse=True):
            same = [(r, p) for r, p in straight if parts[p].lanes == lanes]
            step = self.together(lanes)
            for i in range(0, len(same), step):
                several(same[i : i + step], lanes)
        for p, part in enumerate(parts):
            for i in range(part.valid if part.turned else 0):
                total = get(i, p)
                together = self.finished_rows(total, first_row, rows)
                for r in range(rows):
                    if together is None:
                        value = finish([T.Shuffle([total], [r])], [where(r, part.at + i)], [r], 1)
                    else:
                        value = together[r]
                    emit.store(y, where(r, part.at + i), value, 1)

    def _accumulate(self, sets: list[emit.Accumulators], rows: int, parts: tuple[Part, ...], terms: Terms) -> None:
        """The multiply-adds of one group; neighbouring columns go to different sets of accumulators."""
        packed, width = self.packed, self.tiling.width
        values, panel = self.buffers["values"], self.buffers["scratch"]

        def columns(panel_at: list[Any], weights_at: Any) -> None:
            """Columns whose values lie one behind the other."""
            weight = emit.Scalars(values, weights_at, len(panel_at) * packed.rows, self.machine.lane_fma)
            straight = [(p, part) for p, part in enumerate(parts) if not part.turned]
            for c, start in enumerate(panel_at):
                acc = sets[c % len(sets)]

                def product(r: int, p: int, factor: Any, activations: Any, acc: emit.Accumulators = acc) -> None:
                    acc.set(r, p, self.multiply_add(acc.get(r, p), factor, activations))

                # Whichever are fewer stay in registers: activations, or weights (Arm holds four in one).
                if rows > len(straight) and not self.machine.lane_fma:
                    loaded = [T.bind(emit.load(panel, start + part.at, part.lanes)) for _, part in straight]
                    for r in range(rows):
                        for (p, part), activations in zip(straight, loaded, strict=True):
                            product(r, p, weight(c * packed.rows + r, part.lanes), activations)
                else:
                    for p, part in straight:
                        activations = emit.load(panel, start + part.at, part.lanes)
                        for r in range(rows):
                            product(r, p, weight(c * packed.rows + r, part.lanes), activations)
                for p, part in enumerate(parts):
                    if part.turned:
                        factors = T.bind(emit.load(values, weights_at + c * packed.rows, part.lanes))
                        for i in range(part.valid):
                            product(i, p, factors, emit.splat(panel[start + part.at + i], part.lanes))

        def blocks(first: Any, size: int) -> None:
            """Stored blocks (columns of dense weights) first .. first + size of the group."""
            weights_at = terms.values + first * (packed.rows * packed.columns)
            if not self.machine.lane_fma:
                emit.prefetch(values, weights_at + AHEAD)
            if not packed.sparse:
                columns([(terms.start + first + u) * width for u in range(size)], weights_at)
                return
            index = self.buffers["index"]
            starts = [T.bind(T.cast(index[terms.start + first + u], "int32") * width) for u in range(size)]
            columns([start + c * width for start in starts for c in range(packed.columns)], weights_at)

        unroll = max(self.unroll, -(-len(sets) // packed.columns))
        emit.in_chains(
            sets[0], terms.count, self.limit,
            lambda first, count: emit.in_rounds(count, unroll, lambda at, size: blocks(first + at, size)),
        )  # fmt: skip
