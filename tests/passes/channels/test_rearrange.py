from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.errors import RecipeError
from sparsec.loading.load import load_model
from sparsec.models import build
from sparsec.passes import Rearrange
from sparsec.passes.layers import block_sums, select_layers, weighted_layers
from sparsec.passes.pruning.masks import n_of_m_mask
from sparsec.rewriting.passes_api import Context
from sparsec.rewriting.pipeline import check_equal, run_passes
from tests.channel_networks import channel_networks

RNG = np.random.default_rng(11)
MODELS = Path(os.environ.get("SPARSEC_DATA", "/nonexistent")) / "models"


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


CHAIN = """g (float[1,3,6,6] x) => (float[1,5] y) {
    a = Conv(x, first, bias)
    r = Relu(a)
    d = Conv<group = 16, pads = [1, 1, 1, 1]>(r, depthwise)
    b = Conv(d, middle)
    s = Add(b, r)
    c = Conv<pads = [1, 1, 1, 1]>(s, wide)
    p = GlobalAveragePool(c)
    f = Flatten(p)
    h = Gemm<transB = 1>(f, hidden)
    y = MatMul(h, last)
}"""


def chain() -> dict[str, np.ndarray]:
    return {
        "first": f32(16, 3, 1, 1), "bias": f32(16), "depthwise": f32(16, 1, 3, 3), "middle": f32(16, 16, 1, 1),
        "wide": f32(24, 16, 3, 3), "hidden": f32(32, 24), "last": f32(32, 5),
    }  # fmt: skip


def kept(made: ir.Model, rows: int, columns: int, share: float = 0.5) -> float:
    """Share of sum w^2 in the blocks that stay, over the layers that prune takes."""
    stay = total = 0.0
    for layer in select_layers(made).layers:
        sums = block_sums(np.square(layer.read(), dtype=np.float64), rows, columns).ravel()
        stay += np.sort(sums)[::-1][: round(sums.size * share)].sum()
        total += sums.sum()
    return stay / total


def equal(made: ir.Model, step: Rearrange) -> float:
    before = ir.to_proto(made).SerializeToString()
    step(made)
    after = ir.to_proto(made).SerializeToString()
    onnx.checker.check_model(after, full_check=True)
    return check_equal(before, after, "rearrange")


@settings(max_examples=50, deadline=None)
@given(
    proto=channel_networks(),
    options=st.sampled_from([{"block": "4x1"}, {"block": "2x2"}, {"block": "1x2"}, {"nm": "2:4"}, {"nm": "1:2"}]),
)
def test_function_of_any_network_stays(proto, options) -> None:
    made = ir.from_proto(proto)
    refusal = ""
    try:
        equal(made, Rearrange(include=("*",), **options))
    except RecipeError as error:
        refusal = error.message
    assert not refusal or "layers matched" in refusal or "no channels that may move" in refusal


@pytest.mark.parametrize(
    "options", [{"block": "4x1"}, {"block": "8x1"}, {"block": "1x4"}, {"block": "4x4"}, {"block": "8x4"}], ids=str
)
def test_blocks_keep_more_and_the_function_stays(model, options) -> None:
    made = model(CHAIN, **chain())
    rows, columns = map(int, options["block"].split("x"))
    before = kept(made, rows, columns)
    assert equal(made, Rearrange(**options)) <= 1e-5
    assert kept(made, rows, columns) > before + 0.005
    record = Context.of(made).records[-1]
    assert record["after"] == pytest.approx(kept(made, rows, columns), abs=1e-4)
    assert record["before"] == pytest.approx(before, abs=1e-4)


def test_two_of_four_keeps_more(model) -> None:
    made = model(CHAIN, **chain())

    def share() -> float:
        weights = [np.square(layer.read()) for layer in select_layers(made).layers]
        return sum(w[n_of_m_mask(w, 2, 4)].sum() for w in weights) / sum(w.sum() for w in weights)

    before = share()
    assert equal(made, Rearrange(nm="2:4")) <= 1e-5
    assert share() > before + 0.005


def test_second_run_changes_nothing(model, rewrite) -> None:
    rewrite(model(CHAIN, **chain()), Rearrange())


def test_blocks_of_a_pruned_model_are_filled(model) -> None:
    """Block-sparse layers whose channels were shuffled get their blocks back."""
    parts = chain()
    for name in ("middle", "wide", "hidden"):
        w = parts[name]
        mask = np.repeat(RNG.random((w.shape[0] // 4, *w.shape[1:])) < 0.3, 4, axis=0)
        order = RNG.permutation(w.shape[0]) if name != "middle" else np.arange(w.shape[0])
        parts[name] = np.where(mask, w, 0).astype(np.float32)[order]
    made = model(CHAIN, **parts)

    def stored() -> int:
        return sum(int((block_sums((x.read() != 0).astype(int), 4, 1) > 0).sum()) for x in select_layers(made).layers)

    zeros = sum(int((x.read() == 0).sum()) for x in weighted_layers(made))
    before = stored()
    equal(made, Rearrange())
    record = Context.of(made).records[-1]
    assert record["objective"] == "stored"
    assert stored() < 0.7 * before
    assert sum(int((x.read() == 0).sum()) for x in weighted_layers(made)) == zeros
    full = sum(int((x.read() != 0).sum()) for x in select_layers(made).layers) / 4
    assert stored() <= 1.1 * full


def test_calibration_weighs_columns(model) -> None:
    """Inputs that are always nearly zero count nothing, however large their weights are."""
    parts = chain()
    parts["first"][:8] *= np.float32(1e-3)
    parts["bias"][:8] = 0
    data = {"x": RNG.standard_normal((8, 3, 6, 6)).astype(np.float32)}
    by_magnitude, by_activation = (model(CHAIN, **parts) for _ in range(2))
    run_passes(by_magnitude, [Rearrange(importance="magnitude")], calibration=data)
    _, records = run_passes(by_activation, [Rearrange()], calibration=data)
    assert records[0]["modified"]
    first, second = (ir.to_proto(m).SerializeToString(deterministic=True) for m in (by_magnitude, by_activation))
    assert first != second


def test_nothing_that_may_move_is_an_error(model) -> None:
    made = model("g (float[1,8,4,4] x) => (float[1,8,4,4] y) { y = Conv(x, w) }", w=f32(8, 8, 1, 1))
    with pytest.raises(RecipeError, match="no channels that may move belong to a matched layer: is a graph input"):
        Rearrange(include=("*",))(made)
    with pytest.raises(RecipeError, match="0 of 1 layers matched"):
        Rearrange()(made)
    with pytest.raises(RecipeError, match="importance=activation needs calibration data"):
        Rearrange(importance="activation")(model(CHAIN, **chain()))


BAD = {
    "sparsity": ({"sparsity": 1.0}, "share between 0 and 1"),
    "block": ({"block": "4"}, "rearrange: block must be RxC"),
    "nm": ({"nm": "4"}, "rearrange: nm must be N:M"),
    "no pattern": ({"block": "1x1"}, "no order is better than another"),
    "importance": ({"importance": "random"}, "magnitude or activation"),
    "objective": ({"objective": "speed"}, "auto, kept or stored"),
    "types": ({"types": ("LSTM",)}, "types must be some of"),
}


@pytest.mark.parametrize(("options", "text"), BAD.values(), ids=BAD)
def test_bad_options(options, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        Rearrange(**options)


@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "squeezenet", "resnet18", "efficientnet_lite0", "mobilenet_v1", "demo"]
)
def test_builders(name: str) -> None:
    made = load_model(build(name) if name == "demo" else build(name, resolution=64, width=0.25))
    before = kept(made, 4, 1)
    assert equal(made, Rearrange()) <= 1e-5
    assert kept(made, 4, 1) > before


# Share of the gap between 4x1 and row-wise unstructured at 50 % that the order must close.
GAPS = {"squeezenet1.1": 0.20, "resnet20_cifar10": 0.10, "mobilenetv2_torchvision": 0.20}


@pytest.mark.parametrize("name", GAPS)
def test_share_of_the_gap_closed_on_trained_models(name: str) -> None:
    if not (MODELS / f"{name}.onnx").exists():
        pytest.skip("needs SPARSEC_DATA")
    made = load_model(MODELS / f"{name}.onnx")
    before = kept(made, 4, 1)
    stay = total = 0.0
    for layer in select_layers(made).layers:
        rows = np.sort(np.square(layer.read(), dtype=np.float64).reshape(layer.shape[0], -1), axis=1)[:, ::-1]
        stay, total = stay + rows[:, : round(rows.shape[1] / 2)].sum(), total + rows.sum()
    assert equal(made, Rearrange()) <= 1e-5
    assert (kept(made, 4, 1) - before) / (stay / total - before) >= GAPS[name]
