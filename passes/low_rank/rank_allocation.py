"""Which form each layer gets, so that all together hold one budget.

Layer l written as form f costs c_l(f), and stays as it is at c_l(dense). Budgets are of the whole model:

    parameters   nonzero weights            flops   nonzero weights times output positions
    latency      microseconds that the target's cost model predicts for the parts
    bytes        of the smallest stored form of each part, indices counted

A weight that several nodes read is one layer: it is stored once, its multiply-adds and its time are those of all readers.

    uniform       every layer the form of least loss among those that cost at most e * c_l(dense) (its cheapest if there is
                  none), e the largest that holds the budget; what is left of it goes to the first layers
    energy        every layer the cheapest form that loses at most 1 - energy of its output's power
    sensitivity   min sum_l d_l(f_l) subject to sum_l c_l(f_l) <= B, a knapsack (`sparsec.passes.measure.knapsack`) over d_l(f), the
                  damage to the model's outputs of layer l alone written as f, measured on calibration data
                  (`sparsec.passes.measure.fidelity`)

Forms of one layer that cost more and lose more than another are not looked at. With a target, forms whose parts would
not run faster than the layer are dropped, and the reason is kept.

Layers differ in rank: WeLore, arXiv:2407.11239; ranks by damage: ASVD, arXiv:2312.05821.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from sparsec.errors import RecipeError
from sparsec.passes.layers import WeightedLayer, readers
from sparsec.passes.low_rank.decompositions import Form
from sparsec.passes.low_rank.factor_forms import stored_bytes, stored_int8_bytes
from sparsec.passes.low_rank.factors import Factors, layers_of
from sparsec.passes.measure.fidelity import Fidelity
from sparsec.passes.measure.knapsack import Level, knapsack
from sparsec.passes.measure.replay import goal_of
from sparsec.passes.measure.statistics import input_of
from sparsec.passes.measure.trial import Part, fetch, in_parallel, pick_samples, reference_outputs
from sparsec.passes.pruning.allocate import layer_cost
from sparsec.rewriting.passes_api import Context, Samples

UNITS = ("parameters", "flops", "latency", "bytes")
BYTES = {"bytes": stored_bytes, "int8 bytes": stored_int8_bytes}
SLOWER = "no form is predicted to run faster"


@dataclass(frozen=True)
class Way(Level):
    """A layer in one form; `form` None: as it is. `sparsity`: the share of weights saved; `loss`: of the output's power."""

    form: Form | None = None
    factors: Factors | None = field(default=None, repr=False)
    parameters: int = 0
    loss: float = 0.0
    us: float | None = None


@dataclass(frozen=True)
class Ways:
    """The ways to write one layer, the dense one first, then cheapest first. `reason`: why there is no other."""

    layer: WeightedLayer = field(repr=False)
    ways: tuple[Way, ...]
    reason: str = ""

    @property
    def dense(self) -> Way:
        """The layer as it is."""
        return self.ways[0]


def parts_us(layer: WeightedLayer, factors: Factors, context: Context) -> float | None:
    """Microseconds predicted for the parts together, of all readers; None without a target."""
    price = context.price
    if price is None:
        return None
    rounded = factors.rounded(layer.read().dtype)
    return _of_readers(
        layer, lambda reader: float(sum(price(part, part.read()) for part in layers_of(reader, rounded)))
    )


def _of_readers(layer: WeightedLayer, cost: Callable[[WeightedLayer], float]) -> float:
    """The sum of `cost` over all that read the layer's weight; readers of equal shapes cost the same."""
    known: dict[tuple[str, str], float] = {}
    total = 0.0
    for reader in readers(layer):
        key = str(input_of(reader).shape), str(reader.node.attributes)
        if key not in known:
            known[key] = cost(reader)
        total += known[key]
    return total


def parts_cost(layer: WeightedLayer, factors: Factors, unit: str) -> float:
    """Nonzero weights of the parts, those times the output positions of each, or bytes stored."""
    if unit == "parameters":
        return float(factors.parameters)
    if unit in BYTES:
        return float(sum(BYTES[unit](f) for chain in factors.chains for _, f in chain))
    return _of_readers(layer, lambda reader: sum(layer_cost(p, p.read(), unit) for p in layers_of(reader, factors)))


def dense_cost(layer: WeightedLayer, unit: str, context: Context) -> float:
    """What the layer costs as it is."""
    if unit == "int8 bytes":
        return float(stored_int8_bytes(layer.read(), layer.depthwise))
    if unit in BYTES:
        return float(BYTES[unit](layer.read()))
    if unit == "parameters":
        return float(np.count_nonzero(layer.read()))
    return _of_readers(layer, lambda reader: layer_cost(reader, reader.read(), unit, context.price))


def dense_costs(layers: Iterable[WeightedLayer], unit: str, context: Context) -> dict[str, float]:
    """What each layer costs as it is, by name. Of layers that read one weight alike the first has the cost of all, the others
    none; of those that read it differently each has its own time, and the first the bytes."""
    found: dict[str, float] = {}
    stored: set[ir.Value] = set()
    counted: set[ir.Node] = set()
    for layer in layers:
        again = layer.node in counted or (unit not in ("flops", "latency") and layer.weight in stored)
        found[layer.name] = 0.0 if again else dense_cost(layer, unit, context)
        stored.add(layer.weight)
        counted |= {reader.node for reader in readers(layer)}
    return found


def look(
    layer: WeightedLayer, forms: Sequence[Form], build: Callable[[Form], tuple[Factors, float]], unit: str,
    context: Context, faster: bool,
) -> Ways:  # fmt: skip
    """Build `forms` of a layer and keep the nondominated; `build` gives factors and their loss as a share."""
    weight = layer.read()
    before = int(np.count_nonzero(weight))
    price = context.price
    us = None if price is None else _of_readers(layer, lambda reader: price(reader, weight))
    dense = Way(0.0, 0, dense_cost(layer, unit, context), 0.0, parameters=before, us=us)
    found, slower, larger = [], 0, 0
    for form in forms:
        factors, loss = build(form)
        count = factors.parameters
        if count >= before:
            larger += 1
            continue
        own = parts_us(layer, factors, context)
        if faster and own is not None and us is not None and own >= us:
            slower += 1
            continue
        cost = own if unit == "latency" and own is not None else parts_cost(layer, factors, unit)
        if cost < dense.cost:
            found.append(Way(1 - count / before, 0, cost, 0.0, form, factors, count, loss, own))
    kept: list[Way] = []
    for way in sorted(found, key=lambda w: (w.cost, w.loss)):
        if not kept or way.loss < kept[-1].loss:
            kept.append(way)
    reason = "" if kept else SLOWER if slower else "no form is smaller"
    return Ways(layer, (dense, *kept), reason)


def uniform(found: Sequence[Ways], budget: float) -> dict[str, Way]:
    """The largest share of their own cost for all layers that holds the budget; the least loss within it. What is left of
    the budget goes to the layers, in their order, that it takes to the next share."""
    above: dict[str, Way] = {}
    for percent in range(100, 0, -1):
        chosen = {ways.layer.name: _within(ways, percent / 100 * ways.dense.cost) for ways in found}
        spent = sum(way.cost for way in chosen.values())
        if spent <= budget * (1 + 1e-9):
            for name, way in above.items():
                more = way.cost - chosen[name].cost
                if spent + more <= budget * (1 + 1e-9):
                    chosen[name], spent = way, spent + more
            return chosen
        above = chosen
    stay = [ways for ways in found if len(ways.ways) == 1]
    least = sum(min(way.cost for way in ways.ways) for ways in found)
    why = f"; {len(stay)} of {len(found)} layers stay as they are ({stay[0].reason})" if stay else ""
    raise RecipeError(f"the budget of {budget:.6g} cannot be held: the smallest forms together cost {least:.6g}{why}")


def _within(ways: Ways, limit: float) -> Way:
    fitting = [way for way in ways.ways if way.cost <= limit * (1 + 1e-9)]
    return min(fitting, key=lambda w: w.loss) if fitting else min(ways.ways, key=lambda w: w.cost)


def by_energy(found: Sequence[Ways], energy: float) -> dict[str, Way]:
    """The cheapest way of each layer that keeps the share `energy` of its output's power."""
    chosen = {}
    for ways in found:
        fitting = [way for way in ways.ways if way.loss <= 1 - energy]
        chosen[ways.layer.name] = min(fitting, key=lambda w: w.cost)
    return chosen


def by_damage(found: Sequence[Ways], budget: float) -> dict[str, Way]:
    """The ways with the least sum of damages within the budget."""
    return knapsack({ways.layer.name: ways.ways for ways in found}, budget)  # type: ignore[return-value]


def measure(
    model: ir.Model, found: Sequence[Ways], means: Mapping[str, np.ndarray], calibration: Samples, samples: int
) -> tuple[list[Ways], str]:
    """The same ways with their damages, and what a damage is. `means`: E[x] [K] of layers whose bias is corrected."""
    picked = pick_samples(model, calibration, samples)
    names, outputs = reference_outputs(model, picked)
    fidelity, context = Fidelity(names, outputs), Context.of(model)
    measured = []
    for done, ways in enumerate(found):
        layer = ways.layer
        context.tell(f"damage of {layer.name}", done, len(found))
        trials = [replaced(layer, way.factors, means.get(layer.name)) for way in ways.ways if way.factors is not None]
        if not trials:
            measured.append(ways)
            continue
        part = Part(model, list(trials[0]))
        fed = fetch(model, part.inputs, picked)

        def damage(stored: Mapping[str, np.ndarray], part: Part = part, fed: list = fed) -> float:
            changed = list(outputs)
            for index, y in zip(part.outputs, part.run(stored, fed), strict=True):
                changed[index] = y
            return float(fidelity.damages(changed).mean())

        damages = in_parallel(damage, trials)
        made = [_with(way, d) for way, d in zip(ways.ways[1:], damages, strict=True)]
        measured.append(Ways(layer, (ways.dense, *made), ways.reason))
    return measured, str(fidelity)


def _with(way: Way, damage: float) -> Way:
    return Way(**{**vars(way), "damage": damage})


def mean_bias(layer: WeightedLayer) -> ir.Value | None:
    """The bias that takes up the mean of what a form loses. None where several nodes read the weight: their means differ."""
    return goal_of(layer).bias if len(readers(layer)) == 1 else None


def replaced(layer: WeightedLayer, factors: Factors, mean: np.ndarray | None) -> dict[str, np.ndarray]:
    """The layer's initializers when its weight is what `factors` compute, as stored; `mean` [K]: with the bias corrected."""
    weight = factors.dense()
    stored = {str(layer.weight.name): layer.stored(weight.astype(layer.read().dtype))}
    bias = mean_bias(layer)
    if mean is not None and bias is not None and bias.const_value is not None:
        old = bias.const_value.numpy()
        shift = (layer.read() - weight).reshape(len(weight), -1) @ mean
        stored[str(bias.name)] = (old + shift.reshape(old.shape)).astype(old.dtype)
    return stored
