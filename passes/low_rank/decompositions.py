"""Low-rank forms of a layer: two or three smaller layers in a row.

    Svd        1 x 1 and matrices       V, then U                                        r (OC + K)
    channel    KH x KW Conv             V as KH x KW Conv to r, then U as 1 x 1          r (OC + IC KH KW)
    Spatial    KH x KW Conv             KH x 1 to r, then 1 x KW                         r (IC KH + OC KW)
    Tucker     KH x KW Conv             1 x 1 to a, core KH x KW to r, then 1 x 1        a IC + a r KH KW + r OC

Svd is the closed form of `sparsec.passes.low_rank.metric`; the channel decomposition is the same with a K of several pixels, and as
exact. U is orthonormal, so that rounding errors of the values between reach the output as they are. The other two begin
with an SVD in a marginal metric (H summed over the kernel positions that the first factor does not see),

    Spatial    W as [(OC KW), (IC KH)],   H~[(i, a), (j, b)] = sum over c of H[(i, a, c), (j, b, c)]
    Tucker     U^T W as [(r KH KW), IC],  H~[i, j] = sum over a, c of H[(i, a, c), (j, a, c)]        U from Svd

and then solve, in the true metric, for the factors behind the first.

Channel: Denton et al. 2014, arXiv:1404.0736; Zhang et al. 2015, arXiv:1505.06798. Spatial: Jaderberg et al. 2014,
arXiv:1405.3866. Tucker-2: Kim et al. 2015, arXiv:1511.06530.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sparsec.passes.low_rank.factors import Factors
from sparsec.passes.low_rank.metric import Objective, Spectrum

Shape = tuple[int, int, int, int]  # OC, IC, KH, KW


class Form(Protocol):
    """One way to write a layer, sizes decided: `build` finds the numbers."""

    def __str__(self) -> str: ...

    def build(self, goal: Objective) -> Factors:
        """The best factors of this form that its method finds; float64."""
        ...

    def parameters(self, shape: Shape) -> int:
        """Weights that are stored."""
        ...


@dataclass(frozen=True)
class Svd:
    """V [r, IC, KH, KW], then U [OC, r, 1, 1]."""

    rank: int

    def __str__(self) -> str:
        return f"svd {self.rank}"

    def parameters(self, shape: Shape) -> int:
        """r (OC + IC KH KW)."""
        oc, ic, kh, kw = shape
        return self.rank * (oc + ic * kh * kw)

    def build(self, goal: Objective) -> Factors:
        """The closed form."""
        u, v = goal.spectrum.factors(self.rank)
        v = v.reshape(-1, *goal.shape[1:])
        return Factors(str(self), ((("v", v), ("u", u[:, :, None, None])),))


@dataclass(frozen=True)
class Spatial:
    """V [r, IC, KH, 1], then U [OC, r, 1, KW]."""

    rank: int

    def __str__(self) -> str:
        return f"spatial {self.rank}"

    def parameters(self, shape: Shape) -> int:
        """r (IC KH + OC KW)."""
        oc, ic, kh, kw = shape
        return self.rank * (ic * kh + oc * kw)

    def build(self, goal: Objective) -> Factors:
        """SVD in the marginal metric for V, then U in the true one."""
        oc, ic, kh, kw = goal.shape
        rows = goal.matrix.reshape(goal.shape).transpose(0, 3, 1, 2).reshape(oc * kw, ic * kh)
        _, v = Spectrum.of(rows, goal.metric.marginal((ic, kh, kw), (0, 1))).factors(self.rank)
        rank = len(v)
        # What U reads: every row of V at every kw, as a linear map of the patch.
        seen = np.einsum("rih,wu->rwihu", v.reshape(rank, ic, kh), np.eye(kw)).reshape(rank * kw, -1)
        u = goal.metric.behind(goal.matrix, seen)
        return Factors(str(self), ((("v", v.reshape(rank, ic, kh, 1)), ("u", u.reshape(oc, rank, 1, kw))),))


@dataclass(frozen=True)
class Tucker:
    """V [a, IC, 1, 1], core [r, a, KH, KW], then U [OC, r, 1, 1]."""

    inner: int
    rank: int

    def __str__(self) -> str:
        return f"tucker {self.inner}+{self.rank}"

    def parameters(self, shape: Shape) -> int:
        """a IC + a r KH KW + r OC."""
        oc, ic, kh, kw = shape
        return self.inner * ic + self.inner * self.rank * kh * kw + self.rank * oc

    def build(self, goal: Objective) -> Factors:
        """U^T W from the closed form, V in the marginal metric, then the core and U in the true one."""
        _, ic, kh, kw = goal.shape
        _, mixed = goal.spectrum.factors(self.rank)
        rank = len(mixed)
        columns = mixed.reshape(rank, ic, kh * kw).transpose(0, 2, 1).reshape(-1, ic)
        _, v = Spectrum.of(columns, goal.metric.marginal((ic, kh, kw), (0,))).factors(self.inner)
        v = v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-300)
        seen = np.einsum("ai,pq->apiq", v, np.eye(kh * kw)).reshape(len(v) * kh * kw, -1)
        core = goal.metric.behind(mixed, seen)
        u = goal.metric.behind(goal.matrix, core @ seen)
        chain = (("v", v[:, :, None, None]), ("core", core.reshape(rank, -1, kh, kw)), ("u", u[:, :, None, None]))
        return Factors(str(self), (chain,))


LOW_RANK = ("svd", "spatial", "tucker")


def low_rank_forms(shape: Shape, budget: float, multiple: int, kinds: tuple[str, ...] = LOW_RANK) -> Iterator[Form]:
    """Of each kind the form of largest rank with at most `budget` parameters; ranks are multiples of `multiple`."""
    oc, ic, kh, kw = shape

    def rank(each: int, limit: int) -> int:
        return min(int(budget // each) // multiple * multiple, limit)

    if "svd" in kinds and (r := rank(oc + ic * kh * kw, min(oc, ic * kh * kw))) > 0:
        yield Svd(r)
    if kh == 1 and kw == 1:
        return
    if "spatial" in kinds and kh > 1 and kw > 1 and (r := rank(ic * kh + oc * kw, min(ic * kh, oc * kw))) > 0:
        yield Spatial(r)
    if "tucker" in kinds and (form := _tucker(shape, budget, multiple)) is not None:
        yield form


def _tucker(shape: Shape, budget: float, multiple: int) -> Tucker | None:
    """Equal shares of IC and OC, as large as the budget allows."""
    oc, ic, _, _ = shape
    best = None
    for step in range(1, 101):
        a, r = (max(multiple, round(step / 100 * n / multiple) * multiple) for n in (ic, oc))
        form = Tucker(a, r)
        if a <= ic and r <= oc and form.parameters(shape) <= budget:
            best = form
    return best
