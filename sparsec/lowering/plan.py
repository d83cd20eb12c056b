"""Memory: values to places in one arena, constants to places in weights.bin, calls to steps.

Invariants of the result, checked by `check`:
    1. every base is a multiple of ALIGNMENT, with SLACK bytes behind it that no other live buffer owns;
    2. two buffers whose lifetimes overlap do not overlap in memory;
    3. every pointer of a step has the bytes that its kernel was built for: in one buffer that is alive, in one constant,
       or in the scratch area;
    4. kernels of one name are one code;
    5. the same program always gets the same offsets.
"""

from __future__ import annotations

import bisect
import hashlib

import numpy as np

from sparsec.building.codegen import argument_bytes, same_code
from sparsec.errors import CheckError
from sparsec.lowering.calls import Calls, Ref
from sparsec.program import ALIGNMENT, SLACK, Arg, Buffer, Constant, Kernel, Program, Step, Tensor
from sparsec.targets import Target


def owner_of(calls: Calls, name: str) -> tuple[str, int]:
    """The value that owns the memory of `name`, and the byte offset in it."""
    offset = 0
    while name in calls.views:
        name, more = calls.views[name]
        offset += more
    return name, offset


def plan(name: str, target: Target, calls: Calls, inputs: list[str], outputs: list[str]) -> Program:
    """Place everything. `inputs` and `outputs` are value names in signature order; an output may be a constant."""
    constants, constant_at, weights_bytes = _place_constants(calls, outputs)
    lifetimes = _lifetimes(calls, inputs, outputs)
    offsets, arena_bytes = _place_buffers(calls, lifetimes)

    def place(ref: Ref) -> Arg:
        if ref.kind == "scratch":
            return Arg("scratch", ref.offset)
        if ref.kind == "constant":
            return Arg("weights", constant_at[ref.name] + ref.offset)
        owner, offset = owner_of(calls, ref.name)
        return Arg("arena", offsets[owner] + offset + ref.offset)

    def tensor(value: str) -> Tensor:
        if value in calls.values:
            shape, dtype = calls.values[value]
            return Tensor(value, shape, dtype, place(Ref("value", value)))
        array = calls.constants[value]
        return Tensor(value, tuple(array.shape), str(array.dtype), place(Ref("constant", value)))

    kernels = _kernels(calls)
    steps = tuple(Step(c.kernel.name, tuple(place(a) for a in c.args), c.tiles, c.nodes) for c in calls.calls)
    scratch = max((c.scratch for c in calls.calls), default=0)
    buffers = tuple(
        Buffer(owner, *calls.values[owner], offsets[owner], calls.size(owner), *lifetimes[owner])
        for owner in sorted(offsets, key=lambda o: (lifetimes[o][0], o))
    )
    program = Program(
        name=name, target=target, kernels=tuple(kernels.values()), steps=steps, buffers=buffers, constants=constants,
        inputs=tuple(map(tensor, inputs)), outputs=tuple(map(tensor, outputs)), arena_bytes=arena_bytes,
        scratch_bytes=_aligned(scratch + SLACK) if scratch else 0, weights_bytes=weights_bytes, layers=tuple(calls.layers),
    )  # fmt: skip
    check(program)
    return program


def _kernels(calls: Calls) -> dict[str, Kernel]:
    kernels: dict[str, Kernel] = {}
    for call in calls.calls:
        known = kernels.setdefault(call.kernel.name, call.kernel)
        if not same_code(known, call.kernel):
            raise CheckError(f"two kernels have this name: {known.text!r} and {call.kernel.text!r}", known.name)
    return kernels


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _place_constants(calls: Calls, outputs: list[str]) -> tuple[tuple[Constant, ...], dict[str, int], int]:
    """Constants that some step or output uses, in order of use; equal bytes are stored once."""
    used = [ref.name for call in calls.calls for ref in call.args if ref.kind == "constant"]
    used += [name for name in outputs if name not in calls.values]
    placed: list[Constant] = []
    at: dict[str, int] = {}
    by_content: dict[tuple[str, bytes], int] = {}
    end = 0
    for name in dict.fromkeys(used):
        data = np.ascontiguousarray(calls.constants[name])
        key = (str(data.dtype), hashlib.sha256(data.tobytes()).digest())
        if key not in by_content:
            by_content[key] = end
            placed.append(Constant(name, data, end))
            end += _aligned(data.nbytes)
        at[name] = by_content[key]
    return tuple(placed), at, end + (SLACK if placed else 0)


def _lifetimes(calls: Calls, inputs: list[str], outputs: list[str]) -> dict[str, tuple[int, int]]:
    """First and last step of each owner."""
    spans: dict[str, tuple[int, int]] = {}

    def touch(name: str, step: int) -> None:
        if name not in calls.values:
            return
        owner, _ = owner_of(calls, name)
        first, last = spans.get(owner, (step, step))
        spans[owner] = (min(first, step), max(last, step))

    for name in inputs:
        touch(name, -1)
    for i, call in enumerate(calls.calls):
        for value in (*call.reads, *call.writes):
            touch(value, i)
    for name in outputs:
        touch(name, len(calls.calls))
    return spans


def _place_buffers(calls: Calls, spans: dict[str, tuple[int, int]]) -> tuple[dict[str, int], int]:
    """Offsets by greedy best fit, largest first (Pisarchyk and Lee, arXiv 2001.03288, 'greedy by size')."""
    offsets: dict[str, int] = {}
    arena = 0
    room = {owner: _aligned(calls.size(owner) + SLACK) for owner in spans}
    for owner in sorted(spans, key=lambda o: (-room[o], spans[o], o)):
        first, last = spans[owner]
        taken = sorted(
            (offsets[o], offsets[o] + room[o]) for o in offsets if spans[o][0] <= last and first <= spans[o][1]
        )
        best, best_gap, at = -1, None, 0
        for start, stop in taken:
            gap = start - at
            if gap >= room[owner] and (best_gap is None or gap < best_gap):
                best, best_gap = at, gap
            at = max(at, stop)
        offsets[owner] = best if best_gap is not None else at
        arena = max(arena, offsets[owner] + room[owner])
    return offsets, arena


def check(program: Program) -> None:
    """Verify the invariants at the head of this module. Raises CheckError."""
    live = sorted(program.buffers, key=lambda b: b.offset)
    for i, a in enumerate(live):
        if a.offset % ALIGNMENT or a.offset + a.size + SLACK > program.arena_bytes:
            raise CheckError(f"buffer at {a.offset} of {a.size} bytes is misplaced", a.name)
        for b in live[i + 1 :]:
            if b.offset >= a.offset + a.size + SLACK:
                break
            if a.first <= b.last and b.first <= a.last:
                raise CheckError(f"shares memory with {b.name!r} while both are alive", a.name)
    sizes = {kernel.name: argument_bytes(kernel) for kernel in program.kernels}
    constants = sorted((c.offset, c.data.nbytes) for c in program.constants)
    starts = [offset for offset, _ in constants]

    def has_room(arg: Arg, size: int, step: int) -> bool:
        if arg.space == "scratch":
            return 0 <= arg.offset <= program.scratch_bytes - size
        if arg.space == "arena":
            alive = (b for b in live if b.first <= step <= b.last)
            return any(b.offset <= arg.offset <= b.offset + b.size - size for b in alive)
        holder = bisect.bisect_right(starts, arg.offset) - 1
        return holder >= 0 and arg.offset + size <= sum(constants[holder])

    for i, step in enumerate(program.steps):
        if len(step.args) != len(sizes[step.kernel]):
            raise CheckError(f"takes {len(sizes[step.kernel])} pointers, got {len(step.args)}", step.kernel)
        for arg, size in zip(step.args, sizes[step.kernel], strict=True):
            needed = size if size > 8 else 0  # one element may stand for none
            if not has_room(arg, needed, i):
                raise CheckError(f"step {i} has no {needed} bytes at {arg.space}+{arg.offset}", step.kernel)
