"""The tiles of a product of few columns: runs of row groups, times tiles of x rows.

    tile t = (rows of x: t // chunks, groups: t % chunks * chunk ...)      independent, in any order

With panels, the rows of x of a tile are turned into one first; it serves again where only the groups change. Without
(too few rows for panels to pay), rows are read as they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsec.kernels.parts import Part, parts_of

AIM = 16  # tiles at least, so that threads share them evenly


@dataclass(frozen=True)
class RowTiles:
    """`m` rows of x, `groups` of outputs. `parts`: of a tile's rows in the panel; none where there is no panel, and then
    `step` rows make a tile."""

    m: int
    groups: int
    lanes: int
    parts: tuple[Part, ...]
    few_step: int = 1

    @property
    def step(self) -> int:
        """Rows of x of a tile."""
        return self.parts[-1].at + self.parts[-1].valid if self.parts else self.few_step

    @property
    def pitch(self) -> int:
        """Elements of a panel row; 0 without panels."""
        return self.parts[-1].at + self.parts[-1].lanes if self.parts else 0

    @property
    def row_tiles(self) -> int:
        """Tiles along the rows of x."""
        return -(-self.m // self.step)

    @property
    def chunk(self) -> int:
        """Groups of a tile."""
        return max(1, min(self.groups, -(-self.groups * self.row_tiles // AIM)))

    @property
    def chunks(self) -> int:
        """Tiles along the groups."""
        return -(-self.groups // self.chunk)

    @property
    def count(self) -> int:
        """All tiles."""
        return self.row_tiles * self.chunks

    def walk(
        self,
        begin: Any,
        end: Any,
        few: Callable[[Any, Any, Any], None],
        turn: Callable[[Any, int], None],
        many: Callable[[Any, Any, Any, tuple[Part, ...]], None],
    ) -> None:
        """Emit tiles begin <= t < end.

        `few(row, first, last)`: groups first to last over the row tile `row`, without a panel. `turn(row, valid)`: make the
        panel of a row tile with that many rows. `many(row, first, last, parts)`: groups over the panel.
        """
        panels = bool(self.parts)
        if panels and self.chunks > 1:
            turned = T.alloc_buffer((1,), "int32", scope="local")
            T.buffer_store(turned, -1, [0])
        with T.serial(begin, end) as t:
            first = T.bind(t % self.chunks * self.chunk)
            last = T.bind(T.min(first + self.chunk, self.groups))
            row = T.bind(t // self.chunks)
            if not panels:
                few(row, first, last)
                return
            full, rest = divmod(self.m, self.step)

            def tile(parts: tuple[Part, ...], valid: int) -> None:
                if self.chunks == 1:
                    turn(row, valid)
                else:
                    with T.If(turned[0] != row), T.Then():
                        turn(row, valid)
                        T.buffer_store(turned, row, [0])
                many(row, first, last, parts)

            if not rest:
                tile(self.parts, self.step)
            elif not full:
                tile(parts_of(rest, self.lanes), rest)
            else:
                with T.If(row < full):
                    with T.Then():
                        tile(self.parts, self.step)
                    with T.Else():
                        tile(parts_of(rest, self.lanes), rest)
