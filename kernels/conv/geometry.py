"""Shapes of a convolution, how its pixels are cut into tiles, and its definition."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sparsec.kernels.epilogue import NONE, Activation, Residual, reference_finish
from sparsec.kernels.parts import Part, parts_of


@dataclass(frozen=True)
class Geometry:
    """Shape facts of one convolution, groups 1. `pads`: top, left, bottom, right."""

    x_shape: tuple[int, int, int, int]  # N, C, H, W
    w_shape: tuple[int, int, int, int]  # OC, IC, KH, KW
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)

    @cached_property
    def y_shape(self) -> tuple[int, int, int, int]:
        """N, OC, OH, OW."""
        n, _, h, w = self.x_shape
        oc, _, kh, kw = self.w_shape
        oh = (h + self.pads[0] + self.pads[2] - self.dilations[0] * (kh - 1) - 1) // self.strides[0] + 1
        ow = (w + self.pads[1] + self.pads[3] - self.dilations[1] * (kw - 1) - 1) // self.strides[1] + 1
        return n, oc, oh, ow

    @property
    def pixels(self) -> int:
        """Output pixels of one image."""
        return self.y_shape[2] * self.y_shape[3]

    @property
    def taps(self) -> int:
        """K: products summed for one output."""
        return int(np.prod(self.w_shape[1:]))

    @property
    def pointwise(self) -> bool:
        """Whether the panel is just x: 1x1 taps (after `prepare`), planes as wide as the output's."""
        return self.phase_shape[1:] == self.y_shape[2:] and len(self.phases) == 1

    @cached_property
    def phases(self) -> tuple[tuple[int, int], ...]:
        """(row, column) phases of the stride that taps use, in plane order."""
        rows = sorted({kh * self.dilations[0] % self.strides[0] for kh in range(self.w_shape[2])})
        columns = sorted({kw * self.dilations[1] % self.strides[1] for kw in range(self.w_shape[3])})
        return tuple((r, c) for r in rows for c in columns)

    @cached_property
    def phase_shape(self) -> tuple[int, int, int]:
        """Phases, rows and columns of one channel's phase planes."""
        rows = (self.w_shape[2] - 1) * self.dilations[0] // self.strides[0] + self.y_shape[2]
        columns = (self.w_shape[3] - 1) * self.dilations[1] // self.strides[1] + self.y_shape[3]
        return len(self.phases), rows, columns

    @cached_property
    def needs_prepare(self) -> bool:
        """Whether x itself is not already the one phase plane that taps index."""
        return self.strides != (1, 1) or self.pads != (0, 0, 0, 0)

    @property
    def prepared_shape(self) -> tuple[int, int, int, int, int]:
        """N, C, phases, rows, columns of what `prepare` writes; x viewed so if it need not run."""
        return (self.x_shape[0], self.x_shape[1], *self.phase_shape)

    def tap_offsets(self) -> np.ndarray:
        """Offset of each tap's first pixel in a prepared image, elements, taps in (kh, kw, ic) order."""
        _, rows, columns = self.phase_shape
        ic = np.arange(self.w_shape[1])[None, None, :] * len(self.phases) * rows * columns
        kh = np.arange(self.w_shape[2]) * self.dilations[0]
        kw = np.arange(self.w_shape[3]) * self.dilations[1]
        number = {phase: i for i, phase in enumerate(self.phases)}
        plane = np.array([[number[(int(a) % self.strides[0], int(b) % self.strides[1])] for b in kw] for a in kh])
        at = plane * rows * columns + (kh[:, None] // self.strides[0]) * columns + kw[None, :] // self.strides[1]
        return (at[:, :, None] + ic).reshape(-1).astype(np.int32)


@dataclass(frozen=True)
class Tiling:
    """How one layer is cut: `rows` output channels x `vectors` vectors of pixels a register tile.

    `depth`: panel rows that all groups of rows go through before the next ones are touched, so that these stay in the
    first cache; 0: all of them at once. `narrow`: lanes that a last, narrower vector of several pixels has at least.
    """

    rows: int
    vectors: int
    lanes: int
    pixels: int
    depth: int = 0
    narrow: int = 4

    @property
    def width(self) -> int:
        """Pixels of a full tile; also the pitch of the panel."""
        return self.vectors * self.lanes

    @property
    def full(self) -> int:
        """Number of full tiles."""
        return self.pixels // self.width

    @property
    def tail(self) -> int:
        """Pixels of the last, narrower tile; 0 if there is none."""
        return self.pixels % self.width

    @property
    def count(self) -> int:
        """Tiles of one image."""
        return self.full + (self.tail > 0)

    def passes(self, live: int) -> tuple[int, int]:
        """Number of passes over `live` panel rows, and the rows of each but the last, which may be shorter."""
        if not self.depth or self.depth >= live:
            return 1, live
        return -(-live // self.depth), self.depth

    def parts_of(self, pixels: int, rows: int) -> tuple[Part, ...]:
        """What covers `pixels` of a tile in a group of `rows` rows."""
        rest = pixels % self.lanes
        height = 1 << (rows - 1).bit_length()
        if rest and rest < rows and height <= self.lanes:
            return (*parts_of(pixels - rest, self.lanes), Part(pixels - rest, height, rest, turned=True))
        return parts_of(pixels, self.lanes, self.narrow)


def reference(
    geometry: Geometry,
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None = None,
    activation: Activation = NONE,
    residual: Residual = "none",
    other: np.ndarray | None = None,
) -> np.ndarray:
    """The convolution in float64, by definition. x [N,C,H,W], w [OC,IC,KH,KW] -> [N,OC,OH,OW]."""
    (sh, sw), (dh, dw) = geometry.strides, geometry.dilations
    top, left, bottom, right = geometry.pads
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    n, oc, oh, ow = geometry.y_shape
    y = np.zeros((n, oc, oh, ow))
    for kh in range(w.shape[2]):
        for kw in range(w.shape[3]):
            window = padded[
                :, :, kh * dh : kh * dh + (oh - 1) * sh + 1 : sh, kw * dw : kw * dw + (ow - 1) * sw + 1 : sw
            ]
            y += np.einsum("oc,nchw->nohw", w[:, :, kh, kw].astype(np.float64), window)
    if bias is not None:
        y += bias[None, :, None, None]
    return reference_finish(y, activation, residual, other)
