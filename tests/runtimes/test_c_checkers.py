"""The runtime under valgrind and gcc's sanitizers, by tools/check_runtime.py; and that these would notice."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from pathlib import Path
from types import ModuleType

import hand_programs
import pytest

from sparsec.targets import find_target

TOOL = Path(__file__).parents[2] / "tools" / "check_runtime.py"
pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="kernels for x86-64-v3"),
]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_runtime", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def prepared(tool: ModuleType, tmp_path: Path) -> Path:
    made = hand_programs.program(find_target("host", tool.CPU))
    x = hand_programs.sample()
    tool.prepare(made, [x], hand_programs.reference(made, x), [1e-6, 0.0], tmp_path)
    return tmp_path


def need(mode: str) -> None:
    if mode == "valgrind" and shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")


@pytest.mark.parametrize("mode", ["valgrind", "address", "thread", "thread-without-futex"])
def test_clean(tool, prepared, mode):
    need(mode)
    status, said = tool.check(prepared, mode)
    assert status == 0, said
    assert "check passed" in said
    assert "WARNING" not in said
    assert "ERROR" not in said


@pytest.mark.parametrize(
    ("mode", "file", "old", "new"),
    [
        ("valgrind", "weights.c", "free(weights->copy);", ""),
        ("valgrind", "runtime.c", "options->arena ? 0 : arena_bytes", "options->arena ? 0 : arena_bytes / 2"),
        ("address", "weights.c", "if (bytes < sizeof h) return SPARSEC_BAD_WEIGHTS;", ""),
        ("address", "runtime.c", "free(block);\n}", "free(block);\n    (void)*(volatile int32_t *)&model->workers;\n}"),
        ("thread", "threads.c", "spin = 0; i < pool->started;", "spin = 0; i < 0;"),
    ],
)
def test_a_planted_fault_is_noticed(tool, prepared, mode, file, old, new):
    need(mode)
    source = (prepared / file).read_text()
    assert source.count(old) == 1
    (prepared / file).write_text(source.replace(old, new))
    assert tool.check(prepared, mode)[0] != 0
