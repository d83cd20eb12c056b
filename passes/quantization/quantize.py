"""Quantize to int8, as standard ONNX with QuantizeLinear (Q) and DequantizeLinear (DQ).

    x = s (q - z)          of an activation: one s and z for the tensor, q uint8 (or int8), 0 exact
    W = s[n] q             of a weight: one s an output channel, q in -127..127, zeros stay zero
    b = s_x s[n] q         of a bias: q int32
    DQ(x), DQ(W), DQ(b) -> layer [-> Relu | Clip] -> Q

What decides the accuracy, each in a file of its own, with calibration data (activations only, no labels):

    where Q and DQ stand            `sparsec.passes.quantization.graph`
    units of channels               `sparsec.passes.quantization.equalize`
    ranges of activations           `sparsec.passes.quantization.ranges`
    layers that stay float          `sparsec.passes.quantization.fallback`
    scales and rounding of weights  `sparsec.passes.quantization.grid`
    layer after layer, bias         `sparsec.passes.quantization.rounding`
    weight-only, in groups          `sparsec.passes.quantization.weight_only`
    means without data              `sparsec.passes.quantization.moments`

A model that was pruned in the same run is rounded with its zeros held, on its own inputs, towards the outputs of the
model before pruning: what pruning lost is partly made up for while weights are rounded anyway. Never changed: shapes,
names of inputs and outputs, zeros of weights, layers that are quantized already.

Integer arithmetic: Jacob et al. 2018, arXiv:1712.05877; the whole: Nagel et al. 2021, arXiv:2106.08295.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from sparsec.errors import RecipeError
from sparsec.passes.layers import WEIGHTED, WeightedLayer, weighted_layers
from sparsec.passes.measure.trial import pick_samples
from sparsec.passes.normalization.fold_constants import remove_unused_initializers
from sparsec.passes.quantization.equalize import Equalize, equalize, scaled
from sparsec.passes.quantization.fallback import (
    LIMIT,
    Apply,
    Fallback,
    Trial,
    costs_of,
    fall_back,
    fall_back_within,
    in_int8,
)
from sparsec.passes.quantization.graph import Plan, Range, float_weights, insert, plan, store_weight
from sparsec.passes.quantization.grid import Rounding, Scales
from sparsec.passes.quantization.moments import expected_inputs
from sparsec.passes.quantization.ranges import PERCENTILE, Observer, observe, ranges
from sparsec.passes.quantization.rounding import How, Rounded, add_biases, nearest, round_layers
from sparsec.passes.quantization.weight_only import nearest_grouped, round_grouped, store_grouped
from sparsec.rewriting.passes_api import Context, Pass, PassResult

FALLBACK_SAMPLES = 32
GROUP = 64


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantize weights and activations to int8 with calibration data, or weights alone to int8 or int4.

    `weights`: auto is int8 with int8 activations; int8 or int4 keeps activations float and takes Gemm and MatMul only,
    one scale for `group` inputs, `asymmetric` with a zero point. `activations`: type of the quantized ones. `outputs`:
    whether the model's outputs are rounded to 8 bits too. `equalize`: channels across layers, by their largest weights or
    activations. `observer`: which range of an activation is covered
    (`percentile`: for that observer). `rounding`, `scales`: of weights. `correct`: biases take the shift of the mean.
    `trust`: how far layers make up for errors in front of them, 0 to 1 (auto: chosen on held-out samples). `fallback`:
    auto leaves layers float until the damage (KL of the outputs for classifiers) is at most `damage`; a share: so much of
    the multiply-adds; none: everything int8. `samples`: of the calibration data. `include`, `exclude`: globs over node
    names. `types`: operators with weights.
    """

    name: ClassVar[str] = "quantize"

    weights: Literal["auto", "int8", "int4"] = "auto"
    group: int = GROUP
    asymmetric: bool = False
    activations: Literal["uint8", "int8"] = "uint8"
    outputs: Literal["float", "int8"] = "float"
    equalize: Equalize = "none"
    observer: Observer = "mse"
    percentile: float = PERCENTILE
    rounding: Rounding = "descent"
    scales: Scales = "mse"
    correct: bool = True
    trust: Literal["auto"] | float = "auto"
    fallback: Literal["auto", "none"] | float = "auto"
    damage: float = LIMIT
    samples: int = 64
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    types: tuple[str, ...] = WEIGHTED

    def __post_init__(self) -> None:
        if self.group < 16 or self.group & (self.group - 1):
            raise RecipeError(f"quantize: group is a power of two of at least 16, got {self.group}")
        if not 0.5 < self.percentile <= 1:
            raise RecipeError(f"quantize: percentile is a share above 0.5 up to 1, got {self.percentile}")
        if self.trust != "auto" and not 0 <= self.trust <= 1:
            raise RecipeError(f"quantize: trust is auto or a share from 0 to 1, got {self.trust}")
        if not isinstance(self.fallback, str) and not 0 <= self.fallback <= 1:
            raise RecipeError(f"quantize: fallback is auto, none or a share from 0 to 1, got {self.fallback}")
        if self.samples < 1 or not self.damage >= 0:
            raise RecipeError(f"quantize: samples is above 0 and damage not below, got {self.samples}, {self.damage}")
        if self.weights == "auto" and (self.asymmetric or self.group != GROUP):
            raise RecipeError("quantize: group and asymmetric are of weight-only; add weights=int8 or weights=int4")
        unknown = [t for t in self.types if t not in WEIGHTED]
        if unknown or not self.types:
            raise RecipeError(f"quantize: types must be some of {'+'.join(WEIGHTED)}, got {'+'.join(self.types)!r}")

    def call(self, model: ir.Model) -> PassResult:
        context = Context.of(model)
        if self.weights != "auto":
            return self._weights_only(model, context)
        if context.calibration is None:
            what = "the ranges of activations are measured: give --calibration DATA (64 samples do, no labels)"
            raise RecipeError(f"quantize: {what}, or weights=int8 to quantize weights alone")
        if not any(True for _ in weighted_layers(model)) and _is_quantized(model):
            return PassResult(model, False)
        float_weights(model)
        chosen = self._plan(model)
        if not chosen.layers:
            _refuse(chosen.refused)
        samples = pick_samples(model, context.calibration, self.samples)
        factors = equalize(model, self.equalize, samples)
        original = scaled(context.original, factors) if factors and context.original is not None else context.original
        if self.correct and add_biases(model, chosen):
            chosen = self._plan(model)
        found = ranges(observe(model, chosen, samples), self.observer, self.activations, self.percentile)
        named = {str(v.name): found[values[0]] for values in chosen.classes for v in values}
        layers = [step.layer for step in chosen.layers if step.layer is not None]
        apply, back, done = in_int8(self._plan, named, self.scales), None, None
        if self.fallback == "auto":
            trial = Trial(model, apply, pick_samples(model, samples, FALLBACK_SAMPLES), context.original)
            before = after = trial.damage(())
            if before > self.damage:  # to nearest; rounding with data may do without float layers
                untouched = ir.to_proto(model)
                done = self._write(model, chosen, named, original, samples)
                after = trial.damage_of(model)
            back = Fallback((), {}, before, after)
            if after > self.damage:
                model.graph, done = ir.from_proto(untouched).graph, None
        if (back is not None and back.after > self.damage) or not isinstance(self.fallback, str):
            back = self._fall_back(model, layers, apply, samples, context)
            chosen = self._plan(model, back.floats if back is not None else ())
        if done is None:
            done = self._write(model, chosen, named, original, samples)
        context.records += [_record(r.step.layer, "int8", r.error) for r in done if r.step.layer is not None]
        context.records += [{"layer": name, "type": "float", "reason": why} for name, why in chosen.refused]
        _tell_fallback(back, context)
        return PassResult(model, True)

    def _write(
        self, model: ir.Model, chosen: Plan, named: Mapping[str, Range], original: bytes | None, samples: Sequence[Any]
    ) -> list[Rounded]:
        """Quantize activations, round and store weights, in place. `named`: ranges by value name."""
        every = {v: named[str(v.name)] for values in chosen.classes for v in values}
        insert(model, chosen, every)
        if self.rounding == "nearest" and not self.correct:
            done = [nearest(step, every[step.inputs[0]], self.scales) for step in chosen.layers]
        else:
            how = How(self.rounding, self.scales, self.correct, self.trust)
            done = list(round_layers(model, chosen, every, original, samples, how))
        for rounded in done:
            store_weight(model, rounded.step, rounded.q, rounded.scale, every[rounded.step.inputs[0]].scale)
        remove_unused_initializers(model.graph)
        return done

    def _plan(self, model: ir.Model, floats: Sequence[str] = ()) -> Plan:
        return plan(model, self.include, self.exclude, self.types, self.outputs == "int8", floats)

    def _fall_back(
        self, model: ir.Model, layers: Sequence[WeightedLayer], apply: Apply, samples: Sequence[Any], context: Context
    ) -> Fallback | None:
        if self.fallback == "none" or self.fallback == 0:
            return None
        trial = Trial(model, apply, pick_samples(model, samples, FALLBACK_SAMPLES), context.original)
        if self.fallback == "auto":
            return fall_back(trial, [layer.name for layer in layers], self.damage, context.tell)
        return fall_back_within(trial, costs_of(model, layers, context.price), self.fallback, context.tell)

    def _weights_only(self, model: ir.Model, context: Context) -> PassResult:
        layers, refused = self._matrices(model)
        if not layers and _is_quantized(model):
            return PassResult(model, False)
        if not layers:
            _refuse(refused)
        bits = 8 if self.weights == "int8" else 4
        samples, back = None, None
        if context.calibration is not None:
            samples = pick_samples(model, context.calibration, self.samples)

            def apply(copy: ir.Model, floats: Sequence[str]) -> bool:
                chosen = [layer for layer in self._matrices(copy)[0] if layer.name not in floats]
                nearest_grouped(chosen, bits, self.group, self.asymmetric, self.scales)
                return bool(chosen)

            back = self._fall_back(model, layers, apply, samples, context)
        if back is not None:
            refused += [(layer.name, "stays float") for layer in layers if layer.name in back.floats]
            layers = [layer for layer in layers if layer.name not in back.floats]
        means = expected_inputs(model) if samples is None and self.correct else None
        for grouped in round_grouped(
            model, layers, samples, bits, self.group, self.asymmetric, self.rounding, self.scales, self.correct, means
        ):
            store_grouped(model, grouped, bits, self.group, self.asymmetric)
            context.records.append(_record(grouped.layer, self.weights, grouped.error))
        remove_unused_initializers(model.graph)
        context.records += [{"layer": name, "type": "float", "reason": why} for name, why in refused]
        _tell_fallback(back, context)
        return PassResult(model, True)

    def _matrices(self, model: ir.Model) -> tuple[list[WeightedLayer], list[tuple[str, str]]]:
        """Gemm and MatMul layers, each weight once, and why others are left."""
        layers, refused, seen = [], [], set()
        for layer in weighted_layers(model):
            reason = ""
            if layer.op == "Conv" or layer.op not in self.types:
                reason = (
                    "is no Gemm or MatMul" if layer.op == "Conv" else f"has another type than {'+'.join(self.types)}"
                )
            elif any(fnmatch.fnmatchcase(layer.name, glob) for glob in self.exclude):
                reason = f"is excluded by {'+'.join(self.exclude)}"
            elif self.include and not any(fnmatch.fnmatchcase(layer.name, glob) for glob in self.include):
                reason = f"is not named by include={'+'.join(self.include)}"
            elif layer.op == "MatMul" and layer.input_index == 0:
                reason = "has its constant on the left"
            elif layer.tensor.dtype != ir.DataType.FLOAT:
                reason = f"has weights of type {layer.tensor.dtype.name}"
            elif layer.weight in seen:
                continue
            elif any(use.node.op_type != layer.op for use in layer.weight.uses()):
                reason = "shares its weight with another operator"
            if reason:
                refused.append((layer.name, reason))
            else:
                seen.add(layer.weight)
                layers.append(layer)
        return layers, refused


def _refuse(refused: Sequence[tuple[str, str]]) -> None:
    if not refused:
        raise RecipeError("0 of 0 layers matched: the model has no Conv, Gemm or MatMul with a constant weight")
    reasons: dict[str, list[str]] = {}
    for name, reason in refused:
        reasons.setdefault(reason, []).append(name)
    parts = [f"{len(names)} {reason} ({', '.join(names[:3])})" for reason, names in sorted(reasons.items())]
    raise RecipeError(f"0 of {len(refused)} layers matched: {'; '.join(parts)}")


def _is_quantized(model: ir.Model) -> bool:
    return any(node.op_type == "DequantizeLinear" for node in model.graph)


def _tell_fallback(back: Fallback | None, context: Context) -> None:
    if back is not None:
        damage = {"damage_all": _digits(back.before), "damage": _digits(back.after)}
        context.records.append({"floats": list(back.floats), **damage})


def _record(layer: WeightedLayer, kind: str, error: float | None) -> dict[str, Any]:
    record: dict[str, Any] = {"layer": layer.name, "type": kind}
    return record if error is None else {**record, "error": _digits(error)}


def _digits(x: float) -> float:
    return float(f"{x:.4g}")
