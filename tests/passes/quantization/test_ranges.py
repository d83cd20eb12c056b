from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.errors import DataError
from sparsec.passes.quantization.graph import Range, plan
from sparsec.passes.quantization.ranges import BINS, Histogram, observe
from tests.passes.quant_networks import classifier, images


def histogram(*parts: np.ndarray) -> Histogram:
    made = Histogram()
    for part in parts:
        made.add(part)
    return made


def numbers(seed: int = 0, count: int = 40_000) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=200), st.integers(1, 199))
def test_the_cut_into_batches_does_not_matter(values: list[float], cut: int) -> None:
    x = np.array(values, np.float32)
    whole, parts = histogram(x), histogram(x[:cut], x[cut:])
    assert (whole.low, whole.high, whole.zeros) == (parts.low, parts.high, parts.zeros)
    assert whole.counts.sum() == parts.counts.sum() == np.count_nonzero(x)
    for observer in ("minmax", "mse", "percentile", "entropy"):
        np.testing.assert_allclose(whole.bounds(observer), parts.bounds(observer), rtol=1e-6)
    merged = histogram(x[:cut])
    merged += histogram(x[cut:])
    assert merged.counts.sum() == whole.counts.sum()


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.sampled_from(["uint8", "int8"]))
def test_zero_is_exact_in_every_range(a: float, b: float, kind: str) -> None:
    found = Range.of(min(a, b), max(a, b), kind)
    assert found.round(np.zeros(1, np.float32)) == 0
    least = 0 if kind == "uint8" else -128
    assert least <= found.zero_point <= least + 255
    x = np.linspace(min(a, b, 0), max(a, b, 0), 50).astype(np.float32)
    assert np.abs(found.round(x) - x).max() <= 1.001 * float(found.scale)


def test_memory_does_not_grow_with_data() -> None:
    made = histogram(*[10.0**k * numbers(k + 4, 5000) for k in range(-4, 5)])
    assert made.counts.shape == (BINS,)
    assert made.counts.sum() == 45_000


def test_a_flood_of_zeros_does_not_set_the_scale() -> None:
    x = np.maximum(numbers(count=8000), 0)
    sparse = np.concatenate([x, np.zeros(12 * x.size, np.float32)])
    for observer in ("percentile", "mse", "entropy"):
        dense_range, sparse_range = histogram(x[x > 0]).bounds(observer), histogram(sparse).bounds(observer)
        np.testing.assert_allclose(sparse_range, dense_range, rtol=1e-6)


def test_percentile_leaves_out_its_share() -> None:
    x = numbers()
    low, high = histogram(x).bounds("percentile", 0.99)
    assert np.mean((x < low) | (x > high)) == pytest.approx(0.01, abs=0.002)
    low, high = histogram(np.abs(x)).bounds("percentile", 0.99)
    assert low == 0
    assert np.mean(np.abs(x) > high) == pytest.approx(0.01, abs=0.002)


def test_least_square_error_is_near_that_of_any_range() -> None:
    x = np.random.default_rng(1).laplace(size=30_000).astype(np.float32)
    x[0] = 20

    def loss(low: float, high: float) -> float:
        return float(np.square(Range.of(low, high).round(x) - x).mean())

    found = loss(*histogram(x).bounds("mse"))
    ends = x.min(), x.max()
    best = min(loss(a * ends[0], b * ends[1]) for a in np.linspace(0.1, 1, 19) for b in np.linspace(0.1, 1, 19))
    assert found <= 1.05 * best
    assert found < loss(*ends)


def test_entropy_clips_a_lonely_outlier_and_keeps_a_uniform_range() -> None:
    low, high = histogram(np.concatenate([numbers(), np.float32([60])])).bounds("entropy")
    assert high < 40
    even = np.random.default_rng(2).uniform(-1, 1, 60_000).astype(np.float32)
    low, high = histogram(even).bounds("entropy")
    assert low < -0.9
    assert high > 0.9


def test_an_average_forgets_a_strange_batch() -> None:
    usual = [numbers(k, 1000).clip(-2, 2) for k in range(20)]
    strange = histogram(*usual[:10], np.float32([100]), *usual[10:])
    assert strange.bounds("minmax")[1] == 100
    assert strange.bounds("average")[1] < 10


def test_a_value_that_is_always_zero_gets_a_scale() -> None:
    found = histogram(np.zeros(10, np.float32))
    for observer in ("minmax", "average", "percentile", "mse", "entropy"):
        assert found.bounds(observer) == (0, 0)
    assert Range.of(0, 0).scale == 1


def test_numbers_that_are_not_finite_are_named() -> None:
    with pytest.raises(DataError, match="not finite"):
        histogram(np.float32([1, np.nan]))


def test_classes_see_all_that_flows_into_them() -> None:
    made = classifier()
    found = observe(made, plan(made), images(8), batch=3)
    named = {str(v.name): h for v, h in found.items()}
    assert set(named) == {"x", "r", "c", "e", "p", "u"}  # c, t and their Concat share a scale, as do r and its MaxPool
    assert named["c"].high > 0
    assert named["x"].counts.sum() == np.count_nonzero(images(8).arrays["x"])
