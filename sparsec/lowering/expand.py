"""ONNX nodes rewritten, before import, into operators that TVM's importer gets right."""

from __future__ import annotations

from collections.abc import Mapping

import onnx


def expand_nodes(
    nodes: list[onnx.NodeProto],
    types: Mapping[str, onnx.ValueInfoProto],
    initializers: dict[str, onnx.TensorProto],
    opset: int,
) -> list[onnx.NodeProto]:
    """`nodes` with some expanded; new constants are added to `initializers`."""
    return nodes
