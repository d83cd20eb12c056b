"""Weights that stay integers beside float activations: DequantizeLinear of a constant -> Gemm or MatMul.

By groups of inputs (`block_size`, the axis of the inputs), by output, or one scale for all; int8 and int4, which is what
loading makes of uint8 and uint4. One more way to run the product, priced beside the weights as floats.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparsec.kernels import weight_only
from sparsec.kernels.base import Machine
from sparsec.kernels.integers import Stored
from sparsec.lowering.match import attribute, constant
from sparsec.lowering.prices import Way

_BITS = {ir.DataType.INT8: 8, ir.DataType.INT4: 4}


def stored_weight(value: ir.Value | None, inputs: int) -> Stored | None:
    """The integers behind a weight of two axes, of which `inputs` is that of the sum; None if there are none to keep."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or (raw := node.inputs[0]) is None:
        return None
    bits = _BITS.get(raw.dtype) if raw.dtype is not None else None
    integers, scale = constant(raw), constant(node.inputs[1])
    given = len(node.inputs) > 2 and node.inputs[2] is not None
    zero = constant(node.inputs[2]) if given else None
    if bits is None or integers is None or integers.ndim != 2 or scale is None or scale.dtype != np.float32:
        return None
    if given and zero is None:
        return None
    axis, block = int(attribute(node, "axis", 1)) % 2, int(attribute(node, "block_size", 0))
    if (block or scale.size > 1) and bool(block) != (axis == inputs):
        return None  # groups of outputs, or a scale for each input

    def by_output(array: np.ndarray, dtype: type) -> np.ndarray:
        """[N, K], or [N, G] of parameters."""
        if array.ndim < 2:
            array = np.broadcast_to(array.reshape(-1), (integers.shape[1 - inputs],))[:, None]
        elif inputs == 0:
            array = array.T
        return np.ascontiguousarray(array, dtype)

    depth = integers.shape[inputs]
    points = by_output(zero, np.int8) if zero is not None and np.any(zero) else None
    group = min(block, depth) if block else depth
    return Stored(bits, group, by_output(integers, np.int8), by_output(scale, np.float32), points)


def kept_ways(machine: Machine, m: int, stored: Stored) -> list[Way]:
    """The ways to multiply m rows by a weight that stays integers."""
    name = machine.named(weight_only.form_of(stored).name)
    return [
        Way(name, False, us, stored, tiling, kept=True) for us, tiling in weight_only.ranked_tilings(machine, m, stored)
    ]
