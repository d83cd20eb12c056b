"""Elementwise layers between integers on the graph: what is fused, what is left, and ONNX Runtime on the same model."""

from __future__ import annotations

import numpy as np
import pytest
from programs import onnx_runtime, run_program
from quantized_models import check, feeds_of, graph, kernels

from sparsec.loading.load import load_model
from sparsec.lowering import lower
from sparsec.runtimes.emulated import find_emulator
from sparsec.targets import find_target, with_precision

CHAINS = {
    "sigmoid": "r = Sigmoid(x)",
    "hardswish": "r = HardSwish(x)",
    "clip": "r = Clip(x, zero, six)",
    "leaky relu": "r = LeakyRelu<alpha=0.1>(x)",
    "gelu": "r = Gelu(x)",
    "exp of a part": "a = Mul(x, half)  r = Exp(a)",
    "hardswish in parts": "a = Add(x, three)  b = Clip(a, zero, six)  c = Mul(x, b)  r = Mul(c, sixth)",
    "silu": "a = Sigmoid(x)  r = Mul(x, a)",
    "silu, quantized inside": "a = Sigmoid(x)  b = Q(a, u, o)  c = D(b, u, o)  r = Mul(x, c)",
    "two of one": "a = Relu(x)  b = Tanh(x)  r = Sub(a, b)",
    "a number divided": "a = Sub(half, x)  b = Abs(a)  c = Add(b, half)  r = Div(six, c)",
    "chosen": "a = Less(x, half)  b = Neg(x)  r = Where(a, b, x)",
    "itself twice": "r = Add(x, x)",
    "nothing but other numbers": "r = Identity(x)",
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_tables(name):
    model = graph("uint8[2,3,11,9] q", "int8[2,3,11,9] y", f"x = D(q, s, z)  {CHAINS[name]}  y = Q(r, t, n)")
    ((op, kernel),) = kernels(check(model, exact=True))
    assert kernel == "lookup_uint8"
    assert op.endswith("QuantizeLinear")


def test_a_table_past_reshapes():
    """Elements keep their order; an operator that broadcasts over itself does not end in as many."""
    chain = "x = D(q, s, z)  a = Exp(x)  b = Reshape(a, shape)  r = Tanh(b)  y = Q(r, t, n)"
    ((_, kernel),) = kernels(
        check(graph("uint8[5,7] q", "int8[7,5] y", chain, ", int64[2] shape = {7, 5}"), exact=True)
    )
    assert kernel == "lookup_uint8"
    square = "x = D(q, s, z)  b = Reshape(x, shape)  r = Add(x, b)  y = Q(r, t, n)"
    program = check(graph("uint8[5] q", "int8[5,5] y", square, ", int64[2] shape = {5, 1}"))
    assert not any(layer.kernel.startswith("lookup") for layer in program.layers)


def test_what_is_read_elsewhere_ends_a_table():
    model = graph(
        "int8[1,2,16,9] q", "uint8[1,2,16,9] y, uint8[1,2,16,9] b, float[1,2,16,9] r",
        "x = D(q, t, n)  a = Sigmoid(x)  b = Q(a, u, o)  c = D(b, u, o)  d = Mul(x, c)  y = Q(d, s, z)  e = Neg(x)  r = Exp(e)",
    )  # fmt: skip
    program = lower(load_model(model), find_target("host"))
    ops = {layer.op: layer.kernel.partition("_")[0] for layer in program.layers}
    assert ops["Sigmoid+QuantizeLinear"] == "lookup"  # b is an output
    assert ops["Mul+QuantizeLinear"] == "mul"
    assert ops["DequantizeLinear"] == "dequantize"  # once, for Neg; Sigmoid and Mul read past it


BINARY = {
    "same": ("uint8[2,3,8,9] a, int8[2,3,8,9] b", "Add"),
    "channel": ("uint8[2,3,8,9] a, int8[2,3,1,1] b", "Mul"),
    "wide side second": ("int8[5,1,1] b, uint8[2,5,8,9] a", "Sub"),
    "row": ("uint8[4,70] a, int8[70] b", "Sub"),
    "scalar": ("uint8[4,70] a, int8[1] b", "Div"),
    "quotients": ("int8[1] b, uint8[4,70] a", "Div"),
}


@pytest.mark.parametrize("activation", ["", "Relu"])
@pytest.mark.parametrize("name", BINARY)
def test_two_tensors(name, activation):
    inputs, op = BINARY[name]
    first, second = (part.split()[1] for part in inputs.split(", "))
    shape = next(part.split("[")[1].split("]")[0] for part in inputs.split(", ") if part.endswith(" a"))
    left, right = (f"x{first}", f"x{second}")
    nodes = f"xa = D(a, s, z)  xb = D(b, t, n)  c = {op}({left}, {right})"
    nodes += "  d = Relu(c)  y = Q(d, t, n)" if activation else "  y = Q(c, t, n)"
    ((fused, kernel),) = kernels(check(graph(inputs, f"int8[{shape}] y", nodes)))
    assert fused == "+".join([op, *([activation] if activation else []), "QuantizeLinear"])
    assert kernel.startswith(f"{op.lower()}_int8_")


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
def test_a_constant_side(op):
    """Integers or floats; those of a scale for each channel are floats."""
    integers = ", int8[6,1,1] k = {-128, -8, 0, 1, 90, 127}"
    floats = ", float[1,6,1,1] k = {-1.5, 3, 0.25, -0.01, 2, 7}"
    scaled = (
        ", int8[6,1] k = {-128, -8, 1, 1, 90, 127}, float[6] sk = {1, 2, 3, 1, 2, 3}, int8[6] zk = {0, 0, 0, 0, 0, 0}"
    )
    nodes = f"r = {op}(xa, xb)  y = Q(r, s, z)"
    for constants, b in (
        (integers, "xb = D(k, t, n)"),
        (floats, "xb = Identity(k)"),
        (scaled, "kd = D<axis=0>(k, sk, zk)  xb = Unsqueeze(kd, two)"),
    ):
        constants += ", int64[1] two = {2}" if "two" in b else ""
        text = f"xa = D(a, s, z)  {b}  {nodes}"
        found = kernels(check(graph("uint8[2,6,5,5] a", "uint8[2,6,5,5] y", text, constants)))
        assert found == [(f"{op}+QuantizeLinear", f"{op.lower()}_int8_channel")]
    swapped = f"xa = D(a, s, z)  r = {op}(k, xa)  y = Q(r, s, z)"
    ((_, kernel),) = kernels(check(graph("uint8[2,6,5,5] a", "uint8[2,6,5,5] y", swapped, floats)))
    assert kernel == f"{op.lower()}_int8_channel"


def test_sides_that_broadcast_over_each_other():
    nodes = "xa = D(a, s, z)  xb = D(b, s, z)  c = Add(xa, xb)  y = Q(c, s, z)"
    found = kernels(check(graph("uint8[2,1,33] a, uint8[2,4,1] b", "uint8[2,4,33] y", nodes)))
    assert found == [("Add+QuantizeLinear", "add_int8_outer")]


def test_a_computed_side_in_float():
    """Its other side is dequantized: two kernels more, and no generic one."""
    nodes = "xa = D(a, s, z)  c = Mul(xa, x)  y = Q(c, s, z)"
    found = kernels(check(graph("uint8[4,33] a, float[4,33] x", "uint8[4,33] y", nodes)))
    assert [name for name, _ in found] == ["DequantizeLinear", "Mul", "QuantizeLinear"]


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_into_and_out_of_integers(precision):
    """With f16, floats beside quantized layers are still quantized from, and made, in float32."""
    if precision == "f16" and not find_emulator():
        pytest.skip("no emulator of Arm, where float16 is")
    target = with_precision(find_target("arm" if precision == "f16" else "host"), precision)
    nodes = "q = Q(x, s, z)  y = D(q, s, z)  r = Tanh(y)"
    model = graph("float[1,3,37] x", "uint8[1,3,37] q, float[1,3,37] y, float[1,3,37] r", nodes)
    program = lower(load_model(model), target)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {name for name, _ in kernels(program)}
    feeds = feeds_of(model)
    expected, found = onnx_runtime(model.SerializeToString(), feeds), run_program(program, feeds)
    for name in "qy":
        np.testing.assert_array_equal(found[name], expected[name])
    np.testing.assert_allclose(found["r"], expected["r"], atol=2e-3 if precision == "f16" else 1e-6)


def test_a_scale_for_each_channel_stays_generic():
    constants = ", float[3] sc = {0.1, 0.2, 0.3}, uint8[3] zc = {0, 1, 2}"
    (layer,) = check(graph("float[1,3,37] x", "uint8[1,3,37] q", "q = Q<axis=1>(x, sc, zc)", constants)).layers
    assert layer.route == "generic"
    assert "one constant scale" in layer.reason


def test_constant_integers_are_constants_of_generic_layers():
    """Nothing writes their reals: they lie among the weights, which cannot be written."""
    nodes = "kd = D(k, t, n)  p = D(q, s, z)  a = Max(p, kd)  y = Q(a, s, z)  b = Min(x, kd)  c = Softmax(b)  d = Max(c, kd)"
    model = graph("uint8[2,3] q, float[2,3] x", "uint8[2,3] y, float[2,3] d", nodes, ", int8[3] k = {-100, 0, 99}")
    assert [layer.op for layer in check(model).layers].count("DequantizeLinear") == 1


def test_softmax_between_integers():
    """Softmax stays in float32, between kernels that quantize."""
    nodes = "x = D(q, s, z)  r = Softmax(x)  y = Q(r, u, o)"
    found = kernels(check(graph("uint8[5,77] q", "uint8[5,77] y", nodes)))
    assert [name for name, _ in found] == ["DequantizeLinear", "Softmax", "QuantizeLinear"]


def test_squeeze_and_excite():
    """The gate of a block: a table on one element a channel, then a product by channels."""
    nodes = """x = D(q, s, z)  g = D(p, t, n)  a = HardSigmoid(g)  b = Q(a, u, o)  c = D(b, u, o)  d = Mul(x, c)  y = Q(d, s, z)"""
    found = kernels(check(graph("uint8[1,20,7,7] q, int8[1,20,1,1] p", "uint8[1,20,7,7] y", nodes)))
    assert [kernel for _, kernel in found] == ["lookup_int8", "mul_int8_channel"]
