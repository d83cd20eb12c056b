"""`--precision f16`: where it is refused, what lowering holds in float16 and what in float32, a whole artifact on Arm."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from programs import agree, parse

import sparsec
from sparsec import cli
from sparsec.errors import TargetError, UnsupportedError, UsageError
from sparsec.kernels.base import CHAIN
from sparsec.loading.load import load_model
from sparsec.lowering import lower
from sparsec.proving.tolerance import derive_half_tolerance, tolerances
from sparsec.runtimes.base import machine_arch
from sparsec.runtimes.emulated import find_emulator
from sparsec.targets import find_target, with_precision

ARM = with_precision(find_target("arm"), "f16")
emulated = pytest.mark.skipif(machine_arch() != "aarch64" and not find_emulator(), reason="no emulator for Arm")

NET = """g (float[1,3,12,12] x, float[8,3,3,3] w0, float[8] w1, float[16,8,1,1] w2, float[16,1,3,3] w3, float[5,16] w4) => (float[1,5] y) {
    a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w0, w1)
    b = Relu(a)
    c = Conv(b, w2)
    d = Sigmoid(c)
    e = Mul(c, d)
    f = Conv<pads=[1,1,1,1], group=16>(e, w3)
    h = GlobalAveragePool(f)
    i = Flatten(h)
    y = Gemm<transB=1>(i, w4)
}"""


def casts(program):
    """(from, to) of each cast, in order."""
    return [layer.reason for layer in program.layers if layer.op == "Cast"]


@pytest.mark.parametrize(("target", "cpu"), [("arm", "cortex-a53"), ("arm", "generic"), ("host", "x86-64-v4")])
def test_a_cpu_without_float16_is_refused_in_one_line(target, cpu):
    with pytest.raises(TargetError) as caught:
        sparsec.compile(parse(NET), target, cpu=cpu, precision="f16")
    text = str(caught.value)
    assert f"cpu '{cpu}' has no float16 arithmetic" in text
    assert all(able in text for able in ("--target arm", "armv8.2-a", "cortex-a55", "cortex-a76"))
    assert "cortex-a53," not in text
    assert "\n" not in text


def test_an_unknown_precision_is_refused():
    with pytest.raises(TargetError, match=r"unknown precision 'f15'; did you mean 'f16'\?"):
        with_precision(find_target("arm"), "f15")


def test_precision_changes_back():
    target = find_target("arm", "cortex-a76")
    assert with_precision(target, "f32") is target
    half = with_precision(target, "f16")
    assert (half.precision, half.machine.lanes) == ("f16", 2 * target.machine.lanes)
    assert with_precision(half, "f32") == target


def test_everything_but_inputs_and_outputs_is_float16():
    program, single = (lower(load_model(parse(NET)), target) for target in (ARM, find_target("arm")))
    assert [t.dtype for t in (*program.inputs, *program.outputs)] == ["float32"] * 2
    edges = {t.name for t in (*program.inputs, *program.outputs)}
    assert {b.dtype for b in program.buffers if b.name not in edges} == {"float16"}
    assert {str(c.data.dtype) for c in program.constants} <= {"float16", "int32", "uint16"}
    assert casts(program) == ["from float32 to float16", "from float16 to float32"]
    assert not any("_f32" in kernel.name for kernel in program.kernels)
    assert not {k.name for k in program.kernels} & {k.name for k in single.kernels}
    assert program.weights_bytes < 0.75 * single.weights_bytes
    assert program.arena_bytes < single.arena_bytes


def test_candidates_and_reasons_name_the_kernels_that_run():
    program = lower(load_model(parse(NET, zeros={"w2": 0.8})), ARM)
    layer = next(
        layer for layer in program.layers if layer.structure and layer.candidates and len(layer.candidates) > 1
    )
    assert all("_f16_" in candidate.kernel for candidate in layer.candidates)
    assert "_f32" not in layer.reason


@emulated
def test_the_generic_route_computes_in_float32_behind_casts():
    program = agree(parse("""g (float[1,3,6,6] x, float[4,3,1,1] w0, float[4,4,1,1] w1) => (float[1,4,6,6] y, float[1,4,6,6] z) {
        a = Conv(x, w0)
        b = Softplus(a)
        c = Softplus(b)
        z = Sin(c)
        y = Conv(c, w1)
    }"""), ARM)  # fmt: skip
    generic = {layer.kernel for layer in program.layers if layer.route == "generic"}
    assert generic
    # x; a for the region; c behind it; y. z is written as it leaves.
    assert casts(program) == [
        "from float32 to float16", "from float16 to float32", "from float32 to float16", "from float16 to float32",
    ]  # fmt: skip


@emulated
@pytest.mark.parametrize(
    "text",
    [
        "g (float[2,40] x) => (float[2,40] y, float[2,40] z) { y = Relu(x) z = Tanh(y) }",
        "g (float[2,40] x) => (float[2,40] x2, float[2,40] y) { x2 = Identity(x) y = Relu(x2) }",
        "g (float[1,4,5] x, float[1,3,5] u) => (float[1,7,5] y) { a = Relu(x) y = Concat<axis=1>(a, u) }",
        "g (float[6,5] x) => (float[2,5] y, float[4,5] z) { a = Relu(x) y, b = Split<axis=0, num_outputs=2>(a) z = Add(b, b) }"
        .replace("float[4,5] z", "float[3,5] z").replace("float[2,5] y", "float[3,5] y"),
        "g (float[4,6] x, int64[2] s) => (float[4,6] y) { a = Relu(x) y = Mul(a, a) }",
        "g (float[3,5] x, float[5] w0) => (float[3,5] y) { a = Add(x, w0) y = Softmax(a) }",
        "g (float[1,2,3] x) => (float[1,6] y) { a = Flatten<axis=1>(x) b = Relu(a) y = Flatten<axis=1>(b) }",
    ],
)  # fmt: skip
def test_edges_of_the_graph(text):
    agree(parse(text), ARM)


def test_weights_beyond_float16_are_refused_all_at_once():
    model = parse(NET)
    for initializer in model.graph.initializer:
        if initializer.name in ("w0", "w4"):
            array = np.full(list(initializer.dims), 70000, np.float32)
            initializer.raw_data = array.tobytes()
    with pytest.raises(
        UnsupportedError, match=r"float16 ends at 65504: w0 of Conv .* reaches 7e\+04; w4 of Gemm .* reaches 7e\+04"
    ):
        lower(load_model(model), ARM)
    lower(load_model(model), find_target("arm"))


def test_infinite_clip_bounds_are_fine():
    model = parse("g (float[4] x) => (float[4] y) <float low = {0.0}, float high = {3e38}> { y = Clip(x, low, high) }")
    program = lower(load_model(model), ARM)
    assert casts(program) == ["from float32 to float16", "from float16 to float32"]


def test_measured_choices_do_not_fit(tmp_path):
    with pytest.raises(UsageError, match="float32 kernels"):
        sparsec.compile(parse(NET), "arm", precision="f16", tuning=tmp_path / "none.json")


def test_the_tolerance_follows_from_the_model():
    model = load_model(parse("g (float[1,1000] x, float[7,1000] w0) => (float[1,7] y, int64[1,1] z) "
                             "{ y = Gemm<transB=1>(x, w0) z = ArgMax<axis=1>(y) }"))  # fmt: skip
    roundings = CHAIN + 1000 / CHAIN + 2
    assert derive_half_tolerance(model) == pytest.approx(4 * 2**-11 * math.sqrt(roundings / 3))
    allowed = tolerances(model, ARM)
    assert allowed["z"] == 0.0
    assert allowed["y"] == pytest.approx(derive_half_tolerance(model), rel=1e-2)
    assert tolerances(model, find_target("arm"))["y"] < allowed["y"] / 100


@emulated
def test_an_artifact_in_float16(tmp_path, capsys):
    model = tmp_path / "net.onnx"
    model.write_bytes(parse(NET, zeros={"w2": 0.7}).SerializeToString())
    arguments = [
        "compile",
        str(model),
        "--target",
        "arm",
        "--os",
        "linux",
        "--precision",
        "f16",
        "-o",
        str(tmp_path),
        "--json",
    ]
    assert cli.run(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["precision"] == "f16"
    assert answer["parity"]["passed"]
    artifact = sparsec.load(answer["artifact"])
    assert artifact.manifest["target"]["precision"] == "f16"
    assert [spec.dtype for spec in (*artifact.inputs, *artifact.outputs)] == ["float32"] * 2
    verification = artifact.verify()
    assert verification.passed
    assert verification.same_top1 == verification.samples
    error = verification.worst.max_relative_error
    assert 1e-5 < error < verification.worst.tolerance  # float16 did the work


@pytest.mark.parametrize("verb", ["compile", "inspect"])
def test_the_command_line_refuses_before_it_reads_the_model(tmp_path, capsys, verb):
    code = cli.run([verb, str(tmp_path / "none.onnx"), "--target", "arm", "--cpu", "cortex-a53", "--precision", "f16"])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert captured.err.startswith("error: --precision: cpu 'cortex-a53' has no float16 arithmetic")
    assert captured.err.count("\n") == 1
