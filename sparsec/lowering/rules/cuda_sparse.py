"""Conv, Gemm and MatMul with zeros in their weights, on CUDA devices: block-sparse, 2:4, or dense where zeros do not pay.

Nodes are read as the dense rules read them. A layer with zeros to speak of is priced in every form that its zeros have,
dense ones included; the cheapest runs it, and `inspect` shows them all. Layers without zeros are left to the dense rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsec.kernels.cuda import block_sparse, conv, gemm, gemv, kept_columns, two_four, vectorwise
from sparsec.kernels.cuda.base import DeviceCall, Gpu
from sparsec.lowering.match import fuse
from sparsec.lowering.prices import SPARSE_FROM
from sparsec.lowering.rules.base import Context, Taken
from sparsec.lowering.rules.convolution import ConvNode, read_conv
from sparsec.lowering.rules.cuda_ways import DeviceWay, take_way
from sparsec.lowering.rules.cuda_weight_only import kept_products
from sparsec.lowering.rules.product import ConstantProduct, read_gemm
from sparsec.lowering.structure import detect_structure

SPARSE_FROM_INTEGERS = 0.5  # share of zeros: integers round many weights to zero, and floats must read a quarter to win


def dense_products(gpu: Gpu, m: int, w: np.ndarray) -> list[DeviceWay]:
    """The ways of `cuda_dense` to multiply m rows by w [N, K]."""
    n, k = w.shape
    us, plan = gemm.plans(gpu, m, k, n)[0]
    found = [
        DeviceWay(
            f"{gpu.named(gemm.TABLE[0].name)}, tiles {plan}", us, False,
            lambda **options: gemm.bind(gpu, m=m, w=w, plan=plan, **options), plan.splits * m * n,
        )
    ]  # fmt: skip
    if m <= gemv.MAX_ROWS:
        vector_us, vector_plan = gemv.plans(gpu, m, k, n)[0]
        name = f"{gpu.named(gemv.TABLE[0].name)}, {vector_plan}"
        bind: Callable[..., DeviceCall] = lambda **options: gemv.bind(gpu, m=m, w=w, plan=vector_plan, **options)  # noqa: E731
        found.append(DeviceWay(name, vector_us, False, bind))
    return found


def sparse_products(gpu: Gpu, m: int, w: np.ndarray) -> list[DeviceWay]:
    """The forms of zeros that w [N, K] has."""
    n, k = w.shape
    found = []
    for form in block_sparse.GEMM_TABLE:
        us, plan = block_sparse.gemm_plans(gpu, m, w, form)[0]

        def bind(form: Any = form, plan: Any = plan, **options: Any) -> DeviceCall:
            return block_sparse.bind_gemm(gpu, m=m, w=w, form=form, plan=plan, **options)

        found.append(DeviceWay(f"{gpu.named(form.name)}, tiles {plan}", us, True, bind))
    if gpu.element == "float16" and two_four.refusal(w) is None:
        us, tile = two_four.gemm_tiles(gpu, m, k, n)[0]
        name = f"{two_four.TABLE[0].name}, tiles {tile}"
        found.append(
            DeviceWay(name, us, True, lambda **options: two_four.bind_gemm(gpu, m=m, w=w, tile=tile, **options))
        )
    return found


def sparse_convolutions(gpu: Gpu, shape: conv.Shape, w: np.ndarray) -> list[DeviceWay]:
    """The forms of zeros that w [OC, C, KH, KW] has, of one group."""
    found = []
    if kept_columns.refusal(shape) is None:
        for form in block_sparse.CONV_TABLE:
            us, plan = block_sparse.conv_plans(gpu, shape, w, form)[0]

            def bind(form: Any = form, plan: Any = plan, **options: Any) -> DeviceCall:
                return block_sparse.bind_conv(gpu, shape, w=w, form=form, plan=plan, **options)

            found.append(DeviceWay(f"{gpu.named(form.name)}, tiles {plan}", us, True, bind))
    if gpu.element == "float32" and vectorwise.refusal(shape) is None:
        for form in vectorwise.TABLE:
            us, tiling = vectorwise.ranked_tilings(gpu, shape, w, form)[0]

            def bind_rows(form: Any = form, tiling: Any = tiling, **options: Any) -> DeviceCall:
                return vectorwise.bind(gpu, shape, w=w, form=form, tiling=tiling, **options)

            found.append(DeviceWay(form.name, us, True, bind_rows))
    if gpu.element == "float16" and two_four.refusal(w, shape) is None:
        us, tile = two_four.conv_tiles(gpu, shape)[0]
        name = f"{two_four.TABLE[1].name}, tiles {tile}"
        found.append(
            DeviceWay(name, us, True, lambda **options: two_four.bind_conv(gpu, shape, w=w, tile=tile, **options))
        )
    return found


def _product(read: ConstantProduct, gpu: Gpu) -> Taken | None:
    structure = detect_structure(read.w[:, :, None, None])
    ways = kept_products(gpu, read.m, read.stored) if read.stored is not None else []
    if structure.zeros >= (SPARSE_FROM if not ways else SPARSE_FROM_INTEGERS):
        ways += sparse_products(gpu, read.m, read.w)
    if not ways:
        return None
    ways += dense_products(gpu, read.m, read.w)
    return take_way(read.group, ways, structure, {"x": read.x}, read.w, read.bias)


def take_sparse_product(node: ir.Node, context: Context) -> Taken | str | None:
    """Gemm, or MatMul with a constant right side, with zeros in its weight or a weight that the model keeps as integers."""
    read = read_gemm(node, context)
    if not isinstance(read, ConstantProduct):
        return None  # the dense rule says why
    assert context.gpu is not None
    return _product(read, context.gpu)


def take_sparse_conv(node: ir.Node, context: Context) -> Taken | str | None:
    """Conv of one group with zeros in its weight."""
    if node.op_type != "Conv":
        return None
    read = read_conv(node)
    if not isinstance(read, ConvNode) or read.groups > 1:
        return None
    gpu, x = context.gpu, node.inputs[0]
    assert gpu is not None and x is not None
    group = fuse(node, context.taken)
    if read.one_pixel:
        flat = read.w.reshape(read.w.shape[0], -1)
        return _product(ConstantProduct(group, x, read.x_shape[0], flat, read.bias, None), gpu)
    structure = detect_structure(read.w)
    if structure.zeros < SPARSE_FROM:
        return None
    shape = conv.Shape(read.x_shape, read.w.shape, read.strides, read.pads, read.dilations, read.groups)
    us, plan = conv.plans(gpu, shape)[0]
    parts = plan.splits * read.x_shape[0] * read.w.shape[0] * shape.pixels
    dense = DeviceWay(
        f"{gpu.named(conv.TABLE[0].name)}, tiles {plan}", us, False,
        lambda **options: conv.bind(gpu, shape, w=read.w, plan=plan, **options), parts,
    )  # fmt: skip
    ways = [dense, *sparse_convolutions(gpu, shape, read.w)]
    if len(ways) == 1:
        return None
    return take_way(group, ways, structure, {"x": x}, read.w, read.bias)


SPARSE_RULES = (take_sparse_conv, take_sparse_product)
