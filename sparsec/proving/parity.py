"""Parity: an artifact's outputs against ONNX Runtime's on the same rewritten model, the worst over all samples.

Relative error of an output is max |difference| / max |reference|, taken for each sample; the worst sample counts.
The tolerance is derived from the model (`sparsec.proving.tolerance`) when it is compiled and kept in the manifest; in a sample that
exceeds it, from the sample too, whose sums may cancel (`sparsec.proving.conditioning`). For an output
that a QuantizeLinear reaches it is derived from the model and the sample, and nearly all elements must be within one
quantization step (`sparsec.proving.rounding`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsec.errors import DataError
from sparsec.proving.conditioning import Conditioning
from sparsec.proving.rounding import Rounding, allowed_count, beyond, rounding
from sparsec.proving.tolerance import floors, for_sample

if TYPE_CHECKING:
    from sparsec.artifact import Artifact
    from sparsec.runtimes.base import Arrays


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


def relative_bound(bound: float, reference: np.ndarray) -> float:
    """`bound` relative to max |reference|; float arithmetic around a step may add a thousandth."""
    size = float(np.abs(reference.astype(np.float64)).max(initial=0))
    return 1.001 * bound / size if size else math.inf


@dataclass(frozen=True)
class Steps:
    """Elements of a quantized output that are more than one quantization step off, over all samples."""

    step: float  # in the output's unit; the largest of the samples' where it depends on them
    elements: int
    beyond: int
    witnessed: int  # the same of another correct implementation

    @property
    def passed(self) -> bool:
        """Whether no more are beyond than `sparsec.proving.rounding` allows."""
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


def _digits(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


class Tallies:
    """Errors of every output over the samples."""

    def __init__(
        self,
        tolerances: Mapping[str, float],
        law: Rounding | None,
        floors: Mapping[str, float],
        conditioning: Conditioning | None,
    ) -> None:
        self._law = law
        self._conditioning = conditioning
        self._floors = floors
        self._tolerances = {name: float(value) for name, value in tolerances.items()}
        self._absolute = dict.fromkeys(tolerances, 0.0)
        self._worst = {name: (0.0, value) for name, value in self._tolerances.items()}  # relative error, tolerance
        self._steps = {name: Steps(0.0, 0, 0, 0) for name in (law.outputs if law is not None else ())}

    def add(self, sample: Arrays, got: Arrays, wanted: Arrays) -> None:
        """Compare one sample."""
        witness = self._law.witness(sample) if self._law is not None else {}
        bounds: dict[str, float] = {}  # costly, and seldom needed
        cancelled: dict[str, float] = {}  # likewise
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
            elif self._conditioning is not None and 0 < tolerance < relative < math.inf:
                cancelled = cancelled or self._conditioning.bounds(sample)
                measured = relative_bound(cancelled[name], wanted[name])
                tolerance = max(tolerance, for_sample(measured, self._floors.get(name, 0.0), wanted[name]))
            self._absolute[name] = max(self._absolute[name], absolute)
            if _used(relative, tolerance) > _used(*self._worst[name]) or not self._worst[name][0]:
                self._worst[name] = (relative, tolerance)

    def result(self) -> tuple[Parity, ...]:
        """One Parity an output."""
        return tuple(
            Parity(name, self._absolute[name], relative, _digits(tolerance) or 0.0, self._steps.get(name))
            for name, (relative, tolerance) in self._worst.items()
        )


def tallies_of(artifact: Artifact) -> Tallies:
    """Empty ones, with the tolerances in the manifest and what the model says of rounding."""
    import onnx
    import onnx_ir as ir

    data = (artifact.path / "model.onnx").read_bytes()
    order = {spec.name: artifact.manifest["tolerances"][spec.name] for spec in artifact.outputs}
    lowest = floors(ir.from_proto(onnx.load_model_from_string(data)))
    single = artifact.manifest["target"]["precision"] == "f32"
    return Tallies(order, rounding(data), lowest, Conditioning(data) if single else None)


def _used(error: float, tolerance: float) -> float:
    """The part of its tolerance that an error uses."""
    return error / tolerance if tolerance else math.inf if error else 0.0
