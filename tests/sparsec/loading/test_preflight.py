"""Everything that stands in the way, at once: names, reasons, remedies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import pytest

import sparsec
from sparsec.errors import UnsupportedError
from sparsec.loading.preflight import lacking, preflight
from sparsec.targets import find_target

HOST = find_target("host")


def parsed(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 19]> g {text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


BOXES = (
    "(float[1,8,4] boxes, float[1,2,8] scores, float[N,3,W] x) => (int64[k,3] chosen, float[N,3,W] y)"
    " { chosen = NonMaxSuppression(boxes, scores) y = Relu(x) }"
)
ROIS = (
    "(float[1,2,8,8] x, float[3,4] rois) => (float[3,2,1,1] a, float[3,2] d)"
    ' { a = RoiAlign<mode = "max">(x, rois, batch) d = Det(w) r = Relu(x) }'
)


@dataclass(frozen=True)
class Never(sparsec.Pass):
    """Fails when it is run."""

    name: ClassVar[str] = "never"

    def call(self, model):
        raise AssertionError("passes ran before the preflight")


def test_open_shapes_and_operators_without_lowering_are_said_together() -> None:
    with pytest.raises(UnsupportedError) as caught:
        preflight(parsed(BOXES), target=HOST)
    text = str(caught.value)
    assert "--shape x:" in text
    assert "NonMaxSuppression 'NonMaxSuppression_0'" in text
    assert "cut the model" in text
    assert len(caught.value.problems) == 2


def test_a_model_that_loads_is_tried_before_passes_run() -> None:
    model = parsed(ROIS, batch=np.zeros(3, np.int64), w=np.zeros((3, 2, 5, 5), np.float32))
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [3, 2, 5, 5]))
    del model.graph.initializer[1:]
    with pytest.raises(UnsupportedError) as caught:
        sparsec.compile(model, passes=[Never()], output="unused")
    text = str(caught.value)
    assert "RoiAlign" in text
    assert "Det" in text
    assert "5 x 5" in text


def test_nothing_in_the_way() -> None:
    model = parsed("(float[2,3] x) => (float[2,3] y) { t = Relu(x) y = Elu(t) }")
    assert [node.op_type for node in preflight(model, target=HOST).graph] == ["Relu", "Elu"]
    assert lacking(model) == []


def test_inspect_says_it_on_one_line(run, tmp_path) -> None:
    path = tmp_path / "boxes.onnx"
    onnx.save(parsed(BOXES), path)
    code, out, err = run("inspect", str(path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "NonMaxSuppression" in err
    assert "--shape x:" in err
