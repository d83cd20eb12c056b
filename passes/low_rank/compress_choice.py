"""What each layer may become, what it costs and what it does to the model's outputs: the choices of `compress`.

    form            dense, or one of `sparsec.passes.low_rank.factor_forms`; in float32 or in int8
    cost            bytes of the smallest stored form of every part, or predicted microseconds (float32 only)
    error    e      share of the power of the layer's output that is lost, from the moments of its inputs:
                        e(f) = tr((W - f) H (W - f)^T) / tr(W H W^T)
                        e(f, int8) = e(f) + n_f q,    q = (tr((W - R) H (W - R)^T) + |W|^2 s^2 / 12) / tr(W H W^T)
    damage   d      to the model's outputs, measured with that layer alone changed (`sparsec.passes.measure.fidelity`):
                        d(f, int8) = d(f) + n_f d(dense, int8)

R is W rounded to 8 bits, s the step of the input's 8 bits over its range on the calibration data, n_f the layers of the
longest chain of f: each rounds once. Errors of the sources add, as damages of different layers do in the knapsack: additive
damages, CLADO, arXiv:2307.05657.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sparsec.passes.layers import WeightedLayer
from sparsec.passes.low_rank.decompositions import LOW_RANK, Form
from sparsec.passes.low_rank.factor_forms import Menu
from sparsec.passes.low_rank.factors import Factors
from sparsec.passes.low_rank.metric import Objective
from sparsec.passes.low_rank.rank_allocation import Way, Ways, dense_cost, look, parts_cost
from sparsec.passes.measure.fidelity import Fidelity
from sparsec.passes.measure.statistics import Statistics, input_of
from sparsec.passes.measure.trial import Part, fetch
from sparsec.passes.pruning.masks import Pattern
from sparsec.passes.quantization.grid import row_grid
from sparsec.rewriting.passes_api import Context

SHARES = (0.1, 0.15, 0.25, 0.35, 0.5, 0.7)  # of a layer's weights
METHODS = ("sparse", "low-rank", "residual", "int8")


@dataclass(frozen=True)
class Choice(Way):
    """A way in float32 or int8; `loss` is the predicted error, `damage` the measured one of this layer alone."""

    int8: bool = False

    @property
    def text(self) -> str:
        """`svd 16 + sparse 1x1 10%, int8`."""
        form = "dense" if self.factors is None else self.factors.kind
        return f"{form}, int8" if self.int8 else form


@dataclass(frozen=True)
class Rounding:
    """What 8 bits do to a layer: `error` and `damage` of the dense layer, as above."""

    error: float
    damage: float = 0.0


def offer(
    shape: tuple[int, int, int, int], size: int, methods: Sequence[str], patterns: Sequence[Pattern], multiple: int
) -> list[Form]:
    """The forms of a layer with `size` nonzero weights."""
    found: list[Form] = []
    for number, pattern in enumerate(patterns):
        names = (
            *(LOW_RANK if "low-rank" in methods and not number else ()),
            *(["sparse"] if "sparse" in methods else []),
        )
        if names:
            found += Menu(names, False, pattern).offer(shape, size, multiple, only=SHARES)
        if "residual" in methods:
            mixed = Menu(LOW_RANK, True, pattern).offer(shape, size, multiple, only=(0.15, 0.25, 0.5))
            found += [form for form in mixed if "+ sparse" in str(form)]
    return list(dict.fromkeys(found))


def float_ways(
    layer: WeightedLayer, forms: Sequence[Form], goal: Objective, context: Context, latency: bool
) -> list[Ways]:
    """The nondominated ways by cost in float32 and, for bytes, by cost in int8; every form is built once."""
    power = goal.power or 1.0
    made: dict[str, tuple[Factors, float]] = {}

    def build(form: Form) -> tuple[Factors, float]:
        if str(form) not in made:
            factors = form.build(goal)
            made[str(form)] = factors, goal.loss(factors) / power
        return made[str(form)]

    units = ("latency",) if latency else ("bytes", "int8 bytes")
    return [look(layer, forms, build, unit, context, False) for unit in units]


def merged(by_float: Ways, by_int8: Ways | None) -> Ways:
    """Every way of both once, for one measurement of damages; costs in float32."""
    if by_int8 is None:
        return by_float
    known = {str(way.form) for way in by_float.ways}
    layer = by_float.layer
    more = [
        Way(**{**vars(way), "cost": parts_cost(layer, way.factors, "bytes")})
        for way in by_int8.ways
        if way.factors is not None and str(way.form) not in known
    ]
    return Ways(layer, (*by_float.ways, *more), by_float.reason)


def choices(
    measured: Ways, by_int8: Ways | None, rounding: Rounding | None, unit: str, context: Context
) -> list[Choice]:
    """The layer's choices: its ways in float32, and in int8 where `rounding` is known."""
    found = [Choice(**{**vars(way), "int8": False}) for way in measured.ways]
    if rounding is None or by_int8 is None:
        return found
    damages = {str(way.form): way.damage for way in measured.ways}
    for way in by_int8.ways:
        steps = 1 if way.factors is None else max(len(chain) for chain in way.factors.chains)
        cost = dense_cost(measured.layer, "int8 bytes", context) if way.factors is None else way.cost
        damage, error = damages[str(way.form)] + steps * rounding.damage, way.loss + steps * rounding.error
        found.append(Choice(**{**vars(way), "cost": cost, "damage": damage, "loss": error, "int8": True}))
    return found


# ---- what 8 bits do


def rounded(layer: WeightedLayer, power: np.ndarray | None = None) -> np.ndarray:
    """The weight [OC, IC, KH, KW] in 8 bits a row. `power` [G, K]: mean squares of the inputs."""
    weight = layer.read()
    w = weight.reshape(layer.groups, len(weight) // layer.groups, -1).astype(np.float64)
    return np.where(w != 0, row_grid(w, power).round(w), 0.0).reshape(weight.shape)


def input_steps(names: Sequence[str], samples: Sequence[Mapping[str, np.ndarray]], model: ir.Model) -> dict[str, float]:
    """The step of 256 levels over the range of each value on `samples`, zero included."""
    low, high = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for sample in samples:
        for name, value in fetch(model, names, [sample])[0].items():
            low[name], high[name] = min(low[name], float(value.min())), max(high[name], float(value.max()))
    return {name: (high[name] - low[name]) / 255 for name in names}


def rounding_error(layer: WeightedLayer, statistics: Statistics, step: float) -> float:
    """q of the head of this file."""
    gram = statistics.gram.reshape(layer.groups, *statistics.gram.shape[-2:])
    weight = layer.read()
    w = weight.reshape(layer.groups, len(weight) // layer.groups, -1).astype(np.float64)
    d = w - rounded(layer, np.diagonal(gram, axis1=1, axis2=2)).reshape(w.shape)
    power = float(np.einsum("gnk,gkl,gnl->", w, gram, w, optimize=True))
    lost = float(np.einsum("gnk,gkl,gnl->", d, gram, d, optimize=True)) + float((w**2).sum()) * step**2 / 12
    return lost / power if power > 0 else 0.0


def rounding_damage(
    model: ir.Model, layer: WeightedLayer, step: float, picked: Sequence[Mapping[str, np.ndarray]],
    outputs: Sequence[np.ndarray], fidelity: Fidelity,
) -> float:  # fmt: skip
    """Damage of the layer alone with weights and inputs in 8 bits. Nodes beside it that read its input read it rounded, too."""
    part = Part(model, [str(layer.weight.name)])
    fed = fetch(model, part.inputs, picked)
    name = str(input_of(layer).name)
    if step > 0:
        fed = [{**f, name: (np.rint(f[name] / step) * step).astype(f[name].dtype)} if name in f else f for f in fed]
    stored = {str(layer.weight.name): layer.stored(rounded(layer).astype(layer.read().dtype))}
    changed = list(outputs)
    for index, y in zip(part.outputs, part.run(stored, fed), strict=True):
        changed[index] = y
    return float(fidelity.damages(changed).mean())
