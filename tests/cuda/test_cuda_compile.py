"""The compile line for CUDA devices: options, what is in an artifact, the same bytes again, prediction without a GPU."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from programs import parse

import sparsec
from sparsec.errors import ArtifactError, TargetError
from sparsec.inspection import inspect_model
from sparsec.loading.load import load_model
from sparsec.manifest import check_manifest
from sparsec.targets import cpu_names, find_target, missing_features, with_cpu_fallback, with_precision

NET = """net (float[1, 4, 9, 9] x, float[4, 9, 9] w) => (float[1, 4, 1, 1] y)
{
    axes = Constant <value_ints = [2, 3]> ()
    a = Mul (x, w)
    b = Softplus (a)
    y = ReduceMax <keepdims = 1> (b, axes)
}
"""


@pytest.mark.parametrize("arch", cpu_names("cuda"))
def test_every_architecture_is_a_target(arch: str) -> None:
    target = find_target("cuda", arch=arch)
    assert target.gpu is not None
    assert (target.cpu, target.gpu.arch, target.gpu.element) == (arch, arch, "float32")
    assert find_target("cuda", arch) == target
    half = with_precision(target, "f16")
    assert half.gpu is not None
    assert (half.precision, half.gpu.element) == ("f16", "float16")
    assert with_precision(half, "f32") == target


def test_the_host_is_the_boards_unless_it_is_named() -> None:
    assert find_target("cuda").arch == find_target("cuda", arch="sm_87").arch == "aarch64"
    assert find_target("cuda", arch="sm_90").arch == "x86_64"
    assert find_target("cuda", arch="sm_90", host="aarch64").features == ("neon",)


@pytest.mark.parametrize(("name", "options", "where", "says"), [
    ("cuda", {"arch": "sm_99"}, "--arch", "target 'cuda' has no architecture 'sm_99'; did you mean 'sm_90'?"),
    ("cuda", {"host": "arm64"}, "--host", "target 'cuda' has no host 'arm64'"),
    ("cuda", {"arch": "sm_87", "cpu": "sm_90"}, "--cpu", "says 'sm_90' and --arch 'sm_87'; leave it out"),
    ("arm", {"arch": "sm_87"}, "--arch", "target 'arm' has no arch; give --target cuda, or leave it out"),
    ("host", {"host": "x86_64"}, "--host", "target 'host' has no host; give --target cuda, or leave it out"),
])  # fmt: skip
def test_wrong_options_are_one_line(name: str, options: dict[str, str], where: str, says: str) -> None:
    with pytest.raises(TargetError) as caught:
        find_target(name, **options)
    assert caught.value.where == where
    assert caught.value.message.startswith(says)
    assert "\n" not in caught.value.message


def test_only_a_gpu_has_operators_to_lack() -> None:
    with pytest.raises(TargetError, match="target 'arm' has no GPU"):
        with_cpu_fallback(find_target("arm"))


def test_inspection_shows_launches() -> None:
    report = inspect_model(load_model(parse(NET)), find_target("cuda", arch="sm_90"))
    assert (report["target"], report["cpu"], report["precision"]) == ("cuda", "sm_90", "f32")
    launched = [row for row in report["layers"] if row["route"] != "free"]
    assert launched
    for row in launched:
        assert row["predicted_us"] >= find_target("cuda", arch="sm_90").gpu.launch_us  # type: ignore[union-attr]
        assert all(len(row["launch"][side]) == 3 for side in ("grid", "block"))


@pytest.mark.parametrize(("arch", "host", "machine"), [("sm_87", "aarch64", 183), ("sm_90", "x86_64", 62)])
def test_artifacts_are_complete_and_the_same_again(tmp_path: Path, arch: str, host: str, machine: int) -> None:
    pytest.importorskip("nvidia.cuda_nvrtc", reason="needs NVIDIA's compiler library: pip install 'sparsec[cuda]'")
    made = [
        sparsec.compile(parse(NET), target="cuda", arch=arch, output=tmp_path / f"{i}" / "net.sparsec", dump=tmp_path)
        for i in range(2)
    ]
    first, second = ({f.name: _digest(f) for f in artifact.path.iterdir()} for artifact in made)
    assert first == second
    assert {"libmodel.so", "libmodel.a", "model.h", "bench", "weights.bin", "parity.bin"} < set(first)

    manifest = made[0].manifest
    assert manifest["target"] == {
        "name": "cuda", "cpu": arch, "arch": host, "os": "linux", "runtime": "cuda", "precision": "f32",
    }  # fmt: skip
    device = manifest["device"]
    assert device["arch"] == arch
    assert device["driver"] == "525"
    code = (made[0].path / "libmodel.so").read_bytes()
    for kernel, launch in device["launches"].items():
        assert kernel.encode() in code
        assert set(launch) == {"grid", "block", "shared"}
    assert f".target {arch}".encode() in code, "PTX for newer devices"
    for name in ("libmodel.so", "bench"):
        head = (made[0].path / name).read_bytes()[:20]
        assert head[:4] == b"\x7fELF"
        assert int.from_bytes(head[18:20], "little") == machine
    assert "sparsec_run_device(" in (made[0].path / "model.h").read_text().replace("net_", "")
    text = (tmp_path / "60-kernels.cu").read_text()
    assert all(f"{kernel}(" in text for kernel in device["launches"])
    if missing_features(find_target("cuda", arch=arch)):
        assert made[0].manifest["parity"] is None
        (note,) = manifest["notes"]
        assert note.startswith("not run on this machine: ")
        assert str(tmp_path) not in note


def test_a_manifest_with_a_wrong_launch_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.cuda_nvrtc", reason="needs NVIDIA's compiler library: pip install 'sparsec[cuda]'")
    made = sparsec.compile(parse(NET), target="cuda", arch="sm_90", output=tmp_path / "net.sparsec")
    one = [1, 1, 1]
    wrong = {"grid": [1, 1], "block": one, "shared": 0}, {"grid": [0, 1, 1], "block": one, "shared": 0}
    for damage in (*wrong, {"grid": one, "block": one, "shared": -1}, {"grid": one}):
        manifest = json.loads(json.dumps(made.manifest))
        manifest["device"]["launches"]["kernel"] = damage
        with pytest.raises(ArtifactError, match=r"device\.launches\.kernel"):
            check_manifest(manifest, made.path)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
