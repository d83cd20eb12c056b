from __future__ import annotations

import types

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import sparsec
from sparsec.errors import RecipeError
from sparsec.passes import Factorize
from sparsec.passes.layers import as_layer, weighted_layers
from sparsec.passes.low_rank.decompositions import Spatial, Svd, Tucker
from sparsec.passes.low_rank.factors import Factors, refusal, replace
from sparsec.passes.low_rank.metric import Objective
from sparsec.passes.low_rank.rank_allocation import SLOWER, Way, Ways, dense_costs, uniform
from sparsec.passes.low_rank.residual_sparse import LowRankPlusSparse
from sparsec.passes.measure.statistics import gather
from sparsec.passes.measure.trial import fetch
from sparsec.passes.normalization.fold_constants import quiet_session
from sparsec.rewriting.passes_api import Context

RNG = np.random.default_rng(7)
EXACT = 1e-5
NET = """g (float[1,4,9,10] x) => (float[1,9,6] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, first)
    b = Conv<pads = [1, 1, 1, 1]>(a, wide, wide_b)
    r = Relu(b)
    c = Conv(r, narrow, narrow_b)
    p = ReduceMean<keepdims = 0>(c, axes)
    h = MatMul(p, hidden)
    i = Add(h, hidden_b)
    j = Relu(i)
    y = MatMul(j, last)
}"""


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def decaying(*shape: int) -> np.ndarray:
    """A weight whose singular values fall like 1/2^i, so that a few of them say most."""
    oc = shape[0]
    u, s, v = np.linalg.svd(RNG.standard_normal((oc, int(np.prod(shape[1:])))), full_matrices=False)
    return (u * s * 0.5 ** np.arange(len(s)) @ v).reshape(shape).astype(np.float32)


@pytest.fixture
def net(model) -> ir.Model:
    """Convolutions, then products over rows of 10."""
    return model(
        NET, first=f32(8, 4, 3, 3), wide=decaying(24, 8, 3, 3), wide_b=f32(24), narrow=decaying(16, 24, 1, 1),
        narrow_b=f32(16), axes=np.array([1], np.int64), hidden=decaying(10, 20), hidden_b=f32(20), last=f32(20, 6),
    )  # fmt: skip


def samples(count: int = 24, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.standard_normal((4, 1, 1)))
    return {"x": (rng.standard_normal((count, 4, 9, 10)) * scale + 0.5).astype(np.float32)}


def run(made: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    proto = ir.to_proto(made)
    onnx.checker.check_model(proto, full_check=True)
    session = quiet_session(proto.SerializeToString())
    (name,) = feeds
    return np.stack([session.run(None, {name: sample[None]})[0] for sample in feeds[name]])


def error(reference: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(reference - other).max() / np.abs(reference).max())


def layer(made: ir.Model, name: str):
    return next(found for found in weighted_layers(made) if found.name == name)


# ---- nodes

CONVS = [
    ("", (6, 5, 3, 3), [1, 5, 9, 11]),
    ("<strides = [2, 3], pads = [1, 0, 2, 1]>", (6, 5, 3, 2), [1, 5, 9, 11]),
    ("<dilations = [2, 1], pads = [2, 1, 2, 1]>", (6, 5, 3, 3), [1, 5, 9, 11]),
    ("<strides = [2, 2]>", (6, 5, 1, 1), [1, 5, 9, 11]),
    ("<strides = [2], pads = [1, 2]>", (6, 5, 3), [1, 5, 11]),
    ("<pads = [1, 0, 1, 0]>", (6, 5, 3, 1), [1, 5, 9, 11]),
]


def every_form(shape: tuple[int, int, int, int]) -> list[Factors]:
    oc, ic, kh, kw = shape
    forms = [Svd(min(oc, ic * kh * kw)), LowRankPlusSparse(Svd(2), 1.0)]
    if kh * kw > 1:
        forms += [Spatial(min(ic * kh, oc * kw)), Tucker(ic, oc)]
    return forms


@pytest.mark.parametrize(("attributes", "weight", "shape"), CONVS)
def test_a_convolution_in_every_form_of_full_rank_is_itself(model, attributes, weight, shape) -> None:
    text = f"g (float{shape} x) => (float[] y) {{ y = Conv{attributes}(x, w, b) }}"
    constants = {"w": f32(*weight), "b": f32(6)}
    x = {"x": f32(2, *shape[1:])}
    reference = run(model(text, **constants), x)
    for form in every_form(layer(model(text, **constants), "Conv_0").shape):
        made = model(text, **constants)
        found = layer(made, "Conv_0")
        nodes = replace(made, found, form.build(Objective(found.read())).rounded(np.dtype(np.float32)))
        shapes = [tuple(node.outputs[0].shape.numpy()) for node in nodes]
        assert error(reference, run(made, x)) <= EXACT, form
        inferred = onnx.shape_inference.infer_shapes(ir.to_proto(made), strict_mode=True).graph.value_info
        known = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in inferred}
        assert all(
            known.get(n.outputs[0].name, s) == s for n, s in zip(nodes, shapes, strict=True)
        )  # what we say of shapes is what ONNX infers


PRODUCTS = [
    ("Gemm(x, w, b)", [3, 7], (7, 5), "b"),
    ("Gemm<transB = 1>(x, w)", [3, 7], (5, 7), ""),
    ("MatMul(x, w)", [2, 3, 7], (7, 5), ""),
    ("MatMul(x, w)", [3, 7], (1, 7, 5), ""),
    ("MatMul(w, x)", [2, 7, 3], (5, 7), ""),
]


@pytest.mark.parametrize(("op", "shape", "weight", "bias"), PRODUCTS)
def test_a_product_in_every_form_of_full_rank_is_itself(model, op, shape, weight, bias) -> None:
    text = f"g (float{shape} x) => (float[] y) {{ y = {op} }}"
    constants = {"w": f32(*weight)} | ({"b": f32(5)} if bias else {})
    x = {"x": f32(2, *shape)}

    def each(made: ir.Model) -> np.ndarray:
        session = quiet_session(ir.to_proto(made).SerializeToString())
        return np.stack([session.run(None, {"x": sample})[0] for sample in x["x"]])

    reference = each(model(text, **constants))
    for form in every_form((5, 7, 1, 1)):
        made = model(text, **constants)
        found = next(weighted_layers(made))
        nodes = replace(made, found, form.build(Objective(found.read())).rounded(np.dtype(np.float32)))
        assert error(reference, each(made)) <= EXACT
        assert "w" not in made.graph.initializers
        assert made.graph.outputs[0].name == "y"
        assert [n.name.split("/")[1] for n in nodes] == ["v", "u", *(["s", "sum"] if len(nodes) == 4 else [])]


def test_the_first_factor_has_no_bias_and_names_derive_from_the_layer(net) -> None:
    Factorize(rank=3, include=("Conv_1",))(net)
    names = [node.name for node in net.graph]
    assert "Conv_1" not in names
    v, u = (next(node for node in net.graph if node.name == name) for name in ("Conv_1/v", "Conv_1/u"))
    assert len(v.inputs) == 2
    assert u.inputs[2].name == "wide_b"  # the bias of the layer
    assert u.outputs[0].name == "b"
    assert {"Conv_1/v/weight", "Conv_1/u/weight"} <= set(net.graph.initializers)


# ---- the pass


def test_parameters_hold_for_the_whole_model(net) -> None:
    before = sum(found.size for found in weighted_layers(net))
    Factorize(parameters=0.7, multiple=1)(net)
    after = sum(found.size for found in weighted_layers(net))
    assert 0.55 * before < after <= 0.7 * before


@pytest.mark.parametrize("sequential", [False, True])
def test_calibrated_factors_lose_less_on_other_data(model, sequential) -> None:
    """Inputs of very different sizes, which weights alone do not show."""
    text = "g (float[1,30,12] x) => (float[1,30,8] y) { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }"
    weights = {"a": f32(12, 16), "b": f32(16, 8)}
    sizes = np.exp(1.5 * RNG.standard_normal(12))
    data, other = ({"x": f32(20, 30, 12) * sizes.astype(np.float32)} for _ in range(2))
    reference = run(model(text, **weights), other)
    errors = {}
    for method in ("plain", "whitened"):
        made = model(text, **weights)
        made.meta["sparsec"] = Context(data)
        Factorize(rank=4, include=("*",), method=method, sequential=sequential)(made)
        errors[method] = float(np.square(run(made, other) - reference).sum())
    assert errors["whitened"] < 0.7 * errors["plain"]


def test_the_bias_takes_up_the_mean(net) -> None:
    data = samples()
    reference = run_value(net, data, "i")
    made = net.clone()
    made.meta["sparsec"] = Context(data)
    Factorize(rank=2, include=("MatMul_5",))(made)
    after = run_value(made, data, "i")
    assert np.abs(after - reference).max() > 1e-2  # something was lost
    np.testing.assert_allclose(after.mean(axis=(0, 1, 2)), reference.mean(axis=(0, 1, 2)), atol=1e-4)


def run_value(made: ir.Model, feeds: dict[str, np.ndarray], name: str) -> np.ndarray:
    proto = ir.to_proto(made)
    proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = quiet_session(proto.SerializeToString())
    return np.stack([session.run([name], {"x": sample[None]})[0] for sample in feeds["x"]])


def test_uniform_spends_the_budget_and_never_more() -> None:
    def ways(name: str, *costs: float) -> Ways:
        levels = [Way(0.0, 0, cost, loss=10 - cost) for cost in costs]
        return Ways(types.SimpleNamespace(name=name), tuple(levels))  # type: ignore[arg-type]

    found = [ways("a", 10, 2, 4, 6), ways("b", 10, 2, 4, 6), ways("c", 10, 7)]
    for budget, costs in ((30, [10, 10, 10]), (19, [6, 6, 7]), (18, [6, 4, 7]), (17, [6, 4, 7]), (11, [2, 2, 7])):
        chosen = uniform(found, budget)
        assert [chosen[name].cost for name in "abc"] == costs, budget
    with pytest.raises(RecipeError, match="smallest forms together cost 11"):
        uniform(found, 10)


def test_a_weight_that_several_read_is_counted_once(model) -> None:
    shared = decaying(12, 12)
    made = model(
        "g (float[3,12] x) => (float[3,12] y) { a = MatMul(x, w) b = MatMul(a, w) c = MatMul(b, w) y = MatMul(c, v) }",
        w=shared, v=decaying(12, 12),
    )  # fmt: skip
    layers = list(weighted_layers(made))
    assert list(dense_costs(layers, "parameters", Context()).values()) == [144, 0, 0, 144]
    assert list(dense_costs(layers, "flops", Context()).values()) == [3 * 3 * 144, 0, 0, 3 * 144]


RECURRENT = """g (float[3,12] x, float[3,12] s) => (float[3,5] y) {
    a = MatMul(x, w)  b = Add(a, s)  c = Tanh(b)
    d = MatMul(c, w)  e = Add(d, x)  f = Tanh(e)
    g1 = MatMul(f, w) h = Tanh(g1)   y = MatMul(h, v)
}"""


@pytest.mark.parametrize("options", [{"parameters": 0.8}, {"parameters": 0.8, "residual": "sparse"}, {"flops": 0.8}])
@pytest.mark.parametrize("sequential", [False, True])
def test_the_steps_of_a_recurrence_share_their_factors(model, options: dict, sequential: bool) -> None:
    made = model(RECURRENT, w=decaying(12, 12), v=f32(12, 5))
    before = made.clone()
    context = made.meta["sparsec"] = Context()
    feeds = [{"x": f32(3, 12), "s": f32(3, 12)} for _ in range(30)]
    context.calibration = feeds  # type: ignore[assignment]
    Factorize(**options, multiple=1, sequential=sequential)(made)
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
    (record,) = [r for r in context.records if "form" in r]
    assert record["layer"] == "MatMul_0" and record["readers"] == 3
    assert [r["layer"] for r in context.records if "kept" in r] == ["MatMul_8"]
    parts = [found for found in weighted_layers(made) if found.name != "MatMul_8"]
    assert len(parts) == 3 * len({id(found.weight) for found in parts}) and "w" not in made.graph.initializers
    assert {found.name.partition("/")[0] for found in parts} == {"MatMul_0", "MatMul_3", "MatMul_6"}
    first, second = (quiet_session(ir.to_proto(m).SerializeToString()) for m in (before, made))
    outputs = [(first.run(None, x)[0], second.run(None, x)[0]) for x in feeds]
    assert sum(np.square(b - a).sum() for a, b in outputs) < 1e-2 * sum(np.square(a).sum() for a, _ in outputs)
    spent = sum(dense_costs(list(weighted_layers(made)), next(iter(options)), Context()).values())
    whole = sum(dense_costs(list(weighted_layers(before)), next(iter(options)), Context()).values())
    assert spent <= (options.get("parameters") or options["flops"]) * whole * (1 + 1e-9)


def test_moments_of_a_weight_that_several_read_are_of_all_they_read(model) -> None:
    made = model(RECURRENT, w=decaying(12, 12), v=f32(12, 5))
    feeds = [{"x": f32(3, 12), "s": f32(3, 12)} for _ in range(5)]
    first = next(weighted_layers(made))
    ((_, found),) = gather(made, [first], feeds)  # type: ignore[arg-type]
    values = fetch(made, ["x", "c", "f"], feeds)
    rows = np.concatenate([v[name] for v in values for name in v]).astype(np.float64)
    assert found.count == len(rows) == 3 * 3 * 5
    np.testing.assert_allclose(found.gram, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-7)


def test_allocation_by_damage_beats_uniform_at_the_same_budget(model) -> None:
    """One layer can lose most of its rank for nothing, the other cannot."""
    text = """g (float[4,32] x) => (float[4,3] y) {
        a = MatMul(x, easy)  b = MatMul(a, hard)  y = MatMul(b, last) }"""
    constants = {"easy": (f32(32, 4) @ f32(4, 32)).astype(np.float32), "hard": f32(32, 32), "last": f32(32, 3)}
    data = {"x": f32(40, 4, 32)}
    chosen, errors = {}, {}
    for rule in ("uniform", "sensitivity"):
        made = model(text, **constants)
        context = made.meta["sparsec"] = Context()
        context.calibration = [{"x": x} for x in data["x"]]  # type: ignore[assignment]
        Factorize(parameters=0.7, allocation=rule, multiple=1, sequential=False)(made)
        session = quiet_session(ir.to_proto(made).SerializeToString())
        dense = quiet_session(ir.to_proto(model(text, **constants)).SerializeToString())
        errors[rule] = sum(
            float(np.square(session.run(None, {"x": x})[0] - dense.run(None, {"x": x})[0]).sum()) for x in data["x"]
        )
        chosen[rule] = {r["layer"]: r.get("form", "") for r in context.records if "layer" in r}
    assert errors["sensitivity"] < 1e-3 * errors["uniform"]
    assert chosen["sensitivity"]["MatMul_1"] == ""


@pytest.mark.parametrize("energy", [0.9, 0.99])
def test_energy_keeps_the_cheapest_rank_that_holds_it(net, energy) -> None:
    context = net.meta["sparsec"] = Context(samples())
    Factorize(energy=energy, forms=("svd",), multiple=1, sequential=False)(net)
    lost = [r["error"] for r in context.records if "form" in r]
    assert lost
    assert all(e <= 1 - energy + 1e-6 for e in lost)


def test_a_layer_that_would_not_run_faster_stays_and_says_so(net) -> None:
    """A price by which every node costs 10 us more than its multiply-adds."""
    context = net.meta["sparsec"] = Context(samples())
    context.price = lambda found, weight: 10.0 + 1e-2 * float(np.count_nonzero(weight))
    Factorize(rank=4)(net)
    records = {r["layer"]: r for r in context.records}
    assert records["MatMul_5"]["kept"] == SLOWER  # 200 weights: 2 us
    assert records["Conv_1"]["predicted_us"] < records["Conv_1"]["dense_us"]
    assert records["Conv_0"]["kept"].startswith("is the first convolution")
    every = net.clone()
    assert as_layer(next(n for n in every.graph if n.name == "MatMul_5"))


def test_latency_is_a_budget_too(net) -> None:
    context = net.meta["sparsec"] = Context(samples())
    context.price = lambda found, weight: float(np.count_nonzero(weight))
    total = sum(context.price(found, found.read()) for found in weighted_layers(net))
    Factorize(latency=0.75, multiple=1)(net)
    assert sum(context.price(found, found.read()) for found in weighted_layers(net)) <= 0.75 * total


@pytest.mark.parametrize(
    "options",
    [
        {"residual": "sparse"},
        {"residual": "sparse", "block": "4x1"},
        {"forms": ("sparse",)},
        {"forms": ("monarch", "svd")},
        {"forms": ("cospadi",)},
        {"forms": ("armor",), "include": ("Conv_3",)},
        {"flops": 0.7},
        {"bytes": 0.7},
        {"rescale": True},
    ],
    ids=str,
)
def test_every_option_gives_a_model_that_runs(net, options) -> None:
    reference, data = run(net, samples(4, 1)), samples()
    budget = {} if {"flops", "bytes"} & set(options) else {"parameters": 0.99 if "include" in options else 0.75}
    net.meta["sparsec"] = Context(data)
    assert Factorize(multiple=1, **budget, **options)(net).modified
    after = run(net, samples(4, 1))
    assert np.square(after - reference).sum() < 0.5 * np.square(reference).sum()


def test_compiled_models_agree_with_onnx_runtime(net) -> None:
    """`compile` refuses to make an artifact whose outputs differ."""
    for target, system in (("host", None), ("arm", "linux")):
        step = Factorize(
            parameters=0.7, residual="sparse", forms=("svd", "spatial", "tucker"), faster=False, multiple=1
        )
        made = sparsec.compile(net.clone(), target, os=system, passes=[step], calibration=samples())
        names = [row["name"] for row in made.report["layers"]]
        assert any(name.startswith("Conv_1/") for name in names)


def test_refusals(net, model) -> None:
    for options, text in (
        ({"parameters": 1.5}, "a share from 0 to 1"),
        ({"rank": 3, "flops": 0.5}, "give one of"),
        ({"forms": ("lu",)}, "forms must be some of"),
        ({"energy": 0.9, "allocation": "sensitivity"}, "layer by layer"),
        ({"types": ("Relu",)}, "types must be some of"),
        ({"trust": 2.0}, "trust is auto"),
    ):
        with pytest.raises(RecipeError, match=text):
            Factorize(**options)
    for options, text in (
        ({"method": "whitened"}, "needs --calibration"),
        ({"allocation": "sensitivity"}, "needs --calibration"),
        ({"latency": 0.5}, "needs a target"),
        ({"parameters": 0.05}, "cannot be held"),
        ({"rank": 1000}, "0 of 3 layers changed"),
    ):
        with pytest.raises(RecipeError, match=text):
            Factorize(**options)(net.clone())


def test_what_is_never_matched(model) -> None:
    for other in ("MatMul(w, a)", "Add(a, w)"):
        shared = model(
            f"g (float[4,4] x) => (float[4,4] y) {{ a = MatMul(x, w) b = {other} y = MatMul(b, l) }}",
            w=f32(4, 4), l=f32(4, 4),
        )  # fmt: skip
        assert refusal(next(weighted_layers(shared))) == "share their weight with a node that reads it differently"
    grouped = model("g (float[1,4,5,5] x) => (float[1,4,3,3] y) { y = Conv<group = 2>(x, w) }", w=f32(4, 2, 3, 3))
    assert refusal(next(weighted_layers(grouped))) == "are depthwise or grouped convolutions"
    scaled = model("g (float[3,4] x) => (float[3,5] y) { y = Gemm<alpha = 2.0>(x, w) }", w=f32(4, 5))
    assert "alpha" in refusal(next(weighted_layers(scaled)))
    with pytest.raises(RecipeError, match="0 of 1 layers matched"):
        Factorize(rank=2, include=("*",))(grouped)


def test_quantized_factors_run(net) -> None:
    """Factors are layers like others to the pass behind."""
    data = samples()
    made = sparsec.rewrite(net.clone(), passes=["factorize:parameters=0.8,multiple=1", "quantize"], calibration=data)
    reference, after = run(net, samples(4, 1)), run(made, samples(4, 1))
    assert any(node.op_type == "QuantizeLinear" for node in made.graph)
    assert np.square(after - reference).sum() < 0.2 * np.square(reference).sum()
