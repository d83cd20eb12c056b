from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.passes.low_rank.decompositions import LOW_RANK, Form, Spatial, Svd, Tucker, low_rank_forms
from sparsec.passes.low_rank.factors import compose
from sparsec.passes.low_rank.metric import Metric, Objective, cholesky
from sparsec.passes.pruning.reconstruct import damp


def gram(rng: np.random.Generator, k: int, samples: int) -> np.ndarray:
    """E[x x^T] of correlated inputs of very different sizes."""
    x = rng.standard_normal((k, k)) @ (rng.standard_normal((k, samples)) * np.exp(1.5 * rng.standard_normal((k, 1))))
    return x @ x.T / samples


def goal(shape: tuple[int, int, int, int], seed: int = 0, white: bool = True) -> Objective:
    rng = np.random.default_rng(seed)
    k = int(np.prod(shape[1:]))
    weight = rng.standard_normal(shape).astype(np.float32)
    return Objective(weight, Metric(damp(gram(rng, k, 4 * k), 0.01)[0] if white else None))


FULL: list[tuple[tuple[int, int, int, int], Form]] = [
    ((7, 5, 1, 1), Svd(5)),
    ((5, 7, 1, 1), Svd(5)),
    ((6, 4, 3, 3), Svd(6)),
    ((6, 4, 3, 5), Spatial(12)),
    ((6, 4, 3, 3), Tucker(4, 6)),
    ((30, 2, 3, 1), Svd(6)),
]


@pytest.mark.parametrize("white", [False, True])
@pytest.mark.parametrize(("shape", "form"), FULL, ids=str)
def test_full_rank_is_the_weight(shape, form, white) -> None:
    wanted = goal(shape, 1, white)
    made = form.build(wanted)
    np.testing.assert_allclose(made.dense(), wanted.weight, atol=1e-5 * np.abs(wanted.weight).max())
    assert made.parameters == form.parameters(shape)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(8, 6, 1, 1), (4, 12, 1, 1), (12, 4, 1, 1), (6, 3, 3, 3)]),
    rank=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    samples=st.sampled_from([3, 20, 200]),
)
def test_whitened_is_never_worse_than_plain_on_the_data_it_saw(shape, rank, seed, samples) -> None:
    rng = np.random.default_rng(seed)
    weight, k = rng.standard_normal(shape), int(np.prod(shape[1:]))
    seen = gram(rng, k, samples)
    damped = Metric(seen + 0.01 * np.trace(seen) / k * np.eye(k))
    judge = Objective(weight, Metric(seen))
    white = Svd(rank).build(Objective(weight, damped))
    plain = Svd(rank).build(Objective(weight))
    assert judge.loss(white) <= judge.loss(plain) * (1 + 1e-9) + 1e-12 * judge.power


def test_the_loss_of_a_rank_is_the_tail_of_the_spectrum() -> None:
    wanted = goal((10, 8, 1, 1))
    for rank in (1, 3, 8):
        assert wanted.loss(Svd(rank).build(wanted)) == pytest.approx(
            wanted.spectrum.loss(rank), abs=1e-9 * wanted.power
        )
    energies = wanted.spectrum.energies
    share = energies[:3].sum() / energies.sum()
    assert wanted.spectrum.rank_of(share) == 3
    assert wanted.spectrum.rank_of(1.0) == 8


def test_no_other_factors_of_the_rank_lose_less() -> None:
    wanted = goal((10, 8, 1, 1))
    rng = np.random.default_rng(5)
    best = wanted.loss(Svd(3).build(wanted))
    for _ in range(5):  # alternating least squares from anywhere
        v = rng.standard_normal((3, 8))
        for _ in range(50):
            u = wanted.metric.behind(wanted.matrix, v)
            v = np.linalg.lstsq(u, wanted.matrix, rcond=None)[0]
        assert wanted.metric.loss(wanted.matrix - u @ v) >= best * (1 - 1e-9)


@pytest.mark.parametrize("form", [Spatial(3), Tucker(3, 4)], ids=str)
def test_factors_behind_the_first_are_refitted_in_the_metric(form) -> None:
    wanted = goal((6, 4, 3, 3))
    made = form.build(wanted)
    assert wanted.loss(made) < wanted.loss(form.build(Objective(wanted.weight)))
    chain = made.chains[0]
    for _ in range(10):  # the last factor is at its optimum
        other = chain[-1][1] + 1e-2 * np.random.default_rng(0).standard_normal(chain[-1][1].shape)
        weight = compose(compose(*(f for _, f in chain[:-1])) if len(chain) > 2 else chain[0][1], other)
        assert wanted.metric.loss((wanted.weight - weight).reshape(6, -1)) > wanted.loss(made)


def test_offered_forms_hold_the_budget_in_multiples() -> None:
    shape = (32, 24, 3, 3)
    kinds = set()
    for share in (0.2, 0.5, 0.8):
        for form in low_rank_forms(shape, share * 32 * 24 * 9, 4):
            assert form.parameters(shape) <= share * 32 * 24 * 9
            ranks = (form.inner, form.rank) if isinstance(form, Tucker) else (form.rank,)  # type: ignore[attr-defined]
            assert all(rank % 4 == 0 and rank > 0 for rank in ranks)
            kinds.add(type(form))
    assert kinds == {Svd, Spatial, Tucker}
    assert [type(f) for f in low_rank_forms((32, 24, 1, 1), 400, 1)] == [Svd]
    assert list(low_rank_forms((32, 24, 1, 1), 40, 1)) == []
    assert LOW_RANK == ("svd", "spatial", "tucker")


def test_a_singular_matrix_has_a_root() -> None:
    h = np.zeros((4, 4))
    h[0, 0] = 1.0
    root = cholesky(h)
    np.testing.assert_allclose(root @ root.T, h, atol=1e-9)
