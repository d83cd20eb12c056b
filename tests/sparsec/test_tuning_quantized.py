"""Tuning of quantized layers: candidates on integers agree to the bit, and what was measured is what compiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from kept_weights import product
from onnx import numpy_helper
from programs import HEAD
from quantized_models import CONSTANTS

import sparsec
from sparsec import tuner
from sparsec.errors import CheckError
from sparsec.kernels.quantized import QuantType
from sparsec.lowering.rules.quantized_product import price_quantized_product
from sparsec.targets import find_target


def network() -> onnx.ModelProto:
    """x -> Conv 3x3 -> Conv 1x1, 80% zero in 4x4 blocks -> Gemm, all in 8 bits."""
    model = onnx.parser.parse_model(HEAD + f"""g (float[1,16,10,10] x) => (float[1,24] y) {CONSTANTS}> {{
        a = QuantizeLinear(x, s, z) ar = DequantizeLinear(a, s, z)
        k1r = DequantizeLinear<axis=0>(k1, k1s, k1z) c = Conv<pads=[1,1,1,1]>(ar, k1r)
        d = QuantizeLinear(c, s, z) dr = DequantizeLinear(d, s, z)
        k2r = DequantizeLinear<axis=0>(k2, k2s, k2z) e = Conv(dr, k2r)
        f = QuantizeLinear(e, s, z) fr = DequantizeLinear(f, s, z)
        g = GlobalAveragePool(fr) h = Flatten(g)
        i = QuantizeLinear(h, u, o) ir = DequantizeLinear(i, u, o)
        k3r = DequantizeLinear<axis=0>(k3, k3s, k3z) y = Gemm<transB=1>(ir, k3r)
    }}""")  # fmt: skip
    rng = np.random.default_rng(0)
    for name, shape in (("k1", (32, 16, 3, 3)), ("k2", (64, 32, 1, 1)), ("k3", (24, 64))):
        w = rng.integers(-127, 128, shape)
        if name == "k2":
            w = w * (rng.permutation(16 * 8) < 26).reshape(16, 8).repeat(4, 0).repeat(4, 1)[:, :, None, None]
        scale = np.full(shape[0], 1 / (60 * np.sqrt(np.prod(shape[1:]))), np.float32)
        for key, array in ((name, w.astype(np.int8)), (f"{name}s", scale), (f"{name}z", np.zeros(shape[0], np.int8))):
            model.graph.initializer.append(numpy_helper.from_array(array, key))
    return model


def test_a_quantized_model_is_measured_and_compiles(tmp_path: Path) -> None:
    cache = tmp_path / "int8.json"
    tuned = tuner.tune(network(), cache=cache)
    found = {
        layer.entry.layer["op"] + "x".join(map(str, layer.entry.layer["w_shape"])): layer.entry
        for layer in tuned.layers
    }
    assert len(found) == 3
    assert all("_i8_" in c.kernel for entry in found.values() for c in entry.candidates)
    sparse = next(entry for key, entry in found.items() if "64x32" in key)
    assert {"gemm_i8_dense", "conv_i8_dense"} & {c.kernel for c in sparse.candidates}
    assert any(c.kernel.endswith("4x4") for c in sparse.candidates)
    artifact = sparsec.compile(network(), tuning=cache)
    assert sum("measured" in row["reason"] for row in artifact.report["layers"]) == 3
    assert not artifact.manifest["notes"]


def test_weights_kept_as_integers_are_measured(tmp_path: Path) -> None:
    made, cache = product(k=512, n=256, kind="int4", zeros=True), tmp_path / "kept.json"
    (layer,) = tuner.tune(made, cache=cache).layers
    assert {c.kernel for c in layer.entry.candidates} == {"gemm_f32_w4", "gemm_f32_dense"}
    assert layer.entry.layer["weights"] == ["int4", 32, True]
    (row,) = sparsec.compile(made, tuning=cache).report["layers"]
    assert row["kernel"].startswith(layer.entry.choice.kernel)
    assert row["reason"].count("measured") == 1
    assert "as floats" in row["reason"]
    other = product(k=512, n=256, kind="int8")  # another type of weights is another layer
    assert (
        sparsec.compile(other, tuning=cache).manifest["notes"][0].startswith("tuning: 1 of 1 layers were not measured")
    )


def test_a_kernel_that_is_off_by_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of integers are exact: the smallest difference between two ways is an error."""
    target = find_target("host")
    w = np.random.default_rng(0).integers(-127, 128, (32, 64)).astype(np.int8)
    prices = price_quantized_product(target.machine, 1, w, QuantType(0.1, 128))
    ways = tuner.shortlist(prices)[:2]
    tuner.make_trials(prices, target, ways)
    calls, wrong = prices.calls, ways[1]

    def broken(way):
        (call, bound), *rest = calls(way)
        if way is wrong:
            role = "multipliers" if "multipliers" in call.constants else "weights"
            call.constants[role] = (call.constants[role] * 1.5).astype(call.constants[role].dtype)
        return [(call, bound), *rest]

    object.__setattr__(prices, "calls", broken)
    with pytest.raises(CheckError, match="computes something else"):
        tuner.make_trials(prices, target, ways)
