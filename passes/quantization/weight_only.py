"""Weight-only: Gemm and MatMul weights as int8 or int4 with one scale for each group of inputs, activations float.

    W[n, k] = (q[n, k] - z[n, k // group]) * s[n, k // group]

For layers of few rows, whose time is reading their weights. Stored as q -> DequantizeLinear(axis along the input,
block_size = group) -> Gemm | MatMul. Symmetric by default (z = 0, q in -7..7 or -127..127), so zeros stay zero; with
`asymmetric` q is unsigned and 0 is exact as well. A last group may be shorter.

With calibration data rounding follows H = E[x x^T] of the layer's input, as in `sparsec.passes.quantization.grid`; the bias
takes the shift of the mean, b' = b + (W - Q) E[x]. Without data weights are rounded to nearest, and E[x] is that of
`sparsec.passes.quantization.moments`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from sparsec.passes.initializers import add_initializer
from sparsec.passes.layers import WeightedLayer
from sparsec.passes.measure.replay import goal_of
from sparsec.passes.measure.statistics import Statistics, gather
from sparsec.passes.pruning.reconstruct import metric, set_constant
from sparsec.passes.quantization.graph import read_dequantized
from sparsec.passes.quantization.grid import Grid, Rounding, Scales, group_grid, round_weights
from sparsec.rewriting.passes_api import Samples

TYPES = {
    (8, False): ir.DataType.INT8,
    (8, True): ir.DataType.UINT8,
    (4, False): ir.DataType.INT4,
    (4, True): ir.DataType.UINT4,
}


@dataclass(frozen=True)
class Grouped:
    """A layer's weight on its grid. `error`: share of the output's power that rounding loses; None without data."""

    layer: WeightedLayer = field(repr=False)
    weight: np.ndarray = field(repr=False)  # [OC, IC], on the grid
    grid: Grid = field(repr=False)
    error: float | None = None


def round_grouped(
    model: ir.Model,
    layers: Sequence[WeightedLayer],
    calibration: Samples | None,
    bits: int,
    group: int,
    asymmetric: bool = False,
    rounding: Rounding = "descent",
    scales: Scales = "mse",
    correct: bool = True,
    means: Mapping[str, np.ndarray] | None = None,
) -> Iterator[Grouped]:
    """Each layer on its grid, and its bias corrected in place. `means`: E[x] [IC] by layer name, for want of data."""
    known: Iterator[tuple[WeightedLayer, Statistics | None]]
    known = gather(model, layers, calibration) if calibration is not None else ((layer, None) for layer in layers)
    for layer, statistics in known:
        weight = layer.read()
        w = weight.reshape(1, weight.shape[0], -1).astype(np.float64)
        keep, h, bias = w != 0, None, goal_of(layer).bias if correct else None
        if statistics is not None:
            h = metric(statistics, bias is not None)[None]
        power = None if h is None else np.diagonal(h, axis1=1, axis2=2)
        grid = group_grid(w, power, group, bits, asymmetric, scales)
        v = round_weights(w, grid, keep, rounding, h)
        mean = statistics.mean if statistics is not None else (means or {}).get(layer.name)
        if bias is not None and bias.const_value is not None and mean is not None:
            old = bias.const_value.numpy()
            set_constant(bias, old + ((w - v)[0] @ mean).reshape(old.shape))
        error = None
        if statistics is not None and h is not None:
            d, gram = (w - v)[0], h[0]
            lost, total = (np.einsum("nk,nk->", m @ gram, m) for m in (d, w[0]))
            error = float(lost / total) if total > 0 else 0.0
        yield Grouped(layer, v[0], grid, error)


def nearest_grouped(
    layers: Sequence[WeightedLayer], bits: int, group: int, asymmetric: bool = False, scales: Scales = "mse"
) -> None:
    """Write each layer's weight as the nearest of its grid, as floats."""
    for layer in layers:
        weight = layer.read()
        w = weight.reshape(1, weight.shape[0], -1).astype(np.float64)
        layer.write(group_grid(w, None, group, bits, asymmetric, scales).round(w).reshape(weight.shape))


def store_grouped(model: ir.Model, grouped: Grouped, bits: int, group: int, asymmetric: bool) -> None:
    """Replace the weight by its integers and a DequantizeLinear in blocks."""
    layer, grid = grouped.layer, grouped.grid
    graph, name = model.graph, str(layer.weight.name)
    q = grid.codes(grouped.weight[None])[0]
    picked = slice(None, None, group)  # scales are equal within a group
    scale, zero = (np.broadcast_to(a, grid.scale.shape)[0][:, picked] for a in (grid.scale, grid.zero))
    dims = tuple(int(str(d)) for d in layer.tensor.shape)
    axis = len(dims) - 2 if layer.transposed else len(dims) - 1
    dtype = TYPES[bits, asymmetric]

    def stored(matrix: np.ndarray, kind: ir.DataType) -> np.ndarray:
        matrix = matrix.T if layer.transposed else matrix
        return np.ascontiguousarray(matrix.reshape(*dims[:-2], *matrix.shape)).astype(kind.numpy())

    values = [
        add_initializer(graph, f"{name}_quantized", stored(q, dtype), dtype),
        add_initializer(graph, f"{name}_scale", stored(scale, ir.DataType.FLOAT)),
        add_initializer(graph, f"{name}_zero_point", stored(zero, dtype), dtype),
    ]
    readers = [(use.node, use.idx) for use in layer.weight.uses()]
    read_dequantized(graph, readers, values, {"axis": axis, "block_size": group}, f"{name}_DequantizeLinear")
