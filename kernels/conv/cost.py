"""What a tiling of a layer costs on one thread, and which tilings are worth considering."""

from __future__ import annotations

import numpy as np

from sparsec.kernels import blocks
from sparsec.kernels.base import Format, Machine
from sparsec.kernels.conv.geometry import Geometry, Tiling
from sparsec.kernels.conv.stored import as_matrix
from sparsec.kernels.parts import Part

LATENCY = 4.0  # cycles until a multiply-add's sum can be added to: Zen 4 and 5, Skylake to Sapphire Rapids, Cortex-A55
MOST_VECTORS = 12  # in a row of a register tile
LEAST_DEPTH = 32  # panel rows of a pass: fewer would not pay for resuming the sums


def chains(machine: Machine, rows: int, parts: tuple[Part, ...]) -> int:
    """Sets of accumulators that a register tile needs so that it does not wait for its own sums."""
    sums = sum(part.vectors(rows) for part in parts)
    return max(1, min(-(-int(LATENCY * machine.fma) // sums), (machine.registers - 4) // sums // 2))


def tile_cycles(
    machine: Machine, rows: int, parts: tuple[Part, ...], indexed: bool, section: float, panel: float
) -> float:
    """Cycles for one stored column of a register tile: FMA, load, issue, latency and cache bounds; the largest wins.

    section: bytes of panel rows that all groups go through in one pass; panel: of all rows.
    """
    least = 0.5 if machine.vector_bytes == 64 else 1.0
    scalar = min(1.0, machine.loads / 2)  # of a load slot: two narrow loads a cycle even where vectors go one by one
    fmas = loads = issue = from_cache = 0.0
    for part in parts:
        share = max(part.lanes / machine.lanes, least)
        fmas += part.vectors(rows) * share
        issue += part.vectors(rows)
        if part.turned:
            loads += part.valid * scalar + (0 if machine.lane_fma else share)
            issue += part.valid + (not machine.lane_fma)
            from_cache += machine.item * part.valid
        else:
            loads += share
            issue += 1
            from_cache += machine.item * part.lanes
    straight = any(not part.turned for part in parts)
    weights = (-(-rows // 4) if machine.lane_fma else rows) if straight else 0
    loads = (loads + weights * (1 if machine.lane_fma else scalar) + indexed * scalar) / machine.loads
    issue = (issue + weights + 2 * indexed + 1) / machine.uops
    sums = sum(part.vectors(rows) for part in parts) * chains(machine, rows, parts)
    latency = LATENCY * sum(part.vectors(rows) for part in parts) / sums
    # Rows that are gone from the first cache before they are needed again come from the next.
    missing = min(1.0, max(0.0, section / machine.l1_bytes - 0.75) * 2)
    beyond = 2.0 if section > 0.9 * machine.l2_bytes else 1.0
    cache = from_cache * missing * beyond / machine.l2_bytes_per_cycle
    return max(fmas / machine.fma, loads, issue, latency, cache)


def predict_us(machine: Machine, geometry: Geometry, tiling: Tiling, columns: float, indexed: bool) -> float:
    """Time of the layer on one thread. `columns`: stored columns (R x 1) summed over all row groups."""
    n, oc, _, _ = geometry.y_shape
    groups = -(-oc // tiling.rows)
    live = int(min(geometry.taps, columns))
    passes, depth = tiling.passes(max(live, 1))
    cycles = 0.0
    for count, pixels in ((tiling.full, tiling.width), (1 if tiling.tail else 0, tiling.tail)):
        if not count:
            continue
        parts = tiling.parts_of(pixels, tiling.rows)
        row = machine.item * tiling.width
        compute = columns * tile_cycles(machine, tiling.rows, parts, indexed, depth * row, live * row)
        # Start, epilogue and store of each register tile, in each pass; copying the panel.
        vectors = sum(tiling.rows * part.valid if part.turned else tiling.rows for part in parts)
        overhead = groups * passes * (machine.group_cycles + vectors * (1.0 + 1.0 / machine.loads))
        copies = len(parts) if geometry.pointwise else len(parts) + -(-pixels // geometry.y_shape[3])
        cycles += count * (compute + overhead + live * (machine.row_cycles + 2.0 * copies / machine.loads))
    prepare = 0.0
    if geometry.needs_prepare:
        prepare = 2.0 * np.prod(geometry.prepared_shape) / machine.lanes
    return (n * cycles + prepare) / (machine.ghz * 1e3)


def fits(machine: Machine, tiling: Tiling) -> bool:
    """Whether a register tile's sums, one vector of activations and the weights of a column fit the registers."""
    pixels = min(tiling.width, tiling.pixels)
    sums = sum(part.vectors(tiling.rows) for part in tiling.parts_of(pixels, tiling.rows))
    if machine.lane_fma:
        held = -(-tiling.rows // 4) + 1
    else:  # the fewer of both, and one of the other that is a multiply-add's operand in memory
        held = min(tiling.rows, pixels // tiling.lanes)
    spare = machine.registers - held - (0 if machine.vector_bytes == 64 else 1)
    return sums <= (spare if tiling.rows > 1 else (spare - 1) // 2)


def tilings(machine: Machine, geometry: Geometry, form: Format) -> list[Tiling]:
    """Register tiles worth considering for a layer."""
    heights = [form.rows] if form.sparse else sorted({min(r, geometry.w_shape[0]) for r in (4, 6, 8, 12)})
    pixels = geometry.pixels
    lanes = machine.lanes
    while lanes > 4 and pixels < lanes:
        lanes //= 2
    # Where vectors of 16 and of 8 bytes took the same weight, LLVM would spread it over a register of its own.
    narrow = lanes if machine.lane_fma else 4
    found = []
    for rows in heights:
        for vectors in range(1, min(MOST_VECTORS, -(-pixels // lanes)) + 1):
            if vectors > 1 and not fits(machine, Tiling(rows, vectors, lanes, pixels, narrow=narrow)):
                continue
            row = machine.item * vectors * lanes
            for depth in _depths(machine, geometry.taps, row):
                found.append(Tiling(rows, vectors, lanes, pixels, depth, narrow))
    return found


def _depths(machine: Machine, taps: int, row: int) -> list[int]:
    """Panel rows of a pass worth considering: all, or even parts that stay in the first or in the second cache."""
    found = [0]
    for room in (0.75 * machine.l1_bytes, 0.5 * machine.l2_bytes):
        passes = -(-taps * row // int(room))
        depth = -(-taps // passes)
        if passes > 1 and depth >= LEAST_DEPTH and depth not in found:
            found.append(depth)
    return found


def ranked_tilings(
    machine: Machine, geometry: Geometry, form: Format, columns: dict[int, float]
) -> list[tuple[float, Tiling]]:
    """Predicted microseconds of every tiling, cheapest first. `columns`: stored columns for each tile height."""
    priced = [
        (predict_us(machine, geometry, t, columns[t.rows], form.sparse), i, t)
        for i, t in enumerate(tilings(machine, geometry, form))
    ]
    return [(cost, tiling) for cost, _, tiling in sorted(priced, key=lambda item: item[:2])]


def best_tiling(machine: Machine, geometry: Geometry, form: Format, columns: dict[int, float]) -> tuple[Tiling, float]:
    """The cheapest tiling and its predicted microseconds. `columns`: stored columns for each tile height."""
    cost, tiling = ranked_tilings(machine, geometry, form, columns)[0]
    return tiling, cost


def stored_columns(w: np.ndarray, form: Format, machine: Machine, geometry: Geometry) -> dict[int, float]:
    """Columns of R x 1 that each admissible tile height stores, over all row groups."""
    oc, taps = w.shape[0], geometry.taps
    if not form.sparse:
        return {rows: float(-(-oc // rows) * taps) for rows in {t.rows for t in tilings(machine, geometry, form)}}
    width = blocks.fitting(form.columns, w.shape[1])
    return {form.rows: float(blocks.kept(as_matrix(w), form.rows, width).sum() * width)}
