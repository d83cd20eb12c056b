"""The stored form of `group_matvec`: tiles of 16 groups of integers, by bands of outputs.

    words[tile][word][lane]     nibble i and i + 4 of a word are the two halves of register i of operand A (mma.m16n8k16);
                                of 8 bits two words, registers 0 and 1, then 2 and 3
    scales[tile][8][2]          of the tile's groups g and g + 8
    rows[tile][8][2]            the group's output within its band + 4096 * its slot: which of the tile's `places` it has;
                                where a tile has no places, 4096 * its number along K
    places[tile][slots]         numbers of groups along K
    centres[tile][8][2]         what is taken off a widened integer; only where there are zero points

Where every group is stored, a band's tiles are [place][run of 16 outputs], without rows and places.

Inputs of a unit of 64 (or of a divisor, if the group is no multiple) are dealt to the 4 lanes of a quad in runs, so that a
lane reads its share of x at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from sparsec.kernels.integers import Stored

MOST_ROWS = 8  # of x: columns of a fragment
TALL = 16  # groups of a tile
SLOT = 4096  # a row's number within its band is below
UNIT = 64  # inputs dealt to a quad at once


def group_of(stored: Stored) -> int:
    """Inputs of a stored group: the scale's, of which one that spans all inputs is cut."""
    k = stored.q.shape[1]
    if stored.group < k or (k % 16 == 0 and k <= 2 * UNIT):
        return stored.group
    return 2 * UNIT if k >= 2 * UNIT else -(-k // 16) * 16


def cut(stored: Stored) -> Stored:
    """The same weight in groups of `group_of`."""
    group, (_, k) = group_of(stored), stored.q.shape
    if group == stored.group:
        return stored
    repeat = -(-k // group)
    if group > k:  # one short group
        q = np.pad(stored.q, ((0, 0), (0, group - k)))
        if stored.zero is not None:
            q[:, k:] = stored.zero
        return Stored(stored.bits, group, q, stored.scale, stored.zero)
    return Stored(
        stored.bits, group, stored.q, np.repeat(stored.scale, repeat, 1),
        None if stored.zero is None else np.repeat(stored.zero, repeat, 1),
    )  # fmt: skip


def kept_groups(stored: Stored) -> np.ndarray:
    """Which groups hold anything but zeros: bool [N, G], of `cut(stored)`."""
    stored = cut(stored)
    n, k = stored.q.shape
    q = stored.q.astype(np.int16)
    if stored.zero is not None:
        q = q - np.repeat(stored.zero.astype(np.int16), stored.group, axis=1)[:, :k]
    padded = np.zeros((n, stored.groups * stored.group), bool)
    padded[:, :k] = q != 0
    return np.asarray(padded.reshape(n, stored.groups, stored.group).any(axis=2) & (stored.scale != 0))


@dataclass(frozen=True)
class Tiling:
    """`bands` of outputs, the tiles of each cut in `splits`, blocks of `warps` warps."""

    bands: int
    splits: int
    warps: int

    def __str__(self) -> str:
        return f"{self.bands} bands" + (f" in {self.splits} parts" if self.splits > 1 else "")


@dataclass(frozen=True)
class Packed:
    """Tiles in stored form; see the module's head. `bands` int32 [bands + 1]: first outputs; `pointers` int32
    [bands * splits + 1]: first tiles.
    """

    bits: int
    group: int
    shape: tuple[int, int]
    slots: int
    bands: np.ndarray = field(repr=False)
    pointers: np.ndarray = field(repr=False)
    words: np.ndarray = field(repr=False)  # int32 [tiles, runs, 32, words of a run]
    scales: np.ndarray = field(repr=False)
    centres: np.ndarray | None = field(repr=False)  # what is taken off a widened integer, float16 [tiles, 8, 2]
    rows: np.ndarray | None = field(repr=False)
    places: np.ndarray | None = field(repr=False)

    @property
    def tiles(self) -> int:
        """Of all bands."""
        return int(self.pointers[-1])

    @property
    def bytes(self) -> int:
        """That are read."""
        arrays = (self.words, self.scales, self.centres, self.rows, self.places)
        return sum(array.nbytes for array in arrays if array is not None)


def slots_of(m: int) -> int:
    """Places that a tile may have: columns of B, a power of two of them for the rows of x."""
    return MOST_ROWS // (1 << (m - 1).bit_length())


def bands_of(counts: np.ndarray, bands: int, every: int = 1) -> np.ndarray:
    """First outputs of `bands` runs with about equal sums of `counts`, and the number of outputs; runs are multiples of
    `every` and shorter than SLOT."""
    n = counts.size
    units = np.add.reduceat(counts, np.arange(0, n, every))
    total = np.concatenate([[0], np.cumsum(np.maximum(units, 1e-3))])
    bands = max(1, min(bands, units.size))
    cuts = np.searchsorted(total, np.arange(1, bands) * total[-1] / bands + 1e-9)
    found = np.unique(np.concatenate([[0], cuts, [units.size]]))
    most = (SLOT - 1) // every
    finer = [np.arange(a, b, most) for a, b in pairwise(found.tolist())]
    return np.asarray(np.minimum(np.concatenate([*finer, [units.size]]) * every, n), np.int32)


def _assign(rows: list[int], places: list[int], slots: int) -> tuple[list[int], list[int]]:
    """Tile and slot of each stored group of a band, sorted by place, then row: a tile takes the next groups as long as it has
    room, a slot for their place, and none of their rows."""
    tiles, slot_of = [], []
    tile, count, slot, last = -1, TALL, 0, -1
    seen: set[int] = set()
    for row, place in zip(rows, places, strict=True):
        if count == TALL or row in seen or (place != last and slot + 1 == slots):
            tile, count, slot = tile + 1, 0, 0
            seen = set()
        elif place != last:
            slot += 1
        last, count = place, count + 1
        seen.add(row)
        tiles.append(tile)
        slot_of.append(slot)
    return tiles, slot_of


def deal(group: int) -> np.ndarray:
    """Inputs of a group by (slab of 16, lane of a quad, element of the fragment's row): int [group / 16, 4, 4].

    In a unit lane t owns a run of a quarter of it, four inputs a slab.
    """
    unit = np.gcd(group, UNIT)
    slabs = unit // 16
    inside = (np.arange(4)[None, :, None] * slabs + np.arange(slabs)[:, None, None]) * 4 + np.arange(4)
    return np.asarray(np.concatenate([inside + first for first in range(0, group, unit)]))


def words_of(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned integers [tiles, 16, group] as words [tiles, words, 32]: a lane's words in the order that it uses them."""
    tiles, _, group = values.shape
    dealt = values[:, :, deal(group)].astype(np.uint32)  # tile, row, slab, t, element
    # Register i of a fragment: row g + 8 (i % 2), elements 2 (i // 2) and the next.
    split = dealt.reshape(
        tiles, 2, 8, group // 16, 4, 2, 2
    )  # tile, half of rows, g, slab, t, half of elements, low or high
    order = split.transpose(0, 3, 2, 4, 5, 1, 6).reshape(
        tiles, group // 16, 32, 4, 2
    )  # ..., lane, register, low or high
    if bits == 4:
        shifts = 4 * np.arange(4, dtype=np.uint32)[:, None] + 16 * np.arange(2, dtype=np.uint32)
        return np.asarray((order << shifts).sum(axis=(3, 4), dtype=np.uint32)).view(np.int32)
    shifts = 8 * np.arange(4, dtype=np.uint32)
    words = (order.reshape(tiles, group // 16, 32, 2, 4) << shifts).sum(axis=4, dtype=np.uint32)
    return np.asarray(words.transpose(0, 1, 3, 2).reshape(tiles, group // 8, 32)).view(np.int32)


def values_of(words: np.ndarray, bits: int, group: int) -> np.ndarray:
    """The inverse of `words_of`."""
    tiles = words.shape[0]
    words = words.view(np.uint32)
    if bits == 4:
        shifts = 4 * np.arange(4, dtype=np.uint32)[:, None] + 16 * np.arange(2, dtype=np.uint32)
        order = words[:, :, :, None, None] >> shifts & 15
    else:
        pairs = words.reshape(tiles, group // 16, 2, 32).transpose(0, 1, 3, 2)
        order = pairs[..., None] >> (8 * np.arange(4, dtype=np.uint32)) & 255
    split = order.reshape(tiles, group // 16, 8, 4, 2, 2, 2)
    dealt = split.transpose(0, 5, 2, 1, 3, 4, 6).reshape(tiles, TALL, group)
    values = np.zeros((tiles, TALL, group), np.uint8)
    values[:, :, deal(group).reshape(-1)] = dealt
    return values


def lane_major(words: np.ndarray) -> np.ndarray:
    """[tiles, words, 32] -> [tiles, words / w, 32, w]: w of a lane's words, up to 4, lie together."""
    tiles, count, lanes = words.shape
    wide = int(np.gcd(count, 4))
    return np.ascontiguousarray(words.reshape(tiles, count // wide, wide, lanes).transpose(0, 1, 3, 2))


def word_major(packed: np.ndarray) -> np.ndarray:
    """The inverse of `lane_major`."""
    tiles, runs, lanes, wide = packed.shape
    return np.ascontiguousarray(packed.transpose(0, 1, 3, 2)).reshape(tiles, runs * wide, lanes)


def scale_type(stored: Stored, element: str) -> str:
    """The type that scales are stored in."""
    sizes = np.abs(stored.scale[stored.scale != 0])
    normal = sizes.size == 0 or (sizes.min() >= 2.0**-14 and sizes.max() <= 65504)
    return "float16" if element == "float16" and normal else "float32"


def pack(stored: Stored, m: int, tiling: Tiling, sparse: bool, element: str = "float16") -> Packed:
    """The stored form for m rows of x. `sparse`: groups of zeros are left out; else every group is stored.

    element: what x is. In float32 every group of a tile has its own place. Scales are float16 with float16, where it holds
    them all as normal numbers.
    """
    k = stored.q.shape[1]
    stored = cut(stored)
    n, depth = stored.q.shape
    group, own = stored.group, element == "float32"
    slots = 1 if not sparse else TALL if own else slots_of(m)
    kept = kept_groups(stored) if sparse else np.ones((n, stored.groups), bool)
    bands = bands_of(kept.sum(axis=1), tiling.bands, 1 if sparse else TALL)
    entries: list[np.ndarray] = []  # row, place, tile, slot
    pointers, count = [0], 0
    for first, last in pairwise(bands.tolist()):
        places_of, rows_of = np.nonzero(kept[first:last].T)
        if sparse:
            tile_of, slot_of = (np.array(a, np.int64) for a in _assign(rows_of.tolist(), places_of.tolist(), slots))
        else:
            runs = -(-(last - first) // TALL)
            tile_of, slot_of = places_of * runs + rows_of // TALL, np.zeros_like(rows_of)
        tiles = int(tile_of[-1]) + 1 if tile_of.size else 0
        entries.append(np.stack([first + rows_of, places_of, count + tile_of, slot_of]))
        pointers += [count + tiles * (split + 1) // tiling.splits for split in range(tiling.splits)]
        count += tiles
    row, place, tile, slot = np.concatenate(entries, axis=1)
    firsts = np.flatnonzero(np.diff(tile, prepend=-1))
    inside = np.arange(tile.size) - np.repeat(firsts, np.diff(np.append(firsts, tile.size)))

    middle = 8 if stored.bits == 4 else 128
    whole = np.zeros((n, stored.groups * group), np.int16)
    whole[:, :depth] = stored.q
    if stored.zero is not None:
        whole[:, depth:] = stored.zero[:, -1:]
    values = np.full((count, TALL, group), middle, np.uint8)
    values[tile, inside] = whole.reshape(n, stored.groups, group)[row, place] + middle

    def by_group(parameter: np.ndarray, empty: float, dtype: str) -> np.ndarray:
        """[tiles, 16] as [tiles, 8, 2]."""
        spread = np.full((count, TALL), empty, dtype)
        spread[tile, inside] = parameter
        return np.ascontiguousarray(spread.reshape(count, 2, 8).transpose(0, 2, 1))

    rows = places = None
    if sparse:
        band = np.searchsorted(bands, row, side="right") - 1
        rows = by_group(row - bands[band] + SLOT * (place if own else slot), -1, "int32" if own else "int16")
        if not own:
            places = np.full((count, slots), -1, np.int16)
            places[tile, slot] = place
    centres = None
    if stored.zero is not None:
        base = 1024 + middle
        centres = by_group(base + stored.zero[row, place].astype(np.int32), base, "float16")
    return Packed(
        stored.bits, group, (n, k), slots, bands, np.array(pointers, np.int32), lane_major(words_of(values, stored.bits)),
        by_group(stored.scale[row, place], 0.0, scale_type(stored, element)), centres, rows, places,
    )  # fmt: skip


def unpack(packed: Packed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is stored, as q [N, K], scale and zero [N, G], zero where nothing is."""
    n, k = packed.shape
    groups = -(-k // packed.group)
    middle = 8 if packed.bits == 4 else 128
    q = np.zeros((n, groups, packed.group), np.int16)
    scale, zero = np.zeros((n, groups), packed.scales.dtype), np.zeros((n, groups), np.int8)
    values = values_of(word_major(packed.words), packed.bits, packed.group).astype(np.int16) - middle
    for band in range(packed.bands.size - 1):
        splits = (packed.pointers.size - 1) // (packed.bands.size - 1)
        low, high = packed.pointers[band * splits], packed.pointers[(band + 1) * splits]
        first, last = packed.bands[band : band + 2]
        for tile in range(low, high):
            for i in range(TALL):
                half, g = divmod(i, 8)
                if packed.rows is not None:
                    code = int(packed.rows[tile, g, half])
                    if code < 0:
                        continue
                    row, place = first + code % SLOT, code // SLOT
                    place = place if packed.places is None else packed.places[tile, place]
                else:
                    runs = -(-(last - first) // TALL)
                    row, place = first + (tile - low) % runs * TALL + i, (tile - low) // runs
                    if row >= last:
                        continue
                q[row, place], scale[row, place] = values[tile, i], packed.scales[tile, g, half]
                if packed.centres is not None:
                    zero[row, place] = int(packed.centres[tile, g, half]) - 1024 - middle
    return q.reshape(n, -1)[:, :k], scale, zero
