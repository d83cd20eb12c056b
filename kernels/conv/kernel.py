"""The convolution kernel: a panel packed for each tile of pixels, register tiles over the stored blocks of row groups."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels.base import Format, KernelCall, Machine, unique
from sparsec.kernels.conv.cost import best_tiling, chains, stored_columns
from sparsec.kernels.conv.geometry import Geometry, Tiling
from sparsec.kernels.conv.prepare import prepare
from sparsec.kernels.conv.stored import DENSE, Packed, pack
from sparsec.kernels.epilogue import NONE, Activation, Residual
from sparsec.kernels.epilogue import finish as finish_sum
from sparsec.kernels.parts import Part

AHEAD = 512  # elements: weights are asked for this early; one at a time they go by too slowly for hardware to notice
COPY = 16  # most pixels of one copy
PACKED_ROWS = 32  # panel rows that are filled at a time
UNITS = 64  # pieces that a layer is cut into for threads, at least, where it has that many groups of rows


def bind(
    machine: Machine,
    geometry: Geometry,
    w: np.ndarray,
    *,
    form: Format = DENSE,
    bias: np.ndarray | None = None,
    activation: Activation = NONE,
    residual: Residual = "none",
    tiling: Tiling | None = None,
) -> tuple[KernelCall | None, KernelCall]:
    """The calls for one layer: `prepare` (or None), then the convolution.

    w [OC, IC, KH, KW] float32, bias [OC] or None; `residual` "none", "before" or "after" the activation. The first call
    has roles (x, prepared), the second (prepared or x, y, [residual,] ...). Tiles are independent.
    """
    if tiling is None:
        tiling, _ = best_tiling(machine, geometry, form, stored_columns(w, form, machine, geometry))
    packed = pack(w, form, tiling.rows, tiling.depth)
    call = Convolution(machine, geometry, packed, bias, activation, residual, tiling).call()
    return (prepare(machine, geometry) if geometry.needs_prepare else None), call


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


class Convolution:
    """Emits the kernel of one layer. What depends on the arithmetic stands in the methods up to `call`."""

    def __init__(
        self, machine: Machine, geometry: Geometry, packed: Packed, bias: np.ndarray | None,
        activation: Activation, residual: Residual, tiling: Tiling,
    ) -> None:  # fmt: skip
        self.machine, self.geometry, self.packed, self.tiling = machine, geometry, packed, tiling
        self.activation, self.residual, self.element = activation, residual, machine.element
        self.images, self.oc, _, self.out_width = geometry.y_shape
        self.image_size = int(np.prod(geometry.prepared_shape[1:]))
        self.live = int(packed.live.size)
        self.full_groups, self.rest_rows = divmod(self.oc, packed.rows)
        self.shares = Shares.of(tiling, self.images, self.full_groups)
        self.pointwise = geometry.pointwise
        area = packed.rows * packed.columns if packed.sparse else 2
        # LLVM unrolls by itself for x86 but not for Arm.
        self.unroll = max(1, min(4, 8 // area)) if machine.lane_fma else 1
        longest = int(np.diff(packed.pointers).max()) * packed.columns if packed.sparse else packed.depth
        self.limit = machine.chain(longest) // packed.columns  # in blocks
        self.constants = self._constants(bias)

    @property
    def elements(self) -> dict[str, str]:
        """Element types of the activations."""
        return dict.fromkeys(("x", "y", "residual"), self.element)

    @property
    def panel_element(self) -> str:
        """Element type of the panel."""
        return self.element

    @property
    def spacing(self) -> int:
        """Elements of x between panel rows that lie one behind the other."""
        return self.tiling.pixels

    def offsets(self) -> np.ndarray:
        """Where in a prepared image each panel row begins, elements."""
        return self.geometry.tap_offsets()[self.packed.live]

    def parts_of(self, pixels: int, rows: int) -> tuple[Part, ...]:
        """What covers `pixels` of a tile in a group of `rows` rows."""
        return self.tiling.parts_of(pixels, rows)

    def trips(self) -> Any:
        """Columns of a dense pass."""
        return self.packed.depth

    def copy(self, to: Any, start: Any, lanes: int) -> None:
        """Fill `lanes` pixels of a panel row from `start` in x."""
        emit.store(self.buffers["scratch"], to, emit.load(self.buffers["x"], start, lanes), lanes)

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

    def name(self, form: str) -> tuple[str, tuple[Any, ...]]:
        """How the kernel's name begins, and what its code depends on besides what `call` knows."""
        what = "x".join(map(str, self.geometry.w_shape[2:]))
        return self.machine.named(f"conv{what}_f32") + f"_{form}", (self.activation, self.residual)

    def start(self, bias: np.ndarray | None) -> dict[str, np.ndarray]:
        """Constants for the beginning and the end of a sum."""
        return {} if bias is None else {"bias": self.machine.array(bias)}

    def _constants(self, bias: np.ndarray | None) -> dict[str, np.ndarray]:
        """Packed arrays by role. `tables`: block pointers, taps, copy pointers, copies; each where it is needed."""
        packed = self.packed
        found: dict[str, np.ndarray] = {"values": self.machine.array(packed.values)}
        tables: list[np.ndarray] = []
        if packed.sparse:
            found["index"] = packed.index
            tables.append(packed.pointers)
        self.tap_table = not (self.pointwise and self.live == packed.shape[1])
        self.tap_base = packed.pointers.size if packed.sparse else 0
        self.pointer_base = self.tap_base + self.live
        if self.tap_table:
            tables.append(self.offsets())
        if not self.pointwise:
            self.copies = _Copies(self.geometry, self.tiling)
            self.copy_base = self.pointer_base + self.copies.pointers
            tables.append(self.copies.table)
        if tables:
            found["tables"] = np.concatenate(tables).astype(np.int32)
        return found | self.start(bias)

    def call(self) -> KernelCall:
        """The kernel, bound to its constants."""
        machine, packed, tiling = self.machine, self.packed, self.tiling
        roles = ["x", "y"] + (["residual"] if self.residual != "none" else []) + list(self.constants) + ["scratch"]
        y_size = self.images * self.oc * tiling.pixels
        # The panel, then sums that rest between passes.
        self.panel = -(-(max(self.live, 1) * tiling.width) // 64) * 64
        scratch = self.panel + (packed.groups * packed.rows * tiling.width if packed.passes > 1 else 0)
        counts = {"x": self.images * self.image_size, "y": y_size, "residual": y_size}
        sizes: dict[str, tuple[int, str]] = {role: (counts[role], self.elements[role]) for role in counts}
        sizes["scratch"] = (scratch, self.panel_element)
        sizes.update({role: (array.size, str(array.dtype)) for role, array in self.constants.items()})

        def body(*arguments: Any) -> None:
            self.buffers = dict(zip(roles, arguments, strict=False))
            self._tiles(*arguments[-2:])

        func = emit.function([(role, *sizes[role]) for role in roles], body)
        form = f"{packed.rows}x{packed.columns}" if packed.sparse else "dense"
        name, more = self.name(form)
        facts = (
            self.geometry, tiling, form, *more, tuple(sizes[role] for role in roles), self.limit, packed.depth, machine
        )  # fmt: skip
        what = "x".join(map(str, self.geometry.w_shape[2:]))
        tile = f"{packed.rows} rows x {tiling.vectors} vectors of {tiling.lanes}"
        if packed.passes > 1:
            tile += f", {packed.passes} passes over {packed.depth} panel rows"
        return KernelCall(
            unique(f"{name}_{packed.rows}r{tiling.width}px", *facts), func, tuple(roles), self.constants, self.images * self.shares.image,
            -(-scratch * np.dtype(self.panel_element).itemsize // 64) * 64, f"{what} convolution, {form}, tile {tile}",
        )  # fmt: skip

    # --- tiles

    def _tiles(self, begin: Any, end: Any) -> None:
        tiling, shares = self.tiling, self.shares
        with T.serial(shares.tile_of(begin), shares.tile_of(end - 1) + 1) as whole:
            image = whole // tiling.count if self.images > 1 else 0
            tile = T.bind(whole - image * tiling.count) if tiling.count > 1 else 0
            piece = T.bind(image * shares.image + tile * shares.full)
            out = image * (self.oc * tiling.pixels) + tile * tiling.width

            def one(pixels: int, pieces: int) -> None:
                self._pack_panel(image * self.image_size, tile, self.parts_of(pixels, self.packed.rows))
                low, high = T.bind(T.max(begin - piece, 0)), T.bind(T.min(end - piece, pieces))
                self._rows(pixels, low, high, pieces, out)

            tail = shares.tail or shares.full
            if not tiling.tail:
                one(tiling.width, shares.full)
            elif not tiling.full:
                one(tiling.tail, tail)
            else:
                with T.If(tile < tiling.full):
                    with T.Then():
                        one(tiling.width, shares.full)
                    with T.Else():
                        one(tiling.tail, tail)

    def _pack_panel(self, source: Any, tile: Any, parts: tuple[Part, ...]) -> None:
        width = self.tiling.width
        tables: Any = self.buffers.get("tables")

        def start_of(k: Any) -> Any:
            return source + (tables[self.tap_base + k] if self.tap_table else k * self.spacing)

        if self.pointwise:
            with T.serial(0, self.live) as k:
                start = T.bind(start_of(k))
                for part in parts:
                    for at, lanes in _copies(part):
                        self.copy(k * width + at, start + tile * width + at, lanes)
            return
        # Each copy for some rows before the next copy: its place is read once, and the rows stay in the first cache.
        with T.serial(0, -(-self.live // PACKED_ROWS)) as some:
            low = T.bind(some * PACKED_ROWS)
            high = low + PACKED_ROWS if self.live % PACKED_ROWS == 0 else T.bind(T.min(low + PACKED_ROWS, self.live))
            for size, lanes in enumerate(self.copies.lanes):
                number = self.pointer_base + tile * len(self.copies.lanes) + size
                with T.serial(tables[number], tables[number + 1]) as s:
                    to = T.bind(tables[self.copy_base + 2 * s])
                    off = T.bind(tables[self.copy_base + 2 * s + 1])
                    with T.serial(low, high) as k:
                        self.copy(k * width + to, start_of(k) + off, lanes)

    # --- groups of rows

    def _rows(self, pixels: int, low: Any, high: Any, pieces: int, out: Any) -> None:
        """Pieces low .. high of a tile: in each pass all their groups."""
        packed, rows, full = self.packed, self.packed.rows, self.full_groups
        first, last = T.bind(low * full // pieces), T.bind(high * full // pieces)

        def one_pass(number: Any, stage: Stage) -> None:
            depth: Any = packed.depth if packed.sparse else self.trips()
            if not packed.sparse and self.live % packed.depth:
                depth = T.bind(T.min(packed.depth, self.live - number * packed.depth))

            def group(g: Any, height: int) -> None:
                parts = self.parts_of(pixels, height)
                if packed.sparse:
                    tables = self.buffers["tables"]
                    at = number * packed.groups + g
                    lo, hi = T.bind(tables[at]), T.bind(tables[at + 1])
                    terms = Terms(lo, hi - lo, lo * (rows * packed.columns))
                else:
                    base = number * (packed.depth * packed.groups * rows)
                    terms = Terms(number * packed.depth, depth, base + g * (depth * rows))
                self._group(g * rows, height, parts, out, terms, stage)

            if full:
                with T.serial(first, last) as g:
                    group(g, rows)
            if self.rest_rows:
                if pieces == 1:
                    group(full, self.rest_rows)
                else:
                    with T.If(high == pieces), T.Then():
                        group(full, self.rest_rows)

        if packed.passes == 1:
            one_pass(0, Stage(True, True))
        else:
            with T.serial(0, packed.passes) as number:
                one_pass(number, Stage(number == 0, number == packed.passes - 1))

    def _group(self, first_row: Any, rows: int, parts: tuple[Part, ...], out: Any, terms: Terms, stage: Stage) -> None:
        """Add `terms` to rows first_row .. first_row + rows of one tile."""
        count = 1 if self.limit else chains(self.machine, rows, parts)
        shape = [part.vectors(rows) for part in parts], [part.lanes for part in parts]
        sets = [emit.Accumulators(*shape, self.element) for _ in range(count)]
        bias, scratch = self.buffers.get("bias"), self.buffers["scratch"]

        def begin(i: int, p: int) -> Any:
            part = parts[p]
            if bias is None:
                return emit.constant(0, part.lanes, self.element)
            return (
                emit.load(bias, first_row, part.lanes) if part.turned else emit.splat(bias[first_row + i], part.lanes)
            )

        def slot(i: int, p: int) -> Any:
            """Where a sum rests between two passes: aligned vectors behind the panel, by group."""
            before = sum(part.vectors(rows) for part in parts[:p])
            return self.panel + first_row * self.tiling.width + (before + i) * self.tiling.lanes

        def finished() -> None:
            self.store_sums(sets[0].get, first_row, rows, parts, out)

        def unfinished() -> None:
            for p, part in enumerate(parts):
                for i in range(part.vectors(rows)):
                    emit.store(scratch, slot(i, p), sets[0].get(i, p), part.lanes)

        def resume() -> None:
            sets[0].fill(lambda i, p: emit.load(scratch, slot(i, p), parts[p].lanes))

        stage.choose(stage.first, lambda: sets[0].fill(begin), resume)
        for more in sets[1:]:
            more.fill(lambda i, p: emit.constant(0, parts[p].lanes, self.element))
        self._accumulate(sets, rows, parts, terms)
        for more in sets[1:]:
            sets[0].fill(lambda i, p, more=more: sets[0].get(i, p) + more.get(i, p))
        stage.choose(stage.last, finished, unfinished)

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


def _copies(part: Part) -> list[tuple[int, int]]:
    """(pixel, lanes) of the copies that fill a part of a panel row."""
    if not part.turned:
        return [(part.at, part.lanes)]
    found, done = [], 0
    while done < part.valid:
        lanes = 1 << ((part.valid - done).bit_length() - 1)
        found.append((part.at + done, lanes))
        done += lanes
    return found


class _Copies:
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
