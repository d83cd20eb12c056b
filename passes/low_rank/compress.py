"""Choose for every layer among dense, sparse, low rank and low rank plus sparse, each in float32 or int8, under one budget.

    min  sum over layers l of d_l(choice of l)      subject to      sum_l c_l(choice of l) <= budget

What a choice costs, what it is predicted to lose and what it is measured to do to the outputs, each layer alone:
`sparsec.passes.low_rank.compress_choice`; the sum: `sparsec.passes.measure.knapsack`. One table of input moments serves all forms. Then

    factors and zeros    built in graph order, each making up for the error so far        `sparsec.passes.low_rank.factor_walk`
    int8                 the pass `quantize` on the layers chosen for it, and no others

and the finished model is run beside the original on the same samples: `measured_error` of each layer's output (the errors
of the layers before it included) and the measured damage of the whole stand beside the predictions in the records, which
`sparsec inspect` prints.

Never changed: shapes and names of inputs and outputs; layers that no glob of `include` names or one of `exclude` does.

One budget for pruning and quantization: CLIP-Q, Tung & Mori 2018; sparse, low rank and quantized together: SLiM, 2024.
"""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from sparsec.errors import RecipeError
from sparsec.passes.layers import WeightedLayer, select_layers, weighted_layers
from sparsec.passes.low_rank.compress_choice import (
    METHODS,
    Choice,
    Rounding,
    choices,
    float_ways,
    input_steps,
    merged,
    offer,
    rounding_damage,
    rounding_error,
)
from sparsec.passes.low_rank.factorize import Factorize, rank_multiple
from sparsec.passes.low_rank.factors import refusal, replace
from sparsec.passes.low_rank.rank_allocation import Ways, dense_costs, mean_bias, measure
from sparsec.passes.measure.fidelity import Fidelity
from sparsec.passes.measure.knapsack import knapsack
from sparsec.passes.measure.replay import goal_of
from sparsec.passes.measure.statistics import gather, input_of
from sparsec.passes.measure.trial import fetch, pick_samples, reference_outputs
from sparsec.passes.pruning.masks import Pattern
from sparsec.passes.quantization.graph import plan
from sparsec.passes.quantization.quantize import Quantize
from sparsec.rewriting.passes_api import Context, Pass, PassResult


@dataclass(frozen=True)
class Compress(Pass):
    """Choose per layer among dense, sparse, low rank, both, in float32 or int8, under one budget of bytes or latency.

    `bytes`: share of the layers' float32 bytes that stays. `latency`: share of their predicted time, with a target;
    float32 forms only. `methods`: of sparse, low-rank, residual (both), int8; all by default. `blocks`: patterns of sparse
    parts. `samples`: of the calibration data, for damages. `include`, `exclude`: globs over node names.
    """

    name: ClassVar[str] = "compress"

    bytes: float = 0.0
    latency: float = 0.0
    methods: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ("1x1", "4x4")
    samples: int = 32
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.bytes and self.latency) or not all(0 <= share <= 1 for share in (self.bytes, self.latency)):
            raise self._no_budget()
        unknown = set(self.methods) - set(METHODS)
        if unknown:
            raise RecipeError(f"compress: methods must be some of {'+'.join(METHODS)}, got {'+'.join(self.methods)!r}")
        if self.latency and "int8" in self.methods:
            raise RecipeError("compress: int8 layers have no predicted time yet; budget bytes, or leave out int8")
        if self.samples < 1:
            raise RecipeError(f"compress: samples is at least 1, got {self.samples}")
        for block in self.blocks:
            Pattern.parse(block)

    def _no_budget(self) -> RecipeError:
        return RecipeError(
            f"compress: give one of bytes and latency, a share from 0 to 1, got {self.bytes} and {self.latency}"
        )

    def call(self, model: ir.Model) -> PassResult:
        context = Context.of(model)
        if not (self.bytes or self.latency):
            raise self._no_budget()
        if context.calibration is None:
            raise RecipeError("compress: damages are measured on activations: give --calibration DATA, no labels")
        if self.latency and context.price is None:
            raise RecipeError("compress: a budget of latency needs a target to predict it for; use bytes")
        layers = [layer for layer in weighted_layers(model) if self._named(layer)]
        if not layers:
            raise RecipeError("compress: 0 layers matched: no Conv, Gemm or MatMul with a constant weight is named")
        picked = pick_samples(model, context.calibration, self.samples)
        names, outputs = reference_outputs(model, picked)
        goals = {layer.name: str(goal_of(layer).value.name) for layer in layers}
        unit = "latency" if self.latency else "bytes"
        dense = dense_costs(layers, unit, context)
        fidelity = Fidelity(names, outputs)
        before = _values(model, list(goals.values()), picked)
        table = self._table(model, layers, dense, context, picked, outputs, fidelity)
        chosen = self._choose(table, sum(dense.values()))
        if all(c.factors is None and not c.int8 for c in chosen.values()):
            raise RecipeError("compress: the budget holds every layer as it is; ask for less")
        self._apply(model, chosen, context)
        after = _values(model, list(goals.values()), picked)
        _, changed = reference_outputs(model, picked)
        context.records.append({
            "budget": unit, "share": self.latency or self.bytes,
            "cost": round(sum(c.cost for c in chosen.values())), "of": round(sum(dense.values())), "measure": str(fidelity),
            "samples": len(picked), "predicted damage": _digits(sum(c.damage for c in chosen.values())),
            "measured damage": _digits(float(fidelity.damages(changed).mean())),
        })  # fmt: skip
        for name, choice in chosen.items():
            if not dense[name]:
                continue  # its weight is that of a layer before
            record = _record(name, choice, dense[name])
            goal = goals[name]
            if goal in before and goal in after and before[goal].shape == after[goal].shape:
                record["measured_error"] = _error(before[goal], after[goal])
            context.records.append(record)
        return PassResult(model, True)

    def _named(self, layer: WeightedLayer) -> bool:
        def matches(globs: Sequence[str]) -> bool:
            return any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in globs)

        return (not self.include or matches(self.include)) and not matches(self.exclude)

    def _table(
        self, model: ir.Model, layers: Sequence[WeightedLayer], dense: Mapping[str, float], context: Context,
        picked: Sequence[Any], outputs: Sequence[np.ndarray], fidelity: Fidelity,
    ) -> dict[str, list[Choice]]:  # fmt: skip
        """Every choice of every layer, by name."""
        assert context.calibration is not None
        methods = self.methods or (METHODS[:-1] if self.latency else METHODS)
        shaped = {layer.name for layer in select_layers(model, self.include, self.exclude).layers if not refusal(layer)}
        integer: set[str] = set()
        if "int8" in methods:
            alone = {layer.name for layer in layers if len(layer.weight.uses()) == 1}
            integer = {step.layer.name for step in plan(model).layers if step.layer is not None} & alone
        inputs = sorted({str(input_of(layer).name) for layer in layers if layer.name in integer})
        steps = input_steps(inputs, picked, model) if inputs else {}
        ways: dict[str, tuple[Ways, Ways | None]] = {}
        errors: dict[str, float] = {}
        means: dict[str, np.ndarray] = {}
        factorize = Factorize()
        seen = [layer for layer in layers if input_of(layer).const_value is None and dense[layer.name]]
        for done, (layer, statistics) in enumerate(gather(model, seen, context.calibration)):
            context.tell(f"forms of {layer.name}", done, len(seen))
            forms = []
            if layer.name in shaped:
                patterns = [Pattern.parse(block) for block in self.blocks]
                multiple, size = rank_multiple(layer.shape, context), int(np.count_nonzero(layer.read()))
                forms = offer(layer.shape, size, methods, patterns, multiple)
                if mean_bias(layer) is not None:
                    means[layer.name] = statistics.mean
            goal = factorize.objective(layer, statistics if layer.groups == 1 else None)
            found = float_ways(layer, forms, goal, context, bool(self.latency))
            ways[layer.name] = found[0], found[1] if len(found) > 1 else None
            if layer.name in integer:
                errors[layer.name] = rounding_error(layer, statistics, steps[str(input_of(layer).name)])
        both = [merged(*ways[layer.name]) for layer in seen]
        measured, _ = measure(model, both, means, context.calibration, self.samples)
        unit, table = "latency" if self.latency else "bytes", {}
        for done, item in enumerate(measured):
            layer, rounding = item.layer, None
            context.tell(f"int8 of {layer.name}", done, len(measured))
            if layer.name in errors:
                step = steps[str(input_of(layer).name)]
                damage = rounding_damage(model, layer, step, picked, outputs, fidelity)
                rounding = Rounding(errors[layer.name], damage)
            table[layer.name] = choices(item, ways[layer.name][1], rounding, unit, context)
        for layer in layers:
            table.setdefault(layer.name, [Choice(0.0, 0, dense[layer.name], parameters=layer.size)])
        return table

    def _choose(self, table: Mapping[str, Sequence[Choice]], total: float) -> dict[str, Choice]:
        """The choice of each layer; `total`: what they all cost as they are."""
        share, unit = self.latency or self.bytes, "latency" if self.latency else "bytes"
        least = sum(min(choice.cost for choice in ways) for ways in table.values())
        if least > share * total:
            text = f"{share:.3f} of the layers' {unit} cannot be held: the smallest choices are {least / total:.3f}"
            raise RecipeError(f"compress: {text}; ask for more, or allow more methods")
        return knapsack(table, share * total)  # type: ignore[return-value]

    def _apply(self, model: ir.Model, chosen: Mapping[str, Choice], context: Context) -> None:
        """Rewrite the model."""
        shaped = {name: choice for name, choice in chosen.items() if choice.factors is not None}
        parts = {name: [name] for name in chosen}
        if shaped:
            built, _ = Factorize().build(model, shaped, {}, context, True)
            for layer in list(weighted_layers(model)):
                if layer.name in built:
                    made = replace(model, layer, built[layer.name])
                    parts[layer.name] = [str(node.name) for node in made if node.op_type == layer.op]
        integer = [glob.escape(part) for name, choice in chosen.items() if choice.int8 for part in parts[name]]
        if integer:
            said = len(context.records)
            Quantize(include=tuple(integer), fallback="none").call(model)
            del context.records[said:]  # the layers' records are written below, one each


def _record(name: str, choice: Choice, dense: float) -> dict[str, Any]:
    return {
        "layer": name, "choice": choice.text, "cost": round(choice.cost, 3), "dense": round(dense, 3),
        "predicted_error": _digits(choice.loss), "predicted_damage": _digits(choice.damage),
        "changed": choice.factors is not None or choice.int8,
    }  # fmt: skip


def _error(before: np.ndarray, after: np.ndarray) -> float:
    """|after - before|^2 / |before|^2."""
    power = float(np.square(before, dtype=np.float64).sum())
    return _digits(float(np.square(after - before.astype(np.float64)).sum()) / power) if power > 0 else 0.0


def _values(model: ir.Model, names: Sequence[str], picked: Sequence[Any]) -> dict[str, np.ndarray]:
    """Those of `names` that the model still computes, [samples, ...]."""
    made = {str(value.name) for node in model.graph for value in node.outputs}
    there = [name for name in dict.fromkeys(names) if name in made]
    values = [fetch(model, there, [sample])[0] for sample in picked] if there else []
    return {name: np.stack([value[name] for value in values]) for name in there}


def _digits(x: float) -> float:
    return float(f"{x:.4g}")
