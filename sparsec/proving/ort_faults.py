"""Fusions of ONNX Runtime that end the process, and the models for which they are left out.

MatmulTransposeFusion    float16: Transpose that moves the first axis last, then MatMul, with all optimizations on
                         (1.31.1; float32 is right). A crash in a library is no exception: it must not be reached.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto

OF_HALF = ("MatmulTransposeFusion",)


def left_out(model: onnx.ModelProto | bytes | str | Path) -> list[str]:
    """Names for `disabled_optimizers` of an InferenceSession of `model`; what cannot be read is ONNX Runtime's to refuse."""
    try:
        proto = _parsed(model)
    except Exception:  # protobuf's errors and the system's
        return []
    return list(OF_HALF) if _holds_half(proto.graph) else []


def _parsed(model: onnx.ModelProto | bytes | str | Path) -> onnx.ModelProto:
    if isinstance(model, onnx.ModelProto):
        return model
    if isinstance(model, bytes):
        return onnx.ModelProto.FromString(model)
    return onnx.load(str(model), load_external_data=False)


def _holds_half(graph: onnx.GraphProto) -> bool:
    """Whether an input, a constant or a Cast of the graph is float16: from these any other value comes."""
    if any(v.type.tensor_type.elem_type == TensorProto.FLOAT16 for v in graph.input):
        return True
    if any(t.data_type == TensorProto.FLOAT16 for t in graph.initializer):
        return True
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.i == TensorProto.FLOAT16 and attribute.name in ("to", "dtype", "output_dtype"):
                return True
            if attribute.t.data_type == TensorProto.FLOAT16 or any(map(_holds_half, (attribute.g, *attribute.graphs))):
                return True
    return False
