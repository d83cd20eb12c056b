from __future__ import annotations

import numpy as np
import pytest

from sparsec.passes.measure.statistics import Activations
from sparsec.passes.quantization.moments import Normal, expected_inputs
from sparsec.passes.quantization.quantize import Quantize
from sparsec.rewriting.passes_api import Stacked
from tests.passes.quant_networks import classifier, classifier_weights, outputs

RNG = np.random.default_rng(12)


def f32(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


def test_clipped_normal_is_that_of_samples() -> None:
    mean, variance = np.array([-1.0, 0.0, 0.3, 4.0]), np.array([1.0, 0.25, 4.0, 9.0])
    x = mean + np.sqrt(variance) * np.random.default_rng(0).standard_normal((400_000, 4))
    for function in (lambda v: np.maximum(v, 0), lambda v: np.clip(v, 0, 6), np.tanh):
        found = Normal(mean, variance, 1).through(function)
        y = function(x)
        np.testing.assert_allclose(found.mean, y.mean(axis=0), atol=0.02)
        np.testing.assert_allclose(found.variance, y.var(axis=0), rtol=0.03, atol=0.01)


def test_means_are_near_those_of_normal_inputs(model) -> None:
    made = model(
        """g (float[1,3,16,16] x) => (float[1,8] y) {
            a = Conv(x, w0, b0)
            r = Clip(a, low, high)
            d = Conv<group = 12>(r, w1, b1)
            s = Relu(d)
            p = GlobalAveragePool(s)
            f = Flatten(p)
            y = Gemm<transB = 1>(f, w2, b2)
        }""",
        w0=RNG.standard_normal((12, 3, 1, 1)).astype("f"), b0=f32(12), w1=f32(12, 1, 1, 1) * 3, b1=f32(12) * 2,
        w2=f32(8, 12), b2=f32(8), low=np.float32(0), high=np.float32(6),
    )  # fmt: skip
    found = expected_inputs(made)
    assert set(found) == {"Conv_0", "Conv_2", "Gemm_6"}
    data = Stacked({"x": np.random.default_rng(1).standard_normal((64, 3, 16, 16)).astype(np.float32)})
    # The second layer reads a clipped normal, which the model takes for a normal again: less exact.
    for name, value, limit in (("Conv_2", "r", 0.06), ("Gemm_6", "f", 0.25)):
        parts = [batch[value] for batch in Activations(made).stream([value], data)]
        x = np.concatenate(parts).reshape(64, 12, -1) if value == "f" else np.concatenate(parts)
        real = np.moveaxis(x, -3 if value == "r" else 1, 0).reshape(12, -1).mean(axis=1)
        assert np.abs(found[name] - real).max() < limit


def test_normalization_says_it_whatever_came_before(model) -> None:
    made = model(
        """g (float[1,5,16] x) => (float[1,5,4] y) {
            t = Mul(x, x)
            q = MatMul(t, w0)
            n = LayerNormalization<axis = -1>(q, gamma, beta)
            h = MatMul(n, w1)
            k = Add(h, b1)
            m = Mul(k, k)
            y = MatMul(m, w2)
        }""",
        w0=f32(16, 16), w1=f32(16, 8), w2=f32(8, 4), b1=f32(8), gamma=f32(16), beta=f32(16),
    )  # fmt: skip
    found = expected_inputs(made)
    assert set(found) == {"MatMul_3"}  # products of activations are not known
    np.testing.assert_array_equal(found["MatMul_3"], made.graph.initializers["beta"].const_value.numpy())


@pytest.mark.parametrize("correct", [False, True])
def test_biases_are_corrected_without_data(model, correct: bool) -> None:
    """Inputs with means that a LayerNormalization gives, and four bits: the mean of the output moves, or does not."""
    beta, w1 = np.full(32, 1.5, np.float32), np.abs(f32(32, 16))
    made = model(
        """g (float[1,6,32] x) => (float[1,6,16] y) {
            n = LayerNormalization<axis = -1>(x, gamma, beta)
            h = MatMul(n, w1)
            y = Add(h, b1)
        }""",
        w1=w1, b1=f32(16), gamma=np.full(32, 0.5, np.float32), beta=beta,
    )  # fmt: skip
    data = Stacked({"x": np.random.default_rng(3).standard_normal((64, 6, 32)).astype(np.float32)})
    before = outputs(made, data)
    Quantize(weights="int4", correct=correct)(made)
    shift = np.abs((outputs(made, data) - before).mean(axis=(0, 1)))
    assert (shift.max() < 0.01) == correct


def test_weights_are_left_alone() -> None:
    made = classifier()
    expected_inputs(made)
    for name, array in classifier_weights().items():
        np.testing.assert_array_equal(made.graph.initializers[name].const_value.numpy(), array)
