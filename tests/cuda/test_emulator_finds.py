"""The emulation on CUDA C with planted faults (`broken.cu`): raw text, because TVM would put some of them right."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_emulator import Dim3, build_emulation
from harness import Room

SOURCE = Path(__file__).with_name("broken.cu")
ENDS = {
    "half_the_block_waits": "some threads end while others wait at a barrier",
    "two_places": "threads of one block wait at different barriers",
    "half_the_warp_waits": "threads of one warp wait at different barriers",
    "misaligned_load": "a misaligned access",
    "misaligned_store": "a misaligned access",
    "beyond_shared": "an index out of bounds",
    "beyond_local": "an index out of bounds",
    "beyond_the_launch": "a write behind the shared memory of the launch",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return build_emulation(SOURCE.read_text(), tmp_path_factory.mktemp("broken"))


def run(library: Path, name: str, order: int = 0) -> np.ndarray:
    """y of 128 threads over x = 0, 1, 2, ..."""
    x, y = Room(np.arange(128, dtype=np.float32)), Room(np.zeros(128, np.float32))
    function = ctypes.CDLL(str(library))[f"emulated_{name}"]
    function.argtypes, function.restype = [ctypes.c_void_p, Dim3, Dim3, ctypes.c_int], None
    pointers = (ctypes.c_void_p * 2)(x.array.ctypes.data, y.array.ctypes.data)
    function(pointers, Dim3(1, 1, 1), Dim3(128, 1, 1), order)
    for room in (x, y):
        room.check(name)
    return y.array


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_sound_kernel_is_right_in_every_order(library, order):
    np.testing.assert_array_equal(run(library, "reversed", order), np.arange(127, -1, -1))


@pytest.mark.parametrize("name", ["no_barrier", "no_second_barrier"])
def test_a_missing_barrier_depends_on_the_order(library, name):
    up, down = (run(library, name, order).tobytes() for order in (0, 1))
    assert up != down


def test_shared_memory_that_nobody_wrote_is_not_a_number(library):
    y = run(library, "unwritten")
    assert np.isnan(y[100:]).all()
    np.testing.assert_array_equal(y[:100], np.arange(100))


def test_a_write_behind_the_output_shows(library):
    with pytest.raises(AssertionError, match="written behind the buffer"):
        run(library, "behind_the_output")


WITH_GUARDS = """
import sys
from pathlib import Path
from test_emulator_finds import run
run(Path(sys.argv[1]), sys.argv[2])
"""
BARE = """
import ctypes, sys
memory = (ctypes.c_float * 1024)()
start = -ctypes.addressof(memory) % 16 + ctypes.addressof(memory)
class Dim3(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in "xyz"]
function = ctypes.CDLL(sys.argv[1])["emulated_" + sys.argv[2]]
function.argtypes = [ctypes.c_void_p, Dim3, Dim3, ctypes.c_int]
ctypes.c_uint.in_dll(ctypes.CDLL(sys.argv[1]), "emulated_room_bytes").value = 512
function((ctypes.c_void_p * 2)(start, start + 2048), Dim3(1, 1, 1), Dim3(128, 1, 1), 0)
"""


def alone(script: str, library: Path, name: str) -> subprocess.CompletedProcess[str]:
    """The kernel in a process that may end."""
    command = [sys.executable, "-c", script, str(library), name]
    path = {"PYTHONPATH": ":".join([str(SOURCE.parent), *sys.path])}
    return subprocess.run(command, env=path, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("name", sorted(ENDS))
def test_ends_the_process(library, name):
    done = alone(BARE, library, name)
    assert done.returncode == -signal.SIGABRT, done.stderr
    assert done.stderr.startswith(f"emulated CUDA: {ENDS[name]} in block (0, 0, 0)")


def test_reading_far_behind_the_input_ends_the_process(library):
    assert alone(WITH_GUARDS, library, "far_behind_the_input").returncode == -signal.SIGSEGV
