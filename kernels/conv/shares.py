"""How the work of a convolution is cut for threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsec.kernels.conv.geometry import Tiling

UNITS = 64  # pieces that a layer is cut into for threads, at least, where it has that many groups of rows


@dataclass(frozen=True)
class Shares:
    """How the tiles of one image are cut for threads: a tile is `full` pieces of its row groups, the narrower last `tail`.

    A piece is about as much work in both, so that ranges of equal length take equally long.
    """

    tiles: int
    full: int
    tail: int  # 0: no narrower tile

    @staticmethod
    def of(tiling: Tiling, images: int, groups: int) -> Shares:
        pieces = min(max(groups, 1), -(-UNITS // (images * tiling.count)))
        if not tiling.tail:
            return Shares(tiling.count, pieces, 0)
        share = tiling.tail / tiling.width if tiling.full else 1.0
        return Shares(tiling.count, pieces, max(1, round(pieces * share)))

    @property
    def image(self) -> int:
        """Pieces of an image."""
        return self.tiles * self.full if not self.tail else (self.tiles - 1) * self.full + self.tail

    def tile_of(self, piece: Any) -> Any:
        """Number of the tile, over all images, that a piece belongs to."""
        if not self.tail or self.tail == self.full:
            return piece // self.full
        image = piece // self.image
        return image * self.tiles + T.min((piece - image * self.image) // self.full, self.tiles - 1)
