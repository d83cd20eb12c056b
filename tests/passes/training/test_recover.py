"""Recovery: what it may touch, what it must refuse, that it brings a pruned model nearer to the original."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import onnx_ir as ir
import pytest
from samples import pair_model

from sparsec.errors import RecipeError, RuntimeUnavailable
from sparsec.loading.load import load_model, model_bytes
from sparsec.models import build, demo_data
from sparsec.passes import Prune
from sparsec.passes.layers import weighted_layers
from sparsec.passes.measure.matching import agreement, put_back
from sparsec.passes.normalization.fold_constants import quiet_session
from sparsec.passes.training.recover import Recover
from sparsec.rewriting.pipeline import run_passes

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs the extra [torch]; make test-torch runs this"
)
RNG = np.random.default_rng(11)


def demo() -> ir.Model:
    return load_model(build("demo"))


def samples(count: int, split: str = "calibration") -> dict[str, np.ndarray]:
    return {str(demo().graph.inputs[0].name): demo_data.generate(split, count)[0]}


def outputs(model: ir.Model, data: dict[str, np.ndarray]) -> np.ndarray:
    session = quiet_session(model_bytes(model))
    (name,) = data
    return np.concatenate([session.run(None, {name: x[None]})[0] for x in data[name]])


def divergence(model: ir.Model, data: dict[str, np.ndarray]) -> float:
    def logs(y: np.ndarray) -> np.ndarray:
        y = y.astype(np.float64) - y.max(axis=1, keepdims=True)
        return y - np.log(np.exp(y).sum(axis=1, keepdims=True))

    p, q = logs(outputs(demo(), data)), logs(outputs(model, data))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def constants(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: np.array(v.const_value.numpy()) for name, v in model.graph.initializers.items()}


PRUNE = "prune:sparsity=0.5,block=4x1,importance=magnitude,allocation=uniform,refit=none"


@needs_torch
@pytest.mark.parametrize("train", ["all", "bias", "lowrank"])
def test_recovers_and_keeps_every_zero_bit_by_bit(train: str) -> None:
    data, unseen = samples(48), samples(24, "test")
    harder = PRUNE.replace("0.5", "0.75")
    pruned, _ = run_passes(demo(), [harder], calibration=data)
    recover = f"recover:steps=60,rate=0.05,batch=16,patience=12,train={train},rank=2,threads=1"
    made, records = run_passes(demo(), [harder, recover], calibration=data)
    # 48 samples of another split: measured 0.74; a trainer that does nothing, or overfits, is at 1 or above
    assert divergence(made, unseen) < (0.85 if train == "all" else 0.9) * divergence(pruned, unseen)
    before, after = constants(pruned), constants(made)
    assert before.keys() == after.keys()
    changed = set()
    for layer in weighted_layers(made):
        name = str(layer.weight.name)
        zero = before[name] == 0
        assert (after[name][zero].view(np.uint32) == before[name][zero].view(np.uint32)).all()
        assert (after[name][~zero] != 0).all()
        if not np.array_equal(before[name], after[name]):
            changed.add(name)
    assert bool(changed) == (train != "bias")
    assert [n.name for n in made.graph] == [n.name for n in pruned.graph]
    (record,) = records[-1]["details"]
    assert record["steps"] == 60
    assert record["divergence_after"] < record["divergence_before"]


@needs_torch
def test_the_same_seed_gives_the_same_model_and_another_another() -> None:
    data = samples(16)
    spec = "recover:steps=6,batch=8,threads=1,seed={}"
    made = [run_passes(demo(), [PRUNE, spec.format(seed)], calibration=data)[0] for seed in (0, 0, 1)]
    assert model_bytes(made[0]) == model_bytes(made[1])
    assert model_bytes(made[0]) != model_bytes(made[2])


@needs_torch
def test_the_start_is_kept_where_training_does_not_help() -> None:
    data = samples(16)
    pruned, _ = run_passes(demo(), [PRUNE], calibration=data)
    made, records = run_passes(
        demo(), [PRUNE, "recover:steps=24,batch=8,rate=1000,optimizer=sgd,patience=2"], calibration=data
    )
    (record,) = records[-1]["details"]
    assert record["divergence_after"] == record["divergence_before"]
    assert record["steps"] < 24  # stopped early
    np.testing.assert_array_equal(outputs(made, data), outputs(pruned, data))


@needs_torch
def test_only_what_lies_behind_the_first_mask_is_trained() -> None:
    data = samples(16)
    layers = list(weighted_layers(demo()))
    chosen = max(i for i, layer in enumerate(layers[:-1]) if layer.groups == 1)
    spec = f"prune:sparsity=0.5,include={layers[chosen].name},importance=magnitude,refit=none"
    before = constants(demo())
    made, _ = run_passes(demo(), [spec, "recover:steps=16,batch=8"], calibration=data)
    after = constants(made)
    order = [layer.weight.name for layer in weighted_layers(made)]
    same = [np.array_equal(before[name], after[name]) for name in order]
    assert same == [True] * chosen + [False] * (len(layers) - chosen)


@needs_torch
def test_a_model_pruned_elsewhere_needs_its_teacher(tmp_path) -> None:
    data = samples(16)
    pruned, _ = run_passes(demo(), [PRUNE], calibration=data)
    with pytest.raises(RecipeError, match=r"teacher=DENSE\.onnx"):
        run_passes(load_model(model_bytes(pruned)), ["recover:steps=2"], calibration=data)
    dense = tmp_path / "dense.onnx"
    dense.write_bytes(model_bytes(demo()))
    start = load_model(model_bytes(pruned))
    _, records = run_passes(start, [f"recover:steps=12,batch=8,teacher={dense}"], calibration=data)
    assert records[-1]["details"][0]["divergence_after"] < records[-1]["details"][0]["divergence_before"]
    other = tmp_path / "other.onnx"
    other.write_bytes(model_bytes(load_model(pair_model())))
    with pytest.raises(RecipeError, match="other inputs"):
        run_passes(load_model(model_bytes(pruned)), [f"recover:steps=2,teacher={other}"], calibration=data)


@needs_torch
def test_two_inputs_and_values_instead_of_logits() -> None:
    """Outputs [1, 4] and a state [2, 5] whose first axis is no batch: sample by sample, compared by squared error."""
    data = {
        "x": RNG.standard_normal((12, 3, 8, 8)).astype(np.float32),
        "state": RNG.standard_normal((12, 2, 5)).astype(np.float32),
    }
    prune = Prune(sparsity=0.5, include=("second",), importance="magnitude", refit="none")
    from sparsec.data import load_data
    from sparsec.ports import input_spec

    specs = [input_spec(x) for x in load_model(pair_model()).graph.inputs]
    _, records = run_passes(
        load_model(pair_model()), [prune, "recover:steps=12,batch=6"], calibration=load_data(data, specs)
    )
    (record,) = records[-1]["details"]
    assert record["divergence_after"] < record["divergence_before"]


def test_nothing_to_recover_is_said() -> None:
    with pytest.raises(RecipeError, match="still computes what the original does"):
        run_passes(demo(), ["recover:steps=1"], calibration=samples(4))


def test_without_samples_or_original_it_refuses() -> None:
    with pytest.raises(RecipeError, match="--calibration"):
        run_passes(demo(), [Prune(sparsity=0.5), Recover(steps=1)])
    with pytest.raises(RecipeError, match="at least 2 calibration samples"):
        run_passes(demo(), [PRUNE, "recover:steps=1"], calibration=samples(1))


@pytest.mark.parametrize(
    "options", [{"minutes": 0}, {"rate": -1.0}, {"batch": 0}, {"train": "some"}, {"optimizer": "lion"}, {"steps": -1}]
)
def test_options_are_checked(options: dict) -> None:
    with pytest.raises(RecipeError, match=f"recover: {next(iter(options))}"):
        Recover(**options)


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeUnavailable, match=r"sparsec\[torch\]") as caught:
        run_passes(demo(), [PRUNE, "recover:steps=1"], calibration=samples(4))
    assert caught.value.exit_code == 3


def test_agreement_ends_at_the_first_change_and_refitted_layers_before_it_are_put_back() -> None:
    original, model = demo(), demo()
    assert agreement(original, model).equal
    layers = list(weighted_layers(model))
    first, masked = layers[1], layers[4]
    first.write(first.read() * np.float32(1.0001))
    assert put_back(original, model) == 0  # no new zero: nobody knows what is right
    masked.write(masked.read() * (RNG.random(masked.shape) < 0.5))
    nodes = list(model.graph)
    assert masked.node not in agreement(original, model).nodes
    assert first.node not in agreement(original, model).nodes
    assert put_back(original, model) == 1
    found = agreement(original, model)
    assert not found.equal
    assert first.node in found.nodes
    assert masked.node not in found.nodes
    assert {n.name for n in nodes[: nodes.index(masked.node)]} <= {n.name for n in found.nodes}
    assert found.taps
    assert put_back(original, model) == 0
