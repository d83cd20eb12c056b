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
from sparsec.passes import PruneChannels
from sparsec.passes.channels.channel_choice import work
from sparsec.passes.channels.coupling import couple
from sparsec.passes.channels.cut import silence
from sparsec.rewriting.passes_api import Context
from sparsec.rewriting.pipeline import check_equal, run_passes
from tests.channel_networks import channel_networks

RNG = np.random.default_rng(13)
MODELS = Path(os.environ.get("SPARSEC_DATA", "/nonexistent")) / "models"


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def save(made: ir.Model) -> bytes:
    data = ir.to_proto(made).SerializeToString(deterministic=True)
    onnx.checker.check_model(data, full_check=True)
    return data


CHAIN = """g (float[1,3,6,6] x) => (float[1,5] y) {
    a = Conv(x, first, bias)
    r = Relu(a)
    d = Conv<group = 32, pads = [1, 1, 1, 1]>(r, depthwise)
    b = Conv(d, middle)
    s = Add(b, r)
    c = Conv<pads = [1, 1, 1, 1]>(s, wide)
    f = Flatten(c)
    h = Gemm<transB = 1>(f, hidden)
    k = Relu(h)
    y = MatMul(k, last)
}"""


def chain() -> dict[str, np.ndarray]:
    return {
        "first": f32(32, 3, 1, 1), "bias": f32(32), "depthwise": f32(32, 1, 3, 3), "middle": f32(32, 32, 1, 1),
        "wide": f32(24, 32, 3, 3), "hidden": f32(40, 24 * 36), "last": f32(40, 5),
    }  # fmt: skip


def stored(made: ir.Model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(v.const_value.shape) for name, v in made.graph.initializers.items()}


# ---- how much goes


@pytest.mark.parametrize("key", ["flops", "sparsity"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.7])
def test_the_asked_share_goes(model, key: str, share: float) -> None:
    made = model(CHAIN, **chain())
    before = work(made.graph)
    assert PruneChannels(**{key: share}, round_to=2)(made).modified
    save(made)
    after = work(made.graph)
    gone = 1 - (after.multiply_adds / before.multiply_adds if key == "flops" else after.weights / before.weights)
    assert share <= gone < share + 0.12  # the last bundle may be a large one
    record = Context.of(made).records[-1]
    assert record == {
        "multiply_adds": [before.multiply_adds, after.multiply_adds],
        "weights": [before.weights, after.weights],
    }


def test_counts_are_multiples_of_the_vector_width(model) -> None:
    made = model(CHAIN, **chain())
    PruneChannels(flops=0.4)(made)
    counts = [r["after"] for r in Context.of(made).records[:-1]]
    assert counts
    assert all(count % 8 == 0 for count in counts)
    shapes = stored(made)
    assert shapes["first"][0] == shapes["bias"][0] == shapes["depthwise"][0] == shapes["wide"][1] == shapes["middle"][1]


def test_target_gives_the_width(model) -> None:
    from sparsec.targets import find_target

    target = find_target("arm")
    made = model(CHAIN, **chain())
    _, records = run_passes(made, [PruneChannels(flops=0.3)], target=target)
    counts = [r["after"] for r in records[0]["details"][:-1]]
    assert all(count % target.machine.lanes == 0 for count in counts)
    assert any(count % 8 for count in counts)  # 4 lanes on Arm, not the default of 8


def test_multiply_adds_of_known_layers(model) -> None:
    made = model(CHAIN, **chain())
    sizes = [32 * 3 * 36, 32 * 9 * 36, 32 * 32 * 36, 24 * 32 * 9 * 36, 40 * 24 * 36, 40 * 5]
    assert work(made.graph).multiply_adds == sum(sizes)
    assert work(made.graph).weights == 32 * 3 + 32 * 9 + 32 * 32 + 24 * 32 * 9 + 40 * 24 * 36 + 40 * 5


# ---- which channels go


def test_unimportant_channels_go_first(model) -> None:
    parts = chain()
    weak = RNG.permutation(32)[:8]
    for name, axis in (("first", 0), ("middle", 0), ("middle", 1), ("wide", 1)):
        np.moveaxis(parts[name], axis, 0)[weak] *= np.float32(1e-3)
    made = model(CHAIN, **parts)
    PruneChannels(flops=0.05, round_to=8, include=("Conv_0",))(made)
    left = made.graph.initializers["bias"].const_value.numpy()
    np.testing.assert_array_equal(left, np.delete(parts["bias"], weak))


def test_calibration_counts_what_channels_carry(model) -> None:
    """Weights alike, inputs not: with data the channels that hardly ever fire go."""
    text = "g (float[1,4,3,3] x) => (float[1,2,3,3] y) { a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) }"
    weight = np.sign(f32(16, 4, 1, 1))
    quiet = np.arange(3, 11)
    bias = np.zeros(16, np.float32)
    bias[quiet] = -2.5
    parts = {"w": weight, "b": bias, "v": np.sign(f32(2, 16, 1, 1))}
    data = {"x": f32(16, 4, 3, 3)}
    made = model(text, **parts)
    run_passes(made, [PruneChannels(sparsity=0.4)], calibration=data)
    np.testing.assert_array_equal(made.graph.initializers["b"].const_value.numpy(), np.zeros(8))
    with pytest.raises(RecipeError, match="importance=activation needs calibration data"):
        PruneChannels(importance="activation")(model(text, **parts))


def test_masked_twin_of_what_was_chosen(model) -> None:
    """The pass cuts exactly what zero rows and columns would silence."""
    parts = chain()
    parts["bias"] = np.arange(32, dtype=np.float32) / 32
    whole, twin = model(CHAIN, **parts), model(CHAIN, **parts)
    PruneChannels(flops=0.4, include=("Conv_0",))(whole)
    left = whole.graph.initializers["bias"].const_value.numpy()
    removed = ~np.isin(parts["bias"], left)
    assert removed.any()
    (units,) = [c for c in couple(twin.graph, cut=True).free if c.producers[0].node.name == "Conv_0"]
    silence(twin.graph, [(units, removed)])
    assert check_equal(save(twin), save(whole), "twin") <= 1e-5


@settings(max_examples=60, deadline=None)
@given(proto=channel_networks(), flops=st.sampled_from([0.1, 0.3]), width=st.sampled_from([1, 2]))
def test_any_network_stays_valid(proto, flops: float, width: int) -> None:
    made = ir.from_proto(proto)
    before = work(made.graph).multiply_adds
    refusal = ""
    try:
        PruneChannels(flops=flops, round_to=width, floor=0.0)(made)
    except RecipeError as error:
        refusal = error.message
    assert not refusal or "at most" in refusal or "no class of channels" in refusal
    save(made)
    if not refusal:
        assert work(made.graph).multiply_adds <= (1 - flops) * before


def test_include_and_exclude_name_the_layers_that_make_channels(model) -> None:
    made = model(CHAIN, **chain())
    PruneChannels(sparsity=0.1, include=("Gemm_7",))(made)
    assert [r["channels of"] for r in Context.of(made).records[:-1]] == ["Gemm_7"]
    made = model(CHAIN, **chain())
    PruneChannels(sparsity=0.1, exclude=("Gemm_7", "Conv_0"))(made)
    assert [r["channels of"] for r in Context.of(made).records[:-1]] == ["Conv_5"]


REFUSED = {
    "too much": (
        PruneChannels(flops=0.9, floor=0.7),
        r"at most 0\.\d+ of the multiply-adds can be removed with floor=0.7",
    ),
    "nothing included": (
        PruneChannels(include=("fc",)),
        "no class of channels may be removed: 3 are not named by include=fc",
    ),
}


@pytest.mark.parametrize(("step", "text"), REFUSED.values(), ids=REFUSED)
def test_refusals(model, step: PruneChannels, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        step(model(CHAIN, **chain()))


def test_model_without_inner_channels_is_refused(model) -> None:
    with pytest.raises(RecipeError, match="is a graph input"):
        PruneChannels()(model("g (float[1,8,4,4] x) => (float[1,8,4,4] y) { y = Conv(x, w) }", w=f32(8, 8, 1, 1)))


BAD = {
    "share": ({"flops": 1.0}, "flops is a share from 0 to below 1"),
    "two": ({"flops": 0.5, "sparsity": 0.5}, "one of flops, sparsity and dead"),
    "dead and": ({"flops": 0.5, "dead": True}, "one of flops, sparsity and dead"),
    "width": ({"round_to": -8}, "round_to is a number of channels"),
    "importance": ({"importance": "random"}, "magnitude or activation"),
}


@pytest.mark.parametrize(("options", "text"), BAD.values(), ids=BAD)
def test_bad_options(options, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        PruneChannels(**options)


# ---- dead channels


def test_dead_channels_go_and_the_function_stays(model, rewrite) -> None:
    parts = chain()
    parts["bias"][:] = 0
    parts["first"][:12] = 0
    parts["middle"][:12] = 0  # both producers of the residual: 12 dead channels
    parts["wide"][:, 20:24] = 0  # nobody reads 20..23 but the depthwise, through it `middle`
    parts["middle"][:, 20:24] = 0
    parts["last"][4:12] = 0  # nobody reads these 8 of the hidden layer
    made = model(CHAIN, **parts)
    rewrite(made, PruneChannels(dead=True, round_to=1))
    shapes = stored(made)
    assert shapes["first"] == (16, 3, 1, 1)
    assert shapes["depthwise"] == (16, 1, 3, 3)
    assert shapes["last"] == (32, 5)
    assert shapes["wide"] == (24, 16, 3, 3)


def test_dead_counts_are_rounded_up(model, rewrite) -> None:
    parts = chain()
    parts["last"][:9] = 0
    made = model(CHAIN, **parts)
    rewrite(made, PruneChannels(dead=True))
    assert stored(made)["last"] == (32, 5)  # 31 of 40 live


CONSTANT = """g (float[1,3,4,4] x) => (float[1,4,2,2] y) {
    a = Conv(x, w, b)
    r = HardSwish(a)
    m = Mul(r, scale)
    y = Conv<pads = [PADS], strides = [2, 2]>(m, v)
}"""


@pytest.mark.parametrize("padded", [False, True])
def test_constant_channels_go_into_the_bias_unless_padding_shows_them(model, rewrite, padded: bool) -> None:
    parts = {
        "w": f32(8, 3, 1, 1),
        "b": f32(8),
        "scale": f32(1, 8, 1, 1),
        "v": f32(4, 8, 3, 3) if padded else f32(4, 8, 2, 2),
    }
    parts["w"][2:5] = 0
    parts["b"][2:4] = 1.5  # HardSwish makes 1.125 of it
    parts["b"][4] = 0
    made = model(CONSTANT.replace("PADS", "1, 1, 0, 0" if padded else "0, 0, 0, 0"), **parts)
    rewrite(made, PruneChannels(dead=True, round_to=1))
    assert stored(made)["w"][0] == (7 if padded else 5)
    assert len(made.graph[-1].inputs) == (2 if padded else 3)


def test_a_gate_keeps_zero_at_zero(model, rewrite) -> None:
    made = model(
        """g (float[1,3,4,4] x) => (float[1,2,4,4] y) {
            a = Conv(x, w)
            p = GlobalAveragePool(a)
            h = Conv(p, g)
            s = Sigmoid(h)
            m = Mul(a, s)
            y = Conv<pads = [1, 1, 1, 1]>(m, v)
        }""",
        w=np.where(np.arange(8)[:, None, None, None] < 3, 0, f32(8, 3, 1, 1)).astype(np.float32),
        g=f32(8, 8, 1, 1), v=f32(2, 8, 3, 3),
    )  # fmt: skip
    rewrite(made, PruneChannels(dead=True, round_to=1))
    assert stored(made)["w"][0] == 5


def test_a_channel_somebody_needs_stays(model) -> None:
    """Zero in one producer of a residual class only, and constant before a product without a bias."""
    parts = chain()
    parts["first"][:12] = 0
    parts["bias"][:12] = 0
    parts["hidden"][:4] = 0  # constant 0: may go; 8 lanes: 36 live are rounded up to 40
    made = model(CHAIN, **parts)
    before = save(made)
    assert not PruneChannels(dead=True)(made).modified
    assert save(made) == before


@settings(max_examples=80, deadline=None)
@given(proto=channel_networks(), seed=st.integers(0, 5))
def test_dead_channels_of_any_network(proto, seed: int) -> None:
    """Zero rows or columns at random: the function stays, whatever was found."""
    rng = np.random.default_rng(seed)
    made = ir.from_proto(proto)
    for units in couple(made.graph, cut=True).free:
        chosen = rng.random(units.size) < 0.5
        uses = units.producers if rng.integers(2) else units.consumers
        for use in uses:
            value = use.member.value
            array = value.const_value.numpy().copy()
            np.moveaxis(array, use.member.axis.axis, 0)[use.member.positions[chosen].ravel()] = 0
            value.const_value = ir.tensor(array, name=value.name)
    before = save(made)
    refusal = ""
    try:
        PruneChannels(dead=True, round_to=1)(made)
    except RecipeError as error:
        refusal = error.message
    after = save(made)
    if refusal:
        assert "no class of channels" in refusal
    else:
        check_equal(before, after, "prune-channels")


# ---- the zoo

ZOO = {
    "mobilenet_v1": {}, "mobilenet_v2": {}, "resnet18": {}, "resnet50": {"width": 0.125}, "squeezenet": {},
    "efficientnet_lite0": {},
}  # fmt: skip


def zoo(name: str) -> ir.Model:
    if name == "demo":
        return load_model(build("demo"))
    if name in ZOO:
        return load_model(build(name, **{"resolution": 64, "width": 0.25, "classes": 16, **ZOO[name]}))
    if not (MODELS / f"{name}.onnx").exists():
        pytest.skip("needs SPARSEC_DATA")
    more = {
        "nsnet2": {"shapes": {"input": (1, 20, 161)}},
        "silero_vad": {"shapes": {"input": (1, 576), "state": (2, 1, 128)}, "bind": {"sr": 16000}},
    }
    return load_model(MODELS / f"{name}.onnx", **more.get(name, {}))


TRAINED = (
    "dscnn_kws_mlperf_tiny", "kwt1_speech_commands", "mobilenetv2_torchvision", "nsnet2", "resnet20_cifar10",
    "silero_vad", "squeezenet1.1", "ultraface_RFB_320",
)  # fmt: skip


@pytest.mark.parametrize("name", [*ZOO, "demo", *TRAINED])
def test_cut_models_of_the_zoo_equal_their_masked_twins(name: str) -> None:
    whole, twin = zoo(name), zoo(name)
    original = work(whole.graph).multiply_adds
    step = PruneChannels(flops=0.02 if name == "silero_vad" else 0.25, round_to=4)
    removals = step.choose(twin, Context())
    assert removals
    silence(twin.graph, removals)
    step(whole)
    assert work(whole.graph).multiply_adds < original
    assert check_equal(save(twin), save(whole), "twin") <= 1e-5
