"""Files whose nodes are in any order, and files that import no standard operators."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from sparsec.backend import Backend
from sparsec.errors import ModelError
from sparsec.limits import Limits
from sparsec.loading.load import load_model
from sparsec.loading.node_order import sort_nodes

HERE = Limits(isolate=0)


def text(nodes: list[str]) -> str:
    return f'<ir_version: 10, opset_import: ["": 21]> g (float[4] x) => (float[4] y) {{ {" ".join(nodes)} }}'


NODES = ["a = Relu(x)", "b = Neg(a)", "c = Add(a, b)", "d = Abs(x)", "y = Mul(c, d)"]


@settings(deadline=None)
@given(st.permutations(NODES))
def test_every_order_becomes_one_in_which_values_are_made_before_they_are_read(nodes: list[str]) -> None:
    model = onnx.parser.parse_model(text(nodes))
    sort_nodes(model.graph)
    onnx.checker.check_model(model)
    made = [node.output[0] for node in model.graph.node]
    assert sorted(made) == ["a", "b", "c", "d", "y"]


def test_a_sorted_graph_stays_as_it_is() -> None:
    model = onnx.parser.parse_model(text(NODES))
    before = model.SerializeToString()
    sort_nodes(model.graph)
    assert model.SerializeToString() == before


def test_graphs_inside_read_values_of_the_graph_around() -> None:
    inner = [
        helper.make_graph(
            [helper.make_node("Neg", [f"{n}/1"], [f"{n}/2"]), helper.make_node("Abs", ["late"], [f"{n}/1"])], n, [],
            [helper.make_tensor_value_info(f"{n}/2", TensorProto.FLOAT, [4])],
        )
        for n in ("then", "else")
    ]  # fmt: skip
    nodes = [
        helper.make_node("If", ["yes"], ["y"], then_branch=inner[0], else_branch=inner[1]),
        helper.make_node("Relu", ["x"], ["late"]),
        helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("t", TensorProto.BOOL, [], [1])),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xy"]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    x = np.array([-1, 2, -3, 4], np.float32)
    (y,) = Backend.prepare(model, limits=HERE).run([x])
    assert np.array_equal(y, -np.maximum(x, 0))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_cycle_is_refused(order: tuple[int, ...]) -> None:
    nodes = ["a = Add(x, y)", "y = Relu(a)"]
    with pytest.raises(ModelError, match="topologically sorted"):
        load_model(onnx.parser.parse_model(text([nodes[i] for i in order])), limits=HERE)


def test_operators_of_another_domain_alone() -> None:
    value = helper.make_tensor_value_info
    names = ["a", "as", "az", "b", "bs", "bz", "cs", "cz"]
    stored = [helper.make_tensor(n, TensorProto.FLOAT, [], [0.5]) for n in ("as", "bs", "cs")]
    stored += [helper.make_tensor(n, TensorProto.UINT8, [], [3]) for n in ("az", "bz", "cz")]
    graph = helper.make_graph(
        [helper.make_node("QLinearAdd", names, ["y"], domain="com.microsoft")], "g",
        [value(n, TensorProto.UINT8, [8]) for n in "ab"], [value("y", TensorProto.UINT8, [8])], stored,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("com.microsoft", 1)], ir_version=10)
    a, b = np.arange(8, dtype=np.uint8), np.full(8, 10, np.uint8)
    (y,) = Backend.prepare(model, limits=HERE).run([a, b])
    assert np.array_equal(y, a + 7)
