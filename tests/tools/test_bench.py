"""The benchmark suite's own arithmetic, its worker protocol and its reading of assembly. No timing is asserted."""

from __future__ import annotations

import doctest
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from bench import arm, curves, goals, report, turns
from bench.engines import Engine, Worker, largest_error
from bench.models import CASES, Missing, Prepared, dense_of, find_case
from bench.places import WORKERS
from onnx import TensorProto, helper

from sparsec.kernels import conv


@pytest.mark.parametrize("module", [arm, curves])
def test_examples_in_docstrings(module) -> None:
    assert doctest.testmod(module).failed == 0


def test_every_network_has_a_dense_case() -> None:
    assert all(dense_of(case).dense and dense_of(case).source == case.source for case in CASES)
    assert len({case.name for case in CASES}) == len(CASES)
    assert find_case("mbv1-80-1x1").state == "80% unstructured"


# --- turns ----------------------------------------------------------------------------------------------------------


def test_turns_rotate_and_ratios_are_taken_inside_a_round() -> None:
    order: list[str] = []

    def burst(name: str, seconds: float):
        def run(runs: int) -> list[float]:
            order.append(name)
            return [seconds * (1 + len(order) // 6)] * runs  # a clock that slows down

        return run

    times = turns.take_turns({"a": burst("a", 1e-3), "b": burst("b", 2e-3), "c": burst("c", 4e-3)}, rounds=3)
    assert order[3:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert [len(values) for values in times.values()] == [3, 3, 3]
    assert turns.ratio([4.0, 8.0, 2.0], [2.0, 4.0, 1.0]).median == 2.0


def test_spread_is_median_and_percentiles() -> None:
    spread = turns.Spread.of([float(i) for i in range(11)])
    assert (spread.median, spread.p10, spread.p90, spread.rounds) == (5.0, 1.0, 9.0, 11)


# --- goals and tables -----------------------------------------------------------------------------------------------


def _speedup(median: float, p10: float, p90: float) -> dict:
    stored = {"median": median, "p10": p10, "p90": p90, "rounds": 31}
    return {"models": {"mbv1-80-4x1": {"engines": {"sparsec": {"speedup": stored}}}}}


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        ((2.7, 2.65, 2.8), "met"),
        ((2.5, 2.4, 2.55), "missed"),
        ((2.7, 2.5, 2.8), "straddles, median met"),
        ((2.5, 2.4, 2.7), "straddles, median missed"),
    ],
)
def test_a_goal_is_met_missed_or_straddled(figure: tuple[float, float, float], text: str) -> None:
    verdict = next(v for v in goals.verdicts(_speedup(*figure)) if v.goal.bar == 2.6)
    assert verdict.text == text


def test_a_missing_figure_says_why() -> None:
    results = {
        "models": {"mbv1-80-4x1": {"engines": {"sparsec": {"missing": "no compiler"}}}},
        "arm": {"missing": "no"},
    }
    texts = {v.goal.what: v.text for v in goals.verdicts(results)}
    assert texts["MobileNetV1 80% 4x1 over ONNX Runtime dense"] == "not measured: no compiler"
    assert texts["Arm instructions, MobileNetV1 dense"] == "not measured: no"
    assert texts["break-even density of 4x1, the worst of the shapes"] == "not measured: not run"
    assert len(report.goal_grid(results).rows) == len(goals.GOALS)


def test_markdown_escapes_cells() -> None:
    text = report.Grid("t", ("a", "b"), (("x|y", "1"),), ("note",)).markdown()
    assert text == "## t\n\n| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n\n- note\n"


# --- curves ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", curves.BLOCKS)
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_curve_weights_store_the_density_asked_for(block: str, density: float) -> None:
    form = next(f for f in conv.TABLE if f.format == block)
    shape = curves.Shape(32, 16, 4, 3)
    w = curves.weights(shape, form, density)
    packed = conv.pack(w, form)
    assert packed.blocks == round(density * w.size / form.rows)
    assert np.array_equal(conv.unpack(packed, shape.geometry.w_shape), w)


# --- Arm ------------------------------------------------------------------------------------------------------------

_LISTING = """
       0:      \tmov\tx8, #4
       4:      \tldr\tq0, [x1], #16
       8:      \tfmla\tv1.4s, v0.4s, v2.s[0]
       c:      \tfmla\tv3.4s, v0.4s, v2.s[1]
      10:      \tsubs\tx9, x9, #1
      14:      \tb.ne\t0x4 <kernel+0x4>
      18:      \tsubs\tx8, x8, #1
      1c:      \tb.ne\t0x4 <kernel+0x4>
      20:      \tret
"""


def test_innermost_loops_leave_out_the_outer_one() -> None:
    (loop,) = arm.innermost_loops(_LISTING)
    assert loop.fmas == 2 and len(loop.body) == 5
    assert loop.text.splitlines()[-1] == "b.ne .Lhead"


@pytest.mark.skipif(not arm.tool("llvm-mca"), reason="llvm-mca is not here")
def test_llvm_mca_prices_a_loop() -> None:
    (loop,) = arm.innermost_loops(_LISTING)
    attributes = "+v8.2a"
    one = arm.loop_cycles(loop, "cortex-a55", attributes)
    twice = arm.loop_cycles(arm.Loop(loop.body[:-2] + loop.body), "cortex-a55", attributes)
    assert 1 < one < twice


def test_llvm_mca_refuses_what_is_not_assembly() -> None:
    if not arm.tool("llvm-mca"):
        pytest.skip("llvm-mca is not here")
    with pytest.raises(Missing, match="llvm-mca"):
        arm.loop_cycles(arm.Loop(("not an instruction",)), "cortex-a55", "+v8.2a")


def test_counts_are_the_difference_of_two_run_lengths(tmp_path: Path) -> None:
    counter = tmp_path / "count.py"
    counter.write_text(
        "import sys\n"
        "runs = int(sys.argv[sys.argv.index('--runs') + 1])\n"
        "print(f'insns {1000 + 70 * runs} fma {30 * runs} load {5 * runs} store {runs}', file=sys.stderr)\n"
    )
    assert arm.count(Path("bench"), f"{sys.executable} {counter}") == {"insns": 70, "fma": 30, "load": 5, "store": 1}
    with pytest.raises(Missing, match="does not run"):
        arm.count(Path("bench"), str(tmp_path / "absent"))


# --- workers --------------------------------------------------------------------------------------------------------


def _prepared(folder: Path, scale: float) -> Prepared:
    """A model that doubles its input; `outputs` claims that it multiplies by `scale`."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    made = Prepared(CASES[0], folder / "model.onnx", folder / "inputs.npz", folder / "outputs.npz")
    onnx.save(model, made.model)
    x = np.array([[1.0, -2.0, 3.0, 4.0]], np.float32)
    np.savez(made.inputs, x=x)
    np.savez(made.outputs, y=scale * x)
    return made


def _engine(worker: str, **changes) -> Engine:
    return Engine("test", "Test", worker, lambda made: made.model, **changes)


def test_a_worker_loads_checks_and_times(tmp_path: Path) -> None:
    with Worker(_engine("run_ort.py"), _prepared(tmp_path, 2.0), turns.cpus(1)) as worker:
        seconds = worker.run(5)
    assert worker.error == 0.0 and worker.version
    assert len(seconds) == 5 and min(seconds) > 0


def test_a_worker_with_wrong_results_is_missing(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="wrong results"):
        Worker(_engine("run_ort.py"), _prepared(tmp_path, 2.1), turns.cpus(1))


def test_a_worker_that_fails_says_so(tmp_path: Path) -> None:
    made = _prepared(tmp_path, 2.0)
    made.model.write_bytes(b"no model")
    with pytest.raises(Missing, match=r"Protobuf|protobuf"):
        Worker(_engine("run_ort.py"), made, turns.cpus(1))


def test_a_worker_that_dies_says_so(tmp_path: Path) -> None:
    dead = tmp_path / "dead.py"
    dead.write_text(
        "import os, sys\nsys.stdin.readline()\nprint('last words', file=sys.stderr, flush=True)\nos._exit(7)\n"
    )
    with pytest.raises(Missing, match="status 7: last words"):
        Worker(_engine(str(dead)), _prepared(tmp_path, 2.0), turns.cpus(1))


def test_an_engine_without_its_environment_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEC_BENCH_CACHE", str(tmp_path))
    with pytest.raises(Missing, match=r"not installed: python tools/bench/setup.py ncnn"):
        Worker(_engine("run_ncnn.py", environment="ncnn"), _prepared(tmp_path, 2.0), turns.cpus(1))


def test_every_worker_exists() -> None:
    from bench.engines import ENGINES

    assert all((WORKERS / engine.worker).is_file() for engine in ENGINES)


def test_errors_are_relative_to_the_largest_output() -> None:
    expected = {"y": np.array([1.0, -4.0])}
    assert largest_error(expected, {"y": np.array([[1.0, -4.4]])}) == pytest.approx(0.1)
    assert largest_error(expected, {"y": np.zeros(3)}) == float("inf")
    assert largest_error(expected, {"y": np.array([1.0, np.nan])}) == float("inf")
