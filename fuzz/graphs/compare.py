"""A model through the compiler, against ONNX Runtime.

    loaded    = ONNX Runtime on the model as it was drawn     what upgrading, folding and normalizing made of it
    compiled  = ONNX Runtime on the rewritten model           what passes left to lowering and kernels

Real numbers: |difference| <= T max|y| + 8 W. T is derived from the lengths of the sums (`sparsec.proving.tolerance`). W is how far
ONNX Runtime's own y moves when its inputs move by one unit in the last place (where sums cancel, no implementation can do
better) and, for float16, how far it lies from the same model in float32.

Behind a QuantizeLinear the law of `sparsec.proving.rounding` holds, as in `sparsec verify`. Whole numbers are equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotImplementedByOrt

from fuzz.graphs.draft import F16, random_array
from sparsec.errors import RecipeError, UnsupportedError
from sparsec.inprocess import InProcess
from sparsec.limits import Limits
from sparsec.loading.load import load_model, model_bytes
from sparsec.lowering import lower
from sparsec.passes.normalization.fold_constants import quiet_session
from sparsec.passes.normalization.widen import Widen
from sparsec.passes.quantization.ports import QuantizedPorts
from sparsec.ports import input_spec
from sparsec.proving.conditioning import Conditioning
from sparsec.proving.rounding import Rounding, allowed_count, beyond, rounding
from sparsec.proving.tolerance import behind_half, floors, for_sample, tolerances
from sparsec.rewriting.pipeline import run_passes
from sparsec.targets import find_target

Arrays = dict[str, np.ndarray]

LIMITS = Limits(isolate=0)  # a process of its own costs a second each time; what the generator writes is not hostile
SAMPLES = 4
PORTS = {QuantizedPorts.name: QuantizedPorts()}  # what `compile --io quantized` runs, no pass by name
HALF_LARGEST = float(np.finfo(F16).max)


class Mismatch(AssertionError):
    """A result that rounding does not explain."""


def compare(model: onnx.ModelProto, passes: tuple[str, ...], counts: Counter[str], seed: int = 0) -> None:
    """Compile, run, compare. Raises Mismatch; counts what passes and lowering declined."""
    rng = np.random.default_rng(seed)
    target = find_target("host")
    try:
        loaded = load_model(model, limits=LIMITS)
    except UnsupportedError as error:
        counts[f"refused: {_short(error)}"] += 1
        return
    first = _Reference(model_bytes(loaded))
    feeds = first.random_feeds(rng)
    try:
        wanted = first.run(feeds)
    except NotImplementedByOrt as error:
        counts[f"ONNX Runtime: {_short(error)}"] += 1
        return
    first.check("loaded", quiet_run(model.SerializeToString(), feeds), wanted, feeds, rng, loaded, target, counts)
    samples = {name: _samples(rng, a) for name, a in feeds.items()}
    changed = False
    for spec in passes:
        before = model_bytes(loaded)
        try:
            loaded, _ = run_passes(loaded, (PORTS.get(spec, spec),), calibration=samples, target=target)
            counts[f"pass {spec.partition(':')[0]}"] += 1
            changed = True
        except RecipeError as error:
            if error.message.startswith(("failed with", "unknown")):  # another exception; a pass that is none
                raise
            counts[f"pass {spec.partition(':')[0]} found nothing to do"] += 1
            loaded = ir.from_proto(onnx.load_model_from_string(before))
    try:
        program = lower(loaded, target, "fuzz")
    except UnsupportedError as error:
        counts[f"refused: {_short(error)}"] += 1
        return
    reference = _Reference(model_bytes(loaded)) if changed else first
    feeds = {
        t.name: feeds[t.name] if feeds[t.name].dtype == np.dtype(t.dtype) else _like(rng, t) for t in program.inputs
    }
    reference.check("compiled", InProcess(program).run(feeds), reference.run(feeds), feeds, rng, loaded, target, counts)
    counts["outputs"] += len(program.outputs)


def _short(error: Exception) -> str:
    return str(error)[:70]


def _like(rng: np.random.Generator, tensor: Any) -> np.ndarray:
    return random_array(rng, tensor.shape, np.dtype(tensor.dtype))


def _samples(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    """`array` and more like it; a first dimension of 1 counts samples."""
    more = [array, *(random_array(rng, array.shape, array.dtype) for _ in range(SAMPLES - 1))]
    return np.concatenate(more) if array.shape[:1] == (1,) else np.stack(more)


def quiet_run(data: bytes, feeds: Mapping[str, np.ndarray]) -> Arrays:
    """Outputs of ONNX Runtime, node by node."""
    session = quiet_session(data)
    names = [y.name for y in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


class _Reference:
    """A model in ONNX Runtime, and how far a correct result may lie from it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.law: Rounding | None = rounding(data)
        self.half = behind_half(ir.from_proto(onnx.load_model_from_string(data)).graph.outputs)

    def random_feeds(self, rng: np.random.Generator) -> Arrays:
        """Numbers for every input."""
        model = ir.from_proto(onnx.load_model_from_string(self.data))
        specs = [input_spec(v) for v in model.graph.inputs]
        return {s.name: random_array(rng, tuple(s.shape), np.dtype(s.dtype)) for s in specs}

    def run(self, feeds: Arrays) -> Arrays:
        """ONNX Runtime's outputs."""
        return quiet_run(self.data, feeds)

    def check(
        self, what: str, got: Arrays, wanted: Arrays, feeds: Arrays, rng: np.random.Generator, model: ir.Model, target: Any,
        counts: Counter[str],
    ) -> None:  # fmt: skip
        """Raises Mismatch. `what` was computed, and gave `got`."""
        slack = self._slack(feeds, wanted, rng)
        wide = self._widened(feeds) if self.half else {}
        relative, absolute = tolerances(model, target), floors(model)
        for name, y in wanted.items():
            z = got[name]
            if y.shape != z.shape or y.dtype != z.dtype:
                raise Mismatch(f"{what} {name}: expected {y.dtype}{list(y.shape)}, got {z.dtype}{list(z.shape)}")
            if self.law is not None and name in self.law.outputs:
                counts[f"{what} behind a QuantizeLinear"] += 1
                self._check_rounded(what, name, z, wanted, feeds)
            elif y.dtype.kind != "f":
                if not np.array_equal(y, z):
                    raise Mismatch(f"{what} {name}: {int((y != z).sum())} of {y.size} {y.dtype} differ")
            else:
                moved = 8 * slack[name]
                if name in self.half:
                    counts[f"{what} behind float16"] += 1
                    moved += 8 * _apart(wide[name], y)
                    if _overflows(wide[name]):
                        counts[f"{what} beyond float16"] += 1
                        continue
                allowed = for_sample(relative[name], absolute.get(name, 0.0), y)
                try:
                    _check_real(f"{what} {name}", y, z, allowed, moved)
                except Mismatch:  # sums that cancel, as `sparsec.proving.parity` has it
                    bound = Conditioning(self.data).bounds(feeds)[name]
                    _check_real(f"{what} {name}", y, z, allowed, max(moved, bound if np.isfinite(bound) else 0.0))
                    counts[f"{what} where sums cancel"] += 1

    def _slack(self, feeds: Arrays, wanted: Arrays, rng: np.random.Generator) -> dict[str, float]:
        """How far each output moves when the inputs do by a unit in the last place."""
        found = dict.fromkeys(wanted, 0.0)
        session = quiet_session(self.data)
        for sign in (1, -1):
            moved = {name: _moved(a, rng, sign) for name, a in feeds.items()}
            for name, y in zip(wanted, session.run(list(wanted), moved), strict=True):
                if y.dtype.kind == "f":
                    found[name] = max(found[name], _apart(y, wanted[name]))
        return found

    def _widened(self, feeds: Arrays) -> Arrays:
        """The outputs in float32, from the same inputs."""
        model = ir.from_proto(onnx.load_model_from_string(self.data))
        try:
            model = Widen()(model).model
        except RecipeError:  # nothing but the ends is in float16
            return self.run(feeds)
        for i, value in enumerate(model.graph.outputs):  # what is rounded at the end is not yet
            node = value.producer()
            if (
                str(value.name) in self.half
                and node is not None
                and node.op_type == "Cast"
                and value.dtype == ir.DataType.FLOAT16
            ):
                before = node.inputs[0]
                assert before is not None
                node.replace_input_with(0, before)
                node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
                model.graph.outputs[i].dtype = ir.DataType.FLOAT
        return quiet_run(ir.to_proto(model).SerializeToString(), feeds)

    def _check_rounded(self, what: str, name: str, got: np.ndarray, wanted: Arrays, feeds: Arrays) -> None:
        assert self.law is not None
        y = wanted[name]
        bad = ~np.isfinite(y) if y.dtype.kind == "f" else np.zeros(y.shape, bool)
        if bad.any():
            if not np.array_equal(got[bad], y[bad], equal_nan=True):
                raise Mismatch(f"{what} {name}: what is not finite differs")
            return
        furthest = float(np.abs(got.astype(np.float64) - y.astype(np.float64)).max(initial=0))
        if not furthest:
            return
        step = self.law.step(name, feeds)
        off, witnessed = beyond(got, y, step), beyond(self.law.witness(feeds)[name], y, step)
        if off > allowed_count(y.size, witnessed):
            raise Mismatch(
                f"{what} {name}: {off} of {y.size} differ by more than a step of {step:.3g}, {witnessed} may"
            )
        bound = 1.001 * self.law.bounds(feeds, wanted)[name]
        if furthest > bound:
            raise Mismatch(
                f"{what} {name}: differs by {furthest:.3g}, {furthest / step:.3g} steps, allowed {bound:.3g}"
            )


def _check_real(what: str, y: np.ndarray, z: np.ndarray, relative: float, moved: float) -> None:
    finite = np.isfinite(y)
    if not np.array_equal(y[~finite], z[~finite], equal_nan=True):
        raise Mismatch(f"{what}: what is not finite differs")
    error = _apart(z, y)
    limit = relative * float(np.abs(y[finite].astype(np.float64)).max(initial=0)) + moved + 1e-37
    if not error <= limit:
        raise Mismatch(f"{what}: differs by {error:.3g}, allowed {limit:.3g}")


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, where the second is finite."""
    finite = np.isfinite(b)
    return float(np.abs(a[finite].astype(np.float64) - b[finite].astype(np.float64)).max(initial=0))


def _overflows(wide: np.ndarray) -> bool:
    return bool((np.abs(wide[np.isfinite(wide)]) > HALF_LARGEST / 2).any())


def _moved(array: np.ndarray, rng: np.random.Generator, sign: int) -> np.ndarray:
    if array.dtype.kind != "f":
        return array
    directions = np.asarray(sign * np.inf * rng.choice((-1.0, 1.0), array.shape), array.dtype)
    return np.asarray(np.nextafter(array, directions), array.dtype).reshape(array.shape)
