"""Small models of a few lines, for the tests that damage them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

Maker = Callable[[Path], Path]
FLOAT, INT64, BOOL, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING


def value(name: str, dims: Sequence[int | str] | None, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, dims)


def model(
    nodes: Sequence[NodeProto], initializers: Sequence[TensorProto] = (), opset: int = 21, **other: Any
) -> ModelProto:
    """x[1, 4] to y."""
    inputs = other.pop("inputs", [value("x", [1, 4])])
    outputs = other.pop("outputs", [value("y", None)])
    graph = helper.make_graph(list(nodes), "g", inputs, outputs, list(initializers))
    opsets = [helper.make_opsetid("", opset), *other.pop("opsets", [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, **other)


def save(folder: Path, proto: ModelProto | bytes) -> Path:
    path = folder / "hostile.onnx"
    path.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
    return path


def int64(name: str, *numbers: int) -> TensorProto:
    return numpy_helper.from_array(np.array(numbers, np.int64), name)


def floats(name: str, *shape: int) -> TensorProto:
    return numpy_helper.from_array(np.ones(shape, np.float32), name)


def graph_of(nodes: Sequence[NodeProto], output: str, inputs: Sequence[onnx.ValueInfoProto] = ()) -> GraphProto:
    return helper.make_graph(list(nodes), "inner", list(inputs), [value(output, None)])
