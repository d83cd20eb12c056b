"""How far correct implementations of a quantized model may differ."""

from __future__ import annotations

import numpy as np
import onnx

from sparsec.proving.rounding import beyond, rounding

TEXT = """<ir_version: 10, opset_import: ["" : 21]> g (float[64] x) => (float[64] y) <float s = {0.05}, uint8 z = {0}, float one = {1}>
    { a = Abs(x) b = Add(a, one) q = QuantizeLinear(b, s, z) d = DequantizeLinear(q, s, z) e = Log(b) y = Min(d, e) }"""


def test_where_no_rounding_reaches_the_output_floats_may_differ() -> None:
    """log(b) < b: the quantized branch is never the smaller one, and a step of its own effect would be 0."""
    proto = onnx.parser.parse_model(TEXT)
    for i, node in enumerate(proto.graph.node):
        node.name = f"n{i}"
    law = rounding(proto.SerializeToString())
    assert law is not None
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    y = np.log(np.abs(x) + 1)
    step = law.step("y", {"x": x})
    assert 0 < step < 1e-5
    assert beyond(np.nextafter(y, np.float32(9)), y, step) == 0
    assert beyond(y + np.float32(1e-3), y, step) == 64
    assert step <= law.bounds({"x": x})["y"] < 1e-5
