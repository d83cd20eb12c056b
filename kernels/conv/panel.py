"""What fills a panel: the copies of pixels, of which none writes a pixel too many."""

from __future__ import annotations

import numpy as np

from sparsec.kernels.conv.geometry import Geometry, Tiling
from sparsec.kernels.parts import Part

COPY = 16  # most pixels of one copy


def copies_of(part: Part) -> list[tuple[int, int]]:
    """(pixel, lanes) of the copies that fill a part of a panel row."""
    if not part.turned:
        return [(part.at, part.lanes)]
    found, done = [], 0
    while done < part.valid:
        lanes = 1 << ((part.valid - done).bit_length() - 1)
        found.append((part.at + done, lanes))
        done += lanes
    return found


class Copies:
    """What fills the rows of a panel, by tile: copies of 16, 8, 4, 2 or 1 pixels, none of which writes a pixel too many.

    A run of pixels of one image row is copied in vectors, the last of which overlaps the one before; a run shorter than
    a vector by two copies of half its size or more. `lanes`: sizes that occur. `table`: [tiles * sizes + 1] numbers of
    the first copy, then (panel offset, offset in the phase plane) of each copy.
    """

    def __init__(self, geometry: Geometry, tiling: Tiling) -> None:
        width, columns = geometry.y_shape[3], geometry.phase_shape[2]
        tiles: list[list[tuple[int, int, int]]] = []  # (lanes, panel offset, plane offset)
        for tile in range(tiling.count):
            start, stop = tile * tiling.width, min((tile + 1) * tiling.width, tiling.pixels)
            found, pixel = [], start
            while pixel < stop:
                row, column = divmod(pixel, width)
                run = min(width - column, stop - pixel)
                lanes = min(COPY, 1 << (run.bit_length() - 1))
                steps = {*range(0, run - lanes + 1, lanes), run - lanes}
                found += [(lanes, pixel - start + step, row * columns + column + step) for step in sorted(steps)]
                pixel += run
            tiles.append(found)
        self.lanes = sorted({lanes for found in tiles for lanes, _, _ in found}, reverse=True)
        groups = [[pair for size, *pair in found if size == lanes] for found in tiles for lanes in self.lanes]
        numbers = np.cumsum([0, *(len(group) for group in groups)])
        pairs = [offset for group in groups for pair in group for offset in pair]
        self.pointers = numbers.size
        self.table = np.concatenate([numbers, pairs]).astype(np.int32)
