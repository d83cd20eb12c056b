"""Walk a model and its original side by side, layer by layer, and see what each layer reads and should give.

Both models have the same nodes; weights of the one change while we walk. Before node i lies a cut: the values that are
computed by then and still needed. From one cut to the next both models run as segments on every batch, so a whole walk
costs two runs over the data, however many layers there are. A cut whose values for all samples exceed `STORE` bytes is
not kept: the walk then runs again from the last one that was, and memory stays bounded. One cut is let go batch by batch
while the next is made.

A layer's goal is the original's output of that layer, behind its bias; its inputs are those of the changed model. (A
goal behind a residual sum would repair what the stream has gathered; in the runs that had it, together with no rescaling
of variances, outputs were worse.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from sparsec.passes.layers import WeightedLayer
from sparsec.passes.measure.segments import Segment, batches, value_bytes, values_of
from sparsec.passes.measure.statistics import Centred, columns, input_of, outputs, products, thinning
from sparsec.rewriting.passes_api import Samples

STORE = 3 << 28  # bytes of one cut, both models, all samples
WALK_BATCH = 8  # samples a call: patches of k x k convolutions are k*k times the activation

Batch = dict[str, np.ndarray]
T = TypeVar("T")


@dataclass(frozen=True)
class Goal:
    """Where a layer's result is compared, and the constant that is added to its product."""

    value: ir.Value = field(repr=False)
    bias: ir.Value | None = field(repr=False, default=None)


def goal_of(layer: WeightedLayer) -> Goal:
    """The layer's output; of a MatMul with a constant row added to it, the sum."""
    value, bias = layer.node.outputs[0], _own_bias(layer)
    if layer.op == "MatMul" and layer.input_index == 1:
        node, other = _added(value)
        if node is not None and other is not None and _is_bias(other, layer.shape[0]):
            value, bias = node.outputs[0], other
    return Goal(value, bias)


def _own_bias(layer: WeightedLayer) -> ir.Value | None:
    attributes, inputs = layer.node.attributes, layer.node.inputs
    if layer.op == "MatMul" or len(inputs) < 3 or inputs[2] is None or inputs[2].const_value is None:
        return None
    plain = attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1.0
    return inputs[2] if plain and _is_bias(inputs[2], layer.shape[0]) else None


def _is_bias(value: ir.Value, channels: int) -> bool:
    """One constant number a channel along the last axis, read by nobody else."""
    if value.const_value is None or value.is_graph_input() or value.is_graph_output() or len(value.uses()) != 1:
        return False
    shape = tuple(int(str(d)) for d in value.const_value.shape)
    return value.const_value.size == channels and shape[-1:] == (channels,)


def _added(value: ir.Value) -> tuple[ir.Node | None, ir.Value | None]:
    """The Add that alone reads `value`, and its other operand."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != "Add":
        return None, None
    node, index = uses[0].node, uses[0].idx
    return node, node.inputs[1 - index]


@dataclass
class Pairs:
    """Moments of a layer's columns x [K] and goals y [OC] over P positions, float64, per group of channels.

    `xx` [G, K, K] = mean of x x^T, `yx` [G, OC/G, K], `yy` [OC], `x` [G, K], `y` [OC]: means, not sums; `count` P.
    """

    xx: np.ndarray = field(repr=False)
    yx: np.ndarray = field(repr=False)
    yy: np.ndarray = field(repr=False)
    x: np.ndarray = field(repr=False)
    y: np.ndarray = field(repr=False)
    count: int = 0

    @classmethod
    def zeros(cls, layer: WeightedLayer) -> Pairs:
        """Nothing seen yet."""
        g, oc, k = layer.groups, layer.shape[0], int(np.prod(layer.shape[1:]))
        return cls(np.zeros((g, k, k)), np.zeros((g, oc // g, k)), np.zeros(oc), np.zeros((g, k)), np.zeros(oc))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Columns [G, K, P] and goals [OC, P], float32."""
        read, goals = Centred.of(x), Centred.of(y.reshape(x.shape[0], -1, y.shape[1]))
        self.xx += products(read, read)
        self.yx += products(goals, read)
        self.yy += np.einsum("np,np->n", y, y, dtype=np.float64)
        self.x += read.total
        self.y += goals.total.reshape(-1)
        self.count += y.shape[1]

    def __add__(self, other: Pairs) -> Pairs:
        """Both, as if seen together; of means."""
        count = self.count + other.count
        a, b = (p.count / max(count, 1) for p in (self, other))
        return Pairs(
            a * self.xx + b * other.xx, a * self.yx + b * other.yx, a * self.yy + b * other.yy,
            a * self.x + b * other.x, a * self.y + b * other.y, count,
        )  # fmt: skip

    def means(self) -> Pairs:
        """Sums divided by the count, in place."""
        for sums in (self.xx, self.yx, self.yy, self.x, self.y):
            sums /= max(self.count, 1)
        return self


class Replay:
    """The walk. `original` and `model` have the same graph; ask for layers in graph order."""

    def __init__(self, original: ir.Model, model: ir.Model, calibration: Samples, store: int = STORE) -> None:
        self._original, self._model, self._store = original, model, store
        self._calibration, self._count = calibration, len(calibration)
        self._values = values_of(model)
        self.order = {node: index for index, node in enumerate(model.graph)}
        self._first = {v.name: -1 for v in model.graph.inputs}
        self._last: dict[str | None, int] = {}
        for node, index in self.order.items():
            self._first.update({v.name: index for v in node.outputs})
            self._last.update({x.name: index for x in node.inputs if x is not None})
        self._starts = [str(v.name) for v in model.graph.inputs]
        self._kept: list[tuple[Batch, Batch]] | None = None  # of each batch: values of the original, of the model
        self._changed = False  # whether the two models differ before the cut
        self._dirty: set[int] = set()

    def changed(self, layer: WeightedLayer) -> None:
        """Say that `layer` has other weights now."""
        self._dirty.add(self.order[layer.node])

    def differs(self, layer: WeightedLayer) -> bool:
        """Whether anything before the layer has changed."""
        return any(index < self.order[layer.node] for index in self._dirty)

    def pairs(self, layer: WeightedLayer) -> tuple[tuple[Pairs, Pairs], Goal]:
        """Moments of what the layer reads in the model and what it should give, of even and of odd batches."""
        cut = self.order[layer.node]
        goal = goal_of(layer)
        names = [str(n) for n, made in self._first.items() if made < cut and self._last.get(n, -1) >= cut]
        source, value = str(input_of(layer).name), str(goal.value.name)
        folds = Pairs.zeros(layer), Pairs.zeros(layer)
        same, step = not self.differs(layer), thinning(layer, self._count)
        fits = self._bytes(names) * self._count * (1 if same else 2) <= self._store
        keep: list[tuple[Batch, Batch]] = []
        for number, (first, second) in enumerate(self._advance(names, value, same, fits)):
            folds[number % 2].add(columns(layer, second[source], step), outputs(layer, first[value], step))
            if fits:
                kept = {n: first[n] for n in names}
                keep.append((kept, kept if same else {n: second[n] for n in names}))
        if fits:
            self._kept, self._starts = keep, names
        return (folds[0].means(), folds[1].means()), goal

    def _bytes(self, names: Sequence[str]) -> float:
        """Memory of the values `names` for one sample; infinite if it is not known."""
        sizes = [value_bytes(self._values[name]) for name in names]
        return sum(math.inf if size is None else size for size in sizes)

    def _advance(self, names: Sequence[str], goal: str, same: bool, last: bool) -> Iterator[tuple[Batch, Batch]]:
        """Of each batch: the values `names` of both models, and `goal` of the original. `last`: the cut behind is not
        needed again."""
        ahead = [n for n in names if n not in self._starts]
        first = Segment(self._original, self._starts, [*ahead, goal])
        second = Segment(self._model, self._starts, ahead) if ahead and not same else None
        given: Iterable[tuple[Batch, Batch]]
        if self._kept is not None:
            given = _drained(self._kept) if last else self._kept
        else:
            given = ((batch, batch) for batch in batches(self._calibration, WALK_BATCH))
        for a, b in given:
            left = {**{n: a[n] for n in names if n in a}, **first.run(a)}
            if same:
                yield left, left
            else:
                made = second.run(b) if second is not None else {}
                yield left, {**{n: b[n] for n in names if n in b}, **made}


def _drained(items: list[T]) -> Iterator[T]:
    """The items, each forgotten when the next is asked for."""
    items.reverse()
    while items:
        yield items.pop()
