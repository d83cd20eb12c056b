"""Measured choices: the file that holds them, the races that make them, and compiling with them."""

from __future__ import annotations

import copy
import io
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from samples import pair_artifact, pair_model

import sparsec
from sparsec import cli, measure, targets, tuner, tuning
from sparsec.errors import CheckError, RuntimeUnavailable, TuningError, UsageError
from sparsec.kernels import conv
from sparsec.lowering.prices import Prices, Way, choose
from sparsec.lowering.rules.convolution import price_conv
from sparsec.lowering.rules.product import price_product
from sparsec.targets import Target, find_target
from sparsec.tuning import Entry, Lookup, Measured, Tuning


def pruned(shape: tuple[int, ...], density: float, rows: int, seed: int) -> np.ndarray:
    """A weight of which exactly the share `density` of blocks of `rows` output channels remains."""
    rng = np.random.default_rng(seed)
    blocks = shape[0] // rows * int(np.prod(shape[1:]))
    kept = (rng.permutation(blocks) < density * blocks).reshape(shape[0] // rows, *shape[1:])
    return (rng.standard_normal(shape) * kept.repeat(rows, 0)).astype(np.float32)


def chain_model() -> onnx.ModelProto:
    """x [1, 16, 6, 6] through `one`, `two` (1x1, both 75% zero in 4x1 blocks: one layer for the tuner) and `three` (3x3)."""
    weights = {
        "w1": pruned((16, 16, 1, 1), 0.25, 4, 1),
        "w2": pruned((16, 16, 1, 1), 0.25, 4, 1)[:, ::-1].copy() * 2,
        "w3": np.random.default_rng(3).standard_normal((8, 16, 3, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "one"),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Conv", ["b", "w2"], ["c"], "two"),
        helper.make_node("Conv", ["c", "w3"], ["y"], "three", pads=[1, 1, 1, 1]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "chain",
        [value("x", TensorProto.FLOAT, [1, 16, 6, 6])],
        [value("y", TensorProto.FLOAT, [1, 8, 6, 6])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def host() -> Target:
    return find_target("host")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuner.Tuned:
    """The chain, measured once."""
    return tuner.tune(chain_model(), cache=tmp_path_factory.mktemp("tuning") / "chain.json")


def prices_of(target: Target, w: np.ndarray, side: int = 6) -> Prices:
    geometry = conv.Geometry((1, w.shape[1], side, side), w.shape)
    return price_conv(target.machine, geometry, w)


def plant(tuned: tuner.Tuned, path: Path, **changes: Any) -> Path:
    """The tuned file with another choice for the layer of `one`: its candidate for which `changes` hold."""
    document = json.loads(tuned.path.read_text())
    [key] = [tuning.layer_key(layer.entry.layer) for layer in tuned.layers if "one" in layer.names]
    rows = document["layers"][key]["candidates"]
    rows.sort(key=lambda row: any(row[name] != value for name, value in changes.items()))
    assert all(rows[0][name] == value for name, value in changes.items())
    path.write_text(json.dumps(document))
    return path


# --- measuring --------------------------------------------------------------------------------------------------------


def test_layers_of_one_geometry_and_structure_are_measured_once(tuned: tuner.Tuned) -> None:
    assert [layer.names for layer in tuned.layers] == [("one", "two"), ("three",)]
    assert not tuned.skipped
    assert not any(layer.reused for layer in tuned.layers)


def test_the_choice_is_the_fastest_or_as_good(tuned: tuner.Tuned) -> None:
    for layer in tuned.layers:
        fastest = min(c.measured_us for c in layer.entry.candidates)
        assert layer.entry.choice.measured_us <= (1 + tuner.TIE) * fastest
        assert all(c.measured_us > 0 for c in layer.entry.candidates)


def test_candidates_are_formats_and_tilings_with_dense_always(tuned: tuner.Tuned) -> None:
    sparse, dense = (layer.entry.candidates for layer in tuned.layers)
    assert {"conv_f32_dense", "conv_f32_4x1"} <= {c.kernel for c in sparse}
    assert {c.kernel for c in dense} == {"conv_f32_dense"}
    assert len({(c.kernel, c.tile) for c in sparse}) == len(sparse)


def test_the_file_holds_what_was_returned(tuned: tuner.Tuned, host: Target) -> None:
    read = tuning.read_tuning(tuned.path)
    assert set(read.entries) == {tuning.layer_key(layer.entry.layer) for layer in tuned.layers}
    for layer in tuned.layers:
        assert read.entries[tuning.layer_key(layer.entry.layer)] == layer.entry
    read.check_for(host.cpu)


def test_a_long_name_is_cut_in_the_table(tuned: tuner.Tuned) -> None:
    one = replace(tuned.layers[0], names=("x" * 99, "y"))
    console = Console(width=200, file=io.StringIO())
    tuner.print_tuned(replace(tuned, layers=(one,)), console)
    assert f"{'x' * 37}... (+1)" in console.file.getvalue()  # type: ignore[attr-defined]


def test_known_layers_are_not_measured_again(tuned: tuner.Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> Entry:
        raise AssertionError("measured")

    monkeypatch.setattr(tuner, "measure_layer", fail)
    second = tuner.tune(chain_model(), cache=tuned.path)
    assert [layer.entry for layer in second.layers] == [layer.entry for layer in tuned.layers]
    assert all(layer.reused for layer in second.layers)
    with pytest.raises(AssertionError, match="measured"):
        tuner.tune(chain_model(), cache=tuned.path, again=True)


def test_time_limit_leaves_layers_and_another_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tuner.measure_layer

    def slow(prices: Prices, target: Target, seconds: float) -> Entry:
        assert 0 < seconds <= 0.5
        entry = real(prices, target, 0.01)
        time.sleep(0.5)
        return entry

    monkeypatch.setattr(tuner, "measure_layer", slow)
    path = tmp_path / "t.json"
    first = tuner.tune(chain_model(), cache=path, time_limit=0.5)
    assert len(first.layers) == 1
    assert {*first.skipped, *first.layers[0].names} == {"one", "two", "three"}
    second = tuner.tune(chain_model(), cache=path, time_limit=0.5)
    assert not second.skipped
    assert sorted(layer.reused for layer in second.layers) == [False, True]


def test_what_was_measured_before_an_interrupt_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = tuner.measure_layer, []

    def stop(prices: Prices, target: Target, seconds: float) -> Entry:
        calls.append(prices)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(prices, target, 0.01)

    monkeypatch.setattr(tuner, "measure_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        tuner.tune(chain_model(), cache=tmp_path / "t.json")
    assert len(tuning.read_tuning(tmp_path / "t.json").entries) == 1


def test_strided_and_grouped_layers(tmp_path: Path) -> None:
    model = chain_model()
    two, three = model.graph.node[2:]
    three.attribute.append(helper.make_attribute("strides", [2, 2]))
    two.attribute.append(helper.make_attribute("group", 2))
    two.input[1] = "w2g"
    model.graph.initializer.append(numpy_helper.from_array(pruned((16, 8, 1, 1), 0.25, 4, 2), "w2g"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 3, 3]))
    result = tuner.tune(model, cache=tmp_path / "t.json")
    shapes = {layer.names[0]: (layer.entry.layer["x_shape"], layer.entry.layer["w_shape"]) for layer in result.layers}
    assert shapes["two"] == ([1, 8, 6, 6], [8, 8, 1, 1])
    artifact = sparsec.compile(model, tuning=tmp_path / "t.json")
    assert artifact.manifest["parity"]["passed"]
    assert artifact.manifest["notes"] == []


def test_products_are_measured_too(tmp_path: Path, host: Target) -> None:
    w = pruned((32, 48, 1, 1), 0.25, 4, 1).reshape(32, 48)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        "g",
        [value("x", TensorProto.FLOAT, [20, 48])],
        [value("y", TensorProto.FLOAT, [20, 32])],
        [numpy_helper.from_array(w.T.copy(), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "t.json"
    [layer] = tuner.tune(model, cache=path).layers
    kernels = {c.kernel for c in layer.entry.candidates}
    assert {"fc_f32_4x1", "gemm_f32_dense"} <= kernels
    document = json.loads(path.read_text())
    rows = document["layers"][tuning.layer_key(layer.entry.layer)]["candidates"]
    cheapest = price_product(host.machine, 20, w).cheapest.kernel
    rows.sort(key=lambda row: row["kernel"] == cheapest)  # another first
    path.write_text(json.dumps(document))
    artifact = sparsec.compile(model, tuning=path)
    [row] = artifact.report["layers"]
    assert row["kernel"].startswith(rows[0]["kernel"].removesuffix("_dense"))
    assert row["reason"].startswith(f"measured {rows[0]['measured_us']:.1f} us")
    assert artifact.manifest["parity"]["passed"]


def test_the_shortlist_is_the_best_of_each_form_that_comes_near(host: Target) -> None:
    def way(kernel: str, us: float) -> Way:
        return Way(kernel, kernel != "dense", us, None)

    priced = [
        ("a", 1.0),
        ("a", 4.0),
        ("b", 2.0),
        ("b", 2.5),
        ("b", 2.1),
        ("b", 2.2),
        ("c", 3.1),
        ("dense", 9.0),
        ("dense", 8.0),
    ]
    prices = replace(prices_of(host, np.ones((4, 4, 1, 1), np.float32)), ways=tuple(way(*item) for item in priced))
    found = [(w.kernel, w.predicted_us) for w in tuner.shortlist(prices)]
    assert found == [("a", 1.0), ("b", 2.0), ("b", 2.1), ("b", 2.2), ("dense", 8.0)]


def test_another_cpus_file_is_refused_and_left(tuned: tuner.Tuned, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    text = json.dumps({**json.loads(tuned.path.read_text()), "model": "another"})
    path.write_text(text)
    with pytest.raises(TuningError, match=r"measured on another as .*--cache"):
        tuner.tune(chain_model(), cache=path)
    assert path.read_text() == text


def test_a_file_of_other_kernels_is_started_afresh(tuned: tuner.Tuned, tmp_path: Path) -> None:
    path, notes = tmp_path / "t.json", list[str]()
    path.write_text(json.dumps({**json.loads(tuned.path.read_text()), "kernels": "older"}))
    result = tuner.tune(chain_model(), cache=path, notes=notes)
    assert not any(layer.reused for layer in result.layers)
    assert any("other kernels" in text for text in notes)
    tuning.read_tuning(path).check_for(result.cpu)


def test_a_model_without_convolutions(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("Relu", ["x"], ["y"], "r")]
    sides = ([value(name, TensorProto.FLOAT, [2])] for name in ("x", "y"))
    model = helper.make_model(
        helper.make_graph(nodes, "g", *sides), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    result = tuner.tune(model, cache=tmp_path / "t.json")
    assert result.layers == ()
    assert result.json()["summary"]["ratio"] is None
    assert sparsec.compile(model, tuning=tmp_path / "t.json").manifest["notes"] == []


def test_the_default_file_is_in_the_cache(host: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEC_CACHE", str(tmp_path))
    path = tuner.default_path(host)
    assert path.parent == tmp_path / "tuning"
    assert path.name.endswith(f"{host.cpu}.json")
    assert tuner.default_path(replace(host, cpu="x86-64-v2")) != path


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_time_limits_that_make_no_sense(limit: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="seconds above 0"):
        tuner.tune(chain_model(), cache=tmp_path / "t.json", time_limit=limit)


def test_a_kernel_that_computes_something_else_is_refused(host: Target) -> None:
    good, bad = pruned((16, 16, 1, 1), 0.25, 4, 1), pruned((16, 16, 1, 1), 0.25, 4, 1)
    bad[0, np.flatnonzero(bad[0])[0]] *= 1.01
    right, wrong = prices_of(host, good), prices_of(host, bad)
    prices = replace(right, calls=lambda way: (wrong if way.kernel == "conv_f32_2x1" else right).calls(way))
    with pytest.raises(CheckError, match="conv_f32_2x1"):
        tuner.make_trials(prices, host, tuner.shortlist(prices))


def test_only_code_that_runs_here_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = replace(find_target("host"), features=("unheard-of",))
    with monkeypatch.context() as patch:
        patch.setattr(tuner, "find_target", lambda *arguments: foreign)
        with pytest.raises(RuntimeUnavailable, match="this CPU lacks unheard-of"):
            tuner.tune(chain_model())
    with pytest.raises(UsageError, match="is for arm"):
        tuner.tune(pair_artifact("arm"))
    with pytest.raises(UsageError, match="the artifact is for"):
        tuner.tune(pair_artifact("host"), cpu="generic")


@pytest.mark.parametrize(
    ("text", "name", "cpu", "missing"),
    [
        ("model name: Some CPU\ncpu family: 6\nmodel: 85\nflags: fpu avx2 fma f16c bmi2 sse4_2 popcnt\n",
         "Some CPU, family 6, model 85", "x86-64-v3", []),
        ("model name: Some CPU\ncpu family: 6\nmodel: 85\nflags: fpu avx2 f16c bmi2 sse4_2 popcnt\n",
         "Some CPU, family 6, model 85", "x86-64-v3", ["fma"]),
        ("Features: fp asimd asimddp\nCPU implementer: 0x41\nCPU part: 0xd05\nCPU part: 0xd0b\n",
         "implementer 0x41, part 0xd05 0xd0b", "cortex-a76", ["fp16"]),
        ("Features: fp asimd\nCPU implementer: 0x41\nCPU part: 0xd03\n", "implementer 0x41, part 0xd03", "cortex-a53", []),
    ],
)  # fmt: skip
def test_what_a_cpu_is_called_and_lacks(
    text: str, name: str, cpu: str, missing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "_cpuinfo", lambda: text.replace(":", "\t:").splitlines(keepends=True))
    monkeypatch.setattr(targets.platform, "machine", lambda: "x86_64" if "flags" in text else "aarch64")
    assert targets.host_model() == name
    target = find_target("host", cpu)
    assert targets.missing_features(target) == missing
    assert targets.missing_features(replace(target, arch="riscv64")) == ["riscv64"]


# --- races ------------------------------------------------------------------------------------------------------------


class Runner:
    """A trial whose times are `times`, over and over."""

    def __init__(self, name: str, times: Sequence[float], log: list[str]) -> None:
        self.samples: list[float] = []
        self._name, self._times, self._log = name, times, log

    def run(self) -> None:
        self.samples.append(1e9)  # the warm-up must not count

    def sample(self) -> None:
        self._log.append(self._name)
        self.samples.append(self._times[len(self.samples) % len(self._times)])

    @property
    def us(self) -> float:
        return float(np.median(self.samples))


def test_the_hopeless_retire_and_a_clear_winner_ends_the_race() -> None:
    log: list[str] = []
    slow, good, close = Runner("s", [9.0], log), Runner("g", [1.0, 1.01, 1.02], log), Runner("c", [1.2, 1.21], log)
    measure.race([slow, good, close], seconds=60)  # type: ignore[list-item]
    assert (len(slow.samples), len(good.samples), len(close.samples)) == (5, 15, 15)
    assert log[:6] == ["s", "g", "c", "c", "g", "s"]
    assert good.us == 1.01


def test_equals_race_to_the_end() -> None:
    log: list[str] = []
    a, b = Runner("a", [1.0, 2.0, 3.0], log), Runner("b", [2.0, 1.0, 3.0], log)
    measure.race([a, b], seconds=60, most=21)  # type: ignore[list-item]
    assert len(a.samples) == len(b.samples) == 21


def test_time_ends_a_race_after_three_rounds() -> None:
    a, b = Runner("a", [1.0], []), Runner("b", [1.0], [])
    measure.race([a, b], seconds=0)  # type: ignore[list-item]
    assert len(a.samples) == len(b.samples) == 3


def test_times_grow_with_the_work(host: Target) -> None:
    def us(channels: int) -> float:
        prices = prices_of(host, pruned((channels, channels, 1, 1), 1.0, 4, 1), side=14)
        trials = tuner.make_trials(prices, host, tuner.shortlist(prices)[:1])
        measure.race(trials, seconds=1)
        return min(trials[0].samples)

    small, large = us(64), us(256)  # 16 times the multiplications
    assert 4 * small < large < 100 * small


# --- what it says of the model ----------------------------------------------------------------------------------------


def entry(*times: tuple[float, float]) -> Entry:
    return Entry({}, tuple(Measured("conv_f32_dense", 4, i + 1, 16, 0, p, m) for i, (p, m) in enumerate(times)))


def test_summary_of_a_model_that_is_off_by_a_factor() -> None:
    found = tuner.summary([entry((1, 2), (2, 4), (3, 6)), entry((5, 10))])
    assert found == {
        "layers": 2, "candidates": 4, "ratio": 2.0, "spread": 1.0, "rank_correlation": 1.0, "regret": 1.0,
    }  # fmt: skip


def test_summary_of_a_model_that_ranks_backwards() -> None:
    found = tuner.summary([entry((1, 4), (2, 2), (4, 1))])
    assert found["rank_correlation"] == -1.0
    assert found["regret"] == 4.0
    assert found["ratio"] == 1.0
    assert found["spread"] == pytest.approx(np.exp(np.std(np.log([4, 1, 0.25]))), abs=1e-4)


def test_equal_values_share_a_rank() -> None:
    assert tuner._ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


# --- keys -------------------------------------------------------------------------------------------------------------


def test_a_layer_is_known_by_geometry_and_structure(host: Target) -> None:
    w = pruned((16, 16, 1, 1), 0.25, 4, 1)
    facts = prices_of(host, w).facts
    assert prices_of(host, w * 3).facts == facts
    assert prices_of(host, w[:, ::-1].copy()).facts == facts
    for other in (
        prices_of(host, w, side=7),
        prices_of(host, pruned((16, 16, 1, 1), 0.5, 4, 1)),
        prices_of(host, pruned((16, 16, 1, 1), 0.25, 1, 1)),
        prices_of(host, np.ones_like(w)),
    ):
        assert tuning.distance(other.facts, facts) > tuning.ALIKE
        assert tuning.layer_key(other.facts) != tuning.layer_key(facts)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [({"a": 50, "b": 20}, 1.0), ({"a": 55, "b": 21}, 1.1), ({"a": 50, "b": 10}, 2.0), ({"a": 50}, float("inf")), (3, float("inf"))],
)  # fmt: skip
def test_distance_is_the_largest_ratio(stored: Any, expected: float) -> None:
    facts = {"op": "Conv", "x_shape": [1], "stored": {"a": 50, "b": 20}}
    other = {**facts, "stored": stored}
    assert tuning.distance(facts, other) == pytest.approx(expected)
    assert tuning.distance(other, facts) == pytest.approx(expected)
    assert tuning.distance({**facts, "x_shape": [2]}, other) == float("inf")
    assert tuning.distance({"op": "Conv", "stored": {"a": 0}}, {"op": "Conv", "stored": {"a": 1}}) == 1.0


def test_the_most_similar_measured_layer_speaks_for_another() -> None:
    def found(percent: int) -> Entry:
        return replace(entry((1, percent)), layer={"op": "Conv", "stored": {"a": percent}})

    known = [found(50), found(54), found(80)]
    held = Tuning("m", "c", "k", {tuning.layer_key(e.layer): e for e in known})
    for percent, expected in ((50, 50), (51, 50), (53, 54), (58, 54), (60, None), (76, 80), (90, None)):
        answer = held.nearest({"op": "Conv", "stored": {"a": percent}})
        assert (answer and answer.layer["stored"]["a"]) == expected
    assert held.nearest({"op": "Gemm", "stored": {"a": 50}}) is None


def test_the_best_of_a_kernel() -> None:
    rows = [("conv_f32_dense", 3.0), ("conv_f32_4x1", 2.0), ("conv_f32_2x1", 1.0), ("conv_f32_dense", 2.5)]
    found = Entry({}, tuple(Measured(kernel, 4, 1, 16, 0, 1.0, us) for kernel, us in rows))
    dense, other = found.best("conv_f32_dense".__eq__), found.best("conv_f32_2x1".__ne__)
    assert dense is not None
    assert dense.measured_us == 2.5
    assert other is not None
    assert other.kernel == "conv_f32_4x1"
    assert found.best("conv_f32_8x1".__eq__) is None


# --- compiling --------------------------------------------------------------------------------------------------------


def test_a_choice_is_followed_against_the_prediction(tuned: tuner.Tuned, tmp_path: Path, host: Target) -> None:
    [one, _] = tuned.layers
    free, _, _ = choose(prices_of(host, pruned((16, 16, 1, 1), 0.25, 4, 1)))
    other = next(c for c in one.entry.candidates if c.kernel == "conv_f32_dense")
    assert free.kernel != other.kernel
    path = plant(tuned, tmp_path / "t.json", kernel=other.kernel, rows=other.rows, vectors=other.vectors)
    artifact = sparsec.compile(chain_model(), tuning=path)
    layers = {row["name"]: row for row in artifact.report["layers"]}
    for name in ("one", "two"):
        assert layers[name]["kernel"].startswith("conv1x1_f32_dense")
        assert layers[name]["reason"].startswith(f"measured {other.measured_us:.1f} us, best sparse conv_f32_")
        price = next(c["predicted_us"] for c in layers[name]["candidates"] if c["kernel"] == "conv_f32_dense")
        assert layers[name]["predicted_us"] == pytest.approx(price, abs=2e-3)
    assert artifact.manifest["parity"]["passed"]
    assert artifact.manifest["digests"]["tuning"] == tuning.read_tuning(path).digest
    assert artifact.manifest["notes"] == []


def test_sparse_choices_say_what_dense_would_take(tuned: tuner.Tuned, tmp_path: Path) -> None:
    path = plant(tuned, tmp_path / "t.json", kernel="conv_f32_4x1")
    artifact = sparsec.compile(chain_model(), tuning=str(path))
    reason = next(row["reason"] for row in artifact.report["layers"] if row["name"] == "one")
    assert reason.startswith("measured ")
    assert ", dense measured " in reason
    assert next(row["reason"] for row in artifact.report["layers"] if row["name"] == "three").endswith(" us")


def test_the_same_file_gives_the_same_bytes(tuned: tuner.Tuned, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}" / "m.sparsec" for i in range(2)]
    for path in paths:
        sparsec.compile(chain_model(), tuning=tuned.path, output=path)
    for name in ("manifest.json", "report.json", "libmodel.so", "weights.bin"):
        assert (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes(), name


def test_layers_that_were_not_measured_are_said(tuned: tuner.Tuned) -> None:
    artifact = sparsec.compile(pair_model(), tuning=tuned.path)
    assert artifact.manifest["notes"] == ["tuning: 3 of 3 layers were not measured and are chosen by prediction"]
    assert sparsec.compile(chain_model()).manifest["digests"]["tuning"] is None


def test_a_file_for_other_code_is_refused(tuned: tuner.Tuned, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"measured for .*, compiling for armv8.2-a"):
        sparsec.compile(chain_model(), "arm", tuning=tuned.path)
    path = tmp_path / "t.json"
    path.write_text(json.dumps({**json.loads(tuned.path.read_text()), "kernels": "older"}))
    with pytest.raises(TuningError, match="other kernels than this version"):
        sparsec.compile(chain_model(), tuning=path)


def test_a_choice_that_does_not_exist_is_refused(tuned: tuner.Tuned, host: Target) -> None:
    prices = prices_of(host, pruned((16, 16, 1, 1), 0.25, 4, 1))
    good = Measured("conv_f32_4x1", 4, 1, host.machine.lanes, 0, 1.0, 1.0)
    assert prices.find(good.kernel, good.tile) is not None
    for bad in (replace(good, kernel="conv_f32_7x7"), replace(good, rows=8), replace(good, vectors=99)):
        found = Entry(prices.facts, (bad,))
        lookup = Lookup(Tuning("m", host.cpu, "k", {tuning.layer_key(found.layer): found}, "t.json"))
        with pytest.raises(TuningError, match="which this version does not offer for one"):
            lookup.find("one", prices)


# --- the file is untrusted --------------------------------------------------------------------------------------------


def _change(*where: Any, value: Any) -> Any:
    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for key in where[:-1]:
            place = next(iter(place.values())) if key == "first" else place[key]
        place[where[-1]] = value

    return change


def _drop(*where: Any) -> Any:
    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for key in where[:-1]:
            place = next(iter(place.values())) if key == "first" else place[key]
        del place[where[-1]]

    return change


def _layer(**facts: Any) -> Any:
    """Another layer, under its right key."""

    def change(document: dict[str, Any]) -> None:
        layer = {"op": "Conv", **facts}
        rows = next(iter(document["layers"].values()))["candidates"]
        document["layers"][tuning.layer_key(layer)] = {"layer": layer, "candidates": rows}

    return change


CANDIDATE = ("layers", "first", "candidates", 0)
DAMAGE = {
    "schema": _change("schema", value=tuning.SCHEMA + 1),
    "schema true": _change("schema", value=True),
    "no schema": _drop("schema"),
    "extra": _change("extra", value=1),
    "model": _change("model", value=["x"]),
    "long model": _change("model", value="x" * 1000),
    "cpu": _change("cpu", value=None),
    "kernels": _change("kernels", value=""),
    "layers": _change("layers", value=[]),
    "layer": _change("layers", "abc", value=1),
    "key": _change("layers", "abc\x1b[31m", value={"layer": {}, "candidates": []}),
    "facts": _change("layers", "first", "layer", "op", value="Gemm"),
    "stored": _layer(stored=[1]),
    "no stored": _layer(),
    "percent": _layer(stored={"conv_f32_4x1": -1}),
    "percent text": _layer(stored={"conv_f32_4x1": "25"}),
    "no facts": _drop("layers", "first", "layer"),
    "no candidates": _change("layers", "first", "candidates", value=[]),
    "candidates": _change("layers", "first", "candidates", value="x"),
    "candidate": _change(*CANDIDATE, value=None),
    "kernel": _change(*CANDIDATE, "kernel", value=3),
    "no kernel": _drop(*CANDIDATE, "kernel"),
    "more": _change(*CANDIDATE, "path", value="/"),
    "rows": _change(*CANDIDATE, "rows", value=-1),
    "vectors": _change(*CANDIDATE, "vectors", value=1.0),
    "lanes": _change(*CANDIDATE, "lanes", value=True),
    "depth": _change(*CANDIDATE, "depth", value=-1),
    "many lanes": _change(*CANDIDATE, "lanes", value=1 << 40),
    "time": _change(*CANDIDATE, "measured_us", value=0),
    "time text": _change(*CANDIDATE, "measured_us", value="1"),
    "nan": _change(*CANDIDATE, "measured_us", value=float("nan")),
    "infinity": _change(*CANDIDATE, "predicted_us", value=float("inf")),
    "huge": _change(*CANDIDATE, "predicted_us", value=10**400),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_one_line(damage: Any, tuned: tuner.Tuned, tmp_path: Path) -> None:
    document = copy.deepcopy(json.loads(tuned.path.read_text()))
    damage(document)
    path = tmp_path / "t.json"
    path.write_text(json.dumps(document))
    with pytest.raises(TuningError) as caught:
        tuning.read_tuning(path)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert len(caught.value.message) < 300
    assert caught.value.where == str(path)


@pytest.mark.parametrize("raw", [b"", b"\xff\xfe", b"{", b"[]", b"3", b"null", b"[" * 100_000, b'{"schema": 1}'])
def test_what_is_no_such_file(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(raw)
    with pytest.raises(TuningError):
        tuning.read_tuning(path)
    with pytest.raises(TuningError):
        tuner.tune(chain_model(), cache=path)
    assert path.read_bytes() == raw


def test_a_missing_file_or_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(TuningError, match="cannot read"):
            tuning.read_tuning(path)


# --- command line -----------------------------------------------------------------------------------------------------


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(chain_model(), "chain.onnx")
    assert cli.run(["tune", "chain.onnx", "--cache", "t.json", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tuning"] == "t.json"
    assert [layer["names"] for layer in found["layers"]] == [["one", "two"], ["three"]]
    assert found["summary"]["layers"] == 2
    assert {"kernel", "tile", "predicted_us", "measured_us"} == set(found["layers"][0]["candidates"][0])
    assert cli.run(["compile", "chain.onnx", "--tuning", "t.json", "--json"]) == 0
    compiled = json.loads(capsys.readouterr().out)
    assert [row["reason"][:8] for row in compiled["layers"] if row["op"].startswith("Conv")] == ["measured"] * 3
    assert cli.run(["tune", "chain.sparsec", "--cache", "t.json"]) == 0
    text = capsys.readouterr().out
    assert "chosen, from the file" in text
    assert "rank" in text
    assert "kept in  t.json" in text


def test_command_line_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(chain_model(), "chain.onnx")
    for arguments, says in (
        (["tune", "chain.onnx", "--target", "arm"], "only host"),
        (["tune", "chain.onnx", "--time-limit", "0"], "--time-limit"),
        (["tune", "none.onnx", "--cache", "t.json"], "none.onnx"),
        (["tune", "chain.onnx", "--cache", "chain.onnx"], "chain.onnx"),
        (["compile", "chain.onnx", "--tuning", "none.json"], "none.json"),
    ):
        assert cli.run(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("error: ")
        assert says in captured.err


def test_interrupt_says_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuner, "tune", stop)
    monkeypatch.chdir(tmp_path)
    onnx.save(chain_model(), "chain.onnx")
    assert cli.run(["tune", "chain.onnx"]) == 130
    assert capsys.readouterr().err == "error: interrupted; what was measured is kept\n"
