"""Passes that claim equal outputs, on quantized models: compared in quantization steps, not in units of float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sparsec.errors import CheckError
from sparsec.passes.quantization.quantize import Quantize
from sparsec.rewriting.passes_api import Pass, PassResult
from sparsec.rewriting.pipeline import check_equal, run_passes
from tests.passes.conftest import save
from tests.passes.quant_networks import classifier, images


@dataclass(frozen=True)
class Nudge(Pass):
    """Change the scales of weights by a factor: by a few units in the last place it is rounding, by more an error."""

    name: ClassVar[str] = "nudge"
    exact: ClassVar[bool] = True

    factor: float = 1.0

    def call(self, model: ir.Model) -> PassResult:
        for name, value in model.graph.initializers.items():
            if name.startswith("w") and name.endswith("_scale"):
                array = (value.const_value.numpy().astype(np.float64) * self.factor).astype(np.float32)
                value.const_value = ir.Tensor(array, name=name)
        return PassResult(model, True)


@pytest.fixture(scope="module")
def quantized() -> bytes:
    made = classifier()
    Quantize(rounding="nearest", correct=False, fallback="none", outputs="int8")(made)
    made.meta.clear()
    return save(made)


def nudged(data: bytes, factor: float) -> bytes:
    made = ir.from_proto(onnx.load_model_from_string(data))
    Nudge(factor)(made)
    return save(made)


def test_a_step_here_and_there_is_rounding(quantized: bytes) -> None:
    """Over many samples some element falls to the other side of a tie; float32's tolerance would not explain it."""
    other = nudged(quantized, 1 + 2.0**-20)
    errors = [check_equal(quantized, other, "nudge", images(1, seed)) for seed in range(8)]
    assert max(errors) < 0.1


def test_more_than_rounding_is_refused(quantized: bytes) -> None:
    with pytest.raises(CheckError, match="quantization step"):
        check_equal(quantized, nudged(quantized, 1.3), "nudge", images(1))


def test_in_the_pipeline(quantized: bytes) -> None:
    model = ir.from_proto(onnx.load_model_from_string(quantized))
    with pytest.raises(CheckError, match="pass nudge"):
        run_passes(model, [Nudge(1.3)], calibration=images(2))


def test_one_step_everywhere_is_refused(quantized: bytes) -> None:
    """Within a step each, but not at one element in a thousand: a shifted zero point."""
    model = ir.from_proto(onnx.load_model_from_string(quantized))
    last = model.graph.outputs[0].producer()
    scale = last.inputs[1]
    wide = ir.Value(name="wide", shape=ir.Shape([]), type=scale.type)
    wide.const_value = ir.Tensor(np.float32(scale.const_value.numpy() * 1.2), name="wide")
    model.graph.register_initializer(wide)
    last.replace_input_with(1, wide)
    with pytest.raises(CheckError, match="quantization step"):
        check_equal(quantized, save(model), "wide", images(1))
