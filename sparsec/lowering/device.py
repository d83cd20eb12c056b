"""The schedule rule of the generic route for CUDA devices: any PrimFunc to kernels that bind their threads.

TVM's `dlight` rules schedule a PrimFunc as Relax makes it; where none fits, or where one would leave the work to fewer
threads than a warp has, two rules of ours do:

    matrix products                            tiles in shared memory          dlight Matmul
    sums and the like, what follows them       a block for a row               dlight GEMV, Reduction, GeneralReduction
    reductions in any order of axes            a block for each result         reduce_by_blocks
    the rest, short sums                       a thread for each result        dlight Transpose, threads_by_result

A scheduled function is a sequence of nests with threads of their own; each becomes one kernel, and what they pass on lies
in device memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import TensorLoad
from tvm.s_tir import dlight
from tvm.s_tir.dlight.analysis import normalize_prim_func
from tvm.s_tir.dlight.base import try_inline

from sparsec.cuda.source import cuda_source, declared_shared, launch_of, reduces_across_threads
from sparsec.errors import BuildError
from sparsec.kernels.cuda.base import Gpu
from sparsec.kernels.cuda.emit import MAX_GRID, MAX_THREADS, WARP
from sparsec.lowering.loops import const_int, itemsize, operation_count, shape_of, statements
from sparsec.program import MAX_ARGS, Kernel, Launch

STATIC_SHARED = 48 << 10  # bytes of a block that need no request: CUDA C++ Programming Guide, compute capabilities
REDUCERS = 256  # threads of a block that reduce together
SHORT = 64  # terms: reductions no longer than that are left to one thread each where there are MANY of them
MANY = 64  # results
THREADS = 256  # of a block, a thread for each result

Rule = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class DeviceNest:
    """One kernel of a PrimFunc. Buffers are named `p0`, `p1`, ... (its parameters) and `t0`, ... (intermediates)."""

    func: Any = field(repr=False)
    buffers: tuple[str, ...]  # in parameter order
    writes: tuple[str, ...]
    launch: Launch
    flops: int
    bytes: int

    @property
    def tiles(self) -> int:
        """Blocks of the grid."""
        return self.launch.blocks


def split_device(func: Any, gpu: Gpu) -> tuple[list[DeviceNest], dict[str, tuple[tuple[int, ...], str]]]:
    """The kernels of `func` in execution order, and shape and dtype of the intermediates they pass through memory.

    Raises ValueError if no rule gives its work to threads, or if a kernel needs more than MAX_ARGS buffers.
    """
    target = tvm.target.Target({"kind": "cuda", "arch": gpu.arch, "max_shared_memory_per_block": STATIC_SHARED})
    problem = _DEPENDENT
    lazy: list[tuple[int, list[DeviceNest], dict[str, tuple[tuple[int, ...], str]]]] = []
    for rule in _rules(func):
        try:
            with target:
                scheduled = rule(func, target)
            if scheduled is None:
                continue
            nests, intermediates, active = _pieces(scheduled, gpu.arch)
        except _Unfit as error:
            problem = str(error)
            continue
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, KeyError):  # what a rule stumbles over
            continue
        if active >= WARP:
            return nests, intermediates
        lazy.append((active, nests, intermediates))
    for active, nests, intermediates in sorted(lazy, key=lambda found: -found[0]):
        if active > 1 or all(nest.flops <= 8 * WARP for nest in nests):
            return nests, intermediates
    raise ValueError(problem)


_DEPENDENT = "its loops depend on each other: no threads to share them"


class _Unfit(Exception):
    """A schedule that cannot be used; one clause."""


def _rules(func: Any) -> Iterator[Rule]:
    """Schedule rules in the order in which they are tried."""
    gpu = dlight.gpu
    results, terms = _volumes(func)
    yield partial(_dlight, gpu.Matmul())
    if terms == 1:
        yield partial(_dlight, gpu.Transpose())
    elif terms <= SHORT and results >= MANY:
        yield partial(threads_by_result, joined=True)
    else:
        for rule in (gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction()):
            yield partial(_dlight, rule)
        yield reduce_by_blocks
    yield threads_by_result
    yield reduce_by_blocks


def _dlight(rule: Any, func: Any, target: Any) -> Any:
    schedule = rule.apply(func, target, False)
    if isinstance(schedule, list):
        schedule = schedule[0] if schedule else None
    return None if schedule is None else schedule.mod["main"]


def _volumes(func: Any) -> tuple[int, int]:
    """Results and terms of one result of the largest reduction of `func`; (results, 1) where there is none."""
    found = [(1, 1)]

    def visit(block: Any) -> None:
        if block.iter_vars:
            extents = [(const_int(v.dom.extent) or 1, int(v.iter_type) == 2) for v in block.iter_vars]
            found.append((
                math.prod(e for e, reduced in extents if not reduced), math.prod(e for e, reduced in extents if reduced)
            ))  # fmt: skip

    tvm_ffi.structural_walk(func.body, (s_tir.SBlock, visit))
    return max(found, key=lambda pair: (pair[1] > 1, pair[0] * pair[1]))


def threads_by_result(func: Any, target: Any, joined: bool = False) -> Any:
    """A thread for each result, which sums up its terms. joined: and computes what else depends on that result alone."""
    schedule = s_tir.Schedule(func, error_render_level="none")
    infos = normalize_prim_func(schedule)
    if infos is None:
        return None
    infos = try_inline(schedule, infos)
    if joined and (len(infos) != 2 or not infos[0].is_reduction() or not infos[1].is_injective()):
        return None
    for info in infos[:1] if joined else infos:
        axes = _axes(schedule, info)
        if axes is None:
            return None
        results, terms = axes
        extent = const_int(schedule.get(results).extent) or 1
        count = _divisor(extent) if terms else THREADS
        if count < min(WARP, extent):
            if joined:
                return None
            count = THREADS
        block, thread = schedule.split(results, factors=[None, count])
        schedule.bind(block, "blockIdx.x")
        schedule.bind(thread, "threadIdx.x")
        if not terms:
            continue
        behind = []
        if joined:
            schedule.set_scope(info.block_rv, 0, "local")
            behind = [infos[1].block_rv]
        elif extent % count == 0:
            sums = range(len(schedule.get(info.block_rv).writes))
            behind = [schedule.cache_write(info.block_rv, i, "local") for i in sums]
        for last in behind:
            schedule.reverse_compute_at(last, thread, preserve_unit_loops=True)
        schedule.decompose_reduction(info.block_rv, terms[0])
    return schedule.mod["main"]


def _divisor(extent: int) -> int:
    """Threads of a block that share `extent` results without a rest: in TVM 0.27 `reverse_compute_at` loses the condition
    that a rest needs.
    """
    found = [d for d in range(1, THREADS + 1) if extent % d == 0]
    return max(found, key=lambda d: (d % WARP == 0 and d >= 2 * WARP, d))


def reduce_by_blocks(func: Any, target: Any) -> Any:
    """A block of REDUCERS threads for each result of a reduction, a thread for each result of anything else.

    The terms of a result are spread over the threads of its block, which join their parts in a tree.
    """
    schedule = s_tir.Schedule(func, error_render_level="none")
    infos = normalize_prim_func(schedule)
    if infos is None:
        return None
    for info in try_inline(schedule, infos):
        axes = _axes(schedule, info)
        if axes is None:
            return None
        results, terms = axes
        if terms:
            joined = schedule.fuse(*terms)
            count = min(REDUCERS, -(-(const_int(schedule.get(joined).extent) or 1) // WARP) * WARP)
            serial, thread = schedule.split(joined, factors=[None, count])
            schedule.reorder(thread, serial)
        else:
            results, thread = schedule.split(results, factors=[None, THREADS])
        schedule.bind(results, "blockIdx.x")
        schedule.bind(thread, "threadIdx.x")
    return schedule.mod["main"]


def _axes(schedule: Any, info: Any) -> tuple[Any, list[Any]] | None:
    """One loop over a block's results and, within, its loops over terms; None where they are neither."""
    kinds = info.dom_kind()
    if "O" in kinds:
        return None
    loops = schedule.get_loops(info.block_rv)
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == "S"]
    reduced = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == "R"]
    if not spatial:
        spatial = [schedule.add_unit_loop(info.block_rv)]
    schedule.reorder(*spatial, *reduced)
    return schedule.fuse(*spatial), reduced


def _pieces(func: Any, arch: str) -> tuple[list[DeviceNest], dict[str, tuple[tuple[int, ...], str]], int]:
    """The kernels of a scheduled function, their intermediates, and how many threads work in the idlest, WARP at most."""
    root = func.body.block if isinstance(func.body, s_tir.SBlockRealize) else None
    if root is None or root.iter_vars or _opaque(root):
        raise _Unfit(_DEPENDENT)
    shared = [buffer for buffer in root.alloc_buffers if str(buffer.scope()) == "global"]
    names = {buffer: f"p{i}" for i, buffer in enumerate(func.params)}
    names.update({buffer: f"t{i}" for i, buffer in enumerate(shared)})
    nests, active = [], WARP
    for stmt in statements(root.body):
        nest, threads = _nest(stmt, names, [b for b in root.alloc_buffers if b not in names], arch)
        nests.append(nest)
        active = min(active, threads)
    used = {name for nest in nests for name in nest.buffers}
    return nests, {names[b]: (shape_of(b), str(b.dtype)) for b in shared if names[b] in used}, active


def _nest(stmt: Any, names: dict[Any, str], private: list[Any], arch: str) -> tuple[DeviceNest, int]:
    reads: set[Any] = set()
    writes: set[Any] = set()
    tvm_ffi.structural_walk(
        stmt,
        [
            (TensorLoad, lambda node: reads.add(node.source)),
            (tirx.BufferStore, lambda node: writes.add(node.buffer)),
        ],
    )
    order = sorted(
        ((b in writes, names[b][0], int(names[b][1:]), b) for b in names if b in reads or b in writes),
        key=lambda item: item[:3],
    )
    buffers = [item[3] for item in order]
    if len(buffers) > MAX_ARGS:
        raise _Unfit(f"a loop nest uses {len(buffers)} buffers, at most {MAX_ARGS} can be passed")
    own = [b for b in private if b in reads or b in writes]
    body = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", stmt, alloc_buffers=own))
    func = tirx.PrimFunc(buffers, body).with_attrs({"s_tir": True, "tirx.noalias": True})
    func = s_tir.renew_defs(func)
    launch = launch_of(func)
    threads = math.prod(launch.block)
    if launch.blocks * threads == 1 and not _binds(stmt):
        raise _Unfit(_DEPENDENT)
    if threads > MAX_THREADS or any(g > most for g, most in zip(launch.grid, MAX_GRID, strict=True)):
        raise _Unfit(f"a launch of {launch.grid} blocks of {threads} threads is beyond what CUDA takes")
    if reduces_across_threads(func) or sum(math.prod(shape_of(b)) * itemsize(b) for b in own) > STATIC_SHARED:
        try:
            text = cuda_source((Kernel("kernel", func, "", launch),), arch)
        except BuildError as error:
            raise _Unfit(error.message) from error
        if declared_shared(text) > STATIC_SHARED:
            raise _Unfit(f"a block would need {declared_shared(text)} bytes of shared memory")
    size = sum(math.prod(shape_of(b)) * itemsize(b) for b in buffers)
    flops, active = _work(stmt)
    nest = DeviceNest(
        func, tuple(names[b] for b in buffers), tuple(names[b] for b in buffers if b in writes), launch, flops, size
    )
    return nest, active


def _opaque(root: Any) -> bool:
    """Whether a block has loops of its own, over which schedules have no power."""
    found: list[Any] = []

    def visit(block: Any) -> None:
        if not block.same_as(root):
            tvm_ffi.structural_walk(block.body, (tirx.For, found.append))

    tvm_ffi.structural_walk(root.body, (s_tir.SBlock, visit))
    return bool(found)


def _binds(stmt: Any) -> bool:
    found: list[Any] = []
    tvm_ffi.structural_walk(stmt, (tirx.For, lambda loop: found.append(loop) if loop.thread_binding is not None else 0))
    return bool(found)


def _work(stmt: Any) -> tuple[int, int]:
    """Operations of a nest, and how many threads work in the idlest of its blocks; WARP where there is no more work."""
    total, active = 0, WARP

    def visit(node: Any, serial: int) -> None:
        nonlocal total, active
        if isinstance(node, tirx.For):
            bound = node.thread_binding is not None
            visit(node.body, serial if bound else serial * (const_int(node.extent) or 1))
        elif isinstance(node, tirx.SeqStmt):
            for part in node.seq:
                visit(part, serial)
        elif isinstance(node, s_tir.SBlockRealize):
            block = node.block
            volume = math.prod(const_int(v.dom.extent) or 1 for v in block.iter_vars)
            inner = sum(operation_count(s) for s in statements(block.body) if isinstance(s, tirx.BufferStore))
            total += volume * max(1, inner)
            if volume > WARP:
                active = min(active, max(1, volume // serial))
            if any(isinstance(s, tirx.For | s_tir.SBlockRealize) for s in statements(block.body)):
                visit(block.body, serial)
        elif isinstance(node, tirx.IfThenElse):
            visit(node.then_case, serial)

    visit(stmt, 1)
    return total, active


__all__ = ["DeviceNest", "reduce_by_blocks", "split_device", "threads_by_result"]
