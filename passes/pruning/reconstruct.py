"""Refit the weights that are left, layer by layer in graph order, on the inputs that the pruned model really gives.

A layer with original rows v, inputs x of the pruned model and goals y of the original (`sparsec.passes.measure.replay`) solves,
for every row w with support S,

    min over w_S, b   E (g - w_S x_S - b)^2 + sum_j r_j (w_j - v_j)^2,      g = v x + trust * (y - v x)

r_j = ridge * (E[x_j^2] + mean_k E[x_k^2]) / 2. That is a linear system with H = cov(x) + diag(r), T = cov(g, x) + v diag(r):

    w_S = T_S (H_SS)^-1,      b = E y - w E x

trust = 0: the layer computes again what it did, with fewer weights, and its mean is that of the original (which is bias
or BatchNorm correction). trust = 1: it also makes up for the errors of the layers before it, layers that are not pruned
themselves included. Least squares over few samples makes up for noise, too: a network of 50 layers trusted on 250
photographs reproduces these to 3e-5 in KL and others worse than before. So `trust` is asked of held-out samples, layer
by layer: of `TRUSTS` the least that serves one half of the batches as well as any, fitted on the other, both ways.
Rows of one support share one factorization.

A least-squares fit that explains a share R of a channel's variance also has only that share of it, and what follows
shrinks again: after 50 layers nothing is left. So each row is then scaled by the factor that gives its output the
variance it has in the original, w <- w sqrt(var y / var w x). The correlation with the goal, which least squares made as
large as it can be, stays. (Variances matched after merging: REPAIR, arXiv:2211.08403.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from sparsec.errors import DataError
from sparsec.passes.layers import WeightedLayer, weighted_layers
from sparsec.passes.measure.replay import Pairs, Replay
from sparsec.passes.measure.statistics import Statistics, input_of
from sparsec.passes.pruning.masks import Pattern, supports
from sparsec.passes.pruning.regrow import regrow
from sparsec.rewriting.passes_api import Context, Samples

RIDGE = 0.01
TRUSTS = (0.0, 0.1, 0.25, 0.5, 1.0)
STRETCH = 3.0  # at most, of a row, to match variances
AS_GOOD = 1.02  # a held-out error within this factor of the least is as good
SMALL = 32  # inputs up to which every trial is solved exactly
ROUGH = 20  # iterations of a refit that is only looked at
ITERATIONS = 60  # of conjugate gradients where factors of every support would cost more
NEAR = 1e-10  # squared residual of a goal of unit length that conjugate gradients leave
TINY = 1e-30  # of float32 too
ROUNDING = 2.0**-44  # of the trace: values of float32 are known no better than 2^-24
FLOOR = 1e-6  # of the mean of E[x^2]: keeps H positive definite where an input is always zero


@dataclass(frozen=True)
class Problem:
    """One group of a layer: `h` [K, K], `t` [N, K], `start` [N, K] (the original rows); centred where there is a bias."""

    h: np.ndarray = field(repr=False)
    t: np.ndarray = field(repr=False)
    start: np.ndarray = field(repr=False)
    constant: np.ndarray = field(repr=False)  # [N]: the error of w is constant - 2 t w + w h w

    def full(self) -> np.ndarray:
        """The optimum without a mask, [N, K]."""
        return np.linalg.solve(self.h, self.t.T).T

    def error(self, w: np.ndarray) -> np.ndarray:
        """The objective of each row, [N]."""
        return self.constant + np.einsum("nk,nk->n", w @ self.h - 2 * self.t, w)

    def refit(self, mask: np.ndarray) -> np.ndarray:
        """The optimum on `mask` [N, K]; neighbouring rows of one support share a factor."""
        starts = np.flatnonzero(np.r_[True, (mask[1:] != mask[:-1]).any(axis=1)])
        kept = mask.mean() * mask.shape[1]
        direct = len(starts) * 0.7 * kept**3 + len(mask) * kept**2
        if direct > 2 * ITERATIONS * mask.shape[0] * mask.shape[1] ** 2:
            return self.descend(mask, np.where(mask, self.start, 0), ITERATIONS)
        w = np.zeros(mask.shape)
        for top, bottom in zip(starts, np.r_[starts[1:], len(mask)], strict=True):
            rows, s = slice(top, bottom), np.flatnonzero(mask[top])
            if s.size:
                w[rows, s] = np.linalg.solve(self.h[np.ix_(s, s)], self.t[rows][:, s].T).T
        return w

    def descend(self, mask: np.ndarray, w: np.ndarray, iterations: int) -> np.ndarray:
        """Conjugate gradients on all rows at once from `w`, in float32, with H scaled to a unit diagonal and every goal
        to unit length."""
        root = 1 / np.sqrt(np.diagonal(self.h))
        goal = self.t * root
        size = np.linalg.norm(goal, axis=1, keepdims=True)
        unit = np.where(size > TINY, size, 1.0) * root  # a dead channel has no goal
        h = (self.h * root * root[:, None]).astype(np.float32)
        keep = mask.astype(np.float32)
        x = (np.where(mask, w, 0.0) * (1 / unit)).astype(np.float32)
        r = ((self.t * (root**2 / unit)).astype(np.float32) - x @ h) * keep
        p, step, rr = r.copy(), np.empty_like(r), np.einsum("nk,nk->n", r, r)
        for _ in range(iterations):
            if not (rr > NEAR).any():
                break
            q = p @ h
            q *= keep
            pq = np.einsum("nk,nk->n", p, q)
            alpha = np.where(pq > 0, rr / np.where(pq > 0, pq, 1), 0)[:, None]
            x += np.multiply(p, alpha, out=step)
            r -= np.multiply(q, alpha, out=step)
            new = np.einsum("nk,nk->n", r, r)
            p *= np.where(rr > 0, new / np.where(rr > 0, rr, 1), 0)[:, None]
            p += r
            rr = new
        return x * unit


def damp(h: np.ndarray, ridge: float, least: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """`h` [K, K] with the ridge r [K] on its diagonal, and r: half of the input's own power, half of the mean; r >= `least`."""
    diagonal = np.maximum(np.diagonal(h), 0)
    r = ridge * (0.5 * diagonal + 0.5 * diagonal.mean()) + FLOOR * (diagonal.mean() or 1.0)
    r = np.maximum(r, least)
    damped = h.copy()
    damped[np.diag_indices_from(damped)] += r
    return damped, r


def metric(statistics: Statistics, centred: bool, ridge: float = RIDGE) -> np.ndarray:
    """H [K, K] of a layer's inputs, positive definite: of their deviations if a bias takes up the mean."""
    if not centred:
        return damp(statistics.gram, ridge)[0]
    return damp(statistics.covariance, ridge, ROUNDING * float(np.trace(statistics.gram)))[0]


def problems(
    weight: np.ndarray, pairs: Pairs, centred: bool, ridge: float = RIDGE, trust: float = 1.0
) -> list[Problem]:
    """One problem a group. `weight` [OC, IC, KH, KW]: the original's."""
    groups, k = pairs.x.shape
    start = weight.reshape(groups, -1, k).astype(np.float64)
    found = []
    for g in range(groups):
        h, t = pairs.xx[g], pairs.yx[g].copy()
        y = pairs.y.reshape(groups, -1)[g]
        yy = pairs.yy.reshape(groups, -1)[g].copy()
        if centred:
            h = h - np.outer(pairs.x[g], pairs.x[g])
            t -= np.outer(y, pairs.x[g])
            yy -= y * y
        if trust != 1:
            own = start[g] @ h
            yy = (
                (1 - trust) ** 2 * np.einsum("nk,nk->n", own, start[g])
                + trust**2 * yy
                + 2 * trust * (1 - trust) * (np.einsum("nk,nk->n", t, start[g]))
            )
            t = own + trust * (t - own)
        # Where means are large beside the deviations, these may be nothing but what rounding made of the values.
        h, r = damp(h, ridge, ROUNDING * float(np.trace(pairs.xx[g])) if centred else 0.0)
        t += start[g] * r
        yy += (start[g] ** 2) @ r
        found.append(Problem(h, t, start[g], yy))
    return found


@dataclass(frozen=True)
class Refitted:
    """What became of a layer. `error`: share of its goal's variance that is missed on the calibration data; None: not refit."""

    layer: WeightedLayer = field(repr=False)
    error: float | None = None
    trust: float | None = None


def reconstruct(
    model: ir.Model,
    masks: Mapping[str, np.ndarray],
    calibration: Samples,
    ridge: float = RIDGE,
    trust: float | None = None,
    rescale: bool = True,
    others: bool = True,
    grow: Pattern | None = None,
) -> Iterator[Refitted]:
    """Mask the layers named in `masks` and refit them, in graph order, in place; yields each layer when it is done.

    masks: layer name -> [OC, IC, KH, KW], True where the weight stays. others: refit the layers between and behind them
    too; what was pruned of such a layer stays pruned. grow: the pattern of the masks, which are then refined by swaps
    (`sparsec.passes.pruning.regrow`), except of layers that had zeros before. Weights that several nodes read are masked and not
    refitted.
    """
    context = Context.of(model)
    original = ir.from_proto(ir.to_proto(model))
    replay = Replay(original, model, calibration)
    layers = list(weighted_layers(model))
    for done, layer in enumerate(layers):
        mask = masks.get(layer.name)
        if mask is None and not (others and replay.differs(layer)):
            continue
        context.tell(f"refit {layer.name}", done, len(layers))
        weight = layer.read()
        chosen = mask if mask is not None else supports(weight, True)
        result = Refitted(layer)
        if len(layer.weight.uses()) == 1 and input_of(layer).const_value is None:
            swaps = grow if mask is not None and supports(weight, True).all() else None
            result = Refitted(layer, *_refit(layer, replay, chosen, ridge, trust, rescale, swaps))
        elif mask is not None and np.any(weight[~mask] != 0):
            layer.write(np.where(mask, weight, np.zeros((), weight.dtype)))
        replay.changed(layer)
        yield result


def _refit(
    layer: WeightedLayer, replay: Replay, mask: np.ndarray, ridge: float, trust: float | None, rescale: bool,
    grow: Pattern | None,
) -> tuple[float, float]:  # fmt: skip
    """Write the layer's weight and bias; what `Refitted` says of it."""
    folds, goal = replay.pairs(layer)
    pairs = folds[0] + folds[1]
    if not all(np.isfinite(sums).all() for sums in (pairs.xx, pairs.yx, pairs.yy)):
        raise DataError("its activations on the calibration data are not finite", layer.name)
    weight, centred = layer.read(), goal.bias is not None
    groups, k = pairs.x.shape
    kept = mask.reshape(groups, -1, k)
    if trust is None:
        trust = held_out_trust(weight, kept, folds, centred, ridge)
    parts = problems(weight, pairs, centred, ridge, trust)
    if grow is not None:
        shape = (kept.shape[1], *layer.shape[1:])
        kept = np.stack([
            regrow(keep, part.h, part.t, shape, grow) for keep, part in zip(kept, parts, strict=True)
        ])  # fmt: skip
    rows = [part.full() if keep.all() else part.refit(keep) for part, keep in zip(parts, kept, strict=True)]
    if rescale:
        rows = matched(rows, pairs, centred)
    refitted = np.stack(rows).astype(weight.dtype)
    layer.write(refitted.reshape(weight.shape))
    if goal.bias is not None:
        set_constant(goal.bias, pairs.y - np.einsum("gnk,gk->gn", refitted.astype(np.float64), pairs.x).reshape(-1))
    judges = problems(weight, pairs, centred, 0.0)
    error = sum(float(judge.error(w).sum()) for judge, w in zip(judges, rows, strict=True))
    total = float((pairs.yy - pairs.y**2).sum()) if centred else float(pairs.yy.sum())
    return (error / total if total > 0 else 0.0), trust


def matched(rows: list[np.ndarray], pairs: Pairs, centred: bool) -> list[np.ndarray]:
    """`rows` of each group, each times the factor that gives its output the goal's variance (no bias: mean square)."""
    scaled = []
    for g, w in enumerate(rows):
        y, yy = (p.reshape(len(rows), -1)[g] for p in (pairs.y, pairs.yy))
        gram = pairs.xx[g] - np.outer(pairs.x[g], pairs.x[g]) if centred else pairs.xx[g]
        power, wanted = np.einsum("nk,nk->n", w @ gram, w), yy - y * y if centred else yy
        usable = (power > 1e-9 * np.maximum(yy, 1e-30)) & (wanted > 0)
        factor = np.sqrt(np.where(usable, wanted, 1) / np.where(usable, power, 1))
        scaled.append(w * np.clip(factor, 1 / STRETCH, STRETCH)[:, None])
    return scaled


def held_out_trust(
    weight: np.ndarray, kept: np.ndarray, folds: tuple[Pairs, Pairs], centred: bool, ridge: float
) -> float:
    """The least of `TRUSTS` that does as well as any on batches it was not fitted on; `kept` [G, OC/G, K]."""
    if not (folds[0].count and folds[1].count):
        return TRUSTS[0]
    errors = np.zeros(len(TRUSTS))
    for fitted, other in (folds, folds[::-1]):
        judges = problems(weight, other, centred, 0.0)
        # The optimum is linear in the goal: two solutions give all.
        ends = [problems(weight, fitted, centred, ridge, trust) for trust in (0.0, 1.0)]
        for keep, judge, low, high in zip(kept, judges, *ends, strict=True):
            first, last = _rough(low, keep), _rough(high, keep)
            for index, trust in enumerate(TRUSTS):
                errors[index] += judge.error(first + trust * (last - first)).sum()
    rounding = 1e-6 * float(folds[0].yy.sum() + folds[1].yy.sum())
    return TRUSTS[int(np.flatnonzero(errors <= AS_GOOD * max(errors.min(), 0.0) + rounding).min())]


def _rough(problem: Problem, keep: np.ndarray) -> np.ndarray:
    if keep.shape[1] <= SMALL:
        return problem.refit(keep)
    return problem.descend(keep, problem.start, ROUGH)


def set_constant(value: ir.Value, array: np.ndarray) -> None:
    """Give an initializer other numbers, in its own shape and type."""
    tensor = value.const_value
    assert tensor is not None
    shape = tuple(int(str(d)) for d in tensor.shape)
    stored = array.reshape(shape).astype(tensor.dtype.numpy())
    value.const_value = ir.Tensor(stored, dtype=tensor.dtype, name=value.name)
