from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.passes.quantization.grid import Grid, descend, feedback, group_grid, round_weights, row_grid


def case(seed: int, groups: int = 1, rows: int = 4, k: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Weights [G, N, K] and second moments [G, K, K] of correlated inputs."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((groups, k, k)) / np.sqrt(k) + np.eye(k)
    x = rng.standard_normal((groups, 40, k)) @ mix + 0.3
    h = np.einsum("gpi,gpj->gij", x, x) / 40
    return rng.standard_normal((groups, rows, k)), h + 1e-3 * np.eye(k)


def loss(v: np.ndarray, w: np.ndarray, h: np.ndarray) -> np.ndarray:
    d = v - w
    return np.einsum("gnk,gkl,gnl->gn", d, h, d)


def coarse(w: np.ndarray, high: int = 3) -> Grid:
    return Grid(np.abs(w).max(axis=2, keepdims=True) / high, np.zeros((1, 1, 1)), -high, high)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.floats(0, 0.9))
def test_each_rounding_is_at_least_as_good_as_the_one_before(seed: int, groups: int, zeros: float) -> None:
    w, h = case(seed, groups)
    keep = np.random.default_rng(seed).random(w.shape) >= zeros
    w = np.where(keep, w, 0)
    grid = coarse(w + 1e-3)
    found = [round_weights(w, grid, keep, rounding, h) for rounding in ("nearest", "feedback", "descent")]
    losses = [loss(v, w, h) for v in found]
    assert (losses[1] <= losses[0] + 1e-9).all()
    assert (losses[2] <= losses[1] + 1e-9).all()
    for v in found:
        assert not v[~keep].any()
        np.testing.assert_allclose(v, grid.round(v), atol=1e-12)  # on the grid


def test_descent_is_near_the_best_of_all_roundings() -> None:
    ratios = []
    for seed in range(12):
        w, h = case(seed, rows=1, k=6)
        grid = coarse(w)
        below = np.clip(np.floor(w / grid.scale), -3, 3)[0, 0]
        every = np.array([below + np.array(bits) for bits in product((0, 1), repeat=6)]).clip(-3, 3) * grid.scale[0, 0]
        best = loss(every[None], w, h).min()
        found = loss(round_weights(w, grid, np.ones(w.shape, bool), "descent", h), w, h)[0, 0]
        nearest = loss(grid.round(w), w, h)[0, 0]
        assert found <= nearest + 1e-12
        ratios.append(((found - best) / best, (nearest - best) / best))
    ours, plain = np.mean(ratios, axis=0)
    assert ours < 0.25 * plain


def test_rounding_towards_another_goal() -> None:
    """t = v h for some other v: the optimum of v h v - 2 t v is v itself."""
    w, h = case(5)
    goal = np.rint(np.random.default_rng(0).uniform(-3, 3, w.shape))
    grid = Grid(np.ones((1, 1, 1)), np.zeros((1, 1, 1)), -3, 3)
    keep = np.ones(w.shape, bool)
    np.testing.assert_allclose(descend(goal, grid, keep, h, goal @ h), goal)
    found = descend(grid.round(w), grid, keep, h, goal @ h)
    assert loss(found, goal, h).sum() < 0.1 * loss(grid.round(w), goal, h).sum()


def test_feedback_with_a_diagonal_is_nearest() -> None:
    w, _ = case(3)
    grid, keep = coarse(w), np.ones(w.shape, bool)
    h = np.diag(np.arange(1.0, 13.0))[None]
    np.testing.assert_allclose(feedback(w, grid, keep, h), grid.round(w))


@pytest.mark.parametrize("scales", ["max", "mse"])
def test_rows_fill_their_grid(scales: str) -> None:
    w, h = case(2, groups=2)
    w[0, 1] = 0
    grid = row_grid(w, np.diagonal(h, axis1=1, axis2=2), scales)
    q = grid.codes(w)
    assert np.abs(q).max() == 127
    np.testing.assert_array_equal(grid.scale, grid.scale.astype(np.float32))
    if scales == "max":
        np.testing.assert_allclose(np.abs(q).max(axis=2)[np.abs(w).max(axis=2) > 0], 127)
        assert np.abs(grid.round(w) - w).max() <= np.abs(w).max() / 127 / 2 * 1.001


def test_shrunk_scales_err_less_where_power_is() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_t(2, (1, 6, 200))
    power = rng.random((1, 200))
    wide, shrunk = (group_grid(w, power, 64, 4, False, scales) for scales in ("max", "mse"))
    error = [float((power[:, None] * np.square(g.round(w) - w)).sum()) for g in (wide, shrunk)]
    assert error[1] < 0.9 * error[0]


def test_no_scale_below_what_the_bias_needs() -> None:
    w, _ = case(1)
    least = np.full(w.shape[:2], 0.5)
    assert (row_grid(w, None, "max", least).scale >= 0.5).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("k", [16, 37, 64, 65])
def test_groups_with_a_shorter_last_one(bits: int, asymmetric: bool, k: int) -> None:
    w = np.random.default_rng(k).standard_normal((1, 5, k)) + 0.7
    w[0, :, 3] = 0
    grid = group_grid(w, None, 16, bits, asymmetric, "max")
    low, high = (0, 2**bits - 1) if asymmetric else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    q, v = grid.codes(w), grid.round(w)
    assert q.min() >= low
    assert q.max() <= high
    assert not v[0, :, 3].any()
    for first in range(0, k, 16):
        part = w[..., first : first + 16]
        spread = (
            np.maximum(part.max(axis=2), 0) - np.minimum(part.min(axis=2), 0)
            if asymmetric
            else np.abs(part).max(axis=2)
        )
        step = spread / (high - low if asymmetric else high)
        assert (np.abs(v[..., first : first + 16] - part).max(axis=2) <= 1.01 * step).all()
        assert np.ptp(grid.scale[..., first : first + 16], axis=2).max() == 0


def test_feedback_through_powers_that_lie_far_apart() -> None:
    """Inputs whose powers differ by 1e14, near what float64 can invert: errors are still handed on to where they cost least."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((24, 24)))[0]
    h = ((basis * np.logspace(0, -14, 24)) @ basis.T)[None]
    h = (h + h.transpose(0, 2, 1)) / 2
    w = rng.standard_normal((1, 4, 24))
    grid = Grid(np.full((1, 4, 1), 0.02), np.zeros((1, 4, 1)), -127, 127)
    keep = np.ones(w.shape, bool)
    fed, nearest = feedback(w, grid, keep, h), grid.round(w)
    errors = [float(np.einsum("gnk,gnk->", (v - w) @ h, v - w)) for v in (fed, nearest)]
    assert errors[0] < errors[1]
