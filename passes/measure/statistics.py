"""Second moments of what the layers of a model read, streamed from calibration data.

For a layer with weight W.reshape(OC, K), K = IC*KH*KW, every output position p of every sample reads a column x_p of K
inputs (an unfolded patch for Conv, a row for Gemm and MatMul), y_p = W x_p + b. Over all P positions

    gram = (1/P) sum_p x_p x_p^T   [K, K] float64          mean = (1/P) sum_p x_p   [K]          count = P

and any quadratic error of the layer follows without the data: mean |(W - W') x|^2 = tr((W - W') gram (W - W')^T).
A grouped convolution has one gram a group: [G, K, K], [G, K].

Activations are fetched from ONNX Runtime a batch at a time and thrown away; only moments stay. Layers whose moments
together exceed `budget` bytes are gathered in several runs over the data, so memory is bounded by the largest layer,
not by the model or the number of samples. Where the inputs of these layers are large, batches are smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from sparsec.errors import UnsupportedError
from sparsec.passes.layers import WeightedLayer, readers
from sparsec.passes.measure.segments import BATCH, Segment, batches, value_bytes
from sparsec.rewriting.passes_api import Context, Samples

BUDGET = 1 << 29  # bytes of moments gathered in one run over the data
FETCHED = 1 << 27  # bytes of activations of one batch, unless one sample has more
POSITIONS = 1 << 17  # so many columns make a layer's moments, and at least `PER_INPUT` for each of its inputs
PER_INPUT = 128


class Activations:
    """Values of a model as it is now, on calibration data."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model

    def stream(
        self, values: Sequence[str], calibration: Iterable[Mapping[str, np.ndarray]], batch: int = BATCH
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches of b samples: value name -> [b, *shape]. Model inputs may be asked for as well."""
        inputs = {str(v.name) for v in self._model.graph.inputs}
        computed = [name for name in dict.fromkeys(values) if name not in inputs]
        segment = Segment(self._model, None, computed) if computed else None
        for given in batches(calibration, batch):
            made = segment.run(given) if segment is not None else {}
            yield {name: given[name] if name in inputs else made[name] for name in values}


class Centred(NamedTuple):
    """Columns [G, K, P] as `near` [G, K], values near their means, and what is left of them; `total` [G, K]: their sums."""

    rest: np.ndarray
    near: np.ndarray
    total: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> Centred:
        """Of float32; `near` and `total` are float64."""
        total = x.sum(axis=2, dtype=np.float64)
        near = (total / max(x.shape[2], 1)).astype(x.dtype)
        near = np.where(np.isfinite(near), near, 0)
        return cls(x - near[..., None], near.astype(np.float64), total)


def products(y: Centred, x: Centred) -> np.ndarray:
    """sum_p y_p x_p^T, [G, M, K] float64, of the columns of both.

    With x = a + d and y = b + e for any a and b

        sum y x^T = sum e d^T + b (sum x)^T + (sum y) a^T - P b a^T

    and with a and b near the means the product in float32, which rounds by a share of what it sums, sees the deviations
    only: a covariance is as exact where means are large.
    """
    with np.errstate(invalid="ignore"):  # what is not finite stays so
        found = np.matmul(y.rest, x.rest.transpose(0, 2, 1)).astype(np.float64)
        found += y.near[..., None] * x.total[:, None] + y.total[..., None] * x.near[:, None]  # symmetric where x is y
        found -= x.rest.shape[2] * (y.near[..., None] * x.near[:, None])
    return found


@dataclass
class Moments:
    """sum x x^T, sum x and the number of columns, while they are accumulated. Shapes [G, K, L], [G, K]."""

    gram: np.ndarray
    total: np.ndarray
    count: int = 0

    @classmethod
    def zeros(cls, groups: int, k: int) -> Moments:
        """Nothing seen yet."""
        return cls(np.zeros((groups, k, k)), np.zeros((groups, k)))

    def add(self, x: np.ndarray) -> None:
        """One batch of columns [G, K, P] float32: the product in float32, the sum over batches in float64."""
        parts = Centred.of(x)
        self.gram += products(parts, parts)
        self.total += parts.total
        self.count += x.shape[2]


@dataclass(frozen=True)
class Statistics:
    """Moments of a layer's input, per position. `gram` [K, K] (grouped: [G, K, K]), `mean` [K] ([G, K]), `count` P."""

    gram: np.ndarray = field(repr=False)
    mean: np.ndarray = field(repr=False)
    count: int

    @property
    def norms(self) -> np.ndarray:
        """Root mean square of every input, [K] (grouped: [G, K])."""
        return np.sqrt(np.maximum(np.diagonal(self.gram, axis1=-2, axis2=-1), 0))

    @property
    def covariance(self) -> np.ndarray:
        """gram - mean mean^T."""
        return self.gram - self.mean[..., :, None] * self.mean[..., None, :]


def input_of(layer: WeightedLayer) -> ir.Value:
    """The activation that a layer multiplies with its weight."""
    value = layer.node.inputs[1 - layer.input_index if layer.op == "MatMul" else 0]
    assert value is not None
    return value


def thinning(layer: WeightedLayer, samples: int) -> int:
    """Every how many of its output positions a layer needs: neighbouring pixels of a large plane say the same."""
    value = layer.node.outputs[0]
    if value.shape is None or not value.shape.is_static():
        return 1
    positions = int(np.prod(value.shape.numpy(), dtype=np.int64)) // layer.shape[0]
    enough = max(POSITIONS, PER_INPUT * int(np.prod(layer.shape[1:])))
    return max(1, positions * samples // enough)


def columns(layer: WeightedLayer, batch: np.ndarray, step: int = 1) -> np.ndarray:
    """A batch [b, *shape] of a layer's input as the columns that its weight multiplies: [G, K, P] float32.

    P counts the layer's output positions over the batch, in the order of its output (samples first). `step`: only every
    step-th row of output pixels (Conv), or position (Gemm, MatMul).
    """
    x = batch.astype(np.float32, copy=False)
    if layer.op == "Conv":
        return _patches(layer, x.reshape(-1, *x.shape[2:]), step)
    if layer.op == "MatMul" and layer.input_index == 0:  # A @ x: x is [..., K, N]
        return np.ascontiguousarray(np.moveaxis(x, -2, 0).reshape(1, x.shape[-2], -1)[:, :, ::step])
    if layer.op == "Gemm" and layer.node.attributes.get_int("transA", 0):
        x = np.swapaxes(x, -1, -2)
    return np.ascontiguousarray(x.reshape(-1, x.shape[-1])[::step].T)[None]


def outputs(layer: WeightedLayer, batch: np.ndarray, step: int = 1) -> np.ndarray:
    """A batch [b, *shape] of a layer's outputs as [OC, P], the positions of `columns`."""
    if layer.op == "Conv":
        y = batch.reshape(-1, *batch.shape[2:])
        y = y[:, :, _rows(y.shape[2], step)]
        return np.ascontiguousarray(np.moveaxis(y, 1, 0)).reshape(y.shape[1], -1)
    axis = -2 if layer.op == "MatMul" and layer.input_index == 0 else -1
    y = np.moveaxis(batch, axis, 0)
    return np.ascontiguousarray(y.reshape(y.shape[0], -1)[:, ::step])


def _rows(count: int, step: int) -> slice:
    """Every step-th row, from the middle of the first step; at least one."""
    step = min(step, count)
    return slice(step // 2, None, step)


def _patches(layer: WeightedLayer, x: np.ndarray, step: int) -> np.ndarray:
    dims = x.ndim - 2
    attributes = layer.node.attributes
    kernel = tuple(int(str(d)) for d in layer.tensor.shape)[2:]
    strides = list(attributes.get_ints("strides", [1] * dims))
    dilations = list(attributes.get_ints("dilations", [1] * dims))
    pads = list(attributes.get_ints("pads", [0] * 2 * dims))
    if attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise UnsupportedError("auto_pad is not supported here; load the model with sparsec first", layer.name)
    if any(pads):
        x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:dims], pads[dims:], strict=True)])
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(x, spans, axis=tuple(range(2, 2 + dims)))
    steps = [slice(None, None, s) for s in strides] + [slice(None, None, d) for d in dilations]
    views = views[(slice(None), slice(None), *steps)]  # [B, C, out..., kernel...]
    views = views[:, :, _rows(views.shape[2], step)]
    order = (1, *range(2 + dims, 2 + 2 * dims), 0, *range(2, 2 + dims))
    k = layer.shape[1] * int(np.prod(kernel))
    return np.ascontiguousarray(views.transpose(order)).reshape(layer.groups, k, -1)


def moment_bytes(layer: WeightedLayer) -> int:
    """Memory of a layer's moments while they are gathered."""
    k = int(np.prod(layer.shape[1:]))
    return 8 * layer.groups * k * k


def gather(
    model: ir.Model,
    layers: Sequence[WeightedLayer],
    calibration: Samples,
    budget: int = BUDGET,
    batch: int = BATCH,
) -> Iterator[tuple[WeightedLayer, Statistics]]:
    """(layer, statistics of its input) in the order of `layers`; `calibration` is iterated once for each `budget`. Where
    several nodes read a weight, the statistics are of what they all multiply with it."""
    context = Context.of(model)
    done = 0
    while done < len(layers):
        chosen: list[WeightedLayer] = []
        used = 0
        while done + len(chosen) < len(layers) and (
            not chosen or used + moment_bytes(layers[done + len(chosen)]) <= budget
        ):
            chosen.append(layers[done + len(chosen)])
            used += moment_bytes(chosen[-1])
        together = [readers(layer) for layer in chosen]
        size = sum(value_bytes(input_of(reader)) or 0 for alike in together for reader in alike)
        at_once = max(1, min(batch, FETCHED // max(size, 1)))
        moments = [Moments.zeros(layer.groups, int(np.prod(layer.shape[1:]))) for layer in chosen]
        names = [str(input_of(reader).name) for alike in together for reader in alike]
        for values in Activations(model).stream(names, calibration, at_once):
            for alike, sums in zip(together, moments, strict=True):
                for reader in alike:
                    x = values[str(input_of(reader).name)]
                    sums.add(columns(reader, x, thinning(reader, len(calibration) * len(alike))))
            context.tell(f"activations of {chosen[0].name}", done, len(layers))
        while chosen:
            layer, sums = chosen.pop(0), moments.pop(0)
            done += 1
            yield layer, _finished(layer, sums)


def _finished(layer: WeightedLayer, sums: Moments) -> Statistics:
    sums.gram /= max(sums.count, 1)
    mean = sums.total / max(sums.count, 1)
    return Statistics(
        sums.gram if layer.groups > 1 else sums.gram[0], mean if layer.groups > 1 else mean[0], sums.count
    )
