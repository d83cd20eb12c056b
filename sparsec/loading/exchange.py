"""A model as a message: a protobuf without the large tensors, and these behind it as raw bytes.

    initializer of the main graph, LARGE bytes or more     a part of its own; in the protobuf its location is the part's number
    one that still is what a file beside the model holds   not sent: its location in the protobuf is that file
    everything else                                        in the protobuf

The reader maps the parts: weights are neither copied nor parsed between processes, and 2 GB is no limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from sparsec.errors import ModelError
from sparsec.loading.external_data import Extent, ExternalFiles

LARGE = 1 << 12  # bytes
_BESIDE = "beside:"  # before the location of a file of the user's


def large(value: ir.Value) -> bool:
    """Whether the initializer's tensor is one that is kept apart."""
    tensor = value.const_value
    return (
        tensor is not None
        and tensor.dtype.bitwidth >= 8
        and tensor.nbytes >= LARGE
        and tensor.dtype != ir.DataType.STRING
    )


def skeleton(model: ir.Model, places: Mapping[str, Extent]) -> onnx.ModelProto:
    """The model as a protobuf, the data of the initializers named in `places` left where those say."""
    kept = {}
    try:
        for name, extent in places.items():
            value = model.graph.initializers[name]
            tensor = kept[name] = value.const_value
            assert tensor is not None
            value.const_value = ir.ExternalTensor(
                extent.location,
                extent.offset,
                extent.length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
            )
        return ir.to_proto(model)
    finally:
        for name, tensor in kept.items():
            model.graph.initializers[name].const_value = tensor


def without_data(model: ir.Model) -> onnx.ModelProto:
    """The model as a protobuf in which large initializers are inputs of the graph: what a checker of types needs."""
    places = {name: Extent("-", 0, 0) for name, value in model.graph.initializers.items() if large(value)}
    proto = skeleton(model, places)
    graph = proto.graph
    for index in reversed(range(len(graph.initializer))):
        tensor = graph.initializer[index]
        if tensor.name in places:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
            del graph.initializer[index]
    return proto


def pack(model: ir.Model, beside: Mapping[str, tuple[Any, Extent]]) -> list[Any]:
    """Parts of a message. `beside`: initializers that were mapped, with their tensor and its place."""
    places: dict[str, Extent] = {}
    parts: list[Any] = []
    for name, value in model.graph.initializers.items():
        tensor, extent = beside.get(name, (None, Extent("", 0, 0)))
        if tensor is not None and value.const_value is tensor:
            places[name] = Extent(_BESIDE + extent.location, extent.offset, extent.length)
        elif large(value):
            assert value.const_value is not None
            array = np.ascontiguousarray(value.const_value.numpy()).reshape(-1)
            parts.append(array.view(np.uint8))
            places[name] = Extent(str(len(parts)), 0, array.nbytes)
    return [skeleton(model, places).SerializeToString(), *parts]


def unpack(parts: Sequence[memoryview], files: ExternalFiles) -> ir.Model:
    """The model of such parts, its large tensors mapped. Raises ModelError if they do not fit together."""
    proto = onnx.ModelProto()
    proto.ParseFromString(bytes(parts[0]))
    model = ir.from_proto(proto)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = str(tensor.location)
        if location.startswith(_BESIDE):
            extent = Extent(location.removeprefix(_BESIDE), tensor.offset or 0, tensor.length or 0)
            stored = files.view(extent)
        elif location.isdigit() and 0 < int(location) < len(parts):
            stored = np.frombuffer(parts[int(location)], np.uint8)
        else:
            raise ModelError(f"tensor {value.name!r} is nowhere", files.where)
        value.const_value = mapped(stored, tensor, str(value.name), files.where)
    return model


def mapped(stored: np.ndarray, like: Any, name: str, where: str) -> ir.Tensor:
    """A tensor of raw bytes, of the type and shape of `like`."""
    shape = tuple(int(d) for d in like.shape)
    dtype = like.dtype.numpy()
    if stored.nbytes != dtype.itemsize * int(np.prod(shape, dtype=object)):
        raise ModelError(f"tensor {name!r}: expected {list(shape)} of {dtype}, got {stored.nbytes} bytes", where)
    if stored.ctypes.data % dtype.itemsize:
        stored = stored.copy()  # a file may hold numbers at odd places
    return ir.Tensor(stored.view(dtype).reshape(shape), dtype=like.dtype, shape=ir.Shape(shape), name=name)
