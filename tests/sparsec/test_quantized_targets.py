"""Quantized models as artifacts for every instruction set of 8-bit sums: each proves itself against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from layers import DOT_CPUS, EMULATED_DOT_CPUS

import sparsec
from sparsec.artifact import Artifact
from sparsec.passes.quantize import Quantize
from tests.passes.conftest import parse, save
from tests.passes.quant_networks import calibrated, classifier, images


def compiled(model: onnx.ModelProto, cpu: str) -> Artifact:
    target = "arm" if cpu in EMULATED_DOT_CPUS else "host"
    return sparsec.compile(model, target, cpu=cpu, os="linux")


def quantized(made: ir.Model) -> onnx.ModelProto:
    Quantize(rounding="nearest", correct=False, fallback="none", outputs="int8")(made)
    made.meta.clear()
    return onnx.load_model_from_string(save(made))


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return quantized(classifier())


@pytest.mark.parametrize("cpu", DOT_CPUS)
def test_a_classifier(cpu: str, model: onnx.ModelProto) -> None:
    """Compiled without a word of float arithmetic in its layers, and equal to ONNX Runtime where it runs."""
    made = compiled(model, cpu)
    assert made.manifest["parity"]["passed"]
    kernels = {layer["op"]: layer["kernel"] for layer in made.report["layers"]}
    assert all("i8" in kernel or "int8" in kernel for op, kernel in kernels.items() if op.startswith(("Conv", "Gemm")))


def test_zeros_in_columns() -> None:
    """Blocks of 4 outputs x 1 input, which have no structure along the input: a form that reads rows one by one."""
    rng = np.random.default_rng(0)

    def f32(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))

    kept = (rng.random((16, 64, 1, 1)) < 0.15).repeat(4, 0)
    text = "g (float[1,3,12,12] x) => (float[1,64,12,12] y) { a = Conv<pads = [1, 1, 1, 1]>(x, w0) r = Relu(a) y = Conv(r, w1) }"
    model = parse(text, {"w0": f32(64, 3, 3, 3), "w1": f32(64, 64, 1, 1) * kept})
    made = compiled(quantized(calibrated(model, images())), DOT_CPUS[-1])
    assert made.manifest["parity"]["passed"]
    assert any("_i8_4x1" in layer["kernel"] for layer in made.report["layers"])
