"""Questions to and small rewrites of TIR loops, for the schedule rule of the generic route."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm import ir, sym, tirx
from tvm.ir import TensorLoad, Var

Loops = list[tuple[Var, int]]


def statements(stmt: Any) -> list[Any]:
    if isinstance(stmt, tirx.SeqStmt):
        return [s for part in stmt.seq for s in statements(part)]
    return [stmt]


def sequence(parts: Iterable[Any]) -> Any:
    flat = [s for part in parts for s in statements(part)]
    return flat[0] if len(flat) == 1 else tirx.SeqStmt(flat)


def peel(stmt: Any) -> tuple[Loops, Any]:
    loops: Loops = []
    while (
        isinstance(stmt, tirx.For)
        and int(stmt.kind) == 0
        and const_int(stmt.min) == 0
        and const_int(stmt.extent) is not None
    ):
        loops.append((stmt.loop_var, int(stmt.extent)))
        stmt = stmt.body
    return loops, stmt


def const_int(expr: Any) -> int | None:
    return int(expr) if isinstance(expr, int | ir.prim.IntImm) else None


def wrap(loops: Loops, body: Any) -> Any:
    for var, extent in reversed(loops):
        body = for_loop(var, extent, body)
    return body


def for_loop(var: Any, extent: int, body: Any, kind: Any = tirx.ForKind.SERIAL) -> Any:
    dtype = str(var.ty.dtype) if hasattr(var.ty, "dtype") else "int64"
    return tirx.For(var, tirx.IntImm(dtype, 0), tirx.IntImm(dtype, extent), kind, body)


def substitute(stmt: Any, values: dict[Any, Any]) -> Any:
    return tvm_ffi.structural_map(stmt, (Var, lambda var: values.get(var, var)))


def accesses_of(stmt: Any) -> dict[Any, list[tuple[bool, list[Any]]]]:
    """Buffer -> (is it a write, indices) of each access."""
    found: dict[Any, list[tuple[bool, list[Any]]]] = {}

    def load(node: Any) -> None:
        found.setdefault(node.source, []).append((False, list(node.indices)))

    def store(node: Any) -> None:
        found.setdefault(node.buffer, []).append((True, list(node.indices)))

    tvm_ffi.structural_walk(stmt, [(TensorLoad, load), (tirx.BufferStore, store)])
    return found


def callee(call: Any) -> str:
    return getattr(call.op, "name", "")


def shape_of(buffer: Any) -> tuple[int, ...]:
    return tuple(int(e) for e in buffer.shape)


def itemsize(buffer: Any) -> int:
    return max(1, tvm.DataType(str(buffer.dtype)).bits // 8)


def stride_of(buffer: Any, indices: Sequence[Any], var: Any) -> int | None:
    """Elements that one step of `var` moves an access, or None if that is not constant."""
    index: Any = tirx.IntImm("int64", 0)
    for expr, extent in zip(indices, shape_of(buffer), strict=True):
        index = index * extent + expr
    return coefficient(index, var)


def coefficient(index: Any, var: Any) -> int | None:
    if not mentions(index, var):
        return 0
    found = sym.detect_linear_equation(index, [var])
    return const_int(sym.Analyzer().simplify(found[0])) if found else None


def mentions(node: Any, var: Any) -> bool:
    seen: list[bool] = []
    tvm_ffi.structural_walk(node, (Var, lambda v: seen.append(True) if v.same_as(var) else None))
    return bool(seen)


def collapse(loops: Loops, independent: int, body: Any) -> tuple[Loops, int, Any]:
    """Merge neighbouring loops that walk every buffer like one loop does."""
    loops = list(loops)
    at = len(loops) - 2
    while at >= 0:
        if at + 1 >= len(loops):
            at -= 1
            continue
        if (at < independent) == (at + 1 < independent):
            merged = merge(loops[at], loops[at + 1], body)
            if merged is not None:
                independent -= at < independent
                loops[at : at + 2] = [merged[0]]
                body = merged[1]
        at -= 1
    return loops, independent, body


def merge(outer: tuple[Any, int], inner: tuple[Any, int], body: Any) -> tuple[tuple[Any, int], Any] | None:
    (i, rows), (j, columns) = outer, inner
    both = tirx.Var("f", str(i.ty.dtype))
    analyzer = sym.Analyzer()
    analyzer.bind(both, ir.Range(tirx.IntImm(str(i.ty.dtype), 0), tirx.IntImm(str(i.ty.dtype), rows * columns)))
    changed = substitute(body, {i: both // columns, j: both % columns})

    def load(node: Any) -> Any:
        return tirx.BufferLoad(node.source, [analyzer.simplify(e) for e in node.indices])

    def store(node: Any) -> Any:
        return tirx.BufferStore(node.buffer, node.value, [analyzer.simplify(e) for e in node.indices])

    changed = tvm_ffi.structural_map(changed, [(TensorLoad, load), (tirx.BufferStore, store)])
    divisions: list[Any] = []
    tvm_ffi.structural_walk(
        changed, ((tirx.FloorDiv, tirx.FloorMod), lambda e: divisions.append(e) if mentions(e, both) else None)
    )
    return None if divisions else ((both, rows * columns), changed)


def operation_count(stmt: Any) -> int:
    """Arithmetic operations of a statement or expression, loops multiplied out; index arithmetic not counted."""
    if isinstance(stmt, tirx.For):
        return (const_int(stmt.extent) or 1) * operation_count(stmt.body)
    if isinstance(stmt, tirx.SeqStmt):
        return sum(operation_count(s) for s in stmt.seq)
    if isinstance(stmt, tirx.IfThenElse):
        return operation_count(stmt.then_case) + (operation_count(stmt.else_case) if stmt.else_case is not None else 0)
    if isinstance(stmt, tirx.BufferStore):
        return max(1, operation_count(stmt.value))
    total = 0

    def count(node: Any) -> None:
        nonlocal total
        if isinstance(node, ir.Call):
            total += (
                10
                if callee(node) in ("tirx.exp", "tirx.sigmoid", "tirx.tanh", "tirx.erf", "tirx.pow", "tirx.log")
                else 1
            )
        elif str(node.ty.dtype).startswith("float"):
            total += 1

    arithmetic = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Max, tirx.Min, tirx.Select, ir.Call)
    if not isinstance(stmt, tirx.Stmt):
        tvm_ffi.structural_walk(stmt, (arithmetic, count))
    return total


def accumulation(store: Any) -> tuple[Callable[[Any, Any], Any], Any] | None:
    """Operator and term of `y[i] = y[i] op term`, where the term does not read `y`."""
    for kind, operator in ((tirx.Add, lambda a, b: a + b), (tirx.Max, tirx.max), (tirx.Min, tirx.min)):
        if not isinstance(store.value, kind):
            continue
        for own, term in ((store.value.a, store.value.b), (store.value.b, store.value.a)):
            is_own = isinstance(own, TensorLoad) and own.source.same_as(store.buffer)
            if (
                is_own
                and tvm_ffi.structural_equal(own.indices, store.indices)
                and store.buffer not in accesses_of(term)
            ):
                return operator, term
    return None
