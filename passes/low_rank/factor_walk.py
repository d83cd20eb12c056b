"""Build the layers' factors in graph order, on the inputs that the changed model really gives.

A layer reads x of the changed model and should give y, what it gives in the original (`sparsec.passes.measure.replay`). With H the
damped moments of x and T = E[y x^T] + W R of the mixture `trust` of y and of the layer's own W x (the algebra is in
`sparsec.passes.pruning.reconstruct`), the loss of any W' is, up to a constant,

    tr((W* - W') H (W* - W')^T),       W* = T H^-1

so a form is built for W* instead of W: reduced-rank regression. trust = 0 has W* = W; trust = 1 makes up for the errors
of the layers before. `trust` is asked of held-out batches, as for pruning. The bias takes up the mean: b' = E y - W' E x.
Layers that keep their form get W* itself (`repair`).

A weight that several nodes read (the steps of a recurrence) is built before, for the inputs that all of them have in the
original: what the later ones read would depend on it.

Until the walk is over a layer's factors are held as the dense weight that they compute, so both models have one graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from sparsec.errors import DataError
from sparsec.passes.layers import WeightedLayer, weighted_layers
from sparsec.passes.low_rank.decompositions import Form
from sparsec.passes.low_rank.factors import Factors
from sparsec.passes.low_rank.metric import Metric, Objective
from sparsec.passes.measure.replay import Pairs, Replay, goal_of
from sparsec.passes.measure.statistics import input_of
from sparsec.passes.pruning.masks import supports
from sparsec.passes.pruning.reconstruct import AS_GOOD, RIDGE, TRUSTS, Problem, matched, problems, set_constant
from sparsec.rewriting.passes_api import Context, Samples


@dataclass(frozen=True)
class Built:
    """What became of a layer. `factors` None: repaired only. `error`: share of its goal's variance that is missed."""

    layer: WeightedLayer = field(repr=False)
    factors: Factors | None = field(repr=False)
    error: float
    trust: float


def walk(
    model: ir.Model,
    forms: Mapping[str, Form],
    calibration: Samples,
    ridge: float = RIDGE,
    trust: float | None = None,
    rescale: bool = False,
    repair: bool = True,
    ready: Mapping[str, Factors] | None = None,
) -> Iterator[Built]:
    """Build the forms of the layers named in `forms`; write what they compute into the layers, in place. `ready`: factors
    that are taken as they are, of weights that several nodes read."""
    context = Context.of(model)
    replay = Replay(ir.from_proto(ir.to_proto(model)), model, calibration)
    layers = list(weighted_layers(model))
    for done, layer in enumerate(layers):
        form = forms.get(layer.name)
        if ready is not None and layer.name in ready:
            layer.write(ready[layer.name].dense())
            replay.changed(layer)
            continue
        if form is None and not (repair and replay.differs(layer) and _repairable(layer)):
            continue
        context.tell(f"factorize {layer.name}", done, len(layers))
        folds, goal = replay.pairs(layer)
        built = _build(layer, form, folds, goal.bias, ridge, trust, rescale)
        replay.changed(layer)
        yield built


def _repairable(layer: WeightedLayer) -> bool:
    return layer.groups == 1 and len(layer.weight.uses()) == 1 and input_of(layer).const_value is None


def _build(
    layer: WeightedLayer, form: Form | None, folds: tuple[Pairs, Pairs], bias: ir.Value | None, ridge: float,
    trust: float | None, rescale: bool,
) -> Built:  # fmt: skip
    pairs = folds[0] + folds[1]
    if not all(np.isfinite(sums).all() for sums in (pairs.xx, pairs.yx, pairs.yy)):
        raise DataError("its activations on the calibration data are not finite", layer.name)
    weight, centred = layer.read(), bias is not None
    kept = supports(weight, True).reshape(len(weight), -1)
    if trust is None:
        trust = held_out_trust(weight, form, folds, centred, ridge, kept) if _has_goal(layer, bias) else 0.0
    part = problems(weight, pairs, centred, ridge, trust)[0]
    factors = _solution(part, form, weight.shape, kept)
    matrix = factors.dense().reshape(len(weight), -1) if isinstance(factors, Factors) else factors
    if rescale:
        scaled = matched([matrix], pairs, centred)[0]
        norms = np.linalg.norm(matrix, axis=1)
        rows = np.where(norms > 0, np.linalg.norm(scaled, axis=1) / np.where(norms > 0, norms, 1), 1.0)
        factors = factors.scaled(rows) if isinstance(factors, Factors) else factors * rows[:, None]
    if isinstance(factors, Factors):
        factors = factors.rounded(weight.dtype)
        matrix = factors.dense().reshape(len(weight), -1).astype(np.float64)
    else:
        matrix = factors
    layer.write(matrix.reshape(weight.shape).astype(weight.dtype))
    if bias is not None:
        set_constant(bias, pairs.y - matrix @ pairs.x[0])
    judge = problems(weight, pairs, centred, 0.0)[0]
    total = float((pairs.yy - pairs.y**2).sum()) if centred else float(pairs.yy.sum())
    error = float(judge.error(matrix).sum()) / total if total > 0 else 0.0
    return Built(layer, factors if isinstance(factors, Factors) else None, error, trust)


def _has_goal(layer: WeightedLayer, bias: ir.Value | None) -> bool:
    """Whether what the layer gives is its product, or that and a bias that is known."""
    return bias is not None or layer.op == "MatMul" or len(layer.node.inputs) < 3 or goal_of(layer).bias is not None


def _solution(part: Problem, form: Form | None, shape: tuple[int, ...], kept: np.ndarray) -> Factors | np.ndarray:
    """The factors, or [OC, K] of a layer that keeps its form."""
    if form is None:
        return part.full() if kept.all() else part.refit(kept)
    return form.build(Objective(part.full().reshape(shape), Metric(part.h)))


def held_out_trust(
    weight: np.ndarray, form: Form | None, folds: tuple[Pairs, Pairs], centred: bool, ridge: float, kept: np.ndarray
) -> float:
    """The least of `TRUSTS` that does as well as any on batches it was not fitted on."""
    if not (folds[0].count and folds[1].count):
        return TRUSTS[0]
    form = getattr(form, "rough", form)
    errors = np.zeros(len(TRUSTS))
    for fitted, other in (folds, folds[::-1]):
        judge = problems(weight, other, centred, 0.0)[0]
        for index, trust in enumerate(TRUSTS):
            found = _solution(problems(weight, fitted, centred, ridge, trust)[0], form, weight.shape, kept)
            matrix = found.dense().reshape(len(weight), -1) if isinstance(found, Factors) else found
            errors[index] += judge.error(matrix).sum()
    rounding = 1e-6 * float(folds[0].yy.sum() + folds[1].yy.sum())
    return TRUSTS[int(np.flatnonzero(errors <= AS_GOOD * max(errors.min(), 0.0) + rounding).min())]
