"""Dense layers of whole models on CUDA devices: which kernel takes them, what is fused, agreement with ONNX Runtime, emulated."""

from __future__ import annotations

import pytest
from programs import agree, parse

from sparsec.loading.load import load_model
from sparsec.lowering import lower
from sparsec.targets import find_target, with_precision

NETWORK = """
network (float[2, 3, 20, 18] x, float[16, 3, 3, 3] w0, float[16] w1, float[16, 1, 3, 3] w2, float[16, 16, 1, 1] w3,
         float[16] w4, float[24, 8, 3, 3] w5, float[24, 24, 5, 4] w6, float[10, 24] w7, float[10] w8) => (float[2, 10] y) {
    a = Conv <pads = [1, 1, 1, 1], strides = [1, 1]> (x, w0, w1)
    b = Relu (a)
    c = Conv <pads = [1, 1, 1, 1], group = 16> (b, w2)
    d = Sigmoid (c)
    e = Mul (c, d)
    f = Conv (e, w3, w4)
    g = Add (f, b)
    h = Relu (g)
    i = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (h)
    j = Conv <pads = [1, 1, 1, 1], strides = [2, 2], group = 2> (i, w5)
    k = AveragePool <kernel_shape = [2, 2], pads = [0, 0, 1, 1]> (j)
    l = Conv (k, w6)
    m = GlobalAveragePool (l)
    n = Flatten (m)
    o = Gemm <transB = 1> (n, w7, w8)
    y = Softmax (o)
}
"""

ATTENTION = """
attention (float[2, 9, 32] x, float[32] w0, float[32] w1, float[32, 32] w2, float[32, 32] w3, float[32, 48] w4, float[48] w5)
        => (float[2, 9, 48] y) {
    a = LayerNormalization (x, w0, w1)
    q = MatMul (a, w2)
    k = MatMul (a, w3)
    t = Transpose <perm = [0, 2, 1]> (k)
    s = MatMul (q, t)
    scale = Constant <value_float = 0.25> ()
    u = Mul (s, scale)
    p = Softmax <axis = -1> (u)
    v = MatMul (p, a)
    z = MatMul (v, w4)
    z1 = Add (z, w5)
    y = Gelu (z1)
}
"""


def target(precision):
    return with_precision(find_target("cuda", arch="sm_90"), precision)


def kernels(program):
    return {layer.op: layer.kernel for layer in program.layers if layer.route == "native"}


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_a_network_of_convolutions(precision):
    found = kernels(agree(parse(NETWORK), target(precision)))
    families = {op: kernel.split(f"_{precision}")[0] for op, kernel in found.items() if op != "Cast"}
    assert families == {
        "Conv+Relu": "cuda_conv", "Conv+Sigmoid+Mul": "cuda_depthwise", "Conv+Add+Relu": "cuda_conv",
        "MaxPool": "cuda_maxpool", "Conv": families["Conv"], "AveragePool": "cuda_averagepool",
        "GlobalAveragePool": "cuda_globalaveragepool", "Gemm": "cuda_gemv", "Softmax": "cuda_softmax",
    }  # fmt: skip


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_attention(precision):
    found = kernels(agree(parse(ATTENTION), target(precision)))
    families = {op: kernel.split(f"_{precision}")[0] for op, kernel in found.items() if op != "Cast"}
    assert families.pop("MatMul") in ("cuda_gemm", "cuda_matmul")
    assert families == {
        "LayerNormalization": "cuda_layernorm", "Transpose+MatMul+Mul": "cuda_matmul", "Softmax": "cuda_softmax",
        "MatMul+Add+Gelu": "cuda_gemm",
    }  # fmt: skip


def test_few_tiles_are_split_and_priced():
    text = """split (float[1, 512, 7, 7] x, float[512, 512, 3, 3] w0) => (float[1, 512, 7, 7] y) {
        y = Conv <pads = [1, 1, 1, 1]> (x, w0)
    }"""
    program = lower(load_model(parse(text)), target("f32"))
    (layer,) = program.layers
    assert len(program.steps) == 2
    assert len(layer.candidates) > 3
    assert layer.predicted_us == min(candidate.predicted_us for candidate in layer.candidates)


def test_what_no_rule_takes_says_why():
    text = """inner (float[2, 3, 8] x, float[2, 3, 2, 8, 8] v, float[4, 3, 1, 3, 3] w0)
        => (float[2, 3, 8] y, float[2, 4, 2, 6, 6] z) {
        y = Softmax <axis = 1> (x)
        z = Conv (v, w0)
    }"""
    program = agree(parse(text), target("f32"))
    reasons = {layer.op: layer.reason for layer in program.layers}
    assert "inner axis" in reasons["Softmax"]
    assert "3-D" in reasons["Conv"]
