"""The process of its own: what crashes, loops or eats memory there is one line here, and the next request works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sparsec.errors import ModelError, RuntimeUnavailable, UsageError
from sparsec.loading import isolation
from sparsec.loading.isolation import Allowance, call
from sparsec.loading.load import load_model

PLENTY = Allowance(1 << 30, 60)
TASKS = """
    import ctypes, os, signal, time
    from sparsec.errors import UsageError

    def echo(worker, header, parts):
        worker.answer({"got": header["text"]}, [bytes(part)[::-1] for part in parts])

    def crash(worker, header, parts):
        worker.step("a step")
        ctypes.string_at(0)

    def loop(worker, header, parts):
        worker.step("a long step")
        while True:
            pass

    def wait(worker, header, parts):
        time.sleep(3600)

    def eat(worker, header, parts):
        held = []
        while True:
            held.append(bytearray(1 << 24))

    def refuse(worker, header, parts):
        raise UsageError("not like this", "--here")

    def chatter(worker, header, parts):
        os.write(1, b"x" * (1 << 20))
        os.write(2, b"x" * (1 << 20))
        worker.answer({}, [])

    def nothing(worker, header, parts):
        pass

    def leave(worker, header, parts):
        os._exit(7)
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "isolated_tasks.py").write_text(textwrap.dedent(TASKS))
    sys.path.insert(0, str(folder))
    yield "isolated_tasks"
    sys.path.remove(str(folder))
    isolation.stop()


def test_an_answer_with_its_parts(tasks: str) -> None:
    header, parts = call(f"{tasks}:echo", {"text": "ü"}, [b"abc", b"", np.arange(5, dtype=np.uint8)], PLENTY, "m")
    assert header == {"got": "ü"}
    assert [bytes(part) for part in parts] == [b"cba", b"", bytes([4, 3, 2, 1, 0])]


@pytest.mark.parametrize(
    ("task", "allowance", "said"),
    [
        ("crash", PLENTY, r"m: a step ended with SIGSEGV: .*more than 1024 MB \(--limit memory=N\)"),
        ("loop", Allowance(1 << 30, 1), r"m: gave up after 1 seconds of a long step \(--limit seconds=N\)"),
        ("eat", Allowance(1 << 27, 30), r"m: needs more than 128 MB of memory to load \(--limit memory=N\)"),
        ("nothing", PLENTY, "m: the process that read it gave no answer"),
        ("leave", PLENTY, "m: starting ended with status 7"),
    ],
)
def test_what_goes_wrong_is_one_line(tasks: str, task: str, allowance: Allowance, said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        call(f"{tasks}:{task}", {"where": "m"}, [], allowance, "m")
    assert "\n" not in str(caught.value)
    assert call(f"{tasks}:echo", {"text": "still"}, [], PLENTY, "m")[0] == {"got": "still"}


def test_who_waits_forever_is_ended(tasks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    isolation.stop()
    monkeypatch.setattr(
        isolation, "_BOOT", isolation._BOOT.replace("isolation.serve", "isolation.WALL = 1; isolation.serve")
    )
    with pytest.raises(ModelError, match="gave up after"):
        call(f"{tasks}:wait", {}, [], Allowance(1 << 30, 1), "m")
    isolation.stop()


def test_an_error_of_ours_comes_through(tasks: str) -> None:
    with pytest.raises(UsageError, match="--here: not like this"):
        call(f"{tasks}:refuse", {}, [], PLENTY, "m")


def test_what_libraries_print_is_dropped(tasks: str, capfd: pytest.CaptureFixture[str]) -> None:
    call(f"{tasks}:chatter", {}, [], PLENTY, "m")
    assert capfd.readouterr() == ("", "")


def test_threads_do_not_wait_for_each_other(tasks: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: call(f"{tasks}:echo", {"text": i}, [], PLENTY, "m")[0]["got"], range(8)))
    assert answers == list(range(8))


def test_a_server_that_died_is_started_again(tasks: str) -> None:
    call(f"{tasks}:echo", {"text": 1}, [], PLENTY, "m")
    server = isolation._servers[tasks].process
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    assert call(f"{tasks}:echo", {"text": 2}, [], PLENTY, "m")[0] == {"got": 2}


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(RuntimeUnavailable, match=r"No module named 'no_such_tasks'.*--limit isolate=0"):
        call("no_such_tasks:f", {}, [], PLENTY, "m")


def test_after_a_fork(tasks: str) -> None:
    call(f"{tasks}:echo", {"text": 1}, [], PLENTY, "m")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if call(f"{tasks}:echo", {"text": 2}, [], PLENTY, "m")[0] == {"got": 2} else 1
            isolation.stop()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert call(f"{tasks}:echo", {"text": 3}, [], PLENTY, "m")[0] == {"got": 3}


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """When the process that asked is killed, its server ends."""
    code = (
        "import os, signal; from sparsec.loading import isolation; from sparsec.loading.load import load_model\n"
        "import onnx.parser\n"
        'load_model(onnx.parser.parse_model(\'<ir_version: 8, opset_import: ["" : 21]> g (float[2] x) => (float[2] y)'
        " { y = Relu(x) }'))\n"
        "print(isolation._servers['sparsec.loading.load'].process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL
    server = Path("/proc", done.stdout.strip())
    for _ in range(300):
        if not server.exists() or "Z" in (server / "stat").read_text().split(")")[1][:3]:
            return
        time.sleep(0.1)
    raise AssertionError("the server is still there")


def test_elsewhere_models_are_read_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without what workers are made of: said, not failed."""
    monkeypatch.delattr(os, "memfd_create")
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[4] x) => (float[4] y) { y = Relu (x) }'
    notes: list[str] = []
    load_model(onnx.parser.parse_model(text), notes=notes)
    assert any("not limited" in note for note in notes)
