"""Evaluate what does not depend on the inputs, and know the shape and type of every value.

One walk in topological order. For a node `y = f(x_1, ..., x_k)`:

    f = Shape, Size and shape(x_1) static            y becomes the constant shape(x_1)
    f = If, Loop, Scan with constant conditions      a straight line replaces the node (`sparsec.passes.normalization.control_flow`)
    y without elements                               y is a constant
    every x_i constant                               y becomes the constant f(x_1, ..., x_k), computed by ONNX Runtime
    otherwise                                        shape(y), type(y) are inferred, constants among the x_i included

so that shape arithmetic of any depth folds in one walk once the input shapes are fixed. Constant nodes become
initializers; nodes and initializers that nothing reads disappear.

Never folded: random operators; results much larger than what they are made from (`GROWTH_BYTES`); a DequantizeLinear
of whole numbers in a model that also quantizes activations, by blocks, or for products alone: there the stored form is
what is computed with. Where only weights of other layers are stored as integers, these become floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes import common

from sparsec.errors import ModelError, one_line
from sparsec.passes.normalization.control_flow import (
    UNROLL_STEPS,
    LoopState,
    inline_branch,
    peel_loop,
    too_long,
    unroll_scan,
)
from sparsec.passes.normalization.windows import resolve_ceil_mode
from sparsec.rewriting.passes_api import Context, Pass, PassResult

GROWTH_BYTES = 1 << 24  # a folded result may be this much larger than its inputs together
DATA_ELEMENTS = 1024  # constants up to here take part in shape inference (shapes, axes, pads, sizes)
LOOPS = 16  # times `unroll_steps`: steps of all loops together, those inside loops counted each time
RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluate constant subgraphs and shape arithmetic; infer every shape."""

    name: ClassVar[str] = "fold-constants"
    exact: ClassVar[bool] = True

    unroll_steps: int = UNROLL_STEPS  # of a Loop or Scan, at most
    folded_bytes: int = 1 << 28  # of all constants that are computed, at most
    nodes: int = 50_000  # that a graph may have with its loops written out

    def call(self, model: ir.Model) -> PassResult:
        before = [node.op_type for node in model.graph]
        walk = _Walk(model, self)
        folded = walk.run()
        common.RemoveUnusedNodesPass()(model)
        dropped = remove_unused_initializers(model.graph)
        after = [node.op_type for node in model.graph]
        modified = folded > 0 or before != after or walk.typed + dropped > 0
        if folded or before != after:
            Context.of(model).records.append({"folded": folded, "nodes_before": len(before), "nodes_after": len(after)})
        return PassResult(model, modified)


def remove_unused_initializers(graph: ir.Graph) -> int:
    """Drop initializers that no node reads and that are no outputs; how many were dropped.

    What once was the body of a loop still reads its weights, but is in no graph.
    """
    read = {id(x) for node in ir.traversal.RecursiveGraphIterator(graph) for x in node.inputs}
    unused = [n for n, v in graph.initializers.items() if id(v) not in read and not v.is_graph_output()]
    for name in unused:
        del graph.initializers[name]
    return len(unused)


def static_shape(value: ir.Value) -> tuple[int, ...] | None:
    """The value's shape if all of it is known."""
    if value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(d) for d in value.shape.dims)


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer or of a value without elements, None for anything else."""
    if value is None:
        return None
    if value.const_value is None or value.is_graph_input():
        return _empty(value)
    return value.const_value.numpy()


def _empty(value: ir.Value) -> np.ndarray | None:
    """The value of a tensor without elements."""
    shape = static_shape(value) if value.shape is not None and 0 in value.shape.dims else None
    return None if shape is None or value.dtype is None else np.zeros(shape, value.dtype.numpy())


def make_constant(graph: ir.Graph, old: ir.Value, array: np.ndarray) -> None:
    """Give `old` (a node's output) the constant value `array`: its readers read an initializer of the same name.

    A constant graph output stays computed by an Identity of the initializer: an output needs a node.
    """
    name, node = str(old.name), old.producer()
    is_output = old.is_graph_output()
    new_name = f"{name}__value" if is_output else name
    tensor = ir.tensor(np.asarray(array, order="C"), name=new_name)
    new = ir.Value(name=new_name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    old.name = f"{name}__folded"
    if is_output:
        holder = ir.node("Identity", [new], name=f"{node.name}__constant")
        holder.outputs[0].name, holder.outputs[0].shape, holder.outputs[0].type = name, new.shape, new.type
        graph.insert_before(node, holder)
        for index, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[index] = holder.outputs[0]
    old.replace_all_uses_with(new)
    graph.register_initializer(new)


class _Walk:
    def __init__(self, model: ir.Model, limits: FoldConstants) -> None:
        self.graph = model.graph
        self.limits = limits
        self.unroll_steps = limits.unroll_steps
        self.folded_bytes = 0
        self.loops: dict[ir.Node, LoopState] = {}
        self.opsets = dict(model.opset_imports)
        self.ir_version = model.ir_version
        self.keeps_integers = _quantizes_activations(model.graph)
        self.typed = 0  # values whose shape or type was not known before

    def run(self) -> int:
        folded = steps = 0
        pending = list(reversed(self.graph))
        while pending:
            node = pending.pop()
            opened = self._opened(node)
            if opened is not None:
                steps += node.op_type != "If"
                if steps > LOOPS * self.unroll_steps:
                    text = f"more than {LOOPS * self.unroll_steps} steps of loops are written out up to here"
                    raise ModelError(f"{text} (--limit unroll=N)", f"node {node.name!r}")
                pending.extend(reversed(opened))
                if len(self.graph) > self.limits.nodes:
                    text = f"written out, it makes a graph of more than {self.limits.nodes} nodes (--limit nodes=N)"
                    raise ModelError(text, f"node {node.name!r}")
                folded += 1
                continue
            if self._fold(node):
                folded += 1
        return folded

    def _fold(self, node: ir.Node) -> bool:
        if node.domain not in ("", "ai.onnx"):
            return False
        values = self._evaluate(node)
        if values is None:
            return False
        for output, array in zip(node.outputs, values, strict=True):
            if array is not None and output.name:
                make_constant(self.graph, output, array)
        self.graph.remove(node, safe=True)
        return True

    def _evaluate(self, node: ir.Node) -> Sequence[np.ndarray | None] | None:
        if node.op_type == "Constant":
            return [_constant_node(node)]
        if node.op_type in ("Shape", "Size"):
            shape = static_shape(node.inputs[0])
            if shape is not None:
                return [_shape_of(node, shape)]
        if has_subgraph(node):
            return None
        self._infer(node)
        inputs = [x for x in node.inputs if x is not None]
        if node.op_type == "Identity" and node.outputs[0].is_graph_output() and inputs[0].const_value is not None:
            return None
        if node.op_type == "Range" and (step := constant(inputs[2])) is not None and not step.any():
            raise ModelError("Range with a step of 0", f"node {node.name!r}")
        empty = [_empty(y) for y in node.outputs]
        if empty and all(e is not None for e in empty):
            return empty
        if any(constant(x) is None for x in inputs) or node.op_type in RANDOM:
            return None
        if node.op_type == "DequantizeLinear" and (self.keeps_integers or _for_products(node)):
            return None
        return self._compute(node, inputs)

    def _opened(self, node: ir.Node) -> list[ir.Node] | None:
        """What stands in place of an If, Loop or Scan now, if what it depends on is constant."""
        if not has_subgraph(node) or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "If":
            condition = constant(node.inputs[0])
            if condition is None:
                return None
            taken = "then_branch" if condition.reshape(-1)[0] else "else_branch"
            return inline_branch(self.graph, node, node.attributes[taken].as_graph())
        if node.op_type == "Loop":
            return self._opened_loop(node)
        if node.op_type == "Scan":
            count = node.attributes.get_int("num_scan_inputs", 1)
            inputs = node.inputs[len(node.inputs) - count :]
            shapes = [static_shape(x) if x is not None else None for x in inputs]
            axes = node.attributes.get_ints("scan_input_axes", [0] * count)
            lengths = [s[axis] for s, axis in zip(shapes, axes, strict=True) if s is not None]
            if len(lengths) < count or not lengths:
                return None
            if lengths[0] > self.unroll_steps:
                raise too_long(node, lengths[0], self.unroll_steps)
            return unroll_scan(self.graph, node, lengths)
        return None

    def _opened_loop(self, node: ir.Node) -> list[ir.Node] | None:
        given = [(x, constant(x)) for x in node.inputs[:2]]
        if any(x is not None and array is None for x, array in given):
            return None
        trips, go_on = (None if array is None else array.reshape(-1)[0] for _, array in given)
        if trips is None and go_on is None:
            return None
        state = self.loops.setdefault(node, LoopState())
        steps = state.done + 1 if trips is None else int(trips)
        if steps > self.unroll_steps and (go_on is None or go_on):
            raise too_long(node, steps, self.unroll_steps)
        return peel_loop(self.graph, node, state, None if trips is None else int(trips), go_on is None or bool(go_on))

    def _infer(self, node: ir.Node) -> None:
        shape = static_shape(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
        if shape is not None:
            self.typed += resolve_ceil_mode(node, shape)
        inputs = {x.name: x for x in node.inputs if x is not None}
        types = {name: _type_proto(x) for name, x in inputs.items()}
        if any(t is None for t in types.values()):
            return
        data = {}
        for name, x in inputs.items():
            if x.const_value is not None and not x.is_graph_input() and x.const_value.size <= DATA_ELEMENTS:
                data[name] = ir.to_proto(x.const_value)
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opsets[node.domain], node.domain)
            inferred = onnx.shape_inference.infer_node_outputs(
                schema, ir.to_proto(node), types, data, opset_imports=opsets, ir_version=self.ir_version
            )
        except onnx.shape_inference.InferenceError as error:
            raise ModelError(
                f"{node.op_type} does not fit its inputs: {one_line(error)}", f"node {node.name!r}"
            ) from error
        except (onnx.defs.SchemaError, KeyError):
            return
        for output in node.outputs:
            if output.name in inferred:
                proto, known = inferred[output.name], (output.type, output.shape)
                output.type = ir.serde.deserialize_type_proto_for_type(proto) or output.type
                shape = ir.serde.deserialize_type_proto_for_shape(proto)
                output.shape = output.shape if shape is None else shape
                self.typed += known != (output.type, output.shape)

    def _compute(self, node: ir.Node, inputs: list[ir.Value]) -> list[np.ndarray | None] | None:
        arrays = {str(x.name): constant(x) for x in inputs}
        have = sum(array.nbytes for array in arrays.values() if array is not None)
        for output in node.outputs:
            shape = static_shape(output)
            if output.name and shape is not None and output.dtype is not None:
                if np.prod(shape, dtype=object) * output.dtype.bitwidth / 8 > have + GROWTH_BYTES:
                    return None
            elif output.name and node.op_type in ("ConstantOfShape", "Expand", "Tile", "Range"):
                return None
        wanted = [y for y in node.outputs if y.name and (y.uses() or y.is_graph_output())]
        if not wanted:
            return None
        unique = list({x.name: x for x in inputs}.values())
        graph = onnx.helper.make_graph(
            [ir.to_proto(node)],
            "constant",
            [onnx.helper.make_value_info(x.name, _type_proto(x)) for x in unique],
            [onnx.helper.make_empty_tensor_value_info(y.name) for y in wanted],
        )
        opsets = [onnx.helper.make_opsetid(d, v) for d, v in self.opsets.items() if d in ("", node.domain)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=self.ir_version)
        try:
            session = quiet_session(model.SerializeToString())
            results = session.run(None, arrays)
        except Exception:  # no such kernel or element type in ONNX Runtime: the node stays, lowering decides
            return None
        if not all(isinstance(r, np.ndarray) for r in results):
            return None
        by_name = {y.name: r for y, r in zip(wanted, results, strict=True)}
        self.folded_bytes += sum(r.nbytes for r in results)
        if self.folded_bytes > self.limits.folded_bytes:
            text = f"constants of more than {self.limits.folded_bytes} bytes are computed up to here"
            raise ModelError(f"{text} (--limit folded-bytes=N)", f"node {node.name!r}")
        return [by_name.get(y.name) for y in node.outputs]


def quiet_session(data: bytes) -> ort.InferenceSession:
    """A one-thread CPU session without log output, running the graph as it is written."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def has_subgraph(node: ir.Node) -> bool:
    """Whether the node holds a graph (If, Loop, Scan)."""
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(a.type in kinds for a in node.attributes.values())


def _type_proto(value: ir.Value) -> onnx.TypeProto | None:
    if value.type is None:
        return None
    proto = ir.serde.serialize_type(value.type)
    if value.shape is not None:
        ir.serde.serialize_shape_into(proto, value.shape)
    return proto


def _constant_node(node: ir.Node) -> np.ndarray | None:
    ((key, attribute),) = node.attributes.items()
    if key == "value":
        return attribute.as_tensor().numpy()
    if key in ("value_float", "value_floats"):
        return np.array(attribute.value, dtype=np.float32)
    if key in ("value_int", "value_ints"):
        return np.array(attribute.value, dtype=np.int64)
    raise ModelError(f"Constant with {key} is not supported, only numbers are", f"node {node.name!r}")


def _shape_of(node: ir.Node, shape: tuple[int, ...]) -> np.ndarray:
    if node.op_type == "Size":
        return np.array(np.prod(shape, dtype=np.int64), dtype=np.int64)
    rank = len(shape)
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", rank)
    start, end = (max(0, min(rank, d + rank if d < 0 else d)) for d in (start, end))
    return np.array(shape[start:end], dtype=np.int64)


def _for_products(node: ir.Node) -> bool:
    """Whether a DequantizeLinear has blocks, or gives a matrix that only Gemm and MatMul read, on their right."""
    if node.attributes.get_int("block_size", 0):
        return True
    uses = tuple(node.outputs[0].uses())
    right = all(use.node.op_type in ("Gemm", "MatMul") and use.idx == 1 for use in uses)
    return bool(uses) and right and len(static_shape(node.inputs[0]) or ()) == 2


def _quantizes_activations(graph: ir.Graph) -> bool:
    """Whether some DequantizeLinear reads what is computed or given."""
    for node in graph:
        x = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        maker = x.producer() if x is not None else None
        if x is not None and constant(x) is None and (maker is None or maker.op_type != "Constant"):
            return True
    return False
