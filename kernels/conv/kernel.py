"""The convolution kernel: its constants, and the walk over tiles of pixels, each with its panel, and groups of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels.base import Format, KernelCall, Machine, unique
from sparsec.kernels.conv.cost import best_tiling, stored_columns
from sparsec.kernels.conv.geometry import Geometry, Tiling
from sparsec.kernels.conv.groups import RowGroups, Stage, Terms
from sparsec.kernels.conv.panel import Copies, copies_of
from sparsec.kernels.conv.prepare import prepare
from sparsec.kernels.conv.shares import Shares
from sparsec.kernels.conv.stored import DENSE, Packed, pack
from sparsec.kernels.epilogue import NONE, Activation, Residual
from sparsec.kernels.parts import Part

PACKED_ROWS = 32  # panel rows that are filled at a time


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


class Convolution(RowGroups):
    """Emits the kernel of one layer. What depends on the arithmetic stands in the methods up to `call`, and in `RowGroups`."""

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
        self.late = machine.bias_last(longest)
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

    def trips(self) -> Any:
        """Columns of a dense pass."""
        return self.packed.depth

    def copy(self, to: Any, start: Any, lanes: int) -> None:
        """Fill `lanes` pixels of a panel row from `start` in x."""
        emit.store(self.buffers["scratch"], to, emit.load(self.buffers["x"], start, lanes), lanes)

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
            self.copies = Copies(self.geometry, self.tiling)
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
            self.geometry, tiling, form, *more, tuple(sizes[role] for role in roles), self.limit, self.late, packed.depth, machine
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
                    for at, lanes in copies_of(part):
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
