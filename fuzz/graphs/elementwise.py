"""Operators of one value after the other. A float that rounding may change is never turned into a truth value or a whole number."""

from __future__ import annotations

import numpy as np

from fuzz.graphs.draft import (
    BOOL,
    BYTES,
    F16,
    F32,
    F64,
    I8,
    I32,
    I64,
    REAL,
    U8,
    WHOLE,
    Draft,
    Value,
    broadcast,
    element,
)

NUMBERS = (*REAL, *WHOLE)
UNARY = {
    **dict.fromkeys((
        "Relu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "LeakyRelu", "Elu", "Softplus", "Erf", "Exp", "Softsign", "Selu",
        "Gelu", "Mish", "Atan", "Sin", "Cos", "Celu", "ThresholdedRelu", "Asinh", "Swish",
    ), REAL),
    **dict.fromkeys(("Sqrt", "Reciprocal", "Log"), REAL),  # of what is made positive
    **dict.fromkeys(("Neg", "Abs"), (*NUMBERS, I8)),
    "Identity": (*NUMBERS, BOOL, I8, U8), "Dropout": REAL, "Not": (BOOL,), "Sign": WHOLE, "BitwiseNot": (*WHOLE, U8),
}  # fmt: skip
POSITIVE = frozenset({"Sqrt", "Reciprocal", "Log"})
BINARY = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Max", "Min"), NUMBERS),
    **dict.fromkeys(("And", "Or", "Xor"), (BOOL,)),
    **dict.fromkeys(("Less", "Equal", "GreaterOrEqual", "Greater", "LessOrEqual"), (*WHOLE, *BYTES)),
    **dict.fromkeys(("BitwiseAnd", "BitwiseOr", "BitwiseXor"), (*WHOLE, U8)),
    "PRelu": REAL, "Div": REAL, "Pow": REAL, "Mod": WHOLE,
}  # fmt: skip
LOGIC = frozenset({"Less", "Equal", "GreaterOrEqual", "Greater", "LessOrEqual"})
VARIADIC: dict[str, tuple[np.dtype, ...]] = {"Sum": REAL, "Mean": REAL, "Max": NUMBERS, "Min": NUMBERS}


def unary(d: Draft, x: Value) -> None:
    """One operand."""
    op = d.among([op for op, dtypes in UNARY.items() if x.dtype in dtypes])
    if op in POSITIVE:
        _positive(d, x, op)
    elif op == "Exp" and x.dtype == F16:
        bounded = _clipped(d, x, -4, 4)  # float16 ends at 65504
        if bounded:
            d.add(op, [bounded.name], x.shape, x.dtype)
    else:
        d.add(op, [x.name], x.shape, x.dtype)


def _positive(d: Draft, x: Value, op: str) -> None:
    size = d.add("Abs", [x.name], x.shape, x.dtype)
    above = size and d.add("Add", [size.name, d.constant(0.5, x.dtype)], x.shape, x.dtype)
    if above:
        d.add(op, [above.name], x.shape, x.dtype)


def binary(d: Draft, x: Value) -> None:
    """Two operands that broadcast, either of them first."""
    if x.rounded:
        return
    op = d.among([op for op, dtypes in BINARY.items() if x.dtype in dtypes])
    if op in ("Div", "Pow", "Mod", "PRelu"):
        name, shape = _second(d, x, op)
        result = broadcast(x.shape, shape)
        inputs = [x.name, name]
    else:
        others = [v for v in d.values if v.dtype == x.dtype and not v.rounded and broadcast(v.shape, x.shape)]
        if d.number(0, 2) and others:
            other = d.among(others)
            name, shape = other.name, other.shape
        else:
            shape = _partner(d, x)
            name = d.constant(d.numbers(shape, x.dtype))
        result = broadcast(x.shape, shape)
        inputs = [x.name, name] if d.maybe() else [name, x.name]
    assert result is not None
    d.broadcasts += shape != x.shape
    d.add(op, inputs, result, BOOL if op in LOGIC else x.dtype)


def _partner(d: Draft, x: Value) -> tuple[int, ...]:
    """The shape with some dimensions 1, some of the first left out, or with one more in front."""
    shape = tuple(s if d.number(0, 2) else 1 for s in x.shape)
    if x.rank and x.rank < 5 and d.maybe(6):
        return (2, *shape)
    return shape[d.number(0, x.rank) :]


def _second(d: Draft, x: Value, op: str) -> tuple[str, tuple[int, ...]]:
    """A second operand for which the result is well conditioned."""
    if op == "Pow":
        return d.constant(d.among((2, 3, 2.0)), d.among((x.dtype, x.dtype, F32, I64))), ()
    if op == "PRelu":
        shape = (x.shape[1], *[1] * (x.rank - 2)) if x.rank >= 2 else ()
        return d.constant(d.numbers(shape, x.dtype)), shape
    shape = tuple(s if d.maybe() else 1 for s in x.shape)
    numbers = d.numbers(shape, x.dtype)
    if op == "Mod":
        return d.constant(np.where(numbers == 0, 3, numbers), x.dtype), shape
    return d.constant(np.copysign(np.abs(numbers) + 0.5, numbers), x.dtype), shape


def variadic(d: Draft, x: Value) -> None:
    """One to four operands."""
    op = d.among(VARIADIC)
    if x.dtype not in VARIADIC[op] or x.rounded:
        return
    fitting = [v for v in d.values if v.dtype == x.dtype and broadcast(v.shape, x.shape) == x.shape]
    operands = [x.name, *[d.among(fitting).name for _ in range(d.number(0, 3))]]
    d.add(op, operands, x.shape, x.dtype)


def _clipped(d: Draft, x: Value, low: float, high: float) -> Value | None:
    if d.opset < 11:
        return d.add("Clip", [x.name], x.shape, x.dtype, min=float(low), max=float(high))
    return d.add("Clip", [x.name, d.constant(low, x.dtype), d.constant(high, x.dtype)], x.shape, x.dtype)


def clip(d: Draft, x: Value) -> None:
    """Both bounds, or one of them."""
    if x.dtype not in NUMBERS or x.rounded:
        return
    low, high = d.among(((-0.5, 1.5), (0, 6), (-1, 1)))
    if d.opset < 11 or d.maybe():
        _clipped(d, x, low, high)
    elif d.maybe():
        d.add("Clip", [x.name, "", d.constant(high, x.dtype)], x.shape, x.dtype)
    else:
        d.add("Clip", [x.name, d.constant(low, x.dtype)], x.shape, x.dtype)


def cast(d: Draft, x: Value) -> None:
    """To a type that shows no more than the old one did: a float that is almost whole would be two numbers."""
    if x.rounded:
        return
    wider: dict[np.dtype, list[np.dtype]] = {
        F16: [F32], F32: [F64, F16], F64: [F32], BOOL: [*REAL, I32, I64, U8], I8: [F32, I32], U8: [F32, I32],
        I32: [*REAL, I64, BOOL], I64: [F32, I32, BOOL],
    }  # fmt: skip
    kind = d.among(wider[x.dtype])
    if d.opset >= 15 and d.maybe(4):
        d.add("CastLike", [x.name, d.constant(1, kind)], x.shape, kind)
    else:
        d.add("Cast", [x.name], x.shape, kind, to=element(kind))


def where(d: Draft, x: Value) -> None:
    """With a condition of this graph, which may broadcast."""
    conditions = [v for v in d.values if v.dtype == BOOL and broadcast(v.shape, x.shape) == x.shape]
    if not conditions or x.rounded:
        return
    shape = _partner(d, x)
    other, condition = d.constant(d.numbers(shape, x.dtype)), d.among(conditions)
    result = broadcast(x.shape, shape)
    assert result is not None
    d.broadcasts += condition.shape != x.shape
    d.add("Where", [condition.name, *([x.name, other] if d.maybe() else [other, x.name])], result, x.dtype)


def silu(d: Draft, x: Value) -> None:
    """Activations as exporters write them, and scales behind layers."""
    kind = d.among(("silu", "hard-swish", "gelu", "affine"))
    if x.dtype not in (F16, F32):
        return
    if kind == "silu":
        gate = d.add("Sigmoid", [x.name], x.shape, x.dtype)
    elif kind == "hard-swish":
        more = d.add("Add", [x.name, d.constant(3, x.dtype)], x.shape, x.dtype)
        bounded = more and _clipped(d, more, 0, 6)
        gate = bounded and d.add("Div", [bounded.name, d.constant(6, x.dtype)], x.shape, x.dtype)
    elif kind == "gelu":
        inner = d.add("Div", [x.name, d.constant(2**0.5, x.dtype)], x.shape, x.dtype)
        erf = inner and d.add("Erf", [inner.name], x.shape, x.dtype)
        gate = erf and d.add("Add", [erf.name, d.constant(1, x.dtype)], x.shape, x.dtype)
    else:
        channels = (x.shape[1], *[1] * (x.rank - 2)) if x.rank >= 2 else ()
        gate = d.add("Mul", [x.name, d.constant(d.numbers(channels, x.dtype))], x.shape, x.dtype)
        if gate:
            d.add("Add", [gate.name, d.constant(d.numbers(channels, x.dtype))], x.shape, x.dtype)
        return
    if gate:
        d.add("Mul", [x.name, gate.name], x.shape, x.dtype)
