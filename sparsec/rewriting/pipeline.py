"""rewrite: run passes in the recipe's order. After each the model is checked, loads in ONNX Runtime, and where the pass
claims equal outputs they are compared; each step can be written to a folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import PassResult

from sparsec.data import load_data
from sparsec.errors import CheckError, ModelError, RecipeError, SparsecError, UsageError, one_line
from sparsec.loading.exchange import large, without_data
from sparsec.loading.load import model_bytes
from sparsec.loading.saving import fits_one_file, save_model
from sparsec.ports import input_spec
from sparsec.proving.ort_session import open_session
from sparsec.proving.rounding import Rounding, allowed_count, beyond, rounding
from sparsec.proving.tolerance import derive_tolerance
from sparsec.rewriting.pass_specs import PassStep, as_step
from sparsec.rewriting.passes_api import META_KEY, Context, Price, Progress, Samples

# Folding rounds each weight once more, u * sqrt(3 k) not the u * sqrt(2 k) of two implementations (tolerance.py),
# and values inside the model may be larger than its outputs.
ROUNDED_AGAIN = 2.0


def run_passes(
    model: ir.Model,
    passes: Iterable[Any],
    *,
    calibration: Samples | Mapping[str, np.ndarray] | None = None,
    target: Any = None,
    dump: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    price: Price | None = None,
) -> tuple[ir.Model, list[dict[str, Any]]]:
    """`model` after `passes` (steps, specs, pass objects or classes), and one JSON-able record a pass.

    In-place passes change `model` itself. `calibration`: samples, or arrays [N, ...] by input name. `price`: what a
    layer costs on the target (`Context.price`). `dump`: a folder that receives `10-load.onnx`, `20-NAME.onnx`, ...; a
    step that changed nothing leaves `20-NAME.unchanged.txt`. Raises RecipeError if a pass finds nothing to do or fails,
    CheckError if a pass breaks the model or a promise of equal outputs.
    """
    steps = [as_step(item) for item in passes]
    if isinstance(calibration, Mapping):
        calibration = load_data(calibration, [input_spec(value) for value in model.graph.inputs])
    folder = _dump_folder(dump)
    data = _snapshot(model)
    _write(folder, "10-load.onnx", model, data)
    records = []
    original, equal = data.content, True
    for index, step in enumerate(steps):
        if progress is not None:
            progress(step.name, index, len(steps))
        model, record = _run(model, step, Context(calibration, target, progress, original=original, price=price))
        after = _snapshot(model)
        record["modified"] = after != data
        stem = f"{10 * (index + 2)}-{step.name}"
        if after == data:
            _write_text(folder, f"{stem}.unchanged.txt", f"{step.name} changed nothing\n")
        else:
            _check(model, after.content, step)
            if step.exact and data.content is not None and after.content is not None:
                record["max_relative_error"] = check_equal(data.content, after.content, step.name, calibration)
            _write(folder, f"{stem}.onnx", model, after)
        data = after
        equal = equal and (step.exact or not record["modified"])
        original = after.content if equal else original
        records.append(record)
    if progress is not None and steps:
        progress("rewrite", len(steps), len(steps))
    return model, records


def _run(model: ir.Model, step: PassStep, context: Context) -> tuple[ir.Model, dict[str, Any]]:
    where = f"pass {step.name}"
    model.meta[META_KEY] = context
    try:
        result = step.run(model)
    except RecipeError as error:
        if error.where:
            raise
        raise RecipeError(error.message, where) from error
    except SparsecError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        if isinstance(cause, SparsecError):
            raise cause from error
        raise RecipeError(f"failed with {type(cause).__name__}: {one_line(cause)} ({step.origin})", where) from error
    finally:
        model.meta.pop(META_KEY, None)
    assert isinstance(result, PassResult)
    result.model.meta.pop(META_KEY, None)
    record = {"name": step.name, "origin": step.origin, "version": step.version, "options": step.options}
    return result.model, {**record, "details": context.records}


@dataclass(frozen=True)
class _Snapshot:
    """What a model is, to see whether a pass changed it."""

    content: bytes | None  # None: above 2 GB
    outline: bytes = b""  # then: all but the large tensors, and digests of these
    digests: tuple[bytes, ...] = ()


def _snapshot(model: ir.Model) -> _Snapshot:
    if fits_one_file(model):
        return _Snapshot(model_bytes(model))
    return _Snapshot(None, without_data(model).SerializeToString(deterministic=True), tuple(_digests(model)))


def _digests(model: ir.Model) -> Iterable[bytes]:
    for value in model.graph.initializers.values():
        if large(value):
            assert value.const_value is not None
            array = np.ascontiguousarray(value.const_value.numpy())
            yield hashlib.blake2b(array.reshape(-1).view(np.uint8).data).digest()


def _check(model: ir.Model, data: bytes | None, step: PassStep) -> None:
    where = f"pass {step.name}"
    try:
        onnx.checker.check_model(without_data(model) if data is None else data, full_check=True)
    except Exception as error:
        raise CheckError(f"left an invalid ONNX model: {one_line(error)} ({step.origin})", where) from error
    if data is None:  # more than a session can be given
        return
    try:
        open_session(data, optimize=False, where=where)
    except ModelError as error:
        raise CheckError(f"left a model that cannot be tried: {error.message} ({step.origin})", where) from error
    except SparsecError:
        raise
    except Exception as error:
        raise CheckError(
            f"left a model that ONNX Runtime does not load: {one_line(error)} ({step.origin})", where
        ) from error


# ---- equality


def sample_inputs(session: Any, calibration: Samples | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """One sample: the first of the calibration data where it fits, else normal (floats) or small (integers) numbers."""
    rng = np.random.default_rng(seed)
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
    first = {} if calibration is None else next(iter(calibration), {})
    feeds = {}
    for x in session.get_inputs():
        shape = [d if isinstance(d, int) else 1 for d in x.shape]
        given = first.get(x.name)
        if given is not None and np.asarray(given).size == np.prod(shape, dtype=np.int64):
            feeds[x.name] = np.asarray(given.reshape(shape), order="C")
        elif x.type in types:
            feeds[x.name] = rng.standard_normal(shape).astype(types[x.type])
        elif x.type == "tensor(bool)":
            feeds[x.name] = rng.integers(0, 2, shape).astype(bool)
        else:
            feeds[x.name] = rng.integers(0, 2, shape).astype(x.type[len("tensor(") : -1])
    return feeds


def check_equal(before: bytes, after: bytes, name: str, calibration: Samples | None = None) -> float:
    """Largest relative error of any output, ONNX Runtime on both models; CheckError if rounding does not explain it.

    An output that a QuantizeLinear of `before` reaches may differ as `sparsec.proving.rounding` says.
    """
    first, second = (open_session(data, optimize=False, where=f"pass {name}") for data in (before, after))
    signature = [[(x.name, x.shape, x.type) for x in s.get_inputs()] for s in (first, second)]
    names = [[y.name for y in s.get_outputs()] for s in (first, second)]
    if signature[0] != signature[1] or names[0] != names[1]:
        raise CheckError("claims equal outputs but changed the model's inputs or outputs", f"pass {name}")
    feeds = sample_inputs(first, calibration)
    limit, worst = ROUNDED_AGAIN * derive_tolerance(ir.from_proto(onnx.load_model_from_string(before))), 0.0
    law = rounding(before)
    for output, a, b in zip(names[0], first.run(None, feeds), second.run(None, feeds), strict=True):
        error = relative_error(a, b)
        if law is not None and output in law.outputs and error > limit:
            worst = max(worst, _check_steps(law, output, feeds, a, b, name))
        elif not error <= limit:
            text = f"output {output!r} differs by {error:.3g}, rounding explains {limit:.3g} (relative to max |output|)"
            raise CheckError(f"claims equal outputs: {text}", f"pass {name}")
        else:
            worst = max(worst, error)
    return worst


def _check_steps(
    law: Rounding, output: str, feeds: Mapping[str, np.ndarray], a: np.ndarray, b: np.ndarray, name: str
) -> float:
    """The relative error, which quantization steps must explain."""
    error = relative_error(a, b)
    if not np.isfinite(error):
        raise CheckError(f"claims equal outputs: output {output!r} has another shape, type or range", f"pass {name}")
    step, bound = law.step(output, feeds), law.bounds(feeds)[output]
    most = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0))
    count = beyond(b, a, step)
    allowed = allowed_count(a.size, beyond(law.witness(feeds)[output], a, step))
    if most > bound or count > allowed:
        text = (
            f"output {output!r} differs by {most:.3g}, at {count} of {a.size} elements by more than a quantization step"
        )
        raise CheckError(f"claims equal outputs: {text} ({step:.3g}); rounding explains {bound:.3g}", f"pass {name}")
    return error


def relative_error(reference: np.ndarray, other: np.ndarray) -> float:
    """max |difference| / max |reference|; infinite for shapes, types or non-finite values that do not match."""
    if reference.shape != other.shape or reference.dtype != other.dtype:
        return float("inf")
    if not reference.size:
        return 0.0
    a, b = reference.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return float("inf")
    difference = float(np.abs(a - b, where=finite, out=np.zeros(a.shape)).max(initial=0.0))
    scale = float(np.abs(a[finite]).max(initial=0.0))
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))


# ---- dump


def _dump_folder(dump: str | os.PathLike[str] | None) -> Path | None:
    if dump is None:
        return None
    folder = Path(dump)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror}", "--dump") from error
    return folder


def _write(folder: Path | None, name: str, model: ir.Model, data: _Snapshot) -> None:
    if folder is None:
        return
    try:
        if data.content is None:
            save_model(model, folder / name, overwrite=True)
        else:
            (folder / name).write_bytes(data.content)
    except OSError as error:
        raise UsageError(f"cannot write {folder / name}: {error.strerror}", "--dump") from error


def _write_text(folder: Path | None, name: str, text: str) -> None:
    if folder is None:
        return
    try:
        (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {folder / name}: {error.strerror}", "--dump") from error
