"""QuantizeLinear, DequantizeLinear and products of integers, as the arithmetic that ONNX gives for them."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from sparsec.lowering.expansions.context import Chain, Context, ExpansionError, attribute, numpy_type

# Of the types that QuantizeLinear makes: what each holds. int32 is only ever read.
_LIMITS: dict[int, tuple[int, int]] = {
    TensorProto.UINT8: (0, 255),
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT16: (0, 65535),
    TensorProto.INT16: (-32768, 32767),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT4: (-8, 7),
    TensorProto.INT32: (-(2**31), 2**31 - 1),
}


def quantize(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto]:
    """saturate(round(x / scale) + zero_point), half to even; the zero point is added before the limits apply."""
    x, scale = node.input[:2]
    zero = node.input[2] if len(node.input) > 2 else ""
    output, real = node.output[0], context.element(scale)
    kind = context.element(zero) if zero else int(attribute(node, "output_dtype", 0)) or TensorProto.UINT8
    if kind not in _LIMITS or context.element(x) != real:
        raise ExpansionError(f"QuantizeLinear to {TensorProto.DataType.Name(kind)} has no lowering")
    made = Chain(context, output)
    y = made.add("Round", made.add("Div", x, made.along(node, scale, x)))
    if zero and not context.is_zero(zero):
        y = made.add("Add", y, made.along(node, made.cast(zero, real), x))
    low, high = (context.constant(f"{output}/limit{v}", np.array(v, numpy_type(real))) for v in _LIMITS[kind])
    made.add("Cast", made.add("Clip", y, low, high), to=kind, result=output)
    return made.nodes


def dequantize(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto]:
    """(x - zero_point) * scale, the difference in whole numbers."""
    x, scale = node.input[:2]
    zero = node.input[2] if len(node.input) > 2 else ""
    if context.element(x) not in _LIMITS:
        raise ExpansionError(f"DequantizeLinear of {TensorProto.DataType.Name(context.element(x))} has no lowering")
    made = Chain(context, node.output[0])
    y = made.cast(x, TensorProto.INT32)
    if zero and not context.is_zero(zero):
        y = made.add("Sub", y, made.along(node, made.cast(zero, TensorProto.INT32), x))
    made.add("Mul", made.cast(y, context.element(scale)), made.along(node, scale, x), result=node.output[0])
    return made.nodes


def conv_integer(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto]:
    """Conv(x - x_zero_point, w - w_zero_point) in float64, whose sums of such products are whole below 2^53."""
    x, w, x_zero, w_zero = [*node.input, "", ""][:4]
    made = Chain(context, node.output[0])

    def centred(value: str, zero: str) -> str:
        wide = made.cast(value, TensorProto.DOUBLE)
        if not zero or context.is_zero(zero):
            return wide
        size = context.shape(zero)
        shift = made.cast(zero, TensorProto.DOUBLE)
        if size and size != (1,):  # one zero point an output channel
            shift = made.add("Reshape", shift, made.const([-1] + [1] * (len(context.shape(value)) - 1)))
        return made.add("Sub", wide, shift)

    product = made.add("Conv", centred(x, x_zero), centred(w, w_zero))
    made.nodes[-1].attribute.extend(node.attribute)
    made.add("Cast", product, to=TensorProto.INT32, result=node.output[0])
    return made.nodes
