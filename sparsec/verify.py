"""Proof of an artifact: parity with ONNX Runtime, fidelity to the original model, accuracy on labels.

Relative error of an output is max |difference| / max |reference|, taken for each sample; the worst sample counts.
The tolerance is derived from the model (`sparsec.tolerance`) when it is compiled and kept in the manifest. For an output
that a QuantizeLinear reaches it is derived from the model and the sample, and nearly all elements must be within one
quantization step (`sparsec.rounding`).
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsec.data import Data, load_data
from sparsec.errors import ArtifactError, DataError
from sparsec.images import Images
from sparsec.ports import InputSpec
from sparsec.rounding import Rounding, allowed_count, beyond, rounding
from sparsec.tolerance import derive_tolerance, floors, for_sample, tolerances

__all__ = [
    "Parity", "Verification", "derive_tolerance", "errors", "parity_sample", "print_verification", "random_sample",
    "read_parity", "tolerances", "verify",
]  # fmt: skip

if TYPE_CHECKING:
    import onnx
    import onnx_ir
    from rich.console import Console

    from sparsec.artifact import Artifact
    from sparsec.runtimes.base import Arrays
    from sparsec.runtimes.ort import OrtSession

    Source = str | Path | Mapping[str, np.ndarray] | Images
    Against = str | Path | bytes | onnx.ModelProto | onnx_ir.Model

RANDOM_SAMPLES = 4  # besides the parity sample, where there is no data
SNR_CAP = 200.0  # dB; equal arrays have no noise, and JSON no infinity
_SEED = 20240229


# --- one sample -----------------------------------------------------------------------------------------------------


def random_sample(inputs: Sequence[InputSpec], seed: int = _SEED) -> Arrays:
    """Standard normal values for floating-point and quantized inputs, random 0 and 1 for others; a pure function of the seed."""
    rng = np.random.default_rng(seed)
    sample = {}
    for spec in inputs:
        dtype = np.dtype(spec.dtype)
        values = rng.standard_normal(spec.shape) if _real(spec) else rng.integers(0, 2, spec.shape)
        sample[spec.name] = np.asarray(spec.stored(np.asarray(values))).astype(dtype)
    return sample


def _real(spec: InputSpec) -> bool:
    """Whether an input stands for real numbers."""
    return np.dtype(spec.dtype).kind == "f" or spec.quantization is not None


def parity_sample(
    model_bytes: bytes, inputs: Sequence[InputSpec], data: Data | None = None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Inputs and ONNX Runtime's outputs in signature order for parity.bin: the first sample of `data`, or random."""
    from sparsec.runtimes.ort import OrtSession

    sample = next(iter(data)) if data is not None else random_sample(inputs)
    sample = {spec.name: spec.stored(sample[spec.name]) for spec in inputs}
    with OrtSession(model_bytes, where="model.onnx") as session:
        outputs = session.run(sample)
    return [sample[spec.name] for spec in inputs], list(outputs.values())


def rounding_tolerances(
    model_bytes: bytes, inputs: Sequence[InputSpec], sample: Sequence[np.ndarray], expected: Sequence[np.ndarray]
) -> dict[str, float]:
    """Of the outputs that a QuantizeLinear reaches: the relative tolerance in this one sample, in signature order."""
    law = rounding(model_bytes)
    if law is None:
        return {}
    by_name = dict(zip(law.signature, expected, strict=True))
    bounds = law.bounds({spec.name: array for spec, array in zip(inputs, sample, strict=True)}, by_name)
    return {name: min(relative_bound(bound, by_name[name]), 1e30) for name, bound in bounds.items()}


def read_parity(artifact: Artifact) -> Arrays:
    """The inputs in parity.bin."""
    from sparsec.emit import HEADER_BYTES, PARITY_FORMAT
    from sparsec.runtimes.batch import decode, tensor_bytes

    where = str(artifact.path / "parity.bin")
    ins, outs, count = tensor_bytes(artifact.inputs), tensor_bytes(artifact.outputs), len(artifact.outputs)
    start = HEADER_BYTES + 4 * count
    try:
        with open(where, "rb") as file:
            raw = file.read(start + ins + outs + 1)
    except OSError as error:
        raise ArtifactError(f"cannot read: {error.strerror}; compile the model again", where) from error
    head = struct.pack("<8sIIQQ", b"SPARSECP", PARITY_FORMAT, count, ins, outs).ljust(HEADER_BYTES, b"\0")
    if raw[:HEADER_BYTES] != head or len(raw) != start + ins + outs:
        raise ArtifactError("does not fit the signature; compile the model again", where)
    return decode(raw[start:], artifact.inputs)


def errors(got: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """(max |difference|, max |difference| / max |reference|); infinite where only one of the two is not finite."""
    if got.shape != reference.shape:
        raise DataError(f"outputs differ in shape: {list(got.shape)} and {list(reference.shape)}", "verify")
    if not reference.size:
        return 0.0, 0.0
    a, b = got.astype(np.float64), reference.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    if not finite.all():
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return math.inf, math.inf
        a, b = a[finite], b[finite]
        if not a.size:
            return 0.0, 0.0
    difference, size = float(np.abs(a - b).max()), float(np.abs(b).max())
    return difference, 0.0 if difference == 0 else (difference / size if size else math.inf)


# --- all of it --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """Elements of a quantized output that are more than one quantization step off, over all samples."""

    step: float  # in the output's unit; the largest of the samples' where it depends on them
    elements: int
    beyond: int
    witnessed: int  # the same of another correct implementation

    @property
    def passed(self) -> bool:
        """Whether no more are beyond than `sparsec.rounding` allows."""
        return self.beyond <= allowed_count(self.elements, self.witnessed)

    def json(self) -> dict[str, Any]:
        """Shares: of the artifact, of the witness, and what is required."""
        count = max(1, self.elements)
        required = max(0.0, 1 - allowed_count(self.elements, self.witnessed) / count)
        return {
            "step": _digits(self.step),
            "within_one_step": round(1 - self.beyond / count, 6),
            "witness_within_one_step": round(1 - self.witnessed / count, 6),
            "required_within_one_step": round(required, 6),
        }


@dataclass(frozen=True)
class Parity:
    """One output against ONNX Runtime on the same rewritten model, worst over all samples."""

    output: str
    max_abs_error: float
    max_relative_error: float
    tolerance: float
    steps: Steps | None = None  # of a quantized output

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance, and enough elements within one quantization step."""
        return self.max_relative_error <= self.tolerance and (self.steps is None or self.steps.passed)

    def text(self) -> str:
        """What is wrong with an output that did not pass."""
        if self.steps is not None and not self.steps.passed:
            facts = self.steps.json()
            share, required = 100 * facts["within_one_step"], 100 * facts["required_within_one_step"]
            return f"only {share:.2f}% of the elements are within one quantization step of ONNX Runtime's, not {required:.2f}%"
        return (
            f"differs from ONNX Runtime by {self.max_relative_error:.3g} of the largest value,"
            f" rounding explains {self.tolerance:.3g}"
        )

    def json(self) -> dict[str, Any]:
        """The contract's keys; three digits are all that an error means, an infinite one is null."""
        quantized = self.steps.json() if self.steps is not None else {}
        return {
            "output": self.output,
            "max_abs_error": _digits(self.max_abs_error),
            "max_relative_error": _digits(self.max_relative_error),
            "tolerance": self.tolerance,
            **quantized,
        }


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `fidelity` and `accuracy` are None where there was nothing to compare with."""

    runtime: str
    samples: int
    parity: tuple[Parity, ...]
    same_top1: int  # samples whose largest first output is at the same place as ONNX Runtime's
    fidelity: dict[str, float] | None = None  # top1_agreement, snr_db
    accuracy: dict[str, float] | None = None  # reference, artifact, samples

    @property
    def passed(self) -> bool:
        """Whether every output is within its tolerance."""
        return all(parity.passed for parity in self.parity)

    @property
    def worst(self) -> Parity:
        """The output that uses most of its tolerance."""
        return max(self.parity, key=lambda p: (not p.passed, p.max_relative_error))

    def json(self) -> dict[str, Any]:
        """The object of `verify --json`."""
        result: dict[str, Any] = {
            "passed": self.passed,
            "runtime": self.runtime,
            "samples": self.samples,
            "parity": [parity.json() for parity in self.parity],
            "same_top1": self.same_top1,
        }
        if self.fidelity is not None:
            result["fidelity"] = self.fidelity
        if self.accuracy is not None:
            result["accuracy"] = self.accuracy
        return result

    def record(self) -> dict[str, Any]:
        """What the manifest keeps."""
        return {
            "passed": self.passed,
            "runtime": self.runtime,
            "samples": self.samples,
            "outputs": [parity.json() for parity in self.parity],
        }


def _digits(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


class _Fidelity:
    """Rewritten against original model, on the first output that both have."""

    def __init__(self) -> None:
        self.agreed = self.positions = 0
        self.signal = self.noise = 0.0

    def add(self, got: np.ndarray, original: np.ndarray) -> None:
        a, b = got.astype(np.float64), original.astype(np.float64)
        if a.shape != b.shape:
            raise DataError(f"the models' outputs differ in shape: {list(a.shape)} and {list(b.shape)}", "--against")
        self.signal += float(np.sum(b * b))
        self.noise += float(np.sum((a - b) ** 2))
        if a.ndim and a.shape[-1] > 1:
            same = a.argmax(-1) == b.argmax(-1)
            self.agreed += int(np.count_nonzero(same))
            self.positions += same.size

    def result(self) -> dict[str, float]:
        snr = 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else SNR_CAP
        facts = {"snr_db": round(min(snr, SNR_CAP), 2)}
        if self.positions:
            facts["top1_agreement"] = round(self.agreed / self.positions, 6)
        return facts


def verify(
    artifact: Artifact,
    data: Source | None = None,
    against: Against | None = None,
    runtime: str | None = None,
    preprocess: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    random_samples: int = RANDOM_SAMPLES,
) -> Verification:
    """Run `artifact` on `runtime` (default: its own) and ONNX Runtime on its model.onnx, and compare.

    `data`: samples to compare on, with labels for accuracy; without it the parity sample and
    `random_samples` more. `against`: the model before any pass, for fidelity; where the artifact has inputs and outputs of
    8 bits and it has not, it is given and compared in real numbers. Never raises because results differ; see `.passed`.
    """
    from sparsec.runtimes.base import find_runtime
    from sparsec.runtimes.ort import OrtSession

    opened = load_data(data, artifact.inputs, preprocess) if data is not None else None
    samples: Iterable[Arrays] = opened if opened is not None else list(_own_samples(artifact, random_samples))
    reals = opened.reals() if opened is not None else map(partial(_reals, artifact.inputs), samples)
    labels = opened.labels if opened is not None else None
    total = len(opened) if opened is not None else 1 + random_samples
    where = find_runtime(runtime, artifact)
    outputs = {spec.name: spec for spec in artifact.outputs}
    names = list(outputs)
    tallies = _tallies(artifact)
    fidelity = _Fidelity() if against is not None else None
    same = done = 0
    right = {"reference": 0, "artifact": 0}
    with (
        where.open(artifact, None) as session,
        OrtSession(artifact.path / "model.onnx", where="model.onnx") as reference,
        _open_against(against, reference) as original,
    ):
        fed, kept = itertools.tee(samples)
        for sample, got in zip(kept, session.run_many(fed), strict=True):
            wanted = reference.run(sample)
            tallies.add(sample, got, wanted)
            first = names[0]
            same += int(_top1(got[first]) == _top1(wanted[first]))
            before = wanted
            if fidelity is not None:
                before = original.run(_fitting(sample, next(reals), original, artifact))
                common = next((name for name in names if name in before), None)
                if common is None:
                    raise DataError(f"the model has none of the artifact's outputs: {', '.join(names)}", "--against")
                fidelity.add(_as_kind(got[common], before[common], outputs[common]), before[common])
            if labels is not None:
                right["artifact"] += int(_top1(got[first]) == labels[done])
                right["reference"] += int(_top1(before.get(first, wanted[first])) == labels[done])
            done += 1
            if progress is not None:
                progress("verifying", done, total)
    accuracy: dict[str, float] | None = None
    if labels is not None:
        accuracy = {key: round(count / done, 6) for key, count in right.items()} | {"samples": done}
    return Verification(
        runtime=str(where),
        samples=done,
        parity=tallies.result(),
        same_top1=same,
        fidelity=fidelity.result() if fidelity is not None else None,
        accuracy=accuracy,
    )


class _Tallies:
    """Errors of every output over the samples."""

    def __init__(self, tolerances: Mapping[str, float], law: Rounding | None, floors: Mapping[str, float]) -> None:
        self._law = law
        self._floors = floors
        self._tolerances = {name: float(value) for name, value in tolerances.items()}
        self._absolute = dict.fromkeys(tolerances, 0.0)
        self._worst = {name: (0.0, value) for name, value in self._tolerances.items()}  # relative error, tolerance
        self._steps = {name: Steps(0.0, 0, 0, 0) for name in (law.outputs if law is not None else ())}

    def add(self, sample: Arrays, got: Arrays, wanted: Arrays) -> None:
        """Compare one sample."""
        witness = self._law.witness(sample) if self._law is not None else {}
        bounds: dict[str, float] = {}  # costly, and seldom needed
        for name in self._tolerances:
            absolute, relative = errors(got[name], wanted[name])
            tolerance = for_sample(self._tolerances[name], self._floors.get(name, 0.0), wanted[name])
            if self._law is not None and name in self._steps:
                step = self._law.step(name, sample)
                tally, reference = self._steps[name], wanted[name]
                self._steps[name] = Steps(
                    max(tally.step, step),
                    tally.elements + reference.size,
                    tally.beyond + beyond(got[name], reference, step),
                    tally.witnessed + beyond(witness[name], reference, step),
                )
                if absolute > step and not bounds:
                    bounds = self._law.bounds(sample, wanted)
                tolerance = relative_bound(bounds.get(name, step), reference)
            self._absolute[name] = max(self._absolute[name], absolute)
            if _used(relative, tolerance) > _used(*self._worst[name]) or not self._worst[name][0]:
                self._worst[name] = (relative, tolerance)

    def result(self) -> tuple[Parity, ...]:
        """One Parity an output."""
        return tuple(
            Parity(name, self._absolute[name], relative, _digits(tolerance) or 0.0, self._steps.get(name))
            for name, (relative, tolerance) in self._worst.items()
        )


def _tallies(artifact: Artifact) -> _Tallies:
    import onnx
    import onnx_ir as ir

    data = (artifact.path / "model.onnx").read_bytes()
    order = {spec.name: artifact.manifest["tolerances"][spec.name] for spec in artifact.outputs}
    return _Tallies(order, rounding(data), floors(ir.from_proto(onnx.load_model_from_string(data))))


def _used(error: float, tolerance: float) -> float:
    """The part of its tolerance that an error uses."""
    return error / tolerance if tolerance else math.inf if error else 0.0


def relative_bound(bound: float, reference: np.ndarray) -> float:
    """`bound` relative to max |reference|; float arithmetic around a step may add a thousandth."""
    size = float(np.abs(reference.astype(np.float64)).max(initial=0))
    return 1.001 * bound / size if size else math.inf


def _top1(output: np.ndarray) -> int:
    return int(output.reshape(-1).argmax()) if output.size else -1


def _own_samples(artifact: Artifact, count: int) -> Iterator[Arrays]:
    """The parity sample, then the same integers with random real values."""
    sample = read_parity(artifact)
    yield sample
    for i in range(count):
        drawn = random_sample(artifact.inputs, _SEED + 1 + i)
        yield {spec.name: (drawn if _real(spec) else sample)[spec.name] for spec in artifact.inputs}


def _open_against(against: Against | None, reference: OrtSession) -> OrtSession:
    """ONNX Runtime on the original model; without one, the reference (closing it twice is harmless)."""
    if against is None:
        return reference
    import onnx_ir as ir

    from sparsec.loading import vet
    from sparsec.reading import read_proto
    from sparsec.runtimes.ort import OrtSession

    if not isinstance(against, ir.Model):
        vet(against)
    proto = ir.to_proto(against) if isinstance(against, ir.Model) else read_proto(against)
    where = str(against) if isinstance(against, str | Path) else "--against"
    return OrtSession(proto.SerializeToString(), where=where)


def _reals(inputs: Sequence[InputSpec], sample: Arrays) -> Arrays:
    """A sample in real numbers."""
    return {spec.name: spec.real(sample[spec.name]) for spec in inputs}


def _as_kind(got: np.ndarray, wanted: np.ndarray, spec: InputSpec) -> np.ndarray:
    """An output as real numbers where those to compare with are."""
    return spec.real(got) if wanted.dtype.kind == "f" else got


def _fitting(sample: Arrays, reals: Arrays, original: OrtSession, artifact: Artifact) -> Arrays:
    """`sample` for the original model, real numbers where it takes floats, with inputs that were fixed filled in."""
    feed = {}
    bound = artifact.manifest["bind"]
    for spec in original.inputs:
        if spec.name in sample:
            feed[spec.name] = (reals if np.dtype(spec.dtype).kind == "f" else sample)[spec.name]
        elif spec.name in bound:
            feed[spec.name] = np.full(spec.shape, float(bound[spec.name])).astype(spec.dtype)
        else:
            raise DataError(f"the model has an input {spec.name!r} that the artifact does not have", "--against")
    return feed


def print_verification(result: Verification, console: Console) -> None:
    """The verification as text."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=f"parity with ONNX Runtime on {result.samples} samples ({result.runtime})", title_justify="left"
    )
    for column in ("output", "max abs error", "max relative error", "tolerance", ""):
        table.add_column(column, justify="left" if column == "output" else "right")
    for p in result.parity:
        verdict = "[green]ok[/]" if p.passed else "[red]FAILED[/]"
        table.add_row(
            escape(p.output), f"{p.max_abs_error:.3g}", f"{p.max_relative_error:.3g}", f"{p.tolerance:.3g}", verdict
        )
    console.print(table)
    if result.fidelity is not None:
        agreement = result.fidelity.get("top1_agreement")
        top1 = f"top-1 agreement {100 * agreement:.1f}%, " if agreement is not None else ""
        console.print(f"fidelity  {top1}{result.fidelity['snr_db']:.1f} dB against the original", highlight=False)
    if result.accuracy is not None:
        a = result.accuracy
        console.print(
            f"accuracy  {100 * a['artifact']:.2f}% (reference {100 * a['reference']:.2f}%) on {a['samples']} samples",
            highlight=False,
        )
