from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.passes.layers import weighted_layers
from sparsec.passes.quantization.equalize import equalize, scaled, streams
from sparsec.passes.quantization.quantize import Quantize
from sparsec.rewriting.passes_api import Context, Stacked
from tests.passes.conftest import save
from tests.passes.quant_networks import calibrated, classifier, error, images, outputs

RNG = np.random.default_rng(8)
CHAIN = """g (float[1,4,6,6] x) => (float[1,6] y) {
    a = Conv(x, w0, b0)
    r = Relu(a)
    d = Conv<group = 12, pads = [1, 1, 1, 1]>(r, w1, b1)
    l = LeakyRelu(d)
    e = Conv(l, w2)
    s = Add(e, r)
    p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(s)
    c = Conv<group = 2>(p, w3, b3)
    m = GlobalAveragePool(c)
    f = Flatten(m)
    h = MatMul(f, w4)
    k = Add(h, b4)
    u = Relu(k)
    y = Gemm<transB = 1>(u, w5, b5)
}"""


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def uneven(*shape: int, axis: int = 0) -> np.ndarray:
    """Channels of very different size."""
    size = [1] * len(shape)
    size[axis] = shape[axis]
    return (f32(*shape) * np.logspace(-1.5, 1.5, shape[axis]).reshape(size)).astype(np.float32)


def chain_weights() -> dict[str, np.ndarray]:
    return {
        "w0": uneven(12, 4, 1, 1), "b0": f32(12), "w1": uneven(12, 1, 3, 3), "b1": f32(12), "w2": f32(12, 12, 1, 1),
        "w3": uneven(8, 6, 1, 1), "b3": f32(8), "w4": uneven(8, 10, axis=1), "b4": f32(10), "w5": f32(6, 10), "b5": f32(6),
    }  # fmt: skip


def data(count: int = 16) -> Stacked:
    return Stacked({"x": np.random.default_rng(2).standard_normal((count, 4, 6, 6)).astype(np.float32)})


def test_streams_are_followed_through_what_keeps_proportions(model) -> None:
    found = streams(model(CHAIN, **chain_weights()))
    names = [([m.weight.name for m in s.makers], [r.weight.name for r in s.readers]) for s in found]
    assert names == [
        (["w0", "w2"], ["w1", "w3"]),  # the residual stream: two makers, two readers
        (["w1"], ["w2"]),
        (["w3"], ["w4"]),
        (["w4"], ["w5"]),
    ]
    assert [[b.name for b in s.biases] for s in found] == [["b0"], ["b1"], ["b3"], ["b4"]]


@pytest.mark.parametrize("how", ["weights", "activations"])
def test_the_function_stays(model, how: str) -> None:
    made = model(CHAIN, **chain_weights())
    before = outputs(made, data())
    twin = save(made)
    factors = equalize(made, how, data())
    assert set(factors) == set(chain_weights()) - {"b5"}
    after = outputs(made, data())
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    assert scaled(twin, factors) == save(made)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["weights", "activations"]), st.floats(0.2, 1.0))
def test_the_function_of_any_weights_stays(seed: int, how: str, strength: float) -> None:
    made, held = classifier(seed), images(6, seed=seed)
    before = outputs(made, held)
    equalize(made, how, held, strength)
    assert np.abs(outputs(made, held) - before).max() <= 2e-5 * np.abs(before).max()


def test_channels_become_even(model) -> None:
    made = model(CHAIN, **chain_weights())
    equalize(made, "weights")
    by_name = {layer.weight.name: np.abs(layer.read()) for layer in weighted_layers(made)}
    rows = by_name["w4"].max(axis=(1, 2, 3))
    columns = by_name["w5"].max(axis=(0, 2, 3))
    np.testing.assert_allclose(rows / columns, (rows / columns)[0], rtol=0.02)


def test_zeros_stay_and_dead_channels_are_left(model) -> None:
    weights = chain_weights()
    weights["w0"][3] = 0
    weights["b0"][3] = 0
    weights["w2"][:, 5] = 0
    weights["w5"][:, 1] = 0
    made = model(CHAIN, **weights)
    before = outputs(made, data())
    equalize(made, "activations", data())
    for name, array in weights.items():
        now = made.graph.initializers[name].const_value.numpy()
        assert np.isfinite(now).all()
        np.testing.assert_array_equal(now == 0, array == 0)
    assert np.abs(outputs(made, data()) - before).max() <= 1e-5 * np.abs(before).max()


@pytest.mark.parametrize(
    "between",
    [
        "r = Sigmoid(a)", "r = Clip(a, zero, six)", "r = HardSwish(a)", "t = Tanh(a) r = Add(a, t)", "r = Add(a, one)",
        "t = Mul(a, a) r = Sqrt(t)", "r = Softmax<axis = 1>(a)",
    ],
)  # fmt: skip
def test_what_does_not_keep_proportions_ends_a_stream(model, between: str) -> None:
    text = f"g (float[1,4,6,6] x) => (float[1,3,6,6] y) {{ a = Conv(x, w0) {between} y = Conv(r, w1) }}"
    constants = {"zero": np.float32(0), "six": np.float32(6), "one": np.ones((1, 5, 1, 1), np.float32)}
    made = model(text, w0=f32(5, 4, 1, 1), w1=f32(3, 5, 1, 1), **{k: v for k, v in constants.items() if k in between})
    before = save(made)
    assert streams(made) == []
    assert equalize(made, "activations", data()) == {}
    assert save(made) == before


def test_weights_and_values_with_other_readers_are_left(model) -> None:
    shared = model(
        "g (float[1,4] x) => (float[1,4] y) { a = MatMul(x, w) r = Relu(a) b = MatMul(r, w) y = Relu(b) }", w=f32(4, 4)
    )
    output = model(
        "g (float[1,4] x) => (float[1,4] y, float[1,4] r) { a = MatMul(x, w) r = Relu(a) y = MatMul(r, v) }",
        w=f32(4, 4), v=f32(4, 4),
    )  # fmt: skip
    assert streams(shared) == streams(output) == []


def test_a_relu_that_is_written_as_a_clip_and_changes_of_layout(model) -> None:
    made = model(
        "g (float[1,6,4] x) => (float[6,3] y) { a = MatMul(x, w) r = Clip(a, zero) f = Reshape(r, shape) y = MatMul(f, v) }",
        w=uneven(4, 5, axis=1), v=f32(5, 3), zero=np.float32(0), shape=np.array([6, 5]),
    )  # fmt: skip
    (stream,) = streams(made)
    assert {str(v.name): axis for v, axis in stream.values.items()} == {"a": 2, "r": 2, "f": 1}


def test_uneven_channels_lose_less(model) -> None:
    """One channel a hundred times the others takes all steps of the scale, unless it is made even."""
    weights, errors = chain_weights(), {}
    reference = outputs(model(CHAIN, **weights), data())
    for how in ("none", "weights", "activations"):
        made = calibrated(model(CHAIN, **weights), data())
        Quantize(equalize=how, fallback="none", observer="minmax")(made)
        errors[how] = error(outputs(made, data()), reference)
        assert len(Context.of(made).records) == 6
    assert errors["activations"] < 0.5 * errors["none"]
    assert errors["weights"] < errors["none"]
