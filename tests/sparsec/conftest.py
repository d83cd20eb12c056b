"""Shared by the tests of the package's top level."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from command_line import Run
from measured_chain import chain_model
from samples import pair_model

from sparsec import cli, tuner
from sparsec.targets import Target, find_target


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(verb, option, ...)` -> exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with pair.onnx in it."""
    onnx.save(pair_model(), tmp_path / "pair.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def host() -> Target:
    return find_target("host")


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuner.Tuned:
    """The network of `measured_chain`, measured once."""
    return tuner.tune(chain_model(), cache=tmp_path_factory.mktemp("tuning") / "chain.json")
