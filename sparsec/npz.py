"""Arrays in `.npz` and `.npy` files. Untrusted input: nothing is unpickled, and sizes are compared before room is made.

    an archive    members of distinct names, not encrypted; unpacked, they may be `GROWTH` times the file, or `UNPACKED`
    a member      shape and element type of its header say exactly how many bytes follow

A damaged file can fail anywhere in three parsers (zip, deflate, NumPy's header); all of it is one DataError.
"""

from __future__ import annotations

import math
import os
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from sparsec.errors import DataError

UNPACKED = 1 << 30  # bytes that any archive may unpack to
GROWTH = 64  # times its own size that a larger one may: numbers hardly shrink, zeros shrink a thousandfold
MEMBERS = 100_000


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Every array of an `.npz`. Raises DataError; never unpickles."""
    where = str(path)
    try:
        with _open(path) as file:
            if file.read(6) == np.lib.format.MAGIC_PREFIX:
                text = "expected an .npz archive, got a single array; save it with np.savez(name=array)"
                raise DataError(text, where)
            file.seek(0)
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                _check_sizes(members, os.fstat(file.fileno()).st_size, where)
                return {_name(member): _member(archive, member, where) for member in members}
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", where) from error
    except Exception as error:
        raise DataError(f"not an .npz of plain arrays: {_one_line(error)}", where) from error


def read_npy(path: str | Path) -> np.ndarray:
    """The array of an `.npy`. Raises DataError; never unpickles."""
    where = str(path)
    try:
        with _open(path) as file:
            if file.read(4) == b"PK\x03\x04":
                raise DataError("expected an .npy with one array, got an .npz archive", where)
            file.seek(0)
            return _array(file, os.fstat(file.fileno()).st_size, where)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", where) from error
    except Exception as error:
        raise DataError(f"not an .npy of a plain array: {_one_line(error)}", where) from error


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write `arrays` under any names (np.savez takes keyword arguments and refuses some)."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def _open(path: str | Path) -> IO[bytes]:
    file = open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")  # noqa: SIM115 the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DataError("not a regular file", str(path))
    return file


def _name(member: zipfile.ZipInfo) -> str:
    return member.filename.removesuffix(".npy")


def _check_sizes(members: list[zipfile.ZipInfo], size: int, where: str) -> None:
    unpacked = sum(member.file_size for member in members)
    if unpacked > max(UNPACKED, GROWTH * size):
        raise DataError(f"{size} bytes that unpack to {unpacked}: save it without compression (np.savez)", where)
    names = [_name(member) for member in members]
    if len(members) > MEMBERS or len(set(names)) != len(names):
        raise DataError(f"expected at most {MEMBERS} arrays of distinct names, got {len(names)}", where)


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, where: str) -> np.ndarray:
    with archive.open(member) as file:
        array = _array(file, member.file_size, f"{where}: {_name(member)}")
        if file.read(1):  # also the end of the data, where zip compares its checksum
            raise DataError("holds more than its header says", f"{where}: {_name(member)}")
        return array


def _array(file: Any, size: int, where: str) -> np.ndarray:
    """The array in an open file of `size` bytes."""
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(
        version
    )
    if read_header is None:
        raise DataError(f"format version {version[0]}.{version[1]}, expected 1.0 or 2.0", where)
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise DataError("holds Python objects, which are never unpickled; save plain numbers", where)
    need = math.prod(shape) * dtype.itemsize
    if dtype.itemsize == 0 or min(shape, default=0) < 0 or len(shape) > 64 or need != size - file.tell():
        raise DataError(f"expected {dtype}{list(shape)[:64]}, got {size - file.tell()} bytes", where)
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _one_line(error: Exception) -> str:
    text = str(error).splitlines()
    return text[0][:200] if text else type(error).__name__
