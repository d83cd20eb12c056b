from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.passes.pruning.importance import second_order_scores
from sparsec.passes.pruning.masks import Pattern, draw_masks, magnitude
from sparsec.passes.pruning.reconstruct import Problem, damp
from sparsec.passes.pruning.regrow import regrow

PATTERNS = st.sampled_from(["1x1", "4x1", "2x2", "1x3", "2:4", "1:3"])


def pattern_of(text: str) -> Pattern:
    return Pattern.parse(nm=text) if ":" in text else Pattern.parse(text)


def layer(n: int, ic: int, k: int = 1, seed: int = 0) -> tuple[np.ndarray, Problem]:
    """A weight [n, ic, k, k] and its problem, with inputs that are far from independent."""
    rng, size = np.random.default_rng(seed), ic * k * k
    x = rng.standard_normal((3 * size, size // 3 + 1)) @ rng.standard_normal((size // 3 + 1, size))
    x += 0.3 * rng.standard_normal(x.shape)
    h = damp(x.T @ x / len(x), 0.01)[0]
    weight = rng.standard_normal((n, ic, k, k))
    rows = weight.reshape(n, -1)
    return weight, Problem(h, rows @ h, rows, np.einsum("nk,nk->n", rows @ h, rows))


def exact(problem: Problem, mask: np.ndarray) -> float:
    """The error of the rows refitted under `mask`, one by one."""
    total = float(problem.constant.sum())
    for row, t in zip(mask, problem.t, strict=True):
        s = np.flatnonzero(row)
        total -= float(t[s] @ np.linalg.solve(problem.h[np.ix_(s, s)], t[s])) if s.size else 0.0
    return total


def swapped(weight: np.ndarray, problem: Problem, mask: np.ndarray, pattern: Pattern) -> np.ndarray:
    return regrow(mask.reshape(len(weight), -1), problem.h, problem.t, weight.shape, pattern)


@given(PATTERNS, st.integers(1, 9), st.integers(3, 10), st.sampled_from([1, 2]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_pattern_and_the_share_stay_and_the_error_never_rises(
    text: str, n: int, ic: int, k: int, seed: int
) -> None:
    pattern = pattern_of(text)
    weight, problem = layer(n, ic, k, seed)
    (mask,) = draw_masks([np.ones(weight.shape)], [magnitude(weight)], pattern, 0.5)
    found = swapped(weight, problem, mask, pattern)
    height = pattern.rows
    for top in range(0, n, height):
        before, after = mask.reshape(n, -1)[top : top + height], found[top : top + height]
        assert (after == after[0]).all()
        assert before.sum() == after.sum()
    kept = found.reshape(mask.shape)
    if pattern.keep:
        whole = ic // pattern.group * pattern.group
        by_group = kept[:, :whole].reshape(n, -1, pattern.group, k, k).sum(axis=2)
        assert (by_group == pattern.keep).all()
    else:
        whole = ic // pattern.columns * pattern.columns
        blocks = kept[:, :whole].reshape(n, -1, pattern.columns, k, k)
        assert (blocks == blocks[:, :, :1]).all()
    assert exact(problem, found) <= exact(problem, mask.reshape(n, -1)) * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("text", ["1x1", "4x1", "2x2", "2:4"])
def test_a_bad_mask_becomes_better_and_a_second_run_changes_nothing(text: str) -> None:
    pattern = pattern_of(text)
    weight, problem = layer(8, 24, 1, seed=3)
    (mask,) = draw_masks([np.ones(weight.shape)], [-magnitude(weight)], pattern, 0.5)
    found, errors = mask.reshape(8, -1), []
    for _ in range(12):  # ROUNDS bounds one run
        errors.append(exact(problem, found))
        again = swapped(weight, problem, found, pattern)
        if np.array_equal(again, found):
            break
        found = again
    np.testing.assert_array_equal(again, found)
    assert errors[-1] < 0.8 * errors[0]
    assert errors == sorted(errors, reverse=True)


def test_independent_inputs_keep_what_carries_most() -> None:
    """With H = I the error of a support is what it leaves out, so the best one is known: the largest sum t^2."""
    goals = np.random.default_rng(5).standard_normal((4, 40))
    worth = np.square(goals).sum(axis=0)
    mask = np.ones((4, 40), bool)
    mask[:, np.argsort(worth)[-3:]] = False  # the three best are missing
    found = regrow(mask, np.eye(40), goals, (4, 40, 1, 1), Pattern.parse("4x1"))
    assert set(np.flatnonzero(~found[0])) == set(np.argsort(worth)[:3])


def test_second_order_masks_of_n_of_m_leave_something_to_gain() -> None:
    """Greedy elimination fills the quota of a group before it knows what its neighbours lose."""
    weight, problem = layer(24, 48, 1, seed=7)
    pattern = pattern_of("2:4")
    (mask,) = draw_masks([weight], [second_order_scores(weight, problem.h, pattern)], pattern, 0.5)
    before, after = exact(problem, mask.reshape(24, -1)), exact(problem, swapped(weight, problem, mask, pattern))
    assert after < 0.95 * before


@pytest.mark.parametrize("fill", [True, False])
def test_rows_without_a_choice_stay(fill: bool) -> None:
    weight, problem = layer(4, 8)
    mask = np.full((4, 8), fill)
    np.testing.assert_array_equal(swapped(weight, problem, mask, Pattern.parse("4x1")), mask)


def test_rows_that_are_no_blocks_stay() -> None:
    weight, problem = layer(4, 12, seed=1)
    mask = np.random.default_rng(0).random((4, 12)) < 0.5
    np.testing.assert_array_equal(swapped(weight, problem, mask, Pattern.parse("4x1")), mask)
