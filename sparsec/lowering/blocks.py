"""The schedule rule of the generic route, first part: inlining and loop order, on blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import tvm_ffi
from tvm import ir, s_tir, tirx
from tvm.ir import TensorLoad

from sparsec.lowering.loops import callee, operation_count, stride_of

CHEAP_OPS = 4  # operations of a producer that may be computed again for each use


def schedule(func: Any) -> Any:
    """`func` with cheap producers inlined and reductions ordered for vector code. Functions without blocks pass."""
    try:
        sch = s_tir.Schedule(func, error_render_level="none")
        blocks = sch.get_child_blocks(sch.get_sblock("root"))
    except (RuntimeError, ValueError):
        return func
    for block in blocks:
        if _inlinable(sch, block):
            _try(partial(sch.compute_inline, block))
    bindings: dict[str, list[Any]] = {}

    def visit(realize: Any) -> None:
        bindings[realize.block.name_hint] = list(realize.iter_values)

    tvm_ffi.structural_walk(sch.mod["main"].body, (s_tir.SBlockRealize, visit))
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        _order_reduction(sch, block, bindings.get(sch.get(block).name_hint, []))
    return sch.mod["main"]


def _try(action: Callable[[], Any]) -> bool:
    try:
        action()
    except (RuntimeError, ValueError):  # ScheduleError and TVM's InternalError
        return False
    return True


def _is_reduction(block: Any) -> bool:
    return any(int(v.iter_type) == 2 for v in block.iter_vars)


def _volume(block: Any) -> int:
    return math.prod(int(v.dom.extent) for v in block.iter_vars)


def _inlinable(sch: Any, block: Any) -> bool:
    stmt = sch.get(block)
    if _is_reduction(stmt) or not isinstance(stmt.body, tirx.BufferStore):
        return False
    consumers = [sch.get(c) for c in sch.get_consumers(block)]
    if not consumers:
        return False
    operations = operation_count(stmt.body.value)
    uses = 0
    for consumer in consumers:
        loads: list[Any] = []
        tvm_ffi.structural_walk(consumer.body, (TensorLoad, loads.append))
        uses += sum(load.source.same_as(stmt.body.buffer) for load in loads)
        if _volume(consumer) > _volume(stmt) and (_is_reduction(consumer) or operations > CHEAP_OPS):
            return False  # computed again for every use
        if _is_reduction(consumer) and _has_condition(stmt.body):
            return False  # padding inside a reduction
    return uses <= 1 or operations <= CHEAP_OPS


def _has_condition(stmt: Any) -> bool:
    found: list[Any] = []
    tvm_ffi.structural_walk(stmt, ((tirx.Select, tirx.IfThenElse), found.append))
    tvm_ffi.structural_walk(
        stmt, (ir.Call, lambda call: found.append(call) if callee(call) == "tirx.if_then_else" else None)
    )
    return bool(found)


def _order_reduction(sch: Any, block: Any, bound: list[Any]) -> None:
    stmt = sch.get(block)
    loops = sch.get_loops(block)
    if not _is_reduction(stmt) or len(loops) != len(stmt.iter_vars) or len(bound) != len(loops):
        return
    if not all(sch.get(loop).loop_var.same_as(value) for loop, value in zip(loops, bound, strict=True)):
        return
    spatial = [(loop, v) for loop, v in zip(loops, stmt.iter_vars, strict=True) if int(v.iter_type) == 0]
    reduced = [(loop, v) for loop, v in zip(loops, stmt.iter_vars, strict=True) if int(v.iter_type) == 2]
    if len(spatial) + len(reduced) != len(loops):
        return
    order = [loop for loop, _ in spatial] + [loop for loop, _ in reduced]
    first = reduced[0][0]
    if isinstance(stmt.body, tirx.BufferStore):
        axis = _vector_axis(stmt.body, [v for _, v in spatial], reduced[-1][1])
        if axis is not None:
            order = [p[0] for p in spatial if p is not spatial[axis]] + [p[0] for p in reduced] + [spatial[axis][0]]
    if len(order) > 1:
        _try(lambda: sch.reorder(*order))
    _try(lambda: sch.decompose_reduction(block, first))


def _vector_axis(store: Any, spatial: list[Any], reduced: Any) -> int | None:
    """Which spatial iterator to make innermost: the one along the output's rows, if that reads contiguous data."""
    moving = [
        i for i, v in enumerate(spatial) if int(v.dom.extent) > 1 and stride_of(store.buffer, store.indices, v.var) == 1
    ]
    if not moving:
        return None
    axis = moving[-1]
    loads: list[Any] = []
    tvm_ffi.structural_walk(store.value, (TensorLoad, loads.append))
    loads = [load for load in loads if not load.source.same_as(store.buffer)]

    def contiguous(var: Any) -> bool:
        return all(stride_of(load.source, load.indices, var) in (0, 1) for load in loads)

    return axis if contiguous(spatial[axis].var) or not contiguous(reduced.var) else None
