"""A model file to a checked `onnx.ModelProto` in memory. The file is untrusted: sizes are checked before reading,
external data stays inside the model's folder, nothing is ever unpickled or executed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from sparsec.errors import ModelError

MODEL_BYTES = (1 << 31) - 1  # protobuf's own limit


def read_proto(source: str | os.PathLike[str] | bytes | onnx.ModelProto) -> onnx.ModelProto:
    """The model with all external data read in, checked by onnx.checker; the caller's proto is left alone.

    Raises ModelError: no such file, not ONNX, truncated, empty graph, external data outside the model's folder or with
    a size that does not fit its tensor, or whatever onnx.checker objects to.
    """
    if isinstance(source, onnx.ModelProto):
        model, where, folder = onnx.ModelProto(), "model", None
        model.CopyFrom(source)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        where, folder = "model", None
        model = _parse(bytes(source), where)
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        where, folder = path.name, path.parent
        model = _parse(_read_file(path), where)
    else:
        expected = "a path, bytes, onnx.ModelProto or onnx_ir.Model"
        raise ModelError(f"expected {expected}, got {type(source).__name__}", "model")
    if not model.opset_import and not model.graph.node:
        raise ModelError("not an ONNX model, or one without any node", where)
    if not model.graph.node:
        raise ModelError("the graph is empty: no node to compile", where)
    if not model.graph.output:
        raise ModelError("the graph has no output", where)
    _read_external_data(model, folder, where)
    check_proto(model, where)
    return model


def check_proto(model: onnx.ModelProto, where: str) -> None:
    """onnx.checker, its message on one line. Inputs and outputs may lack a shape, which it does not allow."""
    unranked = [v.type.tensor_type for v in (*model.graph.input, *model.graph.output) if _is_unranked(v)]
    for kind in unranked:
        kind.shape.SetInParent()
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise ModelError(f"not a valid ONNX model: {text[:400]}", where) from error
    finally:
        for kind in unranked:
            kind.ClearField("shape")


def _is_unranked(value: onnx.ValueInfoProto) -> bool:
    return value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape")


def _read_file(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise ModelError("this is a folder, expected an .onnx file", str(path))
        size = path.stat().st_size
        if size == 0:
            raise ModelError("the file is empty", str(path))
        if size > MODEL_BYTES:
            raise ModelError(f"{size} bytes; an ONNX file holds at most {MODEL_BYTES}: use external data", str(path))
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ModelError("no such file", str(path)) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot be read: {getattr(error, 'strerror', None) or error}", str(path)) from error


def _parse(data: bytes, where: str) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ModelError("not an ONNX model, or a truncated one (protobuf cannot be decoded)", where) from error
    if not model.ir_version and not model.HasField("graph"):
        raise ModelError("not an ONNX model (no graph in it)", where)
    return model


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    pending = [graph]
    while pending:
        graph = pending.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    pending.append(attribute.g)
                pending.extend(attribute.graphs)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in _graphs(model.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
    for function in model.functions:
        for node in function.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t


def _tensor_bytes(tensor: onnx.TensorProto, where: str) -> int:
    """Bytes of the tensor's raw form."""
    try:
        bits = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize * 8
    except (KeyError, TypeError) as error:
        raise ModelError(f"tensor {tensor.name!r} has unknown element type {tensor.data_type}", where) from error
    small = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
    bits = small.get(onnx.TensorProto.DataType.Name(tensor.data_type), bits)
    count = 1
    for dim in tensor.dims:
        if dim < 0:
            raise ModelError(f"tensor {tensor.name!r} has a negative dimension: {list(tensor.dims)}", where)
        count *= dim
    return (count * bits + 7) // 8


def _read_external_data(model: onnx.ModelProto, folder: Path | None, where: str) -> None:
    total = 0
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        if folder is None:
            text = "keeps its data in another file; give the model's path instead of its bytes"
            raise ModelError(f"tensor {tensor.name!r} {text}", where)
        data = _external_bytes(tensor, folder, where)
        total += len(data)
        if total > MODEL_BYTES:
            raise ModelError(f"more than {MODEL_BYTES} bytes of external weights: not supported yet", where)
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT
        tensor.raw_data = data


def _external_bytes(tensor: onnx.TensorProto, folder: Path, where: str) -> bytes:
    what = f"external data of tensor {tensor.name!r}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if not location or os.path.isabs(location) or "\0" in location or "\\" in location:
        raise ModelError(f"{what}: expected a relative path inside the model's folder, got {location!r}", where)
    root = Path(os.path.realpath(folder))
    path = Path(os.path.realpath(root / location))
    if not path.is_relative_to(root):
        raise ModelError(f"{what}: {location!r} lies outside the model's folder", where)
    need = _tensor_bytes(tensor, where)
    try:
        offset, length = int(entries.get("offset", "0") or 0), int(entries.get("length", "") or need)
    except ValueError as error:
        raise ModelError(f"{what}: offset and length must be integers", where) from error
    if length != need or offset < 0:
        raise ModelError(f"{what}: expected {need} bytes for {list(tensor.dims)}, got length {length}", where)
    if not path.is_file():
        raise ModelError(f"{what}: no such file {location!r} beside the model", where)
    try:
        size = path.stat().st_size
        if offset + length > size:
            raise ModelError(f"{what}: {location!r} has {size} bytes, expected at least {offset + length}", where)
        with path.open("rb") as stream:
            stream.seek(offset)
            data = stream.read(length)
    except OSError as error:
        raise ModelError(f"{what}: cannot read {location!r}: {error.strerror}", where) from error
    if len(data) != length:
        raise ModelError(f"{what}: {location!r} is truncated", where)
    return data
