"""A function of one 8-bit tensor: every chain of elementwise functions from 8 bits to 8 bits is a table of 256 bytes.

    y[i] = table[x[i]]                                       x as an unsigned byte, whatever its type

Vector instructions look up 16 bytes (vpshufb), 64 (four-register tbl) or 64 words (vpermi2w) at once:

    words   AVX512BW   of both bytes of a word: entry (byte & 127) of 128 words, 64 by each of two lookups, bit 6 selects;
                       bit 7 selects the half of the word, as which T[i] and T[i + 128] are stored
    rows    AVX2       16 rows of 16 bytes. Entry b of a row is zero where bit 7 of b is set; b goes down by 16 from row to
                       row, so that row k answers where it has not passed zero, and rows are stored as differences:
                       y = xor of all answers. With R[k] the rows of the table and D[k] what is stored,
                           D[k] = R[k] ^ R[k - 1]                  0 < k < 8;  D[0] = R[0]
                           D[8] = R[8] ^ R[7] ^ R[0]
                           D[k] = R[k] ^ R[k - 1] ^ R[k - 8] ^ R[k - 9]    8 < k
                       Steps wrap up to the eighth, which brings b >= 128 down to where b - 128 was at the start, and
                       saturate from there, so that b < 128 stays negative
    tbl     Arm        four lookups of 64 bytes; tbx keeps what lies outside
    bytes   otherwise  one load a byte

Rows stored as differences: the x8-lut kernels of XNNPACK.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels.base import Format, KernelCall, Machine, unique
from sparsec.kernels.bytes import as_type, joined, pick, picks
from sparsec.kernels.quantize_int8 import TILE, by_runs

Way = Literal["words", "rows", "tbl", "bytes"]

TABLE: tuple[Format, ...] = (
    Format("lookup_int8", "Sigmoid, HardSwish, Relu, Mul, ...", "dense", "int8",
           "functions of one 8-bit tensor, by a table of 256 bytes", "one constant scale, constants of one element"),
)  # fmt: skip


def way(machine: Machine) -> Way:
    """How this machine looks up."""
    if not picks(machine):
        return "bytes"
    if machine.lane_fma:
        return "tbl"
    # Rows in vectors of 16 bytes take a third longer than loads (measured with SSE), of 32 half as long.
    return {64: "words", 32: "rows"}.get(machine.vector_bytes, "bytes")


def reference(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """table [256], uint8 or int8, at the bytes of x."""
    return np.asarray(table[x.view(np.uint8)])


def pack(table: np.ndarray, kind: Way) -> np.ndarray:
    """A table [256] of bytes as it is stored for `kind`: uint8 [256]."""
    plain = np.ascontiguousarray(table).view(np.uint8).copy()
    if kind == "words":
        return np.ascontiguousarray(plain.reshape(2, 128).T).reshape(-1)
    if kind != "rows":
        return plain
    rows = plain.reshape(16, 16)
    stored = rows.copy()
    stored[1:] ^= rows[:-1]
    stored[8:] ^= rows[:8]
    stored[9:] ^= rows[:7]
    return stored.reshape(-1)


def unpack(packed: np.ndarray, kind: Way) -> np.ndarray:
    """The inverse of `pack`."""
    if kind == "words":
        return np.ascontiguousarray(packed.reshape(128, 2).T).reshape(-1)
    if kind != "rows":
        return packed.copy()
    stored, rows = packed.reshape(16, 16), np.zeros((16, 16), np.uint8)
    for k in range(16):
        rows[k] = stored[k]
        for i in (k - 1, k - 8, k - 9):
            if i >= 0 and (i == k - 1 or k >= 8):
                rows[k] ^= rows[i]
    return rows.reshape(-1)


def bind(machine: Machine, *, size: int, table: np.ndarray, x_type: str) -> KernelCall:
    """The call for `size` bytes of element type `x_type`; table [256] of the result's type, at the bytes of x.

    Roles (x, y, table). Tiles: runs of TILE elements. y must not overlap x.
    """
    machine, kind = machine.single(), way(machine)
    element = str(table.dtype)
    at_once = 2 if kind == "rows" else 1  # vectors for each row that is loaded

    def body(x: Any, y: Any, stored: Any, begin: Any, end: Any) -> None:
        look = _LOOKUPS[kind](machine, stored)

        def one(x: Any, y: Any, at: Any, width: int, valid: int) -> None:
            if kind == "bytes":
                for i in range(valid):
                    T.buffer_store(y, T.Cast(element, stored[_index(x[at + i])]), [at + i])
                return
            part = max(16, width // at_once)
            found = look([as_type(emit.load(x, at + i, part), "uint8") for i in range(0, width, part)])
            for i, value in enumerate(found):
                if valid > i * part:
                    emit.store(y, at + i * part, T.bind(as_type(value, element)), part, min(part, valid - i * part))

        by_runs(machine, size, one, machine.vector_bytes * at_once)(x, y, begin, end)

    func = emit.function([("x", size, x_type), ("y", size, element), ("table", 256, "uint8")], body)
    name = unique(f"lookup_{x_type}", size, x_type, element, machine)
    text = f"table of {size} bytes, {x_type} to {element}, by {kind}"
    return KernelCall(name, func, ("x", "y", "table"), {"table": pack(table, kind)}, -(-size // TILE), 0, text)


def _index(byte: Any) -> Any:
    return T.Cast("int32", byte) & tirx.const(255, "int32")


def _splat(value: int, lanes: int, element: str) -> Any:
    return emit.splat(tirx.const(value, element), lanes)


Look = Callable[[list[Any]], list[Any]]


def _by_rows(machine: Machine, table: Any) -> Look:
    def look(bytes_: list[Any]) -> list[Any]:
        lanes = emit.lanes_of(bytes_[0])
        index, found = [T.bind(b) for b in bytes_], list[Any]()
        sixteen = _splat(16, lanes, "uint8")
        for row in range(16):
            entries = T.bind(joined([emit.load(table, 16 * row, 16)], lanes))
            if row:
                index = [T.bind(_lower(i, sixteen, saturate=row > 8)) for i in index]
            answers = [as_type(pick(machine, entries, i), "uint8") for i in index]
            found = [T.bind(f ^ a) for f, a in zip(found, answers, strict=True)] if row else answers
        return found

    return look


def _lower(index: Any, by: Any, saturate: bool) -> Any:
    if not saturate:
        return index - by
    lanes = emit.lanes_of(index)
    signed = [as_type(v, "int8") for v in (index, by)]
    return as_type(T.call_llvm_pure_intrin(f"int8x{lanes}", f"llvm.ssub.sat.v{lanes}i8", *signed), "uint8")


def _by_words(machine: Machine, table: Any) -> Look:
    """64 bytes at a time; fewer are looked up as 64."""
    parts = [as_type(emit.load(table, 64 * i, 64), "int16") for i in range(4)]

    def entry(number: Any, byte: Any) -> Any:
        """Stored words at `number & 127`, of which `byte`'s bit 7 takes the upper half, as the low byte of a word."""
        found = [
            T.call_llvm_pure_intrin("int16x32", "llvm.x86.avx512.vpermi2var.hi.512", parts[i], number, parts[i + 1])
            for i in (0, 2)
        ]
        upper = (number & _splat(64, 32, "int16")) != _splat(0, 32, "int16")
        word = as_type(T.bind(tirx.Select(upper, found[1], found[0])), "uint16")
        half = (byte >> _splat(4, 32, "uint16")) & _splat(8, 32, "uint16")
        return word >> half

    def look(bytes_: list[Any]) -> list[Any]:
        size = emit.lanes_of(bytes_[0])
        words = T.bind(as_type(joined(bytes_, 64), "uint16"))
        high = T.bind(words >> _splat(8, 32, "uint16"))
        low_byte = entry(as_type(words, "int16"), words) & _splat(255, 32, "uint16")
        high_byte = entry(as_type(high, "int16"), high) << _splat(8, 32, "uint16")
        found = as_type(T.bind(low_byte | high_byte), "uint8")
        return [found if size == 64 else T.Shuffle([found], list(range(size)))]

    return look


def _by_tbl(machine: Machine, table: Any) -> Look:
    parts = [as_type(emit.load(table, 16 * i, 16), "int8") for i in range(16)]

    def look(bytes_: list[Any]) -> list[Any]:
        found = []
        for index in bytes_:
            value = None
            for i in range(4):
                name = f"llvm.aarch64.neon.{'tbx4' if i else 'tbl4'}.v16i8"
                at = as_type(T.bind(index - _splat(64 * i, 16, "uint8")) if i else index, "int8")
                arguments = [*([] if value is None else [value]), *parts[4 * i : 4 * i + 4], at]
                value = T.bind(T.call_llvm_pure_intrin("int8x16", name, *arguments))
            found.append(value)
        return found

    return look


_LOOKUPS: dict[Way, Callable[[Machine, Any], Look]] = {
    "words": _by_words, "rows": _by_rows, "tbl": _by_tbl, "bytes": lambda machine, table: lambda bytes_: bytes_,
}  # fmt: skip
