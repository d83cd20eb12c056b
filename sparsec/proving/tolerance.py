"""How far two correct implementations of a model may differ: derived from the model, not tuned until tests pass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsec.kernels.base import CHAIN

if TYPE_CHECKING:
    import onnx_ir

    from sparsec.targets import Target

UNIT_ROUNDOFF = 2.0**-24  # of float32
HALF_ROUNDOFF = 2.0**-11  # of float16
SIGMAS = 4.0  # the largest of 1000 normal values is 3.3 sigma on average
# ONNX Runtime's Sigmoid is a rational function that is near in absolute terms only: measured against float64 on 600,001
# points of -30..30 it is at most 2.8 units off, which is 10^4 % of a probability of 1e-9. (Its Tanh: 4.5, relative too.)
SIGMOID_ERROR = 4 * UNIT_ROUNDOFF
CEILING = {
    "x86_64": 2e-5,
    "aarch64": 5e-5,
    "wasm32": 5e-5,
}  # no model may need more; a larger derived value is cut to this

_ERROR_FREE = frozenset({
    "Relu", "Clip", "MaxPool", "GlobalMaxPool", "Reshape", "Flatten", "Transpose", "Concat", "Split", "Slice",
    "Squeeze", "Unsqueeze", "Identity", "Pad", "Gather", "Constant", "Shape", "Cast", "Expand", "Tile", "Max",
    "Min", "Abs", "Neg", "ArgMax", "ArgMin", "Where", "Equal", "Less", "Greater", "Not", "And", "Or", "Dropout",
    "DepthToSpace", "SpaceToDepth",
})  # fmt: skip

# Library functions: each of two implementations may be off by 4 units, and (4 u)^2 = 16 u^2.
_FUNCTIONS = frozenset({
    "Sigmoid", "Tanh", "Exp", "Log", "Erf", "Gelu", "Softplus", "Softmax", "LogSoftmax", "HardSwish", "HardSigmoid",
    "Swish", "Mish", "Elu", "Selu", "Celu", "Pow", "Sqrt", "Reciprocal", "Sin", "Cos", "LayerNormalization",
    "InstanceNormalization", "GroupNormalization", "LRN",
})  # fmt: skip

_AVERAGES = frozenset({"ReduceMean", "AveragePool", "GlobalAveragePool"})

_EXACT = frozenset({"INT8", "UINT8", "INT16", "UINT16", "INT32", "UINT32", "INT64", "UINT64", "BOOL"})


def derive_tolerance(model: onnx_ir.Model) -> float:
    """Relative error that two correct float32 implementations of `model` may differ by.

    A sum of k products rounds k times by at most u = 2^-24 of its size; with independent signs that is u sqrt(k).
    Errors of layers add up the same way, for both implementations: u sqrt(2 sum(k)) over all nodes on the way, where k
    is the accumulation length of a Conv, Gemm or MatMul, the window of an average, 16 for a library function, 1
    otherwise and 0 for operators that only select or move values. Times 4 (standard deviations), because the maximum
    over all elements is compared.
    """
    count = sum(roundings(node) for node in model.graph)
    return SIGMAS * UNIT_ROUNDOFF * math.sqrt(2 * max(count, 1))


def derive_half_tolerance(model: onnx_ir.Model, wide_sums: bool = False) -> float:
    """Relative error that a correct float16 implementation of `model` may have against float32, which is exact beside it.

    A rounding is off by at most u = 2^-11 of the sum so far, u / sqrt(3) in the root mean square. A sum of k products
    is made of sums of CHAIN products: min(k, CHAIN) roundings of a part each and k / CHAIN of parts put together. The
    weights and the result are rounded once each. Library functions, softmax and normalizations are float32 inside.
    wide_sums: sums are float32 too, which is exact beside the rest, as tensor cores have them. Errors of layers add up,
    times 4 (standard deviations).
    """
    count = 0.0
    for node in model.graph:
        length = 0 if node.op_type in _FUNCTIONS else roundings(node)
        within = 0.0 if wide_sums else min(length, CHAIN) + length / CHAIN
        count += 0 if node.op_type in _ERROR_FREE else within + 2
    return SIGMAS * HALF_ROUNDOFF * math.sqrt(max(count, 1) / 3)


def derive_stored_half_tolerance(model: onnx_ir.Model) -> float:
    """Relative error that two correct implementations of a model that holds values in float16 may differ by.

    Each rounds what an operator makes once to float16, or leaves that to an operator behind: u / sqrt(3) in the root mean
    square, u = 2^-11, for either of the two. Sums and library functions are float32 inside, which is exact beside it.
    Errors of layers add up, times 4 (standard deviations).
    """
    count = sum(
        any(map(_is_half, node.outputs)) and (node.op_type == "Cast" or node.op_type not in _ERROR_FREE)
        for node in model.graph
    )
    return SIGMAS * HALF_ROUNDOFF * math.sqrt(2 * max(count, 1) / 3)


def behind_half(values: Iterable[onnx_ir.Value]) -> set[str]:
    """Names of those of `values` that something in float16 leads to, or that are float16 themselves."""
    found: set[str] = set()
    for value in values:
        seen: set[onnx_ir.Value] = set()
        pending = [value]
        while pending and str(value.name) not in found:
            at = pending.pop()
            node = at.producer()
            if _is_half(at):
                found.add(str(value.name))
            elif node is not None and at not in seen:
                pending += [x for x in node.inputs if x is not None]
            seen.add(at)
    return found


def _is_half(value: onnx_ir.Value) -> bool:
    return value.dtype is not None and value.dtype.name == "FLOAT16"


def tolerances(model: onnx_ir.Model, target: Target) -> dict[str, float]:
    """The relative tolerance of each output for `target` and its precision; integer outputs must be equal."""
    if target.precision == "f16":
        value = half = derive_half_tolerance(model, target.gpu is not None)
    else:
        value, half = min(derive_tolerance(model), CEILING[target.arch]), derive_stored_half_tolerance(model)
    halves = behind_half(model.graph.outputs)
    found = {}
    for output in model.graph.outputs:
        name, exact = str(output.name), output.dtype is not None and output.dtype.name in _EXACT
        found[name] = 0.0 if exact else float(f"{half if name in halves else value:.3g}")
    return found


def floors(model: onnx_ir.Model) -> dict[str, float]:
    """Outputs that are values of a Sigmoid, moved, selected or averaged: the absolute error that goes beside the relative one."""
    found = {}
    for output in model.graph.outputs:
        node = output.producer()
        while (
            node is not None
            and node.op_type in (_ERROR_FREE | _AVERAGES)
            and node.inputs
            and node.inputs[0] is not None
        ):
            node = node.inputs[0].producer()
        if node is not None and node.op_type == "Sigmoid":
            found[str(output.name)] = SIGMOID_ERROR
    return found


def for_sample(relative: float, floor: float, reference: np.ndarray) -> float:
    """The relative tolerance in one sample: `relative`, and `floor` as a share of max |reference|."""
    size = float(np.abs(reference.astype(np.float64)).max(initial=0)) if floor else 0.0
    return relative + floor / size if size else relative


def roundings(node: Any) -> int:
    """How often the value behind one output element of `node` is rounded; the number of terms of a sum."""
    kind = node.op_type
    if kind in _ERROR_FREE:
        return 0
    if kind in _FUNCTIONS:
        return 16
    if kind in ("Conv", "ConvTranspose"):
        dims = _dims(node.inputs[1])
        return math.prod(dims[1:] if kind == "Conv" else [dims[0], *dims[2:]]) if len(dims) > 2 else 1
    if kind == "Gemm":
        dims = _dims(node.inputs[0])
        return dims[0 if node.attributes.get_int("transA", 0) else 1] if len(dims) == 2 else 1
    if kind == "MatMul":
        dims = _dims(node.inputs[0])
        return dims[-1] if dims else 1
    if kind == "AveragePool":
        return math.prod(node.attributes.get_ints("kernel_shape", [1]))
    if kind == "GlobalAveragePool":
        return math.prod(_dims(node.inputs[0])[2:])
    if kind in ("ReduceMean", "ReduceSum", "ReduceL2", "ReduceProd"):
        before, after = math.prod(_dims(node.inputs[0])), math.prod(_dims(node.outputs[0]))
        return max(1, before // max(1, after))
    if kind in ("GRU", "LSTM", "RNN"):
        x, w, r = (_dims(value) for value in node.inputs[:3])
        return x[0] * (w[-1] + r[-1] + 32) if x and w and r else 1
    return 1


def _dims(value: Any) -> list[int]:
    shape = None if value is None else value.shape
    return [] if shape is None else [dim if isinstance(dim, int) else 1 for dim in shape]
