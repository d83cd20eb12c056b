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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm
import tvm_ffi
from tvm import ir, s_tir, sym, tirx
from tvm.ir import TensorLoad, Var

from sparsec.program import MAX_ARGS

STACK_BYTES = 1024  # a local buffer at most; larger ones would need a workspace
MIN_TILES = 16  # enough to balance a phone's cores; more only cost index arithmetic
FLAT_TILE = 1024  # elements of a tile of a flat elementwise loop
MAX_BLOCK = 256  # elements of an output row that one tile sums up
SMALL_WORK = 8192  # operations below which two steps cost more to hand out than to run in one thread
CHEAP_OPS = 4  # operations of a producer that may be computed again for each use
VECTOR_CALLS = frozenset(f"tirx.{name}" for name in ("exp", "tanh", "sqrt", "sigmoid", "floor", "ceil", "fabs", "log", "trunc"))


@dataclass(frozen=True)
class Nest:
    """One kernel of a PrimFunc. Buffers are named `p0`, `p1`, ... (its parameters) and `t0`, ... (intermediates)."""

    func: Any = field(repr=False)
    buffers: tuple[str, ...]  # in parameter order
    writes: tuple[str, ...]
    tiles: int
    flops: int
    bytes: int


Loops = list[tuple[Var, int]]


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
    for stmt in _statements(_hoist(lowered.body, allocated)):
        loops, body = _peel(stmt)
        groups.append(_Group(loops, body))
    names = {buffer: f"p{i}" for i, buffer in enumerate(lowered.params)}
    names.update({buffer: f"t{i}" for i, buffer in enumerate(allocated)})
    groups = _fuse(_pair_with_start(groups))
    users: dict[Any, int] = {}
    for group in groups:
        for buffer in _accesses(group.body):
            users[buffer] = users.get(buffer, 0) + 1
    private = {buffer for buffer in allocated if users.get(buffer, 0) == 1}
    nests = [_nest(group, names, private, lanes) for group in groups]
    used = {name for nest in nests for name in nest.buffers}
    return nests, {names[b]: (_shape(b), str(b.dtype)) for b in allocated if names[b] in used}


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


# ---- 1. blocks: inlining and loop order


def schedule(func: Any) -> Any:
    """`func` with cheap producers inlined and reductions ordered for vector code. Functions without blocks pass."""
    try:
        sch = s_tir.Schedule(func, error_render_level="none")
        blocks = sch.get_child_blocks(sch.get_sblock("root"))
    except (RuntimeError, ValueError):
        return func
    for block in blocks:
        if _inlinable(sch, block):
            _try(lambda block=block: sch.compute_inline(block))
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
    operations = _operations(stmt.body.value)
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
    tvm_ffi.structural_walk(stmt, (ir.Call, lambda call: found.append(call) if _callee(call) == "tirx.if_then_else" else None))
    return bool(found)


def _callee(call: Any) -> str:
    return getattr(call.op, "name", "")


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
    moving = [i for i, v in enumerate(spatial) if int(v.dom.extent) > 1 and _stride(store.buffer, store.indices, v.var) == 1]
    if not moving:
        return None
    axis = moving[-1]
    loads: list[Any] = []
    tvm_ffi.structural_walk(store.value, (TensorLoad, loads.append))
    loads = [load for load in loads if not load.source.same_as(store.buffer)]

    def contiguous(var: Any) -> bool:
        return all(_stride(load.source, load.indices, var) in (0, 1) for load in loads)

    return axis if contiguous(spatial[axis].var) or not contiguous(reduced.var) else None


# ---- 2. loops: fusing neighbours


def _statements(stmt: Any) -> list[Any]:
    if isinstance(stmt, tirx.SeqStmt):
        return [s for part in stmt.seq for s in _statements(part)]
    return [stmt]


def _seq(parts: Iterable[Any]) -> Any:
    flat = [s for part in parts for s in _statements(part)]
    return flat[0] if len(flat) == 1 else tirx.SeqStmt(flat)


def _hoist(stmt: Any, allocated: list[Any]) -> Any:
    """`stmt` without its allocations, which are appended to `allocated`, and without parallel loops."""

    def drop(alloc: Any) -> Any:
        allocated.append(alloc.buffer)
        return tirx.Evaluate(0)

    def serial(loop: Any) -> Any:
        if int(loop.kind) == int(tirx.ForKind.PARALLEL):
            return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)
        return loop

    return _without_nothing(tvm_ffi.structural_map(stmt, [(tirx.AllocBuffer, drop), (tirx.For, serial)]))


def _without_nothing(stmt: Any) -> Any:
    def clean(seq: Any) -> Any:
        kept = [s for s in seq.seq if not (isinstance(s, tirx.Evaluate) and isinstance(s.value, ir.prim.IntImm))]
        return seq if len(kept) == len(seq.seq) else _seq(kept)

    return tvm_ffi.structural_map(stmt, (tirx.SeqStmt, clean))


def _peel(stmt: Any) -> tuple[Loops, Any]:
    loops: Loops = []
    while isinstance(stmt, tirx.For) and int(stmt.kind) == 0 and _int(stmt.min) == 0 and _int(stmt.extent) is not None:
        loops.append((stmt.loop_var, int(stmt.extent)))
        stmt = stmt.body
    return loops, stmt


def _int(expr: Any) -> int | None:
    return int(expr) if isinstance(expr, int | ir.prim.IntImm) else None


def _wrap(loops: Loops, body: Any) -> Any:
    for var, extent in reversed(loops):
        body = _for(var, extent, body)
    return body


def _for(var: Any, extent: int, body: Any, kind: Any = tirx.ForKind.SERIAL) -> Any:
    dtype = str(var.ty.dtype) if hasattr(var.ty, "dtype") else "int64"
    return tirx.For(var, tirx.IntImm(dtype, 0), tirx.IntImm(dtype, extent), kind, body)


def _substitute(stmt: Any, values: dict[Any, Any]) -> Any:
    return tvm_ffi.structural_map(stmt, (Var, lambda var: values.get(var, var)))


def _accesses(stmt: Any) -> dict[Any, list[tuple[bool, list[Any]]]]:
    """Buffer -> (is it a write, indices) of each access."""
    found: dict[Any, list[tuple[bool, list[Any]]]] = {}
    tvm_ffi.structural_walk(
        stmt,
        [
            (TensorLoad, lambda load: found.setdefault(load.source, []).append((False, list(load.indices))) and None),
            (tirx.BufferStore, lambda s: found.setdefault(s.buffer, []).append((True, list(s.indices))) and None),
        ],
    )
    return found


def _is_local(uses: Sequence[tuple[bool, list[Any]]], var: Any) -> int | None:
    """The dimension in which every access is indexed by `var` itself, or None."""
    rank = len(uses[0][1])
    for dim in range(rank):
        if all(isinstance(indices[dim], Var) and indices[dim].same_as(var) for _, indices in uses):
            return dim
    return None


def _independent(stmt: Any, loops: Loops) -> int:
    """How many leading loops have iterations that neither read nor write what another one writes."""
    written = [uses for uses in _accesses(stmt).values() if any(write for write, _ in uses)]
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
        head = _for(a, block, _substitute(first.body, {s0: outer * block + a}))
        tail = _wrap([*group.loops[:-1], (b, block)], _substitute(group.body, {s: outer * block + b}))
        result[-1] = _Group([(outer, extent // block)], _seq([head, tail]), 1)
    return result


def _starts(first: _Group, second: _Group) -> bool:
    if len(first.loops) != 1 or len(second.loops) < 2 or first.loops[0][1] != second.loops[-1][1]:
        return False
    if not isinstance(first.body, tirx.BufferStore) or not isinstance(second.body, tirx.BufferStore):
        return False
    y, s0, s = first.body.buffer, first.loops[0][0], second.loops[-1][0]
    if not second.body.buffer.same_as(y) or _accesses(first.body.value) or _accumulation(second.body) is None:
        return False
    return _is_local(_accesses(first.body)[y], s0) is not None and _is_local(_accesses(second.body)[y], s) is not None


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
    a, b = _accesses(first.body), _accesses(second.body)
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
        head = _wrap(first.loops[depth:], first.body)
        tail = _substitute(_wrap(second.loops[depth:], second.body), rename)
        body = _seq([head, tail])
        if _independent(body, first.loops[:depth]) == depth:
            return _Group(first.loops[:depth], body)
    work = [_operations(_wrap(g.loops, g.body)) for g in (first, second)]
    if sum(work) <= SMALL_WORK:  # in sequence, one tile
        return _Group([], _seq([_wrap(first.loops, first.body), _wrap(second.loops, second.body)]))
    return None


# ---- 3. tiles and vectors


def _nest(group: _Group, names: dict[Any, str], private: set[Any], lanes: int) -> Nest:
    independent = max(group.independent, _independent(group.body, group.loops))
    accesses = _accesses(group.body)
    local: dict[Any, list[int]] = {}  # buffer -> dimensions that the tile fixes
    for buffer in accesses:
        dims = [_is_local(accesses[buffer], var) for var, _ in group.loops[:independent]]
        kept = math.prod(e for d, e in enumerate(_shape(buffer)) if d not in dims)
        if buffer in private and kept * _itemsize(buffer) <= STACK_BYTES and not isinstance(group.body, tirx.BufferStore):
            local[buffer] = [d for d in dims if d is not None]
    order = sorted((b for b in accesses if b not in local), key=lambda b: (_written(accesses[b]), names[b][0], int(names[b][1:])))
    if len(order) > MAX_ARGS:
        raise ValueError(f"a loop nest uses {len(order)} buffers, at most {MAX_ARGS} can be passed")
    flat = {b: tirx.decl_buffer((max(1, math.prod(_shape(b))),), str(b.dtype), names[b]) for b in order}
    stack = {}
    for i, (buffer, dims) in enumerate(local.items()):
        kept = math.prod(e for d, e in enumerate(_shape(buffer)) if d not in dims)
        stack[buffer] = tirx.decl_buffer((kept,), str(buffer.dtype), f"l{i}", scope="local")
    body = _flatten(group.body, flat, stack, local)
    loops = group.loops
    flops = _operations(_wrap(loops, body))
    if not stack:
        loops, independent, body = _collapse(loops, independent, body)
    emit = _Emit(lanes)
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
        inner = emit.inner(_wrap(loops[count:], body))
        if stack:
            inner = _seq([*(tirx.AllocBuffer(b) for b in stack.values()), inner])
        inner = _substitute(inner, values)
    loop = tirx.For(t, begin, end - begin, tirx.ForKind.SERIAL, inner)
    func = tirx.PrimFunc([*(flat[b] for b in order), begin, end], loop).with_attrs({"s_tir": True, "tirx.noalias": True})
    func = s_tir.transform.StmtSimplify()(tvm.IRModule({"main": func}))["main"]
    func = s_tir.renew_defs(func)
    _check_calls(func)
    size = sum(math.prod(_shape(b)) * _itemsize(b) for b in order)
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


def _shape(buffer: Any) -> tuple[int, ...]:
    return tuple(int(e) for e in buffer.shape)


def _itemsize(buffer: Any) -> int:
    return max(1, tvm.DataType(str(buffer.dtype)).bits // 8)


def _flatten(stmt: Any, flat: dict[Any, Any], stack: dict[Any, Any], local: dict[Any, list[int]]) -> Any:
    def offset(buffer: Any, indices: Sequence[Any]) -> tuple[Any, Any]:
        dims = [d for d in range(len(_shape(buffer))) if d not in local.get(buffer, [])]
        shape = [_shape(buffer)[d] for d in dims]
        index: Any = tirx.IntImm("int64", 0)
        for d, extent in zip(dims, shape, strict=True):
            index = index * extent + _as_int64(indices[d])
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


def _as_int64(expr: Any) -> Any:
    return expr if str(expr.ty.dtype) == "int64" else tirx.Cast("int64", expr)


def _stride(buffer: Any, indices: Sequence[Any], var: Any) -> int | None:
    """Elements that one step of `var` moves an access, or None if that is not constant."""
    index: Any = tirx.IntImm("int64", 0)
    for expr, extent in zip(indices, _shape(buffer), strict=True):
        index = index * extent + expr
    return _coefficient(index, var)


def _coefficient(index: Any, var: Any) -> int | None:
    if not _uses(index, var):
        return 0
    found = sym.detect_linear_equation(index, [var])
    return _int(sym.Analyzer().simplify(found[0])) if found else None


def _uses(node: Any, var: Any) -> bool:
    seen: list[bool] = []
    tvm_ffi.structural_walk(node, (Var, lambda v: seen.append(True) if v.same_as(var) else None))
    return bool(seen)


def _collapse(loops: Loops, independent: int, body: Any) -> tuple[Loops, int, Any]:
    """Merge neighbouring loops that walk every buffer like one loop does."""
    loops = list(loops)
    at = len(loops) - 2
    while at >= 0:
        if at + 1 >= len(loops):
            at -= 1
            continue
        if (at < independent) == (at + 1 < independent):
            merged = _merge(loops[at], loops[at + 1], body)
            if merged is not None:
                independent -= at < independent
                loops[at : at + 2] = [merged[0]]
                body = merged[1]
        at -= 1
    return loops, independent, body


def _merge(outer: tuple[Any, int], inner: tuple[Any, int], body: Any) -> tuple[tuple[Any, int], Any] | None:
    (i, rows), (j, columns) = outer, inner
    both = tirx.Var("f", str(i.ty.dtype))
    analyzer = sym.Analyzer()
    analyzer.bind(both, ir.Range(tirx.IntImm(str(i.ty.dtype), 0), tirx.IntImm(str(i.ty.dtype), rows * columns)))
    changed = _substitute(body, {i: both // columns, j: both % columns})

    def load(node: Any) -> Any:
        return tirx.BufferLoad(node.source, [analyzer.simplify(e) for e in node.indices])

    def store(node: Any) -> Any:
        return tirx.BufferStore(node.buffer, node.value, [analyzer.simplify(e) for e in node.indices])

    changed = tvm_ffi.structural_map(changed, [(TensorLoad, load), (tirx.BufferStore, store)])
    divisions: list[Any] = []
    tvm_ffi.structural_walk(
        changed, ((tirx.FloorDiv, tirx.FloorMod), lambda e: divisions.append(e) if _uses(e, both) else None)
    )
    return None if divisions else ((both, rows * columns), changed)


def _operations(stmt: Any) -> int:
    """Arithmetic operations of a statement or expression, loops multiplied out; index arithmetic not counted."""
    if isinstance(stmt, tirx.For):
        return (_int(stmt.extent) or 1) * _operations(stmt.body)
    if isinstance(stmt, tirx.SeqStmt):
        return sum(_operations(s) for s in stmt.seq)
    if isinstance(stmt, tirx.IfThenElse):
        return _operations(stmt.then_case) + (_operations(stmt.else_case) if stmt.else_case is not None else 0)
    if isinstance(stmt, tirx.BufferStore):
        return max(1, _operations(stmt.value))
    total = 0

    def count(node: Any) -> None:
        nonlocal total
        if isinstance(node, ir.Call):
            total += 10 if _callee(node) in ("tirx.exp", "tirx.sigmoid", "tirx.tanh", "tirx.erf", "tirx.pow", "tirx.log") else 1
        elif str(node.ty.dtype).startswith("float"):
            total += 1

    arithmetic = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Max, tirx.Min, tirx.Select, ir.Call)
    if not isinstance(stmt, tirx.Stmt):
        tvm_ffi.structural_walk(stmt, (arithmetic, count))
    return total


def _check_calls(func: Any) -> None:
    """Refuse what would need TVM's runtime."""
    calls: set[str] = set()

    def visit(call: Any) -> None:
        if "packed" in _callee(call) or "call_extern" in _callee(call):
            calls.add(str(call.args[0]).strip('"'))

    tvm_ffi.structural_walk(func.body, (ir.Call, visit))
    if calls:
        raise ValueError(f"needs the runtime functions {', '.join(sorted(calls))}")


class _Emit:
    """Vector code for innermost loops over flat buffers."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes

    def flat_tiles(self, loop: tuple[Any, int], body: Any, tile: Any) -> tuple[int, Any]:
        """Tiles of FLAT_TILE elements of one long loop; the last tile takes the rest."""
        var, extent = loop
        full, rest = divmod(extent, FLAT_TILE)

        def part(count: int) -> Any:
            j = tirx.Var("j", str(var.ty.dtype))
            return self.inner(_for(j, count, _substitute(body, {var: tile * FLAT_TILE + j})))

        if not rest:
            return full, part(FLAT_TILE)
        return full + 1, tirx.IfThenElse(tile < full, part(FLAT_TILE), part(rest))

    def inner(self, stmt: Any) -> Any:
        """`stmt` with its innermost loops vectorized."""
        if isinstance(stmt, tirx.SeqStmt):
            return self._sequence(_statements(stmt))
        if isinstance(stmt, tirx.IfThenElse):
            other = self.inner(stmt.else_case) if stmt.else_case is not None else None
            return tirx.IfThenElse(stmt.condition, self.inner(stmt.then_case), other)
        loops, body = _peel(stmt)
        if not loops:
            return stmt
        loops, _, body = _collapse(loops, 0, body)
        if not isinstance(body, tirx.BufferStore):
            return _wrap(loops, self.inner(body))
        (var, extent) = loops[-1]
        innermost = self._map(var, extent, body) or self._reduce(var, extent, body) or _for(var, extent, body)
        return _wrap(loops[:-1], innermost)

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
        return _seq(result)

    def _vectorizable(self, expr: Any) -> bool:
        bad: list[Any] = []

        def call(node: Any) -> None:
            if _callee(node) not in VECTOR_CALLS:
                bad.append(node)

        tvm_ffi.structural_walk(expr, (ir.Call, call))
        tvm_ffi.structural_walk(expr, (TensorLoad, lambda e: bad.append(e) if str(e.ty.dtype) == "bool" else None))
        return not bad and str(expr.ty.dtype) != "bool"

    def _map(self, var: Any, extent: int, store: Any) -> Any:
        """`y[base + var] = value` in vectors, then the rest in halves, then one by one."""
        if extent < 4 or _coefficient(store.indices[0], var) != 1 or not self._vectorizable(store.value):
            return None
        own = _accesses(store.value).get(store.buffer, [])
        if any(not tvm_ffi.structural_equal(indices[0], store.indices[0]) for _, indices in own):
            return None  # an iteration reads what another one writes
        parts = []
        for start, count, width in _segments(extent, self.lanes):
            o, v = tirx.Var("o", str(var.ty.dtype)), tirx.Var("v", str(var.ty.dtype))
            body = _substitute(store, {var: o * width + v + start if width > 1 else o + start})
            parts.append(_for(o, count, _for(v, width, body, tirx.ForKind.VECTORIZED) if width > 1 else body))
        return _seq(parts)

    def _reduce(self, var: Any, extent: int, store: Any) -> Any:
        """`y = y op value(var)` with one partial result a lane."""
        operands = _accumulation(store)
        if operands is None or _uses(store.indices[0], var) or not self._vectorizable(store.value):
            return None
        loads: list[Any] = []
        tvm_ffi.structural_walk(operands[1], (TensorLoad, loads.append))
        if any(_coefficient(load.indices[0], var) not in (0, 1) for load in loads):
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
        start = _for(v, width, tirx.BufferStore(acc, _substitute(value, {var: zero + v}), [v]), tirx.ForKind.VECTORIZED)
        term = _substitute(value, {var: o * width + w + width})
        step = tirx.BufferStore(acc, operator(tirx.BufferLoad(acc, [w]), term), [w])
        parts = [tirx.AllocBuffer(acc), start]
        if full > 1:
            parts.append(_for(o, full - 1, _for(w, width, step, tirx.ForKind.VECTORIZED)))
        total = tirx.BufferLoad(store.buffer, store.indices)
        last = tirx.BufferStore(store.buffer, operator(total, tirx.BufferLoad(acc, [h])), store.indices)
        parts.append(_for(h, width, last, tirx.ForKind.UNROLLED))
        if extent % width:
            parts.append(_for(j, extent % width, _substitute(store, {var: j + full * width})))
        return _seq(parts)

    def _in_registers(self, init: Any, update: Any) -> Any:
        """`for s: y[s] = c` and `for r...: for s: y[s] = y[s] op value` with a strip of `y` in registers."""
        init_loops, first = _peel(init)
        loops, store = _peel(update)
        if len(init_loops) != 1 or len(loops) < 2 or not all(isinstance(s, tirx.BufferStore) for s in (first, store)):
            return None
        (s0, extent), (s, other) = init_loops[0], loops[-1]
        operands = _accumulation(store)
        if operands is None or other != extent or not first.buffer.same_as(store.buffer) or extent < 4:
            return None
        base = _substitute(first.indices[0], {s0: s})
        if not tvm_ffi.structural_equal(base, store.indices[0]) or _coefficient(base, s) != 1:
            return None
        if any(_uses(base, var) for var, _ in loops[:-1]) or not self._vectorizable(store.value):
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
                vector = _for(v, lanes, make(u * lanes + v), tirx.ForKind.VECTORIZED)
                return _for(u, width // lanes, vector, tirx.ForKind.UNROLLED)

            def at(e: Any, o: Any = o, width: int = width, start: int = start) -> Any:
                return o * width + e + start

            def put(e: Any, acc: Any = acc, at: Any = at) -> Any:
                return tirx.BufferStore(acc, _substitute(first.value, {s0: at(e)}), [e])

            def add(e: Any, acc: Any = acc, at: Any = at) -> Any:
                return tirx.BufferStore(acc, operator(tirx.BufferLoad(acc, [e]), _substitute(value, {s: at(e)})), [e])

            def out(e: Any, acc: Any = acc, at: Any = at) -> Any:
                return tirx.BufferStore(store.buffer, tirx.BufferLoad(acc, [e]), [_substitute(base, {s: at(e)})])

            terms = _wrap([(fresh[var], e) for var, e in loops[:-1]], _substitute(strip(add), fresh))
            body = _seq([tirx.AllocBuffer(acc), strip(put), terms, strip(out)])
            parts.append(_for(o, count, body))
        return _seq(parts)


def _accumulation(store: Any) -> tuple[Callable[[Any, Any], Any], Any] | None:
    """Operator and term of `y[i] = y[i] op term`, where the term does not read `y`."""
    for kind, operator in ((tirx.Add, lambda a, b: a + b), (tirx.Max, tirx.max), (tirx.Min, tirx.min)):
        if not isinstance(store.value, kind):
            continue
        for own, term in ((store.value.a, store.value.b), (store.value.b, store.value.a)):
            is_own = isinstance(own, TensorLoad) and own.source.same_as(store.buffer)
            if is_own and tvm_ffi.structural_equal(own.indices, store.indices) and store.buffer not in _accesses(term):
                return operator, term
    return None


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
