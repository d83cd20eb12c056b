"""The runtime `torch`: right before it is timed, on the CPU; on a GPU as far as a fake of torch's goes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from samples import agree, pair_artifact, pair_inputs

from sparsec import cli
from sparsec.artifact import Artifact
from sparsec.bench import bench
from sparsec.errors import CheckError, RuntimeUnavailable, UnsupportedError, UsageError
from sparsec.runtimes.base import find_runtime

torch = pytest.importorskip("torch", reason="needs the extra [torch]; make test-torch runs this")

from fake_cuda import FakeCuda  # noqa: E402

import sparsec.runtimes.torch as module  # noqa: E402
from sparsec.passes.training.torch_graph import TorchGraph  # noqa: E402
from sparsec.passes.training.torch_ops import OPERATORS  # noqa: E402


def cuda_artifact(precision: str) -> Artifact:
    """The pair, as if it were for a GPU."""
    own = pair_artifact()
    target = {**own.manifest["target"], "runtime": "cuda", "precision": precision}
    allowed = own.manifest["tolerances"] if precision == "f32" else dict.fromkeys(own.manifest["tolerances"], 4e-3)
    return Artifact(own.path, {**own.manifest, "target": target, "tolerances": allowed})


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_onnx_runtime(layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_layouts", lambda graph: [layout])
    agree(pair_artifact(), "torch", pair_inputs(3))


def test_both_layouts_are_tried_where_there_are_images() -> None:
    with module.Torch().open(pair_artifact()) as session:
        assert module._layouts(session._graph) == [torch.contiguous_format, torch.channels_last]
        session._graph.constants = {name: x for name, x in session._graph.constants.items() if x.dim() != 4}
        assert module._layouts(session._graph) == [torch.contiguous_format]


def test_beside_the_artifact() -> None:
    timing = bench(pair_artifact(), runs=5, against=["ort", "torch", "torch:cpu"])
    found = timing.json()["against"]
    assert list(found) == ["ort", "torch", "torch:cpu"]
    for numbers in found.values():
        assert 0 < numbers["min_ms"] <= numbers["median_ms"] <= numbers["p90_ms"]
        assert "device" not in numbers


def test_a_wrong_executor_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TorchGraph.run_one

    def wrong(self: TorchGraph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: x * (1 + 1e-3 * (name == "next")) for name, x in right(self, feeds).items()}

    monkeypatch.setattr(TorchGraph, "run_one", wrong)
    threads = torch.get_num_threads()
    with pytest.raises(CheckError, match=r"'next' in PyTorch differs from ONNX Runtime by 0.001 .* not timed"):
        bench(pair_artifact(), runs=3, threads=threads + 1, against=["torch"])
    assert torch.get_num_threads() == threads


def test_operators_that_it_lacks_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(OPERATORS, "GlobalAveragePool")
    with pytest.raises(UnsupportedError, match=r"model.onnx: cannot be executed in torch: GlobalAveragePool \(pool\)"):
        bench(pair_artifact(), runs=3, against=["torch"])
    assert cli.run(["bench", str(pair_artifact().path), "--against", "torch", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["kind"], "\n" in error["message"]) == ("UnsupportedError", False)


def test_threads_are_the_process_s_again() -> None:
    before = torch.get_num_threads()
    with module.Torch().open(pair_artifact(), before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("argument", ["gpu", "cpu:0", "cuda:", "cuda:x", "cuda:-1"])
def test_unknown_devices(argument: str) -> None:
    with pytest.raises(UsageError, match="expected torch:cpu, torch:cuda or torch:cuda:N"):
        find_runtime(f"torch:{argument}", pair_artifact()).open(pair_artifact())


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for spec, artifact in (("torch", cuda_artifact("f32")), ("torch:cuda:1", pair_artifact())):
        with pytest.raises(
            RuntimeUnavailable, match=r"no CUDA device .: it finds none here; torch:cpu runs on the CPU"
        ):
            find_runtime(spec, artifact).open(artifact)


@pytest.mark.parametrize("precision", ["f32", "f16"])
@pytest.mark.parametrize("refuses", [False, True])
def test_on_a_gpu(precision: str, refuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = cuda_artifact(precision)
    samples = pair_inputs(2)
    torch.set_float32_matmul_precision("medium")
    with FakeCuda(monkeypatch, refuses) as fake, find_runtime("torch", artifact).open(artifact) as session:
        assert session._graph.floats == {"f32": torch.float32, "f16": torch.float16}[precision]
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
        found = [session.run(sample) for sample in samples]
        call = session.once(samples[0])
        fake.log.clear()
        call()
        replay = [] if refuses else ["replay"]
        assert fake.log == ["copy", "copy", *replay, "copy", "copy"]
        assert not fake.queue
        fake.log.clear()
        device = session.device_time(samples[0], runs=2, warmup=0)
        assert fake.log == ["copy", "copy", "event", *replay, "event"] * 2
        assert device.name == f"Fake GPU, {'launch by launch' if refuses else 'CUDA graph'}"
        assert device.stats.runs == 2
        assert fake.streams == ["default"]
    assert torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")
    with find_runtime("ort", pair_artifact()).open(pair_artifact()) as reference:
        for sample, outputs in zip(samples, found, strict=True):
            for name, wanted in reference.run(sample).items():
                assert outputs[name].dtype == wanted.dtype
                error = np.abs(outputs[name] - wanted).max() / np.abs(wanted).max()
                assert error <= artifact.manifest["tolerances"][name]
                assert (error > 1e-5) == (precision == "f16")


def test_the_device_s_time_beside_the_artifact(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeCuda(monkeypatch):
        timing = bench(cuda_artifact("f32"), runs=3, runtime="native", against=["torch"])
    found = timing.json()["against"]["torch"]
    assert found["device"]["name"] == "Fake GPU, CUDA graph"
    assert found["device"]["runs"] == 3
