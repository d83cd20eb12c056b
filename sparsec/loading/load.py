"""load: a model file to a checked, normalized `onnx_ir.Model` at one working opset with static shapes.

All of it happens in a process of its own (`sparsec.loading.isolation`), within `Limits`: the file is untrusted, and checker,
version converter, shape inference and ONNX Runtime are C++. What comes back has been through each of them: the line of
`sparsec.loading.normalize`, then one run in ONNX Runtime.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from sparsec.errors import ModelError, SparsecError, UsageError, one_line
from sparsec.limits import DEFAULT, MEMORY_FACTOR, Limits
from sparsec.loading import isolation
from sparsec.loading.exchange import pack, unpack
from sparsec.loading.external_data import ExternalFiles
from sparsec.loading.isolation import Allowance, Worker, call
from sparsec.loading.normalize import load_here
from sparsec.loading.reading import read_proto, read_source
from sparsec.passes.normalization.fold_constants import quiet_session
from sparsec.proving.ort_session import run_once

Shapes = Mapping[str, tuple[int, ...]]


def load_model(
    source: str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model,
    shapes: Shapes | None = None,
    bind: Mapping[str, Any] | None = None,
    notes: list[str] | None = None,
    limits: Limits = DEFAULT,
) -> ir.Model:
    """The model, checked and normalized; the caller's object is left alone.

    `shapes`: input name -> full shape. `bind`: input name -> value (number, sequence, array or text such as "16000" or
    "0.5+1"), fixed as a constant. `notes` receives one line for everything a user should be told, such as a symbolic
    batch that became 1. `limits`: what the model may cost, and whether it is read in a process of its own.

    Raises ModelError (damaged, invalid, or beyond a limit), UnsupportedError (lists everything at once), UsageError
    (a shape or bound value that does not fit).
    """
    notes = notes if notes is not None else []
    if isinstance(source, ir.Model):
        source = ir.to_proto(source)
    shapes, bind = dict(shapes or {}), dict(bind or {})
    if limits.isolate and not isolation.available():
        notes.append("this system cannot read models in a process of their own: memory and time are not limited")
    elif limits.isolate:
        return _isolated(source, shapes, bind, notes, limits)
    return load_here(source, shapes, bind, notes, limits)[0]


def model_bytes(model: ir.Model) -> bytes:
    """The model as an ONNX file, the same bytes for the same model."""
    try:
        return ir.to_proto(model).SerializeToString(deterministic=True)
    except (ValueError, OverflowError) as error:
        raise ModelError("the model is above 2 GB, which one ONNX file cannot hold") from error


# ---- the process of its own


def _where(source: Any) -> str:
    return os.path.basename(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else "model"


def _isolated(
    source: str | os.PathLike[str] | bytes | onnx.ModelProto,
    shapes: dict[str, Any],
    bind: dict[str, Any],
    notes: list[str],
    limits: Limits,
) -> ir.Model:
    more = {
        "shapes": {name: _sizes(name, shape) for name, shape in shapes.items()},
        "bind": {name: _plain(value) for name, value in bind.items()},
    }
    answer, contents, files = _ask("load_task", source, more, limits)
    notes += [str(note) for note in answer.get("notes", [])]
    return unpack(contents, files)


def vet(source: str | os.PathLike[str] | bytes | onnx.ModelProto, limits: Limits = DEFAULT) -> None:
    """Raise ModelError unless a model can be read as it is and ONNX Runtime opens it; tried in a process of its own."""
    if limits.isolate:
        _ask("vet_task", source, {}, limits)


def _ask(
    task: str, source: str | os.PathLike[str] | bytes | onnx.ModelProto, more: dict[str, Any], limits: Limits
) -> tuple[dict[str, Any], list[memoryview], ExternalFiles]:
    """What a task of this module answers about `source`."""
    where, folder, path = _where(source), None, None
    parts: list[bytes] = []
    size = 0
    if isinstance(source, onnx.ModelProto):
        try:
            parts = [source.SerializeToString()]
        except ValueError as error:
            raise ModelError("above 2 GB; save it with external data and give its path", where) from error
        size = len(parts[0])
    elif isinstance(source, (bytes, bytearray, memoryview)):
        parts, size = [bytes(source)], len(source)
    elif isinstance(source, (str, os.PathLike)):
        path = os.path.abspath(os.fspath(source))
        folder = Path(path).parent
        size = os.path.getsize(path) if os.path.isfile(path) else 0
    else:
        read_source(source, limits)  # says what is wrong
    if size > limits.file_bytes:
        raise ModelError(f"{size} bytes, at most {limits.file_bytes} are read (--limit file-bytes=N)", where)
    header = {
        "path": path,
        "shown": os.fspath(source) if isinstance(source, (str, os.PathLike)) else None,
        "where": where,
        "limits": dataclasses.asdict(limits),
        **more,
    }
    allowance = Allowance(limits.memory + MEMORY_FACTOR * size, limits.seconds)
    answer, contents = call(f"sparsec.loading.load:{task}", header, parts, allowance, where)
    return answer, contents, ExternalFiles(folder, where, limits)


def load_task(worker: Worker, header: dict[str, Any], parts: list[memoryview]) -> None:
    """`load_model` for `sparsec.loading.isolation`."""
    limits = Limits(**header["limits"])
    bind = {name: value if isinstance(value, str) else _bound(value) for name, value in header["bind"].items()}
    source = header["path"] if header["path"] is not None else bytes(parts[0])
    notes: list[str] = []
    try:
        model, beside = load_here(
            source, header["shapes"], bind, notes, limits, worker.step, lambda n: worker.allow(3 * n)
        )
    except SparsecError as error:
        if error.where == header["path"] and header["shown"]:
            error.where = header["shown"]
        raise
    if not beside:
        worker.step("a run in ONNX Runtime")
        data = model_bytes(model)
        run_once(lambda: quiet_session(data))  # a crash ends this process
    worker.step("handing the model over")
    worker.answer({"notes": notes}, pack(model, beside))


def warm() -> None:
    """Load something small, so that the workers of `sparsec.loading.isolation` find everything imported."""
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    proto = onnx.helper.make_model(onnx.helper.make_graph([node], "warm", [x], [y]))
    data = model_bytes(load_here(proto, {}, {}, [])[0])
    run_once(lambda: quiet_session(data))


def vet_task(worker: Worker, header: dict[str, Any], parts: list[memoryview]) -> None:
    """`vet` for `sparsec.loading.isolation`."""
    source = header["path"] if header["path"] is not None else bytes(parts[0])
    worker.step("reading and checking the file")
    proto = read_proto(source, Limits(**header["limits"]), lambda n: worker.allow(3 * n))
    worker.step("ONNX Runtime")
    try:
        quiet_session(proto.SerializeToString())
    except MemoryError:
        raise
    except Exception as error:
        raise ModelError(f"ONNX Runtime does not load it: {one_line(error)}", header["where"]) from error
    worker.answer({})


def _bound(value: Any) -> Any:
    dtype, numbers = value
    return np.array(numbers, dtype) if isinstance(numbers, list) else np.dtype(dtype).type(numbers).item()


def _plain(value: Any) -> Any:
    """A bound value in JSON: text as it is, numbers with their type; what is neither as text, to be refused."""
    if isinstance(value, str):
        return value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        return repr(value)
    return [array.dtype.str, array.tolist()] if array.dtype.kind in "biuf" else repr(value)


def _sizes(name: str, shape: Any) -> list[int]:
    try:
        return [int(d) for d in shape]
    except (TypeError, ValueError) as error:
        raise UsageError(f"expected a list of numbers, got {shape!r}", f"--shape {name}") from error
