"""Quantize to int8: weights symmetric per output channel, activations per tensor, as standard QDQ ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from sparsec.errors import RecipeError
from sparsec.passes.fold_constants import remove_unused_initializers
from sparsec.passes.layers import WEIGHTED
from sparsec.passes.quant_fallback import LIMIT, Fallback, Trial, costs_of, fall_back, fall_back_within
from sparsec.passes.quant_graph import Plan, Range, insert, plan, store_weight
from sparsec.passes.quant_layers import How, add_biases, nearest, round_layers
from sparsec.passes.quant_ranges import PERCENTILE, Observer, observe, ranges
from sparsec.passes.quant_weights import Rounding, Scales
from sparsec.passes.trial import pick_samples
from sparsec.passes_api import Context, Pass, PassResult

FALLBACK_SAMPLES = 32


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantize weights and activations to int8 with calibration data (standard QDQ)."""

    name: ClassVar[str] = "quantize"

    observer: Observer = "mse"
    percentile: float = PERCENTILE
    activations: Literal["uint8", "int8"] = "uint8"
    outputs: Literal["float", "int8"] = "float"
    rounding: Rounding = "descent"
    scales: Scales = "mse"
    correct: bool = True
    trust: Literal["auto"] | float = "auto"
    samples: int = 128
    fallback: Literal["auto", "none"] | float = "auto"
    damage: float = LIMIT
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    types: tuple[str, ...] = WEIGHTED

    def call(self, model: ir.Model) -> PassResult:
        context = Context.of(model)
        if context.calibration is None:
            raise RecipeError("quantize: int8 activations need --calibration")
        samples = pick_samples(model, context.calibration, self.samples)
        chosen = self._plan(model)
        if self.correct and add_biases(model, chosen):
            chosen = self._plan(model)
        found = ranges(observe(model, chosen, samples), self.observer, self.activations, self.percentile)
        named = {str(v.name): found[values[0]] for values in chosen.classes for v in values}
        back = self._fall_back(model, chosen, named, samples, context)
        if back is not None:
            context.records.append({"float": list(back.floats), "before": back.before, "after": back.after})
            if back.floats:
                chosen = self._plan(model, back.floats)
                found = {values[0]: named[str(values[0].name)] for values in chosen.classes}
        every = {v: found[values[0]] for values in chosen.classes for v in values}
        insert(model, chosen, found)
        how = How(self.rounding, self.scales, self.correct, self.trust)
        if self.rounding == "nearest" and not self.correct:
            done = [nearest(step, every[step.inputs[0]], self.scales) for step in chosen.layers]
        else:
            done = list(round_layers(model, chosen, every, context.original, samples, how))
        for rounded in done:
            layer = rounded.step.layer
            store_weight(model, rounded.step, rounded.q, rounded.scale, every[rounded.step.inputs[0]].scale)
            context.records.append({"layer": layer.name, "error": rounded.error, "trust": rounded.trust})
        remove_unused_initializers(model.graph)
        return PassResult(model, True)

    def _plan(self, model: ir.Model, floats: Sequence[str] = ()) -> Plan:
        return plan(model, self.include, self.exclude, self.types, self.outputs == "int8", floats)

    def _fall_back(
        self, model: ir.Model, chosen: Plan, named: Mapping[str, Range], samples: Sequence[Any], context: Context
    ) -> Fallback | None:
        if self.fallback == "none":
            return None
        trial = Trial(model, self._plan, named, spread(samples, FALLBACK_SAMPLES), self.scales)
        layers = [step.layer for step in chosen.layers if step.layer is not None]
        if self.fallback == "auto":
            return fall_back(trial, [layer.name for layer in layers], self.damage, context.tell)
        return fall_back_within(trial, costs_of(model, layers, context.price), self.fallback, context.tell)


def spread(samples: Sequence[Any], count: int) -> list[Any]:
    """`count` of the samples, evenly spread."""
    return [
        samples[i] for i in np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int))
    ]
