"""Checks of a library for CUDA against the stub driver: `python checks.py NAME FOLDER`, each in a process of its own.

FOLDER holds what `hand_cuda.build_with_emulation` makes. Nothing of sparsec is imported: what a program that uses the C
API does is all there is.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

OK, BAD_ARGUMENT, BAD_WEIGHTS, NO_MEMORY, DEVICE = 0, -1, -2, -5, -7
ROWS, COLUMNS = 24, 64
UNKNOWN, OUT_OF_MEMORY = 999, 2  # the driver's codes


class Options(ctypes.Structure):
    """sparsec_options."""

    _fields_ = (
        ("arena", ctypes.c_void_p),
        ("arena_bytes", ctypes.c_size_t),
        ("threads", ctypes.c_int32),
        ("parallel_for", ctypes.c_void_p),
        ("parallel_data", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        ("device", ctypes.c_int32),
        ("message", ctypes.c_char_p),
        ("message_bytes", ctypes.c_size_t),
    )


class Driver:
    """The stub through ctypes: what the caller of a model does itself, and the stub's own questions."""

    def __init__(self) -> None:
        self.c = ctypes.CDLL("libcuda.so.1")
        self.c.stub_journal.restype = ctypes.c_char_p
        self.c.stub_fail.argtypes = [ctypes.c_long, ctypes.c_int]
        self.c.stub_set.argtypes = [ctypes.c_char_p]
        for name in ("cuMemAlloc_v2", "cuMemFree_v2", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2"):
            getattr(self.c, name).argtypes = {
                "cuMemAlloc_v2": [ctypes.c_void_p, ctypes.c_size_t],
                "cuMemFree_v2": [ctypes.c_uint64],
                "cuMemcpyHtoDAsync_v2": [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p],
                "cuMemcpyDtoHAsync_v2": [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p],
            }[name]

    def journal(self) -> list[str]:
        """The calls since the last question."""
        lines = self.c.stub_journal().decode().splitlines()
        self.c.stub_forget()
        return lines

    def new(self, name: str, *arguments: object) -> ctypes.c_void_p:
        """The handle that `name(&handle, ...)` makes."""
        handle = ctypes.c_void_p()
        assert getattr(self.c, name)(ctypes.byref(handle), *arguments) == 0, name
        return handle

    def context(self, device: int = 0) -> ctypes.c_void_p:
        """The caller's own hold of a device's context, current from now on."""
        assert self.c.cuInit(0) == 0
        context = self.new("cuDevicePrimaryCtxRetain", device)
        assert self.c.cuCtxPushCurrent_v2(context) == 0
        return context

    def leave(self, device: int) -> None:
        """The end of `context`."""
        assert self.c.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())) == 0
        assert self.c.cuDevicePrimaryCtxRelease_v2(device) == 0

    def clean(self, depth: int = 0, live: int = 0) -> None:
        """Nothing is left alive in the driver, and the thread's contexts are as they were."""
        assert (self.c.stub_live(), self.c.stub_depth()) == (live, depth), self.journal()


class Instance:
    """One opened model; `code` is open's answer."""

    def __init__(self, folder: Path, weights: bytes | None = None, **options: object) -> None:
        self.library = ctypes.CDLL(str(folder / "libmodel.so"))
        self.library.sparsec_arena_bytes.restype = ctypes.c_size_t
        self.library.sparsec_step_name.restype = ctypes.c_char_p
        pointer = ctypes.c_void_p
        types = {"run": 3 * [pointer], "run_device": 3 * [pointer], "run_timed": 4 * [pointer], "close": [pointer]}
        types |= {"run_steps": 4 * [pointer], "device_name": [pointer, ctypes.c_char_p, ctypes.c_size_t]}
        types["open"] = [pointer, ctypes.c_size_t, pointer, pointer]
        for name, arguments in types.items():
            getattr(self.library, f"sparsec_{name}").argtypes = arguments
        self.handle = ctypes.c_void_p(1)
        self.text = ctypes.create_string_buffer(256)
        options = {"message": ctypes.cast(self.text, ctypes.c_char_p), "message_bytes": 256, **options}
        self.options = Options(**options)
        if weights is not None:
            code = self.library.sparsec_open(
                weights, len(weights), ctypes.byref(self.options), ctypes.byref(self.handle)
            )
        else:
            path = str(folder / "weights.bin").encode()
            code = self.library.sparsec_open_file(path, ctypes.byref(self.options), ctypes.byref(self.handle))
        self.code = code
        assert (code == OK) == bool(self.handle.value), "the model pointer is set exactly on success"
        row = np.frombuffer((folder / "weights.bin").read_bytes()[64 + 64 :], np.float32, COLUMNS)
        self.row = row.copy()

    @property
    def message(self) -> str:
        """What the model says of its last failure."""
        return self.text.value.decode()

    def run(self, seed: int = 1, function: str = "run", *more: object) -> int:
        """One run, whose outputs are right if its code is 0."""
        x = np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32)
        y, row = np.full((ROWS, COLUMNS), np.nan, np.float32), np.full(COLUMNS, np.nan, np.float32)
        code = getattr(self.library, f"sparsec_{function}")(self.handle, pointers(x), pointers(y, row), *more)
        if code == OK:
            np.testing.assert_array_equal(y, self.expected(x))
            np.testing.assert_array_equal(row, self.row)
        return code

    def expected(self, x: np.ndarray) -> np.ndarray:
        """What the model computes."""
        return (2 * (np.maximum(x, 0) + self.row))[:, ::-1]

    def close(self) -> None:
        """sparsec_close."""
        self.library.sparsec_close(self.handle)


def pointers(*arrays: np.ndarray | int) -> ctypes.Array:
    """Addresses, as the C API takes them."""
    values = [a if isinstance(a, int) else a.ctypes.data for a in arrays]
    return (ctypes.c_void_p * len(values))(*values)


def graph_of_all_steps(folder: Path) -> None:
    driver, model = Driver(), Instance(folder)
    assert model.code == OK
    assert [line.split()[0] for line in driver.journal()].count("cuMemAlloc_v2") == 1
    for seed in range(3):
        assert model.run(seed) == OK
        assert [line.split()[0].removesuffix("_v2") for line in driver.journal()] == [
            "cuCtxPushCurrent", "cuMemcpyHtoDAsync", "cuGraphLaunch", "cuMemcpyDtoHAsync", "cuMemcpyDtoHAsync",
            "cuStreamSynchronize", "cuCtxPopCurrent",
        ]  # fmt: skip
    name = ctypes.create_string_buffer(64)
    assert model.library.sparsec_device_name(model.handle, name, 64) == OK
    assert name.value == b"stub device 0"
    count = model.library.sparsec_step_count(None)
    steps = [model.library.sparsec_step_name(None, i) for i in range(count)]
    assert steps == [b"relu", b"add_row", b"reverse_rows"]
    assert model.run(9, "run_steps", (ctypes.c_float * count)()) == OK
    assert _launches(driver) == 3
    model.close()
    driver.clean()


def _launches(driver: Driver) -> int:
    return sum(line.startswith("cuLaunchKernel") for line in driver.journal())


def launches_where_capture_is_refused(folder: Path) -> None:
    driver = Driver()
    driver.c.stub_set(b"no-capture")
    model = Instance(folder)
    driver.journal()
    assert (model.code, model.run()) == (OK, OK)
    assert _launches(driver) == 3
    model.close()
    driver.clean()


def launches_without_graph_functions(folder: Path) -> None:
    """With a stub that lacks cuGraphLaunch."""
    launches_where_capture_is_refused(folder)


def host_steps(folder: Path) -> None:
    driver = Driver()
    for threads in (1, 3):
        model = Instance(folder, threads=threads)
        assert model.code == OK
        driver.journal()
        for seed in range(3):
            assert model.run(seed) == OK
        calls = driver.journal()
        size = ROWS * COLUMNS * 4
        assert calls.count(f"cuMemcpyDtoHAsync_v2 {size}") == calls.count(f"cuMemcpyHtoDAsync_v2 {size}") == 3 * 2
        assert not any("Graph" in line for line in calls)
        steps = (ctypes.c_float * 3)(-1, -1, -1)
        assert model.run(8, "run_steps", steps) == OK
        assert min(steps) >= 0
        names = [model.library.sparsec_step_name(None, i) for i in range(-1, 4)]
        assert (names[0], names[2], names[4]) == (None, b"host", None)
        milliseconds = ctypes.c_float(-1)
        assert model.run(7, "run_timed", ctypes.byref(milliseconds)) == OK
        assert milliseconds.value >= 0
        model.close()
        driver.clean()


def ptx_where_the_cubin_does_not_fit(folder: Path) -> None:
    driver = Driver()
    driver.c.stub_set(b"no-binary")
    model = Instance(folder)
    assert [line for line in driver.journal() if "LoadData" in line] == [
        "cuModuleLoadDataEx cubin = 209",
        "cuModuleLoadDataEx ptx",
    ]
    assert (model.code, model.run()) == (OK, OK)
    model.close()
    driver.c.stub_set(b"no-binary,bad-ptx")
    model = Instance(folder)
    assert model.code == DEVICE
    assert model.message == (
        "the model is for sm_90, the device is sm_61: CUDA_ERROR_INVALID_PTX: ptxas: the PTX is too new"
    )
    driver.clean()


def no_device(folder: Path) -> None:
    driver = Driver()
    driver.c.stub_set(b"no-device")
    model = Instance(folder)
    assert (model.code, model.message) == (
        DEVICE,
        "cuInit: CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected",
    )
    driver.clean()


def a_device_by_its_number(folder: Path) -> None:
    driver, model = Driver(), Instance(folder, device=1)
    assert (model.code, model.run()) == (OK, OK)
    name = ctypes.create_string_buffer(8)
    assert model.library.sparsec_device_name(model.handle, name, 8) == OK
    assert name.value == b"stub de"
    model.close()
    absent = Instance(folder, device=7)
    assert (absent.code, absent.message.split(": ")[:2]) == (DEVICE, ["cuDeviceGet", "CUDA_ERROR_INVALID_DEVICE"])
    driver.clean()


def short_messages(folder: Path) -> None:
    """A message ends where its room ends, and no room is no message."""
    driver = Driver()
    driver.c.stub_set(b"no-device")
    for room in (0, 1, 9):
        model = Instance(folder, message_bytes=room)
        assert model.code == DEVICE
        assert model.message == "cuInit: CUDA"[: max(room - 1, 0)]
        assert model.text.raw[room:] == bytes(256 - room)
    assert Instance(folder, message=None).code == DEVICE


def the_callers_stream(folder: Path) -> None:
    driver = Driver()
    driver.context(1)
    stream = driver.new("cuStreamCreate", 0)
    x = np.random.default_rng(5).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    y, row = np.full_like(x, np.nan), np.full(COLUMNS, np.nan, np.float32)
    memory = [driver.new("cuMemAlloc_v2", a.nbytes).value for a in (x, y, row)]
    assert driver.c.cuMemcpyHtoDAsync_v2(memory[0], x.ctypes.data, x.nbytes, stream) == OK
    driver.context(0)  # another context is current, and stays so
    alive = driver.c.stub_live()
    model = Instance(folder, stream=stream)
    assert model.code == OK
    driver.journal()
    assert model.library.sparsec_run_device(model.handle, pointers(memory[0]), pointers(*memory[1:])) == OK
    calls = [line.split()[0] for line in driver.journal()]
    assert calls.count("cuMemcpyDtoDAsync_v2") == 3
    assert "cuStreamSynchronize" not in calls
    driver.leave(0)
    for array, address in ((y, memory[1]), (row, memory[2])):
        assert driver.c.cuMemcpyDtoHAsync_v2(array.ctypes.data, address, array.nbytes, stream) == OK
    assert np.isnan(y).all(), "nothing happens before somebody waits"
    assert driver.c.cuStreamSynchronize(stream) == OK
    np.testing.assert_array_equal(y, model.expected(x))
    np.testing.assert_array_equal(row, model.row)
    assert model.run(3) == OK  # host tensors on the same stream
    model.close()
    driver.clean(depth=1, live=alive - 1)  # the stream and the memory are still the caller's


def tensors_on_the_device(folder: Path) -> None:
    """On a stream of its own the model waits for its outputs."""
    driver = Driver()
    driver.context(0)
    stream = driver.new("cuStreamCreate", 0)
    x = np.random.default_rng(6).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    y = np.full_like(x, np.nan)
    memory = [driver.new("cuMemAlloc_v2", size).value for size in (x.nbytes, x.nbytes, COLUMNS * 4)]
    driver.c.cuMemcpyHtoDAsync_v2(memory[0], x.ctypes.data, x.nbytes, stream)
    driver.c.cuStreamSynchronize(stream)
    alive = driver.c.stub_live()
    model = Instance(folder)
    driver.journal()
    assert model.library.sparsec_run_device(model.handle, pointers(memory[0]), pointers(*memory[1:])) == OK
    assert driver.journal()[-2:] == ["cuStreamSynchronize", "cuCtxPopCurrent_v2"]
    driver.c.cuMemcpyDtoHAsync_v2(y.ctypes.data, memory[1], y.nbytes, stream)
    driver.c.cuStreamSynchronize(stream)
    np.testing.assert_array_equal(y, model.expected(x))
    model.close()
    driver.clean(depth=1, live=alive)


def the_callers_arena(folder: Path) -> None:
    driver = Driver()
    driver.context(0)
    size = Instance(folder, device=7).library.sparsec_arena_bytes(None)
    arena = driver.new("cuMemAlloc_v2", size + 8).value
    alive = driver.c.stub_live()
    driver.journal()
    model = Instance(folder, arena=arena + 8, arena_bytes=size)
    (taken,) = [line for line in driver.journal() if line.startswith("cuMemAlloc")]
    assert int(taken.split()[1]) < size
    assert (model.code, model.run()) == (OK, OK)
    model.close()
    assert Instance(folder, arena=arena, arena_bytes=size - 1).code == BAD_ARGUMENT
    driver.clean(depth=1, live=alive)


def two_threads(folder: Path) -> None:
    driver, codes = Driver(), []

    def work(i: int) -> None:
        model = Instance(folder, device=i % 2)
        codes.append(model.code)
        codes.extend(model.run(100 * i + seed) for seed in range(10))
        model.close()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [OK] * 33
    driver.clean()


def _failing_call(driver: Driver) -> str:
    (line,) = [line for line in driver.journal() if "fails" in line]
    return line.split()[0]


def each_call_fails_once_when_opening(folder: Path) -> None:
    """open says which one, and holds nothing; where only the graph cannot be had, the model runs without it."""
    driver, names = Driver(), []
    for n in range(1000):
        driver.journal()
        driver.c.stub_fail(n, UNKNOWN)
        model = Instance(folder)
        if not driver.c.stub_failed():
            driver.c.stub_fail(-1, 0)
            model.close()
            break
        names.append(_failing_call(driver))
        driver.c.stub_fail(-1, 0)
        if model.code == OK:
            assert model.run(n) == OK, names[-1]
            assert model.run(n + 1, "run_timed", ctypes.byref(ctypes.c_float())) == OK
            model.close()
        else:
            assert (model.code, model.message.partition(":")[0]) == (DEVICE, names[-1])
        driver.clean()
    graph = {
        "cuStreamCreate", "cuStreamBeginCapture_v2", "cuLaunchKernel", "cuStreamEndCapture", "cuGraphDestroy",
        "cuGraphInstantiateWithFlags", "cuStreamDestroy_v2",
    }  # fmt: skip
    assert graph <= set(names)
    assert {"cuInit", "cuMemAlloc_v2", "cuMemHostAlloc", "cuEventCreate", "cuCtxPopCurrent_v2"} <= set(names)


def each_call_fails_once_when_running(folder: Path) -> None:
    """run says which one; the next run is right."""
    driver, model = Driver(), Instance(folder, threads=2)
    alive, milliseconds = driver.c.stub_live(), ctypes.c_float()
    ways = ("run", ()), ("run_timed", (ctypes.byref(milliseconds),)), ("run_steps", ((ctypes.c_float * 3)(),))
    for function, more in ways:
        count = 0
        for n in range(1000):
            driver.journal()
            driver.c.stub_fail(n, UNKNOWN)
            code = model.run(n, function, *more)
            if not driver.c.stub_failed():
                driver.c.stub_fail(-1, 0)
                assert code == OK
                break
            count += 1
            assert (code, model.message.partition(":")[0]) == (DEVICE, _failing_call(driver))
            driver.c.stub_fail(-1, 0)
            driver.clean(live=alive)
            assert model.run(n + 1) == OK
        assert count >= 7
    model.close()
    driver.clean()


def each_call_fails_once_when_closing(folder: Path) -> None:
    """All is given back, whatever the driver says of it."""
    driver, names = Driver(), []
    for n in range(1, 1000):  # 0 would be the context: without it nothing can be given back
        model = Instance(folder)
        driver.journal()
        driver.c.stub_fail(n, UNKNOWN)
        model.close()
        driver.clean()
        if not driver.c.stub_failed():
            break
        names.append(_failing_call(driver))
        driver.c.stub_fail(-1, 0)
    assert {"cuMemFree_v2", "cuMemFreeHost", "cuModuleUnload", "cuDevicePrimaryCtxRelease_v2"} <= set(names)


def out_of_memory(folder: Path) -> None:
    driver = Driver()
    driver.c.stub_set(b"no-memory")
    model = Instance(folder)
    assert (model.code, model.message.split(": ")[:2]) == (NO_MEMORY, ["cuMemAlloc_v2", "CUDA_ERROR_OUT_OF_MEMORY"])
    driver.clean()


def weights_are_checked_before_the_device(folder: Path) -> None:
    driver = Driver()
    good = (folder / "weights.bin").read_bytes()
    for at in (0, 20, 40, 100, len(good) - 1):
        bad = bytearray(good)
        bad[at] ^= 1
        assert Instance(folder, bytes(bad)).code == BAD_WEIGHTS, at
    assert Instance(folder, good[:-1]).code == BAD_WEIGHTS
    assert driver.journal() == []
    copy = bytearray(good)
    memory = (ctypes.c_char * len(copy)).from_buffer(copy)
    model = Instance(folder, bytes(memory))
    assert (model.code, model.run()) == (OK, OK)
    model.close()
    driver.clean()


def bad_arguments(folder: Path) -> None:
    driver, model = Driver(), Instance(folder)
    call = model.library
    one, two = pointers(0), pointers(0, 0)
    for name in ("run", "run_device"):
        function = getattr(call, f"sparsec_{name}")
        assert function(None, one, two) == function(model.handle, None, two) == BAD_ARGUMENT
        assert function(model.handle, one, two) == function(model.handle, one, None) == BAD_ARGUMENT
    assert model.run(1, "run_timed", None) == model.run(1, "run_steps", None) == BAD_ARGUMENT
    assert call.sparsec_device_name(model.handle, None, 4) == call.sparsec_device_name(None, b"", 1) == BAD_ARGUMENT
    assert Instance(folder, threads=-1).code == Instance(folder, threads=257).code == BAD_ARGUMENT
    call.sparsec_close(None)
    model.close()
    driver.clean()


def no_driver(folder: Path) -> None:
    """Without the stub, on a machine that has no driver either."""
    model = Instance(folder)
    assert model.code == DEVICE
    assert model.message.startswith("no CUDA driver: libcuda.so.1: ")


def an_old_driver(folder: Path) -> None:
    """With a stub that lacks cuStreamGetCtx."""
    model = Instance(folder)
    assert (model.code, model.message) == (DEVICE, "the CUDA driver is too old: it has no cuStreamGetCtx")


CHECKS: dict[str, Callable[[Path], None]] = {
    name: value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__annotations__", {}).get("folder") == "Path" and not name.startswith("_")
}

if __name__ == "__main__":
    CHECKS[sys.argv[1]](Path(sys.argv[2]))
