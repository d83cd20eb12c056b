from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest

from sparsec.errors import DataError, RecipeError
from sparsec.passes.measure.fidelity import Fidelity
from sparsec.passes.measure.journal import Journal, digest
from sparsec.passes.measure.trial import Part, Trials, fetch, pick_samples
from sparsec.passes.normalization.fold_constants import quiet_session
from sparsec.passes.pruning import sensitivity as module
from sparsec.passes.pruning.sensitivity import sensitivity
from tests.passes.allocation import NAMES, by_magnitude, chosen, data, network
from tests.passes.conftest import save

LEVELS = (0.25, 0.5, 0.75)


def outputs(model: ir.Model, samples) -> list[np.ndarray]:
    session = quiet_session(save(model))
    return [np.stack(ys) for ys in zip(*(session.run(None, s) for s in samples), strict=True)]


def damage_of(name: str, sparsity: float, samples) -> float:
    """The model written out with one layer pruned, run whole."""
    made = network()
    reference = Fidelity(["y", "side"], outputs(made, samples))
    layer = next(v for v in chosen(made) if v.name == name)
    layer.write(by_magnitude(layer, sparsity))
    return float(reference.damages(outputs(made, samples)).mean())


def test_damages_are_those_of_the_model_with_one_layer_pruned() -> None:
    made, samples = network(), data()
    before = save(made)
    found = sensitivity(made, chosen(made), by_magnitude, samples, LEVELS)
    assert save(made) == before
    assert tuple(found) == NAMES
    for layer in chosen(made):
        levels = found[layer.name]
        assert [v.sparsity for v in levels] == [0.0, *LEVELS]
        assert [v.zeros for v in levels] == [round(s * layer.size) for s in (0.0, *LEVELS)]
        assert [v.cost for v in levels] == [layer.size - v.zeros for v in levels]
        assert levels[0].damage == 0
        for level in levels[1:]:
            assert level.damage == pytest.approx(damage_of(layer.name, level.sparsity, samples), rel=1e-3, abs=1e-7)
            assert level.damage > 0


@pytest.mark.parametrize("cache", [1, 1500, 30_000])
def test_the_same_whatever_is_held_at_a_time(cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network()
    expected = sensitivity(made, chosen(made), by_magnitude, data(), LEVELS)
    monkeypatch.setattr(module, "CACHE_BYTES", cache)
    found = sensitivity(made, chosen(made), by_magnitude, data(), LEVELS)
    for name in NAMES:
        assert [v.damage for v in found[name]] == pytest.approx([v.damage for v in expected[name]], rel=1e-6)


def test_levels_that_add_no_zero_are_left_out() -> None:
    made = network()
    layer = chosen(made)[1]
    layer.write(by_magnitude(layer, 0.5))
    levels = sensitivity(made, [layer], by_magnitude, data(), LEVELS)[layer.name]
    assert [v.sparsity for v in levels] == [0.0, 0.75]
    assert levels[0].zeros == layer.size // 2


def test_other_initializers_may_change_with_the_weight() -> None:
    made, samples = network(), data()
    layer = chosen(made)[1]

    def with_bias(layer, sparsity):
        return by_magnitude(layer, sparsity), {"bias": np.full(8, 9.0, np.float32)}

    found = sensitivity(made, [layer], with_bias, samples, [0.25])
    expected = network()
    same = next(v for v in chosen(expected) if v.name == layer.name)
    same.write(by_magnitude(same, 0.25))
    expected.graph.initializers["bias"].const_value = ir.tensor(np.full(8, 9.0, np.float32), name="bias")
    reference = Fidelity(["y", "side"], outputs(made, samples))
    damage = reference.damages(outputs(expected, samples)).mean()
    assert found[layer.name][1].damage == pytest.approx(damage, rel=1e-3)


def test_an_initializer_that_other_nodes_read_cannot_change() -> None:
    made = network()
    part = Part(made, ["point"])
    with pytest.raises(ValueError, match="not read by the changed part alone: first"):
        part.session({"point": chosen(made)[2].read(), "first": np.zeros((8, 3, 1, 1), np.float32)})


def test_a_part_holds_what_depends_on_the_weight_and_reads_the_rest() -> None:
    made, samples = network(), data(3)
    part = Part(made, ["middle"])
    assert part.inputs == ("r",)
    assert part.outputs == (0,)
    values = fetch(made, part.inputs, samples)
    np.testing.assert_allclose(part.run({}, values)[0], outputs(made, samples)[0], rtol=1e-4, atol=1e-5)


def test_a_part_may_read_what_is_an_output_too(model) -> None:
    made = model(
        "g (float[2,4] x) => (float[2,4] r, float[2,4] y) { r = Relu(x) y = MatMul(r, w) }", w=np.eye(4, dtype="f4")
    )
    part = Part(made, ["w"])
    assert (part.inputs, part.outputs) == (("r",), (1,))
    x = np.arange(-3, 5, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(part.run({"w": 2 * np.eye(4, dtype="f4")}, [{"r": x}])[0][0], 2 * x)


def test_continues_from_the_journal_and_ends_the_same(tmp_path) -> None:
    made, samples = network(), data()
    expected = sensitivity(made, chosen(made), by_magnitude, samples, LEVELS)
    path, key = tmp_path / "state.json", digest(made, samples, "magnitude")
    asked: list[str] = []

    def stops(layer, sparsity):
        asked.append(layer.name)
        if layer.name == "Conv_5":
            raise KeyboardInterrupt
        return by_magnitude(layer, sparsity)

    with pytest.raises(KeyboardInterrupt):
        sensitivity(made, chosen(made), stops, samples, LEVELS, journal=Journal(path, key))
    assert set(json.loads(path.read_text())["entries"]) == {"Conv_2", "Conv_3"}
    asked.clear()

    def counts(layer, sparsity):
        asked.append(layer.name)
        return by_magnitude(layer, sparsity)

    assert sensitivity(made, chosen(made), counts, samples, LEVELS, journal=Journal(path, key)) == expected
    assert set(asked) == {"Conv_5", "Gemm_9"}
    asked.clear()
    again = sensitivity(made, chosen(made), counts, samples, LEVELS, journal=Journal(path, key))
    assert again == expected
    assert not asked
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_a_new_level_or_unit_measures_only_what_is_missing(tmp_path) -> None:
    made, samples, path = network(), data(), tmp_path / "state.json"
    key = digest(made, samples)
    sensitivity(made, chosen(made), by_magnitude, samples, LEVELS, journal=Journal(path, key))
    text = json.loads(path.read_text())
    text["entries"]["Conv_2"]["0.5"]["damage"] = 123.0  # shows what was read from the file
    path.write_text(json.dumps(text))
    found = sensitivity(
        made, chosen(made), by_magnitude, samples, (*LEVELS, 0.9),
        lambda layer, weight: 7.0, "other", Journal(path, key),
    )  # fmt: skip
    assert [v.damage for v in found["Conv_2"]][2] == 123.0
    assert found["Conv_2"][4].damage > 0
    assert {v.cost for v in found["Conv_2"]} == {7.0}


def test_a_journal_of_something_else_is_refused_in_one_line(tmp_path) -> None:
    made, samples, path = network(), data(), tmp_path / "state.json"
    Journal(path, digest(made, samples, "4x1")).put("a", 1)
    for key in (digest(made, samples, "8x1"), digest(made, samples[1:], "4x1"), digest(network(3), samples, "4x1")):
        with pytest.raises(
            RecipeError, match="measured on another model, calibration data or way of pruning"
        ) as caught:
            Journal(path, key)
        assert "\n" not in str(caught.value)
    assert Journal(path, digest(made, samples, "4x1")).get("a") == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2, "key": "", "entries": {}}', '{"version": 1}', "\x00"])
def test_a_damaged_journal_is_refused(tmp_path, text: str) -> None:
    path = tmp_path / "state.json"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"state\.json"):
        Journal(path, "")
    with pytest.raises(RecipeError, match="cannot be written"):
        Journal(tmp_path / "missing" / "state.json", "").put("a", 1)


def test_samples_are_spread_over_the_data() -> None:
    made = network()
    stream = data(21)
    picked = pick_samples(made, stream, 5)
    assert [next(i for i, s in enumerate(stream) if s["x"] is p["x"]) for p in picked] == [0, 5, 10, 15, 20]
    assert len(pick_samples(made, stream, 500)) == 21
    stacked = {"x": np.concatenate([s["x"] for s in stream])}
    np.testing.assert_array_equal(pick_samples(made, stacked, 5)[3]["x"], stream[15]["x"])
    with pytest.raises(DataError, match="no sample"):
        pick_samples(made, [], 5)


def test_trials_of_the_whole_model_add_layers_up() -> None:
    made, samples = network(), data()
    trials = Trials(made, chosen(made), by_magnitude, samples)
    both = {"Conv_3": 0.5, "Gemm_9": 0.25, "Conv_5": 0.0}
    pruned = network()
    for layer in chosen(pruned):
        if both.get(layer.name, 0):
            layer.write(by_magnitude(layer, both[layer.name]))
    reference = Fidelity(["y", "side"], outputs(made, samples))
    expected = reference.damages(outputs(pruned, samples))
    np.testing.assert_allclose(trials.damages(both), expected, rtol=1e-3, atol=1e-7)
    assert trials.damages_of([both], [1, 4])[0] == pytest.approx(expected[[1, 4]].mean(), rel=1e-3)
    assert trials.measured(both)[1] == reference.changed(outputs(pruned, samples)).mean()
