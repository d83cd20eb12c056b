"""Quantized models as artifacts for every instruction set of 8-bit sums: each proves itself against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from layers import DOT_CPUS, EMULATED_DOT_CPUS
from quantized_models import graph

import sparsec
from sparsec.artifact import Artifact
from sparsec.kernels.conv import Geometry
from sparsec.kernels.quantized import QuantType
from sparsec.lowering.rules.quantized_conv import price_quantized_conv
from sparsec.passes.quantization.quantize import Quantize
from sparsec.targets import find_target
from sparsec.tuner import make_trials
from tests.passes.conftest import save
from tests.passes.quant_networks import classifier


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
    kept = (rng.random((16, 64)) < 0.15).repeat(4, 0)
    w = np.where(kept, rng.integers(-127, 128, kept.shape), 0)
    numbers = ", ".join(map(str, w.reshape(-1)))
    model = graph(
        "uint8[1,64,12,12] x", "uint8[1,64,12,12] y",
        "a = D(x, s, z) b = D(w, f, i) c = Conv(a, b) r = Relu(c) y = Q(r, s, z)",
        f", int8[64,64,1,1] w = {{{numbers}}}, float f = {{0.004}}, int8 i = {{0}}",
    )  # fmt: skip
    made = compiled(model, DOT_CPUS[-1])
    assert made.manifest["parity"]["passed"]
    assert [layer["kernel"][:14] for layer in made.report["layers"]] == ["conv1x1_i8_4x1"]


def test_candidates_are_run_and_agree() -> None:
    """What `tune` does with a quantized layer: every stored form gives the same bytes, spread over their range."""
    rng, target = np.random.default_rng(1), find_target("host")
    w = rng.integers(-127, 128, (16, 12, 1, 1)) * (rng.random((4, 12, 1, 1)) < 0.5).repeat(4, 0)
    prices = price_quantized_conv(
        target.machine, Geometry((1, 12, 5, 7), w.shape), w.astype(np.int8), QuantType(0.02, 131)
    )
    best = {way.kernel: way for way in reversed(prices.ways)}
    trials = make_trials(prices, target, list(best.values()))
    y = trials[0]._stage.rooms["y"].array
    assert len(best) >= 8 and len(np.unique(y)) > 50
