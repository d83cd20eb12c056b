"""A model file to a checked `onnx.ModelProto` in memory. The file is untrusted: what it asks for is counted before it is
done, external data is resolved by `sparsec.loading.external_data`, nothing is ever unpickled or executed.

    file        a regular file of at most `Limits.file_bytes`
    nesting     graphs in graphs, functions in functions: `Limits.depth`; no function calls itself
    nodes       of graphs and functions, each function as often as it is called: `Limits.nodes`
    tensors     dims not negative, `Limits.elements`; the data is as long as type and dims say
    then        onnx.checker

The counts run before anything that walks the model recursively or that copies it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from sparsec.errors import ModelError, one_line
from sparsec.limits import DEFAULT, Limits
from sparsec.loading.external_data import Extent, ExternalFiles, tensor_bits, tensor_bytes, tensor_elements
from sparsec.loading.node_order import sort_nodes

LAZY_BYTES = 1 << 20  # external initializers from here on are mapped, not copied
NAME_BYTES = 1 << 12  # of a name, a domain, an operator

Key = tuple[str, str, str]  # of a function: domain, name, overload


@dataclass
class Source:
    """A model as it was read. `lazy`: large initializers of the main graph that stay where they are; in `proto` they
    are inputs of the graph."""

    proto: onnx.ModelProto
    where: str
    files: ExternalFiles
    lazy: dict[str, tuple[onnx.TensorProto, Extent]] = field(default_factory=dict)
    declared: frozenset[str] = frozenset()  # of `lazy`: those that the file itself declares as inputs too


def read_proto(
    source: str | os.PathLike[str] | bytes | onnx.ModelProto,
    limits: Limits = DEFAULT,
    on_map: Callable[[int], None] = lambda size: None,
) -> onnx.ModelProto:
    """The model with all external data read in, checked by onnx.checker; the caller's proto is left alone.

    Raises ModelError: no such file, not ONNX, truncated, empty graph, external data outside the model's folder or with
    a size that does not fit its tensor, more than a limit allows, or whatever onnx.checker objects to.
    """
    read = read_source(source, limits, lazy=False, on_map=on_map)
    check_proto(read.proto, read.where)
    return read.proto


def read_source(
    source: str | os.PathLike[str] | bytes | onnx.ModelProto,
    limits: Limits = DEFAULT,
    lazy: bool = True,
    on_map: Callable[[int], None] = lambda size: None,
) -> Source:
    """The model, counted but not yet seen by onnx.checker. Raises ModelError. `on_map`: as in `ExternalFiles`."""
    if isinstance(source, onnx.ModelProto):
        model, where, folder = onnx.ModelProto(), "model", None
        model.CopyFrom(source)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        where, folder = "model", None
        model = _parse(bytes(source), where)
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        where, folder = path.name, path.parent
        model = _parse(read_file(path, limits), where)
    else:
        expected = "a path, bytes, onnx.ModelProto or onnx_ir.Model"
        raise ModelError(f"expected {expected}, got {type(source).__name__}", "model")
    if not model.opset_import and not model.graph.node:
        raise ModelError("not an ONNX model, or one without any node", where)
    if not model.graph.node:
        raise ModelError("the graph is empty: no node to compile", where)
    if not model.graph.output:
        raise ModelError("the graph has no output", where)
    try:
        _count(model, where, limits)
        for graph in (model.graph, *model.functions):
            sort_nodes(graph)
        files = ExternalFiles(folder, where, limits, on_map)
        return _with_data(Source(model, where, files), limits, lazy)
    except UnicodeDecodeError as error:
        raise ModelError("a name in it is not UTF-8: the file is damaged", where) from error


def check_proto(model: onnx.ModelProto, where: str) -> None:
    """onnx.checker, its message on one line. Inputs and outputs may lack a shape, which it does not allow."""
    unranked = [v.type.tensor_type for v in (*model.graph.input, *model.graph.output) if _is_unranked(v)]
    for kind in unranked:
        kind.shape.SetInParent()
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise ModelError(f"not a valid ONNX model: {one_line(error, 400)}", where) from error
    finally:
        for kind in unranked:
            kind.ClearField("shape")


def _is_unranked(value: onnx.ValueInfoProto) -> bool:
    return value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape")


def read_file(path: Path, limits: Limits = DEFAULT) -> bytes:
    """The bytes of a regular file. Raises ModelError."""
    try:
        if path.is_dir():
            raise ModelError("this is a folder, expected an .onnx file", str(path))
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as stream:
            facts = os.fstat(stream.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise ModelError("not a regular file, expected an .onnx file", str(path))
            if facts.st_size == 0:
                raise ModelError("the file is empty", str(path))
            if facts.st_size > limits.file_bytes:
                text = f"{facts.st_size} bytes, at most {limits.file_bytes} are read (--limit file-bytes=N)"
                raise ModelError(f"{text}; larger weights go into external data", str(path))
            return stream.read(facts.st_size)
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


# ---- counts


def _count(model: onnx.ModelProto, where: str, limits: Limits) -> None:
    """Raise ModelError for more nodes or deeper nesting than allowed, and for functions that call themselves."""
    bodies: dict[Key, onnx.FunctionProto] = {}
    for function in model.functions:
        key = (function.domain, function.name, function.overload)
        if key in bodies:
            raise ModelError(f"function {function.name!r} of domain {function.domain!r} is defined twice", where)
        bodies[key] = function
    calls, sizes = {}, {}
    for key, function in bodies.items():
        calls[key], sizes[key] = _calls(function.node, bodies, where, limits)
    total, depth = _expanded(calls, sizes, where)
    main, own = _calls(model.graph.node, bodies, where, limits)
    nodes = own + sum(total[key] for key in main)
    deepest = max((depth[key] for key in main), default=0)
    if deepest > limits.depth:
        raise ModelError(f"functions call functions {deepest} deep, {_most(limits, 'depth')}", where)
    if nodes > limits.nodes:
        raise ModelError(f"{nodes} nodes with its functions inlined, {_most(limits, 'nodes')}", where)


def _most(limits: Limits, name: str) -> str:
    return f"at most {getattr(limits, name)} (--limit {name.replace('_', '-')}=N)"


def _calls(nodes: object, bodies: dict[Key, onnx.FunctionProto], where: str, limits: Limits) -> tuple[list[Key], int]:
    """The functions that `nodes` and the graphs inside them call, and how many nodes that are. Not recursive."""
    called: list[Key] = []
    count = 0
    pending = [(nodes, 0)]
    while pending:
        row, depth = pending.pop()
        if depth > limits.depth:
            raise ModelError(f"graphs inside graphs, {depth} deep, {_most(limits, 'depth')}", where)
        for node in row:  # type: ignore[attr-defined]
            count += 1
            if count > limits.nodes:
                raise ModelError(f"more than {limits.nodes} nodes (--limit nodes=N)", where)
            for text in (node.name, node.op_type, node.domain, node.overload, *node.input, *node.output):
                _check_name(text, where)
            key = (node.domain, node.op_type, node.overload)
            if key in bodies:
                called.append(key)
            for attribute in node.attribute:
                _check_name(attribute.name, where)
                if attribute.HasField("g"):
                    pending.append((attribute.g.node, depth + 1))
                pending.extend((graph.node, depth + 1) for graph in attribute.graphs)
    return called, count


def _check_name(text: str | bytes, where: str) -> None:
    if not isinstance(text, str):  # protobuf hands out what it cannot decode as bytes
        raise ModelError(f"the name {text[:40]!r} is not UTF-8: the file is damaged", where)
    if len(text) > NAME_BYTES:
        raise ModelError(f"a name of more than {NAME_BYTES} characters: {text[:20]!r}...", where)


def _expanded(calls: dict[Key, list[Key]], sizes: dict[Key, int], where: str) -> tuple[dict[Key, int], dict[Key, int]]:
    """Nodes and depth of every function with those it calls inlined."""
    total: dict[Key, int] = {}
    depth: dict[Key, int] = {}
    for root in calls:
        path: list[tuple[Key, Iterator[Key]]] = [] if root in total else [(root, iter(calls[root]))]
        open_now = {root} if path else set()
        while path:
            key, rest = path[-1]
            below = next((k for k in rest if k not in total), None)
            if below is None:
                path.pop()
                open_now.discard(key)
                total[key] = sizes[key] + sum(total[k] for k in calls[key])
                depth[key] = 1 + max((depth[k] for k in calls[key]), default=0)
            elif below in open_now:
                raise ModelError(f"function {below[1]!r} of domain {below[0]!r} calls itself", where)
            else:
                open_now.add(below)
                path.append((below, iter(calls[below])))
    return total, depth


# ---- data of tensors


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    pending: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    while pending:
        graph = pending.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    pending.append(attribute.g)
                pending.extend(attribute.graphs)


def _tensors(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, bool]]:
    """Every tensor of the model, and whether it is an initializer of the main graph."""
    for graph in _graphs(model):
        if isinstance(graph, onnx.GraphProto):
            for tensor in graph.initializer:
                yield tensor, graph is model.graph
            for sparse in graph.sparse_initializer:
                yield from ((sparse.values, False), (sparse.indices, False))
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t, False
                yield from ((tensor, False) for tensor in attribute.tensors)
                sparse_tensors = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
                for sparse in (*sparse_tensors, *attribute.sparse_tensors):
                    yield from ((sparse.values, False), (sparse.indices, False))


def _with_data(source: Source, limits: Limits, lazy: bool) -> Source:
    """Check every tensor; read external data (or leave large initializers mapped); make sparse ones dense."""
    where = source.where
    external: list[tuple[onnx.TensorProto, Extent, bool]] = []
    for graph in _graphs(source.proto):
        if isinstance(graph, onnx.GraphProto):
            for named in (*graph.input, *graph.output, *graph.value_info):
                _check_name(named.name, where)
    for tensor, main in _tensors(source.proto):
        _check_name(tensor.name, where)
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            _check_data(tensor, where, limits)
            continue
        if tensor.HasField("raw_data") or any(getattr(tensor, name) for name in _FIELDS):
            raise ModelError(f"tensor {tensor.name!r} has data of its own and in another file", where)
        external.append((tensor, source.files.extent(tensor), main))
    source.files.check((tensor.name, extent) for tensor, extent, _ in external)
    for tensor, extent, main in external:
        if lazy and main and extent.length >= LAZY_BYTES and tensor_bits(tensor, where) % 8 == 0:
            kept = onnx.TensorProto()
            kept.CopyFrom(tensor)
            source.lazy[tensor.name] = kept, extent
            continue
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT
        tensor.raw_data = source.files.view(extent).tobytes()
    _make_inputs(source)
    for graph in _graphs(source.proto):
        if isinstance(graph, onnx.GraphProto):
            _make_dense(graph, where, limits)
    return source


def _make_inputs(source: Source) -> None:
    """Declare lazy initializers as inputs of the graph, which is what they are to whoever only sees types."""
    graph = source.proto.graph
    known = {value.name for value in graph.input}
    source.declared = frozenset(known & source.lazy.keys())
    for index in reversed(range(len(graph.initializer))):
        name = graph.initializer[index].name
        if name not in source.lazy:
            continue
        tensor = source.lazy[name][0]
        if name not in known:
            graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
        del graph.initializer[index]


_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


def _check_data(tensor: onnx.TensorProto, where: str, limits: Limits) -> None:
    """The data in the file is as long as element type and dims say. Strings are counted only."""
    elements = tensor_elements(tensor.name, tensor.dims, where, limits)
    if tensor.data_type == onnx.TensorProto.STRING:
        have, need = len(tensor.string_data), elements
    elif tensor.HasField("raw_data"):
        have, need = len(tensor.raw_data), tensor_bytes(tensor, where, limits)
    else:
        bits = tensor_bits(tensor, where)
        name = onnx.TensorProto.DataType.Name(tensor.data_type)
        storage = onnx.helper.tensor_dtype_to_field(tensor.data_type)
        per_element = 2 if name.startswith("COMPLEX") else 1
        need = (elements * bits + 7) // 8 if bits < 8 else elements * per_element
        have = len(getattr(tensor, storage))
    if have != need:
        text = f"expected data for {list(tensor.dims)}, {need} long, got {have}"
        raise ModelError(f"tensor {tensor.name!r} of type {tensor.data_type}: {text}", where)


def _make_dense(graph: onnx.GraphProto, where: str, limits: Limits) -> None:
    """Sparse initializers become plain ones."""
    for sparse in graph.sparse_initializer:
        name = sparse.values.name
        count = tensor_elements(name, sparse.dims, where, limits)
        if count * tensor_bits(sparse.values, where) // 8 > limits.folded_bytes:
            text = f"{count} elements when it is written out, {_most(limits, 'folded_bytes')} bytes"
            raise ModelError(f"sparse tensor {name!r}: {text}", where)
        values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
        if values.ndim != 1:
            raise ModelError(f"sparse tensor {name!r}: expected values [N], got {list(values.shape)}", where)
        if indices.ndim == 2 and indices.shape == (len(values), len(sparse.dims)):
            in_range = bool(((indices >= 0) & (indices < np.array(sparse.dims))).all())
            flat = (
                np.ravel_multi_index(tuple(indices.T), tuple(sparse.dims))
                if in_range and len(values)
                else indices[:0, 0]
            )
        else:
            in_range = indices.shape == (len(values),) and bool(((indices >= 0) & (indices < count)).all())
            flat = indices
        if not in_range or indices.dtype != np.int64:
            raise ModelError(f"sparse tensor {name!r}: an index lies outside of {list(sparse.dims)}", where)
        dense = np.zeros(count, values.dtype)
        dense[flat] = values
        graph.initializer.append(numpy_helper.from_array(dense.reshape(tuple(sparse.dims)), name))
    del graph.sparse_initializer[:]
