"""Observers: from the numbers that a value takes on calibration data to the range low..high that int8 covers.

    minmax      the least and the greatest number
    average     their moving averages over batches, momentum 0.9: one strange sample does not set the scale
    percentile  all but 1 - p of the numbers that are not zero, half of it at each end
    mse         the range of the least mean square error, d^2 / 12 within it (d its step) plus what clipping costs
    entropy     the range whose rounded distribution is nearest to the observed one in KL divergence

One pass over the data fills a histogram of BINS bins of width 2^k around 0. A number outside doubles the width: pairs
of bins merge and no count is lost, so memory is BINS counts a value however much data there is, and the result does not
depend on how the data is cut into batches (but for `average`). Zeros are counted apart: behind a ReLU or in a pruned
model they are most of the numbers, and they say nothing about the scale, because 0 is always exact.

Entropy: Migacz, "8-bit inference with TensorRT", GTC 2017. Zeros of sparse input set apart: LiDAR-PTQ, arXiv:2401.15865.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from sparsec.errors import DataError
from sparsec.passes.measure.segments import BATCH
from sparsec.passes.measure.statistics import Activations
from sparsec.passes.quantization.graph import Kind, Plan, Range
from sparsec.rewriting.passes_api import Context, Samples

Observer = Literal["minmax", "average", "percentile", "mse", "entropy"]

BINS = 8192  # half of them below zero
TAKEN = 1 << 17  # numbers of a value that one batch adds to its histogram; extremes look at all
MOMENTUM = 0.9
PERCENTILE = 0.9999
LEVELS = 255  # steps of an 8-bit range
SHRINK = np.linspace(0.3, 1.0, 71)  # of each end, that `mse` tries
ENTROPY_SHRINK = np.linspace(0.3, 1.0, 36)
HELD = 1 << 29  # bytes of activations that one run over the data fetches a batch


class Histogram:
    """Counts of the numbers a value takes: `counts` [BINS] of width `width`, bin BINS // 2 begins at 0; zeros apart."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS)
        self.width = 0.0
        self.zeros = 0.0
        self.low, self.high = math.inf, -math.inf
        self._average: tuple[float, float] | None = None

    def add(self, x: np.ndarray) -> None:
        """One batch of any shape. DataError for numbers that are not finite."""
        flat = x.reshape(-1)
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError("its values on the calibration data are not finite", "activation")
        self.low, self.high = min(self.low, low), max(self.high, high)
        old = self._average or (low, high)
        self._average = MOMENTUM * old[0] + (1 - MOMENTUM) * low, MOMENTUM * old[1] + (1 - MOMENTUM) * high
        self._reach(max(-low, high))
        step = max(1, flat.size // TAKEN) | 1  # odd: does not fall into step with rows of pixels
        flat = flat[::step]
        flat, before = flat[flat != 0], flat.size
        self.zeros += step * (before - flat.size)
        if flat.size:
            bins = np.floor(flat * np.float32(1 / self.width)).astype(np.int32) + BINS // 2
            self.counts += step * np.bincount(np.clip(bins, 0, BINS - 1), minlength=BINS)

    def __iadd__(self, other: Histogram) -> Histogram:
        """Both, as if seen by one; averages span both."""
        if other.width:
            self._reach(other.width * (BINS // 2) * 0.999)
            counts, width = other.counts, other.width
            while width < self.width:
                counts, width = _halved(counts), 2 * width
            self.counts = self.counts + counts
        self.zeros += other.zeros
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        if other._average is not None:
            mine = self._average or other._average
            self._average = min(mine[0], other._average[0]), max(mine[1], other._average[1])
        return self

    def _reach(self, magnitude: float) -> None:
        """Widen bins until `magnitude` falls into one."""
        if magnitude == 0:
            return
        needed = 2.0 ** math.ceil(math.log2(magnitude * 1.0001 / (BINS // 2)))
        if not self.width:
            self.width = needed
        while self.width < needed:
            self.counts, self.width = _halved(self.counts), 2 * self.width

    @property
    def centres(self) -> np.ndarray:
        """The middle of every bin, [BINS]."""
        return (np.arange(BINS) - BINS // 2 + 0.5) * self.width

    def bounds(self, observer: Observer, percentile: float = PERCENTILE) -> tuple[float, float]:
        """low <= 0 <= high as the observer sees them."""
        if not self.counts.any() or self.high <= self.low == 0:
            return min(self.low, 0.0), max(self.high, 0.0)
        ends = min(self.low, 0.0), max(self.high, 0.0)
        if observer == "average":
            assert self._average is not None
            return min(self._average[0], 0.0), max(self._average[1], 0.0)
        if observer == "percentile":
            return self._percentile(percentile, ends)
        if observer == "mse":
            return self._least_square(ends)
        if observer == "entropy":
            return self._least_divergence(ends)
        return ends

    def _percentile(self, share: float, ends: tuple[float, float]) -> tuple[float, float]:
        total = np.cumsum(self.counts) / self.counts.sum()
        tail = (1 - share) / (2 if ends[0] < 0 < ends[1] else 1)
        edges = (np.arange(BINS + 1) - BINS // 2) * self.width
        low = edges[int(np.searchsorted(total, tail, side="right"))] if ends[0] < 0 else 0.0
        high = edges[min(int(np.searchsorted(total, 1 - tail)) + 1, BINS)] if ends[1] > 0 else 0.0
        return min(max(low, ends[0]), 0.0), max(min(high, ends[1]), 0.0)

    def _least_square(self, ends: tuple[float, float]) -> tuple[float, float]:
        """The pair of shrunk ends with the least error; what is clipped at one end does not depend on the other."""
        x, n = self.centres, self.counts
        lows = SHRINK * ends[0] if ends[0] < 0 else np.zeros(1)
        highs = SHRINK * ends[1] if ends[1] > 0 else np.zeros(1)
        below = np.array([(n * np.square(np.minimum(x - low, 0))).sum() for low in lows])
        above = np.array([(n * np.square(np.maximum(x - high, 0))).sum() for high in highs])
        inside = np.cumsum(np.r_[0, n])
        edge = [np.clip(np.searchsorted(x, v), 0, BINS) for v in (lows, highs)]
        count = inside[edge[1]][None, :] - inside[edge[0]][:, None]
        step = (highs[None, :] - lows[:, None]) / LEVELS
        error = count * step**2 / 12 + below[:, None] + above[None, :]
        i, j = np.unravel_index(int(error.argmin()), error.shape)
        return float(lows[i]), float(highs[j])

    def _least_divergence(self, ends: tuple[float, float]) -> tuple[float, float]:
        """One end after the other: an outlier above says nothing about what to clip below."""
        low, high = ends
        if high > 0:
            tried = ENTROPY_SHRINK[::-1] * high
            high = float(tried[np.argmin([self._divergence(low, end) for end in tried])])
        if low < 0:
            tried = ENTROPY_SHRINK[::-1] * low
            low = float(tried[np.argmin([self._divergence(end, high) for end in tried])])
        return low, high

    def _divergence(self, low: float, high: float) -> float:
        """KL of the observed distribution, its tails on the last bins, to the one of 256 levels spread over its bins."""
        x = self.centres
        first, last = int(np.searchsorted(x, low)), int(np.searchsorted(x, high))
        n = self.counts[first:last]
        if len(n) < 2 or not n.any():
            return math.inf
        p = n.copy()
        p[0] += self.counts[:first].sum()
        p[-1] += self.counts[last:].sum()
        level = np.clip(((x[first:last] - low) / (high - low) * (LEVELS + 1)).astype(int), 0, LEVELS)
        used = n > 0
        held = np.bincount(level, n, LEVELS + 1)
        bins = np.bincount(level, used, LEVELS + 1)
        q = np.where(used, (held / np.maximum(bins, 1))[level], 0)
        p, q = p / p.sum(), q / q.sum()
        q = np.where((p > 0) & (q <= 0), 1e-12, q)
        seen = p > 0
        return float((p[seen] * np.log(p[seen] / q[seen])).sum())


def _halved(counts: np.ndarray) -> np.ndarray:
    """Counts at twice the bin width."""
    half = counts.reshape(-1, 2).sum(axis=1)
    out = np.zeros(BINS)
    out[BINS // 4 : BINS // 4 + BINS // 2] = half
    return out


def observe(model: ir.Model, plan: Plan, calibration: Samples, batch: int = BATCH) -> dict[ir.Value, Histogram]:
    """A histogram for each class of the plan, by its first value; the model is run as it is."""
    context = Context.of(model)
    sources = {values[0]: plan.sources(values) for values in plan.classes}
    names = {v: str(v.name) for values in sources.values() for v in values}
    single = {v: Histogram() for v in names}
    for done, group in enumerate(groups := _groups(list(names), batch)):
        context.tell("activation ranges", done, len(groups))
        for values in Activations(model).stream([names[v] for v in group], calibration, batch):
            for v in group:
                try:
                    single[v].add(values[names[v]])
                except DataError as error:
                    raise DataError(error.message, names[v]) from None
    found = {}
    for first, members in sources.items():
        found[first] = single[members[0]]
        for v in members[1:]:
            found[first] += single[v]
    return found


def _groups(values: Sequence[ir.Value], batch: int) -> list[list[ir.Value]]:
    """Values that are fetched together, so that a batch of them stays below HELD bytes."""
    groups: list[list[ir.Value]] = []
    used = HELD + 1
    for v in values:
        size = 4 * batch * (int(np.prod(v.shape.numpy(), dtype=np.int64)) if v.shape is not None else 1)
        if used + size > HELD:
            groups.append([])
            used = 0
        groups[-1].append(v)
        used += size
    return groups


def ranges(
    histograms: Mapping[ir.Value, Histogram], observer: Observer, kind: Kind = "uint8", percentile: float = PERCENTILE
) -> dict[ir.Value, Range]:
    """The range of each class."""
    return {v: Range.of(*h.bounds(observer, percentile), kind) for v, h in histograms.items()}
