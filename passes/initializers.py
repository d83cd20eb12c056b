"""New constants in a graph, under names that nothing has yet."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def free_name(graph: ir.Graph, name: str) -> str:
    """`name`, or the first of `name_1`, `name_2`, ... that no value of the graph has."""
    taken = {v.name for node in graph for v in node.outputs} | {v.name for v in graph.inputs} | set(graph.initializers)
    free, count = name, 0
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    return free


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    """A new initializer of `array`, under `name` or the next free one. `dtype`: the array's own if None."""
    free = free_name(graph, name)
    tensor = ir.Tensor(np.asarray(array, order="C"), dtype=dtype or ir.DataType.from_numpy(array.dtype), name=free)
    value = ir.Value(name=free, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
