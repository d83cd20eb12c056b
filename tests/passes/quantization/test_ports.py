"""8-bit ports: which float inputs and outputs become them, that the model then computes the same, and what stays float."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from sparsec.loading.load import load_model, model_bytes
from sparsec.passes.quantization.ports import QuantizedPorts, port_quantization
from sparsec.ports import Quantization

IN, OUT = Quantization(0.0625, 100), Quantization(0.125, -3)
BOTH = "x8 = QuantizeLinear(x, s, z) xr = DequantizeLinear(x8, s, z)"
END = "y8 = QuantizeLinear(a, t, u) y = DequantizeLinear(y8, t, u)"


def load(
    text: str, inputs: str = "float[1,4,6,6] x", outputs: str = "float[1,4,6,6] y", **constants: object
) -> ir.Model:
    """A model of a graph's text; s, z and t, u are the quantizations IN and OUT."""
    head = '<ir_version: 10, opset_import: ["" : 21]>\n'
    model = onnx.parser.parse_model(f"{head}g ({inputs}) => ({outputs}) {{ {text} }}")
    given = {
        "s": np.float32(IN.scale),
        "z": np.uint8(IN.zero_point),
        "t": np.float32(OUT.scale),
        "u": np.int8(OUT.zero_point),
    }
    for name, array in {**given, **constants}.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return load_model(model)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = (
        ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    )  # some fusions do not load mixed types
    session = ort.InferenceSession(model_bytes(model), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def ports(model: ir.Model) -> dict[str, tuple[str, Quantization | None]]:
    return {v.name: (v.dtype.name, port_quantization(v)) for v in (*model.graph.inputs, *model.graph.outputs)}


GRAPHS = {
    "plain": f"{BOTH} a = Relu(xr) {END}",
    "moved": "m = Transpose<perm=[0,1,3,2]>(x) x8 = QuantizeLinear(m, s, z) xr = DequantizeLinear(x8, s, z) a = Relu(xr)"
    " y8 = QuantizeLinear(a, t, u) d = DequantizeLinear(y8, t, u) y = Transpose<perm=[0,2,3,1]>(d)",
    "two readers": f"{BOTH} w8 = QuantizeLinear(x, s, z) wr = DequantizeLinear(w8, s, z) r = Relu(xr) a = Add(r, wr) {END}",
    "read twice": f"{BOTH} a = Relu(xr) y8 = QuantizeLinear(a, t, u) d = DequantizeLinear(y8, t, u) y = Identity(d) e = Relu(d)"
    " f8 = QuantizeLinear(e, t, u) f = DequantizeLinear(f8, t, u)",
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_the_same_numbers_in_eight_bits(name: str) -> None:
    outputs = "float[1,4,6,6] y" + (", float[1,4,6,6] f" if name == "read twice" else "")
    if name == "moved":
        outputs = "float[1,6,6,4] y"
    model = load(GRAPHS[name], outputs=outputs)
    x = np.random.default_rng(0).standard_normal((1, 4, 6, 6)).astype("f") * 4
    before = run(model, {"x": x})
    assert QuantizedPorts()(model).modified
    for port, (dtype, meaning) in ports(model).items():
        assert (dtype, meaning) == (("UINT8", IN) if port == "x" else ("INT8", OUT))
    after = run(model, {"x": IN.quantize(x, "uint8")})
    for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(OUT.dequantize(a), b)
    assert {node.op_type for node in model.graph if node.op_type == "QuantizeLinear"} == {"QuantizeLinear"}
    assert not any(v.dtype == ir.DataType.FLOAT for v in (*model.graph.inputs, *model.graph.outputs))
    data = model_bytes(model)
    assert not QuantizedPorts()(model).modified
    assert model_bytes(model) == data


LEFT = {
    "a float reader": (f"{BOTH} r = Neg(x) a = Add(r, xr) {END}", ["x"], "input 'x' is read by Neg"),
    "two quantizations": (f"{BOTH} b8 = QuantizeLinear(x, t, u) b = DequantizeLinear(b8, t, u) a = Add(b, xr) {END}",
                          ["x"], "input 'x' is quantized in two ways"),
    "a scale a channel": ("x8 = QuantizeLinear<axis=1>(x, cs, cz) xr = DequantizeLinear<axis=1>(x8, cs, cz) a = Relu(xr) " + END,
                          ["x"], "input 'x' is read by QuantizeLinear"),
    "read as something else": (f"x8 = QuantizeLinear(x, s, z) xr = DequantizeLinear(x8, s2, z) a = Relu(xr) {END}",
                               ["x"], "input 'x' is quantized, but"),
    "a float end": (f"{BOTH} a = Relu(xr) y8 = QuantizeLinear(a, t, u) d = DequantizeLinear(y8, t, u) y = Softmax(d)",
                    ["y"], "output 'y' is made by Softmax"),
    "not made so": (f"{BOTH} a = Relu(xr) y8 = QuantizeLinear(a, t, u) y = DequantizeLinear(y8, s2, u)",
                    ["y"], "output 'y' is made by DequantizeLinear"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_stays_float_is_said(name: str) -> None:
    text, left, reason = LEFT[name]
    model = load(text, s2=np.float32(0.25), cs=np.full(4, 0.1, np.float32), cz=np.zeros(4, np.uint8))
    x = np.random.default_rng(0).standard_normal((1, 4, 6, 6)).astype("f")
    (before,) = run(model, {"x": x})
    from sparsec.rewriting.passes_api import META_KEY, Context

    context = model.meta.setdefault(META_KEY, Context())
    assert QuantizedPorts()(model).modified  # the other port
    assert [line for line in context.records[0]["float"] if reason in line]
    assert len(context.records[0]["float"]) == 1
    assert [port for port, (dtype, _) in ports(model).items() if dtype == "FLOAT"] == left
    feed = x if "x" in left else IN.quantize(x, "uint8")
    (after,) = run(model, {"x": feed})
    np.testing.assert_array_equal(after if "y" in left else OUT.dequantize(after), before)


def test_a_float_model_is_left_alone() -> None:
    model = load("y = Relu(x)")
    data = model_bytes(model)
    assert not QuantizedPorts()(model).modified
    assert model_bytes(model) == data


def test_ports_that_came_in_eight_bits_have_a_meaning() -> None:
    text = "xr = DequantizeLinear(x, s, z) a = Relu(xr) y = QuantizeLinear(a, t, u)"
    model = load(text, "uint8[1,4,6,6] x", "int8[1,4,6,6] y")
    assert ports(model) == {"x": ("UINT8", IN), "y": ("INT8", OUT)}
    assert ports(load("y = Cast<to=1>(x)", "uint8[1,4,6,6] x")) == {"x": ("UINT8", None), "y": ("FLOAT", None)}
