"""A graph under construction: values with shapes and types, nodes that ONNX Runtime has kernels for, constants."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from sparsec.loading.opsets import OPSET
from sparsec.passes.normalization.fold_constants import quiet_session

F16, F32, F64 = np.dtype("f2"), np.dtype("f4"), np.dtype("f8")
I8, U8, I32, I64, BOOL = np.dtype("i1"), np.dtype("u1"), np.dtype("i4"), np.dtype("i8"), np.dtype("?")
REAL, WHOLE, BYTES = (F16, F32, F64), (I32, I64), (I8, U8)

ELEMENTS = 4096  # of one tensor
SIZES = (1, 2, 3, 4, 5, 7, 8, 16, 17)


@dataclass
class Value:
    """A tensor in the graph. `rounded`: whole numbers that a QuantizeLinear made, so that they may differ by one."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    rounded: bool = False

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return size(self.shape)


@dataclass
class Draft:
    """Several graphs of one model; names are unique in all of them."""

    draw: Any
    opset: int = 21
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)  # of the graph at hand
    known: dict[str, tuple[np.dtype | int, tuple[int, ...]]] = field(default_factory=dict)  # name -> type, shape
    count: int = 0
    broadcasts: int = 0

    # ---- what to choose

    def among(self, choices: Iterable[Any]) -> Any:
        return self.draw(st.sampled_from(list(choices)))

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def maybe(self, of: int = 2) -> bool:
        """True once in `of` times."""
        return self.number(1, of) == of

    def shape(self, rank: int) -> tuple[int, ...]:
        """At most ELEMENTS elements."""
        dims: list[int] = []
        for _ in range(rank):
            dims.append(self.among([s for s in SIZES if s * size(dims) <= ELEMENTS]))
        return tuple(dims)

    # ---- what to make

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def constant(self, array: Any, dtype: np.dtype | None = None) -> str:
        """The name of an initializer, or, at times, of a Constant node."""
        array = np.array(array, dtype, order="C")
        name = self.name()
        tensor = numpy_helper.from_array(array, name)
        if array.size < 5 and self.maybe(8):
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.tensors.append(tensor)
        self.known[name] = (array.dtype, array.shape)
        return name

    def tensor(self, tensor: onnx.TensorProto) -> str:
        """The name of an initializer of a type that NumPy lacks."""
        tensor.name = self.name()
        self.tensors.append(tensor)
        self.known[tensor.name] = (tensor.data_type, tuple(tensor.dims))
        return tensor.name

    def numbers(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        return random_array(np.random.default_rng(self.number(0, 99)), tuple(shape), dtype)

    def weight(self, shape: Sequence[int], dtype: np.dtype = F32) -> np.ndarray:
        """Normal numbers (127 is 3.2 sigma of whole ones), some of them zero in blocks; rank >= 2."""
        rng = np.random.default_rng(self.number(0, 99))
        zeros, block = self.among([0.0, 0.5, 0.8, 0.95]), self.among([(1, 1), (4, 1), (8, 1), (4, 4)])
        grid = rng.random((-(-shape[0] // block[0]), -(-shape[1] // block[1]), *shape[2:])) >= zeros
        mask = grid.repeat(block[0], axis=0).repeat(block[1], axis=1)[: shape[0], : shape[1]]
        numbers = mask * rng.standard_normal(tuple(shape))
        return numbers.astype(dtype) if dtype.kind == "f" else np.clip(40 * numbers, -127, 127).astype(dtype)

    def input(self, shape: Sequence[int], dtype: np.dtype) -> Value:
        value = Value(self.name(), tuple(shape), dtype)
        self.inputs.append(value)
        self.values.append(value)
        self.known[value.name] = (dtype, value.shape)
        return value

    def add(
        self, op: str, inputs: Sequence[str], shape: Iterable[int], dtype: np.dtype, rounded: bool = False, **more: Any
    ) -> Value | None:
        """The result of a new node; None if the opset has no such operator, or ONNX Runtime no kernel for it."""
        made = self.add_all(op, inputs, [tuple(shape)], dtype, rounded, **more)
        return made[0] if made else None

    def add_all(
        self, op: str, inputs: Sequence[str], shapes: Sequence[Sequence[int]], dtype: np.dtype, rounded: bool = False,
        **more: Any,
    ) -> list[Value]:  # fmt: skip
        """The same for several results of one type."""
        if any(size(shape) > ELEMENTS for shape in shapes):
            return []
        made = self._node(op, inputs, shapes, dtype, rounded, more)
        self.values += made
        return made

    def aside(self, op: str, inputs: Sequence[str], shape: Sequence[int], dtype: np.dtype, **more: Any) -> Value | None:
        """`add` of what is no value of the graph to go on with, of any size: a weight, a shape."""
        made = self._node(op, inputs, [shape], dtype, False, more)
        return made[0] if made else None

    def _node(
        self, op: str, inputs: Sequence[str], shapes: Sequence[Sequence[int]], dtype: np.dtype, rounded: bool,
        more: dict[str, Any],
    ) -> list[Value]:  # fmt: skip
        made = [Value(self.name(), tuple(int(s) for s in shape), dtype, rounded) for shape in shapes]
        names = [v.name for v in made]
        node = helper.make_node(op, inputs, names, name=f"{op}_{names[0]}", **more)
        if not self._runs(node):
            return []
        self.nodes.append(node)
        self.known.update((v.name, (v.dtype, v.shape)) for v in made)
        return made

    def _same(self, op: str) -> set[int]:
        """Opsets in which ONNX Runtime must run the operator: this one and, if it is the same there, the compiler's own."""
        versions = [
            onnx.defs.has(op, max_inclusive_version=opset)
            and onnx.defs.get_schema(op, max_inclusive_version=opset).since_version
            for opset in (self.opset, OPSET)
        ]
        return {self.opset, OPSET} if versions[0] == versions[1] else {self.opset}

    def _runs(self, node: onnx.NodeProto) -> bool:
        """Whether ONNX Runtime has a kernel for the operator and these types; asked once."""
        known = [self.known[name] if name else None for name in node.input]
        key = (node.op_type, self.opset, *[k and _element(k[0]) for k in known])
        if key not in _KERNELS:
            _KERNELS[key] = all(_has_kernel(node, opset, known) for opset in self._same(node.op_type))
        return _KERNELS[key]


_KERNELS: dict[tuple[Any, ...], bool] = {}


def _has_kernel(
    node: onnx.NodeProto, opset: int, known: Sequence[tuple[np.dtype | int, tuple[int, ...]] | None]
) -> bool:
    """Raises RuntimeError for a node that is wrong."""
    if not onnx.defs.has(node.op_type, max_inclusive_version=opset):  # ONNX Runtime has some of its own besides
        return False
    inputs = {
        name: helper.make_tensor_value_info(name, _element(k[0]), k[1])
        for name, k in zip(node.input, known, strict=True)
        if k is not None
    }
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
    model = model_of(helper.make_graph([node], "g", list(inputs.values()), outputs), opset)
    try:
        quiet_session(model.SerializeToString())
    except Exception as error:
        text = str(error)
        if any(why in text for why in ("NOT_IMPLEMENTED", "Type Error", "not a registered", "No Op registered")):
            return False
        raise RuntimeError(f"the generator's own mistake: {text} in {onnx.printer.to_text(node)}") from error
    return True


def model_of(graph: onnx.GraphProto, opset: int) -> onnx.ModelProto:
    """A model of one opset."""
    ids = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=ids, ir_version=min(10, helper.find_min_ir_version_for(ids[:1])))


def size(shape: Sequence[int]) -> int:
    """Elements of a tensor."""
    return int(np.prod(shape, dtype=int))


def broadcast(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...] | None:
    """The common shape of two, if there is one."""
    try:
        return np.broadcast_shapes(tuple(a), tuple(b))
    except ValueError:
        return None


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Standard normal numbers, -5..5 of whole ones, all of the 256 of bytes."""
    if dtype == BOOL:
        return rng.integers(0, 2, shape).astype(BOOL)
    if dtype in BYTES:
        return rng.integers(0, 256, shape).astype(U8).view(dtype)
    return (rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(-5, 6, shape)).astype(dtype)


def element(dtype: np.dtype) -> int:
    """The TensorProto type."""
    return int(helper.np_dtype_to_tensor_dtype(dtype))


def _element(dtype: np.dtype | int) -> int:
    return dtype if isinstance(dtype, int) else element(dtype)
