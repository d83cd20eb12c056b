"""Whole models on CUDA devices, emulated: parity with ONNX Runtime, agreement with the same model on this CPU."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from programs import agree, feeds_of, run_program

from sparsec.loading.load import load_model
from sparsec.lowering import generic_share, lower
from sparsec.models import build
from sparsec.proving.tolerance import tolerances
from sparsec.targets import find_target, with_precision

CUDA = find_target("cuda", arch="sm_87")


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_the_demo_model_agrees_with_onnx_runtime(precision: str) -> None:
    program = agree(build("demo"), with_precision(CUDA, precision))
    assert all(kernel.launch is not None for kernel in program.kernels)
    assert generic_share(program) < 0.2


def test_the_same_model_for_host_and_cuda_agrees() -> None:
    model = build("demo")
    loaded, feeds = load_model(model), feeds_of(model)
    host, cuda = (run_program(lower(loaded, target), feeds) for target in (find_target("host"), CUDA))
    allowed = tolerances(loaded, CUDA)
    assert host.keys() == cuda.keys()
    for name, value in host.items():
        difference = np.abs(value.astype(np.float64) - cuda[name].astype(np.float64)).max()
        assert difference <= allowed[name] * np.abs(value).max(), name


@pytest.mark.skipif("SPARSEC_DATA" not in os.environ, reason="needs SPARSEC_DATA, the models outside the project")
def test_squeezenet_agrees_with_onnx_runtime() -> None:
    import onnx

    model = onnx.load(Path(os.environ["SPARSEC_DATA"]) / "models" / "squeezenet1.1.onnx")
    program = agree(model, CUDA, {"data": np.random.default_rng(0).random((1, 3, 224, 224), np.float32)})
    assert {layer.route for layer in program.layers if layer.op.startswith("Conv")} == {"native"}
    assert all(layer.route == "free" for layer in program.layers if layer.op == "Concat")
