"""DATA: samples for calibration and verification, from an `.npz`, a folder of images, or arrays in memory.

Rules. An `.npz` is keyed by input name and holds N preprocessed samples of the input's shape: where the input's first
dimension is 1, N replaces it, else N stands before it; a first axis of 1 serves every sample; a missing input is zeros;
`label`, optional, is one integer a sample. A folder of images needs a preprocess spec; the label is the integer before
the first `_` of the file name (`sparsec.images`). Nothing is unpickled.

Samples come in the inputs' own types (`sparsec.ports`): for an input of 8 bits, floats are quantized; whole numbers are
taken for stored ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from sparsec.errors import DataError, UsageError
from sparsec.images import ImageData, Images
from sparsec.npz import read_npz
from sparsec.ports import InputSpec, check_dtype

LABEL = "label"


class Data(Protocol):
    """A finite stream of samples; iterating again starts again."""

    labels: np.ndarray | None  # int64 [N], the model's own class order

    @property
    def digest(self) -> str:
        """sha256 of the content."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...

    def reals(self) -> Iterator[dict[str, np.ndarray]]:
        """The same samples with real numbers for inputs of 8 bits: not quantized where they were given so."""


def load_data(
    source: str | Path | Mapping[str, np.ndarray] | Images,
    inputs: Sequence[InputSpec],
    preprocess: str | None = None,
) -> Data:
    """Open DATA for a model with `inputs`. Raises DataError or UsageError, one line each.

    `source`: an `.npz`, a folder of images (with `preprocess`), arrays keyed by input name, or `Images`.
    """
    if isinstance(source, Images):
        return ImageData(source, inputs)
    if isinstance(source, Mapping):
        hasher = hashlib.sha256()
        for name in sorted(source):
            array = np.ascontiguousarray(source[name])
            hasher.update(f"{name}\0{array.dtype.str}{array.shape}\0".encode() + array.tobytes())
        return _ArrayData(source, inputs, "data", hasher.hexdigest())
    path = Path(source)
    if path.is_dir():
        if preprocess is None:
            raise UsageError("a folder of images needs --preprocess, e.g. resize=256,crop=224,scale=255", str(path))
        return ImageData(Images.parse(path, preprocess), inputs)
    if preprocess is not None:
        raise UsageError("--preprocess is for a folder of images; an .npz is preprocessed already", str(path))
    if not path.exists():
        raise DataError("no such file or folder; expected an .npz or a folder of images", str(path))
    arrays = read_npz(path)
    return _ArrayData(arrays, inputs, str(path), hashlib.sha256(path.read_bytes()).hexdigest())


class _ArrayData:
    """Samples in arrays keyed by input name."""

    def __init__(self, arrays: Mapping[str, np.ndarray], inputs: Sequence[InputSpec], where: str, digest: str) -> None:
        from sparsec.targets import suggest

        names = [spec.name for spec in inputs]
        for name in arrays:
            if name not in names and name != LABEL:
                raise DataError(f"holds {name!r}, which is no input of the model{suggest(name, names)}", where)
        if not any(name in arrays for name in names):
            raise DataError(f"holds none of the model's inputs: {', '.join(names)}", where)
        self.digest = digest
        self._inputs = tuple(inputs)
        self._arrays = {spec.name: _samples(arrays[spec.name], spec, where) for spec in inputs if spec.name in arrays}
        label = arrays.get(LABEL) if LABEL not in names else None
        counts = {name: len(a) for name, a in self._arrays.items()}
        if label is not None:
            counts[LABEL] = np.asarray(label).shape[0] if np.asarray(label).ndim else 1
        several = {count for count in counts.values() if count != 1}
        if len(several) > 1:
            listing = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise DataError(f"the arrays differ in their number of samples: {listing}", where)
        self._count = several.pop() if several else 1
        if self._count == 0:
            raise DataError("holds no sample", where)
        self.labels = None if label is None else _labels(np.asarray(label), self._count, where)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for given in self._given():
            yield {s.name: np.asarray(s.stored(given[s.name]), dtype=s.dtype, order="C") for s in self._inputs}

    def reals(self) -> Iterator[dict[str, np.ndarray]]:
        for given in self._given():
            yield {
                s.name: np.asarray(s.real(given[s.name]), "float32" if s.quantization else s.dtype, order="C")
                for s in self._inputs
            }

    def _given(self) -> Iterator[dict[str, np.ndarray]]:
        """Samples in the types that they came in; zeros where nothing is given."""
        for i in range(self._count):
            sample = {}
            for spec in self._inputs:
                array = self._arrays.get(spec.name)
                one = (
                    np.zeros(spec.shape, "f" if spec.quantization else spec.dtype)
                    if array is None
                    else array[i if len(array) > 1 else 0]
                )
                sample[spec.name] = one.reshape(spec.shape)
            yield sample


def _samples(array: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
    """`array` checked against the N rule: `[N, ...]` of `spec`'s shape."""
    array = np.asarray(array)
    rest = tuple(spec.shape[1:]) if spec.shape and spec.shape[0] == 1 else tuple(spec.shape)
    if array.ndim != len(rest) + 1 or tuple(array.shape[1:]) != rest:
        raise DataError(f"input {spec.name!r} expects [N, {', '.join(map(str, rest))}], got {list(array.shape)}", where)
    check_dtype(array, spec, where)
    return array


def _labels(label: np.ndarray, count: int, where: str) -> np.ndarray:
    if label.dtype.kind not in "iu" or label.size != count or label.ndim > 2:
        raise DataError(
            f"'label' must be one integer a sample: expected [{count}], got {label.dtype} {list(label.shape)}", where
        )
    return label.reshape(-1).astype(np.int64)
