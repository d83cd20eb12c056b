"""Operators that choose, count or place elements, as comparisons with constants.

TopK by rank: element i of a row is at place r_i = |{j : x_j before x_i}|, where j is before i if it is larger, or equal
and further left; output r is the element whose place is r. It costs n^2 comparisons a row and needs no memory that
depends on data.
"""

from __future__ import annotations

import math

import numpy as np
import onnx

from sparsec.lowering.expansions.context import Chain, Context, ExpansionError, attribute, numpy_type

COMPARISONS = 1 << 24  # of one TopK or TfIdfVectorizer


def one_hot(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto]:
    """The element type of the values is kept; negative indices count from the end."""
    indices, depth, values = node.input
    classes = int(context.value(depth).reshape(-1)[0])
    off, on = context.value(values)
    rank = len(context.shape(indices))
    axis = int(attribute(node, "axis", -1)) % (rank + 1)
    dtype = numpy_type(context.element(indices))
    line = np.arange(classes).reshape([-1 if d == axis else 1 for d in range(rank + 1)])
    chain = Chain(context, node.output[0])
    wrapped = chain.add("Add", indices, chain.const(classes, dtype))
    index = chain.add("Where", chain.add("Less", indices, chain.const(0, dtype)), wrapped, indices)
    equal = chain.add("Equal", chain.add("Unsqueeze", index, chain.const([axis])), chain.const(line, dtype))
    chain.add("Where", equal, chain.const(on, on.dtype), chain.const(off, off.dtype), result=node.output[0])
    return chain.nodes


def top_k(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto]:
    """Values and indices of the k largest (or smallest), in order; of equal ones the first comes first."""
    x, shape = node.input[0], context.shape(node.input[0])
    values, indices = [*node.output, ""][:2]
    axis = int(attribute(node, "axis", -1)) % len(shape)
    n, k = shape[axis], int(context.value(node.input[1]).reshape(-1)[0])
    if math.prod(shape) * n > COMPARISONS:
        raise ExpansionError(f"TopK of {n} is done by comparing each with each, which is too much for {list(shape)}")
    dtype = np.dtype(numpy_type(context.element(x)))
    largest = bool(attribute(node, "largest", 1))
    if dtype.kind == "f":
        least = -np.inf if largest else np.inf
    else:
        least = np.iinfo(dtype).min if largest else np.iinfo(dtype).max
    chain = Chain(context, values or indices)
    order = [*(d for d in range(len(shape)) if d != axis), axis]
    back = [order.index(d) for d in range(len(shape))]
    rows = x if order == back == sorted(order) else chain.add("Transpose", x, perm=order)
    own = chain.add("Unsqueeze", rows, chain.const([-1]))
    other = chain.add("Unsqueeze", rows, chain.const([-2]))
    before = chain.add("Greater" if largest else "Less", other, own)
    left = chain.const(np.arange(n) < np.arange(n)[:, None], bool)
    tied = chain.add("And", chain.add("Equal", other, own), left)
    ahead = chain.add("Cast", chain.add("Or", before, tied), to=onnx.TensorProto.INT32)
    place = chain.add("ReduceSum", ahead, chain.const([-1]), keepdims=0)
    places = chain.const(np.arange(k)[:, None], np.int32)
    here = chain.add("Equal", chain.add("Unsqueeze", place, chain.const([-2])), places)

    def chosen(reduce: str, each: str, otherwise: str, result: str) -> None:
        picked = chain.add(reduce, chain.add("Where", here, each, otherwise), chain.const([-1]), keepdims=0)
        chain.add("Transpose", picked, perm=back, result=result)

    if values:
        chosen("ReduceMax" if largest else "ReduceMin", other, chain.const(least, dtype), values)
    if indices:
        chosen("ReduceSum", chain.const(np.arange(n)), chain.const(0), indices)
    return chain.nodes


def eye_like(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto]:
    """A constant: only the shape of the input counts."""
    kind = int(attribute(node, "dtype", 0)) or context.element(node.input[0])
    rows, columns = context.shape(node.input[0])
    chain = Chain(context, node.output[0])
    eye = np.eye(rows, columns, k=int(attribute(node, "k", 0)))
    chain.add("Identity", chain.const(eye, numpy_type(kind)), result=node.output[0])
    return chain.nodes


def tf_idf(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto]:
    """For each n-gram of the pool: how often its elements stand in a row with 0 .. max_skip_count others between each two.

    The count (TF), whether there is one (IDF: the weight), or the product (TFIDF), at the n-gram's place in the output.
    """
    pool = attribute(node, "pool_int64s", None)
    if pool is None:
        raise ExpansionError("TfIdfVectorizer of text has no lowering")
    x, shape, output = node.input[0], context.shape(node.input[0]), node.output[0]
    starts = [*attribute(node, "ngram_counts", []), len(pool)]
    places = list(attribute(node, "ngram_indexes", []))
    weights = np.asarray(attribute(node, "weights", None) or np.ones(len(places)), np.float32)
    shortest, longest = (int(attribute(node, f"{m}_gram_length", 1)) for m in ("min", "max"))
    skips, mode = int(attribute(node, "max_skip_count", 0)), str(attribute(node, "mode", "TF"))
    chain = Chain(context, output)
    batch, length = (shape[0] if len(shape) == 2 else 1), shape[-1]
    if batch * length * len(pool) > COMPARISONS:
        raise ExpansionError(f"TfIdfVectorizer of {length} elements against {len(pool)} is too much")
    rows = chain.add("Reshape", chain.cast(x, onnx.TensorProto.INT64), chain.const([batch, length]))
    found, columns, first = [], [], 0
    for size in range(1, len(starts)):
        grams = np.asarray(pool[starts[size - 1] : starts[size]], np.int64).reshape(-1, size)
        own, first = list(range(first, first + len(grams))), first + len(grams)
        if not own or not shortest <= size <= longest:
            continue
        counts = []
        for gap in range(1, (skips if size > 1 else 0) + 2):
            windows = length - (size - 1) * gap
            if windows < 1:
                continue
            matches = ""
            for j in range(size):
                at = chain.const(np.arange(windows) + j * gap)
                taken = chain.add("Unsqueeze", chain.add("Gather", rows, at, axis=1), chain.const([2]))
                equal = chain.add("Equal", taken, chain.const(grams[:, j].reshape(1, 1, -1)))
                matches = chain.add("And", matches, equal) if matches else equal
            number = chain.add("Cast", matches, to=onnx.TensorProto.FLOAT)
            counts.append(chain.add("ReduceSum", number, chain.const([1]), keepdims=0))
        total = ""
        for count in counts:
            total = chain.add("Add", total, count) if total else count
        if total:
            found.append(total)
            columns += own
    width = 1 + max(places)
    place = np.zeros((len(columns), width), np.float32)
    for row, gram in enumerate(columns):
        place[row, places[gram]] = 1
    if not found:
        zeros = chain.const(np.zeros([*shape[:-1], width]), np.float32)
        chain.add("Identity", zeros, result=output)
        return chain.nodes
    counted = chain.add("Concat", *found, axis=1) if len(found) > 1 else found[0]
    if mode == "IDF":
        some = chain.add("Greater", counted, chain.const(0, np.float32))
        counted = chain.add("Cast", some, to=onnx.TensorProto.FLOAT)
    if mode != "TF":
        counted = chain.add("Mul", counted, chain.const(weights[columns], np.float32))
    placed = chain.add("MatMul", counted, chain.const(place, np.float32))
    chain.add("Reshape", placed, chain.const([*shape[:-1], width]), result=output)
    return chain.nodes
