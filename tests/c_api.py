"""libmodel.so through ctypes, nothing in between: what tests of the C API call."""

from __future__ import annotations

import atexit
import ctypes
import itertools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import hand_programs
import numpy as np

from sparsec.building.build import build, pack_parity
from sparsec.program import Program
from sparsec.targets import find_target

OK, BAD_ARGUMENT, BAD_WEIGHTS, VERSION, CPU_FEATURE, NO_MEMORY, IO = 0, -1, -2, -3, -4, -5, -6
FUNCTIONS = (
    "open", "open_file", "run", "close", "input_count", "output_count", "input_info", "output_info", "arena_bytes",
    "error_string", "version", "features_needed",
)  # fmt: skip

FN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32)
PARALLEL_FOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, FN, ctypes.c_int32)


class Options(ctypes.Structure):
    """sparsec_options."""

    _fields_ = (
        ("arena", ctypes.c_void_p),
        ("arena_bytes", ctypes.c_size_t),
        ("threads", ctypes.c_int32),
        ("parallel_for", PARALLEL_FOR),
        ("parallel_data", ctypes.c_void_p),
    )


class TensorInfo(ctypes.Structure):
    """sparsec_tensor_info."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 8),
        ("bytes", ctypes.c_size_t),
        ("scale", ctypes.c_float),
        ("zero_point", ctypes.c_int32),
    )


class Library:
    """A loaded libmodel.so."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        self.c.sparsec_error_string.restype = ctypes.c_char_p
        self.c.sparsec_version.restype = ctypes.c_char_p
        self.c.sparsec_features_needed.restype = ctypes.c_char_p
        self.c.sparsec_arena_bytes.restype = ctypes.c_size_t
        self.c.sparsec_open.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
        self.c.sparsec_close.argtypes = [ctypes.c_void_p]
        self.c.sparsec_run.argtypes = [ctypes.c_void_p] * 3

    def open(self, weights: bytes | ctypes.Array | None, options: Options | None = None) -> tuple[int, Model | None]:
        """(code, model) over weights in memory, wherever Python put them."""
        handle = ctypes.c_void_p(1)
        size = len(weights) if weights is not None else 0
        code = self.c.sparsec_open(weights, size, options and ctypes.byref(options), ctypes.byref(handle))
        return code, self._model(code, handle, (weights, options))

    def open_file(self, path: Path, options: Options | None = None) -> tuple[int, Model | None]:
        """(code, model) over a weights file."""
        handle = ctypes.c_void_p(1)
        path_bytes = str(path).encode()
        code = self.c.sparsec_open_file(path_bytes, options and ctypes.byref(options), ctypes.byref(handle))
        return code, self._model(code, handle, options)

    def _model(self, code: int, handle: ctypes.c_void_p, keep: object) -> Model | None:
        assert (code == OK) == bool(handle.value), "the model pointer is set exactly on success"
        return Model(self, handle, keep) if code == OK else None


class Model:
    """An opened instance; closes itself in a `with`."""

    def __init__(self, library: Library, handle: ctypes.c_void_p, keep: object) -> None:
        self.library, self.handle, self._keep = library, handle, keep

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.library.c.sparsec_close(self.handle)

    def run(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> int:
        """sparsec_run over the arrays' memory."""

        def pointers(arrays: Sequence[np.ndarray]) -> ctypes.Array:
            return (ctypes.c_void_p * len(arrays))(*[a.ctypes.data for a in arrays])

        return self.library.c.sparsec_run(self.handle, pointers(inputs), pointers(outputs))

    def __call__(self, x: np.ndarray) -> list[np.ndarray]:
        """Outputs of `hand_programs.program` for `x`."""
        y = np.full(x.shape, np.nan, np.float32)
        row = np.full(x.shape[1], np.nan, np.float32)
        assert self.run([x], [y, row]) == OK
        return [y, row]


def parallel_for(body: Callable[[ctypes.c_void_p, Callable[[ctypes.c_void_p, int], None], int], None]) -> object:
    """`body` as the options' parallel_for."""
    return PARALLEL_FOR(body)


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="sparsec-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


_count = itertools.count()


def build_program(program: Program, **options: object) -> Path:
    """A folder of its own with what `build` makes and, for `hand_programs.program`, a parity.bin."""
    folder = _folder() / str(next(_count))
    folder.mkdir()
    build(program, folder, **options)  # type: ignore[arg-type]
    if len(program.outputs) == 2:
        x = hand_programs.sample()
        (folder / "parity.bin").write_bytes(pack_parity([x], hand_programs.reference(program, x), [1e-6, 0.0]))
    return folder


@cache
def built(target: str = "host", os: str | None = None, seed: int = 0) -> Path:
    """`hand_programs.program` for a target, built once. Do not write into it."""
    return build_program(hand_programs.program(find_target(target, os=os), seed))


@cache
def library(seed: int = 0) -> Library:
    """The host's libmodel.so, loaded."""
    return Library(built(seed=seed) / "libmodel.so")
