"""Loading: what comes in wrong is one line, what comes out is static, named, at one opset, and computes the same."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from sparsec.errors import ModelError, SparsecError, UnsupportedError, UsageError
from sparsec.loading.load import load_model, model_bytes
from sparsec.loading.opsets import IR_VERSION, OPSET
from sparsec.passes.normalization.fold_constants import static_shape
from sparsec.proving.tolerance import derive_tolerance
from sparsec.rewriting.pipeline import ROUNDED_AGAIN, relative_error, sample_inputs

DATA = os.environ.get("SPARSEC_DATA")
RNG = np.random.default_rng(4)
needs_data = pytest.mark.skipif(not DATA, reason="SPARSEC_DATA is not set")

REAL = {
    "squeezenet1.1": {},
    "mobilenetv2_torchvision": {},
    "resnet20_cifar10": {},
    "dscnn_kws_mlperf_tiny": {},
    "kwt1_speech_commands": {},
    "ultraface_RFB_320": {},
    "nsnet2": {"shapes": {"input": (1, 5, 161)}},
    "silero_vad": {"shapes": {"input": (1, 576), "state": (2, 1, 128)}, "bind": {"sr": 16000}},
}


def text(body: str, opset: int = 21, ir_version: int = 8, **weights: np.ndarray) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}]> ' + body)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def session(data: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def assert_finished(model: ir.Model) -> None:
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert model.opset_imports == {"": OPSET}
    assert model.ir_version == IR_VERSION
    names = [node.name for node in model.graph]
    assert all(names)
    assert len(set(names)) == len(names)
    for node in model.graph:
        for value in node.outputs:
            if value.name:
                assert static_shape(value) is not None, value
                assert value.dtype is not None, value
    assert all(v.uses() or v.is_graph_output() for v in model.graph.initializers.values())
    assert not any(v.is_initializer() for v in model.graph.inputs)


def assert_same(original: bytes, loaded: ir.Model, bind: dict | None = None, scale: float = 1.0) -> None:
    """ONNX Runtime's outputs of both, within twice the derived tolerance (weights are rounded once more by folding)."""
    first, second = session(original), session(model_bytes(loaded))
    feeds = {name: (array * scale).astype(array.dtype) for name, array in sample_inputs(second).items()}
    extra = {x.name: np.array((bind or {})[x.name], np.int64) for x in first.get_inputs() if x.name in (bind or {})}
    assert [y.name for y in first.get_outputs()] == [y.name for y in second.get_outputs()]
    limit = ROUNDED_AGAIN * derive_tolerance(loaded)
    for a, b in zip(first.run(None, {**feeds, **extra}), second.run(None, feeds), strict=True):
        assert relative_error(a, b) <= limit


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_real_model(name: str) -> None:
    path = Path(DATA or "") / "models" / f"{name}.onnx"
    model = load_model(path, **REAL[name])
    assert_finished(model)
    operators = {node.op_type for node in model.graph}
    assert not operators & {"Shape", "Constant", "Identity", "Dropout", "BatchNormalization", "If", "DequantizeLinear"}
    assert_same(path.read_bytes(), model, REAL[name].get("bind"))
    assert model_bytes(model) == model_bytes(load_model(path.read_bytes(), **REAL[name]))


def test_every_kind_of_source_gives_the_same_model(tmp_path: Path) -> None:
    proto = text("g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }")
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    before = proto.SerializeToString()
    wrapped = ir.from_proto(proto)
    results = {model_bytes(load_model(s)) for s in (path, str(path), path.read_bytes(), proto, wrapped)}
    assert len(results) == 1
    assert proto.SerializeToString() == before
    assert [d.value for d in wrapped.graph.inputs[0].shape[:1]] == ["N"]


# ---- shapes


def test_symbolic_batch_becomes_one_and_is_said() -> None:
    notes: list[str] = []
    model = load_model(text("g (float[N,3] x, float[2,N] z) => (float[N,3] y) { y = Relu(x) }"), notes=notes)
    assert static_shape(model.graph.inputs[0]) == (1, 3)
    assert static_shape(model.graph.inputs[1]) == (2, 1)  # the same name is the same number
    assert static_shape(model.graph.outputs[0]) == (1, 3)
    assert notes == ["input 'x': batch symbolic (N) became 1"]


def test_shape_fixes_dimensions_and_names_shared_with_other_inputs() -> None:
    proto = text("g (float[N,H] x, float[N,3] z) => (float[N,H] y) { y = Relu(x) }")
    model = load_model(proto, shapes={"x": (4, 7)})
    assert [static_shape(v) for v in model.graph.inputs] == [(4, 7), (4, 3)]


def test_all_symbolic_dimensions_are_listed_with_the_way_out() -> None:
    proto = text("g (float[N,3,H,W] x, float[2,T] z) => (float[] y) { y = Relu(x) }")
    with pytest.raises(UnsupportedError) as caught:
        load_model(proto)
    message = str(caught.value)
    assert "dimension 2 is symbolic (H), dimension 3 is symbolic (W); give --shape x:1x3xNxN" in message
    assert "input 'z': dimension 1 is symbolic (T); give --shape z:2xN" in message
    assert "\n" not in message


def test_input_without_rank_needs_a_shape() -> None:
    proto = text("g (float[1] x) => (float[1] y) { y = Relu(x) }")
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(UnsupportedError, match=r"input 'x' has no shape: give --shape x:"):
        load_model(proto)
    assert static_shape(load_model(proto, shapes={"x": (2, 3)}).graph.outputs[0]) == (2, 3)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"x": (1, 4)}, r"--shape: input 'x' is \?x3, got 1x4"),
        ({"x": (1, 3, 1)}, r"input 'x' is \?x3, got 1x3x1"),
        ({"x": (0, 3)}, r"got 0x3"),
        ({"data": (1, 3)}, r"no input 'data'; known: x, z"),
        ({"x": (2, 3), "z": (3, 3)}, r"N cannot be 2 and 3 at once"),
    ],
)
def test_wrong_shape(shapes: dict, message: str) -> None:
    proto = text("g (float[N,3] x, float[N,3] z) => (float[N,3] y) { y = Add(x, z) }")
    with pytest.raises(UsageError, match=message):
        load_model(proto, shapes=shapes)


def test_stale_shapes_of_the_export_are_inferred_anew() -> None:
    proto = text("g (float[N,4] x) => (float[8,2,2] y) <int64[3] s = {-1, 2, 2}> { r = Relu(x) y = Reshape(r, s) }")
    proto.graph.value_info.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, [8, 4]))
    assert static_shape(load_model(proto).graph.outputs[0]) == (1, 2, 2)


# ---- bind


@pytest.mark.parametrize("value", [2, "2", 2.0, np.float32(2), [2, 2, 2], "2+2+2", np.full(3, 2)])
def test_bound_input_becomes_a_constant(value: object) -> None:
    proto = text("g (float[3] x, float[3] k) => (float[3] y) { d = Add(k, k) y = Mul(x, d) }")
    model = load_model(proto, bind={"k": value})
    assert [v.name for v in model.graph.inputs] == ["x"]
    (constant,) = model.graph.initializers.values()
    np.testing.assert_array_equal(constant.const_value.numpy(), np.full(3, 4, np.float32))


def test_bound_condition_chooses_the_branch() -> None:
    body = """g (float[3] x, bool c) => (float[3] y) {
        y = If (c) < then_branch = t () => (float[3] a) { a = Neg(x) }, else_branch = e () => (float[3] b) { b = Relu(x) } >
    }"""
    with pytest.raises(UnsupportedError, match=r"If 'If_0': control flow that depends on the input"):
        load_model(text(body))
    assert [n.op_type for n in load_model(text(body), bind={"c": 1}).graph] == ["Neg"]
    assert [n.op_type for n in load_model(text(body), bind={"c": 0}).graph] == ["Relu"]


@pytest.mark.parametrize(
    ("bind", "message"),
    [
        ({"k": "two"}, r"--bind k: expected numbers of type int64, got 'two'"),
        ({"k": 1.5}, r"--bind k: expected whole numbers of type int64, got 1.5"),
        ({"k": [1, 2]}, r"--bind k: the input has shape \[3\], got a value of shape \[2\]"),
        ({"q": 1}, r"--bind: the model has no input 'q'"),
        ({"k": float("nan")}, r"expected whole numbers"),
    ],
)
def test_wrong_bind(bind: dict, message: str) -> None:
    proto = text("g (int64[3] x, int64[3] k) => (int64[3] y) { y = Mul(x, k) }")
    with pytest.raises(UsageError, match=message):
        load_model(proto, bind=bind)


# ---- normalization


def test_nodes_get_stable_unique_names() -> None:
    proto = text("g (float[3] x) => (float[3] y) { a = Relu(x) b = Neg(a) c = Exp(b) y = Abs(c) }")
    proto.graph.node[1].name = "same"
    proto.graph.node[2].name = "same"
    assert [n.name for n in load_model(proto).graph] == ["Relu_0", "same", "same_1", "Abs_3"]


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 18, 20])
def test_old_opsets_are_upgraded(opset: int) -> None:
    axes = "<axes = [2, 3], keepdims = 0>" if opset < 18 else "<keepdims = 0>"
    more, extra = ("", "") if opset < 18 else (", axes", "<int64[2] axes = {2, 3}>")
    proto = text(
        f"""g (float[1,3,6,6] x) => (float[1,4] y) {extra} {{
            c = Conv<pads = [1, 1, 1, 1]>(x, w)
            m = ReduceMean{axes}(c{more})
            y = Softmax(m)
        }}""",
        opset,
        w=f32(4, 3, 3, 3),
    )
    model = load_model(proto)
    assert_finished(model)
    assert_same(proto.SerializeToString(), model)


@pytest.mark.parametrize("operator", ["Hardmax", "Softmax", "LogSoftmax"])
@pytest.mark.parametrize("axis", ["", "<axis = 0>", "<axis = 2>"])
def test_before_opset_13_an_axis_stood_for_all_from_it_on(operator: str, axis: str) -> None:
    proto = text(f"g (float[2,3,4] x) => (float[2,3,4] y) {{ y = {operator}{axis}(x) }}", 11)
    assert_same(proto.SerializeToString(), load_model(proto))


def test_newer_opset_with_unchanged_operators_is_accepted() -> None:
    proto = text("g (float[1,3] x) => (float[1,3] y) { a = Relu(x) y = Identity(a) }", 23, ir_version=11)
    assert_finished(load_model(proto))


def test_newer_operators_are_listed() -> None:
    proto = text("g (float[1,4] x) => (int32[1,4] y) { y = BitCast <to=6> (x) }", 26, ir_version=13)
    with pytest.raises(UnsupportedError, match=r"opset 26 is newer than 21.*BitCast"):
        load_model(proto)


def test_initializers_that_are_inputs_are_constants() -> None:
    proto = text("g (float[1,3] x, float[3] k) => (float[1,3] y) <float[3] unused = {1, 2, 3}> { y = Mul(x, k) }")
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "k"))
    notes: list[str] = []
    model = load_model(proto, notes=notes)
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert list(model.graph.initializers) == ["k"]
    assert notes == ["1 inputs have default values and became constants"]


def test_everything_is_normalized_together() -> None:
    proto = text(
        """g (float[N,3,8,8] x) => (float[N,10] y) <int64[8] p = {0, 0, 1, 1, 0, 0, 1, 1}> {
            q = Pad(x, p)
            c = Conv(q, w)
            n = BatchNormalization(c, g, h, m, v)
            r = Relu(n)
            d = Dropout(r)
            a = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(d)
            s = Shape(a)
            zero = Constant<value_int = 0>()
            b = Gather(s, zero)
            ax = Constant<value_ints = [0]>()
            u = Unsqueeze(b, ax)
            rest = Constant<value_ints = [-1]>()
            t = Concat<axis = 0>(u, rest)
            f = Reshape(a, t)
            y = Gemm<transB = 1>(f, k)
        }""",
        w=f32(4, 3, 3, 3), g=f32(4), h=f32(4), m=f32(4), v=np.abs(f32(4)), k=f32(10, 64),
    )  # fmt: skip
    model = load_model(proto)
    assert_finished(model)
    assert [n.op_type for n in model.graph] == ["Conv", "Relu", "MaxPool", "Reshape", "Gemm"]
    assert_same(proto.SerializeToString(), model)


def test_functions_are_inlined() -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 18, "mine" : 1]>
        g (float[3] x) => (float[3] y) { y = mine.twice(x) }
        <domain: "mine", opset_import: ["" : 18]> twice (a) => (b) { b = Add(a, a) }""")
    assert [n.op_type for n in load_model(proto).graph] == ["Add"]


# ---- what is refused


def test_foreign_operators_are_listed_together() -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 18, "com.acme" : 1, "ai.onnx.ml" : 3]>
        g (float[3] x) => (float[3] y) { a = com.acme.Frob(x) b = Relu(a) y = ai.onnx.ml.Scaler(b) }""")
    with pytest.raises(UnsupportedError, match=r"Frob '' of domain 'com.acme'; Scaler '' of domain 'ai.onnx.ml'"):
        load_model(proto)


def test_data_dependent_shapes_are_listed_with_node_names() -> None:
    proto = text("g (float[3,4] x) => (int64[2,K] y, float[U] u) { y = NonZero(x) u = Unique(x) }", 13)
    with pytest.raises(UnsupportedError) as caught:
        load_model(proto)
    assert "NonZero 'NonZero_0': the shape of its output 'y' depends on the input's values" in str(caught.value)
    assert "Unique 'Unique_1'" in str(caught.value)


def test_strings_and_sequences_are_refused() -> None:
    proto = text(
        "g (string[3] s, float[3] x) => (float[3] y, seq(float[3]) q) { y = Relu(x) q = SequenceConstruct(x) }", 13
    )
    with pytest.raises(UnsupportedError, match=r"'s' is .*'q' is "):
        load_model(proto)


def test_nothing_left_to_compute() -> None:
    proto = text("g () => (float[1] y) { y = Constant<value = float[1] {1}>() }", 13)
    model = load_model(proto)
    assert [n.op_type for n in model.graph] == ["Identity"]


BYTES = {
    "empty": b"",
    "text": b"this is not a model, but a sentence",
    "zip": b"PK\x03\x04" + bytes(200),
    "zeros": bytes(100),
}


@pytest.mark.parametrize("data", BYTES.values(), ids=BYTES)
def test_not_a_model(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(ModelError) as caught:
            load_model(source)
        assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load_model(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="this is a folder"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="expected a path"):
        load_model(42)  # type: ignore[arg-type]


def _small() -> onnx.ModelProto:
    return text("g (float[1,3] x) => (float[1,5] y) { y = MatMul(x, w) }", w=f32(3, 5))


def refusal(data: bytes) -> str:
    """The message with which `data` is refused; empty if it loads."""
    try:
        load_model(data)
    except SparsecError as error:
        return str(error)
    return ""


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(1, 200))
def test_truncated_anywhere_is_one_line(cut: int) -> None:
    data = _small().SerializeToString()
    message = refusal(data[: max(1, len(data) - cut)])
    assert "\n" not in message
    assert message or cut < 10  # only fields behind the graph may be missing


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_escape_as_another_error(data: st.DataObject) -> None:
    raw = bytearray(_small().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    assert "\n" not in refusal(bytes(raw))


def test_empty_graph() -> None:
    proto = _small()
    del proto.graph.node[:]
    with pytest.raises(ModelError, match="empty"):
        load_model(proto)


def test_checker_speaks_on_one_line() -> None:
    proto = _small()
    proto.graph.node[0].input[1] = "nowhere"
    with pytest.raises(ModelError, match=r"not a valid ONNX model: .*nowhere") as caught:
        load_model(proto)
    assert "\n" not in str(caught.value)


# ---- external data


def external(folder: Path, **changes: str) -> Path:
    proto = _small()
    tensor = proto.graph.initializer[0]
    array = np.arange(15, dtype=np.float32)
    (folder / "weights.bin").write_bytes(b"\0" * 8 + array.tobytes())
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "weights.bin", "offset": "8", "length": "60", **changes}.items():
        tensor.external_data.add(key=key, value=value)
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_external_data_is_read(tmp_path: Path) -> None:
    model = load_model(external(tmp_path))
    (value,) = model.graph.initializers.values()
    np.testing.assert_array_equal(value.const_value.numpy().reshape(-1), np.arange(15, dtype=np.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"location": "/etc/passwd"}, "relative path inside the model's folder"),
        ({"location": "../weights.bin"}, "lies outside the model's folder"),
        ({"location": "link.bin"}, "lies outside the model's folder"),
        ({"location": "none.bin"}, "no such file 'none.bin'"),
        ({"length": "64"}, "expected 60 bytes"),
        ({"offset": "12"}, "has 68 bytes, expected at least 72"),
        ({"offset": "-4"}, "expected 60 bytes"),
        ({"offset": "x"}, "must be integers"),
    ],
)
def test_external_data_that_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(100))
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    with pytest.raises(ModelError, match=message):
        load_model(external(folder, **changes))


def test_external_data_needs_a_path(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="give the model's path"):
        load_model(external(tmp_path).read_bytes())
