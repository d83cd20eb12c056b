"""Sums of four products: `dot` adds, on every lane, the products of a word of activations and a word of weights.

    acc[i] + sum over b = 0..3 of activations[i].byte[b] * weights[i].byte[b]                    int32, exact

    vnni      vpdpbusd (AVX512-VNNI, AVX-VNNI)            unsigned activations
    usdot     usdot (FEAT_I8MM)                            unsigned
    sdot      sdot (FEAT_DotProd)                          signed
    pmaddwd   bytes widened to pairs of 16 bits, pmaddwd   unsigned; pmaddubsw would saturate
    smull     smull, saddlp, addp (Armv8.0)                signed
    portable  shifts and multiplications of int32          unsigned

Weights are signed. Vectors narrower than the instruction's are filled up; wider ones are a mistake.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels.base import Machine
from sparsec.kernels.emit import lanes_of

WORD = 4  # products of a word
WHOLE = ("vnni", "sdot", "usdot")  # one instruction that takes words as they are
_PAIRS = {
    ("pmaddwd", 4): "llvm.x86.sse2.pmadd.wd",
    ("pmaddwd", 8): "llvm.x86.avx2.pmadd.wd",
    ("pmaddwd", 16): "llvm.x86.avx512.pmaddw.d.512",
    ("wasm", 4): "llvm.wasm.dot",
}  # by what the machine has and lanes
_ARM = {"sdot": "llvm.aarch64.neon.sdot.v4i32.v16i8", "usdot": "llvm.aarch64.neon.usdot.v4i32.v16i8"}


def dot(machine: Machine, acc: Any, activations: Any, weights: Any) -> Any:
    """acc + the four products of each lane. All int32 of equal lanes; activations packed as the machine wants them."""
    lanes = lanes_of(acc)
    if machine.dot in WHOLE and lanes < 4:
        wide = [_repeat(v, 4 // lanes) for v in (acc, activations, weights)]
        return T.Shuffle([dot(machine, *wide)], list(range(lanes)))
    most = machine.vector_bytes // 4
    if machine.dot not in ("portable",) and lanes > most:
        raise ValueError(f"{lanes} lanes: the machine's vectors have {most}")
    match machine.dot:
        case "vnni":
            name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
            return T.call_llvm_pure_intrin(f"int32x{lanes}", name, acc, _quads(activations), _quads(weights))
        case "sdot" | "usdot" as kind:
            return T.call_llvm_pure_intrin("int32x4", _ARM[kind], acc, _quads(activations), _quads(weights))
        case "pmaddwd" | "wasm" as kind if lanes >= 4:
            return acc + _pairs(_PAIRS[kind, lanes], activations, weights)
        case "smull" if lanes == 4:
            return acc + _smull(activations, weights)
    return acc + _portable(machine, activations, weights)


def _repeat(value: Any, times: int) -> Any:
    """The lanes of a value, `times` times one behind the other."""
    lanes = lanes_of(value)
    return emit.splat(value, times) if lanes == 1 else T.Shuffle([value] * times, list(range(lanes)) * times)


def _quads(words: Any) -> Any:
    return tirx.reinterpret(f"int8x{4 * lanes_of(words)}", words)


def _pairs(name: str, activations: Any, weights: Any) -> Any:
    """Even and odd bytes as 16 bits, of activations without, of weights with their sign; `name` adds products by twos."""
    lanes = lanes_of(activations)
    halves = f"int16x{2 * lanes}"

    def half(words: Any) -> Any:
        return tirx.reinterpret(halves, words)

    def shift(value: Any, left: bool) -> Any:
        eight = emit.splat(tirx.const(8, "int16"), 2 * lanes)
        return value << eight if left else value >> eight

    low = _int32(0x00FF00FF, lanes)
    even_x, odd_x = half(activations & low), half((activations >> _int32(8, lanes)) & low)
    both = half(weights)
    even_w, odd_w = shift(shift(both, True), False), shift(both, False)
    dtype = f"int32x{lanes}"
    return T.call_llvm_pure_intrin(dtype, name, even_x, even_w) + T.call_llvm_pure_intrin(dtype, name, odd_x, odd_w)


def _smull(activations: Any, weights: Any) -> Any:
    """Products of 8 bits as 16, added in pairs as 32: nothing can overflow."""
    x, w = _quads(activations), _quads(weights)

    def pairs(first: int) -> Any:
        part = [T.Shuffle([v], list(range(first, first + 8))) for v in (x, w)]
        products = T.call_llvm_pure_intrin("int16x8", "llvm.aarch64.neon.smull.v8i16", *part)
        return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.saddlp.v4i32.v8i16", products)

    return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.addp.v4i32", pairs(0), pairs(8))


def _portable(machine: Machine, activations: Any, weights: Any) -> Any:
    lanes = lanes_of(activations)

    def byte(words: Any, number: int, signed: bool) -> Any:
        if signed:
            return (words << _int32(24 - 8 * number, lanes)) >> _int32(24, lanes)
        return (words >> _int32(8 * number, lanes)) & _int32(255, lanes)

    products = [byte(activations, i, machine.signed_dot) * byte(weights, i, True) for i in range(WORD)]
    return (products[0] + products[1]) + (products[2] + products[3])


def _int32(value: int, lanes: int) -> Any:
    return emit.constant(value, lanes, "int32")
