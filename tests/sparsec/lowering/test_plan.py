"""The memory plan: its invariants and their checker, views, joins in place, and outputs that are something else too."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import agree, parse, run_program

from sparsec.errors import CheckError
from sparsec.kernels import elementwise
from sparsec.kernels.epilogue import RELU, Activation
from sparsec.loading.load import load_model
from sparsec.lowering import lower
from sparsec.lowering.calls import Calls
from sparsec.lowering.plan import check, plan
from sparsec.program import ALIGNMENT, SLACK, Arg, Program
from sparsec.targets import find_target

TARGET = find_target("host")


def program_of(text: str) -> Program:
    return agree(parse(text))


@pytest.fixture(scope="module")
def program() -> Program:
    return program_of("""g (float[1,3,9,9] x, float[8,3,3,3] w0, float[8] w1, float[8,8,3,3] w2) => (float[1,8,9,9] y) {
        a = Conv<pads=[1,1,1,1]>(x, w0, w1) b = Relu(a) c = Conv<pads=[1,1,1,1]>(b, w2) y = Add(c, b)
    }""")


def test_the_plan_itself_passes(program):
    check(program)
    assert all(b.offset % ALIGNMENT == 0 for b in program.buffers)
    assert all(c.offset % ALIGNMENT == 0 for c in program.constants)
    assert program.scratch_bytes % ALIGNMENT == 0
    assert program.weights_bytes >= max(c.offset + c.data.nbytes for c in program.constants) + SLACK


def changed(program, what, number, **changes):
    parts = list(getattr(program, what))
    parts[number] = replace(parts[number], **changes)
    return replace(program, **{what: tuple(parts)})


def with_argument(program, step, number, arg):
    args = list(program.steps[step].args)
    args[number] = arg
    return changed(program, "steps", step, args=tuple(args))


def test_a_misaligned_buffer_is_found(program):
    with pytest.raises(CheckError, match="misplaced"):
        check(changed(program, "buffers", 0, offset=program.buffers[0].offset + 4))


def test_a_buffer_without_slack_is_found(program):
    last = max(program.buffers, key=lambda b: b.offset)
    with pytest.raises(CheckError, match="misplaced"):
        check(replace(program, arena_bytes=last.offset + last.size + SLACK - 1))


def test_memory_shared_by_living_values_is_found(program):
    by_name = {b.name: i for i, b in enumerate(program.buffers)}
    first, second = by_name["b"], by_name["y"]
    with pytest.raises(CheckError, match="shares memory"):
        check(changed(program, "buffers", second, offset=program.buffers[first].offset))


def test_a_value_that_dies_too_early_is_found(program):
    number = next(i for i, b in enumerate(program.buffers) if b.name == "b")
    assert program.buffers[number].last == len(program.steps) - 1
    with pytest.raises(CheckError, match="bytes at arena"):
        check(changed(program, "buffers", number, last=program.buffers[number].last - 1))


@pytest.mark.parametrize("arg", [Arg("arena", -64), Arg("arena", 1 << 20), Arg("weights", 0), Arg("scratch", 1 << 20)])
def test_a_pointer_to_nowhere_is_found(program, arg):
    with pytest.raises(CheckError, match="bytes at"):
        check(with_argument(program, 1, 1, arg))


def test_a_pointer_that_leaves_its_buffer_is_found(program):
    arg = program.steps[-1].args[1]
    with pytest.raises(CheckError, match="bytes at arena"):
        check(with_argument(program, -1, 1, Arg("arena", arg.offset + 4)))


def test_a_constant_of_another_kernel_is_found(program):
    step = program.steps[-1]
    number = next(i for i, arg in enumerate(step.args) if arg.space == "weights")
    small = min(program.constants, key=lambda c: c.data.nbytes)
    with pytest.raises(CheckError, match="bytes at weights"):
        check(with_argument(program, -1, number, Arg("weights", small.offset)))


def test_a_missing_pointer_is_found(program):
    with pytest.raises(CheckError, match="pointers"):
        check(changed(program, "steps", 0, args=program.steps[0].args[:-1]))


def test_two_kernels_of_one_name_are_found():
    calls = Calls(TARGET.machine)
    for name in "xyz":
        calls.value(name, (9,), "float32")
    relu = elementwise.bind_unary(TARGET.machine, size=9, activation=RELU)
    tanh = elementwise.bind_unary(TARGET.machine, size=9, activation=Activation("tanh"))
    calls.emit(relu, {"x": "x", "y": "y"}, ("y",), ("a",), "a")
    calls.emit(relu, {"x": "x", "y": "y"}, ("y",), ("a",), "a")
    plan("model", TARGET, calls, ["x"], ["y"])
    calls.emit(replace(tanh, name=relu.name), {"x": "y", "y": "z"}, ("y",), ("b",), "b")
    with pytest.raises(CheckError, match="two kernels"):
        plan("model", TARGET, calls, ["x"], ["z"])


def test_a_value_has_one_shape():
    calls = Calls(TARGET.machine)
    calls.value("x", (2, 3), "float32")
    with pytest.raises(CheckError, match="declared as"):
        calls.value("x", (3, 2), "float32")


def test_names_of_ours_never_meet_the_graphs():
    """Node `n` has packed arrays called `n/bias`, `n/values`, `n/prepared`; the graph may use the same names."""
    model = parse("""g (float[1,3,6,6] x, float[5,3,3,3] w0, float[5] w1, float[1,5,1,1] w2, float[1,5,3,3] o)
    => (float[1,5,3,3] y, float[1,5,3,3] u, float[1,5,3,3] v, float[1,5,3,3] z) {
        z = Mul(o, w2) y = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w0, w1) p = Relu(o)
        u = Mul(p, y) v = Softmax<axis=1>(u)
    }""")  # fmt: skip
    for node, name in zip(model.graph.node, "anbcm", strict=False):
        node.name = name
    renamed = {"p": "n/prepared", "w1": "n/values", "w2": "n/bias", "v": "m/tmp0"}
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    for value in (*model.graph.initializer, *model.graph.output):
        value.name = renamed.get(value.name, value.name)
    agree(model)


# --- joins and views


def copies(program: Program) -> int:
    return sum(step.kernel.startswith("copy_") for step in program.steps)


def test_producers_write_into_the_joined_value():
    program = program_of("""g (float[1,3,5,5] x, float[4,3,1,1] w0, float[3,3,1,1] w1) => (float[1,7,5,5] y) {
        a = Conv(x, w0) b = Conv(x, w1) y = Concat<axis=1>(a, b)
    }""")
    assert copies(program) == 0
    assert {b.name for b in program.buffers} == {"x", "y"}


def test_nested_joins():
    program = program_of("""g (float[1,3,5,5] x, float[1,2,5,5] o) => (float[1,13,5,5] y, float[1,5,5,5] b) {
        a = Relu(x) c = Tanh(o) b = Concat<axis=1>(a, c) d = Sigmoid(x) e = Concat<axis=1>(b, d)
        f = Concat<axis=1>(e, b) y = Abs(f)
    }""")
    assert copies(program) == 1


def test_a_growing_join():
    """DenseNet: every layer reads what all before it wrote, in place."""
    program = program_of("""g (float[1,3,6,5] x, float[4,5,3,3] w0, float[4,9,3,3] w1, float[2,13,1,1] w2, float[5,3,1,1] w3)
    => (float[1,15,6,5] y) {
        x0 = Conv(x, w3) a = Conv<pads=[1,1,1,1]>(x0, w0) c1 = Concat<axis=1>(x0, a)
        b = Conv<pads=[1,1,1,1]>(c1, w1) c2 = Concat<axis=1>(c1, b) d = Conv(c2, w2) y = Concat<axis=1>(c2, d)
    }""")
    assert copies(program) == 0


def test_one_value_joined_twice():
    program = program_of("g (float[1,3,5,5] x) => (float[1,6,5,5] y) { a = Relu(x) y = Concat<axis=1>(a, a) }")
    assert copies(program) == 1


def test_one_value_in_two_joins():
    program = program_of("""g (float[1,3,5,5] x) => (float[1,6,5,5] y, float[1,6,5,5] z, float[1,3,5,5] a) {
        a = Relu(x) b = Tanh(x) y = Concat<axis=1>(a, b) z = Concat<axis=1>(b, a)
    }""")
    assert copies(program) == 2


def test_an_input_is_copied_into_a_join():
    program = program_of("g (float[1,3,5,5] x, float[1,2,5,5] o) => (float[1,5,5,5] y) { y = Concat<axis=1>(x, o) }")
    assert copies(program) == 2


def test_a_join_of_one():
    program_of(
        "g (float[1,3,5] x) => (float[1,3,5] y, float[1,3,5] z) { y = Concat<axis=1>(x) a = Relu(x) z = Concat<axis=1>(a) }"
    )


def test_parts_of_one_value_joined_in_another_order():
    program = program_of("""g (float[1,6,3,3] x) => (float[1,6,3,3] y, float[1,6,3,3] r) {
        r = Relu(x) a, b, c = Split<axis=1, num_outputs=3>(r) y = Concat<axis=1>(c, a, b)
    }""")
    assert copies(program) == 3


def test_a_join_of_views():
    """What is joined is a Reshape of what a layer wrote; odd sizes, so that parts begin anywhere."""
    program = program_of(
        """g (float[1,3,3,3] x, float[5,3,1,1] w0) => (float[1,73] y, float[5,9] q) <int64[2] flat = {1, -1},
        int64[2] pixels = {-1, 9}> {
        a = Conv(x, w0) b = Reshape(a, flat) t = Tanh(x) c = Reshape(t, flat) d = Concat<axis=1>(b, c)
        q = Reshape(a, pixels) e = Sigmoid(d) s = Slice(e, zero, end, axis) y = Concat<axis=1>(s, d)
    }""".replace("<int64[2] flat", "<int64[1] zero = {5}, int64[1] end = {6}, int64[1] axis = {1}, int64[2] flat")
    )
    assert copies(program) >= 1


def test_joined_bytes():
    program_of("g (bool[1,3] x, bool[1,2] o) => (bool[1,5] y) { a = Not(x) b = Not(o) y = Concat<axis=1>(a, b) }")


# --- outputs that are something else too


def test_an_output_that_is_an_input():
    model = parse("g (float[2,3] x) => (float[2,3] x, float[2,3] y) { y = Relu(x) }")
    program = agree(model)
    assert program.outputs[0].location == program.inputs[0].location


def test_outputs_that_are_views():
    program = program_of("""g (float[2,6] x) => (float[6,2] a, float[2,6] b, float[1,6] c, float[12] d) <int64[2] s = {6, 2},
        int64[1] n = {12}, int64[1] one = {1}, int64[1] two = {2}, int64[1] zero = {0}> {
        a = Reshape(x, s) b = Relu(x) c = Slice(b, one, two, zero) d = Reshape(b, n)
    }""")
    assert len(program.steps) == 1


def test_an_output_that_is_a_constant():
    program_of("g (float[2,3] x, float[2,3] w0) => (float[2,3] y, float[2,3] z) { y = Relu(x) z = Relu(w0) }")
    calls = Calls(TARGET.machine, constants={"c": np.arange(6, dtype=np.int64).reshape(2, 3)})
    calls.value("x", (2, 3), "float32")
    program = plan("model", TARGET, calls, ["x"], ["x", "c"])
    assert [(t.shape, t.dtype, t.location.space) for t in program.outputs] == [
        ((2, 3), "float32", "arena"), ((2, 3), "int64", "weights"),
    ]  # fmt: skip
    np.testing.assert_array_equal(run_program(program, {"x": np.zeros((2, 3), "f")})["c"], calls.constants["c"])


def test_an_output_that_is_read_inside():
    program_of("""g (float[1,4,5,5] x, float[4,4,3,3] w0) => (float[1,4,5,5] a, float[1,4,5,5] b, float[1,4,5,5] y) {
        a = Conv<pads=[1,1,1,1]>(x, w0) b = Relu(a) c = Conv<pads=[1,1,1,1]>(b, w0) y = Add(c, a)
    }""")


def test_a_program_without_steps():
    program = program_of("g (float[2,6] x) => (float[3,4] y) <int64[2] s = {3, 4}> { y = Reshape(x, s) }")
    assert program.steps == ()
    assert program.scratch_bytes == 0


def test_an_input_that_nothing_reads():
    program = program_of("g (float[2,6] x, float[3] o) => (float[2,6] y) { y = Relu(x) }")
    assert [t.name for t in program.inputs] == ["x", "o"]


# --- constants and determinism


def test_equal_constants_are_stored_once():
    model = parse("""g (float[1,8,4,4] x, float[8,8,1,1] w0, float[8,8,1,1] w1) => (float[1,8,4,4] y) {
        a = Conv(x, w0) b = Abs(a) y = Conv(b, w1)
    }""")
    model.graph.initializer[1].raw_data = model.graph.initializer[0].raw_data
    program = agree(model)
    convolutions = [step for step in program.steps if step.kernel.startswith("conv")]
    weights = [{arg for arg in step.args if arg.space == "weights"} for step in convolutions]
    assert weights[0] == weights[1]
    assert len({step.kernel for step in convolutions}) == 1


def test_the_same_model_gets_the_same_program():
    text = """g (float[1,3,9,9] x, float[8,3,3,3] w0, float[8,8,1,1] w1) => (float[1,16,9,9] y) {
        a = Conv<pads=[1,1,1,1]>(x, w0) b = Conv(a, w1) c = Elu(b) y = Concat<axis=1>(c, a) }"""
    one, two = (lower(load_model(parse(text, 0.7)), TARGET) for _ in range(2))
    assert str(one) == str(two)
    assert [k.name for k in one.kernels] == [k.name for k in two.kernels]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(one.constants, two.constants, strict=True))


def test_the_comparison_can_fail(program):
    """A lifetime one step short lets the value be overwritten, and the result shows it."""
    number = next(i for i, b in enumerate(program.buffers) if b.name == "b")
    broken = changed(program, "buffers", number, last=program.buffers[number].last - 1)
    feeds = {"x": np.ones((1, 3, 9, 9), np.float32)}
    assert not np.isnan(run_program(program, feeds)["y"]).any()
    assert np.isnan(run_program(broken, feeds)["y"]).any()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 400), st.lists(st.integers(0, 40), min_size=1, max_size=3)), min_size=1, max_size=30
    )
)
def test_living_values_never_overlap(nodes):
    """A chain of random reads: `check` passes, and no place is larger than all values together."""
    calls = Calls(TARGET.machine)
    names = [calls.value("x", (17,), "float32")]
    for i, (size, reads) in enumerate(nodes):
        source = names[reads[0] % len(names)]
        target = calls.value(f"v{i}", (size,), "float32")
        call = elementwise.bind_unary(TARGET.machine, size=1, activation=RELU)
        calls.emit(call, {"x": source, "y": target}, ("y",), (f"n{i}",), f"n{i}", {"y": 0})
        names.append(target)
    program = plan("model", TARGET, calls, ["x"], [names[-1]])
    check(program)
    assert program.arena_bytes <= sum(-(-(b.size + SLACK) // ALIGNMENT) * ALIGNMENT for b in program.buffers)
