"""Random valid graphs against ONNX Runtime, with random passes in between. `python -m fuzz.graphs --graphs N`

A graph has 1 to 8 operators over values of rank 0 to 5 and four element types; every operator's shape rule is applied here,
so that graphs are valid by construction (and checked by loading). Several graphs are parts of one model, which shares one
code generation: components of a graph do not touch each other. A failing model is shrunk by hypothesis to the graph and
the nodes that matter.

    expected(y) = ONNX Runtime on the rewritten model            allowed(y) = T max|y| + W

T is derived from the lengths of the sums (`sparsec.tolerance`); W is how far ONNX Runtime's own y moves when its inputs
move by one unit in the last place: where sums cancel, no implementation can do better. Integers must be equal.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from sparsec.errors import RecipeError, UnsupportedError

F32, I32, I64, BOOL = np.dtype("f4"), np.dtype("i4"), np.dtype("i8"), np.dtype("?")
UNARY = {
    "Relu": (F32,), "Sigmoid": (F32,), "Tanh": (F32,), "HardSwish": (F32,), "HardSigmoid": (F32,), "LeakyRelu": (F32,),
    "Elu": (F32,), "Softplus": (F32,), "Erf": (F32,), "Exp": (F32,), "Neg": (F32, I32, I64), "Abs": (F32, I32, I64),
    "Identity": (F32, I32, I64, BOOL), "Not": (BOOL,), "Softsign": (F32,), "Selu": (F32,), "Gelu": (F32,), "Mish": (F32,),
    "Sign": (I32, I64), "Atan": (F32,), "Sin": (F32,), "Cos": (F32,), "Sqrt": (F32,), "Reciprocal": (F32,), "Log": (F32,),
}  # fmt: skip
POSITIVE = frozenset({"Sqrt", "Reciprocal", "Log"})
BINARY = {
    "Add": (F32, I32, I64), "Sub": (F32, I32, I64), "Mul": (F32, I32, I64), "Max": (F32, I32, I64), "Min": (F32, I32, I64),
    "And": (BOOL,), "Or": (BOOL,), "Xor": (BOOL,), "Less": (I32, I64), "Equal": (I32, I64), "GreaterOrEqual": (I32, I64),
}  # fmt: skip
LOGIC = frozenset({"Less", "Equal", "GreaterOrEqual"})
REDUCE = {
    "ReduceSum": (F32, I32, I64),
    "ReduceMean": (F32,),
    "ReduceMax": (F32, I32),
    "ReduceMin": (F32, I32),
    "ReduceL2": (F32,),
}
ELEMENTS = 4096

PASSES = (
    (), (), ("prune:sparsity=0.5,block=4x1",), ("prune:sparsity=0.8,block=1x1",), ("prune:nm=2:4",),
    ("prune:sparsity=0.6,block=4x4", "fold-constants"), ("remove-no-ops", "prune:sparsity=0.9,block=8x1"), ("rearrange",),
    ("prune-channels:sparsity=0.25",), ("factorize",), ("fold-constants", "remove-no-ops", "explicit-pads"),
)  # fmt: skip


@dataclass
class Value:
    """A tensor in the graph."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass
class Draft:
    """Graphs under construction; names carry a prefix for each graph."""

    draw: Any
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)  # of the graph at hand
    count: int = 0

    def among(self, choices: Any) -> Any:
        return self.draw(st.sampled_from(list(choices)))

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def shape(self, rank: int) -> tuple[int, ...]:
        return tuple(self.among((1, 2, 3, 4, 5, 7, 8, 16, 17)) for _ in range(rank))

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def constant(self, array: np.ndarray) -> str:
        name = self.name()
        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def weight(self, *shape: int) -> str:
        """Normal numbers, some of them zero in blocks."""
        rng = np.random.default_rng(self.number(0, 99))
        zeros, block = self.among([0.0, 0.5, 0.8, 0.95]), self.among([(1, 1), (4, 1), (8, 1), (4, 4)])
        grid = rng.random((-(-shape[0] // block[0]), -(-shape[1] // block[1]), *shape[2:])) >= zeros
        mask = grid.repeat(block[0], axis=0).repeat(block[1], axis=1)[: shape[0], : shape[1]]
        return self.constant((mask * rng.standard_normal(shape)).astype(F32))

    def numbers(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        rng = np.random.default_rng(self.number(0, 99))
        return random_array(rng, shape, dtype)

    def input(self, shape: tuple[int, ...], dtype: np.dtype) -> Value:
        value = Value(self.name(), shape, dtype)
        self.inputs.append(value)
        self.values.append(value)
        return value

    def add(self, op: str, inputs: list[str], shape: tuple[int, ...], dtype: np.dtype, **attributes: Any) -> None:
        value = Value(self.name(), tuple(int(d) for d in shape), dtype)
        self.nodes.append(helper.make_node(op, inputs, [value.name], name=f"{op}_{value.name}", **attributes))
        self.values.append(value)


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if dtype == BOOL:
        return rng.integers(0, 2, shape).astype(BOOL)
    return (rng.standard_normal(shape) if dtype == F32 else rng.integers(-5, 6, shape)).astype(dtype)


# ---- operators: each adds nodes behind `x`, or nothing if it does not apply


def unary(d: Draft, x: Value) -> None:
    fitting = [op for op, dtypes in UNARY.items() if x.dtype in dtypes]
    op = d.among(fitting)
    if op in POSITIVE:
        d.add("Abs", [x.name], x.shape, x.dtype)
        d.add("Add", [d.values[-1].name, d.constant(np.array(0.5, F32))], x.shape, x.dtype)
        x = d.values[-1]
    d.add(op, [x.name], x.shape, x.dtype)


def binary(d: Draft, x: Value) -> None:
    op = d.among([op for op, dtypes in BINARY.items() if x.dtype in dtypes])
    others = [v for v in d.values if v.dtype == x.dtype and _broadcast(v.shape, x.shape) is not None]
    if d.number(0, 2) and others:
        other = d.among(others)
        name, shape = other.name, other.shape
    else:
        keep = [d.number(0, 2) > 0 for _ in x.shape]
        shape = tuple(s if k else 1 for s, k in zip(x.shape, keep, strict=True))[
            d.number(0, len(x.shape)) if x.shape else 0 :
        ]
        name = d.constant(d.numbers(shape, x.dtype))
    inputs = [x.name, name] if d.number(0, 1) else [name, x.name]
    result = _broadcast(x.shape, shape)
    assert result is not None
    if np.prod(result, dtype=int) <= ELEMENTS:
        d.add(op, inputs, result, BOOL if op in LOGIC else x.dtype)


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    try:
        return np.broadcast_shapes(a, b)
    except ValueError:
        return None


def conv(d: Draft, x: Value) -> None:
    rank = len(x.shape) - 2
    if x.dtype != F32 or rank not in (1, 2):
        return
    n, c, *sizes = x.shape
    kernel = [d.among((1, 1, 2, 3, 3, 5)) for _ in sizes]
    strides, dilations = [d.number(1, 2) for _ in sizes], [d.among((1, 1, 1, 2)) for _ in sizes]
    pads = [d.number(0, 2) for _ in range(2 * rank)]
    out = []
    for i, size in enumerate(sizes):
        room = size + pads[i] + pads[i + rank] - dilations[i] * (kernel[i] - 1) - 1
        if room < 0:
            return
        out.append(room // strides[i] + 1)
    group = d.among([1, 1, c, *[g for g in (2, 4) if c % g == 0]])
    oc = group * d.among((1, 2, 3, 4, 8)) if group > 1 else d.among((1, 3, 4, 8, 16, 17))
    inputs = [x.name, d.weight(oc, c // group, *kernel)]
    if d.number(0, 1):
        inputs.append(d.constant(d.numbers((oc,), F32)))
    d.add(
        "Conv",
        inputs,
        (n, oc, *out),
        F32,
        kernel_shape=kernel,
        strides=strides,
        dilations=dilations,
        pads=pads,
        group=group,
    )


def pool(d: Draft, x: Value) -> None:
    if x.dtype != F32 or len(x.shape) != 4:
        return
    op = d.among(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"))
    n, c, *sizes = x.shape
    if op.startswith("Global"):
        d.add(op, [x.name], (n, c, 1, 1), F32)
        return
    kernel = [d.number(1, min(3, s)) for s in sizes]
    strides = [d.number(1, 2) for _ in sizes]
    pads = [d.number(0, kernel[i % 2] - 1) for i in range(4)]
    out = [(s + pads[i] + pads[i + 2] - kernel[i]) // strides[i] + 1 for i, s in enumerate(sizes)]
    more = {"count_include_pad": d.number(0, 1)} if op == "AveragePool" else {}
    d.add(op, [x.name], (n, c, *out), F32, kernel_shape=kernel, strides=strides, pads=pads, **more)


def product(d: Draft, x: Value) -> None:
    if x.dtype != F32 or not x.shape:
        return
    n = d.among((1, 3, 4, 8, 16, 17))
    if len(x.shape) == 2 and d.number(0, 1):
        turned = d.number(0, 1)
        k = x.shape[0] if turned else x.shape[1]
        m = x.shape[1] if turned else x.shape[0]
        other = d.number(0, 1)
        inputs = [x.name, d.weight(n, k) if other else d.weight(k, n), d.constant(d.numbers((n,), F32))]
        alpha, beta = d.among((1.0, 0.5)), d.among((1.0, 2.0))
        d.add("Gemm", inputs, (m, n), F32, transA=turned, transB=other, alpha=alpha, beta=beta)
        return
    fitting = [
        v for v in d.values if v.dtype == F32 and len(v.shape) == len(x.shape) >= 2 and v.shape[-2] == x.shape[-1]
    ]
    fitting = [v for v in fitting if v.shape[:-2] == x.shape[:-2]]
    if fitting and d.number(0, 1):
        other_value = d.among(fitting)
        d.add("MatMul", [x.name, other_value.name], (*x.shape[:-1], other_value.shape[-1]), F32)
    else:
        d.add("MatMul", [x.name, d.weight(x.shape[-1], n)], (*x.shape[:-1], n), F32)


def normalize(d: Draft, x: Value) -> None:
    if x.dtype != F32 or len(x.shape) < 2:
        return
    op = d.among(("BatchNormalization", "LayerNormalization", "Softmax", "LogSoftmax", "InstanceNormalization"))
    c = x.shape[1]
    if op == "BatchNormalization":
        positive = np.abs(d.numbers((c,), F32)) + np.float32(0.5)
        rest = [d.constant(a) for a in (d.numbers((c,), F32), d.numbers((c,), F32), d.numbers((c,), F32), positive)]
        d.add(op, [x.name, *rest], x.shape, F32)
    elif op == "LayerNormalization":
        axis = d.number(1, len(x.shape) - 1)
        if np.prod(x.shape[axis:]) > 2:
            d.add(op, [x.name, d.constant(d.numbers(x.shape[axis:], F32))], x.shape, F32, axis=axis, epsilon=1e-2)
    elif op == "InstanceNormalization":
        if len(x.shape) > 2 and np.prod(x.shape[2:]) > 2:
            inputs = [x.name, d.constant(d.numbers((c,), F32)), d.constant(d.numbers((c,), F32))]
            d.add(op, inputs, x.shape, F32, epsilon=1e-2)
    else:
        d.add(op, [x.name], x.shape, F32, axis=d.number(-len(x.shape), len(x.shape) - 1))


def reduce(d: Draft, x: Value) -> None:
    fitting = [op for op, dtypes in REDUCE.items() if x.dtype in dtypes]
    if not fitting or not x.shape:
        return
    axes = sorted(d.draw(st.sets(st.integers(0, len(x.shape) - 1), min_size=1)))
    keep = d.number(0, 1)
    shape = [1 if i in axes else s for i, s in enumerate(x.shape) if keep or i not in axes]
    d.add(d.among(fitting), [x.name, d.constant(np.array(axes))], tuple(shape), x.dtype, keepdims=keep)


def views(d: Draft, x: Value) -> None:
    rank = len(x.shape)
    op = d.among(
        ("Transpose", "Reshape", "Flatten", "Unsqueeze", "Squeeze", "Slice", "Pad", "Concat", "Split", "Expand", "Tile")
    )
    if op == "Transpose" and rank:
        order = d.draw(st.permutations(range(rank)))
        d.add(op, [x.name], tuple(x.shape[i] for i in order), x.dtype, perm=list(order))
    elif op == "Reshape":
        total = int(np.prod(x.shape, dtype=int))
        first = d.among([f for f in range(1, total + 1) if total % f == 0][:12])
        d.add(op, [x.name, d.constant(np.array([first, -1]))], (first, total // first), x.dtype)
    elif op == "Flatten":
        axis = d.number(0, rank)
        parts = int(np.prod(x.shape[:axis], dtype=int)), int(np.prod(x.shape[axis:], dtype=int))
        d.add(op, [x.name], parts, x.dtype, axis=axis)
    elif op == "Unsqueeze" and rank < 5:
        axis = d.number(0, rank)
        d.add(op, [x.name, d.constant(np.array([axis]))], (*x.shape[:axis], 1, *x.shape[axis:]), x.dtype)
    elif op == "Squeeze" and 1 in x.shape:
        axis = x.shape.index(1)
        d.add(op, [x.name, d.constant(np.array([axis]))], x.shape[:axis] + x.shape[axis + 1 :], x.dtype)
    elif op == "Slice" and rank:
        axis, step = d.number(0, rank - 1), d.among((1, 1, 2, -1))
        size = x.shape[axis]
        start = d.number(0, size - 1)
        end = d.number(start + 1, size) if step > 0 else -size - 1
        length = len(range(start, end if step > 0 else -1, step))
        bounds = [d.constant(np.array([v])) for v in (start, end, axis, step)]
        d.add(op, [x.name, *bounds], (*x.shape[:axis], length, *x.shape[axis + 1 :]), x.dtype)
    elif op == "Pad" and rank and x.dtype != BOOL:
        pads = [d.number(0, 2) for _ in range(2 * rank)]
        mode = d.among(("constant", "constant", "edge"))
        shape = tuple(s + pads[i] + pads[i + rank] for i, s in enumerate(x.shape))
        if np.prod(shape) <= ELEMENTS:
            d.add(op, [x.name, d.constant(np.array(pads))], shape, x.dtype, mode=mode)
    elif op == "Concat" and rank:
        axis = d.number(0, rank - 1)
        fitting = [
            v
            for v in d.values
            if v.dtype == x.dtype
            and len(v.shape) == rank
            and all(a == b or i == axis for i, (a, b) in enumerate(zip(v.shape, x.shape, strict=True)))
        ]
        other = d.among(fitting)
        shape = (*x.shape[:axis], x.shape[axis] + other.shape[axis], *x.shape[axis + 1 :])
        if np.prod(shape) <= ELEMENTS:
            d.add(op, [x.name, other.name], shape, x.dtype, axis=axis)
    elif op == "Split" and rank:
        axis = d.number(0, rank - 1)
        size = x.shape[axis]
        if size > 1:
            first = d.number(1, size - 1)
            outputs = [
                Value(d.name(), (*x.shape[:axis], s, *x.shape[axis + 1 :]), x.dtype) for s in (first, size - first)
            ]
            sizes = d.constant(np.array([first, size - first]))
            names = [v.name for v in outputs]
            d.nodes.append(helper.make_node(op, [x.name, sizes], names, name=f"Split_{names[0]}", axis=axis))
            d.values += outputs
    elif op == "Expand":
        shape = (d.number(1, 3), *[s if s > 1 else d.number(1, 3) for s in x.shape])
        if rank < 5 and np.prod(shape) <= ELEMENTS:
            d.add(op, [x.name, d.constant(np.array(shape))], shape, x.dtype)
    elif op == "Tile" and rank:
        repeats = [d.number(1, 2) for _ in x.shape]
        shape = tuple(r * s for r, s in zip(repeats, x.shape, strict=True))
        if np.prod(shape) <= ELEMENTS:
            d.add(op, [x.name, d.constant(np.array(repeats))], shape, x.dtype)


def others(d: Draft, x: Value) -> None:
    op = d.among(
        ("Cast", "Clip", "Where", "Gather", "Resize", "PRelu", "CumSum", "ArgMax", "DepthToSpace", "OneHotless")
    )
    rank = len(x.shape)
    if op == "Cast":
        kind = d.among([t for t in (F32, I32, I64, BOOL) if t not in (x.dtype, BOOL) or x.dtype != F32])
        if not (x.dtype == F32 and kind != F32):  # a float that is almost whole would be two numbers
            d.add(op, [x.name], x.shape, kind, to=int(helper.np_dtype_to_tensor_dtype(kind)))
    elif op == "Clip" and x.dtype == F32:
        d.add(op, [x.name, d.constant(np.array(-0.5, F32)), d.constant(np.array(1.5, F32))], x.shape, F32)
    elif op == "Where" and x.dtype in (F32, I64):
        conditions = [v for v in d.values if v.dtype == BOOL and _broadcast(v.shape, x.shape) == x.shape]
        if conditions:
            d.add(
                op,
                [d.among(conditions).name, x.name, d.constant(d.numbers((1,), x.dtype))],
                x.shape if rank else (1,),
                x.dtype,
            )
    elif op == "Gather" and rank:
        axis = d.number(0, rank - 1)
        index = np.array([d.number(-x.shape[axis], x.shape[axis] - 1) for _ in range(d.number(1, 3))])
        d.add(op, [x.name, d.constant(index)], (*x.shape[:axis], len(index), *x.shape[axis + 1 :]), x.dtype, axis=axis)
    elif op == "Resize" and x.dtype == F32 and rank == 4:
        shape = (*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        if np.prod(shape) <= ELEMENTS:
            mode = d.among(("nearest", "linear"))
            sizes = d.constant(np.array([1, 1, 2, 2], F32))
            more = (
                {"nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"} if mode == "nearest" else {}
            )
            d.add(op, [x.name, "", sizes], shape, F32, mode=mode, **more)
    elif op == "PRelu" and x.dtype == F32 and rank >= 2:
        d.add(op, [x.name, d.constant(d.numbers((x.shape[1], *[1] * (rank - 2)), F32))], x.shape, F32)
    elif op == "CumSum" and x.dtype in (F32, I32, I64) and rank:
        axis = d.constant(np.array(d.number(0, rank - 1)))
        d.add(op, [x.name, axis], x.shape, x.dtype, exclusive=d.number(0, 1), reverse=d.number(0, 1))
    elif op == "ArgMax" and x.dtype in (I32,) and rank:
        axis, keep = d.number(0, rank - 1), d.number(0, 1)
        shape = tuple(1 if i == axis else s for i, s in enumerate(x.shape) if keep or i != axis)
        d.add(op, [x.name], shape, I64, axis=axis, keepdims=keep)
    elif op == "DepthToSpace" and x.dtype == F32 and rank == 4 and x.shape[1] % 4 == 0:
        n, c, h, w = x.shape
        d.add(op, [x.name], (n, c // 4, 2 * h, 2 * w), F32, blocksize=2, mode=d.among(("DCR", "CRD")))


OPERATORS: tuple[Callable[[Draft, Value], None], ...] = (
    unary, binary, binary, conv, conv, conv, pool, product, product, normalize, reduce, views, views, others,
)  # fmt: skip


@st.composite
def models(draw: Any, graphs: int = 8) -> tuple[onnx.ModelProto, int, tuple[str, ...]]:
    """A model of up to `graphs` graphs, how many it has, and passes."""
    d = Draft(draw)
    count = draw(st.integers(1, graphs))
    for _ in range(count):
        d.values = []
        kind = d.among((F32, F32, F32, F32, F32, I32, I64, BOOL))
        d.input(d.shape(d.among((4, 4, 4, 3, 2, 2, 1, 5, 0))), kind)
        if np.prod(d.values[0].shape, dtype=int) > ELEMENTS:
            d.values[0].shape = (1, *d.values[0].shape[1:3], *[1] * (len(d.values[0].shape) - 3))
        before = len(d.nodes)
        for _ in range(d.number(1, 8)):
            d.among(OPERATORS)(d, d.among(d.values[-3:]))
        if len(d.nodes) == before:
            d.add("Identity", [d.values[0].name], d.values[0].shape, kind)
        read = {name for node in d.nodes for name in node.input}
        made = {name for node in d.nodes for name in node.output}
        d.outputs += [v for v in d.values if v.name in made and v.name not in read]
    graph = helper.make_graph(d.nodes, "g", [_info(v) for v in d.inputs], [_info(v) for v in d.outputs], d.tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model, count, draw(st.sampled_from(PASSES))


def _info(value: Value) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(value.name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)


# ---- the comparison


class Mismatch(AssertionError):
    """A result that rounding does not explain."""


def compare(model: onnx.ModelProto, passes: tuple[str, ...], counts: Counter[str], seed: int = 0) -> None:
    """Compile, run, compare. Raises Mismatch; counts what passes and lowering declined."""
    from sparsec.inprocess import InProcess
    from sparsec.loading import load_model, model_bytes
    from sparsec.lowering import lower
    from sparsec.passes.fold_constants import quiet_session
    from sparsec.pipeline import run_passes
    from sparsec.targets import find_target
    from sparsec.tolerance import tolerances

    target = find_target("host")
    try:
        loaded = load_model(model)
    except UnsupportedError as error:
        counts[f"refused: {str(error)[:60]}"] += 1
        return
    for name in passes:
        try:
            loaded, _ = run_passes(loaded, (name,), target=target)
            counts[f"pass {name.partition(':')[0]}"] += 1
        except RecipeError:
            counts["pass that found nothing to do"] += 1
    data = model_bytes(loaded)
    try:
        program = lower(loaded, target, "fuzz")
    except UnsupportedError as error:
        counts[f"refused: {str(error)[:60]}"] += 1
        return
    session = quiet_session(data)
    rng = np.random.default_rng(seed)
    feeds = {t.name: random_array(rng, t.shape, np.dtype(t.dtype)) for t in program.inputs}
    names = [y.name for y in session.get_outputs()]
    expected = dict(zip(names, session.run(None, feeds), strict=True))
    slack = dict.fromkeys(names, 0.0)
    for sign in (1, -1):
        moved = {n: _moved(a, rng, sign) for n, a in feeds.items()}
        for name, y in zip(names, session.run(None, moved), strict=True):
            if y.dtype == F32 and y.size:
                slack[name] = max(
                    slack[name], float(np.abs(y - expected[name])[np.isfinite(expected[name])].max(initial=0))
                )
    allowed = tolerances(loaded, target)
    got = InProcess(program).run(feeds)
    counts["outputs"] += len(names)
    for name in names:
        y, z = expected[name], got[name]
        if y.shape != z.shape or y.dtype != z.dtype:
            raise Mismatch(f"{name}: expected {y.dtype}{list(y.shape)}, got {z.dtype}{list(z.shape)}")
        if y.dtype != F32:
            if not np.array_equal(y, z):
                raise Mismatch(f"{name}: {int((y != z).sum())} of {y.size} integers differ")
            continue
        finite = np.isfinite(y)
        if not np.array_equal(y[~finite], z[~finite], equal_nan=True):
            raise Mismatch(f"{name}: what is not finite differs")
        error = float(np.abs(y - z, where=finite, out=np.zeros_like(y)).max(initial=0))
        limit = allowed[name] * float(np.abs(y[finite]).max(initial=0)) + 8 * slack[name] + 1e-37
        if not error <= limit:
            raise Mismatch(f"{name}: differs by {error:.3g}, allowed {limit:.3g}")


def _moved(array: np.ndarray, rng: np.random.Generator, sign: int) -> np.ndarray:
    if array.dtype != F32:
        return array
    directions = np.asarray(sign * np.inf * rng.choice((-1.0, 1.0), array.shape), F32)
    return np.asarray(np.nextafter(array, directions), F32).reshape(array.shape)


def run(
    graphs: int, start: int, together: int = 8, shrink: bool = True, keep: Path | None = None, examples: int = 5
) -> Counter[str]:
    """At least `graphs` graphs. Raises what failed, shrunk; the last failing model is written to `keep`."""
    counts: Counter[str] = Counter()
    while counts["graphs"] < graphs:
        _batch(start, together, shrink, keep, examples, counts)
        start += 1
    return counts


def _batch(start: int, together: int, shrink: bool, keep: Path | None, examples: int, counts: Counter[str]) -> None:
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)

    @seed(start)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=phases, suppress_health_check=list(HealthCheck)
    )
    @given(models(together))
    def one(drawn: tuple[onnx.ModelProto, int, tuple[str, ...]]) -> None:
        model, count, passes = drawn
        try:
            compare(model, passes, counts)
        except Exception:
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"graphs-{start}.onnx").write_bytes(model.SerializeToString())
                nodes = "; ".join(onnx.printer.to_text(node).strip() for node in model.graph.node)
                print(f"seed {start}, passes {passes}: {nodes[:3000]}", flush=True)
            raise
        counts["graphs"] += count
        counts["nodes"] += len(model.graph.node)

    one()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--together", type=int, default=8, help="graphs in one model")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--keep", type=Path, default=Path("fuzz/failures"))
    given_ = parser.parse_args()
    began, used = time.monotonic(), time.process_time()
    counts = run(given_.graphs, given_.seed, given_.together, not given_.no_shrink, given_.keep)
    for name, number in sorted(counts.items()):
        print(f"{number:>8}  {name}")
    print(f"{time.monotonic() - began:.0f} s, {time.process_time() - used:.0f} s of this process")


if __name__ == "__main__":
    main()
