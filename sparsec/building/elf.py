"""Little ELF: read the symbols of a 64-bit little-endian object or library, and rename the ones that an object defines.

Renaming makes two models link into one program: every symbol carries its model's prefix, whatever compiler emitted it.
Only the string table is rewritten (a new one behind the file's end); code, relocations and symbol order stay.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sparsec.errors import BuildError

_SECTION = struct.Struct("<IIQQQQIIQQ")  # name, type, flags, addr, offset, size, link, info, addralign, entsize
_SYMBOL = struct.Struct("<IBBHQQ")  # name, info, other, section, value, size
_SYMTAB, _STRTAB, _DYNAMIC, _DYNSYM = 2, 3, 6, 11
_HIDDEN = 2


@dataclass(frozen=True)
class Symbol:
    """A global or weak symbol. `defined`: its code or data is in this file. `hidden`: not visible outside the link."""

    name: str
    defined: bool
    weak: bool
    hidden: bool
    code: bool


@dataclass(frozen=True)
class _Table:
    """A symbol table: byte offsets of the section's own header, of its entries and of its string section."""

    start: int
    count: int
    strings_header: int
    strings: int


def _sections(data: bytes) -> list[tuple[int, tuple[int, ...]]]:
    """(offset of the section header, its fields) of each section."""
    if len(data) < 64 or data[:6] != b"\x7fELF\x02\x01":
        raise BuildError("not a 64-bit little-endian ELF file", "linker")
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    return [(at, _SECTION.unpack_from(data, at)) for at in range(table, table + size * count, size)]


def _table(data: bytes, kind: int) -> _Table | None:
    sections = _sections(data)
    for _, (_, type_, _, _, offset, size, link, _, _, _) in sections:
        if type_ == kind:
            header, strings = sections[link]
            return _Table(offset, size // _SYMBOL.size, header, strings[4])
    return None


def _string(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode("utf-8", "surrogateescape")


def _globals(data: bytes, table: _Table) -> Iterator[tuple[int, Symbol]]:
    """(offset of the entry, symbol) of each global and weak symbol."""
    for at in range(table.start, table.start + table.count * _SYMBOL.size, _SYMBOL.size):
        name, info, other, section, _, _ = _SYMBOL.unpack_from(data, at)
        if info >> 4 and name:
            text = _string(data, table.strings + name)
            yield at, Symbol(text, section != 0, info >> 4 == 2, other & 3 == _HIDDEN, info & 15 == 2)


def symbols(data: bytes, dynamic: bool = False) -> list[Symbol]:
    """Global and weak symbols of an object, or (`dynamic`) the ones a shared library imports and exports."""
    table = _table(data, _DYNSYM if dynamic else _SYMTAB)
    return [symbol for _, symbol in _globals(data, table)] if table else []


def needed(data: bytes) -> list[str]:
    """SONAMEs that a shared library or dynamic executable is linked with."""
    sections = _sections(data)
    names = []
    for _, (_, type_, _, _, offset, size, link, _, _, _) in sections:
        if type_ == _DYNAMIC:
            for tag, value in struct.iter_unpack("<QQ", data[offset : offset + size]):
                if tag == 1:
                    names.append(_string(data, sections[link][1][4] + value))
    return names


def load_alignments(data: bytes) -> list[int]:
    """Alignment in bytes of each loadable segment."""
    (start,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    heads = [struct.unpack_from("<IIQQQQQQ", data, start + i * size) for i in range(count)]
    return [head[7] for head in heads if head[0] == 1]


def rename_symbols(data: bytes, rename: Callable[[str], str], hide: bool = True) -> bytes:
    """The object with each global and weak symbol called `rename(name)`; those it defines become hidden if `hide`."""
    table = _table(data, _SYMTAB)
    if table is None:
        return data
    result = bytearray(data)
    _, strings_type, _, _, start, size, *_ = _SECTION.unpack_from(data, table.strings_header)
    assert strings_type == _STRTAB
    strings = bytearray(data[start : start + size])
    for at, symbol in _globals(data, table):
        name = rename(symbol.name)
        if name != symbol.name:
            struct.pack_into("<I", result, at, len(strings))
            strings += name.encode("utf-8", "surrogateescape") + b"\0"
        if hide and symbol.defined:
            result[at + 5] = result[at + 5] & ~3 | _HIDDEN
    struct.pack_into("<QQ", result, table.strings_header + 24, len(result), len(strings))
    return bytes(result + strings)
