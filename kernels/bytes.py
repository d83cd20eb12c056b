"""Vector instructions on bytes: bytes picked by an index, and int32 narrowed to bytes with saturation.

    picked[i] = source[order[i]]                                             pshufb, vpermb, tbl, swizzle
    narrowed = saturate(four vectors of int32 + zero point), clipped         packssdw and packuswb, sqxtn and sqxtun, narrow

They are written as the instructions they are. A shuffle with a constant order becomes what LLVM thinks of: five
instructions and more for sliding windows of bytes. For the same reason an order is loaded from a packed constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels.base import Machine
from sparsec.kernels.emit import dtype_of, lanes_of

_X86 = ("vnni", "pmaddwd")
_ARM = ("sdot", "usdot", "smull")


def picks(machine: Machine) -> bool:
    """Whether `pick` and `narrow` know this machine's instructions."""
    return machine.dot in (*_X86, *_ARM, "wasm")


def as_type(value: Any, element: str) -> Any:
    """The bits of a vector as lanes of `element`."""
    size = lanes_of(value) * np.dtype(dtype_of(value).partition("x")[0]).itemsize
    dtype = emit.vector_type(size // np.dtype(element).itemsize, element)
    return value if dtype_of(value) == dtype else tirx.reinterpret(dtype, value)


def joined(parts: Sequence[Any], lanes: int) -> Any:
    """Vectors one behind the other, and again from the first until there are `lanes`."""
    have = sum(lanes_of(part) for part in parts)
    if have == lanes and len(parts) == 1:
        return parts[0]
    return T.Shuffle(list(parts) * (lanes // have), list(range(lanes)))


def pick(machine: Machine, source: Any, order: Any) -> Any:
    """Bytes of `source` by number, int8 of as many lanes as `order` has: 16, 32 or 64.

    Numbers count within each 16 bytes of both, from 0; with `machine.byte_permute` and 64 lanes, within all.
    """
    size = lanes_of(order)
    source, order = as_type(source, "int8"), as_type(order, "int8")
    if machine.dot in _ARM:
        return T.call_llvm_pure_intrin("int8x16", "llvm.aarch64.neon.tbl1.v16i8", source, order)
    if machine.dot == "wasm":
        return T.call_llvm_pure_intrin("int8x16", "llvm.wasm.swizzle", source, order)
    if size == 64 and machine.byte_permute:
        return T.call_llvm_pure_intrin("int8x64", "llvm.x86.avx512.permvar.qi.512", source, order)
    name = {16: "llvm.x86.ssse3.pshuf.b.128", 32: "llvm.x86.avx2.pshuf.b", 64: "llvm.x86.avx512.pshuf.b.512"}[size]
    return T.call_llvm_pure_intrin(f"int8x{size}", name, source, order)


def pick_words(source: Any, order: Any) -> Any:
    """32-bit words of a 64-byte vector by number: int32x16 (AVX512)."""
    return T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.permvar.si.512", as_type(source, "int32"), order)


def spread_words(rows: Sequence[Any], number: int) -> Any:
    """Words of four vectors of bytes, a lane each of every one: of the four vectors of int32 that hold them, the one of `number`.

    Lane i is of byte 16 (i // 4) + 4 number + i % 4: what interleaving within 16 bytes gives, on every machine.
    """
    high, second = divmod(number, 2)
    pairs = [_unpacked(as_type(a, "uint8"), as_type(b, "uint8"), 16, high) for a, b in (rows[:2], rows[2:])]
    return as_type(_unpacked(*(as_type(pair, "int16") for pair in pairs), 8, second), "int32")


def _unpacked(a: Any, b: Any, within: int, high: int) -> Any:
    """punpckl, punpckh; zip1, zip2: lanes of a and b in turns, those of the lower or the higher half of every `within`."""
    lanes, half = lanes_of(a), within // 2
    source = [start + high * half + j for start in range(0, lanes, within) for j in range(half)]
    return T.Shuffle([a, b], [i for j in source for i in (j, lanes + j)])


def narrow(
    machine: Machine,
    whole: Sequence[Any],
    zero_point: int,
    element: str,
    least: int,
    largest: int,
    spread: bool = False,
) -> Any:
    """Four int32 vectors plus a zero point as one of bytes in the same order, within `least`..`largest`.

    whole + zero_point must fit in 32 bits. `element`: uint8 or int8. `spread`: the vectors are `spread_words`, and the bytes
    come out as they were before.
    """
    lanes = lanes_of(whole[0])
    low, high = (-128, 127) if element == "int8" else (0, 255)
    if not picks(machine) or lanes < 4:
        assert not spread
        bounds = [emit.splat(tirx.const(v, "int32"), lanes) for v in (zero_point, least, largest)]
        clipped = [T.min(T.max(v + bounds[0], bounds[1]), bounds[2]) for v in whole]
        return T.Shuffle([T.Cast(emit.vector_type(lanes, element), v) for v in clipped], list(range(4 * lanes)))
    halves = [_shifted(_pack16(machine, *whole[i : i + 2]), zero_point) for i in (0, 2)]
    value = as_type(_pack8(machine, *halves, element), element)
    if machine.dot in _X86 and lanes > 4 and not spread:  # packs work within 16 bytes
        quads = lanes // 4
        order = [quads_at * 4 + i for i in range(4) for quads_at in range(quads)]
        value = as_type(T.Shuffle([as_type(value, "int32")], order), element)
    if least > low:
        value = T.max(value, emit.splat(tirx.const(least, element), 4 * lanes))
    return T.min(value, emit.splat(tirx.const(largest, element), 4 * lanes)) if largest < high else value


def _shifted(value: Any, zero_point: int) -> Any:
    if not zero_point:
        return value
    lanes = lanes_of(value)
    by = emit.splat(tirx.const(zero_point, "int16"), lanes)
    return T.call_llvm_pure_intrin(f"int16x{lanes}", f"llvm.sadd.sat.v{lanes}i16", value, by)


def _pack16(machine: Machine, a: Any, b: Any) -> Any:
    lanes = lanes_of(a)
    if machine.dot in _ARM:
        parts = [T.call_llvm_pure_intrin("int16x4", "llvm.aarch64.neon.sqxtn.v4i16", v) for v in (a, b)]
        return T.Shuffle(parts, list(range(8)))
    if machine.dot == "wasm":
        return T.call_llvm_pure_intrin("int16x8", "llvm.wasm.narrow.signed.v8i16.v4i32", a, b)
    name = {4: "llvm.x86.sse2.packssdw.128", 8: "llvm.x86.avx2.packssdw", 16: "llvm.x86.avx512.packssdw.512"}[lanes]
    return T.call_llvm_pure_intrin(f"int16x{2 * lanes}", name, a, b)


def _pack8(machine: Machine, a: Any, b: Any, element: str) -> Any:
    lanes = lanes_of(a)
    if machine.dot in _ARM:
        name = f"llvm.aarch64.neon.{'sqxtn' if element == 'int8' else 'sqxtun'}.v8i8"
        return T.Shuffle([T.call_llvm_pure_intrin("int8x8", name, v) for v in (a, b)], list(range(16)))
    if machine.dot == "wasm":
        sign = "signed" if element == "int8" else "unsigned"
        return T.call_llvm_pure_intrin("int8x16", f"llvm.wasm.narrow.{sign}.v16i8.v8i16", a, b)
    kind = "packsswb" if element == "int8" else "packuswb"
    name = {8: f"sse2.{kind}.128", 16: f"avx2.{kind}", 32: f"avx512.{kind}.512"}[lanes]
    return T.call_llvm_pure_intrin(f"int8x{2 * lanes}", f"llvm.x86.{name}", a, b)
