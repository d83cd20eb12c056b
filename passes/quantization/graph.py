"""Which nodes compute in int8, which values are quantized, and where QuantizeLinear and DequantizeLinear stand.

    DQ(x), DQ(W), DQ(b) -> Conv | Gemm | MatMul [-> Add b] -> [Relu | Clip] -> Q      a layer
    DQ(a), DQ(b) -> Add -> [Relu | Clip] -> Q;   DQ -> pool -> Q                      a joint: all it reads is int8
    DQ(x) -> Reshape | MaxPool | Concat | ... -> Q of the same scale                  a move: values pass unchanged

Layers are what was chosen. A joint or a move is int8 if everything it reads is there in int8 and somebody behind it
reads int8 again: an Add in front of a LayerNormalization gains nothing and stays float. A value is quantized if an int8
node reads it, or if a convolution made it (ONNX Runtime has no int8 convolution with float results); a Gemm or MatMul
that only float nodes read gives float straight from its sums. Values that moves connect form a class with one scale.
Whoever reads a value that an int8 node made reads the dequantized one; a float value is read raw by float nodes.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from sparsec.passes.initializers import add_initializer
from sparsec.passes.layers import WEIGHTED, WeightedLayer, as_layer
from sparsec.passes.measure.replay import goal_of
from sparsec.passes.normalization.fold_constants import constant

ACTIVATIONS = ("Relu", "Clip")
MOVES = (
    "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Reshape", "Resize", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
JOINTS = ("Add", "AveragePool", "GlobalAveragePool", "ReduceMean", *ACTIVATIONS)

Kind = Literal["uint8", "int8"]


@dataclass(frozen=True)
class Step:
    """An int8 node: it reads `inputs`, and `result` is its value behind bias and activation."""

    node: ir.Node = field(repr=False)
    inputs: tuple[ir.Value, ...] = field(repr=False)
    result: ir.Value = field(repr=False)
    layer: WeightedLayer | None = None
    bias: ir.Value | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Plan:
    """`steps` in graph order; `classes`: quantized values that share a scale, the first one names it.

    `made`: quantized values whose producer is int8. `refused`: (layer, reason) of layers that stay float.
    """

    steps: tuple[Step, ...]
    classes: tuple[tuple[ir.Value, ...], ...]
    made: frozenset[ir.Value]
    refused: tuple[tuple[str, str], ...]

    @property
    def layers(self) -> tuple[Step, ...]:
        """The steps that have a weight."""
        return tuple(step for step in self.steps if step.layer is not None)

    def sources(self, values: Sequence[ir.Value]) -> tuple[ir.Value, ...]:
        """Members of a class that bring numbers into it; the others are moved ones."""
        return tuple(v for v in values if _moved_by(v) is None) or tuple(values[:1])


@dataclass(frozen=True)
class Range:
    """x = (q - zero_point) * scale with q in 0..255, or -128..127 for int8."""

    scale: np.float32
    zero_point: int
    kind: Kind = "uint8"

    @classmethod
    def of(cls, low: float, high: float, kind: Kind = "uint8") -> Range:
        """The range low..high, widened so that it holds 0, which then is exact."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = np.float32((high - low) / 255)
        if not scale >= np.finfo(np.float32).tiny:
            scale = np.float32(1.0)  # a value that is always zero
        zero = int(np.clip(np.rint(-low / float(scale)), 0, 255))
        return cls(scale, zero if kind == "uint8" else zero - 128, kind)

    def round(self, x: np.ndarray) -> np.ndarray:
        """`x` as QuantizeLinear and DequantizeLinear leave it, float32."""
        least = 0 if self.kind == "uint8" else -128
        q = np.clip(np.rint(x / self.scale) + self.zero_point, least, least + 255)
        return ((q - self.zero_point) * self.scale).astype(np.float32)


# ---- planning


def plan(
    model: ir.Model,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    types: Sequence[str] = WEIGHTED,
    outputs: bool = False,
    floats: Collection[str] = (),
) -> Plan:
    """What becomes int8. `include`, `exclude`: globs over node names; `outputs`: quantize the model's outputs, too;
    `floats`: names of layers that stay float."""
    found: dict[ir.Node, Step] = {}
    refused: list[tuple[str, str]] = []
    available: set[ir.Value] = set()
    for node in model.graph:
        layer = as_layer(node)
        if isinstance(layer, WeightedLayer):
            reason = "stays float" if layer.name in floats else _refusal(layer, include, exclude, types)
            if reason:
                refused.append((layer.name, reason))
                continue
            step = _layer_step(layer)
        else:
            inputs = _passable(node)
            if not inputs or not all(v in available for v in inputs):
                continue
            if any(node is s.node or v is s.result for s in found.values() for v in node.outputs):
                continue  # the bias or the activation of a step before
            step = Step(node, inputs, _behind_activation(node.outputs[0]) if node.op_type == "Add" else node.outputs[0])
        found[step.node] = step
        available.update(step.inputs)
        available.update(node.outputs if node.op_type == "Split" else (step.result,))
    return _settle(model, found, tuple(refused), outputs)


def _settle(
    model: ir.Model, found: Mapping[ir.Node, Step], refused: tuple[tuple[str, str], ...], outputs: bool
) -> Plan:
    """Keep joints and moves that lead to int8 readers, then group what is quantized."""
    kept: dict[ir.Node, Step] = {}
    read: set[ir.Value] = set()  # by an int8 node
    for node, step in reversed(list(found.items())):
        results = _results(step)
        wanted = any(v in read or (outputs and v.is_graph_output()) for v in results)
        if step.layer is None and not wanted:
            continue
        kept[node] = step
        read.update(step.inputs)
    steps = tuple(reversed(kept.values()))
    made = set()
    for step in steps:
        for v in _results(step):
            if v in read or (outputs and v.is_graph_output()) or step.node.op_type == "Conv" or step.layer is None:
                made.add(v)
    quantized = list(dict.fromkeys(v for step in steps for v in (*step.inputs, *_results(step)) if v in read | made))
    return Plan(steps, _classes(steps, quantized), frozenset(made), refused)


def _results(step: Step) -> tuple[ir.Value, ...]:
    return tuple(step.node.outputs) if step.node.op_type == "Split" else (step.result,)


def _classes(steps: Sequence[Step], quantized: Sequence[ir.Value]) -> tuple[tuple[ir.Value, ...], ...]:
    parent = {v: v for v in quantized}

    def root(v: ir.Value) -> ir.Value:
        while parent[v] is not v:
            v = parent[v]
        return v

    order = {v: i for i, v in enumerate(quantized)}
    for step in steps:
        if step.layer is not None or step.node.op_type not in MOVES:
            continue
        members = [v for v in (*step.inputs, *_results(step)) if v in parent]
        for v in members[1:]:
            a, b = sorted((root(members[0]), root(v)), key=order.__getitem__)
            parent[b] = a
    classes: dict[ir.Value, list[ir.Value]] = {}
    for v in quantized:
        classes.setdefault(root(v), []).append(v)
    return tuple(tuple(values) for values in classes.values())


def _moved_by(value: ir.Value) -> ir.Node | None:
    node = value.producer()
    return node if node is not None and node.op_type in MOVES and bool(_passable(node)) else None


def _refusal(layer: WeightedLayer, include: Sequence[str], exclude: Sequence[str], types: Sequence[str]) -> str:
    node = layer.node
    if layer.op not in types:
        return f"has another type than {'+'.join(types)}"
    if any(fnmatch.fnmatchcase(layer.name, glob) for glob in exclude):
        return f"is excluded by {'+'.join(exclude)}"
    if include and not any(fnmatch.fnmatchcase(layer.name, glob) for glob in include):
        return f"is not named by include={'+'.join(include)}"
    if layer.tensor.dtype != ir.DataType.FLOAT:
        return f"has weights of type {layer.tensor.dtype.name}"
    if layer.op == "MatMul" and layer.input_index == 0:
        return "has its constant on the left"
    if layer.op == "Gemm":
        plain = all(node.attributes.get_float(key, 1.0) == 1.0 for key in ("alpha", "beta"))
        if not plain or node.attributes.get_int("transA", 0):
            return "scales its product or transposes its input"
    x = node.inputs[0]
    if x is None or x.const_value is not None or x.dtype != ir.DataType.FLOAT:
        return "reads no float activation"
    producer = x.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        return "reads a quantized activation already"
    return ""


def _layer_step(layer: WeightedLayer) -> Step:
    goal = goal_of(layer)
    x = layer.node.inputs[0]
    assert x is not None
    return Step(layer.node, (x,), _behind_activation(goal.value), layer, goal.bias)


def _behind_activation(value: ir.Value) -> ir.Value:
    """The result of the Relu or Clip that alone reads `value`, else the value."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return value
    node = uses[0].node
    if node.op_type in ACTIVATIONS and uses[0].idx == 0 and all(constant(x) is not None for x in node.inputs[1:] if x):
        return node.outputs[0]
    return value


def _passable(node: ir.Node) -> tuple[ir.Value, ...]:
    """What a joint or move reads of activations; () if it is neither, or not one that int8 follows."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in (*MOVES, *JOINTS):
        return ()
    data = node.inputs if node.op_type in ("Concat", "Add") else node.inputs[:1]
    values = [v for v in data if v is not None]
    if any(v.const_value is not None or v.dtype != ir.DataType.FLOAT for v in values):
        return ()
    if node.op_type not in ("Concat", "Add") and any(constant(v) is None for v in node.inputs[1:] if v is not None):
        return ()
    if not all(_follows(node)):
        return ()
    return tuple(values)


def _follows(node: ir.Node) -> Iterator[bool]:
    attributes = node.attributes
    if node.op_type == "Add":
        yield all(v is not None for v in node.inputs)
    if node.op_type == "Pad":
        fill = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        yield attributes.get_string("mode", "constant") != "constant" or fill is None or not np.any(fill)
    if node.op_type == "Resize":
        yield attributes.get_string("mode", "nearest") in ("nearest", "linear")
        yield attributes.get_float("extrapolation_value", 0.0) == 0.0
    if node.op_type == "MaxPool":
        yield len(node.outputs) == 1
    if node.op_type == "ReduceMean":
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        rank = len(shape) if shape is not None else 0
        yield axes is not None and sorted(int(a) % max(rank, 1) for a in axes.reshape(-1)) == list(range(2, rank))


# ---- writing


def insert(model: ir.Model, plan: Plan, ranges: Mapping[ir.Value, Range]) -> None:
    """Put Q and DQ behind every quantized value. `ranges`: of the first value of each class."""
    graph = model.graph
    readers = {step.node for step in plan.steps}
    for values in plan.classes:
        chosen, first = ranges[values[0]], str(values[0].name)
        dtype = np.uint8 if chosen.kind == "uint8" else np.int8
        scale = add_initializer(graph, f"{first}_scale", np.asarray(chosen.scale, np.float32))
        zero = add_initializer(graph, f"{first}_zero_point", np.asarray(chosen.zero_point, dtype))
        for value in values:
            _quantize_value(graph, value, scale, zero, None if value in plan.made else readers)


def _quantize_value(
    graph: ir.Graph, value: ir.Value, scale: ir.Value, zero: ir.Value, only: set[ir.Node] | None
) -> None:
    """x -> Q -> DQ -> readers; `only`: the nodes that read the dequantized value, None for all and the graph's outputs."""
    uses, name = list(value.uses()), str(value.name)
    quantize = ir.node("QuantizeLinear", [value, scale, zero], name=f"{name}_QuantizeLinear")
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], name=f"{name}_DequantizeLinear")
    q, y = quantize.outputs[0], dequantize.outputs[0]
    q.name, q.shape, q.type = f"{name}_quantized", value.shape, ir.TensorType(zero.const_value.dtype)
    y.name, y.shape, y.type = f"{name}_dequantized", value.shape, value.type
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], [quantize, dequantize])
    else:
        graph.insert_after(producer, [quantize, dequantize])
    for node, index in uses:
        if only is None or node in only:
            node.replace_input_with(index, y)
    if only is None and value.is_graph_output():
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = y
        value.name, y.name = f"{name}_float", name


def store_weight(model: ir.Model, step: Step, q: np.ndarray, scale: np.ndarray, x_scale: np.float32) -> None:
    """Replace the layer's weight by `q` int8 [OC, IC, KH, KW] with `scale` [OC], its bias by int32 of x_scale * scale.

    A weight that several nodes read is replaced for all of them.
    """
    layer = step.layer
    assert layer is not None
    graph = model.graph
    if layer.weight.const_value is not None and layer.weight.is_initializer():
        name = str(layer.weight.name)
        stored = np.asarray(layer.stored(q.astype(np.float32)), np.int8)
        axis = 0 if layer.op == "Conv" else stored.ndim - 1 if layer.transposed else stored.ndim - 2
        values = [
            add_initializer(graph, f"{name}_quantized", stored),
            add_initializer(graph, f"{name}_scale", scale.astype(np.float32)),
            add_initializer(graph, f"{name}_zero_point", np.zeros(len(scale), np.int8)),
        ]
        readers = [(use.node, use.idx) for use in layer.weight.uses()]
        read_dequantized(graph, readers, values, {"axis": axis}, f"{name}_DequantizeLinear")
    if step.bias is None or step.bias.const_value is None:
        return
    units = (np.float32(x_scale) * scale.astype(np.float32)).astype(np.float32)
    numbers, name = step.bias.const_value.numpy(), str(step.bias.name)
    whole = np.clip(np.rint(numbers.reshape(-1).astype(np.float64) / units), -(2**31), 2**31 - 1).astype(np.int32)
    values = [
        add_initializer(graph, f"{name}_quantized", whole.reshape(numbers.shape)),
        add_initializer(graph, f"{name}_scale", units),
        add_initializer(graph, f"{name}_zero_point", np.zeros(len(units), np.int32)),
    ]
    readers = [(use.node, use.idx) for use in step.bias.uses()]
    read_dequantized(graph, readers, values, {"axis": numbers.ndim - 1}, f"{name}_DequantizeLinear")


def read_dequantized(
    graph: ir.Graph,
    readers: Sequence[tuple[ir.Node, int]],
    values: Sequence[ir.Value],
    attributes: Mapping[str, int],
    name: str,
) -> None:
    """Let `readers` (node, input) read DequantizeLinear(values): the integers, scale and zero point."""
    node = ir.node("DequantizeLinear", list(values), attributes=dict(attributes), name=name)
    y = node.outputs[0]
    y.name, y.shape, y.type = f"{values[0].name}_float", values[0].shape, ir.TensorType(ir.DataType.FLOAT)
    first = next(n for n in graph if any(n is reader for reader, _ in readers))
    graph.insert_before(first, node)
    for reader, index in readers:
        reader.replace_input_with(index, y)


def float_weights(model: ir.Model) -> int:
    """Turn dequantized constants that float layers read into plain float constants; how many.

    Of a layer whose input is dequantized too, nothing is touched: it is quantized already.
    """
    done = 0
    for node in list(model.graph):
        if node.op_type not in WEIGHTED or (data := node.inputs[0]) is None or _dequantizes(data):
            continue
        for index in range(1, len(node.inputs)):
            value = node.inputs[index]
            maker = _dequantizes(value)
            if maker is None or value is None or any(constant(x) is None for x in maker.inputs if x is not None):
                continue
            array = dequantized(maker)
            if array is not None:
                node.replace_input_with(index, add_initializer(model.graph, f"{value.name}_plain", array))
                done += 1
    common.RemoveUnusedNodesPass()(model)
    return done


def _dequantizes(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def dequantized(node: ir.Node) -> np.ndarray | None:
    """What a DequantizeLinear of constants gives, float32; None in blocks."""
    q, scale, *rest = (constant(x) for x in node.inputs)
    if q is None or scale is None or node.attributes.get_int("block_size", 0) or scale.dtype != np.float32:
        return None
    zero = rest[0] if rest else None
    if scale.size > 1:
        shape = [1] * q.ndim
        shape[node.attributes.get_int("axis", 1)] = scale.size
        scale, zero = scale.reshape(shape), None if zero is None else zero.reshape(shape)
    whole = q.astype(np.float32) if zero is None else q.astype(np.float32) - zero.astype(np.float32)
    return (whole * scale).astype(np.float32)
