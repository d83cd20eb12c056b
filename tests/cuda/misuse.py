"""What the stub driver must notice: `python misuse.py NAME` is to end by the stub's abort, or by a touched guard page."""

from __future__ import annotations

import ctypes
import sys

from checks import Driver

PTX = b".version 8.0\n.entry k(\n"


def an_unknown_handle(driver: Driver) -> None:
    driver.c.cuStreamSynchronize(ctypes.c_void_p(12345))


def a_call_before_init(driver: Driver) -> None:
    driver.c.cuDeviceGet(ctypes.byref(ctypes.c_int()), 0)


def no_context(driver: Driver) -> None:
    driver.context()
    driver.c.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    driver.new("cuStreamCreate", 0)


def a_handle_of_another_kind(driver: Driver) -> None:
    driver.context()
    driver.c.cuStreamSynchronize(driver.new("cuEventCreate", 0))


def a_stream_of_another_context(driver: Driver) -> None:
    driver.context(0)
    stream = driver.new("cuStreamCreate", 0)
    driver.context(1)
    driver.c.cuStreamSynchronize(stream)


def a_copy_beyond_an_allocation(driver: Driver) -> None:
    driver.context()
    stream, memory = driver.new("cuStreamCreate", 0), driver.new("cuMemAlloc_v2", 100).value
    driver.c.cuMemcpyHtoDAsync_v2(memory + 1, bytes(100), 100, stream)


def a_copy_into_freed_memory(driver: Driver) -> None:
    driver.context()
    stream, memory = driver.new("cuStreamCreate", 0), driver.new("cuMemAlloc_v2", 100).value
    driver.c.cuMemFree_v2(memory)
    driver.c.cuMemcpyHtoDAsync_v2(memory, bytes(100), 100, stream)


def device_memory_as_host_memory(driver: Driver) -> None:
    driver.context()
    stream, memory = driver.new("cuStreamCreate", 0), driver.new("cuMemAlloc_v2", 100).value
    driver.c.cuMemcpyHtoDAsync_v2(memory, memory, 100, stream)


def memory_freed_twice(driver: Driver) -> None:
    driver.context()
    memory = driver.new("cuMemAlloc_v2", 100).value
    driver.c.cuMemFree_v2(memory)
    driver.c.cuMemFree_v2(memory)


def memory_freed_while_in_use(driver: Driver) -> None:
    driver.context()
    stream, memory = driver.new("cuStreamCreate", 0), driver.new("cuMemAlloc_v2", 100).value
    driver.c.cuMemcpyHtoDAsync_v2(memory, bytes(100), 100, stream)
    driver.c.cuMemFree_v2(memory)


def memory_that_outlives_its_context(driver: Driver) -> None:
    driver.context()
    driver.new("cuMemAlloc_v2", 100)
    driver.c.cuDevicePrimaryCtxRelease_v2(0)


def a_function_of_an_unloaded_module(driver: Driver) -> None:
    driver.context()
    module = driver.new("cuModuleLoadDataEx", PTX, 0, None, None)
    function, stream = driver.new("cuModuleGetFunction", module, b"k"), driver.new("cuStreamCreate", 0)
    driver.c.cuModuleUnload(module)
    driver.c.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, None, None)


def a_block_too_large(driver: Driver) -> None:
    driver.context()
    module = driver.new("cuModuleLoadDataEx", PTX, 0, None, None)
    function, stream = driver.new("cuModuleGetFunction", module, b"k"), driver.new("cuStreamCreate", 0)
    driver.c.cuLaunchKernel(function, 1, 1, 1, 64, 17, 1, 0, stream, None, None)


def waiting_for_a_captured_stream(driver: Driver) -> None:
    driver.context()
    stream = driver.new("cuStreamCreate", 0)
    driver.c.cuStreamBeginCapture_v2(stream, 0)
    driver.c.cuStreamSynchronize(stream)


def memory_taken_during_a_capture(driver: Driver) -> None:
    driver.context()
    driver.c.cuStreamBeginCapture_v2(driver.new("cuStreamCreate", 0), 0)
    driver.new("cuMemAlloc_v2", 100)


def touching_device_memory(driver: Driver) -> None:
    driver.context()
    ctypes.string_at(driver.new("cuMemAlloc_v2", 100).value, 1)


MISUSES = {
    name: value
    for name, value in list(globals().items())
    if getattr(value, "__annotations__", {}).get("driver") == "Driver"
}

if __name__ == "__main__":
    MISUSES[sys.argv[1]](Driver())
