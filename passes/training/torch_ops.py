"""ONNX operators as differentiable functions of torch tensors.

A row of `OPERATORS` makes, from one node with static shapes, the function y = f(x_1, ..., x_k) that the operator page
defines at opset 21. What an operator reads only to know a shape (axes, pads, bounds, a Reshape's target) must be
constant and is looked up once, when the function is made. Functions are pure and never look at values: they can be
differentiated and vectorized over a batch (`torch.func.vmap`).

Windows. For an axis of extent n, `begin` padding, stride s and span k' = (k - 1) d + 1, the static output extent m says
how far the windows reach: end = (m - 1) s + k' - n - begin, negative where the last elements are never read. So
auto_pad, asymmetric pads and ceil_mode need no case of their own.

Source: https://onnx.ai/onnx/operators/; written from the operator pages, compared with ONNX Runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
import torch.nn.functional as F

from sparsec.passes.training.torch_spec import Function, Spec, Tensor, Unsupported, following
from sparsec.passes.training.torch_views import VIEWS

# ---- elementwise


def _unary(function: Function) -> Callable[[Spec], Function]:
    return lambda spec: function


def _fold(function: Function) -> Callable[[Spec], Function]:
    def make(spec: Spec) -> Function:
        def apply(first: Tensor, *rest: Tensor) -> Tensor:
            for x in rest:
                first = function(first, x)
            return first

        return apply

    return make


def _sqrt(x: Tensor) -> Tensor:
    """With a derivative of 0 at 0, where torch's is infinite: the magnitude of a spectrum of silence, sqrt(re^2 + im^2)."""
    if not torch.is_grad_enabled():
        return x.sqrt()
    return torch.where(x == 0, x.detach(), torch.where(x == 0, torch.ones_like(x), x).sqrt())


def _mean(spec: Spec) -> Function:
    return lambda *x: _fold(torch.add)(spec)(*x) / len(x)


def _div(spec: Spec) -> Function:
    def apply(a: Tensor, b: Tensor) -> Tensor:
        return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")

    return apply


def _clip(spec: Spec) -> Function:
    if not all(_is_scalar_constant(spec, i) for i in (1, 2) if spec.has(i)):
        return _clip_by_tensors
    low, high = (spec.constant(i, "bound")[0] if spec.has(i) else None for i in (1, 2))
    if low is None and high is None:
        return lambda x, *_: x
    if low is not None and high is not None:
        return lambda x, *_: F.hardtanh(x, low, high)  # the same values; its backward is one kernel, clamp's are four
    return lambda x, *_: torch.clamp(x, low, high)


def _is_scalar_constant(spec: Spec, index: int) -> bool:
    try:
        return len(spec.constant(index, "bound")) == 1
    except Unsupported:
        return False


def _clip_by_tensors(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _leaky_relu(spec: Spec) -> Function:
    alpha = spec.float("alpha", 0.01)
    return lambda x: F.leaky_relu(x, alpha)


def _elu(spec: Spec) -> Function:
    alpha = spec.float("alpha", 1.0)
    return lambda x: F.elu(x, alpha)


def _celu(spec: Spec) -> Function:
    alpha = spec.float("alpha", 1.0)
    return lambda x: F.celu(x, alpha)


def _selu(spec: Spec) -> Function:
    alpha, gamma = spec.float("alpha", 1.67326319217681884765625), spec.float("gamma", 1.05070102214813232421875)
    return lambda x: gamma * F.elu(x, alpha)


def _thresholded_relu(spec: Spec) -> Function:
    alpha = spec.float("alpha", 1.0)
    return lambda x: torch.where(x > alpha, x, torch.zeros_like(x))


def _hard_sigmoid(spec: Spec) -> Function:
    alpha, beta = spec.float("alpha", 0.2), spec.float("beta", 0.5)
    return lambda x: torch.clamp(alpha * x + beta, 0.0, 1.0)


def _swish(spec: Spec) -> Function:
    alpha = spec.float("alpha", 1.0)
    return lambda x: x * torch.sigmoid(alpha * x)


def _gelu(spec: Spec) -> Function:
    approximate = spec.text("approximate", "none")
    return lambda x: F.gelu(x, approximate=approximate)


_FLOATS = ("FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16")
_TYPES = {
    "INT64": torch.int64, "INT32": torch.int32, "INT16": torch.int16, "INT8": torch.int8, "UINT8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


def _cast(spec: Spec) -> Function:
    name = ir.DataType(spec.int("to", 1)).name
    if name not in _TYPES and name not in _FLOATS:
        raise Unsupported(f"it casts to {name}")
    kind = spec.floats if name in _FLOATS else _TYPES[name]
    return lambda x: x.to(kind)


# ---- products and convolutions


def _gemm(spec: Spec) -> Function:
    alpha, beta = spec.float("alpha", 1.0), spec.float("beta", 1.0)
    ta, tb = spec.int("transA", 0), spec.int("transB", 0)

    def apply(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.mT if ta else a, b.mT if tb else b
        if c is not None and alpha == beta == 1.0:
            return torch.addmm(c, a, b)
        y = a @ b
        y = y if alpha == 1.0 else alpha * y
        return y if c is None else y + (c if beta == 1.0 else beta * c)

    return apply


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL: dict[int, Function] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOL: dict[int, Function] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@dataclass(frozen=True)
class _Windows:
    """Geometry of a node that slides windows over its spatial axes."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begin: list[int]
    end: list[int]
    declared: list[int]  # the pads as written, begin then end; those of auto_pad computed

    @property
    def symmetric(self) -> bool:
        half = len(self.declared) // 2
        return self.declared[:half] == self.declared[half:]

    def pad(self, x: Tensor, value: float) -> Tensor:
        pairs = [p for b, e in zip(reversed(self.begin), reversed(self.end), strict=True) for p in (b, e)]
        return F.pad(x, pairs, value=value) if any(pairs) else x


def _windows(spec: Spec, kernel: Sequence[int]) -> _Windows:
    n = len(kernel)
    if n not in _CONV:
        raise Unsupported(f"it has {n} spatial axes, 1 to 3 are known")
    strides, dilations = spec.ints("strides") or [1] * n, spec.ints("dilations") or [1] * n
    sizes, extents = spec.shape()[2:], spec.out()[2:]
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    mode = spec.text("auto_pad", "NOTSET")
    declared = spec.ints("pads") or [0] * (2 * n)
    reach = [(m - 1) * s + k - size for m, s, k, size in zip(extents, strides, spans, sizes, strict=True)]
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        total = [max(r, 0) for r in reach]
        half = [t // 2 if mode == "SAME_UPPER" else t - t // 2 for t in total]
        declared = [*half, *(t - h for t, h in zip(total, half, strict=True))]
    begin = declared[:n]
    return _Windows(
        list(kernel), strides, dilations, begin, [r - b for r, b in zip(reach, begin, strict=True)], declared
    )


def _conv(spec: Spec) -> Function:
    w = _windows(spec, spec.shape(1)[2:])
    function, groups = _CONV[len(w.kernel)], spec.int("group", 1)
    if w.symmetric:
        padding = w.declared[: len(w.kernel)]
        return lambda x, k, b=None: function(x, k, b, w.strides, padding, w.dilations, groups)
    return lambda x, k, b=None: function(w.pad(x, 0.0), k, b, w.strides, 0, w.dilations, groups)


def _conv_transpose(spec: Spec) -> Function:
    kernel = spec.shape(1)[2:]
    n = len(kernel)
    if n not in _CONV_TRANSPOSE:
        raise Unsupported(f"it has {n} spatial axes, 1 to 3 are known")
    strides, dilations = spec.ints("strides") or [1] * n, spec.ints("dilations") or [1] * n
    extra = spec.ints("output_padding") or [0] * n
    begin = (spec.ints("pads") or [0] * (2 * n))[:n]
    sizes, extents = spec.shape()[2:], spec.out()[2:]
    full = [(i - 1) * s + (k - 1) * d + 1 for i, s, k, d in zip(sizes, strides, kernel, dilations, strict=True)]
    mode = spec.text("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER") or spec.ints("output_shape"):
        total = [f + e - m for f, e, m in zip(full, extra, extents, strict=True)]
        begin = [t // 2 if mode == "SAME_UPPER" else t - t // 2 for t in total]
    pairs = [
        p for b, f, m in reversed(list(zip(begin, full, extents, strict=True))) for p in (-b, m + b - f)
    ]  # the full result, cut at both ends; longer than it where output_padding asks
    function, groups = _CONV_TRANSPOSE[n], spec.int("group", 1)

    def apply(x: Tensor, k: Tensor, b: Tensor | None = None) -> Tensor:
        y = F.pad(function(x, k, None, strides, 0, 0, groups, dilations), pairs)
        return y if b is None else y + b.reshape(-1, *[1] * n)

    return apply


# ---- pooling


def _max_pool(spec: Spec) -> Function:
    if len([y for y in spec.node.outputs if y is not None and y.name]) > 1:
        raise Unsupported("it also returns indices")
    w = _windows(spec, spec.ints("kernel_shape") or [])
    function = _MAX_POOL[len(w.kernel)]
    sides = list(zip(w.begin, w.end, w.strides, w.kernel, strict=True))
    if all(0 <= begin - end < stride and 0 <= 2 * begin <= k for begin, end, stride, k in sides):
        return lambda x: function(
            x, w.kernel, w.strides, w.begin, w.dilations
        )  # reads as far with `begin` at both ends
    return lambda x: function(w.pad(x, -math.inf), w.kernel, w.strides, 0, w.dilations)


def _average_pool(spec: Spec) -> Function:
    w = _windows(spec, spec.ints("kernel_shape") or [])
    n = len(w.kernel)
    function = _AVERAGE_POOL[n]
    if not any(w.begin + [max(e, 0) for e in w.end]) and all(d == 1 for d in w.dilations):
        return lambda x: function(w.pad(x, 0.0), w.kernel, w.strides)
    size = spec.shape()[2:]
    ones = torch.ones(1, 1, *size)
    if spec.int("count_include_pad", 0):  # what was declared counts; what ceil_mode adds behind it does not
        pairs = [p for b, e in zip(reversed(w.declared[:n]), reversed(w.declared[n:]), strict=True) for p in (b, e)]
        ones = F.pad(ones, pairs, value=1.0)
        grown = [s + b + e for s, b, e in zip(size, w.begin, w.end, strict=True)]
        rest = [g - o for g, o in zip(grown, ones.shape[2:], strict=True)]
        ones = F.pad(ones, [p for r in reversed(rest) for p in (0, r)])
    else:
        ones = w.pad(ones, 0.0)
    counts = following(_sums(ones, w))
    return lambda x: _sums(w.pad(x, 0.0), w) / counts(x)


def _sums(x: Tensor, w: _Windows) -> Tensor:
    """Sums over the windows of a padded x."""
    n = len(w.kernel)
    if all(d == 1 for d in w.dilations):
        return _AVERAGE_POOL[n](x, w.kernel, w.strides) * math.prod(w.kernel)
    channels = x.shape[1]
    kernel = x.new_ones(channels, 1, *w.kernel)
    return _CONV[n](x, kernel, None, w.strides, 0, w.dilations, channels)


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


# ---- reductions and normalizations


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[[Spec], Function]:
    def make(spec: Spec) -> Function:
        rank, keep = len(spec.shape()), bool(spec.int("keepdims", 1))
        axes = spec.constant(1, "axes") if spec.has(1) else spec.ints("axes")
        if not axes:
            if spec.int("noop_with_empty_axes", 0):
                return lambda x, *_: function(x.unsqueeze(0), [0], False)
            axes = list(range(rank))
        axes = [a % max(rank, 1) for a in axes] if rank else []
        return lambda x, *_: function(x, axes, keep) if axes else function(x.unsqueeze(0), [0], False)

    return make


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _layer_norm(spec: Spec) -> Function:
    if len(spec.node.outputs) > 1:
        raise Unsupported("it also returns the mean or the deviation")
    shape, epsilon = spec.shape(), spec.float("epsilon", 1e-5)
    tail = shape[spec.axis(-1, len(shape)) :]

    def apply(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.layer_norm(x, tail, None, None, epsilon) * scale
        return y if bias is None else y + bias

    return apply


def _rms_norm(spec: Spec) -> Function:
    rank, epsilon = len(spec.shape()), spec.float("epsilon", 1e-5)
    axes = list(range(spec.axis(-1, rank) - rank, 0))
    return lambda x, scale: x * torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon) * scale


def _channels(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(-1, *[1] * (x.dim() - 2))


def _batch_norm(spec: Spec) -> Function:
    if spec.int("training_mode", 0):
        raise Unsupported("it is in training mode")
    epsilon = spec.float("epsilon", 1e-5)

    def apply(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        factor = scale * torch.rsqrt(variance + epsilon)
        return x * _channels(factor, x) + _channels(bias - mean * factor, x)

    return apply


def _group_norm(spec: Spec) -> Function:
    shape, epsilon = spec.shape(), spec.float("epsilon", 1e-5)
    groups = spec.int("num_groups", 1) if spec.node.op_type == "GroupNormalization" else shape[1]

    def apply(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        split = x.reshape(x.shape[0], groups, -1)
        centred = split - split.mean(2, keepdim=True)
        y = (centred * torch.rsqrt(centred.square().mean(2, keepdim=True) + epsilon)).reshape(x.shape)
        return y * _channels(scale, x) + _channels(bias, x)

    return apply


def _lrn(spec: Spec) -> Function:
    alpha, beta, bias = spec.float("alpha", 1e-4), spec.float("beta", 0.75), spec.float("bias", 1.0)
    size = spec.int("size", 1)
    before, after = (size - 1) // 2, size // 2

    def apply(x: Tensor) -> Tensor:
        flat = F.pad(x.square().flatten(2).transpose(1, 2), (before, after))
        total = F.avg_pool1d(flat, size, 1) * size
        return x / (bias + alpha / size * total.transpose(1, 2).reshape(x.shape)) ** beta

    return apply


def _lp_norm(spec: Spec) -> Function:
    axis, p = spec.axis(-1, len(spec.shape())), spec.int("p", 2)
    return lambda x: x / torch.linalg.vector_norm(x, p, axis, keepdim=True)


def _softmax(function: Function) -> Callable[[Spec], Function]:
    def make(spec: Spec) -> Function:
        axis = spec.axis(-1, len(spec.shape()))
        return lambda x: function(x, axis)

    return make


def _einsum(spec: Spec) -> Function:
    equation = spec.text("equation", "")
    return lambda *x: torch.einsum(equation, *x)


OPERATORS: dict[str, Callable[[Spec], Function]] = {
    # elementwise, one operand
    "Abs": _unary(torch.abs), "Ceil": _unary(torch.ceil), "Cos": _unary(torch.cos), "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp), "Floor": _unary(torch.floor), "HardSwish": _unary(F.hardswish), "Log": _unary(torch.log),
    "Mish": _unary(F.mish), "Neg": _unary(torch.neg), "Not": _unary(torch.logical_not),
    "Reciprocal": _unary(torch.reciprocal), "Relu": _unary(F.relu), "Round": _unary(torch.round),
    "Sigmoid": _unary(torch.sigmoid), "Sign": _unary(torch.sign), "Sin": _unary(torch.sin),
    "Softplus": _unary(F.softplus), "Softsign": _unary(F.softsign), "Sqrt": _unary(_sqrt),
    "Tanh": _unary(torch.tanh), "Identity": _unary(lambda x: x), "Dropout": _unary(lambda x, *_: x),
    "Celu": _celu, "Elu": _elu, "Gelu": _gelu, "HardSigmoid": _hard_sigmoid, "LeakyRelu": _leaky_relu, "Selu": _selu,
    "Swish": _swish, "ThresholdedRelu": _thresholded_relu, "Clip": _clip, "Cast": _cast,
    # elementwise, several operands
    "Add": _unary(torch.add), "Sub": _unary(torch.sub), "Mul": _unary(torch.mul), "Div": _div, "Pow": _unary(torch.pow),
    "PRelu": _unary(lambda x, slope: torch.where(x < 0, x * slope, x)), "Max": _fold(torch.maximum),
    "Min": _fold(torch.minimum), "Sum": _fold(torch.add), "Mean": _mean, "Where": _unary(torch.where),
    "Equal": _unary(torch.eq), "Greater": _unary(torch.gt), "GreaterOrEqual": _unary(torch.ge),
    "Less": _unary(torch.lt), "LessOrEqual": _unary(torch.le), "And": _unary(torch.logical_and),
    "Or": _unary(torch.logical_or),
    # products, convolutions, pooling
    "Conv": _conv, "ConvTranspose": _conv_transpose, "Einsum": _einsum, "Gemm": _gemm, "MatMul": _unary(torch.matmul),
    "AveragePool": _average_pool, "MaxPool": _max_pool,
    "GlobalAveragePool": _unary(lambda x: x.mean(_spatial(x), keepdim=True)),
    "GlobalMaxPool": _unary(lambda x: x.amax(_spatial(x), keepdim=True)),
    # reductions and normalizations
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "ReduceMax": _reduce(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "ReduceMin": _reduce(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "ReduceProd": _reduce(_prod),
    "ReduceL1": _reduce(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "ReduceL2": _reduce(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keepdim=keep)),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
    "ReduceLogSumExp": _reduce(lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep)),
    "LayerNormalization": _layer_norm, "RMSNormalization": _rms_norm, "BatchNormalization": _batch_norm,
    "GroupNormalization": _group_norm, "InstanceNormalization": _group_norm, "LRN": _lrn, "LpNormalization": _lp_norm,
    "Softmax": _softmax(torch.softmax), "LogSoftmax": _softmax(torch.log_softmax),
    **VIEWS,
}  # fmt: skip
