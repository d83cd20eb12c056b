"""verify compares, and can fail: errors by their definition, derived tolerances, fidelity, accuracy."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from samples import pair_artifact, pair_inputs, pair_model

import sparsec
from sparsec.artifact import Artifact
from sparsec.errors import ArtifactError, DataError, ModelError
from sparsec.proving.parity import errors
from sparsec.proving.samples import random_sample, read_parity
from sparsec.proving.tolerance import (
    CEILING,
    SIGMOID_ERROR,
    UNIT_ROUNDOFF,
    derive_tolerance,
    floors,
    for_sample,
    tolerances,
)
from sparsec.proving.verify import Verification, verify
from sparsec.targets import find_target


def arrays(count: int) -> dict[str, np.ndarray]:
    samples = pair_inputs(count)
    return {"x": np.concatenate([s["x"] for s in samples]), "state": np.stack([s["state"] for s in samples])}


def test_errors_by_definition() -> None:
    assert errors(np.array([1.0, 2.0, -4.0]), np.array([1.0, 2.5, -4.0])) == (0.5, 0.125)
    assert errors(np.zeros(3), np.zeros(3)) == (0.0, 0.0)
    assert errors(np.zeros((0, 3)), np.zeros((0, 3))) == (0.0, 0.0)
    assert errors(np.array([0.1]), np.array([0.0]))[1] == math.inf
    assert errors(np.array([255], np.uint8), np.array([0], np.uint8))[0] == 255


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_must_be_equal(bad: float) -> None:
    assert errors(np.array([bad, 1.0]), np.array([bad, 1.0])) == (0.0, 0.0)
    assert errors(np.array([bad, 1.0]), np.array([2.0, 1.0])) == (math.inf, math.inf)
    assert errors(np.array([2.0, 1.0]), np.array([bad, 1.0])) == (math.inf, math.inf)


def test_passes_and_reports_each_output() -> None:
    result = pair_artifact().verify()
    assert isinstance(result, Verification)
    assert result.passed
    assert [p.output for p in result.parity] == ["y", "next"]
    assert result.samples == 5
    assert result.fidelity is None
    assert result.accuracy is None
    found = json.loads(json.dumps(result.json(), allow_nan=False))
    assert set(found["parity"][0]) == {"output", "max_abs_error", "max_relative_error", "tolerance"}
    assert "fidelity" not in found
    assert "accuracy" not in found


def test_fails_when_the_kernels_compute_something_else(tmp_path: Path) -> None:
    """The reference is model.onnx in the artifact: one changed weight there is a difference."""
    artifact = Artifact(shutil.copytree(pair_artifact().path, tmp_path / "m"), pair_artifact().manifest)
    model = onnx.load(artifact.path / "model.onnx")
    changed = [t for t in model.graph.initializer if t.name == "w2"]
    assert changed
    weight = numpy_helper.to_array(changed[0]).copy()
    weight.flat[0] *= 1.01
    changed[0].CopyFrom(numpy_helper.from_array(weight, "w2"))
    onnx.save(model, artifact.path / "model.onnx")
    result = artifact.verify()
    assert not result.passed
    assert [p.passed for p in result.parity] == [False, True]
    assert result.worst.output == "y"


def test_fails_at_a_tolerance_that_is_too_small() -> None:
    manifest = {**pair_artifact().manifest, "tolerances": {"y": 0.0, "next": 0.0}}
    result = Artifact(pair_artifact().path, manifest).verify(data=arrays(20))
    assert not result.passed  # two float32 sums of 16 products agree in every bit of 80 outputs by no accident


def test_accuracy_counts_labels() -> None:
    data = arrays(8)
    outputs = [pair_artifact().run(sample)["y"].argmax() for sample in pair_inputs(8)]
    labels = np.array(outputs)
    labels[:3] = (labels[:3] + 1) % 4
    result = pair_artifact().verify(data={**data, "label": labels})
    assert result.accuracy == {"reference": 0.625, "artifact": 0.625, "samples": 8}
    assert result.same_top1 == 8


def test_fidelity_to_the_original() -> None:
    same = pair_artifact().verify(data=arrays(6), against=pair_model())
    assert same.fidelity is not None
    assert same.fidelity["top1_agreement"] == 1
    assert same.fidelity["snr_db"] > 100
    other = pair_model()
    for tensor in other.graph.initializer:
        if tensor.name == "b2":
            tensor.CopyFrom(numpy_helper.from_array(np.array([100, 0, 0, 0], np.float32), "b2"))
    different = pair_artifact().verify(data=arrays(6), against=other)
    assert different.fidelity is not None
    assert different.passed  # fidelity is no check
    assert different.fidelity["snr_db"] < 10
    expected = np.mean([pair_artifact().run(s)["y"].argmax() == 0 for s in pair_inputs(6)])
    assert different.fidelity["top1_agreement"] == pytest.approx(expected, abs=1e-6)


def test_accuracy_of_the_original_is_the_reference() -> None:
    other = pair_model()
    for tensor in other.graph.initializer:
        if tensor.name == "b2":
            tensor.CopyFrom(numpy_helper.from_array(np.array([100, 0, 0, 0], np.float32), "b2"))
    result = pair_artifact().verify(data={**arrays(6), "label": np.zeros(6, int)}, against=other)
    assert result.accuracy is not None
    assert result.accuracy["reference"] == 1


def test_bound_inputs_are_given_to_the_original(tmp_path: Path) -> None:
    artifact = sparsec.compile(pair_model(), bind={"state": "0.5"})
    assert [spec.name for spec in artifact.inputs] == ["x"]
    result = artifact.verify(against=pair_model())
    assert result.fidelity is not None
    assert result.fidelity["snr_db"] > 100


def test_wrong_originals(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        pair_artifact().verify(against=tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ModelError):
        pair_artifact().verify(against=tmp_path / "text.onnx")
    graph = helper.make_graph(
        [helper.make_node("Relu", ["a"], ["b"])],
        "other",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [1, 4])],
    )
    other = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(DataError, match="'a' that the artifact does not have"):
        pair_artifact().verify(against=other)


def test_parity_file_must_fit(tmp_path: Path) -> None:
    artifact = Artifact(shutil.copytree(pair_artifact().path, tmp_path / "m"), pair_artifact().manifest)
    assert set(read_parity(artifact)) == {"x", "state"}
    (artifact.path / "parity.bin").write_bytes(b"SPARSECP" + b"\0" * 80)
    with pytest.raises(ArtifactError, match=r"parity\.bin"):
        read_parity(artifact)


def test_progress_is_told() -> None:
    heard = []
    verify(pair_artifact(), data=arrays(3), progress=lambda what, done, total: heard.append((done, total)))
    assert heard == [(1, 3), (2, 3), (3, 3)]


def test_random_samples_repeat() -> None:
    first, again = random_sample(pair_artifact().inputs), random_sample(pair_artifact().inputs)
    np.testing.assert_array_equal(first["x"], again["x"])
    assert not np.array_equal(first["x"], random_sample(pair_artifact().inputs, 7)["x"])


def chain(length: int, k: int) -> ir.Model:
    """`length` matrix products with sums of `k`."""
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("MatMul", [f"v{i}", f"w{i}"], [f"v{i + 1}"]) for i in range(length)]
    weights = [rng.standard_normal((k, k)).astype(np.float32) / np.sqrt(k) for _ in range(length)]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("v0", TensorProto.FLOAT, [1, k])],
        [helper.make_tensor_value_info(f"v{length}", TensorProto.FLOAT, [1, k])],
        [numpy_helper.from_array(w.astype(np.float32), f"w{i}") for i, w in enumerate(weights)],
        value_info=[helper.make_tensor_value_info(f"v{i}", TensorProto.FLOAT, [1, k]) for i in range(1, length)],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_tolerance_is_its_formula() -> None:
    assert derive_tolerance(chain(1, 64)) == pytest.approx(4 * UNIT_ROUNDOFF * math.sqrt(2 * 64))
    assert derive_tolerance(chain(9, 64)) == pytest.approx(3 * derive_tolerance(chain(1, 64)))
    assert tolerances(chain(3, 64), find_target("host"))["v3"] < CEILING["x86_64"]
    assert tolerances(chain(20, 2000), find_target("host")) == {"v20": CEILING[find_target("host").arch]}


def parsed(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {text}'))


def test_sigmoid_of_onnx_runtime_is_near_in_absolute_terms_only() -> None:
    """Why there is a floor: its error is within it, and far from relative to a small value."""
    import onnxruntime

    model = parsed("(float[n] x) => (float[n] y) { y = Sigmoid(x) }")
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    x = np.linspace(-30, 30, 60_001, dtype=np.float32)
    (y,) = session.run(None, {"x": x})
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    off = np.abs(y - exact)
    assert off.max() <= SIGMOID_ERROR
    assert (off / exact).max() > 0.01
    assert floors(model) == {"y": SIGMOID_ERROR}


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("s = Sigmoid(x) t = Reshape(s, k) y = ReduceMean(t)", True),
        ("s = Sigmoid(x) y = Mul(s, x)", False),
        ("s = Sigmoid(x) y = Div(s, s)", False),
        ("y = Tanh(x)", False),
    ],
)
def test_floor_of_values_of_a_sigmoid(body: str, found: bool) -> None:
    assert bool(floors(parsed(f"(float[4] x, int64[1] k) => (float y) {{ {body} }}"))) is found


def test_floor_is_a_share_of_the_sample() -> None:
    small, large = np.array([1e-3, 0.0]), np.array([0.5, 1.0])
    assert for_sample(1e-5, 2e-7, small) == pytest.approx(1e-5 + 2e-4)
    assert for_sample(1e-5, 2e-7, large) == pytest.approx(1e-5 + 2e-7)
    assert for_sample(1e-5, 0.0, small) == 1e-5
    assert for_sample(1e-5, 2e-7, np.zeros(2)) == 1e-5


@pytest.mark.parametrize(("length", "k"), [(1, 64), (8, 256), (3, 1024)])
def test_tolerance_holds_for_rounding_and_no_more(length: int, k: int) -> None:
    """Another order of summation stays within it; an error of one weight in a thousand does not."""
    model = chain(length, k)
    allowed = derive_tolerance(model)
    rng = np.random.default_rng(1)
    weights = [np.asarray(model.graph.initializers[f"w{i}"].const_value) for i in range(length)]
    for _ in range(20):
        x = rng.standard_normal((1, k)).astype(np.float32)
        exact, rounded, wrong = x.astype(np.float64), x, x
        for w in weights:
            w = w.numpy() if hasattr(w, "numpy") else w
            exact = exact @ w.astype(np.float64)
            total = np.zeros((1, w.shape[1]), np.float32)
            for i in range(k):  # one by one: the worst order
                total = total + rounded[:, i : i + 1] * w[i : i + 1]
            rounded = total
            damaged = w.copy()
            damaged[:, :: max(1, k // 8)] *= 1.001
            wrong = wrong @ damaged
        assert errors(rounded, exact)[1] < allowed
        assert errors(wrong, exact)[1] > allowed


@pytest.mark.skipif("SPARSEC_DATA" not in os.environ, reason="SPARSEC_DATA is not set")
def test_real_model_on_real_images(tmp_path: Path) -> None:
    """SqueezeNet 1.1 on 10 photographs: parity, and the same first class as ONNX Runtime on every one."""
    data = Path(os.environ["SPARSEC_DATA"])
    for path in sorted((data / "images/imagenet").iterdir())[::50]:
        (tmp_path / path.name).symlink_to(path)
    model = data / "models/squeezenet1.1.onnx"
    spec = "resize=256,crop=224,scale=255,mean=0.485+0.456+0.406,std=0.229+0.224+0.225,color=rgb,layout=nchw"
    result = sparsec.compile(model).verify(data=tmp_path, preprocess=spec, against=model)
    assert result.passed
    assert result.samples == result.same_top1 == 10
    assert result.accuracy is not None
    assert result.accuracy["artifact"] == result.accuracy["reference"] >= 0.3
    assert result.fidelity is not None
    assert result.fidelity["top1_agreement"] == 1
