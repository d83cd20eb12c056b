"""Every hostile file: one clear line, exit code 2, nothing written, less than 2 GB and 10 seconds of the processor."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hardening.hostile import CASES
from hardening.making import floats, model, save
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from sparsec import cli
from sparsec.errors import SparsecError
from sparsec.limits import Limits
from sparsec.loading import isolation
from sparsec.loading.load import load_model

SECONDS, BYTES = 10, 2 << 30


@pytest.fixture
def endings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How the processes that read models ended."""
    seen: list[dict[str, Any]] = []
    check = isolation._check_ending

    def remember(ending: dict[str, Any], *others: Any) -> None:
        seen.append(ending)
        check(ending, *others)

    monkeypatch.setattr(isolation, "_check_ending", remember)
    return seen


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", CASES)
def test_refused_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], endings: list[dict[str, Any]]
) -> None:
    make, said = CASES[name]
    folder = tmp_path / "x"
    folder.mkdir()
    path = make(folder)
    before = entries(tmp_path)
    code = cli.run(["rewrite", str(path), "-o", str(folder / "out.onnx"), "--limit", f"seconds={SECONDS}"])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    assert captured.err.startswith("error: ")
    assert re.search(said, captured.err)
    assert "internal error" not in captured.err
    assert entries(tmp_path) == before
    assert all(e["peak"] < BYTES and e["seconds"] < SECONDS for e in endings)


COMPILED = ["hard-link", "eats-memory"]


@pytest.mark.parametrize("name", COMPILED)
def test_refused_by_the_command(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    path = CASES[name][0](folder)
    before = entries(tmp_path)
    command = [sys.executable, "-m", "sparsec.cli", "compile", str(path), "-o", "out.sparsec"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(CASES[name][1], done.stderr)
    assert entries(tmp_path) == before


# ---- damage


def whole() -> onnx.ModelProto:
    """About 20 kB: convolution, quantized product, branch, strings."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="second"),
        helper.make_node("Reshape", ["b", "shape"], ["c"], name="third"),
        helper.make_node("Gemm", ["c", "m"], ["y"], transB=1, name="fourth"),
    ]
    tensors = [
        onnx.numpy_helper.from_array(rng.standard_normal((16, 8, 3, 3)).astype(np.float32), "w"),
        onnx.numpy_helper.from_array(np.array([1, 256], np.int64), "shape"),
        onnx.numpy_helper.from_array(rng.standard_normal((15, 256)).astype(np.float32), "m"),
    ]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 8, 4, 4])
    return model(nodes, tensors, inputs=[x])


WHOLE = whole().SerializeToString()


def refusal(data: bytes) -> str | None:
    try:
        load_model(data, limits=Limits(seconds=SECONDS))
    except SparsecError as error:
        return str(error)
    return None


@pytest.mark.parametrize("size", range(1024, len(WHOLE), 1024))
def test_truncated_at_every_kilobyte(size: int) -> None:
    message = refusal(WHOLE[:size])
    assert message is not None
    assert "\n" not in message


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 7)), min_size=1, max_size=8))
def test_flipped_bits_load_or_are_refused(flips: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for at, bit in flips:
        data[at] ^= 1 << bit
    assert "\n" not in (refusal(bytes(data)) or "")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 599), st.integers(0, 255)), min_size=1, max_size=4))
def test_damage_where_the_structure_is(changes: list[tuple[int, int]]) -> None:
    """The nodes come first in the file, the shapes last: weights, most of it, are left alone."""
    data = bytearray(WHOLE)
    for at, byte in changes:
        data[at if at < 300 else at - 600] = byte
    assert "\n" not in (refusal(bytes(data)) or "")


# ---- limits that a user moves


def test_a_limit_is_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path, WHOLE)
    for limit, said in (
        ("nodes=3", "more than 3 nodes"),
        ("elements=100", "elements"),
        ("file-bytes=1k", "at most 1024"),
    ):
        assert cli.run(["rewrite", str(path), "-o", str(tmp_path / "out.onnx"), "--limit", limit]) == 2
        assert said in capsys.readouterr().err
    assert cli.run(["rewrite", str(path), "-o", str(tmp_path / "out.onnx"), "--limit", "nodes=4"]) == 0


@pytest.mark.parametrize(
    "spec", ["nodes", "nods=3", "nodes=-1", "nodes=x", "nodes=0", "nodes=1e6", "nodes=" + "9" * 30]
)
def test_a_wrong_limit_is_one_line(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path, WHOLE)
    assert cli.run(["rewrite", str(path), "-o", str(tmp_path / "out.onnx"), "--limit", spec]) == 2
    assert re.fullmatch(r"error: --limit: [^\n]*\n", capsys.readouterr().err)


def test_a_shared_weight_is_no_overlap(tmp_path: Path) -> None:
    """Two initializers may be the same range of a file."""
    (tmp_path / "w.bin").write_bytes(np.arange(20, dtype=np.float32).tobytes())
    tensors = []
    for name in ("a", "b"):
        tensor = floats(name, 4, 5)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="w.bin")
        tensors.append(tensor)
    nodes = [helper.make_node("MatMul", ["x", "a"], ["p"]), helper.make_node("MatMul", ["x", "b"], ["q"])]
    nodes.append(helper.make_node("Sub", ["p", "q"], ["y"]))
    loaded = load_model(save(tmp_path, model(nodes, tensors)))
    for value in loaded.graph.initializers.values():
        np.testing.assert_array_equal(value.const_value.numpy().reshape(-1), np.arange(20))
