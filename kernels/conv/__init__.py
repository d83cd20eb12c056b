"""Convolution, dense and sparse: one family for 1x1 and kxk, any stride and dilation, and R x C blocks of zeros.

Index formula, NCHW, one image:

    y[oc, p] = act(bias[oc] + sum over taps k = (kh, kw, ic) of w[oc, k] * panel[k, p])     p = oy * OW + ox
    panel[k, p] = x[ic, oy * sh + kh * dh - top, ox * sw + kw * dw - left], zero outside

A tile is T consecutive output pixels. Its panel, K x T, is packed into the worker's scratch, then each group of R output
channels is a register tile of R x P vectors: for each stored block one 16-bit panel row, P panel loads, R weights, R * P
multiply-adds. Tiles follow the flattened pixels, so ragged rows cost nothing; only the last tile of a plane is narrower,
and it computes and stores just its pixels: where fewer pixels than rows are left over, in vectors of rows.

A panel larger than the first cache is gone through in passes: all groups add the products of `depth` panel rows before
the next rows are touched; between passes sums rest in y.

Sources: the panel is im2col by tiles as in MNN's sparse kernels; R rows sharing one index is the block pattern of Fast
Sparse ConvNets (arXiv 1911.09723) and OVW (NeurIPS 2022).

Strides and padding are resolved once, before tiling: `prepare` copies x into phase planes (row and column phases of the
stride, with the halo's zeros), where every tap is a constant offset and every access has unit stride.

Stored form, by pass, then by row group g (R consecutive output channels, a smaller last group filled up with zeros):
    dense:  values[g][k][R]                                     k over all live taps
    RxC:    pointers[g], index[block] (uint16 panel row), values[block][C][R]
Live taps are those that any output channel uses; dead ones are neither packed nor stored.

The register tile is written out by hand: the trip count and the panel row are data, which TVM's schedules cannot tile.
"""

from __future__ import annotations

from sparsec.kernels.base import Format
from sparsec.kernels.conv.cost import best_tiling, predict_us, ranked_tilings, stored_columns, tilings
from sparsec.kernels.conv.geometry import Geometry, Tiling, reference
from sparsec.kernels.conv.kernel import bind
from sparsec.kernels.conv.shares import Shares
from sparsec.kernels.conv.stored import DENSE, TABLE, Packed, pack, unpack
from sparsec.kernels.parts import Part

__all__ = [
    "DENSE",
    "TABLE",
    "Format",
    "Geometry",
    "Packed",
    "Part",
    "Shares",
    "Tiling",
    "best_tiling",
    "bind",
    "pack",
    "predict_us",
    "ranked_tilings",
    "reference",
    "stored_columns",
    "tilings",
    "unpack",
]
