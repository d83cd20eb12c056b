"""Write operators that hold their quantization inside as QuantizeLinear and DequantizeLinear around plain operators.

With DQ(q; s, z) = (q - z) * s and Q(y; s, z) = saturate(round(y / s) + z), the definition of each is

    QLinearConv, QLinearMatMul, QLinearAdd, ...    q_y = Q(f(DQ(q_a), DQ(q_b), ...); s_y, z_y)
    bias of QLinearConv, QGemm                     DQ(b; s_a * s_b, 0), b int32
    QGemm without s_y                              f(DQ(q_a), DQ(q_b), DQ(b)), left in float
    MatMulNBits                                    x @ DQ(q_b; s_b, z_b), a scale for each block of the sum

What is rewritten: QLinearConv and QLinearMatMul of ONNX, and of com.microsoft the operators in `IMPORTED`. The sums are the
same whole numbers; ONNX Runtime, which fuses the result back to the operators it came from, computes the same bits for
most, and what it fuses otherwise differs by at most one quantization step. An operator with an attribute that has no
standard form stays, and is refused when the model is loaded.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from sparsec.passes.initializers import add_initializer
from sparsec.passes.normalization.fold_constants import constant, remove_unused_initializers
from sparsec.rewriting.passes_api import Context, Pass, PassResult

FOREIGN = "com.microsoft"


@dataclass(frozen=True)
class ImportQOperator(Pass):
    """Rewrite QLinearConv, QLinearMatMul, QGemm, ... to QuantizeLinear and DequantizeLinear around plain operators."""

    name: ClassVar[str] = "import-qoperator"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> PassResult:
        done = []
        for node in list(model.graph):
            build = _BUILDERS.get((node.domain, node.op_type))
            if build is not None and build(_Writer(model.graph, node)):
                done.append(f"{node.op_type} {node.name}")
        if done:
            common.RemoveUnusedNodesPass()(model)
            remove_unused_initializers(model.graph)
            Context.of(model).records.append({"imported": done})
        return PassResult(model, bool(done))


class _Writer:
    """Writes the nodes that replace one node, in front of it."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        self.name = str(node.name or node.outputs[0].name)
        self._count = 0

    def inputs(self, count: int) -> list[ir.Value | None]:
        """The node's inputs, None for those left out at the end."""
        return [*self.node.inputs, *[None] * count][:count]

    def main(self, op: str, inputs: Sequence[ir.Value | None], attributes: dict[str, Any] | None = None) -> ir.Value:
        """The output of the plain operator, which keeps the node's name."""
        return self.add(op, inputs, attributes, self.name)

    def add(
        self, op: str, inputs: Sequence[ir.Value | None], attributes: dict[str, Any] | None = None, name: str = ""
    ) -> ir.Value:
        """The output of a node around it."""
        self._count += 1
        node = ir.node(op, inputs, attributes=attributes, name=name or f"{self.name}/{op}{self._count}")
        node.outputs[0].name = f"{self.node.outputs[0].name}/{op}{self._count}"
        self.graph.insert_before(self.node, node)
        return node.outputs[0]

    def real(
        self, q: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None, axis: int | None = None
    ) -> ir.Value:
        """DequantizeLinear; `axis` of a scale with several values."""
        inputs = [q, scale] if zero is None else [q, scale, zero]
        several = axis is not None and not _is_single(scale)
        return self.add("DequantizeLinear", inputs, {"axis": axis} if several else None)

    def stored(self, y: ir.Value, scale: ir.Value | None, zero: ir.Value | None, like: ir.Value | None) -> ir.Value:
        """QuantizeLinear; without a zero point to the type of `like`."""
        if zero is not None:
            return self.add("QuantizeLinear", [y, scale, zero])
        kind = like.dtype if like is not None and like.dtype is not None else ir.DataType.UINT8
        return self.add("QuantizeLinear", [y, scale], {"output_dtype": int(kind)})

    def finish(self, value: ir.Value) -> bool:
        """`value` takes the place and the name of the node's output."""
        old = self.node.outputs[0]
        name, shape, kind = old.name, old.shape, old.type
        old.name = f"{name}/before"
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        value.name, value.shape, value.type = name, shape, kind
        self.graph.remove(self.node, safe=True)
        return True

    def kept(self, *names: str) -> dict[str, Any]:
        """The node's attributes of these names."""
        return {name: self.node.attributes[name] for name in names if name in self.node.attributes}


def _array(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer or of a Constant node."""
    if value is None:
        return None
    node = value.producer()
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        return node.attributes["value"].as_tensor().numpy()
    return constant(value)


def _is_single(scale: ir.Value | None) -> bool:
    array = _array(scale)
    return array is not None and array.size == 1


def _channels_first(write: _Writer) -> bool:
    """Whether the data is laid out channels first."""
    return not write.node.attributes.get_int("channels_last", 0)


# ---- one function an operator; whether it was rewritten


def _conv(write: _Writer) -> bool:
    if not _channels_first(write):
        return False
    x, xs, xz, w, ws, wz, ys, yz, b = write.inputs(9)
    inputs = [write.real(x, xs, xz), write.real(w, ws, wz, axis=0)]
    if b is not None:
        inputs.append(write.real(b, write.add("Mul", [xs, ws]), None, axis=0))
    names = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    return write.finish(write.stored(write.main("Conv", inputs, write.kept(*names)), ys, yz, x))


def _matmul(write: _Writer) -> bool:
    a, scale, az, b, bs, bz, ys, yz = write.inputs(8)
    product = write.main("MatMul", [write.real(a, scale, az, axis=-2), write.real(b, bs, bz, axis=-1)])
    return write.finish(write.stored(product, ys, yz, a))


def _gemm(write: _Writer) -> bool:
    a, scale, az, b, bs, bz, c, ys, yz = write.inputs(9)
    transposed = write.node.attributes.get_int("transB", 0)
    inputs = [write.real(a, scale, az), write.real(b, bs, bz, axis=0 if transposed else 1)]
    if c is not None:  # whole numbers in the unit of the product, alpha included
        unit = write.add("Mul", [scale, bs])
        alpha = write.node.attributes.get_float("alpha", 1.0)
        if alpha != 1.0:
            factor = add_initializer(write.graph, f"{write.name}/alpha", np.array(alpha, np.float32))
            unit = write.add("Mul", [unit, factor])
        inputs.append(write.real(c, unit, None, axis=-1))
    y = write.main("Gemm", inputs, write.kept("alpha", "transA", "transB"))
    return write.finish(y if ys is None else write.stored(y, ys, yz, a))


def _binary(op: str) -> Callable[[_Writer], bool]:
    def build(write: _Writer) -> bool:
        a, scale, az, b, bs, bz, ys, yz = write.inputs(8)
        y = write.main(op, [write.real(a, scale, az), write.real(b, bs, bz)])
        return write.finish(write.stored(y, ys, yz, a))

    return build


def _unary(op: str, *attributes: str) -> Callable[[_Writer], bool]:
    def build(write: _Writer) -> bool:
        if not _channels_first(write):
            return False
        x, xs, xz, ys, yz = write.inputs(5)
        y = write.main(op, [write.real(x, xs, xz)], write.kept(*attributes))
        return write.finish(write.stored(y, ys, yz, x))

    return build


def _concat(write: _Writer) -> bool:
    ys, yz, *rest = write.node.inputs
    parts = [write.real(*rest[i : i + 3]) for i in range(0, len(rest), 3)]
    return write.finish(write.stored(write.main("Concat", parts, write.kept("axis")), ys, yz, rest[0]))


def _softmax(write: _Writer) -> bool:
    """Up to opset 12 Softmax runs over all axes from `axis` on: the same only for the last."""
    axis, opset = write.node.attributes.get_int("axis", -1), write.node.attributes.get_int("opset", 13)
    return (opset >= 13 or axis == -1) and _unary("Softmax", "axis")(write)


def _mean(write: _Writer) -> bool:
    x, xs, xz, ys, yz = write.inputs(5)
    axes = write.node.attributes.get_ints("axes", None)
    inputs = [write.real(x, xs, xz)]
    if axes is not None:
        inputs.append(add_initializer(write.graph, f"{write.name}/axes", np.array(axes, np.int64)))
    return write.finish(write.stored(write.main("ReduceMean", inputs, write.kept("keepdims")), ys, yz, x))


def _where(write: _Writer) -> bool:
    condition, a, scale, az, b, bs, bz, ys, yz = write.inputs(9)
    y = write.main("Where", [condition, write.real(a, scale, az), write.real(b, bs, bz)])
    return write.finish(write.stored(y, ys, yz, a))


def _quantize(write: _Writer) -> bool:
    x, scale, zero = write.inputs(3)
    axis = write.kept("axis") if not _is_single(scale) else None
    attributes = axis if zero is not None else {**(axis or {}), "output_dtype": int(ir.DataType.UINT8)}
    inputs = [x, scale] if zero is None else [x, scale, zero]
    return write.finish(write.main(write.node.op_type, inputs, attributes))


def _dequantize(write: _Writer) -> bool:
    x, scale, zero = write.inputs(3)
    axis = write.kept("axis") if not _is_single(scale) else None
    return write.finish(write.main("DequantizeLinear", [x, scale] if zero is None else [x, scale, zero], axis))


def _matmul_bits(write: _Writer) -> bool:
    """q_b [N, blocks, block * bits / 8] holds two values a byte (4 bits), the even one in the low half."""
    node = write.node
    x, packed, scales, zeros, order, bias = write.inputs(6)
    bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 0)
    k, n = node.attributes.get_int("K", 0), node.attributes.get_int("N", 0)
    data, scale, zero = _array(packed), _array(scales), _array(zeros)
    if bits not in (4, 8) or data is None or scale is None or order is not None or (zeros is not None and zero is None):
        return False
    if zero is not None and zero.dtype != np.uint8:
        return False
    blocks, kind = -(-k // block), ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
    half = 1 << (bits - 1)

    def unpacked(array: np.ndarray, count: int) -> np.ndarray:
        rows = array.reshape(n, -1)
        if bits == 4:
            rows = np.stack([rows & 15, rows >> 4], axis=-1).reshape(n, -1)
        return np.ascontiguousarray((rows[:, :count].astype(np.int16) - half).T.astype(kind.numpy()))

    points = np.zeros((blocks, n), np.int8).astype(kind.numpy()) if zero is None else unpacked(zero, blocks)
    values = [
        add_initializer(write.graph, f"{write.name}/weight", unpacked(data, k), kind),
        add_initializer(write.graph, f"{write.name}/scale", np.ascontiguousarray(scale.reshape(n, blocks).T)),
        add_initializer(write.graph, f"{write.name}/zero_point", points, kind),
    ]
    weight = write.add("DequantizeLinear", values, {"axis": 0, "block_size": block})
    y = write.main("MatMul", [x, weight])
    return write.finish(y if bias is None else write.add("Add", [y, bias]))


_POOLING = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")

_BUILDERS: dict[tuple[str, str], Callable[[_Writer], bool]] = {
    ("", "QLinearConv"): _conv,
    ("", "QLinearMatMul"): _matmul,
    (FOREIGN, "DequantizeLinear"): _dequantize,
    (FOREIGN, "MatMulNBits"): _matmul_bits,
    (FOREIGN, "QGemm"): _gemm,
    (FOREIGN, "QLinearAdd"): _binary("Add"),
    (FOREIGN, "QLinearAveragePool"): _unary("AveragePool", *_POOLING),
    (FOREIGN, "QLinearConcat"): _concat,
    (FOREIGN, "QLinearConv"): _conv,
    (FOREIGN, "QLinearGlobalAveragePool"): _unary("GlobalAveragePool"),
    (FOREIGN, "QLinearLeakyRelu"): _unary("LeakyRelu", "alpha"),
    (FOREIGN, "QLinearMul"): _binary("Mul"),
    (FOREIGN, "QLinearReduceMean"): _mean,
    (FOREIGN, "QLinearSigmoid"): _unary("Sigmoid"),
    (FOREIGN, "QLinearSoftmax"): _softmax,
    (FOREIGN, "QLinearWhere"): _where,
    (FOREIGN, "QuantizeLinear"): _quantize,
}

IMPORTED = frozenset(_BUILDERS)  # (domain, operator)
