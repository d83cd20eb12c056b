"""The schedule rule of the generic route: any PrimFunc to kernels over a tile range.

A PrimFunc as Relax makes it is a list of loop nests over named buffers. It becomes a list of `Nest`s, each a PrimFunc
`(flat buffers..., begin, end)` of the kernel ABI (`sparsec.program`):

1. `schedule`: cheap producers are inlined; of a reduction the initial value is split off and, where the data are
   contiguous along an output axis, that axis becomes the innermost loop.
2. Neighbouring nests are fused over their leading loops as far as every buffer that they share and write is indexed by
   the loop variable itself, always in the same dimension: then an iteration reads only what the same iteration wrote, and
   iterations are independent. Softmax and normalization become one nest over rows that way.
3. The independent leading loops become the tile range; innermost loops become vectors; sums are kept in registers.
4. What only one nest uses and fits the stack becomes a local buffer; other intermediates become parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm
import tvm_ffi
from tvm import ir, s_tir, sym, tirx
from tvm.ir import TensorLoad, Var

from sparsec.lowering.blocks import schedule
from sparsec.lowering.loops import (
    Loops,
    accesses_of,
    accumulation,
    callee,
    collapse,
    const_int,
    for_loop,
    itemsize,
    operation_count,
    peel,
    sequence,
    shape_of,
    statements,
    substitute,
    wrap,
)
from sparsec.lowering.vectors import FLAT_TILE, Emit
from sparsec.program import MAX_ARGS

STACK_BYTES = 1024  # a local buffer at most; larger ones would need a workspace
MIN_TILES = 16  # enough to balance a phone's cores; more only cost index arithmetic
MAX_BLOCK = 256  # elements of an output row that one tile sums up
SMALL_WORK = 8192  # operations below which two steps cost more to hand out than to run in one thread


@dataclass(frozen=True)
class Nest:
    """One kernel of a PrimFunc. Buffers are named `p0`, `p1`, ... (its parameters) and `t0`, ... (intermediates)."""

    func: Any = field(repr=False)
    buffers: tuple[str, ...]  # in parameter order
    writes: tuple[str, ...]
    tiles: int
    flops: int
    bytes: int


@dataclass
class _Group:
    loops: Loops  # leading loops
    body: Any
    independent: int = 0  # so many leading loops are independent by construction


def split_nests(func: Any, lanes: int) -> tuple[list[Nest], dict[str, tuple[tuple[int, ...], str]]]:
    """The nests of `func` in execution order, and shape and dtype of the intermediates they pass through memory.

    `lanes`: float32 lanes of a vector. Raises ValueError if a nest needs more than MAX_ARGS buffers or calls out.
    """
    lowered = _LOWER(tvm.IRModule({"main": schedule(func)}))["main"]
    allocated: list[Any] = []
    groups: list[_Group] = []
    for stmt in statements(_hoist(lowered.body, allocated)):
        loops, body = peel(stmt)
        groups.append(_Group(loops, body))
    names = {buffer: f"p{i}" for i, buffer in enumerate(lowered.params)}
    names.update({buffer: f"t{i}" for i, buffer in enumerate(allocated)})
    groups = _fuse(_pair_with_start(groups))
    users: dict[Any, int] = {}
    for group in groups:
        for buffer in accesses_of(group.body):
            users[buffer] = users.get(buffer, 0) + 1
    private = {buffer for buffer in allocated if users.get(buffer, 0) == 1}
    nests = [_nest(group, names, private, lanes) for group in groups]
    used = {name for nest in nests for name in nest.buffers}
    return nests, {names[b]: (shape_of(b), str(b.dtype)) for b in allocated if names[b] in used}


_LOWER = ir.transform.Sequential(
    [
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.LowerOpaqueBlock(),
        s_tir.transform.StmtSimplify(),
    ]
)


def _hoist(stmt: Any, allocated: list[Any]) -> Any:
    """`stmt` without its allocations, which are appended to `allocated`, and without parallel loops."""

    def drop(alloc: Any) -> Any:
        allocated.append(alloc.buffer)
        return tirx.Evaluate(0)

    def serial(loop: Any) -> Any:
        if int(loop.kind) == int(tirx.ForKind.PARALLEL):
            return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)
        return loop

    def told(attribute: Any) -> Any:
        return attribute.body if attribute.attr_key == "pragma_scope" else attribute  # LLVM knows none and says so

    rules = [(tirx.AllocBuffer, drop), (tirx.For, serial), (tirx.AttrStmt, told)]
    return _without_nothing(tvm_ffi.structural_map(stmt, rules))


def _without_nothing(stmt: Any) -> Any:
    def clean(seq: Any) -> Any:
        kept = [s for s in seq.seq if not (isinstance(s, tirx.Evaluate) and isinstance(s.value, ir.prim.IntImm))]
        return seq if len(kept) == len(seq.seq) else sequence(kept)

    return tvm_ffi.structural_map(stmt, (tirx.SeqStmt, clean))


def _is_local(uses: Sequence[tuple[bool, list[Any]]], var: Any) -> int | None:
    """The dimension in which every access is indexed by `var` itself, or None."""
    rank = len(uses[0][1])
    for dim in range(rank):
        if all(isinstance(indices[dim], Var) and indices[dim].same_as(var) for _, indices in uses):
            return dim
    return None


def _independent(stmt: Any, loops: Loops) -> int:
    """How many leading loops have iterations that neither read nor write what another one writes."""
    written = [uses for uses in accesses_of(stmt).values() if any(write for write, _ in uses)]
    count = 0
    for var, _ in loops:
        if not all(_is_local(uses, var) is not None for uses in written):
            break
        count += 1
    return count


def _pair_with_start(groups: list[_Group]) -> list[_Group]:
    """Join `for s: y[s] = c` with `for r...: for s: y[s] = y[s] op ...` behind it, in blocks of s."""
    result: list[_Group] = []
    for group in groups:
        first = result[-1] if result else None
        if first is None or not _starts(first, group):
            result.append(group)
            continue
        (s0, extent), (s, _) = first.loops[0], group.loops[-1]
        block = max((d for d in range(1, MAX_BLOCK + 1) if extent % d == 0), key=lambda d: (d % 16 == 0, d))
        outer, dtype = tirx.Var("s", str(s.ty.dtype)), str(s.ty.dtype)
        a, b = tirx.Var("s", dtype), tirx.Var("s", dtype)
        head = for_loop(a, block, substitute(first.body, {s0: outer * block + a}))
        tail = wrap([*group.loops[:-1], (b, block)], substitute(group.body, {s: outer * block + b}))
        result[-1] = _Group([(outer, extent // block)], sequence([head, tail]), 1)
    return result


def _starts(first: _Group, second: _Group) -> bool:
    if len(first.loops) != 1 or len(second.loops) < 2 or first.loops[0][1] != second.loops[-1][1]:
        return False
    if not isinstance(first.body, tirx.BufferStore) or not isinstance(second.body, tirx.BufferStore):
        return False
    y, s0, s = first.body.buffer, first.loops[0][0], second.loops[-1][0]
    if not second.body.buffer.same_as(y) or accesses_of(first.body.value) or accumulation(second.body) is None:
        return False
    return (
        _is_local(accesses_of(first.body)[y], s0) is not None and _is_local(accesses_of(second.body)[y], s) is not None
    )


def _fuse(groups: list[_Group]) -> list[_Group]:
    result: list[_Group] = []
    for group in groups:
        merged = _fuse_pair(result[-1], group) if result else None
        if merged is None:
            result.append(group)
        else:
            result[-1] = merged
    return result


def _fuse_pair(first: _Group, second: _Group) -> _Group | None:
    a, b = accesses_of(first.body), accesses_of(second.body)
    if len({*a, *b}) > MAX_ARGS:
        return None
    shared = [buffer for buffer in a if buffer in b]
    for depth in range(min(len(first.loops), len(second.loops)), 0, -1):
        if [e for _, e in first.loops[:depth]] != [e for _, e in second.loops[:depth]]:
            continue
        flat = all(len(g.loops) == depth and isinstance(g.body, tirx.BufferStore) for g in (first, second))
        if flat or not shared:
            continue  # fusing would leave no loop to vectorize
        rename = {old: new for (new, _), (old, _) in zip(first.loops[:depth], second.loops[:depth], strict=True)}
        head = wrap(first.loops[depth:], first.body)
        tail = substitute(wrap(second.loops[depth:], second.body), rename)
        body = sequence([head, tail])
        if _independent(body, first.loops[:depth]) == depth:
            return _Group(first.loops[:depth], body)
    work = [operation_count(wrap(g.loops, g.body)) for g in (first, second)]
    if sum(work) <= SMALL_WORK:  # in sequence, one tile
        return _Group([], sequence([wrap(first.loops, first.body), wrap(second.loops, second.body)]))
    return None


def _nest(group: _Group, names: dict[Any, str], private: set[Any], lanes: int) -> Nest:
    independent = max(group.independent, _independent(group.body, group.loops))
    accesses = accesses_of(group.body)
    local: dict[Any, list[int]] = {}  # buffer -> dimensions that the tile fixes
    for buffer in accesses:
        dims = [_is_local(accesses[buffer], var) for var, _ in group.loops[:independent]]
        kept = math.prod(e for d, e in enumerate(shape_of(buffer)) if d not in dims)
        if (
            buffer in private
            and kept * itemsize(buffer) <= STACK_BYTES
            and not isinstance(group.body, tirx.BufferStore)
        ):
            local[buffer] = [d for d in dims if d is not None]
    order = sorted(
        (b for b in accesses if b not in local), key=lambda b: (_written(accesses[b]), names[b][0], int(names[b][1:]))
    )
    if len(order) > MAX_ARGS:
        raise ValueError(f"a loop nest uses {len(order)} buffers, at most {MAX_ARGS} can be passed")
    flat = {b: tirx.decl_buffer((max(1, math.prod(shape_of(b))),), str(b.dtype), names[b]) for b in order}
    stack = {}
    for i, (buffer, fixed) in enumerate(local.items()):
        kept = math.prod(e for d, e in enumerate(shape_of(buffer)) if d not in fixed)
        stack[buffer] = tirx.decl_buffer((kept,), str(buffer.dtype), f"l{i}", scope="local")
    body = _flatten(group.body, flat, stack, local)
    loops = group.loops
    flops = operation_count(wrap(loops, body))
    if not stack:
        loops, independent, body = collapse(loops, independent, body)
    emit = Emit(lanes)
    begin, end, t = tirx.Var("begin", "int32"), tirx.Var("end", "int32"), tirx.Var("t", "int32")
    tile = tirx.Cast("int64", t) if not loops or str(loops[0][0].ty.dtype) == "int64" else t
    simple = isinstance(body, tirx.BufferStore)
    if simple and len(loops) == 1 and independent == 1 and loops[0][1] > 2 * FLAT_TILE:
        tiles, inner = emit.flat_tiles(loops[0], body, tile)
    else:
        count = _tile_loops(loops, independent, simple, bool(stack))
        tiles = math.prod(e for _, e in loops[:count])
        rest, values = tile, {}
        for var, extent in reversed(loops[1:count]):
            values[var], rest = rest % extent, rest // extent
        if count:
            values[loops[0][0]] = rest
        inner = emit.inner(wrap(loops[count:], body))
        if stack:
            inner = sequence([*(tirx.AllocBuffer(b) for b in stack.values()), inner])
        inner = substitute(inner, values)
    first = tirx.max(begin, 0)  # as in emit.function: TVM must see that tile numbers are not negative
    loop = tirx.For(t, first, tirx.max(end, 0) - first, tirx.ForKind.SERIAL, inner)
    func = tirx.PrimFunc([*(flat[b] for b in order), begin, end], loop).with_attrs(
        {"s_tir": True, "tirx.noalias": True}
    )
    func = s_tir.transform.StmtSimplify()(tvm.IRModule({"main": func}))["main"]
    func = s_tir.renew_defs(func)
    _check_calls(func)
    size = sum(math.prod(shape_of(b)) * itemsize(b) for b in order)
    writes = tuple(names[b] for b in order if _written(accesses[b]))
    return Nest(func, tuple(names[b] for b in order), writes, tiles, flops, size)


def _tile_loops(loops: Loops, independent: int, simple: bool, stack: bool) -> int:
    """How many leading loops become the tile range."""
    if stack:
        return independent  # local buffers hold one iteration
    most = min(independent, len(loops) - 1) if simple else independent
    count, product = 0, 1
    while count < most and product < MIN_TILES:
        product *= loops[count][1]
        count += 1
    return count


def _written(uses: Sequence[tuple[bool, list[Any]]]) -> bool:
    return any(write for write, _ in uses)


def _flatten(stmt: Any, flat: dict[Any, Any], stack: dict[Any, Any], local: dict[Any, list[int]]) -> Any:
    def offset(buffer: Any, indices: Sequence[Any]) -> tuple[Any, Any]:
        dims = [d for d in range(len(shape_of(buffer))) if d not in local.get(buffer, [])]
        shape = [shape_of(buffer)[d] for d in dims]
        wide = any(str(i.ty.dtype) == "int64" for i in indices if const_int(i) is None)
        index: Any = tirx.IntImm("int64" if wide else "int32", 0)
        for d, extent in zip(dims, shape, strict=True):
            index = index * extent + _as(indices[d], str(index.ty.dtype))
        return (stack.get(buffer) if buffer in stack else flat[buffer]), sym.Analyzer().simplify(index)

    def load(node: Any) -> Any:
        buffer, index = offset(node.source, node.indices)
        return tirx.BufferLoad(buffer, [index])

    def store(node: Any) -> Any:
        buffer, index = offset(node.buffer, node.indices)
        return tirx.BufferStore(buffer, node.value, [index])

    known = {*flat, *stack}
    return tvm_ffi.structural_map(
        stmt,
        [
            (TensorLoad, lambda n: load(n) if n.source in known else n),
            (tirx.BufferStore, lambda n: store(n) if n.buffer in known else n),
        ],
    )


def _as(index: Any, dtype: str) -> Any:
    value = const_int(index)
    if value is not None:
        return tirx.IntImm(dtype, value)
    return index if str(index.ty.dtype) == dtype else tirx.Cast(dtype, index)


def _check_calls(func: Any) -> None:
    """Refuse what would need TVM's runtime."""
    calls: set[str] = set()

    def visit(call: Any) -> None:
        if "packed" in callee(call) or "call_extern" in callee(call):
            calls.add(str(call.args[0]).strip('"'))

    tvm_ffi.structural_walk(func.body, (ir.Call, visit))
    if calls:
        raise ValueError(f"needs the runtime functions {', '.join(sorted(calls))}")
