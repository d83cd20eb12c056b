from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from sparsec.passes.layers import weighted_layers
from sparsec.passes.measure.replay import Pairs, Replay, goal_of
from sparsec.passes.measure.statistics import Activations
from sparsec.passes.normalization.fold_constants import quiet_session
from sparsec.passes.pruning.reconstruct import TRUSTS, held_out_trust, problems, reconstruct
from sparsec.rewriting.passes_api import Stacked

RNG = np.random.default_rng(11)
BLOCK = """g (float[1,6,8,8] x) => (float[1,5] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w0, b0)
    r = Relu(a)
    b = Conv(r, w1, b1)
    c = Clip(b, low, high)
    d = Conv<group = 12, pads = [1, 1, 1, 1]>(c, w2, b2)
    e = Conv(d, w3, b3)
    s = Add(e, r)
    p = GlobalAveragePool(s)
    f = Flatten(p)
    m = MatMul(f, w4)
    y = Add(m, b4)
}"""


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def block_weights() -> dict[str, np.ndarray]:
    return {
        "w0": f32(8, 6, 3, 3), "b0": f32(8), "w1": f32(12, 8, 1, 1) / 4, "b1": f32(12), "w2": f32(12, 1, 3, 3) / 2,
        "b2": f32(12), "w3": f32(8, 12, 1, 1) / 4, "b3": f32(8), "w4": f32(8, 5), "b4": f32(1, 5),
        "low": np.float32(0), "high": np.float32(6),
    }  # fmt: skip


def samples(count: int = 24) -> Stacked:
    return Stacked({"x": np.random.default_rng(5).standard_normal((count, 6, 8, 8)).astype(np.float32)})


def outputs(made: ir.Model, data: Stacked) -> np.ndarray:
    session = quiet_session(ir.to_proto(made).SerializeToString())
    return np.concatenate([session.run(None, sample)[0] for sample in data])


def by_name(made: ir.Model) -> dict[str, object]:
    return {layer.name: layer for layer in weighted_layers(made)}


def test_goals_lie_behind_biases(model) -> None:
    goals = [goal_of(layer) for layer in weighted_layers(model(BLOCK, **block_weights()))]
    assert [g.value.name for g in goals] == ["a", "b", "d", "e", "y"]
    assert [g.bias.name if g.bias else None for g in goals] == ["b0", "b1", "b2", "b3", "b4"]


def test_a_constant_that_others_read_or_a_value_is_no_bias(model) -> None:
    made = model(
        "g (float[1,4] x) => (float[1,4] y, float[1,4] z) { a = MatMul(x, v) b = Add(a, c) d = MatMul(b, w) y = Add(d, x)"
        " z = Add(x, c) }",
        v=f32(4, 4), w=f32(4, 4), c=f32(4),
    )  # fmt: skip
    assert [g.bias for g in map(goal_of, weighted_layers(made))] == [None, None]


@pytest.mark.parametrize("store", [0, 1 << 16, 1 << 18, 1 << 30])
def test_moments_of_the_walk_are_those_of_both_models(model, store: int) -> None:
    weights = block_weights()
    original, changed = model(BLOCK, **weights), model(BLOCK, **weights)
    replay = Replay(original, changed, samples(), store)
    found = {}
    for layer in weighted_layers(changed):
        folds, _ = replay.pairs(layer)
        found[layer.name] = folds[0] + folds[1]
        layer.write(layer.read() * np.float32(0.9))
        replay.changed(layer)

    def values(made: ir.Model, names: list[str]) -> dict[str, np.ndarray]:
        proto = ir.to_proto(made)
        for name in names:
            proto.graph.output.append(type(proto.graph.output[0])(name=name))
        session = quiet_session(proto.SerializeToString())
        runs = [session.run(names, sample) for sample in samples()]
        return {name: np.concatenate([run[i] for run in runs]) for i, name in enumerate(names)}

    names = ["d", "e"]
    own, other = values(changed, names), values(original, names)
    x = np.moveaxis(own["d"], 1, 0).reshape(12, -1).astype(np.float64)
    y = np.moveaxis(other["e"], 1, 0).reshape(8, -1).astype(np.float64)
    pairs = found["Conv_5"]
    assert pairs.count == 24 * 64
    np.testing.assert_allclose(pairs.xx[0], x @ x.T / x.shape[1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pairs.yx[0], y @ x.T / x.shape[1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pairs.yy, (y * y).mean(axis=1), rtol=1e-4)
    np.testing.assert_allclose(pairs.y, y.mean(axis=1), atol=1e-4)
    np.testing.assert_allclose(pairs.x[0], x.mean(axis=1), atol=1e-4)


def random_pairs(n: int, k: int, seed: int = 2) -> tuple[np.ndarray, Pairs, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((k, 400)) + 0.5
    w = rng.standard_normal((n, k, 1, 1))
    y = w[:, :, 0, 0] @ x + 0.1 * rng.standard_normal((n, 400)) + 1.0
    pairs = Pairs((x @ x.T)[None], (y @ x.T)[None], (y * y).sum(axis=1), x.sum(axis=1)[None], y.sum(axis=1), 400)
    return w, pairs.means(), x, y


def test_refit_without_ridge_is_least_squares_on_the_support() -> None:
    w, pairs, x, y = random_pairs(4, 10)
    (problem,) = problems(w, pairs, centred=True, ridge=1e-12)
    mask = np.random.default_rng(3).random((4, 10)) < 0.6
    found = problem.refit(mask)
    centred, goal = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    for row in range(4):
        s = mask[row]
        expected = np.linalg.lstsq(centred[s].T, goal[row], rcond=None)[0]
        np.testing.assert_allclose(found[row, s], expected, rtol=1e-3)
        assert not found[row, ~s].any()
        residual = goal[row] - expected @ centred[s]
        assert problem.error(found)[row] == pytest.approx((residual**2).mean(), rel=1e-3)


def test_conjugate_gradients_reach_the_same_optimum() -> None:
    w, pairs, *_ = random_pairs(6, 40)
    (problem,) = problems(w, pairs, centred=False, ridge=0.01)
    mask = np.random.default_rng(4).random((6, 40)) < 0.5
    np.testing.assert_allclose(problem.descend(mask, problem.start, 200), problem.refit(mask), atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_row_without_a_goal_stays_finite(dtype: type) -> None:
    """A dead channel: in float32 the smallest double is no divisor."""
    _, pairs, *_ = random_pairs(3, 12)
    w = np.random.default_rng(6).standard_normal((3, 12, 1, 1))
    (found,) = problems(w, pairs, centred=False, ridge=1e-9)
    t, start = found.t.astype(dtype), found.start.astype(dtype)
    t[1] = start[1] = 0
    problem = replace(found, h=found.h.astype(dtype), t=t, start=start)
    mask = np.ones((3, 12), bool)
    w = problem.descend(mask, problem.start, 200)
    assert np.isfinite(w).all()
    assert not w[1].any()
    np.testing.assert_allclose(w[0], np.linalg.solve(found.h, found.t[0]), atol=1e-3)


def test_rows_of_a_block_are_solved_together_as_they_are_alone() -> None:
    w, pairs, *_ = random_pairs(7, 12)
    (problem,) = problems(w, pairs, centred=True)
    mask = np.repeat(np.random.default_rng(5).random((2, 12)) < 0.5, 4, axis=0)[:7]
    rows = [np.linalg.solve(problem.h[np.ix_(m, m)], problem.t[i, m]) for i, m in enumerate(mask)]
    found = problem.refit(mask)
    for i, row in enumerate(rows):
        np.testing.assert_allclose(found[i, mask[i]], row, atol=1e-9)


def test_the_ridge_pulls_to_the_original_weights() -> None:
    w, pairs, *_ = random_pairs(3, 8)
    pairs.yx[:] = 0  # the data asks for zeros
    (problem,) = problems(w, pairs, centred=False, ridge=1e9)
    np.testing.assert_allclose(problem.full(), w.reshape(3, 8), rtol=1e-3)


def test_reconstruction_keeps_masks_and_comes_closer_to_the_original(model) -> None:
    weights = block_weights()
    original, masked, refitted, pruned_only = (model(BLOCK, **weights) for _ in range(4))
    rng = np.random.default_rng(9)
    shapes = {name: layer.shape for name, layer in by_name(original).items() if name in ("Conv_2", "Conv_5")}
    masks = {name: rng.random(shape) < 0.6 for name, shape in shapes.items()}
    for name, mask in masks.items():
        layer = by_name(masked)[name]
        layer.write(np.where(mask, layer.read(), np.float32(0)))
    # Variances are left alone: squared error is least without that.
    done = list(reconstruct(refitted, masks, samples(), rescale=False))
    list(reconstruct(pruned_only, masks, samples(), rescale=False, others=False))
    assert [r.layer.name for r in done] == ["Conv_2", "Conv_4", "Conv_5", "MatMul_9"]
    assert all(r.error is not None and 0 <= r.error < 1.5 and r.trust in TRUSTS for r in done)
    for made in (refitted, pruned_only):
        for name, mask in masks.items():
            assert not by_name(made)[name].read()[~mask].any()
    fresh = Stacked({"x": np.random.default_rng(99).standard_normal((50, 6, 8, 8)).astype(np.float32)})
    y = outputs(original, fresh)
    errors = [float(np.square(outputs(made, fresh) - y).mean()) for made in (masked, pruned_only, refitted)]
    assert errors[2] < errors[1] < 0.5 * errors[0]


def test_nothing_masked_changes_nothing_but_rounding(model) -> None:
    weights = block_weights()
    original, made = model(BLOCK, **weights), model(BLOCK, **weights)
    list(reconstruct(made, {"Conv_2": np.ones((12, 8, 1, 1), bool)}, samples()))
    np.testing.assert_allclose(outputs(made, samples(4)), outputs(original, samples(4)), rtol=1e-4, atol=1e-4)


def test_zeros_of_layers_that_are_only_repaired_stay(model) -> None:
    weights = block_weights()
    weights["w3"][:, ::3] = 0
    made = model(BLOCK, **weights)
    mask = np.random.default_rng(9).random((12, 8, 1, 1)) < 0.6
    list(reconstruct(made, {"Conv_2": mask}, samples()))
    assert not by_name(made)["Conv_5"].read()[:, ::3].any()


def test_tied_weights_are_masked_and_not_refitted(model) -> None:
    made = model(
        "g (float[1,4,5,5] x) => (float[1,4,5,5] y) { a = Conv(x, w) b = Relu(a) y = Conv(b, w) }", w=f32(4, 4, 1, 1)
    )
    mask = np.random.default_rng(9).random((4, 4, 1, 1)) < 0.5
    before = next(weighted_layers(made)).read().copy()
    list(reconstruct(made, {"Conv_0": mask}, Stacked({"x": f32(8, 4, 5, 5)}), others=False))
    np.testing.assert_array_equal(next(weighted_layers(made)).read(), np.where(mask, before, 0))


def test_trust_moves_the_goal_from_the_own_product_to_the_original() -> None:
    w, pairs, *_ = random_pairs(4, 10)
    pairs.yx *= 2  # the original gave twice of what the layer gives now
    own = w[:, :, 0, 0]
    mask = np.ones((4, 10), bool)
    for trust in (0.0, 0.3, 1.0):
        (problem,) = problems(w, pairs, centred=False, ridge=1e-9, trust=trust)
        goal = own @ pairs.xx[0] + trust * (pairs.yx[0] - own @ pairs.xx[0])
        expected = np.linalg.solve(pairs.xx[0], goal.T).T
        np.testing.assert_allclose(problem.refit(mask), expected, atol=1e-4)


def test_held_out_samples_decide_how_much_is_trusted() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((8, 20, 1, 1))

    def fold(count: int, signal: float, noise: float) -> Pairs:
        x = rng.standard_normal((20, count))
        y = (w[:, :, 0, 0] * (1 + signal)) @ x + noise * rng.standard_normal((8, count))
        found = Pairs((x @ x.T)[None], (y @ x.T)[None], (y * y).sum(axis=1), x.sum(axis=1)[None], y.sum(axis=1), count)
        return found.means()

    kept = np.ones((1, 8, 20), bool)
    systematic = held_out_trust(w, kept, (fold(500, 0.5, 0.1), fold(500, 0.5, 0.1)), True, 1e-3)
    only_noise = held_out_trust(w, kept, (fold(30, 0.0, 5.0), fold(30, 0.0, 5.0)), True, 1e-3)
    assert systematic == 1.0
    assert only_noise == 0.0


def test_every_channel_has_the_variance_of_the_original(model) -> None:
    weights = block_weights()
    original, made, plain = (model(BLOCK, **weights) for _ in range(3))
    mask = np.random.default_rng(9).permuted(np.tile(np.arange(8) > 1, (12, 1)), axis=1).reshape(12, 8, 1, 1)
    list(reconstruct(made, {"Conv_2": mask}, samples(), others=False))
    list(reconstruct(plain, {"Conv_2": mask}, samples(), rescale=False, others=False))
    found = []
    for each in (original, made, plain):
        (b,) = [np.concatenate([v["b"] for v in Activations(each).stream(["b"], samples())])]
        found.append((b.mean(axis=(0, 1, 3, 4)), b.var(axis=(0, 1, 3, 4))))
    for result in found[1:]:
        np.testing.assert_allclose(result[0], found[0][0], atol=1e-3)
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-3)
    assert (found[2][1] < found[0][1]).all()
    assert found[2][1].sum() < 0.9 * found[0][1].sum()
