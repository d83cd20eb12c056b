"""The rules of `sparsec.passes.ties`, one function an operator or a family of them, and their table `RULES`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from sparsec.passes.fold_constants import constant
from sparsec.passes.ties import Merge, Rule, Ties, Unknown, ints, shape_of

POINTWISE = (
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitShift", "BitwiseAnd", "BitwiseNot",
    "BitwiseOr", "BitwiseXor", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Div", "Dropout", "Elu",
    "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity",
    "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg",
    "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh",
    "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor",
)  # fmt: skip
REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
)  # fmt: skip


def _all(node: ir.Node) -> set[int]:
    return set(range(len(node.inputs)))


def _pointwise(ties: Ties, node: ir.Node) -> set[int]:
    for x in node.inputs:
        if x is not None:
            ties.broadcast(x, node.outputs[0])
    return _all(node)


# ---- layers with weights


def _weight(ties: Ties, node: ir.Node) -> ir.Value:
    """Input 1. What is cut must be zero in the masked twin, so a computed weight is not cut."""
    value = node.inputs[1]
    if value is None or (ties.cut and constant(value) is None):
        raise Unknown("its weight is not constant")
    return value


def _conv(ties: Ties, node: ir.Node) -> set[int]:
    x, w, y = node.inputs[0], _weight(ties, node), node.outputs[0]
    rows, columns = shape_of(w)[:2]
    groups = node.attributes.get_int("group", 1)
    ties.tie(ties.axis(x, 0), ties.axis(y, 0))
    _pin_space(ties, node, x, w, y)
    out = ties.axis(w, 0)
    ties.tie(ties.axis(y, 1), out)
    if groups == 1:
        ties.tie(ties.axis(x, 1), ties.axis(w, 1))
        ties.use(node, 1, "column", ties.axis(w, 1))
        ties.use(node, 1, "row", out)
    elif columns == 1:
        ties.tie(np.repeat(ties.axis(x, 1).atoms, rows // groups), out, _inner(rows, groups))
    else:
        ties.use(node, 1, "row", out)
        _conv_groups(ties, node, groups)
    return {0, 1} | _row_parameters(ties, node, (2,), y)


def _inner(rows: int, groups: int) -> np.ndarray:
    return np.tile(np.arange(rows // groups), groups)


def _conv_groups(ties: Ties, node: ir.Node, groups: int) -> None:
    x, w = node.inputs[0], node.inputs[1]
    rows, columns = shape_of(w)[:2]
    source, out, per = ties.axis(x, 1).atoms.reshape(groups, columns), ties.axis(w, 0).atoms, rows // groups
    if ties.cut:  # every group loses the same channels, so that groups stay equally large
        column = ties.axis(w, 1)
        ties.use(node, 1, "column", column)
        for g in range(groups):
            ties.tie(source[g], column)
            ties.tie(out[g * per : (g + 1) * per], out[:per])
        return
    if constant(w) is None:
        raise Unknown("the weight of a grouped convolution is not constant")
    for g in range(groups):
        column = ties.axis(w, 1, (g * per, (g + 1) * per))
        ties.tie(source[g], column)
        ties.use(node, 1, "column", column)
    ties.tie(out, out, np.repeat(np.arange(groups), per))  # rows stay in their group


def _pin_space(ties: Ties, node: ir.Node, *values: ir.Value | None) -> None:
    for value in values:
        for axis in range(2, len(shape_of(value))):
            ties.pin(value, f"{node.op_type} {node.name!r} moves a window along it", axis)


def _row_parameters(ties: Ties, node: ir.Node, indices: tuple[int, ...], y: ir.Value) -> set[int]:
    """Inputs of one value a channel (axis 1 of y)."""
    for index in indices:
        if index < len(node.inputs) and node.inputs[index] is not None:
            ties.tie(ties.axis(node.inputs[index], 0), ties.axis(y, 1))
    return set(indices)


def _conv_transpose(ties: Ties, node: ir.Node) -> set[int]:
    x, w, y = node.inputs[0], _weight(ties, node), node.outputs[0]
    groups, (rows, columns) = node.attributes.get_int("group", 1), shape_of(w)[:2]
    ties.tie(ties.axis(x, 0), ties.axis(y, 0))
    _pin_space(ties, node, x, w, y)
    ties.tie(ties.axis(x, 1), ties.axis(w, 0))
    if groups == 1:
        ties.tie(ties.axis(y, 1), ties.axis(w, 1))
        ties.use(node, 1, "column", ties.axis(w, 0))
        ties.use(node, 1, "row", ties.axis(w, 1))
    elif groups == rows and columns == 1:
        ties.tie(ties.axis(x, 1), ties.axis(y, 1))
    else:
        raise Unknown("a grouped transposed convolution")
    return {0, 1} | _row_parameters(ties, node, (2,), y)


def _contract(ties: Ties, node: ir.Node, index: int, a: ir.Value, i: int, b: ir.Value, j: int) -> None:
    """A sum over axis i of a and axis j of b; a cut is only known to be exact where one of them is a weight."""
    ties.tie(ties.axis(a, i), ties.axis(b, j))
    if constant(a) is None and constant(b) is None and ties.cut:
        ties.pin(a, f"{node.op_type} {node.name!r} sums products of activations along it", i)


def _gemm(ties: Ties, node: ir.Node) -> set[int]:
    a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
    k = 0 if node.attributes.get_int("transA", 0) else 1
    n = 0 if node.attributes.get_int("transB", 0) else 1
    _contract(ties, node, 1, a, k, b, 1 - n)
    ties.tie(ties.axis(a, 1 - k), ties.axis(y, 0))
    ties.tie(ties.axis(b, n), ties.axis(y, 1))
    if constant(b) is not None:
        ties.use(node, 1, "column", ties.axis(b, 1 - n))
        ties.use(node, 1, "row", ties.axis(b, n))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        ties.broadcast(node.inputs[2], y)
    return {0, 1, 2}


def _matmul(ties: Ties, node: ir.Node) -> set[int]:
    a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
    if len(shape_of(a)) < 2 or len(shape_of(b)) < 2:
        raise Unknown("a product with a vector")
    _contract(ties, node, 1, a, -1, b, -2)
    ties.tie(ties.axis(a, -2), ties.axis(y, -2))
    ties.tie(ties.axis(b, -1), ties.axis(y, -1))
    for x in (a, b):
        ties.broadcast(x, y, skip=2)
    if constant(b) is not None:
        ties.use(node, 1, "column", ties.axis(b, -2))
        ties.use(node, 1, "row", ties.axis(b, -1))
    elif constant(a) is not None:
        ties.use(node, 0, "column", ties.axis(a, -1))
        ties.use(node, 0, "row", ties.axis(a, -2))
    return {0, 1}


def _recurrent(ties: Ties, node: ir.Node, gates: int) -> set[int]:
    """Only the input's features; the state stays as it is."""
    w = _weight(ties, node)
    ties.tie(ties.axis(node.inputs[0], 2), ties.axis(w, 2))
    ties.use(node, 1, "column", ties.axis(w, 2))
    what = f"{node.op_type} {node.name!r}"
    ties.pin(node.inputs[0], f"{what} runs along it", 0)
    ties.pin(node.inputs[0], f"{what} runs along it", 1)
    ties.pin(w, f"{what}: a state of {gates} gates", 0)
    ties.pin(w, f"{what}: a state of {gates} gates", 1)
    for y in node.outputs:
        ties.pin(y if y.name else None, f"{what}: a state")
    return {0, 1}


def _einsum(ties: Ties, node: ir.Node) -> set[int]:
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = [*left.split(","), right]
    if not arrow or "." in equation or any(len(set(t)) != len(t) for t in terms):
        raise Unknown("an Einsum with an ellipsis, a diagonal or no arrow")
    values = [*node.inputs, node.outputs[0]]
    for letter in sorted(set("".join(terms))):
        found = [ties.axis(v, t.index(letter)) for v, t in zip(values, terms, strict=True) if letter in t]
        for a in found[1:]:
            ties.tie(found[0], a)
        if ties.cut and letter not in right:
            ties.pin_atoms(found[0].atoms, f"Einsum {node.name!r} sums along it")
    return _all(node)


# ---- normalisation, reduction


def _mixed(ties: Ties, node: ir.Node, value: ir.Value | None, axis: int) -> None:
    """The node mixes positions along the axis regardless of their order, but not of their number."""
    if ties.cut:
        ties.pin(value, f"{node.op_type} {node.name!r} mixes it", axis % len(shape_of(value)))


def _batch_norm(ties: Ties, node: ir.Node) -> set[int]:
    if node.attributes.get_int("training_mode", 0):
        raise Unknown("training mode")
    x, y = node.inputs[0], node.outputs[0]
    ties.same(x, y, range(len(shape_of(x))))
    return {0} | _row_parameters(ties, node, (1, 2, 3, 4), y)


def _instance_norm(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    ties.same(x, y, range(len(shape_of(x))))
    for axis in range(2, len(shape_of(x))):
        _mixed(ties, node, x, axis)
    return {0} | _row_parameters(ties, node, (1, 2), y)


def _group_norm(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    ties.same(x, y, range(len(shape_of(x))))
    channels, groups = ties.axis(x, 1), node.attributes.get_int("num_groups", 1)
    ties.tie(channels, channels, np.arange(channels.size) // max(channels.size // groups, 1))
    for axis in range(1, len(shape_of(x))):
        _mixed(ties, node, x, axis)
    if shape_of(node.inputs[1])[0] != channels.size:
        return {0}
    return {0} | _row_parameters(ties, node, (1, 2), y)


def _layer_norm(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(shape_of(x))
    ties.same(x, y, range(rank))
    for axis in range(node.attributes.get_int("axis", -1) % rank, rank):
        _mixed(ties, node, x, axis)
    for parameter in node.inputs[1:]:
        if parameter is not None:
            ties.broadcast(parameter, y)
    return _all(node)


def _mixing(ties: Ties, node: ir.Node, default: int) -> set[int]:
    """Softmax and the like: along one axis, in any order."""
    x, y = node.inputs[0], node.outputs[0]
    ties.same(x, y, range(len(shape_of(x))))
    _mixed(ties, node, x, node.attributes.get_int("axis", default))
    return {0}


def _reduce(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(shape_of(x))
    axes = ints(node, 1, "axes")
    if not axes:
        axes = [] if node.attributes.get_int("noop_with_empty_axes", 0) else list(range(rank))
    gone = {a % rank for a in axes}
    keep = node.attributes.get_int("keepdims", 1)
    place = 0
    for axis in range(rank):
        if axis in gone:
            _mixed(ties, node, x, axis)
            place += keep
        else:
            ties.tie(ties.axis(x, axis), ties.axis(y, place))
            place += 1
    return {0}


def _ordered(ties: Ties, node: ir.Node, default: int) -> set[int]:
    """Along one axis the order matters; it may be lost or change its length there."""
    x = node.inputs[0]
    rank = len(shape_of(x))
    fixed = node.attributes.get_int("axis", default) % rank
    if node.op_type == "CumSum":
        fixed = (ints(node, 1) or [0])[0] % rank
    kept = [a for a in range(rank) if a != fixed]
    if node.op_type not in ("ArgMax", "ArgMin") or node.attributes.get_int("keepdims", 1):
        kept = list(range(rank))
    ties.pin(x, f"{node.op_type} {node.name!r} depends on the order along it", fixed)
    for y in (v for v in node.outputs if v.name):
        for place, axis in enumerate(kept):
            if axis == fixed:
                ties.pin(y, f"{node.op_type} {node.name!r} makes its order", place)
            else:
                ties.tie(ties.axis(x, axis), ties.axis(y, place))
    return {0}


# ---- windows


def _pool(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    if len(node.outputs) > 1 and node.outputs[1].name and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        raise Unknown("its indices are read")
    ties.same(x, y, range(2))
    _pin_space(ties, node, x, y)
    return {0}


def _global_pool(ties: Ties, node: ir.Node) -> set[int]:
    x = node.inputs[0]
    ties.same(x, node.outputs[0], range(2))
    for axis in range(2, len(shape_of(x))):
        _mixed(ties, node, x, axis)
    return {0}


def _resize(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    if node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        raise Unknown("it crops")
    if node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unknown("its scales depend on the shapes")
    rank = len(shape_of(x))
    axes = [a % rank for a in node.attributes.get_ints("axes", None) or range(rank)]
    given = node.inputs[2] if len(node.inputs) > 2 else None
    factors = constant(given)
    if given is not None and factors is None:
        raise Unknown("its scales are not constant")
    same = dict.fromkeys(range(rank), True)
    for place, axis in enumerate(axes):
        same[axis] = shape_of(x)[axis] == shape_of(y)[axis]
        if factors is not None and factors.size:
            same[axis] = float(factors.reshape(-1)[place]) == 1.0
    for axis in range(rank):
        if same[axis]:
            ties.tie(ties.axis(x, axis), ties.axis(y, axis))
        else:
            ties.pin(x, f"Resize {node.name!r} interpolates along it", axis)
            ties.pin(y, f"Resize {node.name!r} interpolates along it", axis)
    return {0}


# ---- views and copies


def _string(ties: Ties, parts: Sequence[ir.Value | None], whole: ir.Value | None, along: int) -> None:
    """`parts` lie one behind the other in `whole` on axis `along` and are as wide on the others."""
    offset = 0
    for part in parts:
        for axis in range(len(shape_of(whole))):
            atoms, own = ties.axis(whole, axis).atoms, ties.axis(part, axis)
            ties.tie(own, atoms[offset : offset + own.size] if axis == along else atoms)
        offset += shape_of(part)[along]


def _concat(ties: Ties, node: ir.Node) -> set[int]:
    y = node.outputs[0]
    _string(ties, node.inputs, y, node.attributes.get_int("axis", 0) % len(shape_of(y)))
    return _all(node)


def _split(ties: Ties, node: ir.Node) -> set[int]:
    _refuse_old_form(ties, node, "split")
    x = node.inputs[0]
    _string(ties, node.outputs, x, node.attributes.get_int("axis", 0) % len(shape_of(x)))
    return {0}


def _refuse_old_form(ties: Ties, node: ir.Node, attribute: str) -> None:
    if ties.cut and attribute in node.attributes:
        raise Unknown(f"{attribute} is an attribute, as before opset 13")


def slice_index(node: ir.Node) -> dict[int, np.ndarray]:
    """Axis -> positions of the input that a Slice with constant bounds takes. Raises Unknown."""
    shape = shape_of(node.inputs[0])
    starts, ends = ints(node, 1, "starts"), ints(node, 2, "ends")
    if starts is None or ends is None:
        raise Unknown("a Slice without bounds")
    axes = ints(node, 3, "axes") or list(range(len(starts)))
    steps = ints(node, 4) or [1] * len(starts)
    taken = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = shape[axis % len(shape)]
        if step < 0:  # ONNX counts from the end as Python does, but an end below -size means "past the first"
            low = size + end if -size <= end < 0 else max(end, -1)
            taken[axis % len(shape)] = np.arange(min(start + size if start < 0 else start, size - 1), low, step)
        else:
            taken[axis % len(shape)] = np.arange(size)[slice(start, end, step)]
    return taken


def _slice(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    _refuse_old_form(ties, node, "starts")
    taken = slice_index(node)
    for axis in range(len(shape_of(x))):
        positions = taken.get(axis)
        source = ties.axis(x, axis)
        ties.tie(source if positions is None else source.atoms[positions], ties.axis(y, axis))
        if positions is not None and ties.cut and positions.size > 1 and positions[1] - positions[0] != 1:
            ties.pin(x, f"Slice {node.name!r} takes every {positions[1] - positions[0]}th of it", axis)
    return {0}


def _gather(ties: Ties, node: ir.Node) -> set[int]:
    x, i, y = node.inputs[0], node.inputs[1], node.outputs[0]
    rank, extra = len(shape_of(x)), len(shape_of(i))
    axis = node.attributes.get_int("axis", 0) % rank
    for a in range(rank):
        if a != axis:
            ties.tie(ties.axis(x, a), ties.axis(y, a if a < axis else a - 1 + extra))
    indices = constant(i)
    if indices is None:
        ties.pin(x, f"Gather {node.name!r} takes positions of it by number", axis)
        for a in range(extra):
            ties.tie(ties.axis(i, a), ties.axis(y, axis + a))
        return {0, 1}
    if extra == 1 and not ties.cut:
        ties.tie(ties.axis(x, axis).atoms[indices], ties.axis(y, axis))
    else:
        ties.pin_atoms(ties.axis(x, axis).atoms[indices.reshape(-1)], f"Gather {node.name!r} takes it by number")
        for a in range(extra):
            ties.pin(y, f"Gather {node.name!r} makes its order", axis + a)
        if ties.cut:
            ties.pin(x, f"Gather {node.name!r} takes positions of it by number", axis)
    return {0}


def pad_amounts(node: ir.Node) -> tuple[list[int], list[int]]:
    """Begin and end pads of every axis. Raises Unknown if they are not constant."""
    rank = len(shape_of(node.inputs[0]))
    pads = ints(node, 1, "pads")
    axes = [a % rank for a in ints(node, 3) or range(rank)]
    begin, end = [0] * rank, [0] * rank
    for place, axis in enumerate(axes):
        begin[axis], end[axis] = (pads or [])[place], (pads or [])[len(axes) + place]
    return begin, end


def _pad(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    _refuse_old_form(ties, node, "pads")
    filled = node.attributes.get_string("mode", "constant") == "constant"
    for axis, (begin, end) in enumerate(zip(*pad_amounts(node), strict=True)):
        inner, outer = ties.axis(x, axis), ties.axis(y, axis)
        if begin == end == 0 or (filled and begin >= 0 and end >= 0):
            ties.tie(inner, outer.atoms[begin : begin + inner.size])
        else:
            ties.pin(x, f"Pad {node.name!r} repeats or crops it", axis)
            ties.pin(y, f"Pad {node.name!r} repeats or crops it", axis)
    return {0}


def _transpose(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(shape_of(x))
    for target, source in enumerate(node.attributes.get_ints("perm", None) or reversed(range(rank))):
        ties.tie(ties.axis(x, source), ties.axis(y, target))
    return {0}


def _expand(ties: Ties, node: ir.Node) -> set[int]:
    ties.broadcast(node.inputs[0], node.outputs[0])
    return {0}


def _tile(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    for axis, (short, long) in enumerate(zip(shape_of(x), shape_of(y), strict=True)):
        times = long // max(short, 1)
        ties.tie(np.tile(ties.axis(x, axis).atoms, times), ties.axis(y, axis), np.repeat(np.arange(times), short))
    return {0}


def _depth_space(ties: Ties, node: ir.Node) -> set[int]:
    deep, flat = node.inputs[0], node.outputs[0]
    if node.op_type == "SpaceToDepth":
        deep, flat = flat, deep
    block, few = node.attributes.get_int("blocksize", 1) ** 2, shape_of(flat)[1]
    atoms = ties.axis(flat, 1).atoms
    inner_first = node.op_type == "DepthToSpace" and node.attributes.get_string("mode", "DCR") == "CRD"
    source = np.repeat(atoms, block) if inner_first else np.tile(atoms, block)
    color = np.tile(np.arange(block), few) if inner_first else np.repeat(np.arange(block), few)
    ties.tie(source, ties.axis(deep, 1), color)
    ties.same(deep, flat, range(1))
    _pin_space(ties, node, deep, flat)
    return {0}


def _quantize(ties: Ties, node: ir.Node) -> set[int]:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(shape_of(x))
    ties.same(x, y, range(rank))
    for parameter in node.inputs[1:]:
        shape = () if parameter is None else shape_of(parameter)
        if len(shape) > 1 or node.attributes.get_int("block_size", 0):
            raise Unknown("quantized in blocks")
        if len(shape) == 1 and shape != (1,):
            ties.tie(ties.axis(parameter, 0), ties.axis(x, node.attributes.get_int("axis", 1) % rank))
    return _all(node)


def _reshape(ties: Ties, node: ir.Node) -> set[int]:
    """Runs of axes with equal products: one to one tied, one to many a `Merge`, many to many pinned. Ones in between
    belong to no run."""
    x, y = node.inputs[0], node.outputs[0]
    what = f"{node.op_type} {node.name!r}"
    if ties.cut and node.op_type == "Squeeze" and ints(node, 1, "axes") is None:
        raise Unknown("it drops every axis of length 1")
    for left, right in reshape_runs(shape_of(x), shape_of(y)):
        a, b = [ties.axis(x, i) for i in left], [ties.axis(y, j) for j in right]
        if len(a) == 1 and len(b) == 1:
            ties.tie(a[0], b[0])
        elif len(a) == 1 and b:
            ties.merges.append(Merge(node, a[0], tuple(b)))
        elif len(b) == 1 and a:
            ties.merges.append(Merge(node, b[0], tuple(a)))
        else:
            for axis in (*a, *b):
                ties.pin_atoms(axis.atoms, f"{what} mixes it with other axes")
    return {0}


def reshape_runs(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Shortest runs of axes with equal products; axes of length 1 are left out.

    >>> reshape_runs((1, 8, 3, 3), (1, 72))
    [([1, 2, 3], [1])]
    """
    if 0 in before or 0 in after:
        return [(list(range(len(before))), list(range(len(after))))]
    left, right = ([i for i, d in enumerate(s) if d != 1] for s in (before, after))
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        a, b, m, n = [left[i]], [right[j]], before[left[i]], after[right[j]]
        i, j = i + 1, j + 1
        while m != n:
            if m < n:
                a.append(left[i])
                m, i = m * before[left[i]], i + 1
            else:
                b.append(right[j])
                n, j = n * after[right[j]], j + 1
        runs.append((a, b))
    return runs


RULES: dict[str, Rule] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(("AveragePool", "MaxPool", "LpPool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), _global_pool),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _depth_space),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantize),
    **dict.fromkeys(("ArgMax", "ArgMin", "CumSum"), partial(_ordered, default=0)),
    **dict.fromkeys(("TopK", "Hardmax"), partial(_ordered, default=-1)),
    **dict.fromkeys(("Softmax", "LogSoftmax", "LpNormalization"), partial(_mixing, default=-1)),
    "BatchNormalization": _batch_norm,
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "Expand": _expand,
    "GRU": partial(_recurrent, gates=3),
    "Gather": _gather,
    "Gemm": _gemm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LSTM": partial(_recurrent, gates=4),
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "Pad": _pad,
    "RNN": partial(_recurrent, gates=1),
    "Resize": _resize,
    "Slice": _slice,
    "Split": _split,
    "Tile": _tile,
    "Transpose": _transpose,
}
