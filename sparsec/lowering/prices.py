"""What a layer's candidates cost, and which is taken: the one measured fastest, else the cheapest predicted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparsec.kernels.base import KernelCall
from sparsec.lowering.structure import Structure
from sparsec.program import Candidate
from sparsec.tuning import Entry

SPARSE_FROM = 0.05  # share of zeros from which sparse kernels are priced at all

# Integers stay where floats are predicted to be no more than so much faster: they are a quarter of the bytes or less, and
# other layers' weights take the caches from floats, which the prediction does not see (docs/decisions/006).
KEEP = 1.33

Bound = list[tuple[KernelCall, dict[str, str]]]  # calls in order, each with the value that every role stands for


@dataclass(frozen=True)
class Way:
    """One way to run a layer and its price on one thread: a stored form, in tiles of `rows` x `vectors` vectors of `lanes`,
    `depth` terms a pass.

    Sizes are 0 where the kernel chooses its own. `form`, `tiling`: what the kernel family takes. `kept`: weights stay the
    integers that they are in the model.
    """

    kernel: str
    sparse: bool
    predicted_us: float
    form: Any = field(repr=False)
    tiling: Any = field(default=None, repr=False)
    kept: bool = False

    @property
    def tile(self) -> tuple[int, int, int, int]:
        """`rows`, `vectors`, `lanes`, `depth`."""
        tiling = self.tiling
        return (
            (0, 0, 0, 0) if tiling is None else (tiling.rows, tiling.vectors, tiling.lanes, getattr(tiling, "depth", 0))
        )


@dataclass(frozen=True)
class Prices:
    """All ways to run a layer. The layer alone: bias and epilogue, which all ways share, are not priced.

    facts: JSON that layers have in common that run alike: "op", "x_shape", "w_shape" and "stored", the percent of columns
    that each sparse form stores. weight: [outputs, products of one output]. calls: a way's calls from value "x" to "y".
    """

    facts: dict[str, Any]
    weight: np.ndarray = field(repr=False)
    structure: Structure
    ways: tuple[Way, ...]
    calls: Callable[[Way], Bound] = field(repr=False)

    def find(self, kernel: str, tile: tuple[int, int, int, int]) -> Way | None:
        """The way so described, if there is one."""
        return next((way for way in self.ways if (way.kernel, way.tile) == (kernel, tile)), None)

    @property
    def cheapest(self) -> Way:
        """The prediction's favourite."""
        return min(self.ways, key=lambda way: way.predicted_us)


def choose(prices: Prices, measured: Entry | None = None) -> tuple[Way, tuple[Candidate, ...], str]:
    """What runs the layer, the best way of each kernel for the report, and the reason."""
    best: dict[str, Way] = {}
    for way in prices.ways:
        if way.kernel not in best or way.predicted_us < best[way.kernel].predicted_us:
            best[way.kernel] = way
    chosen = _worth_keeping(prices) or prices.cheapest
    if measured is not None:
        found = prices.find(measured.choice.kernel, measured.choice.tile)
        assert found is not None, measured.choice
        chosen = best[found.kernel] = found
    ranked = sorted(best.values(), key=lambda way: way.predicted_us)
    candidates = tuple(Candidate(way.kernel, round(way.predicted_us, 3)) for way in ranked)
    return (
        chosen,
        candidates,
        _reason(prices, ranked, chosen) if measured is None else _measured_reason(prices, measured),
    )


def _worth_keeping(prices: Prices) -> Way | None:
    """The best way that keeps integers, if floats are not predicted to be KEEP times as fast or more."""
    kept = min((way for way in prices.ways if way.kept), key=lambda way: way.predicted_us, default=None)
    return kept if kept is not None and kept.predicted_us <= KEEP * prices.cheapest.predicted_us else None


def _reason(prices: Prices, ranked: list[Way], chosen: Way) -> str:
    kept = next((way for way in ranked if way.kept), None)
    if kept is not None:
        floats = next(way for way in ranked if not way.kept)
        texts = f"kept as integers {kept.predicted_us:.1f} us", f"as floats {floats.predicted_us:.1f} us"
        return f"weights {', '.join(texts if chosen.kept else texts[::-1])}"
    dense = next(way for way in ranked if not way.sparse)
    best = next((way for way in ranked if way.sparse), None)
    if best is None:
        return f"{100 * prices.structure.zeros:.1f}% zeros: below {100 * SPARSE_FROM:.0f}%, dense"
    if ranked[0].sparse:
        return f"predicted {best.predicted_us:.1f} us, dense {dense.predicted_us:.1f} us"
    return f"below break-even: dense {dense.predicted_us:.1f} us, best sparse {best.kernel} {best.predicted_us:.1f} us"


def _measured_reason(prices: Prices, entry: Entry) -> str:
    dense = {way.kernel for way in prices.ways if not way.sparse}
    reason = f"measured {entry.choice.measured_us:.1f} us"
    kept = {way.kernel for way in prices.ways if way.kept}
    if kept:
        as_kept = entry.choice.kernel in kept
        rest = entry.best(lambda kernel: (kernel in kept) != as_kept)
        texts = ("weights kept as integers", "as floats") if as_kept else ("weights as floats", "kept as integers")
        return (
            f"{texts[0]}, {reason}" if rest is None else f"{texts[0]}, {reason}, {texts[1]} {rest.measured_us:.1f} us"
        )
    if entry.choice.kernel not in dense:
        other = entry.best(lambda kernel: kernel in dense)
        return reason if other is None else f"{reason}, dense measured {other.measured_us:.1f} us"
    other = entry.best(lambda kernel: kernel not in dense)
    return reason if other is None else f"{reason}, best sparse {other.kernel} measured {other.measured_us:.1f} us"
