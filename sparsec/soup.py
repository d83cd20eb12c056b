"""Average models that were retrained from one pruned model: one file, no more work at run time, the same zeros.

    w = (1/n) sum_i w_i        zero exactly where every w_i is, which is everywhere the masks say, since all masks are one

Runs of `recover` that differ in seed, rate or augmentation end in one basin when they start from the same pruned model;
their mean lies lower than each (Zimmer et al. 2023, Sparse Model Soups, arXiv:2306.16788). Averages of models with
different masks would be dense, so they are refused. A greedy soup (Wortsman et al. 2022, arXiv:2203.05482) takes the
models in the order of their own damage and keeps one only if the mean does not get worse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sparsec.errors import ModelError

Damage = Callable[[ir.Model], float]


@dataclass(frozen=True)
class Ingredients:
    """What a soup was made of: indices of the models taken; damages, if they were measured."""

    taken: tuple[int, ...]
    damages: tuple[float, ...] = ()
    damage: float | None = None


def check_alike(models: Sequence[ir.Model], names: Sequence[str]) -> None:
    """ModelError, one line, unless all are one graph with one mask. `names` are for messages."""
    if len(models) < 2:
        raise ModelError(f"a soup needs at least two models, got {len(models)}")
    first = models[0]
    graph, weights = _graph(first), _floats(first)
    for model, name in zip(models[1:], names[1:], strict=True):
        if _graph(model) != graph:
            raise ModelError(f"is another graph than {names[0]}; a soup needs models retrained from one", name)
        others = _floats(model)
        for key, tensor in others.items():
            if key not in weights or weights[key].shape != tensor.shape or weights[key].dtype != tensor.dtype:
                raise ModelError(f"constant {key!r} differs in name, shape or type from {names[0]}", name)
            if tensor.ndim > 1:
                differing = int(np.count_nonzero((tensor == 0) != (weights[key] == 0)))
                if differing:
                    text = f"the masks differ from {names[0]}: {key!r} is zero in other places, {differing} of {tensor.size}"
                    raise ModelError(f"{text}; a soup needs models that share a mask", name)


def average(models: Sequence[ir.Model], taken: Sequence[int] | None = None) -> ir.Model:
    """The mean of the models' float constants, in float64, as a new model. Call `check_alike` first."""
    chosen = [models[i] for i in (range(len(models)) if taken is None else taken)]
    result = ir.from_proto(ir.to_proto(chosen[0]))
    arrays = [_floats(model) for model in chosen]
    for name, first in arrays[0].items():
        mean = np.mean([a[name].astype(np.float64) for a in arrays], axis=0).astype(first.dtype)
        # what is zero in all stays zero by itself; a mean that underflows must not widen the mask
        mean = np.where((mean == 0) & (first != 0), first, mean) if first.ndim > 1 else mean
        value = result.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.Tensor(np.asarray(mean, order="C"), dtype=value.const_value.dtype, name=name)
    return result


def soup(
    models: Sequence[ir.Model], names: Sequence[str], damage: Damage | None = None
) -> tuple[ir.Model, Ingredients]:
    """The mean of all models; with `damage` (lower is better) the greedy soup, and what each was worth."""
    check_alike(models, names)
    if damage is None:
        return average(models), Ingredients(tuple(range(len(models))))
    damages = [damage(model) for model in models]
    order = sorted(range(len(models)), key=lambda i: (damages[i], i))
    taken, best = [order[0]], damages[order[0]]
    for index in order[1:]:
        found = damage(average(models, [*taken, index]))
        if found <= best:
            taken, best = [*taken, index], found
    return average(models, taken), Ingredients(tuple(taken), tuple(damages), best)


def _floats(model: ir.Model) -> dict[str, np.ndarray]:
    found = {}
    for name, value in model.graph.initializers.items():
        if value.const_value is not None and value.const_value.dtype.is_floating_point():
            found[name] = value.const_value.numpy()
    return found


def _graph(model: ir.Model) -> list[tuple[object, ...]]:
    """Nodes with everything but float constants; other constants by value."""
    rows: list[tuple[object, ...]] = []
    for node in model.graph:
        attributes = tuple(
            (key, ir.to_proto(a).SerializeToString(deterministic=True)) for key, a in sorted(node.attributes.items())
        )
        ends = tuple(None if v is None else v.name for v in (*node.inputs, *node.outputs))
        rows.append((node.domain, node.op_type, ends, attributes))
    for name, value in sorted(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and not tensor.dtype.is_floating_point():
            rows.append((name, tensor.numpy().tobytes()))
    return rows
