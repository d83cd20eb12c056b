from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsec.errors import RecipeError
from sparsec.passes import Prune
from sparsec.passes.layers import as_layer, block_sums, select_layers, weighted_layers
from sparsec.passes.normalization.fold_constants import quiet_session
from sparsec.passes.pruning.masks import Pattern, n_of_m_mask
from sparsec.passes.pruning.prune import prune_to
from sparsec.rewriting.pass_options import option_values
from sparsec.rewriting.passes_api import Context

RNG = np.random.default_rng(3)
CHAIN = """g (float[1,3,8,8] x) => (float[1,10] y) {
    a = Conv(x, first)
    d = Conv<group = 8, pads = [1, 1, 1, 1]>(a, depthwise)
    b = Conv<pads = [1, 1, 1, 1]>(d, middle)
    p = GlobalAveragePool(b)
    f = Flatten(p)
    h = Gemm(f, hidden)
    y = MatMul(h, last)
}"""


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def chain_weights() -> dict[str, np.ndarray]:
    return {
        "first": f32(8, 3, 1, 1), "depthwise": f32(8, 1, 3, 3), "middle": f32(12, 8, 3, 3), "hidden": f32(12, 16),
        "last": f32(16, 10),
    }  # fmt: skip


def weights(made: ir.Model) -> dict[str, np.ndarray]:
    return {layer.name: layer.read().copy() for layer in weighted_layers(made)}


def zero_share(arrays: list[np.ndarray]) -> float:
    return sum(int((a == 0).sum()) for a in arrays) / sum(a.size for a in arrays)


def test_first_convolution_depthwise_and_last_layer_stay_dense(model) -> None:
    made = model(CHAIN, **chain_weights())
    before = weights(made)
    assert Prune(sparsity=0.75)(made).modified
    after = weights(made)
    for name in ("Conv_0", "Conv_1", "MatMul_6"):
        np.testing.assert_array_equal(after[name], before[name])
    for name in ("Conv_2", "Gemm_5"):
        assert zero_share([after[name]]) == 0.75
        np.testing.assert_array_equal(after[name][after[name] != 0], before[name][after[name] != 0])
        assert np.abs(before[name][after[name] == 0]).max() <= np.abs(after[name][after[name] != 0]).min()


def test_record_counts_zeros_of_each_layer(model) -> None:
    made = model(CHAIN, **chain_weights())
    Prune(sparsity=0.5)(made)
    records = Context.of(made).records[-2:]
    assert records == [
        {"layer": "Conv_2", "weights": 864, "zeros": 432, "changed": True},
        {"layer": "Gemm_5", "weights": 192, "zeros": 96, "changed": True},
    ]


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("y = Gemm(x, w)", (7, 9)),
        ("y = Gemm<transB = 1>(x, w)", (9, 7)),
        ("y = MatMul(x, w)", (7, 9)),
        ("t = Transpose(x) y = MatMul(w, t)", (9, 7)),
    ],
)
def test_blocks_run_along_output_channels_however_the_matrix_is_stored(model, rewrite, text: str, shape) -> None:
    made = model(f"g (float[5,7] x) => (float[] y) {{ {text} }}", w=f32(*shape))
    step = Prune(sparsity=0.5, block="4x1", include=("*",))
    rewrite(made, step)
    (layer,) = weighted_layers(made)
    assert layer.shape == (9, 7, 1, 1)  # OC = 9 whichever way, so blocks are 4, 4 and 1 rows high
    nonzero = block_sums((layer.read() != 0).astype(int), 4, 1)
    sizes = block_sums(np.ones(layer.shape, int), 4, 1)
    assert ((nonzero == 0) | (nonzero == sizes)).all()
    assert abs(zero_share([layer.read()]) - 0.5) * layer.size <= 2


def test_ragged_blocks_are_ranked_by_their_mean(model) -> None:
    weight = np.ones((5, 2, 1, 1), np.float32)
    weight[4] = 2  # alone in its block: a small sum, but the largest weights
    weight[4, 1] = 0.5
    made = model("g (float[1,2,3,3] x) => (float[] y) { y = Conv(x, w) }", w=weight)
    Prune(sparsity=0.1, block="4x1", include=("*",))(made)
    (layer,) = weighted_layers(made)
    assert (layer.read() == 0).reshape(5, 2).tolist() == [[False, False]] * 4 + [[False, True]]


layers_strategy = st.lists(
    st.tuples(st.integers(1, 13), st.integers(1, 13), st.sampled_from([1, 3])), min_size=1, max_size=3
)


@settings(max_examples=60, deadline=None)
@example(shapes=[(1, 1, 1), (1, 1, 1)], rows=1, columns=1, sparsity=0.75, scope="layer", seed=0)
@given(
    shapes=layers_strategy,
    rows=st.sampled_from([1, 2, 4, 8]),
    columns=st.sampled_from([1, 2, 4]),
    sparsity=st.floats(0, 1),
    scope=st.sampled_from(["layer", "global"]),
    seed=st.integers(0, 9),
)
def test_zero_share_structure_and_idempotence(shapes, rows, columns, sparsity, scope, seed) -> None:
    rng = np.random.default_rng(seed)
    values, nodes, channels = [], [], 1
    x = ir.Value(name="x", shape=ir.Shape([1, shapes[0][1], 9, 9]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="g")
    for index, (oc, ic, k) in enumerate(shapes):
        array = rng.integers(1, 4, (oc, ic, k, k)).astype(np.float32)  # many ties
        tensor = ir.tensor(array, name=f"w{index}")
        value = ir.Value(name=f"w{index}", shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
        values.append(value)
        node = ir.node("Conv", [x, value], name=f"conv{index}")
        nodes.append(node)
        graph.append(node)
        channels += oc
    made = ir.Model(graph, ir_version=10)
    step = Prune(sparsity=sparsity, block=f"{rows}x{columns}", scope=scope, floor=0.0, include=("conv*",))
    step(made)
    pruned = [value.const_value.numpy().copy() for value in values]
    total = sum(p.size for p in pruned)
    largest = max(min(rows, p.shape[0]) * min(columns, p.shape[1]) for p in pruned)
    assert abs(sum(int((p == 0).sum()) for p in pruned) - sparsity * total) <= largest / 2 + 1e-6
    for p in pruned:
        nonzero = block_sums((p != 0).astype(int), rows, columns)
        assert ((nonzero == 0) | (nonzero == block_sums(np.ones(p.shape, int), rows, columns))).all()
    assert not step(made).modified
    for value, p in zip(values, pruned, strict=True):
        np.testing.assert_array_equal(value.const_value.numpy(), p)


@given(
    oc=st.integers(1, 5),
    ic=st.integers(1, 19),
    k=st.sampled_from([1, 3]),
    keep=st.integers(1, 3),
    more=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_n_of_m(oc: int, ic: int, k: int, keep: int, more: int) -> None:
    group = keep + more
    weight = np.random.default_rng(ic).integers(-3, 4, (oc, ic, k, k)).astype(np.float32)
    mask = n_of_m_mask(weight, keep, group)
    kept = np.where(mask, np.abs(weight), 0)
    for start in range(0, ic, group):
        part, chosen = np.abs(weight[:, start : start + group]), mask[:, start : start + group]
        assert (chosen.sum(axis=1) == min(keep, part.shape[1])).all()
        best = np.sort(part, axis=1)[:, ::-1][:, :keep].sum(axis=1)
        np.testing.assert_allclose(kept[:, start : start + group].sum(axis=1), best)


def test_n_of_m_pass(model, rewrite) -> None:
    made = model(CHAIN, **chain_weights())
    rewrite(made, Prune(nm="2:4"))
    arrays = weights(made)
    assert zero_share([arrays["Conv_2"]]) == 0.5
    counts = (arrays["Conv_2"] != 0).reshape(12, 2, 4, 3, 3).sum(axis=2)
    assert (counts == 2).all()


def test_global_scope_spends_zeros_where_weights_are_small_but_keeps_the_floor(model) -> None:
    parts = chain_weights()
    parts["hidden"] *= np.float32(1e-3)
    made = model(CHAIN, **parts)
    Prune(sparsity=0.5, scope="global", floor=0.125)(made)
    arrays = weights(made)
    assert zero_share([arrays["Gemm_5"]]) == 1 - 0.125
    assert abs(zero_share([arrays["Conv_2"], arrays["Gemm_5"]]) - 0.5) < 1e-9


def test_floor_that_contradicts_the_sparsity_is_refused(model) -> None:
    made = model(CHAIN, **chain_weights())
    with pytest.raises(RecipeError, match=r"floor=0.5 allows at most sparsity=0.500, got 0.9"):
        Prune(sparsity=0.9, scope="global", floor=0.5)(made)


def test_zeros_that_were_there_count(model) -> None:
    parts = chain_weights()
    parts["middle"].reshape(-1)[::10] = 0
    made = model(CHAIN, **parts)
    Prune(sparsity=0.5, block="4x1")(made)
    arrays = weights(made)
    assert abs(zero_share([arrays["Conv_2"], arrays["Gemm_5"]]) * 1056 - 528) <= 2


def test_scattered_zeros_instead_of_blocks_are_an_error_not_silence(model) -> None:
    made = model(CHAIN, **chain_weights())
    Prune(sparsity=0.8)(made)
    with pytest.raises(RecipeError, match=r"already, but 4x1 blocks hold only 0\.\d+ of the weights"):
        Prune(sparsity=0.8, block="4x1")(made)


def test_include_takes_first_and_last_and_exclude_wins(model) -> None:
    made = model(CHAIN, **chain_weights())
    assert [x.name for x in select_layers(made, include=("Conv_*", "MatMul_6"), exclude=("Conv_2",)).layers] == [
        "Conv_0",
        "MatMul_6",
    ]
    assert [x.name for x in select_layers(made, types=("Gemm",)).layers] == ["Gemm_5"]


def test_nothing_matched_says_why(model) -> None:
    made = model(CHAIN, **chain_weights())
    with pytest.raises(RecipeError) as caught:
        Prune(exclude=("Conv_2", "Gemm*"))(made)
    text = str(caught.value)
    assert text.startswith("0 of 5 layers matched: 2 are excluded by Conv_2+Gemm* (Conv_2, Gemm_5)")
    assert "1 are depthwise or grouped convolutions (Conv_1)" in text
    assert "\n" not in text
    with pytest.raises(RecipeError, match="0 of 0 layers matched"):
        Prune()(model("g (float[3] x) => (float[3] y) { y = Relu(x) }"))


def test_tied_weights_are_pruned_once(model) -> None:
    text = "g (float[4,6] x) => (float[4,6] y) { a = MatMul(x, w) b = Relu(a) c = MatMul(b, w) y = MatMul(c, v) }"
    made = model(text, w=f32(6, 6), v=f32(6, 6))
    Prune(sparsity=0.5)(made)
    assert len(Context.of(made).records) - 1 <= 2
    assert zero_share([made.graph.initializers["w"].const_value.numpy()]) == 0.5


@pytest.mark.parametrize(
    "reader", ["b = Relu(a) y = MatMul(b, w)", "t = Transpose(a) y = MatMul(w, t)", "y = Gather(w, i)"]
)
def test_weight_that_another_kind_of_reader_shares_is_left_alone(model, reader: str) -> None:
    extra = {"i": np.array([0, 1], np.int64)} if "Gather" in reader else {}
    made = model(f"g (float[6,6] x) => (float[] y) {{ a = MatMul(x, w) {reader} }}", w=f32(6, 6), **extra)
    with pytest.raises(RecipeError, match=r"0 of . layers matched"):
        Prune(sparsity=0.5, include=("MatMul_0",))(made)


MUST_NOT_MATCH = {
    "activations only": ("y = MatMul(x, x)", {}),
    "stack of matrices": ("y = MatMul(x, w)", {"w": f32(2, 6, 6)}),
    "integers": ("y = MatMul(i, w)", {"w": np.ones((6, 6), np.int32), "i": np.ones((6, 6), np.int32)}),
    "computed weight": ("w = Relu(x) y = Gemm(x, w)", {}),
}


@pytest.mark.parametrize(("body", "parts"), MUST_NOT_MATCH.values(), ids=MUST_NOT_MATCH)
def test_must_not_match(model, body: str, parts) -> None:
    made = model(f"g (float[6,6] x) => (float[] y) {{ {body} z = Relu(x) }}", **parts)
    assert not list(weighted_layers(made))
    assert all(isinstance(as_layer(node), str) for node in made.graph)


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3, 2, 3, 4)])
def test_one_and_three_dimensional_kernels(model, rewrite, shape) -> None:
    size = ",".join(["9"] * (len(shape) - 2))
    made = model(f"g (float[1,3,{size}] x) => (float[] y) {{ y = Conv(x, w) }}", w=f32(*shape))
    rewrite(made, Prune(sparsity=0.5, block="4x1", include=("*",)))
    stored = made.graph[0].inputs[1].const_value.numpy()
    assert stored.shape == shape
    assert set(np.unique((stored == 0).sum(axis=0))) == {0, 4}


BAD = {
    "sparsity": ({"sparsity": 1.5}, "share from 0 to 1"),
    "floor": ({"floor": -0.1}, "share from 0 to 1"),
    "block": ({"block": "4"}, "block must be RxC"),
    "empty block": ({"block": "0x4"}, "block must be RxC"),
    "nm": ({"nm": "4:2"}, "nm must be N:M"),
    "nm and block": ({"nm": "2:4", "block": "4x1"}, "without block and sparsity"),
    "nm and sparsity": ({"nm": "2:4", "sparsity": 0.8}, "without block and sparsity"),
    "scope": ({"scope": "net"}, "layer or global"),
    "types": ({"types": ("Conv", "LSTM")}, "types must be some of"),
}


@pytest.mark.parametrize(("options", "text"), BAD.values(), ids=BAD)
def test_bad_options(options, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        Prune(**options)


# ---- with calibration data

RESIDUAL = """g (float[1,3,8,8] x) => (float[1,10] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, first, b0)
    r = Relu(a)
    c = Conv(r, wide, b1)
    t = Relu(c)
    d = Conv<group = 24, pads = [1, 1, 1, 1]>(t, depthwise, b2)
    e = Conv(d, narrow, b3)
    s = Add(e, r)
    p = GlobalAveragePool(s)
    f = Flatten(p)
    y = Gemm(f, last)
}"""


def residual(model, zeros: str = "") -> ir.Model:
    rng = np.random.default_rng(17)
    shapes = {"first": (8, 3, 3, 3), "b0": (8,), "wide": (24, 8, 1, 1), "b1": (24,), "depthwise": (24, 1, 3, 3)}
    shapes |= {"b2": (24,), "narrow": (8, 24, 1, 1), "b3": (8,), "last": (8, 10)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) / 2 for name, shape in shapes.items()}
    for name in filter(None, zeros.split()):
        arrays[name][rng.random(arrays[name].shape) < 0.4] = 0
    return model(RESIDUAL, **arrays)


def photos(count: int = 32, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((count, 3, 4, 4)).repeat(2, axis=2).repeat(2, axis=3)
    return {"x": (coarse + 0.3 * rng.standard_normal((count, 3, 8, 8))).astype(np.float32)}


def calibrated(made: ir.Model, step: Prune, data: dict[str, np.ndarray] | None = None) -> tuple[bool, Context]:
    context = Context(calibration=photos() if data is None else data)
    made.meta["sparsec"] = context
    return step(made).modified, context


def distance(made: ir.Model, reference: ir.Model) -> float:
    fresh = photos(40, seed=2)["x"]
    sessions = [quiet_session(ir.to_proto(m).SerializeToString()) for m in (made, reference)]
    y, z = (np.concatenate([s.run(None, {"x": x[None]})[0] for x in fresh]) for s in sessions)
    return float(np.square(y - z).mean())


@pytest.mark.parametrize("options", [{"sparsity": 0.5, "block": "4x1"}, {"sparsity": 0.6}, {"nm": "2:4"}], ids=str)
def test_each_part_brings_the_outputs_closer_to_the_original(model, options) -> None:
    reference, errors = residual(model), {}
    ways = {
        "none": {"importance": "magnitude", "allocation": "uniform", "refit": "none"},
        "layer": {"allocation": "uniform", "refit": "layer"},
        "network": {"allocation": "uniform", "refit": "network"},
        "all": {},
    }
    for name, way in ways.items():
        made = residual(model)
        modified, context = calibrated(made, Prune(**options, **way))
        assert modified
        layers = select_layers(made).layers
        share = zero_share([layer.read() for layer in layers])
        assert share == pytest.approx(options.get("sparsity", 0.5), abs=0.02)
        if "block" in options:
            for layer in layers:
                alive = block_sums((layer.read() != 0).astype(int), 4, 1)
                assert set(np.unique(alive)) <= {0, 4}
        errors[name] = distance(made, reference)
        assert [r["layer"] for r in context.records if "layer" in r] == [layer.name for layer in layers]
    assert errors["network"] < errors["layer"] < 0.6 * errors["none"]
    assert errors["all"] < 1.2 * errors["layer"]


def test_repair_refits_layers_that_are_not_pruned(model) -> None:
    reference, both = residual(model), {}
    for repair in (True, False):
        made = residual(model)
        calibrated(made, Prune(sparsity=0.5, refit="network", repair=repair))
        before, after = weights(reference), weights(made)
        assert np.array_equal(before["Conv_4"], after["Conv_4"]) is not repair
        assert np.array_equal(before["Gemm_9"], after["Gemm_9"]) is not repair
        assert np.array_equal(before["Conv_0"], after["Conv_0"])
        both[repair] = distance(made, reference)
    assert both[True] < both[False]


@pytest.mark.parametrize("options", [{"sparsity": 0.5, "block": "4x1"}, {"sparsity": 0.3}, {"nm": "2:4"}], ids=str)
def test_a_second_run_with_calibration_changes_nothing(model, options) -> None:
    made = residual(model)
    assert calibrated(made, Prune(**options))[0]
    before = ir.to_proto(made).SerializeToString(deterministic=True)
    assert not calibrated(made, Prune(**options))[0]
    made.meta.clear()
    assert ir.to_proto(made).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("refit", ["layer", "network"])
def test_the_same_data_give_the_same_bytes(model, refit) -> None:
    made = [residual(model) for _ in range(2)]
    for one in made:
        calibrated(one, Prune(sparsity=0.5, refit=refit))
        one.meta.clear()
    first, second = (ir.to_proto(one).SerializeToString(deterministic=True) for one in made)
    assert first == second


def test_zeros_of_a_pruned_model_stay_and_accidental_ones_do_not_count(model) -> None:
    made = residual(model, zeros="wide narrow")
    before = weights(made)
    calibrated(made, Prune(sparsity=0.6))
    for name in ("Conv_2", "Conv_5"):
        assert not weights(made)[name][before[name] == 0].any()
    share = zero_share([weights(made)[name] for name in ("Conv_2", "Conv_5")])
    assert share == pytest.approx(0.6, abs=0.01)


def test_without_calibration_only_masks(model) -> None:
    made, reference = residual(model), residual(model)
    assert Prune(sparsity=0.5, block="4x1")(made).modified
    for name, array in weights(made).items():
        original = weights(reference)[name]
        np.testing.assert_array_equal(array[array != 0], original[array != 0])
    with pytest.raises(RecipeError, match="importance=second-order looks at activations and needs --calibration"):
        Prune(importance="second-order")(reference)
    with pytest.raises(RecipeError, match="allocation=sensitivity measures damage and needs --calibration"):
        Prune(allocation="sensitivity")(reference)


def test_sparsities_by_layer(model) -> None:
    made = residual(model)
    made.meta["sparsec"] = Context(calibration=photos())
    layers = select_layers(made).layers
    prune_to(made, layers, {"Conv_2": 0.25, "Conv_5": 0.75}, Pattern.parse("4x1"))
    assert [zero_share([layer.read()]) for layer in layers] == [0.25, 0.75]


def test_where_a_state_file_lies_is_not_recorded():
    assert "state" not in option_values(Prune(state="somewhere/state.json"))
    assert option_values(Prune(sparsity=0.25))["sparsity"] == 0.25
