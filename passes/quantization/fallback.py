"""Which layers stay float: measured, on calibration data, by what each does to the model's outputs when quantized.

    d_l = D(f, f_l)     f_l: the model with layer l alone quantized (weights to nearest), D of `sparsec.passes.measure.fidelity`;
                        behind passes that changed f0 to f: D(f0, f_l) - D(f0, f) if that is less

    auto       if the whole model quantized, weights rounded with data, damages more than `limit`, the layers of largest
               d_l go back to float, one more at a time (bisected), until it does not
    a share    at most that share of the multiply-adds (of the target's microseconds, where there is a target) is left
               float: the set of layers whose d_l add up to the most (`sparsec.passes.measure.knapsack`)

Typical for the first: spectrograms inside a model, whose logarithm makes small numbers matter that a linear grid of 256
steps cannot hold. Mixed precision by measured sensitivity: HAWQ, arXiv:1905.03696; additive damages: CLADO,
arXiv:2307.05657.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from sparsec.passes.layers import WeightedLayer, weighted_layers
from sparsec.passes.measure.fidelity import Fidelity
from sparsec.passes.measure.knapsack import Level, knapsack
from sparsec.passes.measure.segments import Segment, batches
from sparsec.passes.measure.trial import reference_outputs
from sparsec.passes.quantization.graph import Plan, Range, insert
from sparsec.passes.quantization.grid import Scales
from sparsec.passes.quantization.rounding import nearest
from sparsec.rewriting.passes_api import Samples

LIMIT = 0.02  # nats of KL, or of relative square error

Planner = Callable[[ir.Model, Sequence[str]], Plan]  # the plan of a model with these layers left float
Apply = Callable[[ir.Model, Sequence[str]], bool]  # quantize a copy but for these layers; whether anything was
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Fallback:
    """`floats`: names of the layers that stay float, in graph order; `damages`: d_l of those measured; the whole model's
    damage with every layer quantized (`before`) and without these (`after`), weights rounded to nearest."""

    floats: tuple[str, ...]
    damages: Mapping[str, float] = field(repr=False)
    before: float
    after: float


def in_int8(planner: Planner, ranges: Mapping[str, Range], scales: Scales = "mse") -> Apply:
    """Weights and activations in int8. `ranges`: by the name of every value that any plan may quantize."""

    def apply(model: ir.Model, floats: Sequence[str]) -> bool:
        plan = planner(model, floats)
        every = {v: ranges[str(v.name)] for values in plan.classes for v in values}
        for step in plan.layers:
            assert step.layer is not None
            rounded = nearest(step, every[step.inputs[0]], scales)
            step.layer.write((rounded.q * rounded.scale[:, None, None, None]).astype(np.float32))
        if plan.layers:
            insert(model, plan, every)
        return bool(plan.layers)

    return apply


class Trial:
    """The model with any set of its layers quantized, on `samples`.

    A damage is how far the outputs are from those of the model as it is; or, if that is less, how much further they are
    from those of `original`, the model before passes that changed it: rounding with data aims at that one, and what
    comes nearer to it is not damaged.
    """

    def __init__(self, model: ir.Model, apply: Apply, samples: Samples, original: bytes | None = None) -> None:
        self._model, self._apply, self._samples = model, apply, samples
        self._names, outputs = reference_outputs(model, list(samples))
        self._fidelity = Fidelity(self._names, outputs)
        self._goal, self._start = None, 0.0
        if original is not None:
            goal = ir.from_proto(onnx.load_model_from_string(original))
            self._goal = Fidelity(self._names, reference_outputs(goal, list(samples))[1])
            self._start = float(self._goal.damages(outputs).mean())

    def damage(self, floats: Sequence[str]) -> float:
        """Mean damage with the layers `floats` left alone."""
        copy = ir.from_proto(ir.to_proto(self._model))
        return self.damage_of(copy) if self._apply(copy, floats) else 0.0

    def damage_of(self, model: ir.Model) -> float:
        """Mean damage of a model with the same outputs."""
        segment = Segment(model, None, self._names)
        parts = [segment.run(batch) for batch in batches(self._samples)]
        outputs = [np.concatenate([p[n] for p in parts]) for n in self._names]
        apart = float(self._fidelity.damages(outputs).mean())
        if self._goal is None:
            return apart
        return min(apart, max(float(self._goal.damages(outputs).mean()) - self._start, 0.0))


def alone(trial: Trial, layers: Sequence[str], tell: Tell | None = None) -> dict[str, float]:
    """d_l of each layer."""
    found = {}
    for done, name in enumerate(layers):
        if tell is not None:
            tell(f"sensitivity {name}", done, len(layers))
        found[name] = trial.damage([other for other in layers if other != name])
    return found


def fall_back(trial: Trial, layers: Sequence[str], limit: float = LIMIT, tell: Tell | None = None) -> Fallback:
    """The fewest layers, the most harmful first, without which the damage is at most `limit`."""
    before = trial.damage(())
    if before <= limit:
        return Fallback((), {}, before, before)
    damages = alone(trial, layers, tell)
    worst = sorted(layers, key=lambda name: -damages[name])
    low, high, after = 0, 1, math.inf  # `low` float layers are too few; `high` is tried, doubled until it is enough
    while high < len(worst) and (after := trial.damage(worst[:high])) > limit:
        low, high = high, min(2 * high, len(worst))
    if high == len(worst):
        after = trial.damage(worst)
    while high - low > 1:
        middle = (low + high) // 2
        damage = trial.damage(worst[:middle])
        if damage <= limit:
            high, after = middle, damage
        else:
            low = middle
    chosen = set(worst[:high])
    return Fallback(tuple(name for name in layers if name in chosen), damages, before, after)


def fall_back_within(trial: Trial, costs: Mapping[str, float], share: float, tell: Tell | None = None) -> Fallback:
    """The layers of most damage together whose costs are at most `share` of all."""
    layers = list(costs)
    damages = alone(trial, layers, tell)
    levels = {n: (Level(0.0, 0, 0.0, damages[n]), Level(0.0, 0, costs[n], 0.0)) for n in layers}
    chosen = knapsack(levels, share * sum(costs.values()))
    floats = tuple(n for n in layers if chosen[n].cost > 0)
    return Fallback(floats, damages, trial.damage(()), trial.damage(floats))


def multiply_adds(model: ir.Model) -> dict[str, float]:
    """Of each weighted layer by name."""
    found = {}
    for layer in weighted_layers(model):
        shape = layer.node.outputs[0].shape
        positions = int(np.prod(shape.numpy(), dtype=np.int64)) // layer.shape[0] if shape is not None else 1
        found[layer.name] = float(positions * layer.size)
    return found


def costs_of(model: ir.Model, layers: Sequence[WeightedLayer], price: Callable | None) -> dict[str, float]:
    """What each layer costs in float: microseconds by `price`, or multiply-adds."""
    if price is not None:
        return {layer.name: float(price(layer, layer.read())) for layer in layers}
    counts = multiply_adds(model)
    return {layer.name: counts[layer.name] for layer in layers}
