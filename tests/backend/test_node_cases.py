"""A share of ONNX's node tests against sparsec as a backend; `make test-backend` runs all of them."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
from backend.cases import Outcome, _nearer, collected, expected_failures, run, sample, unexpected
from onnx import TensorProto, helper

from sparsec.backend import Backend

PARTS = 4
SHARE = 1 if os.environ.get("SPARSEC_BACKEND") == "all" else 6


@pytest.mark.parametrize("part", range(PARTS))
def test_node_cases(part: int) -> None:
    assert not unexpected(run(sample(SHARE)[part::PARTS]), expected_failures())


def test_every_entry_names_a_case() -> None:
    assert not set(expected_failures()) - set(collected())


def test_what_the_file_does_not_say_is_found() -> None:
    outcomes = [
        Outcome("a", "Add", "pass"),
        Outcome("b", "Add", "refused", "no"),
        Outcome("c", "Add", "refused", "no"),
        Outcome("d", "Add", "rounding"),
        Outcome("e", "Add", "wrong", "1 is not 2"),
    ]
    problems = unexpected(outcomes, {"b": "known", "d": "known", "e": "known"})
    assert [problem.split()[0] for problem in problems] == ["c", "d", "e"]


def test_nearer_to_float64_is_needed_for_rounding() -> None:
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "x"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    case = SimpleNamespace(model=helper.make_model(graph), rtol=1e-6, atol=0)

    def nearer(ours: float, theirs: float) -> bool:
        x, y, z = (np.array([v], np.float32) for v in (3, theirs, ours))
        return _nearer(case, [x], [y], [z])

    assert nearer(9.001, 9.002)
    assert not nearer(9.002, 9.001)
    assert not nearer(np.nan, 9.001)
    assert not _nearer(case, [np.array([3], np.float32)], [np.array([9.1], np.float32)], [np.array([9.0])])


def test_a_backend_runs_what_it_prepared() -> None:
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4]), helper.make_tensor_value_info("shape", TensorProto.INT64, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b"])],
    )  # fmt: skip
    prepared = Backend.prepare(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    for shape in ([4, 2], [1, 8]):  # the second is compiled anew
        assert np.array_equal(prepared.run([x, np.array(shape)])[0], x.reshape(shape))
    assert np.array_equal(prepared.run({"x": x[:1], "shape": np.array([2, 2])})[0], x[:1].reshape(2, 2))
