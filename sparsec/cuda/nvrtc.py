"""CUDA C to device code by NVRTC, NVIDIA's run-time compiler: a library, no toolkit and no GPU needed.

Found in the wheels `nvidia-cuda-nvrtc-cu12` and `nvidia-cuda-runtime-cu12` (`pip install "sparsec[cuda]"`). Major version
12: its cubins load with any driver since 525, its PTX with drivers as new as itself.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from importlib import util
from pathlib import Path

from sparsec.errors import BuildError

DRIVER = "525"  # the first driver that loads cubins of CUDA 12: CUDA Compatibility, minor version compatibility
INSTALL = 'pip install "sparsec[cuda]"'


def _wheel(package: str) -> Path:
    """The folder of one of NVIDIA's wheels. Raises BuildError."""
    try:
        spec = util.find_spec(f"nvidia.{package}")
    except ModuleNotFoundError:
        spec = None
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        raise BuildError(f"the target cuda needs NVIDIA's compiler library; {INSTALL}", f"nvidia.{package}")
    return Path(places[0])


@cache
def _library() -> ctypes.CDLL:
    folder = _wheel("cuda_nvrtc") / "lib"
    found = sorted(folder.glob("libnvrtc.so.12*"))
    if not found:
        raise BuildError(f"no libnvrtc.so.12 in the package nvidia-cuda-nvrtc-cu12; {INSTALL}", "nvidia.cuda_nvrtc")
    for part in sorted(folder.glob("libnvrtc-builtins.so*")):
        ctypes.CDLL(str(part), ctypes.RTLD_GLOBAL)  # the library looks for it by name only
    library = ctypes.CDLL(str(found[0]))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def include_folder() -> Path:
    """Where cuda_fp16.h is. Raises BuildError."""
    return _wheel("cuda_runtime") / "include"


@cache
def version() -> str:
    """NVRTC's version, "12.6". Raises BuildError."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_cuda(source: str, arch: str) -> tuple[bytes, bytes]:
    """CUDA C for `arch` ("sm_87", "sm_90", ...) -> (cubin, PTX as text that ends in a zero byte).

    Raises BuildError with the compiler's first error.
    """
    if not re.fullmatch(r"sm_\d{2,3}a?", arch):
        raise BuildError(f"expected an architecture such as sm_87, got {arch!r}", "nvrtc")
    library = _library()
    program = ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None))
    try:
        flags = [
            f"--gpu-architecture={arch}",
            "--std=c++17",
            "--fmad=true",
            f"--include-path={include_folder()}",
            "-default-device",
        ]
        array = (ctypes.c_char_p * len(flags))(*[flag.encode() for flag in flags])
        if library.nvrtcCompileProgram(program, len(flags), array):
            log = _text(program, "ProgramLog").rstrip(b"\0").decode("utf-8", "replace")
            errors = [line for line in log.splitlines() if "error" in line.lower()] or log.splitlines() or ["no output"]
            failure = BuildError(f"NVRTC failed for {arch}: {errors[0].strip()}", "nvrtc")
            failure.add_note(log)
            raise failure
        return _text(program, "CUBIN"), _text(program, "PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(_library()[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
    data = ctypes.create_string_buffer(size.value)
    _check(_library()[f"nvrtcGet{what}"](program, data))
    return data.raw


def _check(code: int) -> None:
    if code:
        raise BuildError(f"NVRTC: {_library().nvrtcGetErrorString(code).decode()}", "nvrtc")
