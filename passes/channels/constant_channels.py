"""Which channels of a network hold one constant whatever the input is.

Walking the graph with, for one axis of each value, the constant of every channel or "unknown":

    Conv, Gemm, MatMul   channel o is b[o] + sum over i of c[i] * sum W[o, i], if every input i with W[o, i] != 0 is a
                         known constant c[i]; a convolution that pads needs c[i] = 0 (a border sees fewer c[i])
    pointwise            the operator itself, evaluated by ONNX Runtime on the constants of its inputs
    Mul                  0 where one factor is 0
    pooling, reductions  over other axes: the same constant, 0 where padding is averaged or values are summed
    views                positions move along

A row of zeros thus makes a constant channel, and constants are followed through residual Add, Concat, gates, Flatten. An
operator without a rule makes unknowns: nothing here is guessed from samples. It is used to remove channels of masked
models that carry nothing, or nothing that a bias could not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from sparsec.passes.channels.tie_moves import pad_amounts, reshape_runs, slice_index
from sparsec.passes.channels.tie_rules import POINTWISE
from sparsec.passes.channels.ties import Unknown, ints
from sparsec.passes.normalization.fold_constants import constant, quiet_session, static_shape


@dataclass(frozen=True)
class Channels:
    """`values[i]`: what position i of `axis` holds everywhere, NaN where that is not known."""

    axis: int
    values: np.ndarray = field(repr=False)


Rule = Callable[["_Walk", ir.Node], "Channels | None"]


def constant_channels(graph: ir.Graph) -> dict[ir.Value, Channels]:
    """For every value with a known constant channel: its channels."""
    walk = _Walk()
    for node in graph:
        if node.domain not in ("", "ai.onnx") or any(static_shape(y) is None for y in node.outputs if y.name):
            continue
        if node.op_type == "Split":
            _split(walk, node)
            continue
        rule = RULES.get(node.op_type)
        try:
            found = rule(walk, node) if rule is not None else None
        except Unknown:
            found = None
        if found is not None:
            walk.put(node.outputs[0], found)
    return walk.known


class _Walk:
    def __init__(self) -> None:
        self.known: dict[ir.Value, Channels] = {}

    def of(self, value: ir.Value | None) -> Channels | None:
        return None if value is None else self.known.get(value)

    def put(self, value: ir.Value, channels: Channels) -> None:
        finite = np.isfinite(channels.values)
        if finite.any():
            self.known[value] = Channels(channels.axis, np.where(finite, channels.values, np.nan))

    def inputs(self, value: ir.Value | None, axis: int) -> np.ndarray | None:
        """The constants along `axis`, all NaN where nothing is known; None without a shape."""
        shape = None if value is None else static_shape(value)
        if shape is None:
            return None
        found = self.of(value)
        if found is None or found.axis != axis % len(shape):
            return np.full(shape[axis], np.nan)
        return found.values


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    shape = None if value is None else static_shape(value)
    if shape is None:
        raise Unknown("no shape")
    return shape


def _bias(node: ir.Node, index: int, rows: int) -> np.ndarray:
    """A constant bias as [rows]. Raises Unknown if it is computed."""
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None:
        return np.zeros(rows)
    array = constant(value)
    if array is None or array.size not in (1, rows):
        raise Unknown("a computed bias")
    return np.broadcast_to(array.astype(np.float64).reshape(-1), (rows,))


def _product(weight: np.ndarray, inputs: np.ndarray, bias: np.ndarray, padded: bool) -> np.ndarray:
    """Constants of the rows of `weight` [OC, IC, taps] for `inputs` [IC]."""
    usable = ~np.isnan(inputs) & ((inputs == 0) | (not padded))
    blocked = (weight != 0).any(axis=2) & ~usable
    sums = weight.sum(axis=2, dtype=np.float64) @ np.where(usable, inputs, 0)
    return np.where(blocked.any(axis=1), np.nan, sums + bias)


def is_padded(node: ir.Node) -> bool:
    """Whether a convolution or pooling may read padding."""
    return any(node.attributes.get_ints("pads", None) or ()) or node.attributes.get_string(
        "auto_pad", "NOTSET"
    ) not in (
        "NOTSET",
        "VALID",
    )


def _conv(walk: _Walk, node: ir.Node) -> Channels | None:
    weight, inputs = constant(node.inputs[1]), walk.inputs(node.inputs[0], 1)
    if weight is None or inputs is None:
        return None
    groups = node.attributes.get_int("group", 1)
    flat = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    bias = _bias(node, 2, weight.shape[0]).reshape(groups, -1)
    parts = zip(flat, inputs.reshape(groups, -1), bias, strict=True)
    return Channels(1, np.concatenate([_product(w, x, b, is_padded(node)) for w, x, b in parts]))


def _gemm(walk: _Walk, node: ir.Node) -> Channels | None:
    weight = constant(node.inputs[1])
    inputs = None if node.attributes.get_int("transA", 0) else walk.inputs(node.inputs[0], 1)
    if weight is None or inputs is None:
        return None
    rows = weight if node.attributes.get_int("transB", 0) else weight.T
    bias = _bias(node, 2, len(rows)) * node.attributes.get_float("beta", 1.0)
    return Channels(1, _product(rows[:, :, None] * node.attributes.get_float("alpha", 1.0), inputs, bias, False))


def _matmul(walk: _Walk, node: ir.Node) -> Channels | None:
    weight, inputs = constant(node.inputs[1]), walk.inputs(node.inputs[0], -1)
    if weight is None or inputs is None or weight.ndim != 2:
        return None
    return Channels(
        len(_shape(node.outputs[0])) - 1, _product(weight.T[:, :, None], inputs, np.zeros(weight.shape[1]), False)
    )


def _pointwise(walk: _Walk, node: ir.Node) -> Channels | None:
    rank = len(_shape(node.outputs[0]))
    states = [walk.of(v) for v in node.inputs]
    axes = {s.axis + rank - len(_shape(v)) for v, s in zip(node.inputs, states, strict=True) if s is not None}
    if len(axes) != 1:
        return None
    axis = axes.pop()
    size = _shape(node.outputs[0])[axis]
    rows, unknown, zero = [], np.zeros(size, bool), np.zeros(size, bool)
    for value, state in zip(node.inputs, states, strict=True):
        if value is None:
            rows.append(None)
            continue
        row = _along(value, state, axis, rank, size)
        unknown |= np.isnan(row)
        zero |= row == 0
        rows.append(row)
    result = _evaluate(node, rows)
    if node.op_type == "Mul":
        unknown &= ~zero
        result = np.where(zero, 0.0, result)
    return Channels(axis, np.where(unknown, np.nan, result))


def _along(value: ir.Value, state: Channels | None, axis: int, rank: int, size: int) -> np.ndarray:
    """What the value holds along `axis` of the output, NaN where it varies otherwise, [size]."""
    if state is not None:
        return np.broadcast_to(state.values, (size,))
    array = constant(value)
    if array is None or array.dtype.kind not in "fiub":
        return np.full(size, np.nan)
    full = array.reshape((1,) * (rank - array.ndim) + array.shape).astype(np.float64)
    full = np.moveaxis(full, axis, 0).reshape(full.shape[axis], -1)
    same = (full == full[:, :1]).all(axis=1)
    return np.broadcast_to(np.where(same, full[:, 0], np.nan), (size,))


def _evaluate(node: ir.Node, rows: list[np.ndarray | None]) -> np.ndarray:
    """The operator on vectors, by ONNX Runtime."""
    given = {}
    names = []
    for index, (value, row) in enumerate(zip(node.inputs, rows, strict=True)):
        names.append("" if row is None else f"x{index}")
        if row is not None and value is not None:
            if value.dtype is None:
                raise Unknown("no type")
            bounds = node.op_type == "Clip" and index > 0  # scalars
            array = np.nan_to_num(row, posinf=np.inf, neginf=-np.inf).astype(value.dtype.numpy())
            given[names[-1]] = np.asarray(array.reshape(-1)[0]) if bounds else array
    inner = ir.to_proto(node)
    del inner.input[:]
    inner.input.extend(names)
    del inner.output[:]
    inner.output.append("y")
    inputs = [
        onnx.helper.make_tensor_value_info(k, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for k, a in given.items()
    ]
    graph = onnx.helper.make_graph([inner], "g", inputs, [onnx.ValueInfoProto(name="y")])
    version = node.graph.opset_imports.get("", 21) if node.graph is not None else 21
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", version)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model)
    (result,) = quiet_session(model.SerializeToString()).run(None, given)
    return np.asarray(result, np.float64)


def _batch_norm(walk: _Walk, node: ir.Node) -> Channels | None:
    state = walk.of(node.inputs[0])
    parts = [constant(v) for v in node.inputs[1:5]]
    if state is None or state.axis != 1 or any(p is None for p in parts):
        return None
    scale, bias, mean, variance = (np.asarray(p, np.float64) for p in parts)
    return Channels(
        1, (state.values - mean) / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5)) * scale + bias
    )


def _pool(walk: _Walk, node: ir.Node) -> Channels | None:
    state = walk.of(node.inputs[0])
    if state is None or state.axis > 1:
        return None
    if node.op_type == "AveragePool" and (is_padded(node) or node.attributes.get_int("ceil_mode", 0)):
        return Channels(state.axis, np.where(state.values == 0, 0.0, np.nan))
    return state


def _reduce(walk: _Walk, node: ir.Node) -> Channels | None:
    state = walk.of(node.inputs[0])
    rank = len(_shape(node.inputs[0]))
    axes = ints(node, 1, "axes")
    gone = {a % rank for a in axes} if axes else set(range(rank))
    if state is None or state.axis in gone:
        return None
    place = state.axis - (0 if node.attributes.get_int("keepdims", 1) else sum(a < state.axis for a in gone))
    values = state.values
    if node.op_type not in ("ReduceMean", "ReduceMax", "ReduceMin"):
        values = np.where(values == 0, 0.0, np.nan)
    return Channels(place, values)


def _concat(walk: _Walk, node: ir.Node) -> Channels | None:
    rank = len(_shape(node.outputs[0]))
    joined = node.attributes.get_int("axis", 0) % rank
    states = [walk.of(v) for v in node.inputs]
    axes = {s.axis for s in states if s is not None}
    if len(axes) != 1:
        return None
    axis = axes.pop()
    rows = [
        np.full(_shape(v)[axis], np.nan) if s is None else s.values for v, s in zip(node.inputs, states, strict=True)
    ]
    if axis == joined:
        return Channels(axis, np.concatenate(rows))
    table = np.stack(rows)
    return Channels(axis, np.where((table == table[0]).all(axis=0), table[0], np.nan))


def _split(walk: _Walk, node: ir.Node) -> None:
    state = walk.of(node.inputs[0])
    if state is None:
        return
    axis, offset = node.attributes.get_int("axis", 0) % len(_shape(node.inputs[0])), 0
    for y in node.outputs:
        size = _shape(y)[axis]
        part = state.values[offset : offset + size] if state.axis == axis else state.values
        walk.put(y, Channels(state.axis, part))
        offset += size


def _slice(walk: _Walk, node: ir.Node) -> Channels | None:
    state = walk.of(node.inputs[0])
    positions = slice_index(node).get(state.axis) if state is not None else None
    return state if state is None or positions is None else Channels(state.axis, state.values[positions])


def _transpose(walk: _Walk, node: ir.Node) -> Channels | None:
    state = walk.of(node.inputs[0])
    if state is None:
        return None
    rank = len(_shape(node.inputs[0]))
    order = list(node.attributes.get_ints("perm", None) or reversed(range(rank)))
    return Channels(order.index(state.axis), state.values)


def _reshape(walk: _Walk, node: ir.Node) -> Channels | None:
    state, before = walk.of(node.inputs[0]), _shape(node.inputs[0])
    if state is None:
        return None
    for left, right in reshape_runs(before, _shape(node.outputs[0])):
        if state.axis in left and len(right) == 1:
            sizes = [before[a] for a in left]
            place = left.index(state.axis)
            spread = state.values.reshape([-1 if i == place else 1 for i in range(len(left))])
            return Channels(right[0], np.broadcast_to(spread, sizes).reshape(-1))
    return None


def _pad(walk: _Walk, node: ir.Node) -> Channels | None:
    state = walk.of(node.inputs[0])
    if state is None or node.attributes.get_string("mode", "constant") != "constant":
        return None
    given = node.inputs[2] if len(node.inputs) > 2 else None
    fill = constant(given)
    if given is not None and fill is None:
        return None
    value = float(fill.reshape(-1)[0]) if fill is not None else 0.0
    begin, end = pad_amounts(node)
    if min(*begin, *end) < 0:
        return None
    values = state.values
    if any(b or e for a, (b, e) in enumerate(zip(begin, end, strict=True)) if a != state.axis):
        values = np.where(values == value, values, np.nan)
    return Channels(state.axis, np.pad(values, (begin[state.axis], end[state.axis]), constant_values=value))


RULES: dict[str, Rule] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"), _pool),
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), _reduce),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _reshape),
    "BatchNormalization": _batch_norm,
    "Concat": _concat,
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Pad": _pad,
    "Slice": _slice,
    "Transpose": _transpose,
}
