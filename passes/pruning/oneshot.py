"""Every layer pruned alone, at any sparsity, from the second moments of its own input in the model as it is.

What importance and refitting know without looking at other layers: one pass over the calibration data gathers
E[x x^T] of each layer, one trace of eliminations a layer gives scores that serve every sparsity, and the weights left
are refitted for the layer's own output,

    min over W_S of tr((W - W_0) H (W - W_0)^T),      b' = b + (W_0 - W) E[x]

This is what allocation measures, and whose scores draw the masks; `sparsec.passes.pruning.reconstruct` then refits the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sparsec.passes.layers import WeightedLayer
from sparsec.passes.measure.replay import goal_of
from sparsec.passes.measure.statistics import gather
from sparsec.passes.pruning.importance import activation_scores, second_order_scores
from sparsec.passes.pruning.masks import Pattern, draw_masks, magnitude, supports
from sparsec.passes.pruning.reconstruct import ROUGH, Problem, metric, set_constant
from sparsec.rewriting.passes_api import Context, Samples

HELD = 1 << 30  # bytes of moments kept for refits; layers beyond that are shown unrefitted


class OneShot:
    """Scores of `layers` by name, and `prune_layer` for `sparsec.passes.pruning.allocate`."""

    def __init__(
        self, model: ir.Model, layers: Sequence[WeightedLayer], calibration: Samples | None, pattern: Pattern,
        importance: str, refit: bool = True,
    ) -> None:  # fmt: skip
        self._pattern, self._refit = pattern, refit and calibration is not None
        self._text = f"{pattern} {importance} refit={refit and calibration is not None}"
        self._problems: dict[str, Problem] = {}
        self._means: dict[str, np.ndarray] = {}
        self._bias: dict[str, ir.Value] = {}
        self.scores: dict[str, np.ndarray] = {}
        if calibration is None or (importance == "magnitude" and not refit):
            self.scores = {layer.name: magnitude(layer.read()) for layer in layers}
            return
        context, held = Context.of(model), 0
        for done, (layer, statistics) in enumerate(gather(model, layers, calibration)):
            context.tell(f"importance {layer.name}", done, len(layers))
            weight, bias = layer.read(), goal_of(layer).bias
            centred = bias is not None
            h = metric(statistics, centred)
            if importance == "second-order":
                self.scores[layer.name] = second_order_scores(weight, h, pattern)
            elif importance == "activation":
                self.scores[layer.name] = activation_scores(weight, statistics.gram)
            else:
                self.scores[layer.name] = magnitude(weight)
            held += h.nbytes // 2
            # Weights that several nodes read are shown and written as they are.
            if refit and held <= HELD and len(layer.weight.uses()) == 1:
                start = weight.reshape(weight.shape[0], -1).astype(np.float32)
                h = h.astype(np.float32)
                self._problems[layer.name] = Problem(h, start @ h, start, np.zeros(len(start)))
                if bias is not None:
                    self._means[layer.name], self._bias[layer.name] = statistics.mean, bias

    def __str__(self) -> str:
        return self._text

    def mask(self, layer: WeightedLayer, sparsity: float) -> np.ndarray:
        """True where the weight stays, [OC, IC, KH, KW]."""
        support = supports(layer.read(), self._refit)
        return draw_masks([support], [self.scores[layer.name]], self._pattern, sparsity)[0] & support

    def prune_layer(self, layer: WeightedLayer, sparsity: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The layer's weight at `sparsity`, refitted alone, and its bias as stored where that changes."""
        return self._refitted(layer, self.mask(layer, sparsity), ROUGH)

    def write(self, layers: Sequence[WeightedLayer], masks: Mapping[str, np.ndarray]) -> None:
        """Mask and refit each of `layers` in place."""
        for layer in layers:
            weight, others = self._refitted(layer, masks[layer.name], None)
            layer.write(weight)
            if others:
                set_constant(self._bias[layer.name], next(iter(others.values())))

    def _refitted(
        self, layer: WeightedLayer, mask: np.ndarray, iterations: int | None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        weight = layer.read()
        problem = self._problems.get(layer.name)
        if problem is None:
            return np.where(mask, weight, np.zeros((), weight.dtype)), {}
        flat = mask.reshape(mask.shape[0], -1)
        refitted = problem.refit(flat) if iterations is None else problem.descend(flat, problem.start, iterations)
        others = {}
        bias = self._bias.get(layer.name)
        if bias is not None and bias.const_value is not None:
            old = bias.const_value.numpy()
            shift = (problem.start - refitted) @ self._means[layer.name]
            others[str(bias.name)] = (old + shift.reshape(old.shape)).astype(old.dtype)
        return refitted.reshape(weight.shape).astype(weight.dtype), others
