"""Faults of ONNX Runtime are met in a process of their own."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import sparsec
from sparsec.errors import CheckError, ModelError, RuntimeUnavailable
from sparsec.limits import Limits
from sparsec.loading import isolation
from sparsec.passes.measure.trial import fetch, in_parallel, pick_samples
from sparsec.proving import ort_session
from sparsec.proving.ort_session import limited, limited_as_artifact, open_session
from sparsec.rewriting.passes_api import Pass, PassResult
from sparsec.rewriting.pipeline import run_passes

HALF = """<ir_version: 10, opset_import: ["" : 21]> g (float16[17,5,16,3] x) => (float16[5,16,3,8] y)
    { a = Transpose<perm=[1,2,3,0]>(x) y = MatMul(a, w) }"""
HEAD = '<ir_version: 10, opset_import: ["" : 21]> '

pytestmark = pytest.mark.skipif(not isolation.available(), reason="no processes of their own on this system")


@pytest.fixture
def trials(monkeypatch) -> list[bool]:
    """The trials made, each: with optimizations?"""
    seen: list[bool] = []
    real = ort_session._try

    def noted(source, proto, optimize, limits, where) -> None:
        seen.append(optimize)
        real(source, proto, optimize, limits, where)

    monkeypatch.setattr(ort_session, "_try", noted)
    monkeypatch.setattr(ort_session, "_held", {})
    return seen


@pytest.fixture
def faults(trials, monkeypatch) -> list[bool]:
    """The same in a server whose ONNX Runtime has faults."""
    monkeypatch.setattr(ort_session, "SERVER", "faulty_ort")
    return trials


def parsed(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(HEAD + text)


def half(value: float = 1.0) -> onnx.ModelProto:
    """What crashes where a fusion is not left out (`sparsec.proving.ort_faults`)."""
    model = onnx.parser.parse_model(HALF)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full((17, 8), value, np.float16), "w"))
    return model


def test_what_crashes_with_optimizations_runs_without(faults, monkeypatch) -> None:
    monkeypatch.setattr(ort_session, "left_out", lambda proto: [])  # an unknown fault: nothing is left out here either
    x = np.ones((17, 5, 16, 3), np.float16)
    for value in (1, 2):  # other weights: the same graph
        (y,) = open_session(half(value)).run(None, {"x": x})
        assert np.array_equal(y, np.full((5, 16, 3, 8), 17 * value))
    assert faults == [True, False]


def test_what_crashes_always_is_one_clear_line(faults) -> None:
    model = parsed("crashes (float[2] x) => (float[2] y) { y = Neg(x) }")
    with pytest.raises(ModelError, match=r"ONNX Runtime, with all .* off, ended with SIGSEGV") as caught:
        open_session(model, where="m.onnx")
    assert caught.value.where == "m.onnx" and "\n" not in str(caught.value)
    assert faults == [True, False]
    model = parsed("hangs (float[2] x) => (float[2] y) { y = Neg(x) }")
    with limited(Limits(seconds=1)), pytest.raises(ModelError, match="gave up after 1 seconds of ONNX Runtime"):
        open_session(model)


def test_a_crash_in_a_pass_ends_the_pass(faults) -> None:
    samples = {"x": np.ones((4, 2), np.float32)}
    crashing = ir.from_proto(parsed("crashes (float[1,2] x) => (float[1,2] y) { y = Neg(x) }"))

    @dataclass(frozen=True)
    class Breaker(Pass):
        """Leaves a graph that ONNX Runtime crashes on."""

        name = "breaker"

        def call(self, model: ir.Model) -> PassResult:
            model.graph.name = "crashes"
            return PassResult(model, True)

    with pytest.raises(
        CheckError, match=r"pass breaker: left a model that cannot be tried: ONNX Runtime.* ended with SIGSEGV"
    ):
        run_passes(ir.from_proto(parsed("g (float[1,2] x) => (float[1,2] y) { y = Neg(x) }")), [Breaker()])
    with pytest.raises(ModelError, match="ended with SIGSEGV"):
        fetch(crashing, ["y"], pick_samples(crashing, samples, 4))


def test_one_trial_a_graph(trials) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda value: open_session(half(value)), range(4)))
    assert trials == [True]
    open_session(half(), optimize=False)
    assert trials == [True, False]
    model = parsed(
        "g (float[2] x, int64[1] n) => (float[2] y, int64[1] m) <float[1] w = {1}, int64[1] k = {1}> { y = Mul(x, w) m = Add(n, k) }"
    )
    open_session(model)
    for name, value, more in (("w", np.float32([2]), 0), ("k", np.int64([2]), 1)):  # whole numbers may be axes
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))
        before = len(trials)
        open_session(model)
        assert len(trials) == before + more
    other = onnx.ModelProto.FromString(model.SerializeToString())
    other.graph.value_info.append(other.graph.output.pop())  # the same messages in other lists
    open_session(other)
    assert len(trials) == before + more + 1


def test_limits_hold_for_trials(trials) -> None:
    model = parsed("g (float[1] x) => (float[n] y) <int64[1] w = {300000000}> { y = Expand(x, w) }")
    with limited(Limits(memory=1 << 27)), pytest.raises(ModelError, match="--limit memory"):
        open_session(model)
    assert trials == [True]  # no fallback: that it takes too much is no fault of an optimization
    with limited_as_artifact():
        open_session(model)
    assert trials == [True, True]
    with limited(Limits(isolate=0)), limited_as_artifact():
        assert ort_session._limits.get().isolate == 0


def test_threads_of_a_search_keep_the_limits() -> None:
    with limited(Limits(isolate=0)):
        assert in_parallel(lambda _: ort_session._limits.get().isolate, [1, 2, 3]) == [0, 0, 0]
    assert in_parallel(lambda _: ort_session._limits.get().isolate, [1, 2]) == [1, 1]


def test_what_only_the_optimizer_makes_invalid_runs_without_it(trials, monkeypatch) -> None:
    real = ort_session._open

    def refused(source, proto, threads, optimize, entries=None):
        if optimize:
            raise RuntimeError("output_dtype INT8 does not match y_zero_point type UINT8")
        return real(source, proto, threads, optimize, entries)

    monkeypatch.setattr(ort_session, "_open", refused)
    model = parsed("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    assert open_session(model).run(None, {"x": np.ones(2, np.float32)})[0].tolist() == [-1, -1]
    assert trials == [True, False]
    with pytest.raises(RuntimeError, match="output_dtype INT8"):  # both refuse: what was said first
        open_session(parsed("g (float[2] x) => (float[2] y) { y = NoSuchOp(x) }"))


def test_an_unoptimized_session_is_not_timed(trials, monkeypatch, tmp_path) -> None:
    artifact = sparsec.compile(parsed("g (float[2] x) => (float[2] y) { y = Neg(x) }"))
    real = ort_session._open
    monkeypatch.setattr(ort_session, "_open", lambda *given: real(*given[:3], False, *given[4:]))
    with pytest.raises(RuntimeUnavailable, match="without which it is not timed"):
        artifact.bench(runs=1, against=["ort"])
    assert artifact.verify().passed


def test_what_is_queued_is_dropped_after_a_failure() -> None:
    done = []

    def work(i: int) -> None:
        done.append(i)
        if i == 0:
            raise ValueError
        time.sleep(0.01)

    with pytest.raises(ValueError):  # noqa: PT011
        in_parallel(work, range(200))
    assert len(done) < 150


def test_a_refusal_is_onnx_runtimes_own(trials, tmp_path) -> None:
    with pytest.raises(Exception, match="NoSuchOp") as caught:
        open_session(parsed("g (float[2] x) => (float[2] y) { y = NoSuchOp(x) }"))
    assert not isinstance(caught.value, ModelError)
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(Exception, match=r"(?i)protobuf"):
        open_session(tmp_path / "m.onnx")
