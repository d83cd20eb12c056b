"""ONNX Runtime in this process: a model is opened here after it has been opened, and run once, in a process of its own.

ONNX Runtime is C++: a fault in a fusion or a kernel ends the process, and no `except` sees it. So a graph that was not
seen before is tried by a worker of `sparsec.loading.isolation`, within the limits of loading. If the worker crashes, the graph
is tried without optimizations, which leaves out the fusions, and is opened like that if it holds; else it is a ModelError.
What ONNX Runtime refuses with optimizations alone is opened without them as well.
Once a graph: models that differ in their weights alone (trials of a search) count as one.

    with limited(limits): ...        the limits that hold; `Limits(isolate=0)` tries nothing

What a trial cannot foresee is a fault that only some inputs or weights reach: it runs on ones, like the loader.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from sparsec.limits import DEFAULT, MEMORY_FACTOR, Limits
from sparsec.loading import isolation
from sparsec.loading.isolation import Allowance, Crashed, Worker, call
from sparsec.ports import numpy_type
from sparsec.proving.ort_faults import left_out

SERVER = "sparsec.loading.load"  # trials share the server that models are loaded by
# Left alone, ONNX Runtime rounds what a MatMul with grouped integer weights reads to 8 bits: the model does not say so.
FLOAT_ACTIVATIONS = {"session.qdq_matmulnbits_accuracy_level": "1"}
SMALL = 64  # bytes of whole numbers that may decide what a graph does: shapes, axes
_REAL = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)

_limits: ContextVar[Limits] = ContextVar("limits", default=DEFAULT)
_lock = threading.Lock()
_held: dict[bytes, bool] = {}  # graphs that held: with optimizations, or only without


# Of a model.onnx that was tried under its user's limits when it was compiled: what hangs ends, what is large runs.
OF_ARTIFACTS = Limits(memory=1 << 36, seconds=3600)


@contextlib.contextmanager
def limited_as_artifact() -> Iterator[None]:
    """What trials of an artifact's own model may use, unless `limited` says otherwise already."""
    with limited(OF_ARTIFACTS if _limits.get() is DEFAULT else _limits.get()):
        yield


@contextlib.contextmanager
def limited(limits: Limits) -> Iterator[None]:
    """What trials may use, in this thread and in those that copy its context."""
    token = _limits.set(limits)
    try:
        yield
    finally:
        _limits.reset(token)


def open_session(
    model: bytes | onnx.ModelProto | str | Path,
    *,
    threads: int = 1,
    optimize: bool = True,
    entries: Mapping[str, str] | None = None,
    where: str = "model",
) -> ort.InferenceSession:
    """A session on the CPU without log output, that may use `threads` threads inside an operator.

    model: a protobuf, its bytes, or the path of a file. entries: further configuration. Raises ModelError about `where` if
    ONNX Runtime crashes, hangs or takes too much memory; what it raises itself if it refuses the model.
    """
    source, proto = _source(model)
    if proto is not None:
        optimize = _tried(source, proto, optimize, where)
    try:
        return _open(source, proto, threads, optimize, entries)
    except Exception:  # pybind classes without a common base
        if optimize and proto is not None:  # an optimization that makes an invalid graph of a valid one is refused too
            with contextlib.suppress(Exception):
                _tried(source, proto, False, where)
                return _open(source, proto, threads, False, entries)
        raise


def _open(
    source: bytes | str,
    proto: onnx.ModelProto | None,
    threads: int,
    optimize: bool,
    entries: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    for key, value in {**FLOAT_ACTIVATIONS, **(entries or {})}.items():
        options.add_session_config_entry(key, value)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    disabled = left_out(proto) if optimize and proto is not None else []
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)


def _source(model: bytes | onnx.ModelProto | str | Path) -> tuple[bytes | str, onnx.ModelProto | None]:
    """What ONNX Runtime is given, and the graph; None if it cannot be read, which ONNX Runtime will say."""
    if isinstance(model, onnx.ModelProto):
        return model.SerializeToString(), model
    source = model if isinstance(model, bytes) else os.path.abspath(model)
    try:
        if isinstance(source, bytes):
            return source, onnx.ModelProto.FromString(source)
        return source, onnx.load(source, load_external_data=False)
    except Exception:  # protobuf's errors and the system's
        return source, None


# ---- trials


def _tried(source: bytes | str, proto: onnx.ModelProto, optimize: bool, where: str) -> bool:
    """Whether to optimize: as asked if that holds, else not."""
    limits = _limits.get()
    if not (limits.isolate and isolation.available()):
        return optimize
    key = _structure(proto, optimize)
    with _lock:
        if key not in _held:
            _held[key] = _holds(source, proto, optimize, limits, where)
        return _held[key]


def _holds(source: bytes | str, proto: onnx.ModelProto, optimize: bool, limits: Limits, where: str) -> bool:
    if optimize:
        with contextlib.suppress(Crashed):
            _try(source, proto, True, limits, where)
            return True
    _try(source, proto, False, limits, where)
    return False


def _try(source: bytes | str, proto: onnx.ModelProto, optimize: bool, limits: Limits, where: str) -> None:
    size = len(source) if isinstance(source, bytes) else _stored_bytes(source, proto)
    header = {"path": None if isinstance(source, bytes) else source, "optimize": optimize, "where": where}
    allowance = Allowance(limits.memory + MEMORY_FACTOR * size, limits.seconds)
    parts = [source] if isinstance(source, bytes) else []
    call(f"{__name__}:trial_task", header, parts, allowance, where, server=SERVER)


def _stored_bytes(path: str, proto: onnx.ModelProto) -> int:
    """Of the file and of those that hold its weights."""
    names = {entry.value for t in proto.graph.initializer for entry in t.external_data if entry.key == "location"}
    total = 0
    for file in (path, *(os.path.join(os.path.dirname(path), name) for name in names)):
        with contextlib.suppress(OSError):
            total += os.path.getsize(file)
    return total


def _structure(proto: onnx.ModelProto, optimize: bool) -> bytes:
    """A digest of everything but real numbers and the contents of large initializers."""
    digest = hashlib.blake2b(bytes([optimize]), digest_size=20)

    def add(message: Any) -> None:
        data = message.SerializeToString(deterministic=True)
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)

    graph = proto.graph
    lists = (
        proto.opset_import, proto.functions, graph.node, graph.input, graph.output, graph.value_info, graph.sparse_initializer
    )  # fmt: skip
    for messages in lists:
        digest.update(len(messages).to_bytes(8, "little"))
        for message in messages:
            add(message)
    for tensor in graph.initializer:
        if tensor.data_type in _REAL or len(tensor.raw_data) > SMALL:
            tensor = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        add(tensor)
    return digest.digest()


def trial_task(worker: Worker, header: dict[str, Any], parts: list[memoryview]) -> None:
    """Open and run a model once on ones, for `sparsec.loading.isolation`; that ONNX Runtime refuses it is no fault here."""
    source, proto = _source(bytes(parts[0]) if header["path"] is None else header["path"])
    how = "ONNX Runtime" if header["optimize"] else "ONNX Runtime, with all of its optimizations off,"
    worker.step(how)
    run_once(lambda: _open(source, proto, 1, header["optimize"]))
    worker.answer({})


def run_once(make: Callable[[], ort.InferenceSession]) -> None:
    """Make a session and run it on ones (whole numbers divided by zero ended the process), open dimensions 1.

    What ONNX Runtime refuses is no fault here. Raises MemoryError where it got none.
    """
    try:
        session = make()
        shapes = {x.name: [d if isinstance(d, int) else 1 for d in x.shape] for x in session.get_inputs()}
        session.run(None, {x.name: np.ones(shapes[x.name], numpy_type(x.type)) for x in session.get_inputs()})
    except MemoryError:
        raise
    except Exception as error:
        if "bad_alloc" in str(error) or "Failed to allocate memory" in str(error):
            raise MemoryError from error


__all__ = ["limited", "limited_as_artifact", "open_session", "run_once"]
