"""ONNX text in, ONNX Runtime before and after."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sparsec.passes.normalization.fold_constants import FoldConstants
from sparsec.rewriting.passes_api import Pass
from sparsec.rewriting.pipeline import check_equal


def parse(text: str, weights: dict[str, np.ndarray] | None = None) -> ir.Model:
    """A model from ONNX text; `weights` become initializers."""
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]> ' + text)
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return ir.from_proto(proto)


def save(model: ir.Model) -> bytes:
    """The model's file."""
    return ir.to_proto(model).SerializeToString(deterministic=True)


@pytest.fixture
def model() -> Callable[..., ir.Model]:
    """Build a model from text and give every value its shape."""

    def build(text: str, **weights: np.ndarray) -> ir.Model:
        made = parse(text, weights)
        FoldConstants()(made)
        return made

    return build


@pytest.fixture
def rewrite() -> Callable[[ir.Model, Pass], list[str]]:
    """Run a pass: valid ONNX after, equal outputs where claimed, nothing left for a second run; the operators left."""

    def run(made: ir.Model, step: Pass) -> list[str]:
        before = save(made)
        result = step(made)
        after = save(made)
        onnx.checker.check_model(after, full_check=True)
        assert result.modified == (after != before)
        if step.exact:
            check_equal(before, after, step.name)
        assert not step(made).modified
        assert save(made) == after
        return [node.op_type for node in made.graph]

    return run
