"""The harness must be able to fail: a write behind a buffer and tiles that depend on each other are noticed."""

from __future__ import annotations

import ctypes
import os
import signal

import numpy as np
import pytest
from harness import Room, ranges, run_kernel
from tvm.script import tirx as T


@T.prim_func(s_tir=True)
def double(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32"), begin: T.int32, end: T.int32):
    for t in T.serial(begin, end):
        for i in T.vectorized(8):
            y[t * 8 + i] = x[t * 8 + i] * T.float32(2)


@T.prim_func(s_tir=True)
def overrun(y: T.Buffer((1024,), "float32"), begin: T.int32, end: T.int32):
    for t in T.serial(begin, end):
        y[t] = T.float32(0)


@T.prim_func(s_tir=True)
def chain(y: T.Buffer((9,), "float32"), begin: T.int32, end: T.int32):
    for t in T.serial(begin, end):
        y[t + 1] = y[t] + T.float32(1)


def test_ranges_cover_once_and_are_uneven():
    for tiles in (1, 2, 3, 8, 100):
        parts = ranges(tiles, 3)
        assert sorted(t for begin, end in parts for t in range(begin, end)) == list(range(tiles))
    assert len({end - begin for begin, end in ranges(100, 3)}) == 3


def test_runs_a_kernel():
    x = np.arange(64, dtype=np.float32)
    _, y = run_kernel(double, [x, np.full(64, np.nan, np.float32)], 8)
    np.testing.assert_array_equal(y, 2 * x)


def test_notices_a_write_behind_the_buffer():
    run_kernel(overrun, [np.zeros(8, np.float32)], 8)
    with pytest.raises(AssertionError, match="written behind the buffer"):
        run_kernel(overrun, [np.zeros(8, np.float32)], 9)


def test_reading_behind_the_slack_ends_the_process():
    """Done to a child; the last byte of the slack is still readable."""
    child = os.fork()
    if child == 0:
        room = Room(np.zeros(8, np.float32))
        last = room.memory.ctypes.data + room.memory.size - 1
        code = 3 if ctypes.string_at(last, 1) == b"\xff" else 4
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.close(2)
        if code == 3:
            ctypes.string_at(last + 1, 1)
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV


def test_dependent_tiles_give_another_result():
    whole = run_kernel(chain, [np.zeros(9, np.float32)], 8, splits=1)[0]
    split = run_kernel(chain, [np.zeros(9, np.float32)], 8, splits=3)[0]
    assert whole[-1] == 8
    assert split[-1] != 8
