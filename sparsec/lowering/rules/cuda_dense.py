"""Dense layers on CUDA devices: Conv, Gemm, MatMul, pooling, Softmax and normalizations.

Nodes are read as on CPUs (`rules.convolution`, `product`, `pooling`, `normalization`), and the same groups are fused; the
kernels and their prices are those of `sparsec.kernels.cuda`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsec.kernels.cuda import conv, depthwise, gemm, gemv, normalize, pool
from sparsec.kernels.cuda.base import DeviceCall, Gpu
from sparsec.lowering.match import Group, attribute, dims, fuse
from sparsec.lowering.rules.base import Context, Taken
from sparsec.lowering.rules.convolution import ConvNode, read_conv
from sparsec.lowering.rules.cuda_base import Launched, emit_device
from sparsec.lowering.rules.normalization import read_normalization, read_softmax
from sparsec.lowering.rules.pooling import read_global_pool, read_pool
from sparsec.lowering.rules.product import ActivationProduct, ConstantProduct, read_gemm, read_matmul
from sparsec.lowering.structure import detect_structure
from sparsec.program import Candidate


def _gpu(context: Context) -> Gpu:
    assert context.gpu is not None
    return context.gpu


def _taken(
    group: Group, calls: Sequence[DeviceCall], inputs: Mapping[str, ir.Value], reason: str, us: float, w: np.ndarray,
    candidates: tuple[Candidate, ...] = (), parts: int = 0,
) -> Taken:  # fmt: skip
    """A layer with weights of one call, or of two between which `parts` sums are passed on."""
    bound = dict(inputs) | ({"residual": group.other} if group.other is not None else {})
    facts: dict[str, Any] = {"weight": w, "structure": str(detect_structure(w)), "candidates": candidates}
    if len(calls) == 1:
        return Taken(group, emit_device(group, calls[0], bound, reason, us, **facts))
    launches = [Launched(calls[0], writes=("parts",)), Launched(calls[1])]
    return Taken(
        group, emit_device(group, launches, bound, reason, us, between={"parts": ((parts,), "float32")}, **facts)
    )


def _shape(read: ConvNode) -> conv.Shape:
    return conv.Shape(read.x_shape, read.w.shape, read.strides, read.pads, read.dilations, read.groups)


def take_device_conv(node: ir.Node, context: Context) -> Taken | str | None:
    """Conv: depthwise by its own kernel, one pixel as a product, else by implicit matrix product."""
    if node.op_type != "Conv":
        return None
    read = read_conv(node)
    if isinstance(read, str):
        return read
    x, gpu, group = node.inputs[0], _gpu(context), fuse(node, context.taken)
    assert x is not None
    shape = _shape(read)
    options: dict[str, Any] = {"bias": read.bias, "activation": group.activation, "residual": group.residual}
    if read.groups > 1 and depthwise.refusal(shape) is None:
        call = depthwise.bind(gpu, shape, w=read.w, **options)
        return _taken(group, [call], {"x": x}, "depthwise", depthwise.predict_us(gpu, shape), read.w)
    if read.one_pixel:
        flat = read.w.reshape(read.w.shape[0], -1)
        return bind_product(ConstantProduct(group, x, read.x_shape[0], flat, read.bias, None), gpu)
    ranked = conv.plans(gpu, shape)
    us, plan = ranked[0]
    stem = gpu.named(conv.TABLE[0].name)
    candidates = tuple(Candidate(f"{stem}, tiles {plan}", us) for us, plan in ranked)
    calls = conv.bind(gpu, shape, w=read.w, plan=plan, **options)
    parts = plan.splits * read.x_shape[0] * read.w.shape[0] * shape.pixels
    return _taken(group, calls, {"x": x}, f"tiles {plan}", us, read.w, candidates, parts)


def bind_product(read: ConstantProduct, gpu: Gpu) -> Taken:
    """x as [m, K] times a constant: tiles, or a warp a few columns where rows are few; the cheaper one."""
    group, (n, k) = read.group, read.w.shape
    options: dict[str, Any] = {"bias": read.bias, "activation": group.activation, "residual": group.residual}
    ranked = gemm.plans(gpu, read.m, k, n)
    us, plan = ranked[0]
    candidates = [Candidate(f"{gpu.named(gemm.TABLE[0].name)}, tiles {plan}", us) for us, plan in ranked]
    inputs = {"x": read.x}
    if read.m <= gemv.MAX_ROWS:
        vector_us, vector_plan = gemv.plans(gpu, read.m, k, n)[0]
        candidates.append(Candidate(f"{gpu.named(gemv.TABLE[0].name)}, {vector_plan}", vector_us))
        candidates.sort(key=lambda candidate: candidate.predicted_us)
        if vector_us <= us:
            call = gemv.bind(gpu, m=read.m, w=read.w, plan=vector_plan, **options)
            return _taken(
                group, [call], inputs, str(vector_plan), vector_us, read.w[:, :, None, None], tuple(candidates)
            )
    calls = gemm.bind(gpu, m=read.m, w=read.w, plan=plan, **options)
    parts, w = plan.splits * read.m * n, read.w[:, :, None, None]
    return _taken(group, calls, inputs, f"tiles {plan}", us, w, tuple(candidates), parts)


def take_device_gemm(node: ir.Node, context: Context) -> Taken | str | None:
    """Gemm, or MatMul with a constant rank-2 right side."""
    read = read_gemm(node, context)
    return bind_product(read, _gpu(context)) if isinstance(read, ConstantProduct) else read


def take_device_matmul(node: ir.Node, context: Context) -> Taken | str | None:
    """MatMul of two activations, with equal batch or one side shared."""
    read = read_matmul(node, context)
    if not isinstance(read, ActivationProduct):
        return read
    gpu = _gpu(context)
    us, plan = gemm.plans(gpu, read.m, read.k, read.n, read.batch, False)[0]
    call = gemm.bind_matmul(gpu, **read.facts, plan=plan)
    return Taken(
        read.group, emit_device(read.group, call, {"a": read.a, "b": read.b}, f"two activations, tiles {plan}", us)
    )


def take_device_pool(node: ir.Node, context: Context) -> Taken | str | None:
    """MaxPool and AveragePool."""
    read = read_pool(node)
    if not isinstance(read, tuple):
        return read
    x, window, mode = read
    gpu, planes = _gpu(context), int(np.prod(dims(x)[:2]))
    group = fuse(node, context.taken, residual=False)
    include_pad = bool(attribute(node, "count_include_pad", 0))
    call = pool.bind(
        gpu, mode, planes=planes, window=window, count_include_pad=include_pad, activation=group.activation
    )
    written = planes * window.shape[0] * window.shape[1]
    us = pool.predict_us(gpu, planes * window.height * window.width, written, window.taps)
    return Taken(group, emit_device(group, call, {"x": x}, f"{mode} pooling", us))


def take_device_global_pool(node: ir.Node, context: Context) -> Taken | str | None:
    """GlobalAveragePool, GlobalMaxPool, and ReduceMean or ReduceMax over the last axes."""
    read = read_global_pool(node)
    if not isinstance(read, tuple):
        return read
    (x, rows, count, mode), gpu = read, _gpu(context)
    group = fuse(node, context.taken, residual=False)
    call = pool.bind_global(gpu, mode, rows=rows, count=count, activation=group.activation)
    us = pool.predict_us(gpu, rows * count, rows)
    return Taken(group, emit_device(group, call, {"x": x}, f"{mode} of {count} elements", us))


def take_device_softmax(node: ir.Node, context: Context) -> Taken | str | None:
    """Softmax over the last axis that is not 1."""
    if node.op_type != "Softmax":
        return None
    read = read_softmax(node)
    if isinstance(read, str):
        return read
    (x, rows, count), gpu = read, _gpu(context)
    group = Group(node, (node,), node.outputs[0])
    call = normalize.bind_softmax(gpu, rows=rows, count=count)
    return Taken(group, emit_device(group, call, {"x": x}, "softmax", normalize.predict_us(gpu, rows, count)))


def take_device_normalization(node: ir.Node, context: Context) -> Taken | str | None:
    """LayerNormalization and RMSNormalization over the last axes."""
    if node.op_type not in ("LayerNormalization", "RMSNormalization"):
        return None
    read = read_normalization(node)
    if isinstance(read, str):
        return read
    gpu, kind = _gpu(context), "layer" if node.op_type == "LayerNormalization" else "rms"
    group = Group(node, (node,), node.outputs[0])
    call = normalize.bind_norm(
        gpu,
        kind,
        rows=read.rows,
        gamma=read.gamma,
        beta=read.beta,
        epsilon=read.epsilon,
    )
    us = normalize.predict_us(gpu, read.rows, read.gamma.size)
    return Taken(group, emit_device(group, call, {"x": read.x}, f"{kind} normalization", us))


DENSE_RULES = (
    take_device_conv,
    take_device_gemm,
    take_device_matmul,
    take_device_pool,
    take_device_global_pool,
    take_device_softmax,
    take_device_normalization,
)
