from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.errors import RecipeError
from sparsec.passes.low_rank import cospadi, residual_sparse
from sparsec.passes.low_rank.armor import Armor, block_mask, blocks
from sparsec.passes.low_rank.cospadi import Dictionary, ksvd, omp
from sparsec.passes.low_rank.decompositions import Svd
from sparsec.passes.low_rank.factor_forms import Menu, stored_bytes
from sparsec.passes.low_rank.metric import Metric, Objective
from sparsec.passes.low_rank.monarch import Monarch
from sparsec.passes.low_rank.residual_sparse import ROUGH, LowRankPlusSparse, Sparse, on_mask, swapped
from sparsec.passes.pruning.masks import Pattern, n_of_m_mask
from tests.passes.low_rank.test_decompositions import goal

BOTH = pytest.mark.parametrize("white", [False, True])
NM = Pattern(1, 1, 2, 4)


# ---- low rank plus sparse


@BOTH
def test_a_residual_with_full_support_is_the_weight(white) -> None:
    wanted = goal((12, 8, 1, 1), 2, white)
    made = LowRankPlusSparse(Svd(2), 1.0).build(wanted)
    np.testing.assert_allclose(made.dense(), wanted.weight, atol=1e-5)


@BOTH
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(4, 1), NM], ids=str)
def test_a_residual_only_helps_and_keeps_its_pattern(white, pattern) -> None:
    wanted = goal((16, 12, 1, 1), 3, white)
    density = 1 - pattern.share if pattern.keep else 0.25
    made = LowRankPlusSparse(Svd(3), density, pattern).build(wanted)
    assert wanted.loss(made) < wanted.loss(Svd(3).build(wanted))
    s = made.chains[1][0][1]
    assert np.count_nonzero(s) <= density * s.size
    if pattern.keep:
        assert n_of_m_mask(np.abs(s), 2, 4)[s != 0].all()
    elif pattern.rows == 4:
        used = (s != 0).reshape(4, 4, 12).any(axis=1)
        assert used.sum() * 4 == np.count_nonzero(s)


def test_planted_low_rank_plus_sparse_is_found() -> None:
    rng = np.random.default_rng(0)
    low = rng.standard_normal((24, 2)) @ rng.standard_normal((2, 20))
    spikes = np.where(rng.random((24, 20)) < 0.05, 8 * np.sign(rng.standard_normal((24, 20))), 0)
    wanted = Objective((low + spikes)[:, :, None, None])
    density = np.count_nonzero(spikes) / spikes.size
    both = wanted.loss(LowRankPlusSparse(Svd(2), density).build(wanted)) / wanted.power
    alone = min(wanted.loss(Svd(5).build(wanted)), wanted.loss(Sparse(0.5).build(wanted))) / wanted.power
    assert both < 1e-3 < alone


@BOTH
def test_one_weight_of_a_swap_lowers_the_loss_by_its_curvature(white) -> None:
    """Of all single weights the one drawn is, U V solved again, about the best; the estimate is first order in U V."""
    wanted, form = goal((9, 8, 1, 1), 4, white), Svd(2)
    low = form.build(wanted)
    rest = wanted.minus(low.dense())
    drawn = swapped(rest, low, np.zeros(wanted.shape), 1 / 72, Pattern())
    assert np.count_nonzero(drawn) == 1
    losses = np.empty((9, 8))
    for i, j in np.ndindex(9, 8):
        mask = np.zeros(wanted.shape, bool)
        mask[i, j] = True
        s = np.zeros(wanted.shape)
        for _ in range(200):
            s = on_mask(wanted.minus(form.build(wanted.minus(s)).dense()), mask)
        losses[i, j] = wanted.minus(s).loss(form.build(wanted.minus(s)))
    assert losses[drawn[:, :, 0, 0]][0] <= np.quantile(losses, 0.1)
    assert (losses < wanted.loss(low)).all()


def test_the_search_is_not_above_alternation_with_one_way_to_draw_masks() -> None:
    wanted = goal((24, 20, 1, 1), 5, True)
    both = wanted.loss(LowRankPlusSparse(Svd(4), 0.1).build(wanted))
    for prunes, swaps in ((4, 0), (0, 12)):
        ways = residual_sparse.rounds(wanted, Svd(4), 0.1, Pattern(), prunes, swaps)
        assert both <= min(found.loss for found in ways) * (1 + 1e-9)


def test_a_form_is_compared_roughly_and_built_in_full() -> None:
    wanted = goal((24, 20, 1, 1), 5, True)
    rough = LowRankPlusSparse(Svd(4), 0.1, work=ROUGH)
    assert rough.fine == LowRankPlusSparse(Svd(4), 0.1) and str(rough.fine) == str(rough)
    assert wanted.loss(rough.fine.build(wanted)) <= wanted.loss(rough.build(wanted)) * (1 + 1e-9)


def test_sparse_alone_is_refitted() -> None:
    wanted = goal((8, 12, 1, 1))
    mask = Sparse(0.5).build(wanted).dense() != 0
    assert mask.sum() == 48
    assert wanted.loss(Sparse(0.5).build(wanted)) < wanted.metric.loss(np.where(mask, 0, wanted.weight).reshape(8, -1))


# ---- Monarch


@settings(max_examples=20, deadline=None)
@given(
    tiles=st.sampled_from([(2, 2), (4, 2), (2, 3), (4, 4)]), rank=st.integers(1, 2), seed=st.integers(0, 1000),
    white=st.booleans(),
)  # fmt: skip
def test_the_projection_of_a_monarch_matrix_is_itself(tiles, rank, seed, white) -> None:
    rng = np.random.default_rng(seed)
    q, b = tiles
    weight = np.block(
        [[rng.standard_normal((4, rank)) @ rng.standard_normal((rank, 5)) for _ in range(b)] for _ in range(q)]
    )
    metric = goal((1, 5 * b, 1, 1), seed, white).metric
    made = Monarch(q, b, rank).build(Objective(weight[:, :, None, None], metric))
    np.testing.assert_allclose(made.dense()[:, :, 0, 0], weight, atol=1e-7 * np.abs(weight).max())


def test_monarch_factors_are_block_diagonal_but_for_a_permutation() -> None:
    made = Monarch(4, 3, 2).build(goal((16, 15, 1, 1)))
    right, left = (f[:, :, 0, 0] for _, f in made.chains[0])
    assert made.parameters == Monarch(4, 3, 2).parameters((16, 15, 1, 1)) == 2 * (3 * 16 + 4 * 15)
    for k in range(3):  # 8 rows each read their own 5 inputs
        outside = np.ones(15, bool)
        outside[5 * k : 5 * k + 5] = False
        assert not right[8 * k : 8 * k + 8, outside].any()
    order = np.arange(24).reshape(3, 4, 2).transpose(1, 0, 2).reshape(-1)  # (k, j, r) -> (j, k, r)
    for j in range(4):
        assert not np.delete(left[4 * j : 4 * j + 4][:, order], np.s_[6 * j : 6 * j + 6], axis=1).any()


def test_sweeps_in_the_metric_lower_the_loss() -> None:
    wanted = goal((16, 16, 1, 1))
    plain = Monarch(4, 4).build(Objective(wanted.weight))
    assert wanted.loss(Monarch(4, 4).build(wanted)) < wanted.loss(plain)


# ---- CoSpaDi


def test_every_output_has_its_number_of_coefficients() -> None:
    wanted = goal((40, 12, 1, 1))
    made = Dictionary(16, 4).build(wanted)
    atoms, codes = (f[:, :, 0, 0] for _, f in made.chains[0])
    assert atoms.shape == (16, 12)
    assert ((codes != 0).sum(axis=1) <= 4).all()
    assert made.parameters <= Dictionary(16, 4).parameters((40, 12, 1, 1))


@BOTH
def test_a_planted_dictionary_beats_low_rank(white) -> None:
    rng = np.random.default_rng(1)
    atoms = rng.standard_normal((16, 24))
    codes = np.zeros((200, 16))
    for row in codes:
        row[rng.choice(16, 2, replace=False)] = rng.standard_normal(2)
    wanted = Objective((codes @ atoms)[:, :, None, None], goal((1, 24, 1, 1), 1, white).metric)
    made = Dictionary(16, 2).build(wanted)
    rank = made.parameters // 224
    assert wanted.loss(made) < 0.5 * wanted.loss(Svd(rank).build(wanted))


def test_rounds_never_raise_the_loss(monkeypatch) -> None:
    wanted = goal((30, 10, 1, 1))
    losses = []
    for rounds in (0, 1, 2, 4, 8):
        monkeypatch.setattr(cospadi, "ROUNDS", rounds)
        losses.append(wanted.loss(Dictionary(12, 3).build(wanted)))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_one_pass_over_the_atoms_never_raises_the_loss_of_any_row() -> None:
    wanted = goal((30, 10, 1, 1))
    atoms = cospadi.start(wanted, 12)
    codes = omp(wanted.matrix, atoms, wanted.metric, 3)
    after = ksvd(wanted.matrix, codes, atoms, wanted.metric)
    assert wanted.metric.loss(wanted.matrix - after[0] @ after[1]) <= wanted.metric.loss(wanted.matrix - codes @ atoms)
    assert ((after[0] != 0) <= (codes != 0)).all()


def test_omp_finds_a_single_atom_exactly() -> None:
    wanted = goal((6, 10, 1, 1))
    codes = omp(3.0 * wanted.matrix[:2], wanted.matrix, wanted.metric, 1)
    np.testing.assert_allclose(codes, 3.0 * np.eye(6)[:2], atol=1e-6)


# ---- ARMOR


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), block=st.sampled_from([2, 4, 8]), white=st.booleans())
def test_armor_is_never_above_its_pattern_alone(seed, block, white) -> None:
    wanted = goal((16, 24, 1, 1), seed, white)
    alone = wanted.loss(Sparse(0.5, NM).build(wanted))
    assert wanted.loss(Armor(block).build(wanted)) <= alone * (1 + 1e-9)


def test_armor_has_a_core_in_the_pattern_between_block_diagonals() -> None:
    wanted = goal((16, 24, 1, 1))
    made = Armor(4).build(wanted)
    b, s, a = (f[:, :, 0, 0] for _, f in made.chains[0])
    assert not b[~block_mask(24, blocks(24, 4))].any()
    assert not a[~block_mask(16, blocks(16, 4))].any()
    assert ((s != 0).reshape(16, 6, 4).sum(axis=2) <= 2).all()
    assert made.parameters <= Armor(4).parameters((16, 24, 1, 1))
    assert wanted.loss(made) < 0.9 * wanted.loss(Sparse(0.5, NM).build(wanted))


# ---- the menu


def test_a_form_is_offered_once_and_holds_its_share() -> None:
    menu = Menu(("svd", "spatial", "tucker", "sparse", "monarch", "cospadi", "armor"), residual=True)
    for shape in ((64, 64, 1, 1), (16, 8, 3, 3)):
        size = int(np.prod(shape))
        forms = menu.offer(shape, size, 4, (0.5,))
        assert len({str(f) for f in forms}) == len(forms)
        assert all(f.parameters(shape) <= 0.9 * size + 1 for f in forms)
    kinds = {str(f).split()[0] for f in menu.offer((64, 64, 1, 1), 64 * 64, 4)}
    assert kinds == {"svd", "sparse", "monarch", "dictionary", "armor"}


def test_refusals_of_the_menu() -> None:
    with pytest.raises(RecipeError, match="forms must be some of svd"):
        Menu(("lu",))
    with pytest.raises(RecipeError, match="a residual stands beside"):
        Menu(("monarch",), residual=True)


def test_stored_bytes_takes_the_smallest_form() -> None:
    dense = np.ones((16, 10, 1, 1))
    assert stored_bytes(dense) == 4 * 160
    blocks_ = np.zeros((16, 10, 1, 1))
    blocks_[:, 3] = 1  # one 16 x 1 block
    assert stored_bytes(blocks_) == 16 * 4 + 2 + 4 * 2
    single = np.zeros((16, 10, 1, 1))
    single[3, 3] = 1
    assert stored_bytes(single) == min(6 + 4 * 17, 18 + 4 * 5, 34 + 4 * 3, 66 + 4 * 2)
    assert Metric().loss(np.eye(3)) == 3


def test_stored_bytes_of_blocks_of_four_inputs() -> None:
    weight = np.zeros((8, 16, 1, 1))
    weight[:, 4:8] = 1
    assert stored_bytes(weight) == 1 * (4 * 32 + 2) + 4 * 2  # one 8 x 4 block, one group
    assert stored_bytes(weight[:, :15]) > stored_bytes(weight)  # 15 inputs have no blocks of four
