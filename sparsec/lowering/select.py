"""Selection: which kernel runs each node. `RULES`, for CUDA devices `CUDA_RULES`, is read in order; the first rule that takes
a node has it.

What every rule refuses takes the generic route through Relax, with the refusals as its reason.
"""

from __future__ import annotations

import onnx_ir as ir

from sparsec.lowering.rules.base import Context, Rule, Taken
from sparsec.lowering.rules.convolution import take_conv
from sparsec.lowering.rules.cuda_dense import DENSE_RULES
from sparsec.lowering.rules.cuda_sparse import SPARSE_RULES
from sparsec.lowering.rules.elementwise import take_activation, take_binary
from sparsec.lowering.rules.normalization import take_layernorm, take_softmax
from sparsec.lowering.rules.pooling import take_global_pool, take_pool
from sparsec.lowering.rules.product import take_gemm, take_matmul
from sparsec.lowering.rules.quantized_conv import take_quantized_conv
from sparsec.lowering.rules.quantized_elementwise import (
    take_dequantize,
    take_lookup,
    take_quantize,
    take_quantized_binary,
)
from sparsec.lowering.rules.quantized_moves import take_move
from sparsec.lowering.rules.quantized_pooling import take_integer_max, take_quantized_average
from sparsec.lowering.rules.quantized_product import take_quantized_product
from sparsec.lowering.rules.quantized_resize import take_quantized_resize
from sparsec.lowering.rules.views import take_concat, take_split, take_view

RULES: tuple[Rule, ...] = (
    take_view,
    take_split,
    take_concat,
    take_quantized_conv,
    take_quantized_product,
    take_integer_max,
    take_quantized_average,
    take_quantized_resize,
    take_move,
    take_lookup,
    take_quantized_binary,
    take_quantize,
    take_dequantize,
    take_conv,
    take_gemm,
    take_matmul,
    take_pool,
    take_global_pool,
    take_softmax,
    take_layernorm,
    take_binary,
    take_activation,
)

CUDA_RULES: tuple[Rule, ...] = (
    take_view,
    take_split,
    take_concat,
    *SPARSE_RULES,
    *DENSE_RULES,
)


def select(node: ir.Node, context: Context) -> Taken | str:
    """The first rule's binding of `node`, or why none takes it."""
    refusals = []
    for rule in RULES if context.gpu is None else CUDA_RULES:
        answer = rule(node, context)
        if isinstance(answer, Taken):
            return answer
        if answer:
            refusals.append(answer)
    return "; ".join(refusals) or f"no kernel of our own for {node.op_type}"
