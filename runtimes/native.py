"""`native`: libmodel.so in this process, through its C API (`runtimes/c/sparsec.h`) with ctypes."""

from __future__ import annotations

import _ctypes
import ctypes
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sparsec.errors import ArtifactError, RuntimeUnavailable
from sparsec.ports import InputSpec
from sparsec.runtimes.base import Arrays, Compiled, Runtime, Session, machine_arch

_MAX_RANK = 8
_CPU_FEATURE, _DEVICE = -4, -7
_MESSAGE_BYTES = 512


class _TensorInfo(ctypes.Structure):  # sparsec_tensor_info
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * _MAX_RANK),
        ("bytes", ctypes.c_size_t),
        ("scale", ctypes.c_float),
        ("zero_point", ctypes.c_int32),
    )


class _Options(ctypes.Structure):  # sparsec_options
    _fields_ = (
        ("arena", ctypes.c_void_p),
        ("arena_bytes", ctypes.c_size_t),
        ("threads", ctypes.c_int32),
        ("parallel_for", ctypes.c_void_p),
        ("parallel_data", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        ("device", ctypes.c_int32),
        ("message", ctypes.c_void_p),
        ("message_bytes", ctypes.c_size_t),
    )


def _load(path: Path) -> ctypes.CDLL:
    """dlopen under a name of its own: the loader would otherwise answer with a library that was at this path before."""
    with tempfile.TemporaryDirectory(prefix="sparsec-") as folder:
        link = Path(folder) / "libmodel.so"
        link.symlink_to(path.resolve())
        try:
            library = ctypes.CDLL(str(link))
        except OSError as error:
            raise RuntimeUnavailable(f"cannot be loaded: {error}", str(path)) from error
    library.sparsec_error_string.restype = ctypes.c_char_p
    library.sparsec_features_needed.restype = ctypes.c_char_p
    library.sparsec_arena_bytes.restype = ctypes.c_size_t
    library.sparsec_arena_bytes.argtypes = (ctypes.POINTER(_Options),)
    library.sparsec_close.restype = None
    library.sparsec_close.argtypes = (ctypes.c_void_p,)
    library.sparsec_run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    library.sparsec_open.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p)
    library.sparsec_open_file.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p)
    for side in ("input", "output"):
        getattr(library, f"sparsec_{side}_count").argtypes = (ctypes.c_void_p,)
        getattr(library, f"sparsec_{side}_info").argtypes = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p)
    return library


class NativeSession(Session):
    """One instance of the model. Buffers are NumPy's; the library copies them in and out."""

    interleaves = True

    def __init__(self, artifact: Compiled, threads: int | None, device: int = 0) -> None:
        self._artifact = artifact
        self._threads = threads or artifact.manifest["threads"]
        self._model = ctypes.c_void_p()
        self._library: ctypes.CDLL | None = _load(artifact.path / "libmodel.so")
        try:
            self._message = ctypes.create_string_buffer(_MESSAGE_BYTES)  # the model writes here as long as it is open
            room = ctypes.addressof(self._message)
            options = _Options(threads=self._threads, device=device, message=room, message_bytes=_MESSAGE_BYTES)
            if artifact.manifest["embed_weights"]:
                code = self._library.sparsec_open(None, 0, ctypes.byref(options), ctypes.byref(self._model))
            else:
                weights = str(artifact.path / "weights.bin").encode()
                code = self._library.sparsec_open_file(weights, ctypes.byref(options), ctypes.byref(self._model))
            self._check(code)
            self._check_signature("input", artifact.inputs)
            self._check_signature("output", artifact.outputs)
        except BaseException:
            self.close()
            raise

    def _check(self, code: int) -> None:
        if code == 0:
            return
        assert self._library is not None
        text = self._library.sparsec_error_string(code).decode()
        where = str(self._artifact.path)
        if code == _CPU_FEATURE:
            needed = self._library.sparsec_features_needed().decode()
            raise RuntimeUnavailable(f"{text} (needs {needed}); compile with an older --cpu", where)
        if code == _DEVICE or self._message.value:
            said = self._message.value.decode("utf-8", "replace")
            raise RuntimeUnavailable(f"{text}: {said}", where)
        raise ArtifactError(f"{text} (code {code})", where)

    def _check_signature(self, side: str, specs: tuple[InputSpec, ...]) -> None:
        """The library writes as many bytes as it was built for: never hand it a buffer of another size."""
        library, where = self._library, str(self._artifact.path / "libmodel.so")
        assert library is not None
        count = getattr(library, f"sparsec_{side}_count")(self._model)
        if count != len(specs):
            raise ArtifactError(f"has {count} {side}s, the manifest {len(specs)}; compile the model again", where)
        for i, spec in enumerate(specs):
            found = _TensorInfo()
            self._check(getattr(library, f"sparsec_{side}_info")(self._model, i, ctypes.byref(found)))
            size = int(np.prod(spec.shape, dtype=np.int64)) * np.dtype(spec.dtype).itemsize
            if found.bytes != size:
                raise ArtifactError(f"{side} {spec.name!r} has {found.bytes} bytes, the manifest says {size}", where)

    def _tensors(self, inputs: Arrays) -> tuple[ctypes.Array, ctypes.Array, tuple[list[np.ndarray], Arrays]]:
        """Pointers to the inputs and to new outputs, and what they point to, which must outlive them."""
        ins = [np.ascontiguousarray(inputs[spec.name], dtype=spec.dtype) for spec in self._artifact.inputs]
        outs = {spec.name: np.empty(spec.shape, spec.dtype) for spec in self._artifact.outputs}
        sources = (ctypes.c_void_p * max(1, len(ins)))(*(a.ctypes.data for a in ins))
        sinks = (ctypes.c_void_p * len(outs))(*(a.ctypes.data for a in outs.values()))
        return sources, sinks, (ins, outs)

    def _call(self, inputs: Arrays) -> tuple[Callable[[], int], Arrays]:
        library, model = self._library, self._model
        if library is None:
            raise ArtifactError("the session is closed", str(self._artifact.path))
        sources, sinks, (ins, outs) = self._tensors(inputs)
        run = library.sparsec_run

        def call(keep: object = (self, ins, outs)) -> int:  # the arrays and the model must outlive the pointers
            return run(model, sources, sinks)

        return call, outs

    def run(self, inputs: Arrays) -> Arrays:
        call, outputs = self._call(inputs)
        self._check(call())
        return outputs

    def once(self, inputs: Arrays) -> Callable[[], object]:
        return self._call(inputs)[0]

    def peak_bytes(self) -> int | None:
        """Peak resident memory of the artifact's own `bench`: the model without Python around it."""
        command = [str(self._artifact.path / "bench"), "--runs", "1", "--no-check", "--json"]
        command += ["--threads", str(self._threads)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=60, check=True)
            facts: dict[str, Any] = json.loads(done.stdout)
            return int(facts["peak_bytes"])
        except (OSError, subprocess.SubprocessError, ValueError, KeyError):
            return None

    def close(self) -> None:
        if self._library is not None:
            self._library.sparsec_close(self._model)
            _ctypes.dlclose(self._library._handle)
            self._library, self._model = None, ctypes.c_void_p()

    def __del__(self) -> None:
        if getattr(self, "_library", None) is not None:
            self.close()


class Native(Runtime):
    """This machine, for artifacts of its architecture."""

    name = "native"

    def open(self, artifact: Compiled, threads: int | None = None) -> NativeSession:
        target = artifact.manifest["target"]
        if target["arch"] != machine_arch() or target["os"] != "linux":
            raise RuntimeUnavailable(
                f"the artifact is for {target['arch']} {target['os']}, this machine is {machine_arch()} linux;"
                " use --runtime emulated, adb or ssh:HOST", str(artifact.path),
            )  # fmt: skip
        return NativeSession(artifact, threads)
