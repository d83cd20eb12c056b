"""`cuda`: libmodel.so of a CUDA artifact in this process. The library finds the driver itself; tensors are NumPy's."""

from __future__ import annotations

import ctypes

from sparsec.errors import RuntimeUnavailable, UsageError
from sparsec.runtimes.base import Arrays, Compiled, DeviceTime, Runtime, Stats, machine_arch
from sparsec.runtimes.native import NativeSession

_NAME_BYTES = 256


class CudaSession(NativeSession):
    """One instance on one device. Inputs and outputs go through pinned memory of the library."""

    def device_time(self, inputs: Arrays, runs: int, warmup: int = 1) -> DeviceTime:
        """By the device's events, from behind the copy of the inputs to before that of the outputs."""
        library, model = self._library, self._model
        assert library is not None
        library.sparsec_run_timed.argtypes = (ctypes.c_void_p,) * 4
        library.sparsec_device_name.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)
        sources, sinks, _ = arrays = self._tensors(inputs)
        milliseconds, seconds = ctypes.c_float(), []
        for i in range(-warmup, runs):
            self._check(library.sparsec_run_timed(model, sources, sinks, ctypes.byref(milliseconds)))
            if i >= 0:
                seconds.append(milliseconds.value / 1e3)
        del arrays  # alive until here: the library writes into them
        name = ctypes.create_string_buffer(_NAME_BYTES)
        self._check(library.sparsec_device_name(model, name, _NAME_BYTES))
        return DeviceTime(name.value.decode("utf-8", "replace"), Stats.of(seconds))


class Cuda(Runtime):
    """An NVIDIA GPU of this machine; `cuda:N` is device N."""

    name = "cuda"
    takes_argument = True

    def open(self, artifact: Compiled, threads: int | None = None) -> CudaSession:
        target, where = artifact.manifest["target"], str(artifact.path)
        if self.argument and not self.argument.isdecimal():
            raise UsageError(f"expected the number of a device, got {self.argument!r}", "--runtime cuda:N")
        if target["runtime"] != "cuda":
            raise UsageError(f"is for {target['name']}, not for CUDA devices", where)
        if target["arch"] != machine_arch() or target["os"] != "linux":
            raise RuntimeUnavailable(
                f"the processor beside the GPU is to be {target['arch']} {target['os']}, this machine is"
                f" {machine_arch()} linux; use --runtime ssh:HOST, or compile with --host {machine_arch()}", where,
            )  # fmt: skip
        return CudaSession(artifact, threads, int(self.argument or 0))
