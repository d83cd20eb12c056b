"""Products whose weights the model stores as integers: which stay so, what they then take, and that nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from kept_weights import TYPES, product
from onnx import numpy_helper
from programs import agree

import sparsec
from sparsec.loading.load import load_model
from sparsec.lowering import lower
from sparsec.runtimes.emulated import find_emulator
from sparsec.targets import find_target


def layer(made: onnx.ModelProto, target: str = "host", cpu: str | None = None):
    """The one layer that it becomes."""
    (only,) = lower(load_model(made), find_target(target, cpu)).layers
    return only


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("block", "zeros"), [(32, False), (64, True), (0, False), (0, True)])
def test_integers_stay_and_agree(op, kind, block, zeros):
    made = product(kind=kind, block=block, zeros=zeros, op=op)
    found = layer(made)
    assert found.kernel.startswith(f"gemm_f32_w{kind[-1]}_")
    assert found.op == f"{op}+Add+Relu"
    assert "kept as integers" in found.reason
    assert {c.kernel for c in found.candidates} == {f"gemm_f32_w{kind[-1]}", "gemm_f32_dense"}
    agree(made)


@pytest.mark.parametrize("cpu", ["armv8.2-a", "cortex-a53"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_on_arm(cpu, kind):
    if find_emulator() is None:
        pytest.skip("no emulator for Arm")
    made = product(k=2048, n=96, kind=kind, block=64)  # as floats, more than a second cache holds
    target = find_target("arm", cpu)
    assert layer(made, "arm", cpu).kernel.startswith(f"gemm_f32_w{kind[-1]}_")
    agree(made, target)


def test_per_tensor():
    made = product(kind="int8", block=0, scales="one")
    assert layer(made).kernel.startswith("gemm_f32_w8_")
    agree(made)


@pytest.mark.parametrize(
    "options", [{"m": 256, "block": 16}, {"block": 0, "scales": "inputs", "kind": "int8"}, {"op": "Gemm", "alpha": 0.5}],
    ids=["many rows", "a scale for each input", "scaled"],
)  # fmt: skip
def test_weights_become_floats(options):
    made = product(**options)
    assert not layer(made).kernel.startswith("gemm_f32_w")
    agree(made)


def test_mostly_zero_integers_may_be_sparse_floats():
    made = product(k=512, n=512, kind="int8")
    (q,) = [t for t in made.graph.initializer if t.name == "q"]
    array = numpy_helper.to_array(q).reshape(512, 128, 4) * (np.random.default_rng(0).random((512, 128, 1)) < 0.02)
    q.CopyFrom(numpy_helper.from_array(array.reshape(512, 512).astype(np.int8), "q"))
    found = layer(made)
    assert found.kernel.startswith("fc_f32_")
    assert "as floats" in found.reason
    agree(made)


def test_weights_bin_shows_the_bytes():
    sizes = {}
    for kind in ("int8", "int4"):
        artifact = sparsec.compile(product(k=512, n=256, kind=kind, block=128), target="host")
        assert artifact.manifest["parity"]["passed"]
        sizes[kind] = artifact.bytes["weights"]
    weights, scales = 512 * 256, 512 // 128 * 256 * 4
    assert weights + scales < sizes["int8"] < weights + scales + 2048
    assert weights // 2 + scales < sizes["int4"] < weights // 2 + scales + 2048
