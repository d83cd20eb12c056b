"""The schedule rule of the generic route, last part: vector code for innermost loops over flat buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm_ffi
from tvm import ir, tirx
from tvm.ir import TensorLoad

from sparsec.lowering.loops import (
    accesses_of,
    accumulation,
    callee,
    coefficient,
    collapse,
    for_loop,
    mentions,
    peel,
    sequence,
    statements,
    substitute,
    wrap,
)

FLAT_TILE = 1024  # elements of a tile of a flat elementwise loop
VECTOR_CALLS = frozenset(
    f"tirx.{name}" for name in ("exp", "tanh", "sqrt", "sigmoid", "floor", "ceil", "fabs", "log", "trunc")
)


class Emit:
    """Vector code for innermost loops over flat buffers."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes

    def flat_tiles(self, loop: tuple[Any, int], body: Any, tile: Any) -> tuple[int, Any]:
        """Tiles of FLAT_TILE elements of one long loop; the last tile takes the rest."""
        var, extent = loop
        full, rest = divmod(extent, FLAT_TILE)

        def part(count: int) -> Any:
            j = tirx.Var("j", str(var.ty.dtype))
            return self.inner(for_loop(j, count, substitute(body, {var: tile * FLAT_TILE + j})))

        if not rest:
            return full, part(FLAT_TILE)
        return full + 1, tirx.IfThenElse(tile < full, part(FLAT_TILE), part(rest))

    def inner(self, stmt: Any) -> Any:
        """`stmt` with its innermost loops vectorized."""
        if isinstance(stmt, tirx.SeqStmt):
            return self._sequence(statements(stmt))
        if isinstance(stmt, tirx.IfThenElse):
            other = self.inner(stmt.else_case) if stmt.else_case is not None else None
            return tirx.IfThenElse(stmt.condition, self.inner(stmt.then_case), other)
        loops, body = peel(stmt)
        if not loops:
            return stmt
        loops, _, body = collapse(loops, 0, body)
        if not isinstance(body, tirx.BufferStore):
            return wrap(loops, self.inner(body))
        (var, extent) = loops[-1]
        innermost = self._map(var, extent, body) or self._reduce(var, extent, body) or for_loop(var, extent, body)
        return wrap(loops[:-1], innermost)

    def _sequence(self, stmts: list[Any]) -> Any:
        result, i = [], 0
        while i < len(stmts):
            promoted = self._in_registers(stmts[i], stmts[i + 1]) if i + 1 < len(stmts) else None
            if promoted is not None:
                result.append(promoted)
                i += 2
            else:
                result.append(self.inner(stmts[i]))
                i += 1
        return sequence(result)

    def _vectorizable(self, expr: Any) -> bool:
        bad: list[Any] = []

        def call(node: Any) -> None:
            if callee(node) not in VECTOR_CALLS:
                bad.append(node)

        tvm_ffi.structural_walk(expr, (ir.Call, call))
        tvm_ffi.structural_walk(expr, (TensorLoad, lambda e: bad.append(e) if str(e.ty.dtype) == "bool" else None))
        return not bad and str(expr.ty.dtype) != "bool"

    def _map(self, var: Any, extent: int, store: Any) -> Any:
        """`y[base + var] = value` in vectors, then the rest in halves, then one by one."""
        if extent < 4 or coefficient(store.indices[0], var) != 1 or not self._vectorizable(store.value):
            return None
        own = accesses_of(store.value).get(store.buffer, [])
        if any(not tvm_ffi.structural_equal(indices[0], store.indices[0]) for _, indices in own):
            return None  # an iteration reads what another one writes
        parts = []
        for start, count, width in _segments(extent, self.lanes):
            o, v = tirx.Var("o", str(var.ty.dtype)), tirx.Var("v", str(var.ty.dtype))
            body = substitute(store, {var: o * width + v + start if width > 1 else o + start})
            parts.append(for_loop(o, count, for_loop(v, width, body, tirx.ForKind.VECTORIZED) if width > 1 else body))
        return sequence(parts)

    def _reduce(self, var: Any, extent: int, store: Any) -> Any:
        """`y = y op value(var)` with one partial result a lane."""
        operands = accumulation(store)
        if operands is None or mentions(store.indices[0], var) or not self._vectorizable(store.value):
            return None
        loads: list[Any] = []
        tvm_ffi.structural_walk(operands[1], (TensorLoad, loads.append))
        if any(coefficient(load.indices[0], var) not in (0, 1) for load in loads):
            return None
        width = self.lanes
        while width > extent // 2:
            width //= 2
        if width < 4:
            return None
        operator, value = operands
        acc = tirx.decl_buffer((width,), str(store.buffer.dtype), "acc", scope="local")
        dtype = str(var.ty.dtype)
        v, o, w, h, j = (tirx.Var(n, dtype) for n in ("v", "o", "w", "h", "j"))
        zero = tirx.IntImm(dtype, 0)
        full = extent // width
        start = for_loop(
            v, width, tirx.BufferStore(acc, substitute(value, {var: zero + v}), [v]), tirx.ForKind.VECTORIZED
        )
        term = substitute(value, {var: o * width + w + width})
        step = tirx.BufferStore(acc, operator(tirx.BufferLoad(acc, [w]), term), [w])
        parts = [tirx.AllocBuffer(acc), start]
        if full > 1:
            parts.append(for_loop(o, full - 1, for_loop(w, width, step, tirx.ForKind.VECTORIZED)))
        total = tirx.BufferLoad(store.buffer, store.indices)
        last = tirx.BufferStore(store.buffer, operator(total, tirx.BufferLoad(acc, [h])), store.indices)
        parts.append(for_loop(h, width, last, tirx.ForKind.UNROLLED))
        if extent % width:
            parts.append(for_loop(j, extent % width, substitute(store, {var: j + full * width})))
        return sequence(parts)

    def _in_registers(self, init: Any, update: Any) -> Any:
        """`for s: y[s] = c` and `for r...: for s: y[s] = y[s] op value` with a strip of `y` in registers."""
        init_loops, first = peel(init)
        loops, store = peel(update)
        if len(init_loops) != 1 or len(loops) < 2 or not all(isinstance(s, tirx.BufferStore) for s in (first, store)):
            return None
        (s0, extent), (s, other) = init_loops[0], loops[-1]
        operands = accumulation(store)
        if operands is None or other != extent or not first.buffer.same_as(store.buffer) or extent < 4:
            return None
        base = substitute(first.indices[0], {s0: s})
        if not tvm_ffi.structural_equal(base, store.indices[0]) or coefficient(base, s) != 1:
            return None
        if any(mentions(base, var) for var, _ in loops[:-1]) or not self._vectorizable(store.value):
            return None
        operator, value = operands
        parts = []
        dtype = str(s.ty.dtype)
        for start, count, width in _segments(extent, self.lanes, 4):
            acc = tirx.decl_buffer((width,), str(store.buffer.dtype), "acc", scope="local")
            o = tirx.Var("o", dtype)
            fresh = {var: tirx.Var(var.name, dtype) for var, _ in loops[:-1]}

            def strip(make: Callable[[Any], Any], width: int = width) -> Any:
                u, v = tirx.Var("u", dtype), tirx.Var("v", dtype)
                lanes = min(width, self.lanes)
                if width == 1:
                    return make(tirx.IntImm(dtype, 0))
                vector = for_loop(v, lanes, make(u * lanes + v), tirx.ForKind.VECTORIZED)
                return for_loop(u, width // lanes, vector, tirx.ForKind.UNROLLED)

            def at(e: Any, o: Any = o, width: int = width, start: int = start) -> Any:
                return o * width + e + start

            def put(e: Any, acc: Any = acc, at: Any = at) -> Any:
                return tirx.BufferStore(acc, substitute(first.value, {s0: at(e)}), [e])

            def add(e: Any, acc: Any = acc, at: Any = at) -> Any:
                return tirx.BufferStore(acc, operator(tirx.BufferLoad(acc, [e]), substitute(value, {s: at(e)})), [e])

            def out(e: Any, acc: Any = acc, at: Any = at) -> Any:
                return tirx.BufferStore(store.buffer, tirx.BufferLoad(acc, [e]), [substitute(base, {s: at(e)})])

            terms = wrap([(fresh[var], e) for var, e in loops[:-1]], substitute(strip(add), fresh))
            body = sequence([tirx.AllocBuffer(acc), strip(put), terms, strip(out)])
            parts.append(for_loop(o, count, body))
        return sequence(parts)


def _segments(extent: int, lanes: int, strips: int = 1) -> list[tuple[int, int, int]]:
    """`extent` as (start, count, width): wide strips first, then vectors, halves of a vector, single elements."""
    result, start = [], 0
    width = lanes * strips
    while start < extent:
        if width < 4:
            width = 1
        count = (extent - start) // width
        if count:
            result.append((start, count, width))
            start += count * width
        width //= 2
    return result
