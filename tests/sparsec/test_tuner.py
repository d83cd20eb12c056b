"""The tuner: which layers and candidates are measured, and when they are not; what it refuses."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from measured_chain import chain_model, prices_of, pruned
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from samples import pair_artifact

import sparsec
from sparsec import targets, tuner, tuning
from sparsec.errors import CheckError, RuntimeUnavailable, TuningError, UsageError
from sparsec.lowering.prices import Prices, Way
from sparsec.lowering.rules.product import price_product
from sparsec.targets import Target, find_target
from sparsec.tuning import Entry


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
