"""A model to a file. Above 2 GB, which protobuf cannot hold, its large tensors go into a second file, `NAME.onnx.data`.

Tensors are written one after the other, at multiples of `ALIGNMENT` (what mapping them needs), never all at once. Both
files appear when they are complete: the data first, since only the model gives it a meaning.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparsec.errors import UsageError
from sparsec.loading.exchange import large, skeleton
from sparsec.loading.external_data import Extent
from sparsec.loading.load import model_bytes
from sparsec.staging import staged_file

ONE_FILE = (1 << 31) - (1 << 26)  # bytes of tensors up to which a model is one file
ALIGNMENT = 1 << 16


def tensor_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def fits_one_file(model: ir.Model) -> bool:
    """Whether protobuf can hold the model."""
    return tensor_bytes(model) <= ONE_FILE


def save_model(model: ir.Model, path: Path, overwrite: bool = False) -> int:
    """Write the model; bytes of all files. Raises UsageError if one exists and `overwrite` is false."""
    if fits_one_file(model):
        data = model_bytes(model)
        with staged_file(path, overwrite) as stage:
            stage.write_bytes(data)
        return len(data)
    beside = path.with_name(path.name + ".data")
    if beside.exists() and not overwrite:
        raise UsageError("exists already; give --overwrite to replace it", str(beside))
    with staged_file(path, overwrite) as stage:
        with staged_file(beside, overwrite) as data_stage:
            places, end = _write_tensors(model, data_stage, beside.name)
        stage.write_bytes(skeleton(model, places).SerializeToString(deterministic=True))
        return end + stage.stat().st_size


def _write_tensors(model: ir.Model, path: Path, location: str) -> tuple[dict[str, Extent], int]:
    places: dict[str, Extent] = {}
    end = 0
    with path.open("wb") as file:
        for name, value in model.graph.initializers.items():
            if not large(value):
                continue
            assert value.const_value is not None
            array = np.ascontiguousarray(value.const_value.numpy())
            start = -(-end // ALIGNMENT) * ALIGNMENT
            file.seek(start)
            file.write(array.reshape(-1).view(np.uint8).data)
            places[name] = Extent(location, start, array.nbytes)
            end = start + array.nbytes
    return places, end
