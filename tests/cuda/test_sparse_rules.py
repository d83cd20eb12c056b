"""Sparse and integer layers of whole models on CUDA devices: which kernel takes them and why, agreement with ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from kept_weights import product
from programs import agree, parse

from sparsec.loading.load import load_model
from sparsec.lowering import lower
from sparsec.program import MAX_ARGS
from sparsec.targets import find_target, with_precision

NETWORK = """
network (float[1, 128, 10, 12] x, float[64, 128, 1, 1] w0, float[64] w1, float[64, 64, 3, 3] w2, float[64, 64, 1, 1] w3,
         float[512, 7680] w4) => (float[1, 512] y) {
    a = Conv (x, w0, w1)
    b = Relu (a)
    c = Conv <pads = [1, 1, 1, 1]> (b, w2)
    d = Add (c, b)
    e = Relu (d)
    f = Conv (e, w3)
    g = Flatten (f)
    y = Gemm <transB = 1> (g, w4)
}
"""


def target(precision, arch="sm_87"):
    return with_precision(find_target("cuda", arch=arch), precision)


def in_blocks(made, name, rows, columns, density, pattern=None):
    """Zeros in blocks of outputs x inputs, in place; or by `pattern(weight)`."""
    (tensor,) = [tensor for tensor in made.graph.initializer if tensor.name == name]
    w = onnx.numpy_helper.to_array(tensor).copy()
    rng = np.random.default_rng(len(name))
    if pattern is None:
        keep = rng.random((-(-w.shape[0] // rows), -(-w.shape[1] // columns), *w.shape[2:])) < density
        w *= np.repeat(np.repeat(keep, rows, 0), columns, 1)[: w.shape[0], : w.shape[1]]
    else:
        w *= pattern(w)
    tensor.CopyFrom(onnx.numpy_helper.from_array(w, name))


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_a_network_in_blocks(precision):
    made = parse(NETWORK)
    for name, rows, columns in (("w0", 4, 1), ("w2", 32, 1), ("w4", 64, 8)):
        in_blocks(made, name, rows, columns, 0.1)
    for i, node in enumerate(made.graph.node):
        node.name = f"n{i}"
    program = agree(made, target(precision))
    found = {layer.name: layer for layer in program.layers if layer.route == "native" and layer.op != "Cast"}
    # Rows of 4 share their columns: tensor cores take them by 16, where like ones are gathered.
    low = {"f32": ("cuda_conv_f32_4x1", "cuda_conv_f32_16x1"), "f16": "cuda_conv_f16_16x1"}[precision]
    assert found["n0"].kernel.startswith(low)
    assert found["n2"].kernel.startswith((f"cuda_conv_{precision}_16x1_", f"cuda_conv_{precision}_32x1_"))
    assert found["n5"].kernel.startswith(f"cuda_conv_{precision}_1x1s11")  # no zeros: the dense rule's
    assert {found[name].op for name in ("n0", "n2")} == {"Conv+Relu", "Conv+Add+Relu"}
    for name in ("n0", "n2"):
        layer = found[name]
        assert round(layer.predicted_us, 3) == min(c.predicted_us for c in layer.candidates)
        assert {c.kernel for c in layer.candidates} >= ({"cuda_conv_f32_4x1"} if precision == "f32" else set())
        assert "dense" in layer.reason and layer.zeros > 0.8
        assert any(c.kernel.startswith(f"cuda_conv_{precision}, ") for c in layer.candidates)
    assert all(len(step.args) <= MAX_ARGS for step in program.steps)


def test_two_of_four():
    """Only float16 has sparse tensor cores."""
    text = """product (float[64, 512] x, float[512, 512] w0, float[512] w1) => (float[64, 512] y) {
        a = MatMul (x, w0)
        y = Add (a, w1)
    }"""
    made = parse(text)
    in_blocks(made, "w0", 0, 0, 0, lambda w: (np.arange(w.shape[0]) % 4 < 2)[:, None])
    names = {}
    for precision in ("f32", "f16"):
        (layer,) = [layer for layer in lower(load_model(made), target(precision)).layers if layer.op != "Cast"]
        names[precision] = {c.kernel.partition(",")[0] for c in layer.candidates}
        assert layer.structure.startswith("2:4") or "channels" in layer.structure
    assert "cuda_gemm_f16_2_4" in names["f16"] and not any("2_4" in name for name in names["f32"])


def test_below_break_even_dense_runs():
    text = """conv (float[1, 64, 14, 14] x, float[64, 64, 1, 1] w0) => (float[1, 64, 14, 14] y) {
        y = Conv (x, w0)
    }"""
    program = agree(parse(text, zeros=0.3), target("f16"))
    (layer,) = [layer for layer in program.layers if layer.op == "Conv"]
    assert "below break-even" in layer.reason
    assert layer.kernel.startswith("cuda_conv_f16_1x1s11")


@pytest.mark.parametrize("precision", ["f32", "f16"])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_integers_stay(kind, precision):
    made = product(m=2, k=256, n=96, kind=kind, block=64, zeros=True)
    program = agree(made, target(precision))
    (layer,) = [layer for layer in program.layers if layer.op != "Cast"]
    assert layer.kernel.startswith((f"cuda_matvec_{precision}_w{kind[-1]}_", f"cuda_parts_{precision}"))
    assert "kept as integers" in layer.reason
    assert layer.op == "MatMul+Add+Relu"


def test_groups_of_zeros_are_left_out():
    made = product(m=1, k=1024, n=256, kind="int4", block=32)
    (tensor,) = [tensor for tensor in made.graph.initializer if tensor.name == "q"]
    q = onnx.numpy_helper.to_array(tensor).astype(np.int8)
    q *= np.repeat(np.random.default_rng(0).random((32, 256)) < 0.3, 32, 0)
    tensor.CopyFrom(onnx.helper.make_tensor("q", onnx.TensorProto.INT4, q.shape, q.reshape(-1).tolist()))
    program = agree(made, target("f16"))
    (layer,) = [layer for layer in program.layers if layer.op != "Cast"]
    assert {c.kernel.partition(",")[0] for c in layer.candidates} >= {"cuda_matvec_f16_w4", "cuda_matvec_f16_w4_groups"}
    assert layer.kernel.startswith("cuda_matvec_f16_w4_groups")


def test_many_rows_become_floats():
    (layer,) = lower(load_model(product(m=64, block=16)), target("f32")).layers
    assert layer.kernel.startswith("cuda_gemm_f32_")
