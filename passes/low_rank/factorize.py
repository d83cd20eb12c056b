"""Write layers as products of smaller ones: low rank, for the outputs on calibration data.

    W x  ->  U (V x),  U (V x) + S x        and the other forms of `sparsec.passes.low_rank.factor_forms`

    the numbers       closed form in the metric of the layer's inputs      `sparsec.passes.low_rank.metric`
    the forms         a knapsack on measured damage under one budget       `sparsec.passes.low_rank.rank_allocation`
    the error so far  layers are built in order and make up for it         `sparsec.passes.low_rank.factor_walk`
    the nodes         Conv, Gemm, MatMul, Add: `fc1` becomes `fc1/v`, `fc1/u`        `sparsec.passes.low_rank.factors`

Without calibration data weights alone are looked at: plain SVD, uniform ratio. `parameters`, `flops`, `latency` and `bytes` are
the share of the whole model that stays, weights counted where they are not zero. Ranks are multiples of what fills a vector
register of the target. A weight that several nodes read alike is one layer. With a target only layers whose parts are
predicted to run faster are touched; the records say of every other layer why it stays. Never changed: shapes and names of
inputs and outputs; layers that do not match, except by `repair`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from sparsec.errors import RecipeError
from sparsec.passes.layers import WEIGHTED, Selection, WeightedLayer, readers, select_layers, weighted_layers
from sparsec.passes.low_rank.decompositions import LOW_RANK, Form, Svd
from sparsec.passes.low_rank.factor_forms import Menu
from sparsec.passes.low_rank.factor_walk import walk
from sparsec.passes.low_rank.factors import Factors, refusal, replace
from sparsec.passes.low_rank.metric import Metric, Objective
from sparsec.passes.low_rank.rank_allocation import (
    UNITS,
    Way,
    Ways,
    by_damage,
    by_energy,
    dense_costs,
    look,
    mean_bias,
    measure,
    uniform,
)
from sparsec.passes.measure.statistics import Statistics, gather
from sparsec.passes.pruning.masks import Pattern
from sparsec.passes.pruning.reconstruct import RIDGE, metric
from sparsec.rewriting.passes_api import Context, Pass, PassResult, Samples

DEFAULT_PARAMETERS = 0.7
FEWEST = 4  # steps of rank that a layer should have to choose from, before ranks are multiples of a whole register


@dataclass(frozen=True)
class Factorize(Pass):
    """Write layers as products of smaller ones (low rank); with calibration data for the least error of the outputs.

    One of `parameters`, `flops`, `latency`, `bytes` (share of the model that stays; parameters=0.7 if nothing is given),
    `rank` (the same for all) and `energy` (share of each layer's output power that stays). `forms`: svd, spatial, tucker
    (the last two for kxk convolutions), sparse, monarch, cospadi, armor. `residual=sparse`: low rank plus sparse, too;
    `block`, `nm`: the pattern of sparse parts. `method`: auto is whitened with calibration data, plain without. `allocation`: auto
    is sensitivity with calibration data, uniform without. `samples`: of the calibration data, for the allocation.
    `faster`: with a target, only where the parts are predicted to run faster. `multiple`: of ranks; 0: the target's
    registers. `sequential`: build layers on the inputs that the changed model gives, and `repair` the others; `trust`,
    `ridge`, `rescale` as for prune.
    """

    name: ClassVar[str] = "factorize"

    parameters: float = 0.0
    flops: float = 0.0
    latency: float = 0.0
    bytes: float = 0.0
    rank: int = 0
    energy: float = 0.0
    forms: tuple[str, ...] = LOW_RANK
    residual: Literal["none", "sparse"] = "none"
    block: str = "1x1"
    nm: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    types: tuple[str, ...] = WEIGHTED
    method: Literal["auto", "plain", "whitened"] = "auto"
    allocation: Literal["auto", "uniform", "sensitivity"] = "auto"
    samples: int = 32
    faster: bool = True
    multiple: int = 0
    sequential: bool = True
    repair: bool = True
    ridge: float = RIDGE
    trust: Literal["auto"] | float = "auto"
    rescale: bool = False

    def __post_init__(self) -> None:
        given = [key for key in (*UNITS, "rank", "energy") if getattr(self, key)]
        if len(given) > 1:
            known = ", ".join((*UNITS, "rank", "energy"))
            raise RecipeError(f"factorize: give one of {known}, got {'+'.join(given)}")
        for key in (*UNITS, "energy"):
            if not 0 <= getattr(self, key) <= 1:
                raise RecipeError(f"factorize: {key} is a share from 0 to 1, got {getattr(self, key)}")
        if self.rank < 0 or self.multiple < 0 or self.samples < 1 or not self.ridge > 0:
            raise RecipeError("factorize: rank and multiple are at least 0, samples at least 1, ridge above 0")
        if self.trust != "auto" and not 0 <= self.trust <= 1:
            raise RecipeError(f"factorize: trust is auto or a share from 0 to 1, got {self.trust}")
        if not self.types or set(self.types) - set(WEIGHTED):
            raise RecipeError(f"factorize: types must be some of {'+'.join(WEIGHTED)}, got {'+'.join(self.types)!r}")
        if self.residual not in ("none", "sparse"):
            raise RecipeError(f"factorize: residual must be none or sparse, got {self.residual!r}")
        self._menu()
        if self.allocation == "sensitivity" and (self.rank or self.energy):
            raise RecipeError("factorize: rank and energy choose layer by layer; leave out allocation=sensitivity")

    def call(self, model: ir.Model) -> PassResult:
        context = Context.of(model)
        selection = self._select(model)
        data = context.calibration is not None and self.method != "plain"
        if self.method == "whitened" and context.calibration is None:
            raise RecipeError("factorize: method=whitened looks at activations and needs --calibration")
        found, means = self._look(model, selection.layers, context, data)
        chosen, facts = self._choose(model, found, means, context)
        if facts:
            context.records.append(facts)
        ways = {name: way for name, way in chosen.items() if way.form is not None}
        reasons = {w.layer.name: w.reason or "stays as it is within the budget" for w in found}
        reasons |= dict(selection.refused)
        if not ways:
            raise RecipeError(f"factorize: 0 of {len(found)} layers changed: {_first(reasons)}")
        before = {w.layer.name: w.dense for w in found}
        built, errors = self.build(model, ways, means, context, data)
        done: set[ir.Node] = set()
        for layer in list(weighted_layers(model)):
            if layer.name in built:
                alike = readers(layer)
                done |= {reader.node for reader in alike}
                replace(model, layer, built[layer.name])
                record = _record(layer, ways[layer.name], built[layer.name], before[layer.name])
                record |= {"readers": len(alike)} if len(alike) > 1 else {}
                context.records.append(record | errors.get(layer.name, {}))
            elif layer.node not in done:
                context.records.append({"layer": layer.name, "kept": reasons.get(layer.name, "is not matched")})
        return PassResult(model, True)

    def _select(self, model: ir.Model) -> Selection:
        selection = select_layers(model, self.include, self.exclude, self.types)
        reasons = {layer.name: refusal(layer) for layer in selection.layers}
        fitting = tuple(layer for layer in selection.layers if not reasons[layer.name])
        refused = [*selection.refused, *((name, reason) for name, reason in reasons.items() if reason)]
        selection = Selection(fitting, tuple(refused))
        selection.require()
        return selection

    def _unit(self) -> tuple[str, float]:
        """What the budget is of, and the share of it that stays."""
        unit = next((unit for unit in UNITS if getattr(self, unit)), "parameters")
        return unit, getattr(self, unit) or DEFAULT_PARAMETERS

    def _menu(self) -> Menu:
        return Menu(self.forms, self.residual == "sparse", Pattern.parse(self.block, self.nm))

    def _look(
        self, model: ir.Model, layers: Sequence[WeightedLayer], context: Context, data: bool
    ) -> tuple[list[Ways], dict[str, np.ndarray]]:
        """Every layer's ways, and E[x] of the layers whose bias takes up the mean."""
        unit, share = self._unit()
        if unit == "latency" and context.price is None:
            raise RecipeError(
                "factorize: a budget of latency needs a target to predict it for; use parameters or flops"
            )
        found, means = [], {}
        known = gather(model, layers, context.calibration) if data and context.calibration is not None else None
        for done, layer in enumerate(layers):
            context.tell(f"forms of {layer.name}", done, len(layers))
            statistics = next(known)[1] if known is not None else None
            goal = self.objective(layer, statistics)
            if statistics is not None and mean_bias(layer) is not None:
                means[layer.name] = statistics.mean
            power = goal.power or 1.0

            def build(form: Form, goal: Objective = goal, power: float = power) -> tuple[Factors, float]:
                factors = form.build(goal)
                return factors, goal.loss(factors) / power

            found.append(look(layer, self._forms(layer, share, context), build, unit, context, self.faster))
        return found, means

    def objective(self, layer: WeightedLayer, statistics: Statistics | None) -> Objective:
        """The layer alone, in the metric of its inputs."""
        if statistics is None:
            return Objective(layer.read())
        centred = mean_bias(layer) is not None
        return Objective(layer.read(), Metric(metric(statistics, centred, self.ridge)))

    def _forms(self, layer: WeightedLayer, share: float, context: Context) -> list[Form]:
        shape = layer.shape
        multiple = self.multiple or rank_multiple(shape, context)
        if self.rank:
            return [Svd(min(self.rank, shape[0], layer.size // shape[0]))]
        return self._menu().offer(shape, int(np.count_nonzero(layer.read())), multiple, (share,))

    def _choose(
        self, model: ir.Model, found: list[Ways], means: Mapping[str, np.ndarray], context: Context
    ) -> tuple[dict[str, Way], dict[str, Any]]:
        """A way for each layer, and the record of the allocation."""
        if self.rank:
            return {w.layer.name: w.ways[-1] for w in found}, {}
        if self.energy:
            return by_energy(found, self.energy), {}
        unit, share = self._unit()
        costs = dense_costs(weighted_layers(model), unit, context)
        rest = sum(costs.values()) - sum(w.dense.cost for w in found)
        budget = share * sum(costs.values()) - rest
        facts = {"budget": unit, "share": share}
        rule = self.allocation
        if rule == "auto":
            rule = "uniform" if context.calibration is None or len(found) == 1 else "sensitivity"
        if budget < 0:
            least = rest / sum(costs.values())
            text = f"{share} of the model's {unit} cannot be held: layers that are not matched are {least:.3f} of it"
            raise RecipeError(f"factorize: {text}; ask for more, or include them")
        if rule == "uniform":
            return uniform(found, budget), facts | {"allocation": rule}
        if context.calibration is None:
            raise RecipeError("factorize: allocation=sensitivity measures damage and needs --calibration")
        measured, what = measure(model, found, means, context.calibration, self.samples)
        chosen = by_damage(measured, budget)
        damage = float(f"{sum(way.damage for way in chosen.values()):.4g}")
        return chosen, facts | {
            "allocation": rule,
            "measure": what,
            "samples": self.samples,
            "predicted damage": damage,
        }

    def build(
        self, model: ir.Model, ways: Mapping[str, Way], means: Mapping[str, np.ndarray], context: Context, data: bool
    ) -> tuple[dict[str, Factors], dict[str, dict[str, Any]]]:
        """The factors of each layer, biases corrected in place, and what to say about them."""
        if data and self.sequential and context.calibration is not None:
            forms = {name: getattr(way.form, "fine", way.form) for name, way in ways.items() if way.form is not None}
            trust = None if self.trust == "auto" else self.trust
            ready, lost = self._together(model, forms, context.calibration)
            done = list(walk(model, forms, context.calibration, self.ridge, trust, self.rescale, self.repair, ready))
            errors = {b.layer.name: {"error": float(f"{b.error:.4g}"), "trust": b.trust} for b in done} | lost
            return ready | {b.layer.name: b.factors for b in done if b.factors is not None}, errors
        built = {}
        for layer in weighted_layers(model):
            way = ways.get(layer.name)
            if way is None or way.factors is None:
                continue
            factors = way.factors.rounded(layer.read().dtype)
            bias = mean_bias(layer)
            if layer.name in means and bias is not None and bias.const_value is not None:
                shift = (layer.read() - factors.dense()).reshape(layer.shape[0], -1) @ means[layer.name]
                old = bias.const_value.numpy()
                bias.const_value = ir.tensor((old + shift.reshape(old.shape)).astype(old.dtype), name=bias.name)
            built[layer.name] = factors
        return built, {name: {"error": float(f"{ways[name].loss:.4g}")} for name in built}

    def _together(
        self, model: ir.Model, forms: Mapping[str, Form], calibration: Samples
    ) -> tuple[dict[str, Factors], dict[str, dict[str, Any]]]:
        """Factors of the weights that several nodes read, for what they all read, and what to say about them."""
        shared = [layer for layer in weighted_layers(model) if layer.name in forms and len(readers(layer)) > 1]
        ready, errors = {}, {}
        for layer, statistics in gather(model, shared, calibration):
            goal = self.objective(layer, statistics)
            ready[layer.name] = forms[layer.name].build(goal).rounded(layer.read().dtype)
            share = goal.loss(ready[layer.name]) / (goal.power or 1.0)
            errors[layer.name] = {"error": float(f"{share:.4g}")}
        return ready, errors


def rank_multiple(shape: tuple[int, int, int, int], context: Context) -> int:
    """What ranks are a multiple of: the lanes of a register of the target, less for layers of few ranks; 4 or less."""
    lanes = 4 if context.target is None else int(context.target.machine.lanes)
    oc, ic, kh, kw = shape
    most = oc * ic * kh * kw // (oc + ic * kh * kw)  # ranks that save anything are below
    while lanes > 1 and most < FEWEST * lanes:
        lanes //= 2
    return lanes


def _record(layer: WeightedLayer, way: Way, factors: Factors, dense: Way) -> dict[str, Any]:
    record: dict[str, Any] = {
        "layer": layer.name, "form": factors.kind, "parameters": factors.parameters, "before": dense.parameters,
        "changed": True,
    }  # fmt: skip
    record["predicted_error"] = float(f"{way.loss:.4g}")
    if way.us is not None and dense.us is not None:
        record |= {"predicted_us": round(way.us, 3), "dense_us": round(dense.us, 3)}
    return record


def _first(reasons: Mapping[str, str]) -> str:
    counts: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        counts.setdefault(reason, []).append(name)
    ordered = sorted(counts.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{len(names)} {reason} ({', '.join(names[:3])})" for reason, names in ordered)
