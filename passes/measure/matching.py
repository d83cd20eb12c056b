"""What two models compute alike, by name: the prefix that needs no second run and the values worth comparing.

A node n of the model agrees with the node of the original that makes values of the same names if operator, attributes
and constants are equal bit by bit and every input is a graph input or made by nodes that agree. Then its outputs are
equal for every x. The *frontier* is what agreeing nodes make and others read. A *tap* is a value behind the first
change that exists in both with one name and shape, where a weighted layer ends a bottleneck: its result is no larger
than its input, or it is what the last weighted layer reads.

Names mean what they say only while channels keep their places: compare with the model after exact passes, which permute
channels, not with the one before.

A pass that refits weights after pruning touches layers in front of the first mask too, by rounding alone. `put_back`
gives what no new zero reaches its original constants again, so that the prefix that both share is as long as it can be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sparsec.passes.layers import WeightedLayer, as_layer


@dataclass(frozen=True)
class Agreement:
    """`nodes` of the model agree with the original. `equal`: all of them do, and the models are one function."""

    nodes: frozenset[ir.Node]
    frontier: tuple[str, ...]
    taps: tuple[str, ...]
    equal: bool


def agreement(original: ir.Model, model: ir.Model) -> Agreement:
    """What `model` still computes as `original` does."""
    makers = {str(y.name): node for node in original.graph for y in node.outputs}
    same: set[str] = {str(x.name) for x in model.graph.inputs} & {str(x.name) for x in original.graph.inputs}
    agreeing: set[ir.Node] = set()
    for node in model.graph:
        other = makers.get(str(node.outputs[0].name))
        if other is not None and _agree(other, node, same):
            agreeing.add(node)
            same |= {str(y.name) for y in node.outputs}
    inputs = {str(x.name) for x in model.graph.inputs}
    read = {str(x.name) for node in model.graph if node not in agreeing for x in node.inputs if x is not None}
    ends = {str(y.name) for y in model.graph.outputs}
    frontier = sorted((same - inputs) & (read | ends))
    taps = _taps(original, model, agreeing)
    return Agreement(frozenset(agreeing), tuple(frontier), taps, ends <= same)


def put_back(original: ir.Model, model: ir.Model) -> int:
    """Restore float constants of nodes that do not descend from a layer with new zeros; how many were restored.

    Nothing is restored where no layer gained zeros, or where constants differ in shape or type.
    """
    touched: set[ir.Value] = set()
    behind: list[ir.Node] = []
    for node in model.graph:
        if any(x in touched for x in node.inputs) or _gained_zeros(original, node):
            touched |= set(node.outputs)
        else:
            behind.append(node)
    if not touched:
        return 0
    restored = 0
    free = set(behind)
    for node in behind:
        for value in node.inputs:
            source = None if value is None else original.graph.initializers.get(str(value.name))
            if value is None or value.const_value is None or source is None or source.const_value is None:
                continue
            old, new = source.const_value, value.const_value
            if old.dtype != new.dtype or old.shape != new.shape or not old.dtype.is_floating_point():
                continue
            if _equal(old, new) or any(user not in free for user, _ in value.uses()):
                continue
            value.const_value = ir.Tensor(np.array(old.numpy()), dtype=old.dtype, name=value.name)
            restored += 1
    return restored


def _gained_zeros(original: ir.Model, node: ir.Node) -> bool:
    """Whether a weighted layer is zero somewhere where the original's weight is not; True if that has another shape."""
    layer = as_layer(node)
    if not isinstance(layer, WeightedLayer):
        return False
    source = original.graph.initializers.get(str(layer.weight.name))
    if source is None or source.const_value is None or source.const_value.shape != layer.tensor.shape:
        return True
    return bool(np.any((layer.tensor.numpy() == 0) & (source.const_value.numpy() != 0)))


def _agree(a: ir.Node, b: ir.Node, same: set[str]) -> bool:
    if (a.op_type, a.domain, len(a.inputs)) != (b.op_type, b.domain, len(b.inputs)):
        return False
    if [y.name for y in a.outputs] != [y.name for y in b.outputs] or _attributes(a) != _attributes(b):
        return False
    for x, y in zip(a.inputs, b.inputs, strict=True):
        if x is None or y is None:
            if x is not y:
                return False
        elif x.const_value is not None and y.const_value is not None:
            if not _equal(x.const_value, y.const_value):
                return False
        elif x.name != y.name or str(y.name) not in same:
            return False
    return True


def _equal(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.numpy(), b.numpy()))


def _attributes(node: ir.Node) -> dict[str, bytes]:
    return {name: ir.to_proto(a).SerializeToString(deterministic=True) for name, a in node.attributes.items()}


def _taps(original: ir.Model, model: ir.Model, agreeing: set[ir.Node]) -> tuple[str, ...]:
    shapes = {str(y.name): y.shape for node in original.graph for y in node.outputs}
    found: list[str] = []
    last: ir.Value | None = None
    for node in model.graph:
        layer = as_layer(node)
        if node in agreeing or not isinstance(layer, WeightedLayer):
            continue
        x, y = node.inputs[1 - layer.input_index if layer.op == "MatMul" else 0], node.outputs[0]
        last = x
        if _size(y) and _size(x) and _size(y) <= _size(x):
            found.append(str(y.name))
    if last is not None and last.producer() is not None and last.producer() not in agreeing:
        found.append(str(last.name))
    values = {str(y.name): y.shape for node in model.graph for y in node.outputs}
    ends = {str(y.name) for y in model.graph.outputs}
    return tuple(dict.fromkeys(n for n in found if n in shapes and shapes[n] == values[n] and n not in ends))


def _size(value: ir.Value | None) -> int:
    if value is None or value.shape is None or not all(isinstance(d, int) for d in value.shape):
        return 0
    return int(np.prod([int(str(d)) for d in value.shape], dtype=np.int64))
