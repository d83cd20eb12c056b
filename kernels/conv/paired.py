"""The convolution in 8 bits by products of small matrices (Arm FEAT_I8MM), dense weights.

    usmmla:  acc[i, j] += sum over c = 0..7 of x[i, c] * w[j, c]            2 pixels x 2 output channels x 8 input channels

One instruction does the work of two `usdot`. An *octet* is eight input channels of one pixel; the panel holds octets, so that a
vector is two neighbouring pixels, and weights are stored so that a vector is two neighbouring output channels:

    panel[k][pixel][8],   values[group][k][R / 2][2][8]                     k over octets of (kh, kw, ic / 8)

Sums come in pairs of rows, [p0 r0, p0 r1, p1 r0, p1 r1]; they are put in rows as they are finished. Everything else is the
kernel over words (`sparsec.kernels.conv.int8`).

Source: Arm Architecture Reference Manual, USMMLA. Written out by hand: the instruction's operands are a layout.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import bytes as vectors
from sparsec.kernels import emit, quantized
from sparsec.kernels.base import Format, KernelCall, Machine
from sparsec.kernels.conv.geometry import Geometry, Tiling
from sparsec.kernels.conv.groups import Stage, Terms
from sparsec.kernels.conv.int8 import Quantized
from sparsec.kernels.conv.prepare import prepare
from sparsec.kernels.conv.stored import Packed, as_matrix
from sparsec.kernels.parts import Part
from sparsec.kernels.quantized import QuantType, Requantize

OCTET = 8
UNROLL = 2  # octets of a round

FORM = Format(
    "conv_i8_pairs", "Conv", "dense", "int8", "convolution in 8 bits, dense weights, pairs of pixels by pairs of channels",
    "quantized input and weights, Arm i8mm",
)  # fmt: skip
TABLE: tuple[Format, ...] = (FORM,)
_TILES = ((8, 3), (8, 2), (8, 1), (4, 6), (4, 4))  # rows, quads of pixels: what 32 registers hold


def able(machine: Machine) -> bool:
    """Whether the machine has the instruction: it comes with `usdot`."""
    return machine.dot == "usdot"


def padded(geometry: Geometry) -> Geometry:
    """The geometry with its input channels filled up to whole octets."""
    (n, c, h, w), (oc, _, kh, kw) = geometry.x_shape, geometry.w_shape
    channels = -(-c // OCTET) * OCTET
    return replace(geometry, x_shape=(n, channels, h, w), w_shape=(oc, channels, kh, kw))


def pack(w: np.ndarray, rows: int) -> Packed:
    """int8 [OC, IC, KH, KW] to stored form; sizes in octets, `values` as int32."""
    oc, ic, kh, kw = w.shape
    full = np.zeros((-(-oc // rows) * rows, -(-ic // OCTET) * OCTET, kh, kw), np.int8)
    full[:oc, :ic] = w
    matrix = as_matrix(full)
    depth = matrix.shape[1] // OCTET
    groups = full.shape[0] // rows
    values = np.ascontiguousarray(matrix.reshape(groups, rows, depth, OCTET).transpose(0, 2, 1, 3))
    return Packed(
        rows, 1, False, depth, np.arange(depth, dtype=np.int32), (np.arange(groups + 1) * depth).astype(np.int32),
        np.zeros(0, np.uint16), values.reshape(-1).view("<i4").astype(np.int32), (oc, depth),
    )  # fmt: skip


def unpack(packed: Packed, w_shape: tuple[int, int, int, int]) -> np.ndarray:
    """The inverse of `pack`: int8 [OC, IC, KH, KW]."""
    oc, ic, kh, kw = w_shape
    values = packed.values.view(np.int8).reshape(packed.groups, packed.shape[1], packed.rows, OCTET)
    matrix = values.transpose(0, 2, 1, 3).reshape(packed.groups * packed.rows, kh, kw, -1)
    return np.ascontiguousarray(matrix[:oc, ..., :ic].transpose(0, 3, 1, 2))


# --- cost ------------------------------------------------------------------------------------------------------------


def ranked(machine: Machine, geometry: Geometry) -> list[tuple[float, Tiling]]:
    """Predicted microseconds of every tiling, cheapest first."""
    found = []
    for rows, quads in _TILES:
        if quads > 1 and 4 * (quads - 1) >= geometry.pixels:
            continue
        tiling = Tiling(rows, quads, 4, geometry.pixels)
        found.append((predict_us(machine, geometry, tiling), tiling))
    return sorted(found, key=lambda one: one[0])


def predict_us(machine: Machine, geometry: Geometry, tiling: Tiling) -> float:
    """Time on one thread. A product of matrices costs what a sum of four products does."""
    whole = padded(geometry)
    n, oc, _, columns = geometry.y_shape
    depth, groups, pairs = whole.taps // OCTET, -(-oc // tiling.rows), tiling.rows // 2
    row = OCTET * tiling.width
    missing = min(1.0, max(0.0, depth * row / machine.l1_bytes - 0.75) * 2)
    cycles = 0.0
    for count, pixels in ((tiling.full, tiling.width), (1 if tiling.tail else 0, tiling.tail)):
        twos = -(-pixels // 2)
        step = max(
            pairs * twos / machine.dots,
            (pairs + twos) / machine.loads,
            (pairs * twos + pairs + twos + 1) / machine.uops,
        )
        cache = 16 * twos * missing / machine.l2_bytes_per_cycle
        finish = machine.group_cycles + 2.0 * tiling.rows * -(-pixels // 4) * (1.0 + 1.0 / machine.loads)
        copies = -(-pixels // 16) if geometry.pointwise else -(-pixels // min(16, columns)) + 1
        packing = depth * (machine.row_cycles + copies * (24 / machine.fma + 16 / machine.loads))
        cycles += count * (groups * (depth * max(step, cache) + finish) + packing)
    if geometry.needs_prepare or whole != geometry:
        cycles += 2.0 * float(np.prod(whole.prepared_shape)) / machine.lanes
    return float(n * cycles / (machine.ghz * 1e3))


# --- the kernel ------------------------------------------------------------------------------------------------------


def bind(
    machine: Machine,
    geometry: Geometry,
    w: np.ndarray,
    *,
    x: QuantType,
    w_scale: np.ndarray,
    steps: Requantize,
    form: Format = FORM,
    bias: np.ndarray | None = None,
    tiling: Tiling | None = None,
) -> tuple[KernelCall | None, KernelCall]:
    """The calls for one layer, as `int8.bind`."""
    tiling = tiling or ranked(machine, geometry)[0][1]
    whole, packed = padded(geometry), pack(w, tiling.rows)
    main = _Paired(machine.words(), whole, packed, w, bias, x, w_scale, steps, tiling).call()
    first = None
    if geometry.needs_prepare or whole != geometry:
        first = prepare(machine, geometry, x.dtype, x.zero_point, whole.x_shape[1])
    return first, main


class _Paired(Quantized):
    """Emits the kernel of one layer; see the module's head. `geometry`: with channels of whole octets."""

    @property
    def panel_element(self) -> str:
        """The panel holds octets."""
        return "int64"

    @property
    def spacing(self) -> int:
        """Elements of x between panel rows that lie one behind the other."""
        return OCTET * self.tiling.pixels

    def offsets(self) -> np.ndarray:
        """Where in a prepared image each panel row begins: the first channel of its octets."""
        return self.geometry.tap_offsets()[::OCTET]

    def parts_of(self, pixels: int, rows: int) -> tuple[Part, ...]:
        """Quads of pixels."""
        return tuple(Part(at, 4, min(4, pixels - at)) for at in range(0, pixels, 4))

    def trips(self) -> Any:
        """Octets of a pass."""
        return self.packed.depth

    def copy(self, to: Any, start: Any, lanes: int) -> None:
        """Fill `lanes` pixels of a panel row: eight channels interleaved."""
        x, panel = self.buffers["x"], self.buffers["scratch"]
        rows = [T.bind(emit.load(x, start + channel * self.plane, lanes)) for channel in range(OCTET)]
        if lanes == 1:
            found = [
                T.Shuffle([T.Cast("int8", row) if self.x.dtype == "uint8" else row for row in rows], list(range(OCTET)))
            ]
        else:
            found = _octets([vectors.as_type(row, "uint8") for row in rows])
        done = 0
        for register in found:
            octets = vectors.as_type(self._flip(register), "int64")
            emit.store(panel, to + done, octets, emit.lanes_of(octets))
            done += emit.lanes_of(octets)

    def _flip(self, value: Any) -> Any:
        return quantized.flip(vectors.as_type(value, "uint8")) if quantized.flipped(self.machine, self.x) else value

    def name(self, form: str) -> tuple[str, tuple[Any, ...]]:
        """How the kernel's name begins, and what its code depends on."""
        stem, facts = super().name("dense")
        return f"{stem.removesuffix('dense')}pairs", (*facts, "pairs")

    def _group(self, first_row: Any, rows: int, parts: tuple[Part, ...], out: Any, terms: Terms, stage: Stage) -> None:
        """The sums of rows first_row .. first_row + rows of one tile."""
        pixels = parts[-1].at + parts[-1].valid
        twos, pairs, height = -(-pixels // 2), -(-rows // 2), self.packed.rows
        bias, values, panel = self.buffers["bias"], self.buffers["values"], self.buffers["scratch"]
        acc = emit.Accumulators([pairs] * twos, [4] * twos, "int32")
        starts = [T.bind(emit.load(bias, first_row + 2 * i, 2)) for i in range(pairs)]
        acc.fill(lambda i, _: T.Shuffle([starts[i]] * 2, [0, 1, 0, 1]))

        def octets(first: Any, size: int) -> None:
            for u in range(size):
                k = T.bind(terms.start + first + u)
                at = T.bind((terms.values + (first + u) * height) * 2)
                weights = [T.bind(emit.load(values, at + 4 * i, 4)) for i in range(pairs)]
                for p in range(twos):
                    two = T.bind(emit.load(panel, k * self.tiling.width + 2 * p, 2))
                    for i in range(pairs):
                        acc.set(i, p, _product(acc.get(i, p), two, weights[i]))

        emit.in_rounds(terms.count, UNROLL, octets)

        def row(r: int, p: int) -> Any:
            found = [acc.get(r // 2, q) for q in (2 * p, min(2 * p + 1, twos - 1))]
            return T.Shuffle(found, [r % 2 + i for i in (0, 2, 4, 6)])

        self.store_sums(row, first_row, rows, parts, out)


def _product(acc: Any, activations: Any, weights: Any) -> Any:
    """acc + the products of two octets of each."""
    operands = [vectors.as_type(value, "int8") for value in (activations, weights)]
    return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.usmmla.v4i32.v16i8", acc, *operands)


def _octets(rows: list[Any], size: int = 1) -> list[Any]:
    """Vectors of elements of `size` bytes in turns, until elements are octets: registers in the order of pixels."""
    if len(rows) == 1:
        return rows
    lanes = emit.lanes_of(rows[0])
    both = range(2 * lanes)
    halves = [both] if 2 * lanes * size <= 16 else [both[:lanes], both[lanes:]]
    found = []
    for half in halves:
        order = [i // 2 + lanes * (i % 2) for i in half]
        pairs = [T.bind(T.Shuffle([a, b], order)) for a, b in zip(rows[::2], rows[1::2], strict=True)]
        found += _octets([vectors.as_type(pair, f"uint{16 * size}") for pair in pairs], 2 * size)
    return found
