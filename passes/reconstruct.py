"""Refit the weights that are left, layer by layer, against the original's outputs on the pruned model's inputs.

A layer with goals y and inputs x (`sparsec.passes.replay`) solves, for every row w with support S,

    min over w_S, b   E (y - w_S x_S - b)^2 + sum_j r_j (w_j - v_j)^2          r = ridge * E[x_j^2], v the original row

whose solution is a linear system with H = cov(x) + diag(r) and T = cov(y, x) + v diag(r):

    w_S = T_S (H_SS)^-1,      b = E y - w E x

The ridge pulls towards the original weights, not towards zero: where the data says nothing, nothing changes. R rows of a
block row share S and one Cholesky factor. Layers follow in graph order: each sees the inputs that the pruned layers
before it really give, and repairs what it can, layers that are not pruned themselves included (depthwise, classifier).

Prune and grow: with the exact optimum of S at hand, Z = (H_SS)^-1 and e = T - w H, the error rises by w_j^2 / Z_jj when
column j leaves S and falls by e_i^2 / (H_ii - H_iS Z H_Si) when i enters. Pairs that gain are swapped, the row is
solved again, and what did not lower the true error is undone. DSnoT (arXiv:2310.08915) swaps by a first-order measure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from sparsec.errors import DataError
from sparsec.passes.layers import WeightedLayer, weighted_layers
from sparsec.passes.replay import Pairs, Replay
from sparsec.passes.statistics import input_of
from sparsec.passes_api import Context, Samples

RIDGE = 0.01
ITERATIONS = 60  # of conjugate gradients where factors of every support would cost more
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

    def refit(self, mask: np.ndarray, height: int = 1) -> np.ndarray:
        """The optimum on `mask` [N, K]; `height` consecutive rows share their support."""
        kept = mask.mean() * mask.shape[1]
        direct = len(mask) / height * (0.7 * kept**3 + height * kept**2)
        if direct > 2 * ITERATIONS * mask.shape[0] * mask.shape[1] ** 2:
            return self.descend(mask, np.where(mask, self.start, 0), ITERATIONS)
        w = np.zeros(mask.shape)
        for top in range(0, len(mask), height):
            rows = slice(top, min(top + height, len(mask)))
            s = np.flatnonzero(mask[top])
            if s.size:
                w[rows, s] = np.linalg.solve(self.h[np.ix_(s, s)], self.t[rows][:, s].T).T
        return w

    def descend(self, mask: np.ndarray, w: np.ndarray, iterations: int) -> np.ndarray:
        """Conjugate gradients on all rows at once from `w`, preconditioned with the diagonal; float32 products."""
        h = self.h.astype(np.float32)
        scale = 1 / np.diagonal(self.h)
        w = np.where(mask, w, 0.0)
        r = np.where(mask, self.t - (w.astype(np.float32) @ h), 0.0)
        z = r * scale
        p, rz = z, np.einsum("nk,nk->n", r, z)
        stop = 1e-10 * np.maximum(np.einsum("nk,nk,k->n", self.t, self.t, scale), 1e-300)
        for _ in range(iterations):
            if not (rz > stop).any():
                break
            q = np.where(mask, p.astype(np.float32) @ h, 0.0)
            pq = np.einsum("nk,nk->n", p, q)
            alpha = np.where(pq > 0, rz / np.where(pq > 0, pq, 1), 0)[:, None]
            w = w + alpha * p
            r = r - alpha * q
            z = r * scale
            new = np.einsum("nk,nk->n", r, z)
            p = z + np.where(rz > 0, new / np.where(rz > 0, rz, 1), 0)[:, None] * p
            rz = new
        return w


def damp(h: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """`h` [K, K] with the ridge r [K] on its diagonal, and r: half of the input's own power, half of the mean."""
    diagonal = np.maximum(np.diagonal(h), 0)
    r = ridge * (0.5 * diagonal + 0.5 * diagonal.mean()) + FLOOR * (diagonal.mean() or 1.0)
    damped = h.copy()
    damped[np.diag_indices_from(damped)] += r
    return damped, r


def problems(weight: np.ndarray, pairs: Pairs, centred: bool, ridge: float = RIDGE) -> list[Problem]:
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
        h, r = damp(h, ridge)
        t += start[g] * r
        yy += (start[g] ** 2) @ r
        found.append(Problem(h, t, start[g], yy))
    return found


@dataclass(frozen=True)
class Refitted:
    """What became of a layer. `error`: of its goal's variance, on the calibration data, after refitting; None: not refit."""

    layer: WeightedLayer = field(repr=False)
    error: float | None


def reconstruct(
    model: ir.Model,
    masks: Mapping[str, np.ndarray],
    calibration: Samples,
    height: int = 1,
    ridge: float = RIDGE,
    others: bool = True,
) -> Iterator[Refitted]:
    """Mask the layers named in `masks` and refit them, in graph order, in place; yields each layer when it is done.

    masks: layer name -> [OC, IC, KH, KW], True where the weight stays; `height` consecutive rows share their support.
    others: refit the layers between and behind them too; zeros that such a layer has stay zeros. Weights that several
    nodes read are masked and not refitted.
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
        chosen = mask if mask is not None else weight != 0
        error = None
        if len(layer.weight.uses()) == 1 and input_of(layer).const_value is None:
            error = _refit(layer, replay, chosen, height if mask is not None else 1, ridge)
        elif mask is not None and np.any(weight[~mask] != 0):
            layer.write(np.where(mask, weight, np.zeros((), weight.dtype)))
        replay.changed(layer)
        yield Refitted(layer, error)


def _refit(layer: WeightedLayer, replay: Replay, mask: np.ndarray, height: int, ridge: float) -> float | None:
    pairs, goal = replay.pairs(layer)
    if not all(np.isfinite(sums).all() for sums in (pairs.xx, pairs.yx, pairs.yy)):
        raise DataError("its activations on the calibration data are not finite", layer.name)
    weight, centred = layer.read(), goal.bias is not None
    groups, k = pairs.x.shape
    parts = problems(weight, pairs, centred, ridge)
    kept = mask.reshape(groups, -1, k)
    rows = [part.full() if keep.all() else part.refit(keep, height) for part, keep in zip(parts, kept, strict=True)]
    error = sum(float(part.error(w).sum()) for part, w in zip(parts, rows, strict=True))
    refitted = np.stack(rows)
    layer.write(refitted.reshape(weight.shape).astype(weight.dtype))
    if goal.bias is not None and goal.bias.const_value is not None:
        stored = refitted.astype(weight.dtype).astype(np.float64)
        bias = pairs.y - np.einsum("gnk,gk->gn", stored, pairs.x).reshape(-1)
        set_constant(goal.bias, bias)
    total = float((pairs.yy - pairs.y**2).sum()) if centred else float(pairs.yy.sum())
    return error / total if total > 0 else 0.0


def set_constant(value: ir.Value, array: np.ndarray) -> None:
    """Give an initializer other numbers, in its own shape and type."""
    tensor = value.const_value
    assert tensor is not None
    shape = tuple(int(str(d)) for d in tensor.shape)
    stored = array.reshape(shape).astype(tensor.dtype.numpy())
    value.const_value = ir.Tensor(stored, dtype=tensor.dtype, name=value.name)
