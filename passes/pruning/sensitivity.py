"""What it costs the model's outputs to prune one layer: measured on calibration data, at several sparsities.

    d_l(s) = mean over samples of D(f(x), f_{l,s}(x))       f: the original, f_{l,s}: with layer l alone pruned to s

D is of `sparsec.passes.measure.fidelity`: KL to the original for classifiers, relative squared error for others; no labels. Only
the nodes behind the layer are run (`sparsec.passes.measure.trial`), on values of the original that are fetched for as many
layers at once as CACHE_BYTES hold. Used as additive damages by the knapsack (`sparsec.passes.measure.knapsack`).

Sensitivity analysis before pruning: Han et al. 2015, arXiv:1506.02626; with KL: EvoPress, arXiv:2410.14649.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sparsec.passes.layers import WeightedLayer
from sparsec.passes.measure.fidelity import Fidelity
from sparsec.passes.measure.journal import Journal
from sparsec.passes.measure.knapsack import Level
from sparsec.passes.measure.trial import Part, PruneLayer, fetch, in_parallel, reference_outputs, replacement

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CACHE_BYTES = 1 << 28  # values of the original that are held at a time

Cost = Callable[[WeightedLayer, np.ndarray], float]
Tell = Callable[[str, int, int], None]
Samples = Sequence[Mapping[str, np.ndarray]]


def sensitivity(
    model: ir.Model,
    layers: Sequence[WeightedLayer],
    prune_layer: PruneLayer,
    samples: Samples,
    levels: Sequence[float] = LEVELS,
    cost: Cost | None = None,
    cost_name: str = "weights",
    journal: Journal | None = None,
    tell: Tell | None = None,
    what: str = "sensitivity",
) -> dict[str, list[Level]]:
    """Levels of each layer by name: as it is (damage 0), then at each sparsity of `levels`.

    prune_layer(layer, sparsity): the pruned weight [OC, IC, KH, KW], alone or with other initializers that change with
    it (name -> array as stored). cost(layer, weight): in the unit `cost_name`; default: nonzero weights. journal: what
    it holds is not measured again. The model is not changed.
    """
    journal = journal or Journal("", "")
    cost = cost or (lambda layer, weight: float(np.count_nonzero(weight)))
    names, outputs = reference_outputs(model, samples)
    study = _Study(Fidelity(names, outputs), outputs, samples)
    found: dict[str, list[Level]] = {}
    open_layers = []
    for layer in layers:
        known = journal.get(layer.name) or {}
        if all(_key(s) in known and cost_name in known[_key(s)]["costs"] for s in levels):
            found[layer.name] = _levels(layer, levels, known, cost, cost_name)
        else:
            open_layers.append(layer)
    done = len(layers) - len(open_layers)
    for group in _groups(model, open_layers, len(samples)):
        values = None
        for layer, part in group.layers:
            if tell is not None:
                tell(f"{what} {layer.name}", done, len(layers))
            known = dict(journal.get(layer.name) or {})
            missing = [s for s in levels if "damage" not in known.get(_key(s), {})]
            if missing and values is None and group.whole:
                values = fetch(model, group.inputs, samples)
            trials = [_Trial(s, *replacement(layer, prune_layer(layer, s))) for s in levels]
            damages = iter(study.damages(model, layer, part, [t for t in trials if t.sparsity in missing], values))
            for trial in trials:
                entry = known.setdefault(_key(trial.sparsity), {"costs": {}})
                entry["zeros"] = trial.weight.size - int(np.count_nonzero(trial.weight))
                entry["costs"] = {**entry["costs"], cost_name: cost(layer, trial.weight)}
                if trial.sparsity in missing:
                    entry["damage"] = next(damages)
            journal.put(layer.name, known)
            found[layer.name] = _levels(layer, levels, known, cost, cost_name)
            done += 1
    return {layer.name: found[layer.name] for layer in layers}


def _key(sparsity: float) -> str:
    return f"{sparsity:.6g}"


def _levels(
    layer: WeightedLayer, levels: Sequence[float], known: Mapping[str, dict], cost: Cost, cost_name: str
) -> list[Level]:
    weight = layer.read()
    zeros = layer.size - int(np.count_nonzero(weight))
    result = [Level(0.0, zeros, cost(layer, weight), 0.0)]
    for sparsity in sorted(levels):
        entry = known[_key(sparsity)]
        if sparsity > 0 and entry["zeros"] > zeros:
            result.append(Level(sparsity, entry["zeros"], entry["costs"][cost_name], entry["damage"]))
    return result


@dataclass(frozen=True)
class _Trial:
    sparsity: float
    weight: np.ndarray
    stored: dict[str, np.ndarray]


@dataclass(frozen=True)
class _Group:
    """Layers whose parts read values that are held together; `whole`: for all samples at once."""

    layers: list[tuple[WeightedLayer, Part]]
    inputs: tuple[str, ...]
    whole: bool


def _groups(model: ir.Model, layers: Sequence[WeightedLayer], samples: int) -> Iterator[_Group]:
    """Consecutive layers, as many as CACHE_BYTES allow; parts are made when their group is reached."""
    sizes = {str(v.name): _nbytes(v) for node in model.graph for v in node.outputs}
    held: list[tuple[WeightedLayer, Part]] = []
    names: dict[str, None] = {}
    for layer in layers:
        part = Part(model, [str(layer.weight.name)])
        more = {**names, **dict.fromkeys(part.inputs)}
        if held and _total(more, sizes) * samples > CACHE_BYTES:
            yield _Group(held, tuple(names), whole=_total(names, sizes) * samples <= CACHE_BYTES)
            held, more = [], dict.fromkeys(part.inputs)
        held.append((layer, part))
        names = more
    if held:
        yield _Group(held, tuple(names), whole=_total(names, sizes) * samples <= CACHE_BYTES)


def _nbytes(value: ir.Value) -> int:
    return int(np.prod(value.shape.numpy(), dtype=np.int64)) * 4 if value.shape is not None else 0


def _total(names: Mapping[str, None], sizes: Mapping[str, int]) -> int:
    return sum(sizes.get(name, 0) for name in names)  # the model's inputs are held anyway


class _Study:
    def __init__(self, fidelity: Fidelity, outputs: list[np.ndarray], samples: Samples) -> None:
        self._fidelity, self._outputs, self._samples = fidelity, outputs, samples

    def damages(
        self, model: ir.Model, layer: WeightedLayer, part: Part, trials: Sequence[_Trial], values: Samples | None
    ) -> list[float]:
        """The mean damage of each trial. `values`: what the part reads, of every sample; None: fetched in pieces."""
        count = len(self._samples)
        size = count if values is not None else max(1, count // 8)
        sums = np.zeros(len(trials))
        for start in range(0, count, size) if trials else ():
            rows = slice(start, min(start + size, count))
            fed = values if values is not None else fetch(model, part.inputs, self._samples[rows])

            def one(trial: _Trial, fed: Samples = fed, rows: slice = rows) -> float:
                if np.array_equal(trial.weight, layer.read()) and len(trial.stored) == 1:
                    return 0.0
                outputs = [y[rows] for y in self._outputs]
                for index, y in zip(part.outputs, part.run(trial.stored, fed), strict=True):
                    outputs[index] = y
                return float(self._fidelity.damages(outputs, rows).sum())

            sums += in_parallel(one, trials)
        return [float(s) / count for s in sums]
