"""Gemm and MatMul: one constant weight (bias, residual and activation fused), or two activations.

A weight of a fully connected layer is [N, K]: ONNX's Gemm with transB, or MatMul's [K, N] transposed. alpha and beta of a
Gemm go into weight and bias. Leading axes of x fold into M. A weight that the model stores as integers may stay so
(`sparsec.lowering.rules.weight_only`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsec.kernels import fc, gemm, weight_only
from sparsec.kernels.base import KernelCall, Machine
from sparsec.kernels.integers import Stored
from sparsec.lowering.match import VIEWS, Group, attribute, constant, dims, fuse, only_consumer, scalar
from sparsec.lowering.prices import SPARSE_FROM, Bound, Prices, Way, choose
from sparsec.lowering.rules.base import Context, Taken, emit_simple, float_input
from sparsec.lowering.rules.weight_only import kept_ways, stored_weight
from sparsec.lowering.structure import detect_structure

_SPARSE_FROM_INTEGERS = (
    0.5  # share of zeros: integers round many weights to zero, and floats must read a quarter to win
)


@dataclass(frozen=True)
class ConstantProduct:
    """x as [m, K] times a constant w [N, K] transposed; `stored`: w as the model has it, if in integers."""

    group: Group
    x: ir.Value
    m: int
    w: np.ndarray
    bias: np.ndarray | None
    stored: Stored | None


def read_gemm(node: ir.Node, context: Context) -> ConstantProduct | str | None:
    """Gemm, or MatMul with a constant rank-2 right side, and what is fused behind it; or why not."""
    if node.op_type not in ("Gemm", "MatMul"):
        return None
    w = constant(node.inputs[1])
    if constant(node.inputs[0]) is not None or w is None or w.ndim != 2:
        return None if node.op_type == "MatMul" else "its weight is computed, not constant"
    x = float_input(node)
    if isinstance(x, str):
        return x
    bias: np.ndarray | None = None
    turned = node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
    stored = stored_weight(node.inputs[1], 1 if turned else 0)
    if node.op_type == "Gemm":
        if attribute(node, "transA", 0):
            return "its left side is transposed"
        alpha, beta = float(attribute(node, "alpha", 1.0)), float(attribute(node, "beta", 1.0))
        stored = stored if alpha == 1.0 else None
        w = w if turned else w.T
        w = w if alpha == 1.0 else (w * np.float32(alpha)).astype(np.float32)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            c = constant(node.inputs[2])
            if c is None or c.size not in (1, w.shape[0]) or (c.ndim == 2 and c.shape[0] != 1):
                return "its C is not one vector along the columns"
            bias = np.broadcast_to(c.reshape(-1) * np.float32(beta), (w.shape[0],)).astype(np.float32)
    else:
        w = w.T
    group = fuse(node, context.taken, bias=bias is None)
    if group.bias is not None:
        added = constant(group.bias)
        assert added is not None
        bias = added.reshape(-1)
    m = int(np.prod(dims(x)[:-1], dtype=np.int64))
    return ConstantProduct(group, x, m, np.ascontiguousarray(w, np.float32), bias, stored)


def take_gemm(node: ir.Node, context: Context) -> Taken | str | None:
    """Gemm, or MatMul with a constant rank-2 right side."""
    read = read_gemm(node, context)
    if not isinstance(read, ConstantProduct):
        return read
    return bind_product(read.group, context, read.x, read.m, read.w, read.bias, read.stored)


def bind_product(
    group: Group, context: Context, x: ir.Value, m: int, w: np.ndarray, bias: np.ndarray | None,
    stored: Stored | None = None,
) -> Taken:  # fmt: skip
    """x as [m, K] times the constant w [N, K] transposed, dense or in a stored form; `stored`: w as the model has it."""
    machine = context.machine
    prices = price_product(machine, m, w, stored)
    measured = context.tuning.find(group.name, prices) if context.tuning is not None else None
    way, candidates, reason = choose(prices, measured)
    call = _call(machine, m, w, way, bias=bias, activation=group.activation, residual=group.residual)
    inputs = {"x": x} | ({"residual": group.other} if group.other is not None else {})
    structure = str(prices.structure)
    us = way.predicted_us
    return Taken(
        group, emit_simple(group, call, inputs, reason, us, weight=w, structure=structure, candidates=candidates)
    )


def price_product(machine: Machine, m: int, w: np.ndarray, integers: Stored | None = None) -> Prices:
    """Price x [m, K] times w [N, K] transposed: dense tilings, stored forms if there are zeros to speak of, integers."""
    structure = detect_structure(w[:, :, None, None])
    n, k = w.shape
    dense = gemm.TABLE[0]
    ways = [
        Way(machine.named(dense.name), False, us, dense, tiling) for us, tiling in gemm.ranked_tilings(machine, m, k, n)
    ]
    ways += kept_ways(machine, m, integers) if integers is not None else []
    stored = {}
    zeros_from = SPARSE_FROM if integers is None else _SPARSE_FROM_INTEGERS
    if structure.zeros >= zeros_from and fc.refusal(w.shape) is None:
        for form in fc.TABLE:
            packed = fc.pack(w, form)
            ways.append(Way(machine.named(form.name), True, fc.predict_us(machine, m, packed), form))
            stored[form.name] = round(100 * packed.blocks * packed.columns / (packed.groups * k))

    def calls(way: Way) -> Bound:
        return [(_call(machine, m, w, way, bias=np.zeros(n, np.float32)), {"x": "x", "y": "y"})]

    facts: dict[str, Any] = {"op": "Gemm", "x_shape": [m, k], "w_shape": [n, k], "stored": stored}
    if integers is not None:
        facts["weights"] = [f"int{integers.bits}", integers.group, integers.zero is not None]
    return Prices(facts, w, structure, tuple(ways), calls)


def _call(machine: Machine, m: int, w: np.ndarray, way: Way, **options: Any) -> KernelCall:
    if way.kept:
        return weight_only.bind(machine, m=m, stored=way.form, tiling=way.tiling, **options)
    if way.sparse:
        return fc.bind(machine, m=m, w=w, form=way.form, **options)
    return gemm.bind(machine, m=m, w=w, tiling=way.tiling, **options)


@dataclass(frozen=True)
class ActivationProduct:
    """scale * a [batch, m, k] times b [batch, k, n], or [batch, n, k] if `transposed`; `a_shared`: a has no batch."""

    group: Group
    a: ir.Value
    b: ir.Value
    batch: int
    m: int
    k: int
    n: int
    transposed: bool
    a_shared: bool
    scale: float

    @property
    def facts(self) -> dict[str, Any]:
        """What a kernel of two activations is bound with."""
        names = ("batch", "m", "k", "n", "transposed", "a_shared", "scale")
        return {name: getattr(self, name) for name in names} | {"activation": self.group.activation}


def read_matmul(node: ir.Node, context: Context) -> ActivationProduct | str | None:
    """MatMul of two activations, with equal batch or one side shared; or why not."""
    if node.op_type != "MatMul":
        return None
    a, b = float_input(node), node.inputs[1]
    if isinstance(a, str):
        return a
    assert b is not None
    left, right = dims(a), dims(b)
    if len(left) < 2 or len(right) < 2:
        return "one side is a vector"
    turned = _transposed(b, context)
    batches = (int(np.prod(left[:-2])), int(np.prod(right[:-2])))
    if batches[0] != batches[1] and 1 not in batches:
        return "batches that broadcast in part"
    if batches[0] == batches[1] and batches[0] != 1 and left[:-2] != right[:-2]:
        padded = max(len(left), len(right)) - 2
        if (1,) * (padded - len(left) + 2) + left[:-2] != (1,) * (padded - len(right) + 2) + right[:-2]:
            return "batches that broadcast in part"
    batch, (m, k), n = max(batches), left[-2:], right[-1]
    if batches[1] == 1 and batch > 1:  # rows of all batches against one right side
        m, batch = m * batch, 1
    group = fuse(node, context.taken, residual=False)
    scale = 1.0
    if len(group.nodes) == 1 and (scaled := _scale(node.outputs[0])) and scaled[0] not in context.taken:
        scale = scaled[1]
        behind = fuse(scaled[0], context.taken, residual=False)
        group = replace(behind, main=node, nodes=(node, *behind.nodes))
    if turned is not None:
        b = turned.inputs[0]
        assert b is not None
        group = replace(group, nodes=(turned, *group.nodes))
    a_shared = batches[0] == 1 and batch > 1
    return ActivationProduct(group, a, b, batch, m, k, n, turned is not None, a_shared, scale)


def take_matmul(node: ir.Node, context: Context) -> Taken | str | None:
    """MatMul of two activations, with equal batch or one side shared."""
    read = read_matmul(node, context)
    if not isinstance(read, ActivationProduct):
        return read
    call = gemm.bind_matmul(context.machine, **read.facts)
    us = read.batch * gemm.predict_us(context.machine, read.m, read.k, read.n)
    return Taken(read.group, emit_simple(read.group, call, {"a": read.a, "b": read.b}, "two activations", us))


def _scale(value: ir.Value) -> tuple[ir.Node, float] | None:
    """The Mul or Div of `value` by a scalar, and the factor."""
    node = only_consumer(value)
    if node is None or node.op_type not in ("Mul", "Div"):
        return None
    number = scalar(node.inputs[1] if node.inputs[0] is value else node.inputs[0])
    if number is None or (node.op_type == "Div" and (node.inputs[0] is not value or number == 0)):
        return None
    return node, number if node.op_type == "Mul" else 1.0 / number


def _transposed(b: ir.Value, context: Context) -> ir.Node | None:
    """The Transpose of the last two axes that makes `b`, through Reshapes that keep them, if nothing else reads it."""
    node, shape = b.producer(), dims(b)
    while node is not None and node.op_type in VIEWS and only_consumer(node.outputs[0]) is not None:
        b = node.inputs[0]  # type: ignore[assignment]
        if dims(b)[-2:] != shape[-2:]:
            return None
        node = b.producer()
    if node is None or node.op_type != "Transpose" or only_consumer(node.outputs[0]) is None or node in context.taken:
        return None
    rank = len(dims(node.outputs[0]))
    order = list(attribute(node, "perm", range(rank)[::-1]))
    return node if order == [*range(rank - 2), rank - 1, rank - 2] else None
