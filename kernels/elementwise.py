"""Elementwise layers that no other kernel absorbs: two tensors combined, a vector over channels, an activation alone.

    same     y[i] = act(a[i] op b[i])
    channel  y[r, p] = act(a[r, p] op b[r mod C])      b one value a row: Mul of squeeze-and-excite, channel scales
    row      y[r, p] = act(a[r, p] op b[p])            b one vector for all rows: a bias over the last axis
    scalar   y[i] = act(a[i] op b[0])
    unary    y[i] = act(a[i])
    cast     y[i] = a[i] in another floating-point type

op is add, sub, mul or div; `swapped` exchanges its sides. A tile is a few thousand consecutive elements, or some rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels.base import Format, KernelCall, Machine, unique
from sparsec.kernels.epilogue import NONE, Activation, activate
from sparsec.kernels.epilogue import reference as reference_activation

Op = Literal["add", "sub", "mul", "div"]
Spread = Literal["same", "channel", "row", "scalar"]
TILE = 4096  # elements: 16 KB in, 16 KB out


TABLE: tuple[Format, ...] = (
    Format("elementwise_f32_same", "Add, Sub, Mul, Div", "dense", "float32", "two tensors of one shape", "equal shapes"),
    Format("elementwise_f32_channel", "Add, Sub, Mul, Div", "dense", "float32", "a tensor and a value a channel",
           "b [C, 1, 1] or [N, C, 1, 1]"),
    Format("elementwise_f32_row", "Add, Sub, Mul, Div", "dense", "float32", "a tensor and a vector over its last axes",
           "b's shape is the tail of a's"),
    Format("elementwise_f32_scalar", "Add, Sub, Mul, Div", "dense", "float32", "a tensor and one value", "b has one element"),
    Format("elementwise_f32_unary", "Relu, Clip, Sigmoid, Tanh, ...", "dense", "float32", "an activation alone", ""),
)  # fmt: skip

_OPS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
}


def spread(a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> tuple[Spread, int, int] | None:
    """How b broadcasts over a: (kind, b's elements, elements of a under one row), or None if in no way known here.

    `channel`: rows of `inner` elements, one value each, values repeating. `row`: rows of b's size. a has the result's shape.
    """
    size, count = int(np.prod(a_shape)), int(np.prod(b_shape))
    if len(b_shape) > len(a_shape):
        return None
    aligned = (1,) * (len(a_shape) - len(b_shape)) + tuple(b_shape)
    if aligned == tuple(a_shape):
        return "same", count, size
    if count == 1:
        return "scalar", 1, size
    if any(b not in (1, a) for a, b in zip(a_shape, aligned, strict=True)):
        return None
    wide = [i for i, (a, b) in enumerate(zip(a_shape, aligned, strict=True)) if b == a and a != 1]
    first, last = wide[0], wide[-1]
    if any(aligned[i] != a_shape[i] for i in range(first, last + 1)):
        return None
    inner = int(np.prod(a_shape[last + 1 :]))
    return ("row", count, count) if inner == 1 else ("channel", count, inner)


def reference(op: Op, a: np.ndarray, b: np.ndarray, activation: Activation = NONE, swapped: bool = False) -> np.ndarray:
    """`act(a op b)` with NumPy's broadcasting, in float64."""
    left, right = (b, a) if swapped else (a, b)
    return reference_activation(activation, _OPS[op](left.astype(np.float64), right.astype(np.float64)))


def bind(
    machine: Machine,
    op: Op,
    *,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    activation: Activation = NONE,
    swapped: bool = False,
) -> KernelCall:
    """The call for `act(a op b)`, or `act(b op a)` if `swapped`; b broadcasts over a as `spread` says. Roles (a, b, y).

    Raises ValueError where `spread` knows no way. y must not overlap a or b.
    """
    found = spread(a_shape, b_shape)
    if found is None:
        raise ValueError(f"b {list(b_shape)} does not broadcast over a {list(a_shape)} as one run of axes")
    kind, count, inner = found
    size = int(np.prod(a_shape))

    def combine(a: Any, b: Any) -> Any:
        return activate(activation, _OPS[op](b, a) if swapped else _OPS[op](a, b))

    def flat(a: Any, b: Any, y: Any, begin: Any, end: Any) -> None:
        def one(at: Any, lanes: int) -> Any:
            other = emit.splat(b[0], lanes) if kind == "scalar" else emit.load(b, at, lanes)
            return combine(emit.load(a, at, lanes), other)

        _runs(machine, y, size, begin, end, one)

    per_tile = max(1, TILE // inner)
    rows = size // inner

    def by_rows(a: Any, b: Any, y: Any, begin: Any, end: Any) -> None:
        with T.serial(begin * per_tile, T.min(end * per_tile, rows)) as r:
            base = T.bind(r * inner)

            def one(at: Any, lanes: int) -> Any:
                value = emit.splat(b[r % count], lanes) if kind == "channel" else emit.load(b, at, lanes)
                return combine(emit.load(a, base + at, lanes), value)

            _span(machine, y, base, inner, one)

    in_rows = kind in ("channel", "row")
    tiles = -(-rows // per_tile) if in_rows else -(-size // TILE)
    arguments = [("a", size, machine.element), ("b", count, machine.element), ("y", size, machine.element)]
    func = emit.function(arguments, by_rows if in_rows else flat)
    facts = (op, size, kind, count, inner, activation, swapped, machine)
    text = f"{op} of {list(a_shape)} and {list(b_shape)}{' swapped' if swapped else ''}, {activation.name}"
    return KernelCall(unique(machine.named(f"{op}_f32_{kind}"), *facts), func, ("a", "b", "y"), {}, tiles, 0, text)


def bind_unary(machine: Machine, *, size: int, activation: Activation) -> KernelCall:
    """The call for `act(x)` on `size` elements. Roles (x, y). Tiles: runs of 4,096 elements."""

    def body(x: Any, y: Any, begin: Any, end: Any) -> None:
        _runs(machine, y, size, begin, end, lambda at, lanes: activate(activation, emit.load(x, at, lanes)))

    func = emit.function([("x", size, machine.element), ("y", size, machine.element)], body)
    name = unique(machine.named(f"{activation.name}_f32"), size, activation, machine)
    return KernelCall(name, func, ("x", "y"), {}, -(-size // TILE), 0, f"{activation.name} of {size} elements")


def bind_cast(machine: Machine, *, size: int, source: str, target: str) -> KernelCall:
    """The call for `size` elements of type `source` rounded to type `target`. Roles (x, y). Tiles: runs of 4,096 elements."""

    def body(x: Any, y: Any, begin: Any, end: Any) -> None:
        _runs(machine, y, size, begin, end, lambda at, lanes: emit.convert(emit.load(x, at, lanes), target))

    func = emit.function([("x", size, source), ("y", size, target)], body)
    name = unique(f"cast_{source}_{target}", size, machine)
    return KernelCall(name, func, ("x", "y"), {}, -(-size // TILE), 0, f"{size} elements from {source} to {target}")


def _runs(machine: Machine, y: Any, size: int, begin: Any, end: Any, one: Callable[[Any, int], Any]) -> None:
    """Tiles of TILE consecutive elements, the last one shorter."""
    full, rest = divmod(size, TILE)
    if full:
        with T.serial(begin, T.min(end, full)) as t:
            _span(machine, y, t * TILE, TILE, lambda at, lanes: one(t * TILE + at, lanes))
    if rest:
        with T.If(T.And(begin <= full, end > full)), T.Then():
            _span(machine, y, full * TILE, rest, lambda at, lanes: one(full * TILE + at, lanes))


def _span(machine: Machine, y: Any, base: Any, count: int, one: Callable[[Any, int], Any]) -> None:
    """y[base + i] = one(i) for i < count: vectors, the last of which overlaps its neighbour or is narrower."""
    lanes = machine.lanes
    while lanes > 1 and lanes > count:
        lanes //= 2
    whole = count // lanes
    unroll = 2 if whole >= 2 else 1
    with T.serial(0, whole // unroll) as i:
        for u in range(unroll):
            at = (i * unroll + u) * lanes
            emit.store(y, base + at, one(at, lanes), lanes)
    if whole % unroll:
        emit.store(y, base + (whole - 1) * lanes, one((whole - 1) * lanes, lanes), lanes)
    if count % lanes:
        emit.store(y, base + count - lanes, one(count - lanes, lanes), lanes)
