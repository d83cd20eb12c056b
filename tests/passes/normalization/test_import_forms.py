"""Every way in which other tools write integers: loads, becomes the inner form, and computes what it did in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsec.errors import UnsupportedError
from sparsec.loading.load import load_model, model_bytes
from sparsec.passes.normalization.fold_constants import constant, quiet_session
from sparsec.passes.normalization.normalize_qdq import NormalizeQdq

RNG = np.random.default_rng(6)
TYPES = {np.dtype(np.float32): 1, np.dtype(np.uint8): 2, np.dtype(np.int8): 3, np.dtype(np.uint16): 4}
MICROSOFT = "com.microsoft"


class Builder:
    """A graph in the making; arrays become initializers."""

    def __init__(self, opset: int = 21) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.opset = opset

    def constant(self, array: Any, dtype: Any = None) -> str:
        name = f"k{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def __call__(self, op: str, *inputs: Any, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        made = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, names, made, f"{op}_{len(self.nodes)}", domain=domain, **attributes))
        return made[0] if outputs == 1 else made

    def model(
        self, y: str, shape: list[int], kind: int = TensorProto.FLOAT, x: tuple[int, ...] = (1, 4, 6, 6)
    ) -> bytes:
        info = helper.make_tensor_value_info
        self.nodes.append(helper.make_node("Identity", [y], ["y"], "result"))
        graph = helper.make_graph(self.nodes, "g", [info("x", 1, x)], [info("y", kind, shape)], self.weights)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def activation(kind: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point for normal numbers."""
    return np.float32(0.03), np.asarray(120 if kind == np.uint8 else -9, kind)


def integers(kind: Any, *shape: int) -> np.ndarray:
    return (
        RNG.integers(10, 246, shape).astype(np.uint8)
        if kind == np.uint8
        else RNG.integers(-127, 128, shape).astype(kind)
    )


def agrees(data: bytes, steps: float = 0.0, shape: tuple[int, ...] = (1, 4, 6, 6)) -> ir.Model:
    """The loaded model, which gives what ONNX Runtime gives for the file, up to `steps`."""
    loaded = load_model(data)
    after = model_bytes(loaded)
    onnx.checker.check_model(after, full_check=True)
    first, second = quiet_session(data), quiet_session(after)
    for seed in range(3):
        x = {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}
        a, b = (session.run(None, x)[0].astype(np.float64) for session in (first, second))
        assert np.abs(a - b).max() <= steps + 1e-5 * np.abs(a).max()
        assert np.abs(a).max() > 0
    assert not NormalizeQdq()(loaded).modified
    return loaded


def inner(model: ir.Model) -> list[ir.DataType]:
    """Types of stored weights; checks that nothing but the inner form is left."""
    kinds = []
    for node in model.graph:
        assert node.domain == ""
        assert not node.op_type.startswith("QLinear")
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert len(node.inputs) == 3
            kinds += [node.inputs[0].dtype] if node.inputs[0].const_value is not None else []
    return kinds


# ---- QDQ


@pytest.mark.parametrize("weight", [np.int8, np.uint8])
@pytest.mark.parametrize("kind", [np.int8, np.uint8])
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("opset", [13, 21])
def test_convolution_and_product(weight: Any, kind: Any, channels: bool, opset: int) -> None:
    g = Builder(opset)
    s, z = activation(kind)
    q = g("DequantizeLinear", g("QuantizeLinear", "x", s, z), s, z)
    scale = RNG.random(8).astype("f") * 0.01 + 0.005 if channels else np.float32(0.01)
    zero = np.full(np.shape(scale), 128 if weight == np.uint8 else 0, weight)
    axis = {"axis": 0} if channels else {}
    w = g("DequantizeLinear", integers(weight, 8, 4, 1, 1), scale, zero, **axis)
    b = g("DequantizeLinear", RNG.integers(-500, 500, 8).astype(np.int32), np.float32(s * scale), **axis)
    c = g("Relu", g("Conv", q, w, b))
    c = g("DequantizeLinear", g("QuantizeLinear", c, np.float32(0.05), z), np.float32(0.05), z)
    f = g("Reshape", c, np.array([36, 8]))
    v = g("DequantizeLinear", integers(weight, 8, 5), np.float32(0.01), zero.reshape(-1)[0])
    y = g("MatMul", f, v)
    loaded = agrees(g.model(y, [36, 5]), steps=1e-6)
    kinds = inner(loaded)
    assert set(kinds) == {ir.DataType.INT8, ir.DataType.INT32}


def test_zero_points_may_be_left_out() -> None:
    g = Builder()
    q = g("QuantizeLinear", "x", np.float32(0.05))
    d = g("DequantizeLinear", q, np.float32(0.05))
    w = g("DequantizeLinear", integers(np.int8, 3, 4, 1, 1), np.float32(0.01))
    loaded = agrees(g.model(g("Conv", d, w), [1, 3, 6, 6]))
    assert inner(loaded) == [ir.DataType.INT8]
    (quantize,) = [n for n in loaded.graph if n.op_type == "QuantizeLinear"]
    assert quantize.inputs[2].dtype == ir.DataType.UINT8


@pytest.mark.parametrize("kind", [np.uint16, np.int16])
def test_sixteen_bits_stay_as_they_are(kind: Any) -> None:
    """No kernel is of 16 bits: such a pair is an ordinary rounding between float operators."""
    g = Builder()
    s, z = np.float32(1e-4), np.asarray(30000 if kind == np.uint16 else 0, kind)
    d = g("DequantizeLinear", g("QuantizeLinear", "x", s, z), s, z)
    w = g("DequantizeLinear", integers(np.int8, 3, 4, 1, 1), np.float32(0.01), np.int8(0))
    loaded = agrees(g.model(g("Conv", d, w), [1, 3, 6, 6]))
    assert [n.op_type for n in loaded.graph].count("QuantizeLinear") == 1


def test_activations_with_a_scale_for_each_channel_stay_as_they_are() -> None:
    g = Builder()
    s, z = np.float32([0.1, 0.2, 0.3, 0.4]), np.uint8([100, 110, 120, 130])
    d = g("DequantizeLinear", g("QuantizeLinear", "x", s, z, axis=1), s, z, axis=1)
    w = g("DequantizeLinear", integers(np.int8, 3, 4, 1, 1), np.float32(0.01), np.int8(0))
    loaded = agrees(g.model(g("Conv", d, w), [1, 3, 6, 6]))
    (quantize,) = [n for n in loaded.graph if n.op_type == "QuantizeLinear"]
    assert constant(quantize.inputs[1]).shape == (4,)


def chain(between: Callable[[Builder, str], str], shape: list[int], ic: int = 4) -> bytes:
    """Q -> between, on stored integers -> DQ -> Conv -> Q -> DQ."""
    g = Builder()
    s, z = activation(np.uint8)
    d = g("DequantizeLinear", between(g, g("QuantizeLinear", "x", s, z)), s, z)
    w = g("DequantizeLinear", integers(np.int8, 8, ic, 1, 1), np.float32(0.01), np.int8(0))
    y = g("QuantizeLinear", g("Conv", d, w), np.float32(0.05), np.uint8(128))
    return g.model(g("DequantizeLinear", y, np.float32(0.05), np.uint8(128)), shape)


BETWEEN = {
    "Transpose": (lambda g, q: g("Transpose", q, perm=[0, 1, 3, 2]), [1, 8, 6, 6], 4),
    "Reshape": (lambda g, q: g("Reshape", q, np.array([1, 4, 9, 4])), [1, 8, 9, 4], 4),
    "Slice": (lambda g, q: g("Slice", q, np.array([1]), np.array([5]), np.array([2])), [1, 8, 4, 6], 4),
    "MaxPool": (lambda g, q: g("MaxPool", q, kernel_shape=[2, 2], strides=[2, 2]), [1, 8, 3, 3], 4),
    "DepthToSpace": (lambda g, q: g("DepthToSpace", q, blocksize=2), [1, 8, 12, 12], 1),
    "Pad": (
        lambda g, q: g("Pad", q, np.array([0, 0, 1, 1, 0, 0, 1, 1]), np.uint8(120)), [1, 8, 8, 8], 4
    ),  # 120 is the zero point
    "Pad with another value": (
        lambda g, q: g("Pad", q, np.array([0, 0, 1, 0, 0, 0, 0, 1]), np.uint8(7)), [1, 8, 7, 7], 4
    ),
    "two": (lambda g, q: g("Transpose", g("Reshape", q, np.array([1, 4, 4, 9])), perm=[0, 1, 3, 2]), [1, 8, 9, 4], 4),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_what_moves_stored_integers_is_written_over_real_ones(name: str) -> None:
    between, shape, ic = BETWEEN[name]
    loaded = agrees(chain(between, shape, ic), steps=0.0501)
    inner(loaded)
    for node in loaded.graph:
        if node.op_type not in ("DequantizeLinear", "QuantizeLinear"):
            assert all(x.dtype != ir.DataType.UINT8 for x in node.inputs if x is not None)


def test_padding_with_zero_becomes_the_convolution_s() -> None:
    g = Builder()
    s, z = activation(np.uint8)
    padded = g("Pad", "x", np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    d = g("DequantizeLinear", g("QuantizeLinear", padded, s, z), s, z)
    w = g("DequantizeLinear", integers(np.int8, 8, 4, 3, 3), np.float32(0.01), np.int8(0))
    loaded = agrees(g.model(g("Conv", d, w), [1, 8, 6, 6]))
    assert "Pad" not in [n.op_type for n in loaded.graph]
    (conv,) = [n for n in loaded.graph if n.op_type == "Conv"]
    assert list(conv.attributes.get_ints("pads")) == [1, 1, 1, 1]


def test_layout_changes_of_weights_are_done_once() -> None:
    g = Builder()
    s, z = activation(np.int8)
    d = g("DequantizeLinear", g("QuantizeLinear", g("Reshape", "x", np.array([36, 4])), s, z), s, z)
    scale = RNG.random(5).astype("f") * 0.01
    w = g("DequantizeLinear", integers(np.uint8, 5, 4), scale, np.full(5, 128, np.uint8), axis=0)
    loaded = agrees(g.model(g("MatMul", d, g("Transpose", w, perm=[1, 0])), [36, 5]))
    assert "Transpose" not in [n.op_type for n in loaded.graph]
    weight = next(n for n in loaded.graph if n.op_type == "DequantizeLinear" and n.inputs[0].const_value is not None)
    assert weight.inputs[0].shape == (4, 5)
    assert weight.attributes.get_int("axis", 1) == 1


# ---- operators that hold their quantization


def quantized_input(g: Builder, kind: Any) -> tuple[str, np.ndarray, np.ndarray]:
    s, z = activation(kind)
    return g("QuantizeLinear", "x", s, z), s, z


OUT = (np.float32(0.06),)


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize(
    ("op", "count", "attributes"),
    [
        ("QLinearAdd", 2, {}),
        ("QLinearMul", 2, {}),
        ("QLinearSigmoid", 1, {}),
        ("QLinearLeakyRelu", 1, {"alpha": 0.2}),
        ("QLinearAveragePool", 1, {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("QLinearGlobalAveragePool", 1, {"channels_last": 0}),
        ("QLinearSoftmax", 1, {"axis": -1, "opset": 13}),
        ("QLinearWhere", 2, {}),
    ],
)
def test_operators_of_onnx_runtime(op: str, count: int, attributes: dict, kind: Any) -> None:
    g = Builder()
    q, s, z = quantized_input(g, kind)
    other = g("QuantizeLinear", g("Relu", "x"), s, z)
    inputs = [q, s, z, *([other, s, z] if count == 2 else [])]
    if op == "QLinearWhere":
        inputs.insert(0, RNG.random((1, 4, 6, 6)) < 0.5)
    scale = np.float32(1 / 256) if op in ("QLinearSigmoid", "QLinearSoftmax") else OUT[0]
    zero = np.asarray(0 if kind == np.uint8 else -128, kind) if scale < 0.01 else z
    y = g(op, *inputs, scale, zero, domain=MICROSOFT, **attributes)
    shape = {"QLinearAveragePool": [1, 4, 3, 3], "QLinearGlobalAveragePool": [1, 4, 1, 1]}.get(op, [1, 4, 6, 6])
    loaded = agrees(g.model(g("DequantizeLinear", y, scale, zero), shape), steps=1.01 * float(scale))
    inner(loaded)


def test_mean_over_axes() -> None:
    """ONNX Runtime has no kernel of it on the CPU to compare with."""
    g = Builder()
    q, s, z = quantized_input(g, np.uint8)
    y = g("QLinearReduceMean", q, s, z, *OUT, z, domain=MICROSOFT, axes=[2, 3], keepdims=0)
    loaded = load_model(g.model(g("DequantizeLinear", y, *OUT, z), [1, 4]))
    inner(loaded)
    x = RNG.standard_normal((1, 4, 6, 6)).astype(np.float32)
    real = (np.clip(np.rint(x / s) + z, 0, 255) - z) * np.float64(s)
    expected = np.rint(real.mean(axis=(2, 3)) / OUT[0]) * OUT[0]
    got = quiet_session(model_bytes(loaded)).run(None, {"x": x})[0]
    assert np.abs(got - expected).max() <= 1.01 * OUT[0]


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_concat(kind: Any) -> None:
    g = Builder()
    q, s, z = quantized_input(g, kind)
    other = g("QuantizeLinear", "x", np.float32(0.05), z)
    y = g("QLinearConcat", OUT[0], z, q, s, z, other, np.float32(0.05), z, domain=MICROSOFT, axis=1)
    inner(agrees(g.model(g("DequantizeLinear", y, OUT[0], z), [1, 8, 6, 6]), steps=0.0601))


@pytest.mark.parametrize("weight", [np.uint8, np.int8])
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_convolution_and_product_of_onnx(weight: Any, channels: bool, bias: bool) -> None:
    g = Builder()
    q, s, z = quantized_input(g, np.uint8)
    scale = RNG.random(8).astype("f") * 0.01 + 0.002 if channels else np.float32(0.01)
    zero = np.full(np.shape(scale), 128 if weight == np.uint8 else 0, weight)
    more = [RNG.integers(-300, 300, 8).astype(np.int32)] if bias else []
    c = g(
        "QLinearConv", q, s, z, integers(weight, 8, 4, 3, 3), scale, zero, np.float32(0.1), np.uint8(125), *more,
        pads=[1] * 4,
    )  # fmt: skip
    f = g("Reshape", c, np.array([36, 8]))
    v = g(
        "QLinearMatMul", f, np.float32(0.1), np.uint8(125), integers(weight, 8, 5), np.float32(0.01),
        np.asarray(zero.reshape(-1)[0]), np.float32(0.2), np.uint8(128),
    )  # fmt: skip
    loaded = agrees(g.model(g("DequantizeLinear", v, np.float32(0.2), np.uint8(128)), [36, 5]), steps=0.2001)
    assert set(inner(loaded)) <= {ir.DataType.INT8, ir.DataType.INT32}


@pytest.mark.parametrize("results", ["float", "uint8"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_of_onnx_runtime(results: str, alpha: float, transposed: int) -> None:
    g = Builder()
    q, s, z = quantized_input(g, np.uint8)
    f = g("Reshape", q, np.array([36, 4]))
    w = integers(np.int8, 5, 4) if transposed else integers(np.int8, 4, 5)
    out = [np.float32(0.1), np.uint8(128)] if results == "uint8" else []
    bias = RNG.integers(-300, 300, 5).astype(np.int32)
    y = g(
        "QGemm", f, s, z, w, np.float32(0.01), np.int8(0), bias, *out, domain=MICROSOFT, alpha=alpha, transB=transposed
    )
    y = g("DequantizeLinear", y, *out) if out else y
    loaded = agrees(g.model(y, [36, 5]), steps=0.1001 if out else 1e-5)
    assert "Gemm" in [n.op_type for n in loaded.graph]
    inner(loaded)


# ---- integers without scales, dynamic scales


def test_convolution_of_integers() -> None:
    g = Builder()
    q, _, z = quantized_input(g, np.uint8)
    y = g("ConvInteger", q, integers(np.int8, 8, 4, 3, 3), z, np.int8(0), pads=[1] * 4)
    agrees(g.model(g("Cast", y, to=1), [1, 8, 6, 6]))


def test_product_of_integers_with_a_dynamic_scale() -> None:
    """What `quantize_dynamic` of ONNX Runtime writes."""
    g = Builder()
    f = g("Reshape", "x", np.array([36, 4]))
    q, s, z = g("DynamicQuantizeLinear", f, outputs=3)
    p = g("Cast", g("MatMulInteger", q, integers(np.int8, 4, 5), z, np.int8(0)), to=1)
    agrees(g.model(g("Mul", p, g("Mul", s, np.float32(0.01))), [36, 5]))


# ---- weight-only


def packed(q: np.ndarray, bits: int, block: int) -> np.ndarray:
    """[K, N] unsigned as MatMulNBits stores it: [N, blocks, block * bits / 8]."""
    k, n = q.shape
    wide = np.full((n, -(-k // block) * block), 1 << (bits - 1), np.uint8)
    wide[:, :k] = q.T
    if bits == 4:
        wide = wide[:, ::2] | (wide[:, 1::2] << 4)
    return wide.reshape(n, -(-k // block), -1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("k", [32, 48, 36])
def test_products_with_grouped_weights(bits: int, zeros: bool, k: int) -> None:
    g = Builder()
    n, block = 6, 16
    blocks = -(-k // block)
    f = g("Reshape", g("Slice", g("Reshape", "x", np.array([1, 144])), np.array([0]), np.array([k * 3]), np.array([1])),
          np.array([3, k]))  # fmt: skip
    q = RNG.integers(0, 1 << bits, (k, n)).astype(np.uint8)
    scale = (RNG.random((n, blocks)) * 0.02).astype(np.float32)
    inputs: list[Any] = [f, packed(q, bits, block), scale.reshape(-1)]
    zero = np.full((n, blocks), 1 << (bits - 1), np.uint8)
    if zeros:
        zero = RNG.integers(0, 1 << bits, (n, blocks)).astype(np.uint8)
        stored = np.concatenate([zero, np.zeros((n, blocks % 2), np.uint8)], axis=1)
        inputs.append((stored[:, ::2] | (stored[:, 1::2] << 4) if bits == 4 else zero).reshape(-1))
    y = g("MatMulNBits", *inputs, domain=MICROSOFT, K=k, N=n, bits=bits, block_size=block, accuracy_level=1)
    loaded = agrees(g.model(y, [3, n]), steps=1e-5)
    (weight,) = [node for node in loaded.graph if node.op_type == "DequantizeLinear"]
    assert weight.attributes.get_int("block_size", 0) == block
    assert weight.inputs[0].dtype == (ir.DataType.INT4 if bits == 4 else ir.DataType.INT8)
    got = constant(weight.inputs[0]).astype(int) - np.repeat(constant(weight.inputs[2]).astype(int), block, axis=0)[:k]
    np.testing.assert_array_equal(got, q.astype(int) - np.repeat(zero.T.astype(int), block, axis=0)[:k])


# ---- refusals


def one_line(data: bytes, match: str) -> None:
    with pytest.raises(UnsupportedError, match=match) as caught:
        load_model(data)
    assert "\n" not in caught.value.message


def test_what_has_no_standard_form_is_named() -> None:
    g = Builder()
    q, s, z = quantized_input(g, np.uint8)
    y = g("QLinearGlobalAveragePool", q, s, z, *OUT, z, domain=MICROSOFT, channels_last=1)
    one_line(g.model(g("DequantizeLinear", y, *OUT, z), [1, 1, 1, 6]), "QLinearGlobalAveragePool")
    g = Builder()
    q, s, z = quantized_input(g, np.uint8)
    y = g("QLinearSoftmax", q, s, z, *OUT, z, domain=MICROSOFT, axis=1, opset=11)
    one_line(g.model(g("DequantizeLinear", y, *OUT, z), [1, 4, 6, 6]), "QLinearSoftmax")


def test_grouped_weights_of_other_widths_are_named() -> None:
    g = Builder()
    f = g("Reshape", "x", np.array([9, 16]))
    y = g("MatMulNBits", f, RNG.integers(0, 255, (6, 1, 4)).astype(np.uint8), RNG.random(6).astype("f"),
          domain=MICROSOFT, K=16, N=6, bits=2, block_size=16)  # fmt: skip
    one_line(g.model(y, [9, 6]), "MatMulNBits")
