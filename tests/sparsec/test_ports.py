"""Artifacts with 8-bit inputs and outputs: compiled, described, run, verified, on host and Arm."""

from __future__ import annotations

import ctypes
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import c_api
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from PIL import Image

import sparsec
from sparsec.artifact import load
from sparsec.data import load_data
from sparsec.errors import ArtifactError, DataError, UsageError
from sparsec.images import Images
from sparsec.manifest import check_manifest
from sparsec.ports import InputSpec, Quantization
from sparsec.runtimes.emulated import find_emulator

SHAPE = (1, 3, 8, 8)


def network(softmax: bool = False) -> onnx.ModelProto:
    """x [1, 3, 8, 8] -> Conv, Relu, pool, Gemm -> y [1, 6], through a Softmax or not."""
    rng = np.random.default_rng(0)
    weights = {"w0": rng.standard_normal((8, 3, 3, 3)), "w1": rng.standard_normal((6, 8)), "b1": rng.standard_normal(6)}
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c"], "conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["g"], "pool"),
        helper.make_node("Flatten", ["g"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w1", "b1"], ["h" if softmax else "y"], "head", transB=1),
        *([helper.make_node("Softmax", ["h"], ["y"], "softmax")] if softmax else []),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "net", [value("x", TensorProto.FLOAT, SHAPE)], [value("y", TensorProto.FLOAT, [1, 6])],
        [numpy_helper.from_array(array.astype("f"), name) for name, array in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def samples(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *SHAPE[1:])).astype("f")


class _Reader(CalibrationDataReader):
    def __init__(self) -> None:
        self._samples = iter([{"x": x[None]} for x in samples(16, seed=0)])

    def get_next(self) -> Any:
        return next(self._samples, None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float.onnx, int8.onnx and soft.onnx, which ends in a float Softmax."""
    logging.getLogger().setLevel(logging.ERROR)
    folder = tmp_path_factory.mktemp("models")
    for name, softmax in (("int8", False), ("soft", True)):
        onnx.save(network(softmax), folder / "float.onnx")
        quantize_static(
            folder / "float.onnx", folder / f"{name}.onnx", _Reader(), quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True,
            op_types_to_quantize=["Conv", "Gemm", "Relu", "GlobalAveragePool"],
        )  # fmt: skip
    onnx.save(network(), folder / "float.onnx")
    return folder


@pytest.fixture(scope="module")
def plain(models: Path) -> sparsec.Artifact:
    return sparsec.compile(models / "int8.onnx", "host")


@pytest.fixture(scope="module")
def eight(models: Path, tmp_path_factory: pytest.TempPathFactory) -> sparsec.Artifact:
    return sparsec.compile(
        models / "int8.onnx", "host", io="quantized", output=tmp_path_factory.mktemp("eight") / "net.sparsec"
    )


def meaning(tensor: dict[str, Any]) -> Quantization:
    return Quantization(**tensor["quantization"])


def test_the_manifest_says_what_the_bytes_mean(eight: sparsec.Artifact, plain: sparsec.Artifact) -> None:
    for before, after in zip(plain.inputs + plain.outputs, eight.inputs + eight.outputs, strict=True):
        assert (before.name, before.shape, before.dtype, before.quantization) == (
            after.name,
            after.shape,
            "float32",
            None,
        )
        assert after.dtype == "uint8"
    model = onnx.load(eight.path / "model.onnx")
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    (first,) = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == "x"]
    (last,) = [n for n in model.graph.node if n.output[0] == "y"]
    for tensor, node in ((eight.manifest["inputs"][0], first), (eight.manifest["outputs"][0], last)):
        assert meaning(tensor) == Quantization(float(constants[node.input[1]]), int(constants[node.input[2]]))
    assert eight.manifest["parity"]["passed"]
    assert load(eight.path).inputs == eight.inputs


def test_the_same_results_as_with_float_ports(eight: sparsec.Artifact, plain: sparsec.Artifact) -> None:
    for x in samples(5):
        stored = eight.run(eight.quantize({"x": x[None]}))
        assert stored["y"].dtype == np.uint8
        np.testing.assert_array_equal(eight.dequantize(stored)["y"], plain.run({"x": x[None]})["y"])


def test_floats_are_not_taken_for_integers(eight: sparsec.Artifact) -> None:
    with pytest.raises(DataError, match=r"takes uint8, got float32; `Artifact.quantize`"):
        eight.run({"x": samples(1)})


def test_ports_that_stay_float_are_noted(models: Path) -> None:
    artifact = sparsec.compile(models / "soft.onnx", "host", io="quantized")
    assert [spec.dtype for spec in artifact.inputs + artifact.outputs] == ["uint8", "float32"]
    (note,) = [note for note in artifact.manifest["notes"] if "stays float" in note]
    assert note == "output 'y' is made by Softmax 'softmax': it stays float"


def test_a_float_model_is_refused(models: Path) -> None:
    with pytest.raises(UsageError, match=r"quantizes no input or output: input 'x' is read by Conv 'conv'; output 'y'"):
        sparsec.compile(models / "float.onnx", "host", io="quantized")
    with pytest.raises(UsageError, match="expected float or quantized, got 'int8'"):
        sparsec.compile(models / "float.onnx", "host", io="int8")


def test_verify_compares_real_numbers_with_the_original(
    eight: sparsec.Artifact, plain: sparsec.Artifact, models: Path
) -> None:
    data = {"x": samples(12), "label": np.arange(12) % 6}
    ours, other = (a.verify(data=data, against=models / "float.onnx") for a in (eight, plain))
    assert ours.passed
    assert ours.fidelity == other.fidelity
    assert ours.accuracy == other.accuracy
    assert ours.fidelity["snr_db"] > 20
    (parity,) = ours.parity
    assert parity.steps.step == 1.0  # outputs are counted in steps
    stored = eight.verify(data=eight.quantize({"x": samples(12)}), against=models / "float.onnx")
    assert stored.passed  # whole numbers are taken for stored ones
    assert stored.fidelity["snr_db"] == pytest.approx(ours.fidelity["snr_db"], abs=3)


def test_a_wrong_zero_point_is_found(eight: sparsec.Artifact, models: Path, tmp_path: Path) -> None:
    """Floats are quantized as the manifest says: with another zero point the original gets another input."""
    copy = tmp_path / "m.sparsec"
    shutil.copytree(eight.path, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["inputs"][0]["quantization"]["zero_point"] += 40
    (copy / "manifest.json").write_text(json.dumps(manifest))
    right, wrong = (a.verify(data={"x": samples(6)}, against=models / "float.onnx") for a in (eight, load(copy)))
    assert right.fidelity["snr_db"] > wrong.fidelity["snr_db"] + 10


@pytest.mark.parametrize(
    "entry", [{"scale": 0.0, "zero_point": 0}, {"scale": 0.5, "zero_point": 256}, {"scale": 0.5}, {"scale": "1", "zero_point": 0}, 7]
)  # fmt: skip
def test_a_damaged_meaning_is_refused(eight: sparsec.Artifact, tmp_path: Path, entry: Any) -> None:
    manifest = json.loads((eight.path / "manifest.json").read_text())
    manifest["outputs"][0]["quantization"] = entry
    with pytest.raises(ArtifactError, match=r"outputs\[0\].quantization"):
        check_manifest(manifest, tmp_path)


def test_the_c_api_says_the_same(eight: sparsec.Artifact) -> None:
    library = c_api.Library(eight.path / "libmodel.so")
    code, model = library.open_file(eight.path / "weights.bin")
    assert code == c_api.OK
    x = samples(1)
    with model:
        infos = []
        for function, tensor in (
            ("input_info", eight.manifest["inputs"][0]),
            ("output_info", eight.manifest["outputs"][0]),
        ):
            info = c_api.TensorInfo()
            assert getattr(library.c, f"sparsec_{function}")(model.handle, 0, ctypes.byref(info)) == c_api.OK
            assert (info.dtype, info.bytes) == (2, int(np.prod(tensor["shape"])))
            assert (info.scale, info.zero_point) == (
                tensor["quantization"]["scale"],
                tensor["quantization"]["zero_point"],
            )
            infos.append(info)
        stored = np.clip(np.rint(x / np.float32(infos[0].scale)) + infos[0].zero_point, 0, 255).astype(np.uint8)
        y = np.zeros((1, 6), np.uint8)
        assert model.run([stored], [y]) == c_api.OK
    np.testing.assert_array_equal(y, eight.run(eight.quantize({"x": x}))["y"])


def test_the_page_shows_c_that_quantizes(eight: sparsec.Artifact, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "ports.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```c\n(.*?)```", page, re.DOTALL)
    x = samples(1)
    program = f"""
        #include <math.h>
        #include <stdio.h>
        #include "model.h"
        int main(int count, char **values) {{
            static float real[{x.size}]; static uint8_t stored[{x.size}];
            FILE *file = count > 1 ? fopen(values[1], "rb") : NULL;
            if (!file || fread(real, sizeof real, 1, file) != 1) return 1;
            sparsec_model *model = NULL;
            {code}
            return fwrite(stored, sizeof stored, 1, stdout) != 1;
        }}"""
    (tmp_path / "quantize.c").write_text(program)
    (tmp_path / "x.bin").write_bytes(x.tobytes())
    command = [sys.executable, "-m", "ziglang", "cc", "-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{eight.path}"]
    libraries = [str(eight.path / "libmodel.a"), "-lm", "-lpthread"]
    subprocess.run([*command, "quantize.c", *libraries, "-o", "quantize"], cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "quantize", "x.bin"], cwd=tmp_path, check=True, capture_output=True)
    assert done.stdout == eight.quantize({"x": x})["x"].tobytes()


def test_arm(models: Path, eight: sparsec.Artifact) -> None:
    if find_emulator() is None:
        pytest.skip("no emulator for Arm")
    artifact = sparsec.compile(models / "int8.onnx", "arm", io="quantized")
    assert artifact.inputs == eight.inputs
    assert artifact.verify(data={"x": samples(8)}, against=models / "float.onnx").passed
    assert artifact.bench(runs=1).runs == 1  # its own check of parity.bin


def test_command_line(run: Any, models: Path, tmp_path: Path) -> None:
    code, out, _ = run("compile", models / "soft.onnx", "--io", "quantized", "-o", tmp_path, "--json")
    assert code == 0
    notes, artifact = json.loads(out)["notes"], load(tmp_path / "soft.sparsec")
    assert any("stays float" in note for note in notes)
    code, out, _ = run("inspect", artifact.path)
    assert f"x uint8[1x3x8x8], {artifact.inputs[0].quantization}" in out
    assert json.loads(run("inspect", artifact.path, "--json")[1])["inputs"] == artifact.manifest["inputs"]
    np.save(tmp_path / "x.npy", samples(1))
    np.save(tmp_path / "x8.npy", artifact.quantize({"x": samples(1)})["x"])
    results = [
        json.loads(run("run", artifact.path, "--input", f"x={tmp_path / f}", "--json")[1]) for f in ("x.npy", "x8.npy")
    ]
    assert results[0] == results[1]
    assert run("bench", artifact.path, "--runs", 2, "--json")[0] == 0
    code, _, err = run("compile", models / "float.onnx", "--io", "quantized", "-o", tmp_path)
    assert code == 2
    assert "--io quantized" in err


# --- data -------------------------------------------------------------------------------------------------------------


def test_data_for_a_quantized_port(tmp_path: Path) -> None:
    spec = InputSpec("x", (1, 3, 4, 4), "int8", Quantization(0.5, -8))
    reals = np.linspace(-70, 80, 96, dtype=np.float32).reshape(2, 3, 4, 4)
    for given in (reals, spec.stored(reals)):
        data = load_data({"x": given}, [spec])
        stored = list(data)
        assert [s["x"].dtype for s in stored] == [np.int8] * 2
        np.testing.assert_array_equal(np.concatenate([s["x"] for s in stored]), spec.stored(reals))
    np.testing.assert_array_equal(np.concatenate([s["x"] for s in load_data({"x": reals}, [spec]).reals()]), reals)
    back = np.concatenate([s["x"] for s in load_data({"x": spec.stored(reals)}, [spec]).reals()])
    np.testing.assert_array_equal(back, spec.real(spec.stored(reals)))
    assert np.abs(back - np.clip(reals, -60, 67.5)).max() <= 0.25
    Image.new("RGB", (4, 4), (255, 0, 128)).save(tmp_path / "1_a.png")
    images = load_data(Images(tmp_path, scale=10.0), [spec])
    (pixels,), (real,) = list(images), list(images.reals())
    np.testing.assert_array_equal(pixels["x"][0, :, 0, 0], [43, -8, 18])  # 25.5, 0 and 12.8 in halves
    np.testing.assert_allclose(real["x"][0, :, 0, 0], [25.5, 0, 12.8], rtol=1e-6)


def test_quantize_is_what_onnx_does() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(1000) * 50, np.arange(-20, 20) * 0.15]).astype("f")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["r"]),
    ]
    constants = [numpy_helper.from_array(np.float32(0.3), "s"), numpy_helper.from_array(np.int8(-5), "z")]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, [len(x)])],
        [value("q", TensorProto.INT8, [len(x)]), value("r", TensorProto.FLOAT, [len(x)])], constants,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    q, r = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    meant = Quantization(float(np.float32(0.3)), -5)
    np.testing.assert_array_equal(meant.quantize(x, "int8"), q)
    np.testing.assert_array_equal(meant.dequantize(q), r)
