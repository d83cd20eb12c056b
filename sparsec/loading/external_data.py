"""Tensors whose data lies in another file. The location is what a stranger wrote: it is resolved here, by nobody else.

    relative path, no NUL, no backslash        realpath inside the model's folder, again after opening (/proc/self/fd)
    a regular file with one name               a symlink or hard link could lead to any file of this machine
    0 <= offset, length = bytes of the tensor  offset + length <= size of the file
    ranges of two tensors                      the same (a shared weight) or apart; never partly the same

The sum over all tensors is limited (`Limits.weight_bytes`), shared ranges counted each time. Files are mapped, not read:
a tensor costs memory when it is looked at.
"""

from __future__ import annotations

import itertools
import mmap
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import onnx

from sparsec.errors import ModelError
from sparsec.limits import Limits

_KEYS = ("location", "offset", "length")
_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}


@dataclass(frozen=True)
class Extent:
    """Where a tensor's bytes are: a file inside the model's folder, and the range in it."""

    location: str
    offset: int
    length: int


@dataclass
class ExternalFiles:
    """The files beside one model. `folder` is None for a model that came without one (bytes)."""

    folder: Path | None
    where: str
    limits: Limits
    on_map: Callable[[int], None] = lambda size: None  # told the bytes of each tensor before it is mapped
    _files: dict[str, tuple[IO[bytes], int]] = field(default_factory=dict)

    def extent(self, tensor: onnx.TensorProto) -> Extent:
        """The checked place of `tensor`'s data. Raises ModelError."""
        what = f"external data of tensor {tensor.name!r}"
        entries: dict[str, str] = {}
        for entry in tensor.external_data:
            # protobuf hands out damaged text as bytes
            if not isinstance(entry.key, str) or not isinstance(entry.value, str):
                raise ModelError(f"{what}: {entry.value[:40]!r} is not UTF-8: the file is damaged", self.where)
            if entry.key in entries:
                raise ModelError(f"{what}: {entry.key!r} is given twice", self.where)
            entries[entry.key] = entry.value
        location = entries.get("location", "")
        need = tensor_bytes(tensor, self.where, self.limits)
        offset, length = (
            self._integer(entries.get(key) or str(default), what) for key, default in (("offset", 0), ("length", need))
        )
        if length != need or offset < 0:
            text = f"expected {need} bytes for {list(tensor.dims)}, got length {length} at offset {offset}"
            raise ModelError(f"{what}: {text}", self.where)
        size = self._file(location, what)[1] if need else 0
        if need and offset + length > size:
            raise ModelError(f"{what}: {location!r} has {size} bytes, expected at least {offset + length}", self.where)
        return Extent(location, offset, length)

    def view(self, extent: Extent) -> np.ndarray:
        """The bytes, uint8 [length], read-only; a mapping of their own, that ends with the array."""
        if not extent.length:
            return np.zeros(0, np.uint8)
        file, _ = self._file(extent.location, extent.location)
        before = extent.offset % mmap.ALLOCATIONGRANULARITY
        self.on_map(extent.length)
        try:
            mapping = mmap.mmap(
                file.fileno(), before + extent.length, access=mmap.ACCESS_READ, offset=extent.offset - before
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"{extent.location!r} cannot be mapped: {error}", self.where) from error
        return np.frombuffer(mapping, np.uint8, extent.length, before)

    def check(self, extents: Iterable[tuple[str, Extent]]) -> None:
        """Raise ModelError for tensors (name, extent) that are too much together or that overlap in part."""
        pairs = [(name, e) for name, e in extents if e.length]
        total = sum(e.length for _, e in pairs)
        if total > self.limits.weight_bytes:
            text = f"{total} bytes of external data, at most {self.limits.weight_bytes} are read"
            raise ModelError(f"{text} (--limit weight-bytes=N)", self.where)
        pairs.sort(key=lambda pair: (os.path.normpath(pair[1].location), pair[1].offset, pair[1].length))
        for (first, a), (second, b) in itertools.pairwise(pairs):
            same_file = os.path.normpath(a.location) == os.path.normpath(b.location)
            if same_file and (a.offset, a.length) != (b.offset, b.length) and b.offset < a.offset + a.length:
                text = f"external data of tensors {first!r} and {second!r} overlaps in {a.location!r}"
                raise ModelError(f"{text}; share all of it or none", self.where)

    def _integer(self, text: str, what: str) -> int:
        if not text.removeprefix("-").isascii() or not text.removeprefix("-").isdigit() or len(text) > 19:
            raise ModelError(f"{what}: offset and length must be integers", self.where)
        return int(text)

    def _file(self, location: str, what: str) -> tuple[IO[bytes], int]:
        """The open file and its size."""
        found = self._files.get(location)
        if found is None:
            try:
                found = self._files[location] = self._open(location, what)
            except OSError as error:
                raise ModelError(f"{what}: cannot read {location!r}: {error.strerror or error}", self.where) from error
        return found

    def _open(self, location: str, what: str) -> tuple[IO[bytes], int]:
        if self.folder is None:
            text = "keeps its data in another file; give the model's path instead of its bytes"
            raise ModelError(f"{what.removeprefix('external data of ')} {text}", self.where)
        if len(location) > PATH_BYTES:
            raise ModelError(f"{what}: a path of {len(location)} characters", self.where)
        if not location or os.path.isabs(location) or "\0" in location or "\\" in location:
            raise ModelError(
                f"{what}: expected a relative path inside the model's folder, got {location!r}", self.where
            )
        root = Path(os.path.realpath(self.folder))
        path = Path(os.path.realpath(root / location))
        if not path.is_relative_to(root) or path == root:
            raise ModelError(f"{what}: {location!r} lies outside the model's folder", self.where)
        try:
            file = open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")  # noqa: SIM115
        except FileNotFoundError as error:
            raise ModelError(f"{what}: no such file {location!r} beside the model", self.where) from error
        try:
            return file, self._checked(file.fileno(), location, what, root)
        except BaseException:
            file.close()
            raise

    def _checked(self, handle: int, location: str, what: str, root: Path) -> int:
        """The size of an open file that may be read."""
        if not Path(os.readlink(f"/proc/self/fd/{handle}")).is_relative_to(root):  # renamed meanwhile
            raise ModelError(f"{what}: {location!r} lies outside the model's folder", self.where)
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise ModelError(f"{what}: {location!r} is not a regular file", self.where)
        if facts.st_nlink > 1:
            text = f"{location!r} has {facts.st_nlink} hard links, so that it may be a file from elsewhere"
            raise ModelError(f"{what}: {text}; copy it", self.where)
        return facts.st_size


def tensor_bits(tensor: onnx.TensorProto, where: str) -> int:
    """Bits of one element of the tensor's raw form."""
    try:
        name = onnx.TensorProto.DataType.Name(tensor.data_type)
        return _BITS.get(name) or np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize * 8
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"tensor {tensor.name!r} has unknown element type {tensor.data_type}", where) from error


def tensor_elements(name: str, dims: Iterable[int], where: str, limits: Limits) -> int:
    """The product of `dims`, in exact arithmetic. Raises ModelError if one is negative or there are too many."""
    dims = list(dims)
    count = 1
    for dim in dims:
        if dim < 0:
            raise ModelError(f"tensor {name!r} has a negative dimension: {dims}", where)
        count *= dim
    if count > limits.elements or len(dims) > RANK or any(dim > 1 << 48 for dim in dims):
        shown = f"{len(dims)} dimensions" if len(dims) > RANK else f"{count} elements"
        text = f"at most {RANK} dimensions" if len(dims) > RANK else f"at most {limits.elements} (--limit elements=N)"
        raise ModelError(f"tensor {name!r} has {shown}, {text}", where)
    return count


PATH_BYTES = 1 << 12
RANK = 64  # NumPy's own


def tensor_bytes(tensor: onnx.TensorProto, where: str, limits: Limits) -> int:
    """Bytes of the tensor's raw form."""
    return (tensor_elements(tensor.name, tensor.dims, where, limits) * tensor_bits(tensor, where) + 7) // 8
