"""The convolution in 8 bits: the same kernel over words of four input channels.

    acc[oc, p] = start[oc] + sum over words k = (kh, kw, ic / 4) of dot(w[oc, k], panel[k, p])             int32
    y[oc, p] = requantized acc * multiplier[oc]                           (`sparsec.kernels.quantized`)

x is planes of bytes, as everywhere. Where the panel is filled, four channels are interleaved to words and, if the
machine's `dot` wants the other sign, their top bits are flipped; from there on a word is to this kernel what a float32 is
to the other, in the same tiles, passes and stored forms. Blocks of zeros are R output channels x 4 input channels at one
kernel position, one word wide; channels that fill up the last word are zero in w, and `prepare` adds them to x.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import bytes as vectors
from sparsec.kernels import dots, emit, quantized
from sparsec.kernels.base import Format, KernelCall, Machine
from sparsec.kernels.conv.cost import best_tiling, ranked_tilings, stored_columns
from sparsec.kernels.conv.geometry import Geometry, Tiling
from sparsec.kernels.conv.kernel import Convolution
from sparsec.kernels.conv.prepare import prepare
from sparsec.kernels.conv.stored import Packed, pack, unpack
from sparsec.kernels.dots import WORD
from sparsec.kernels.quantized import QuantType, Requantize

SHORT = 16  # columns of a loop that LLVM might unroll whole


def _format(rows: int) -> Format:
    block = f"{rows}x{WORD}"
    text = f"convolution in 8 bits, {block} blocks (output x input channels)"
    return Format(f"conv_i8_{block}", "Conv", block, "int8", text, "quantized input and weights", rows, WORD)


DENSE = Format(
    "conv_i8_dense", "Conv", "dense", "int8", "convolution in 8 bits, dense weights", "quantized input and weights"
)
TABLE: tuple[Format, ...] = (DENSE, *map(_format, (1, 4, 8, 16)))


def padded(geometry: Geometry) -> Geometry:
    """The geometry with its input channels filled up to whole words."""
    (n, c, h, w), (oc, _, kh, kw) = geometry.x_shape, geometry.w_shape
    channels = -(-c // WORD) * WORD
    return replace(geometry, x_shape=(n, channels, h, w), w_shape=(oc, channels, kh, kw))


def in_words(geometry: Geometry) -> Geometry:
    """The geometry counted in words of input channels, by which layers are priced and tiled."""
    (n, c, h, w), (oc, _, kh, kw) = geometry.x_shape, geometry.w_shape
    return replace(geometry, x_shape=(n, -(-c // WORD), h, w), w_shape=(oc, -(-c // WORD), kh, kw))


def _word_form(form: Format) -> Format:
    return replace(form, columns=max(1, form.columns // WORD))


def words_of(w: np.ndarray) -> np.ndarray:
    """Weights [OC, IC, KH, KW] int8 as words of four input channels: int32 [OC, ceil(IC / 4), KH, KW]."""
    oc, ic, kh, kw = w.shape
    full = np.zeros((oc, kh, kw, -(-ic // WORD) * WORD), np.int8)
    full[..., :ic] = w.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(quantized.words(full).transpose(0, 3, 1, 2))


def pack_words(w: np.ndarray, form: Format, rows: int | None = None, depth: int = 0) -> Packed:
    """int8 [OC, IC, KH, KW] to stored form; sizes in words."""
    return pack(words_of(w), _word_form(form), rows, depth)


def unpack_words(packed: Packed, w_shape: tuple[int, int, int, int]) -> np.ndarray:
    """The inverse of `pack_words`: int8 [OC, IC, KH, KW]."""
    oc, ic, kh, kw = w_shape
    found = unpack(packed, (oc, -(-ic // WORD), kh, kw))
    full = np.ascontiguousarray(found.transpose(0, 2, 3, 1)).view(np.int8)[..., :ic]
    return np.ascontiguousarray(full.transpose(0, 3, 1, 2))


def stored_words(w: np.ndarray, form: Format, machine: Machine, geometry: Geometry) -> dict[int, float]:
    """Words x R that each admissible tile height stores, over all groups of rows."""
    return stored_columns(words_of(w), _word_form(form), machine.words(), in_words(geometry))


def ranked(machine: Machine, geometry: Geometry, form: Format, columns: dict[int, float]) -> list[tuple[float, Tiling]]:
    """Predicted microseconds of every tiling, cheapest first. `columns`: of `stored_words`."""
    return ranked_tilings(machine.words(), in_words(geometry), _word_form(form), columns)


def reference(
    geometry: Geometry, x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, x_type: QuantType
) -> np.ndarray:
    """The sums, exact: x [N, C, H, W] and w [OC, IC, KH, KW] integers, bias [OC] -> int64 [N, OC, OH, OW]."""
    (sh, sw), (dh, dw) = geometry.strides, geometry.dilations
    top, left, bottom, right = geometry.pads
    centred = x.astype(np.int64) - x_type.zero_point
    centred = np.pad(centred, ((0, 0), (0, 0), (top, bottom), (left, right)))
    n, oc, oh, ow = geometry.y_shape
    acc = np.zeros((n, oc, oh, ow), np.int64)
    for kh in range(w.shape[2]):
        for kw in range(w.shape[3]):
            rows = slice(kh * dh, kh * dh + (oh - 1) * sh + 1, sh)
            columns = slice(kw * dw, kw * dw + (ow - 1) * sw + 1, sw)
            acc += np.einsum("oc,nchw->nohw", w[:, :, kh, kw].astype(np.int64), centred[:, :, rows, columns])
    return acc if bias is None else acc + np.asarray(bias, np.int64)[None, :, None, None]


def bind(
    machine: Machine,
    geometry: Geometry,
    w: np.ndarray,
    *,
    x: QuantType,
    w_scale: np.ndarray,
    steps: Requantize,
    form: Format = DENSE,
    bias: np.ndarray | None = None,
    tiling: Tiling | None = None,
) -> tuple[KernelCall | None, KernelCall]:
    """The calls for one layer: `prepare` (or None), then the convolution.

    w [OC, IC, KH, KW] int8 around zero with w_scale [OC], bias [OC] in units of x.scale * w_scale, or None. Roles as of
    the float32 convolution. Raises ValueError where sums could leave 32 bits.
    """
    words = machine.words()
    if tiling is None:
        columns = stored_words(w, form, machine, geometry)
        tiling, _ = best_tiling(words, in_words(geometry), _word_form(form), columns)
    packed = pack_words(w, form, tiling.rows, tiling.depth)
    main = Quantized(words, padded(geometry), packed, w, bias, x, w_scale, steps, tiling).call()
    first = None
    if geometry.needs_prepare or geometry.x_shape[1] % WORD:
        channels = padded(geometry).x_shape[1]
        first = prepare(machine, geometry, x.dtype, x.zero_point, channels)
    return first, main


class Quantized(Convolution):
    """Emits the kernel of one layer; see the module's head. `geometry`: with channels of whole words; `packed`: of `w`."""

    def __init__(
        self, machine: Machine, geometry: Geometry, packed: Packed, w: np.ndarray, bias: np.ndarray | None,
        x: QuantType, w_scale: np.ndarray, steps: Requantize, tiling: Tiling,
    ) -> None:  # fmt: skip
        self.x, self.steps, self.multipliers = x, steps, steps.multipliers(x, w_scale)
        self.bounded = quantized.largest(w, bias, self.multipliers) >= 2.0**30
        start = quantized.correction(machine, w, bias, x)
        super().__init__(machine, geometry, packed, start, steps.activation, steps.residual, tiling)

    @property
    def elements(self) -> dict[str, str]:
        """Element types of the activations."""
        return {"x": self.x.dtype, "y": self.steps.element, "residual": self.steps.other_element}

    @property
    def spacing(self) -> int:
        """Elements of x between panel rows that lie one behind the other."""
        return WORD * self.tiling.pixels

    @property
    def plane(self) -> int:
        """Elements of x between two channels."""
        return int(np.prod(self.geometry.phase_shape))

    def offsets(self) -> np.ndarray:
        """Where in a prepared image each panel row begins: the first channel of its words."""
        return self.geometry.tap_offsets()[::WORD][self.packed.live]

    def trips(self) -> Any:
        """Columns of a dense pass; of few, as data: LLVM unrolls short loops whole and runs out of registers."""
        depth = self.packed.depth
        if depth > SHORT or self.machine.lane_fma:
            return depth
        return T.bind(self.buffers["bias"][2 * self.oc])

    def copy(self, to: Any, start: Any, lanes: int) -> None:
        """Fill `lanes` pixels of a panel row: four channels interleaved."""
        x, panel, done = self.buffers["x"], self.buffers["scratch"], 0
        while done < lanes:
            some = min(lanes - done, self.machine.lanes)
            rows = [emit.load(x, start + (channel * self.plane + done), some) for channel in range(WORD)]
            found = quantized.interleave(self.machine, rows)
            if quantized.flipped(self.machine, self.x):
                found = quantized.flip(found)
            emit.store(panel, to + done, found, some)
            done += some

    def multiply_add(self, total: Any, weights: Any, activations: Any) -> Any:
        """A sum and the products of one word."""
        return dots.dot(self.machine, total, activations, weights)

    def together(self, lanes: int) -> int:
        """Four vectors of sums become one of bytes."""
        return WORD if self.steps.y is not None and lanes >= WORD and vectors.picks(self.machine) else 1

    def finished(self, totals: list[Any], others: list[Any], rows: list[Any], lanes: int) -> Any:
        """What is stored of some vectors of sums, one behind the other. `others`: residuals; `rows`: output channels."""
        multipliers = [emit.splat(self._multipliers(row, 1), lanes) for row in rows]
        if len(totals) == 1:
            return self.steps.finish(self.machine, totals[0], multipliers[0], others[0])
        return self.steps.finish_bytes(self.machine, totals, multipliers, others, self.bounded)

    def _multipliers(self, row: Any, lanes: int) -> Any:
        bits = emit.load(self.buffers["bias"], self.oc + row, lanes)
        return tirx.reinterpret(emit.vector_type(lanes), bits)

    def finished_rows(self, total: Any, row: Any, rows: int) -> list[Any] | None:
        """What is stored of one pixel's sums of `rows` rows from `row` on."""
        if self.steps.residual != "none":
            return None
        lanes = emit.lanes_of(total)
        value = self.steps.finish(self.machine, total, self._multipliers(row, lanes))
        return [T.Shuffle([value], [r]) for r in range(rows)]

    def name(self, form: str) -> tuple[str, tuple[Any, ...]]:
        """How the kernel's name begins, and what its code depends on."""
        what = "x".join(map(str, self.geometry.w_shape[2:]))
        form = form if form == "dense" else f"{self.packed.rows}x{self.packed.columns * WORD}"
        return f"conv{what}_i8_{form}", (self.steps, quantized.flipped(self.machine, self.x), self.bounded)

    def start(self, bias: np.ndarray | None) -> dict[str, np.ndarray]:
        """Beginnings of the sums, then the multipliers' bits, then `trips`: a kernel has eight pointers."""
        assert bias is not None
        depth = np.array([self.packed.depth], np.int32)
        return {"bias": np.concatenate([bias, self.multipliers.view(np.int32), depth])}
