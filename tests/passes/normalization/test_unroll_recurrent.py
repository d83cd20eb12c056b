"""GRU, LSTM and RNN written out: ONNX Runtime computes the same before and after."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from programs import onnx_runtime

from sparsec.errors import UnsupportedError
from sparsec.limits import Limits
from sparsec.loading.load import load_model, model_bytes
from sparsec.passes import UnrollRecurrent

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
STEPS, BATCH, INPUT, HIDDEN = 5, 2, 7, 6


def network(kind: str, peepholes: bool = False, **attributes: Any) -> onnx.ModelProto:
    """One recurrent node with every output and an initial state."""
    rng = np.random.default_rng(3)
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    rows = GATES[kind] * HIDDEN
    shapes = {"w": (directions, rows, INPUT), "r": (directions, rows, HIDDEN), "b": (directions, 2 * rows)}
    if peepholes:
        shapes["p"] = (directions, 3 * HIDDEN)
    weights = [
        numpy_helper.from_array((rng.standard_normal(s) / 2).astype(np.float32), name) for name, s in shapes.items()
    ]
    states = ["h", "c"] if kind == "LSTM" else ["h"]
    inputs = ["x", "w", "r", "b", "", *states, *(["p"] if peepholes else [])]
    outputs = ["y", "y_h", "y_c"][: 1 + len(states)]
    node = helper.make_node(kind, inputs, outputs, hidden_size=HIDDEN, name="cell", **attributes)
    given = [("x", (STEPS, BATCH, INPUT)), *((name, (directions, BATCH, HIDDEN)) for name in states)]
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in given],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(
    ("kind", "attributes"),
    [("RNN", {}), ("GRU", {}), ("GRU", {"linear_before_reset": 1}), ("LSTM", {}), ("LSTM", {"peepholes": True})],
)
def test_equals_onnx_runtime(kind: str, attributes: dict[str, Any], direction: str) -> None:
    model = network(kind, **attributes, direction=direction)
    loaded = load_model(model, shapes={"x": (STEPS, BATCH, INPUT)})
    assert not {node.op_type for node in loaded.graph} & set(GATES)
    rng = np.random.default_rng(1)
    feeds = {
        v.name: rng.standard_normal([d.dim_value for d in v.type.tensor_type.shape.dim]).astype(np.float32)
        for v in model.graph.input
    }
    before, after = onnx_runtime(model.SerializeToString(), feeds), onnx_runtime(model_bytes(loaded), feeds)
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=0, atol=2e-6, err_msg=name)


def test_a_longer_sequence_is_refused_with_what_to_do() -> None:
    with pytest.raises(
        UnsupportedError, match="sequence has 5 steps, at most 4 are written out; give --limit unroll=N"
    ):
        load_model(network("GRU"), limits=Limits(unroll=4))
    assert load_model(network("GRU"), limits=Limits(unroll=5))


def test_a_second_run_changes_nothing_and_other_nodes_are_left() -> None:
    proto = network("GRU")
    proto.opset_import[0].version = 21
    model = ir.from_proto(proto)
    assert UnrollRecurrent(steps=4)(model).modified is False
    assert UnrollRecurrent()(model).modified
    assert not UnrollRecurrent()(model).modified
