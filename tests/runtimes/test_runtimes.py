"""Every runtime gives ONNX Runtime's outputs, sample by sample, and says what is missing when it cannot."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
from samples import agree, pair_artifact, pair_inputs, pair_model

from sparsec.artifact import Artifact, load
from sparsec.errors import ArtifactError, CheckError, DataError, ModelError, RuntimeUnavailable, UsageError
from sparsec.runtimes import base
from sparsec.runtimes.base import Stats, find_runtime, runtime_class
from sparsec.runtimes.emulated import find_emulator
from sparsec.runtimes.ort import OrtSession

needs_emulator = pytest.mark.skipif(find_emulator() is None, reason="qemu-aarch64 is not installed")


def test_native() -> None:
    agree(pair_artifact(), None, pair_inputs(3))
    agree(pair_artifact(), "native", pair_inputs(1))


def test_native_with_embedded_weights() -> None:
    artifact = pair_artifact(embed_weights=True)
    assert not (artifact.path / "weights.bin").exists()
    agree(artifact, "native", pair_inputs(2))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_native_threads_give_the_same_bits(threads: int) -> None:
    sample = pair_inputs(1)[0]
    artifact = pair_artifact()
    one, several = artifact.run(sample, threads=1), artifact.run(sample, threads=threads)
    for name, array in one.items():
        np.testing.assert_array_equal(array, several[name])


def test_two_sessions_in_two_threads() -> None:
    artifact, samples = pair_artifact(), pair_inputs(20)
    alone = [artifact.run(sample) for sample in samples]
    results: dict[int, list[dict[str, np.ndarray]]] = {}

    def work(index: int) -> None:
        with find_runtime("native", artifact).open(artifact) as session:
            results[index] = list(session.run_many(samples))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for got in results.values():
        for one, other in zip(alone, got, strict=True):
            np.testing.assert_array_equal(one["y"], other["y"])
    assert len(results) == 2


def test_a_new_artifact_at_the_same_path_is_not_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "m.sparsec"
    shutil.copytree(pair_artifact().path, path)
    with find_runtime("native", load(path)).open(load(path)) as first:
        before = first.run(pair_inputs(1)[0])
        from onnx import numpy_helper

        import sparsec

        other = pair_model()
        for tensor in other.graph.initializer:
            if tensor.name == "two":
                tensor.CopyFrom(numpy_helper.from_array(np.full((), 3.0, np.float32), "two"))
        artifact = sparsec.compile(other, output=path, overwrite=True)
        after = artifact.run(pair_inputs(1)[0])
        np.testing.assert_allclose(after["next"], before["next"] * 1.5, rtol=1e-6)


def test_native_closed_and_damaged(tmp_path: Path) -> None:
    session = find_runtime("native", pair_artifact()).open(pair_artifact())
    session.close()
    session.close()
    with pytest.raises(ArtifactError, match="closed"):
        session.run(pair_inputs(1)[0])
    broken = Artifact(shutil.copytree(pair_artifact().path, tmp_path / "m"), pair_artifact().manifest)
    (broken.path / "weights.bin").write_bytes(b"\0" * 100)
    with pytest.raises(ArtifactError, match="code -2"):
        find_runtime("native", broken).open(broken)
    (broken.path / "libmodel.so").write_bytes(b"not a library")
    with pytest.raises(RuntimeUnavailable, match="cannot be loaded"):
        find_runtime("native", broken).open(broken)


def test_native_checks_the_signature_before_it_hands_out_buffers() -> None:
    manifest = {**pair_artifact().manifest}
    manifest["outputs"] = [{**manifest["outputs"][0], "shape": [1, 3]}, manifest["outputs"][1]]
    smaller = Artifact(pair_artifact().path, manifest)
    with pytest.raises(ArtifactError, match="16 bytes, the manifest says 12"):
        find_runtime("native", smaller).open(smaller)


def test_run_checks_inputs() -> None:
    sample = pair_inputs(1)[0]
    for inputs, says in (
        ({"x": sample["x"]}, "'state' is missing"),
        ({**sample, "x": sample["x"][:, :, :4]}, "expects shape"),
        ({**sample, "stat": sample["state"]}, "did you mean 'state'"),
    ):
        with pytest.raises(DataError, match=says):
            pair_artifact().run(inputs)


def test_times() -> None:
    with find_runtime("native", pair_artifact()).open(pair_artifact()) as session:
        stats = session.time(pair_inputs(1)[0], runs=11)
    assert stats.runs == 11
    assert 0 < stats.min_ms <= stats.p10_ms <= stats.median_ms <= stats.p90_ms
    assert stats.peak_bytes is not None
    assert 1e5 < stats.peak_bytes < 2e7  # this Python is larger: it must not be counted


def test_once_keeps_its_buffers() -> None:
    """Memory that `once` had let go would be handed to these arrays, and overwritten by the call."""
    with find_runtime("native", pair_artifact()).open(pair_artifact()) as session:
        call = session.once(pair_inputs(1)[0])
        others = [np.full(spec.shape, 7, np.float32) for spec in pair_artifact().outputs for _ in range(50)]
        others += [np.full(spec.shape, 7, np.float32) for spec in pair_artifact().inputs for _ in range(50)]
        for _ in range(3):
            assert call() == 0
        assert all((array == 7).all() for array in others)


def test_stats() -> None:
    stats = Stats.of([0.001 * i for i in range(1, 102)])
    assert (stats.median_ms, stats.p10_ms, stats.p90_ms, stats.min_ms) == pytest.approx((51, 11, 91, 1))
    assert set(stats.json()) == {"runs", "median_ms", "p10_ms", "p90_ms", "min_ms", "peak_bytes"}


@needs_emulator
def test_emulated() -> None:
    artifact = pair_artifact("arm")
    agree(artifact, None, pair_inputs(5))
    with find_runtime("emulated", artifact).open(artifact) as session:
        stats = session.time(pair_inputs(1)[0], runs=3)
    assert stats.runs == 3
    assert 0 < stats.min_ms <= stats.median_ms <= stats.p90_ms


@needs_emulator
def test_emulated_splits_many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsec.runtimes import batch

    monkeypatch.setattr(batch, "BATCH_SAMPLES", 2)
    agree(pair_artifact("arm"), "emulated", pair_inputs(5))


@needs_emulator
def test_emulated_reports_a_failed_self_check(tmp_path: Path) -> None:
    artifact = Artifact(shutil.copytree(pair_artifact("arm").path, tmp_path / "m"), pair_artifact("arm").manifest)
    raw = bytearray((artifact.path / "parity.bin").read_bytes())
    raw[-4:] = np.float32(100).tobytes()
    (artifact.path / "parity.bin").write_bytes(raw)
    with (
        find_runtime("emulated", artifact).open(artifact) as session,
        pytest.raises(CheckError, match="self-check failed"),
    ):
        session.time(pair_inputs(1)[0], runs=1)


def test_copy_without_the_executable_bit_runs(tmp_path: Path) -> None:
    target = "arm" if find_emulator() else "host"
    artifact = Artifact(shutil.copytree(pair_artifact(target).path, tmp_path / "m"), pair_artifact(target).manifest)
    (artifact.path / "bench").chmod(0o644)
    agree(artifact, "emulated", pair_inputs(1))


def test_no_emulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeUnavailable, match="apt-get install qemu-user"):
        pair_artifact("arm").run(pair_inputs(1)[0], runtime="emulated")


def test_other_architecture() -> None:
    with pytest.raises(RuntimeUnavailable, match="use --runtime emulated"):
        pair_artifact("arm").run(pair_inputs(1)[0], runtime="native")


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match="did you mean 'native'"):
        runtime_class("nativ")
    with pytest.raises(UsageError, match="takes no argument"):
        find_runtime("native:x", pair_artifact())


def test_runtimes_of_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name = "mine"

        def load(self) -> type[base.Runtime]:
            return runtime_class("ort")

    class Broken(Point):
        name = "broken"

        def load(self) -> type[base.Runtime]:
            raise ImportError("no such module")

    monkeypatch.setattr(base.metadata, "entry_points", lambda group: [Point(), Broken()])
    assert {"mine", "broken", "native"} <= set(base.runtime_names())
    agree(pair_artifact(), "mine", pair_inputs(1))
    with pytest.raises(RuntimeUnavailable, match="no such module"):
        runtime_class("broken")


def test_ort_errors() -> None:
    with pytest.raises(ModelError, match="does not load"):
        OrtSession(b"not a model")
    with OrtSession(pair_model().SerializeToString()) as session, pytest.raises(ModelError, match="ONNX Runtime fails"):
        session.run({"x": np.zeros((1, 2), np.float32)})


# --- adb: a stand-in on PATH ------------------------------------------------------------------------------------------

ADB = """#!/bin/sh
# An adb whose device is a folder: push and pull copy, shell runs there. DEVICE, SERIAL and MODE come from the test.
if [ "$1" = -s ]; then
  [ "$2" = "$SERIAL" ] || { echo "error: device '$2' not found" >&2; exit 1; }
  shift 2
fi
[ "$MODE" = none ] && { echo "error: no devices/emulators found" >&2; exit 1; }
verb=$1; shift
case $verb in
  push) cp "$1" "$DEVICE$2" ;;
  pull) cp "$DEVICE$1" "$2" ;;
  shell)
    [ "$MODE" = cut ] && { echo "connection lost" >&2; exit 0; }
    # an old adb: joins words, always answers 0, ends lines with carriage returns
    printf '%s' "$*" | sed "s#/data/local/tmp#$DEVICE/data/local/tmp#g" | sh | sed 's/$/\\r/'; exit 0 ;;
  *) exit 9 ;;
esac
"""


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tools = tmp_path / "tools with space"
    tools.mkdir()
    (tools / "adb").write_text(ADB)
    (tools / "adb").chmod(0o755)
    folder = tmp_path / "device"
    (folder / "data/local/tmp").mkdir(parents=True)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DEVICE", str(folder))
    monkeypatch.setenv("SERIAL", "emulator-5554")
    monkeypatch.setenv("MODE", "")
    return folder


@pytest.mark.parametrize("runtime", ["adb", "adb:emulator-5554"])
def test_adb(device: Path, runtime: str) -> None:
    agree(pair_artifact(), runtime, pair_inputs(3))
    assert list((device / "data/local/tmp").iterdir()) == []  # cleaned up
    timing = pair_artifact().bench(runs=5, runtime=runtime)
    assert timing.runtime == runtime
    assert timing.runs == 5
    assert 0 < timing.min_ms <= timing.p10_ms <= timing.median_ms


def test_adb_verifies(device: Path) -> None:
    assert pair_artifact().verify(runtime="adb").passed


def test_adb_errors(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = pair_inputs(1)[0]
    with pytest.raises(RuntimeUnavailable, match="device 'other' not found"):
        pair_artifact().run(sample, runtime="adb:other")
    with pytest.raises(UsageError, match="not a device serial"):
        pair_artifact().run(sample, runtime="adb:-a; reboot")
    monkeypatch.setenv("MODE", "none")
    with pytest.raises(RuntimeUnavailable, match="no devices/emulators found"):
        pair_artifact().run(sample, runtime="adb")
    monkeypatch.setenv("MODE", "cut")
    with pytest.raises(RuntimeUnavailable, match="connection lost"):
        pair_artifact().run(sample, runtime="adb")


def test_adb_says_what_the_device_said(device: Path, tmp_path: Path) -> None:
    artifact = Artifact(shutil.copytree(pair_artifact().path, tmp_path / "m"), pair_artifact().manifest)
    (artifact.path / "weights.bin").write_bytes(b"\0" * 64)
    with pytest.raises(RuntimeUnavailable, match=r"cannot run there: bench: .*weights\.bin"):
        artifact.run(pair_inputs(1)[0], runtime="adb")
    assert list((device / "data/local/tmp").iterdir()) == []


def test_adb_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeUnavailable, match="adb is not installed"):
        pair_artifact().run(pair_inputs(1)[0], runtime="adb")


def test_adb_stand_in_is_executable(device: Path) -> None:
    assert Path(shutil.which("adb") or "").stat().st_mode & stat.S_IXUSR
