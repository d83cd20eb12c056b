from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.passes.pruning import importance
from sparsec.passes.pruning.importance import activation_scores, second_order_scores
from sparsec.passes.pruning.masks import Pattern, draw_masks, magnitude


def correlated(k: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * k, k)) @ rng.standard_normal((k, k)) * np.exp(rng.standard_normal(k))
    return x.T @ x / len(x) + 0.05 * np.eye(k)


def least_error(w: np.ndarray, h: np.ndarray, mask: np.ndarray) -> float:
    """tr((w - v) h (w - v)^T) of the best v on the mask."""
    total = 0.0
    for row, keep in zip(w.astype(np.float64), mask, strict=True):
        v = np.zeros(len(row))
        v[keep] = np.linalg.solve(h[np.ix_(keep, keep)], h[keep] @ row)
        total += float((row - v) @ h @ (row - v))
    return total


def eliminated(w: np.ndarray, h: np.ndarray) -> list[int]:
    """The order in which OBS removes the columns of rows w [R, K], each the cheapest given those gone: by brute force."""
    gone: list[int] = []
    while len(gone) < w.shape[1]:
        errors = {}
        for j in set(range(w.shape[1])) - set(gone):
            keep = np.ones(w.shape, bool)
            keep[:, [*gone, j]] = False
            errors[j] = least_error(w, h, keep)
        gone.append(min(errors, key=lambda j: errors[j]))
    return gone


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 3]))
def test_scores_ascend_in_the_order_of_optimal_brain_surgeon(seed: int, rows: int) -> None:
    k = 9
    w = np.random.default_rng(seed).standard_normal((rows, k, 1, 1)).astype(np.float32)
    h = correlated(k, seed + 1)
    order = eliminated(w[:, :, 0, 0], h)
    scores = second_order_scores(w, h, Pattern(rows, 1))
    assert (scores == scores[:1]).all()  # rows of a block row are worth the same
    taken = scores[0, order, 0, 0]
    assert (np.diff(taken) >= -1e-4 * np.abs(taken[1:])).all()
    # The first loss is the error of removing that column and refitting.
    keep = np.ones((rows, k), bool)
    keep[:, order[0]] = False
    assert taken[0] * rows == pytest.approx(least_error(w[:, :, 0, 0], h, keep), rel=1e-2)


PATTERNS = [
    Pattern(),
    Pattern(4, 1),
    Pattern(4, 4),
    Pattern(1, 8),
    Pattern(3, 5),
    Pattern(1, 1, 2, 4),
    Pattern(1, 1, 1, 8),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", [(16, 150, 1, 1), (10, 14, 3, 3)], ids=["1x1", "3x3"])
def test_second_order_leaves_less_error_than_activation_and_magnitude(pattern: Pattern, shape) -> None:
    k = int(np.prod(shape[1:]))
    w = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    h = correlated(k, 2)
    errors = []
    for scores in (second_order_scores(w, h, pattern), activation_scores(w, h), magnitude(w)):
        assert scores.shape == shape
        (mask,) = draw_masks([w], [scores], pattern, 0.5)
        errors.append(least_error(w.reshape(shape[0], k), h, mask.reshape(shape[0], k)))
    assert errors[0] < errors[1]
    assert errors[0] < 0.8 * errors[2]


def test_zero_weights_cost_nothing_and_are_eliminated_first() -> None:
    w = np.random.default_rng(3).standard_normal((8, 64, 1, 1)).astype(np.float32)
    w[:4, ::2] = 0
    scores = second_order_scores(w, correlated(64, 4), Pattern(4, 1))
    assert scores[:4, ::2].max() < 1e-6 * scores[:4, 1::2].min()


def test_a_row_that_counts_more_keeps_more() -> None:
    w = np.random.default_rng(5).standard_normal((2, 64, 1, 1)).astype(np.float32)
    scores = second_order_scores(w, np.eye(64), Pattern(), rows=np.array([1.0, 100.0]))
    (mask,) = draw_masks([w], [scores], Pattern(), 0.5)
    assert mask[1].sum() > mask[0].sum()


def test_too_large_layers_get_the_losses_of_the_first_step(monkeypatch) -> None:
    w = np.random.default_rng(6).standard_normal((8, 32, 1, 1)).astype(np.float32)
    h = correlated(32, 7)
    monkeypatch.setattr(importance, "LIMIT", 0)
    scores = second_order_scores(w, h, Pattern())
    np.testing.assert_allclose(scores[:, :, 0, 0], w[:, :, 0, 0] ** 2 / np.diagonal(np.linalg.inv(h)), rtol=1e-3)


def test_grouped_activations() -> None:
    w = np.ones((4, 2, 1, 1), np.float32)
    gram = np.stack([np.diag([1.0, 2.0]), np.diag([3.0, 4.0])])
    np.testing.assert_array_equal(activation_scores(w, gram)[:, :, 0, 0], [[1, 2], [1, 2], [3, 4], [3, 4]])
