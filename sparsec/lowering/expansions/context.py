"""What an expansion sees of the graph around its node, and what it makes: constants and a chain of nodes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


class ExpansionError(ValueError):
    """The node's attributes ask for something without a lowering."""


@dataclass
class Context:
    """Types and constants by name; both grow as nodes are expanded."""

    types: dict[str, onnx.ValueInfoProto]
    initializers: dict[str, onnx.TensorProto]
    importable: Collection[str]  # operators that the importer has
    opset: int

    def constant(self, name: str, array: np.ndarray) -> str:
        """A new constant; its name."""
        self.initializers[name] = numpy_helper.from_array(np.asarray(array), name)
        return name

    def value(self, name: str) -> np.ndarray:
        """Of a constant. Raises ExpansionError for anything else."""
        if name not in self.initializers:
            raise ExpansionError(f"{name!r} must be a constant")
        return numpy_helper.to_array(self.initializers[name])

    def knows(self, name: str) -> bool:
        """Whether the value has a type: what expansions make between their nodes may have none."""
        return name in self.initializers or name in self.types

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a value whose type is known."""
        if name in self.initializers:
            return tuple(self.initializers[name].dims)
        if name not in self.types:
            raise ExpansionError(f"the shape of {name!r} is unknown")
        return tuple(d.dim_value for d in self.types[name].type.tensor_type.shape.dim)

    def element(self, name: str) -> int:
        """The element type of a value, as ONNX numbers it."""
        return int(self.type_of(name).tensor_type.elem_type)

    def is_zero(self, name: str) -> bool:
        """Whether it is a constant of zeros."""
        return name in self.initializers and not self.value(name).any()

    def type_of(self, name: str) -> onnx.TypeProto:
        """Its type, static."""
        if name in self.initializers:
            tensor = self.initializers[name]
            return helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        if name not in self.types:
            raise ExpansionError(f"the type of {name!r} is unknown")
        return self.types[name].type


Expansion = Callable[[onnx.NodeProto, Context], "list[onnx.NodeProto] | None"]  # None: the node may stay


class Chain:
    """Nodes of an expansion, named after the value they end in."""

    def __init__(self, context: Context, output: str) -> None:
        self.context, self.output = context, output
        self.nodes: list[onnx.NodeProto] = []

    def add(self, op: str, *inputs: str, result: str = "", **attributes: Any) -> str:
        """The output of a new node, `result` or a name of its own."""
        name = result or f"{self.output}/{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def const(self, array: Any, dtype: Any = np.int64) -> str:
        """A constant of the expansion."""
        count = len(self.context.initializers)
        return self.context.constant(f"{self.output}/constant{count}", np.asarray(array, dtype))

    def cast(self, x: str, to: int) -> str:
        """`x` as element type `to`: a constant at once, else by a Cast."""
        if x in self.context.initializers:
            return self.context.constant(f"{self.output}/{x}/{to}", self.context.value(x).astype(numpy_type(to)))
        name = self.add("Cast", x, to=to)
        if x in self.context.types:
            self.context.types[name] = helper.make_tensor_value_info(name, to, self.context.shape(x))
        return name

    def along(self, node: onnx.NodeProto, scale: str, x: str) -> str:
        """A scale or zero point of `node` so that it broadcasts against `x`: for all, along an axis, or in blocks."""
        context, shape = self.context, self.context.shape(x)
        size = list(context.shape(scale))
        block = int(attribute(node, "block_size", 0))
        axis = int(attribute(node, "axis", 1)) % len(shape) if shape else 0
        if int(np.prod(size)) == 1:
            wanted = [1] * len(shape)
        elif block:
            array = context.value(scale).repeat(block, axis=axis)
            return context.constant(f"{self.output}/{scale}/blocks", np.take(array, range(shape[axis]), axis=axis))
        elif len(size) == 1:
            wanted = [shape[axis] if i == axis else 1 for i in range(len(shape))]
        else:
            return scale
        if size == wanted or not size:
            return scale
        if scale in context.initializers:
            return context.constant(f"{self.output}/{scale}/wide", context.value(scale).reshape(wanted))
        to = context.constant(f"{self.output}/{scale}/shape", np.array(wanted, np.int64))
        return self.add("Reshape", scale, to)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """An attribute's value, text as str."""
    for found in node.attribute:
        if found.name == name:
            value = helper.get_attribute_value(found)
            return value.decode() if isinstance(value, bytes) else value
    return default


def numpy_type(kind: int) -> Any:
    """NumPy's type for an element type of ONNX."""
    return helper.tensor_dtype_to_np_dtype(kind)
