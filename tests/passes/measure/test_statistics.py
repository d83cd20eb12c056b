from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from sparsec.errors import ModelError
from sparsec.passes.layers import weighted_layers
from sparsec.passes.measure.segments import Segment, batches
from sparsec.passes.measure.statistics import Activations, Centred, columns, gather, outputs, products, thinning
from sparsec.passes.normalization.fold_constants import quiet_session
from sparsec.rewriting.passes_api import META_KEY, Context, Stacked

RNG = np.random.default_rng(8)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


LAYERS = {
    "1x1": ("Conv(a, w)", (1, 6, 7, 7), (10, 6, 1, 1)),
    "kxk": ("Conv<pads = [1, 0, 1, 2], strides = [2, 1]>(a, w)", (1, 6, 7, 8), (4, 6, 3, 2)),
    "dilated": ("Conv<dilations = [2, 2]>(a, w)", (1, 3, 9, 9), (4, 3, 3, 3)),
    "grouped": ("Conv<group = 2>(a, w)", (1, 6, 7, 7), (4, 3, 3, 3)),
    "1-d": ("Conv<pads = [1, 1]>(a, w)", (1, 6, 9), (4, 6, 3)),
    "gemm": ("Gemm<transB = 1>(a, w)", (1, 6), (5, 6)),
    "gemm transA": ("Gemm<transA = 1>(a, w)", (6, 3), (6, 5)),
    "matmul": ("MatMul(a, w)", (1, 4, 6), (6, 5)),
    "matmul from the left": ("MatMul(w, a)", (1, 6, 4), (5, 6)),
}


@pytest.mark.parametrize(("text", "x", "w"), LAYERS.values(), ids=LAYERS)
def test_weight_times_columns_is_the_output(model, text: str, x: tuple[int, ...], w: tuple[int, ...]) -> None:
    made = model(f"g (float[{','.join(map(str, x))}] x) => (float[] y) {{ a = Relu(x) y = {text} }}", w=f32(*w))
    (layer,) = weighted_layers(made)
    samples = Stacked({"x": f32(3, *x[1:])}) if x[0] == 1 else [{"x": f32(*x)} for _ in range(3)]
    (values,) = Activations(made).stream(["a", "y"], samples)
    for step in (1, 2, 3, 100):
        unfolded = columns(layer, values["a"], step)
        weight = layer.read().reshape(layer.groups, -1, unfolded.shape[1])
        product = np.matmul(weight, unfolded).reshape(layer.shape[0], -1)
        np.testing.assert_allclose(product, outputs(layer, values["y"], step), atol=1e-4)
    channel = {"Conv": 2, "Gemm": 2, "MatMul": 3 if layer.input_index else 2}[layer.op]
    expected = np.moveaxis(values["y"], channel, 0).reshape(layer.shape[0], -1)
    np.testing.assert_array_equal(outputs(layer, values["y"]), expected)


@pytest.mark.parametrize("size", [1, 2, 16])
def test_gather_equals_the_moments_of_all_columns_at_once(model, size: int) -> None:
    made = model(
        """g (float[1,3,8,8] x) => (float[1,5] y) {
            a = Conv(x, w) r = Relu(a) d = Conv<group = 4>(r, v) p = GlobalAveragePool(d) q = Reshape(p, s)
            y = Gemm(q, m) }""",
        w=f32(4, 3, 3, 3), v=f32(4, 1, 3, 3), m=f32(4, 5), s=np.array([1, 4]),
    )  # fmt: skip
    samples = Stacked({"x": f32(5, 3, 8, 8)})
    layers = list(weighted_layers(made))
    told: list[str] = []
    made.meta[META_KEY] = Context(progress=lambda what, done, total: told.append(what))
    found = list(gather(made, layers, samples, budget=1, batch=size))
    assert [layer.name for layer, _ in found] == [layer.name for layer in layers]
    assert len(set(told)) == len(layers)  # a budget of one byte: one run over the data a layer
    session = quiet_session(ir.to_proto(made).SerializeToString())
    assert session.get_outputs()[0].name == "y"
    for layer, statistics in found:
        name = layer.node.inputs[0].name
        parts = [columns(layer, v[name]) for v in Activations(made).stream([name], samples, 1)]
        x = np.concatenate(parts, axis=2).astype(np.float64)
        gram, mean = np.matmul(x, x.transpose(0, 2, 1)) / x.shape[2], x.mean(axis=2)
        if layer.groups == 1:
            gram, mean = gram[0], mean[0]
        assert statistics.count == x.shape[2]
        np.testing.assert_allclose(statistics.gram, gram, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(statistics.mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(statistics.norms**2, np.diagonal(gram, axis1=-2, axis2=-1), rtol=1e-4)


@pytest.mark.parametrize("mean", [0.0, 1.0, -1e3])
def test_products_keep_small_deviations_of_large_means(mean: float) -> None:
    """Plain products in float32 would be off by 6e-8 mean^2 and more, their covariance by that over 1e-4."""
    y, x = (np.float32(mean) + np.float32(0.01) * f32(2, k, 5000) for k in (3, 4))
    of_y, of_x = Centred.of(y), Centred.of(x)
    total, sum_y, sum_x = products(of_y, of_x), of_y.total, of_x.total
    a, b = x.astype(np.float64), y.astype(np.float64)
    np.testing.assert_allclose(total, b @ a.transpose(0, 2, 1), rtol=1e-10, atol=1e-5)
    covariance = total / 5000 - sum_y[:, :, None] * sum_x[:, None] / 5000**2
    exact = np.stack(
        [(v - v.mean(1, keepdims=True)) @ (u - u.mean(1, keepdims=True)).T / 5000 for v, u in zip(b, a, strict=True)]
    )
    np.testing.assert_allclose(covariance, exact, rtol=1e-4, atol=1e-9)
    same = products(of_x, of_x)
    np.testing.assert_array_equal(same, same.transpose(0, 2, 1))
    nothing = Centred.of(x[:, :, :0])
    assert not products(nothing, nothing).any()
    x[0, 0, 0] = np.inf
    broken = Centred.of(x)
    assert not np.isfinite(products(broken, broken)).all()


def test_batches_run_together_where_that_is_the_same_and_alone_where_not(model) -> None:
    plain = model("g (float[1,4] x) => (float[1,4] y) { a = Relu(x) y = Softmax<axis = 1>(a) }")
    mixed = model("g (float[1,4] x) => (float[1,4] y) { a = Relu(x) y = Softmax<axis = 0>(a) }")
    fixed = model("g (float[1,4] x) => (float[1,2,2] y) { a = Relu(x) y = Reshape(a, s) }", s=np.array([-1, 2, 2]))
    for made, together in ((plain, True), (mixed, False), (fixed, True)):
        segment = Segment(made, None, ["y"])
        given = next(batches(Stacked({"x": f32(3, 4)})))
        y = segment.run(given)["y"]
        session = quiet_session(ir.to_proto(made).SerializeToString())
        for i in range(3):
            np.testing.assert_allclose(y[i], session.run(None, {"x": given["x"][i]})[0], rtol=1e-6)
        assert segment._batched is together


def test_a_segment_starts_anywhere(model) -> None:
    made = model("g (float[1,4] x) => (float[1,4] y) { a = Relu(x) b = Neg(a) c = Exp(b) y = Add(c, a) }")
    values = {"a": np.abs(f32(3, 1, 4)), "b": f32(3, 1, 4)}
    np.testing.assert_allclose(
        Segment(made, ["a", "b"], ["y"]).run(values)["y"], np.exp(values["b"]) + values["a"], rtol=1e-5
    )
    with pytest.raises(ModelError, match=r"values y: depends on x, which is not given"):
        Segment(made, ["b"], ["y"])
    with pytest.raises(ModelError, match=r"value 'nowhere': is no value of the model's graph"):
        Segment(made, ["nowhere"], ["y"])


def test_thinning_leaves_enough_positions(model, monkeypatch) -> None:
    made = model("g (float[1,2,32,32] x) => (float[1,4,32,32] y) { a = Relu(x) y = Conv(a, w) }", w=f32(4, 2, 1, 1))
    (layer,) = weighted_layers(made)
    assert thinning(layer, 16) == 1
    monkeypatch.setattr("sparsec.passes.measure.statistics.POSITIONS", 2048)
    assert thinning(layer, 16) == 8
    data = Stacked({"x": f32(16, 2, 32, 32)})
    ((_, thin),) = gather(made, [layer], data)
    assert thin.count == 2048
    monkeypatch.undo()
    ((_, full),) = gather(made, [layer], data)
    np.testing.assert_allclose(thin.gram, full.gram, atol=0.1)


def test_a_scalar_among_the_inputs(model) -> None:
    made = model("g (float[1,3] x, float s) => (float[1,3] y) { y = Mul(x, s) }")
    samples = [{"x": f32(1, 3), "s": np.array(scale, np.float32)} for scale in (2, 3)]
    (values,) = Activations(made).stream(["y", "s"], samples)
    np.testing.assert_array_equal(values["y"], np.stack([sample["x"] * sample["s"] for sample in samples]))
    np.testing.assert_array_equal(values["s"], [2, 3])
