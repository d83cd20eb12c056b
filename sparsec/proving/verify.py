"""Proof of an artifact: parity with ONNX Runtime (`sparsec.proving.parity`), fidelity to the original model, accuracy on labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsec.data import load_data
from sparsec.errors import DataError
from sparsec.images import Images
from sparsec.ports import InputSpec
from sparsec.proving.parity import Parity, tallies_of
from sparsec.proving.samples import own_samples

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
    from sparsec.proving.ort_session import limited_as_artifact
    from sparsec.runtimes.base import find_runtime
    from sparsec.runtimes.ort import OrtSession

    opened = load_data(data, artifact.inputs, preprocess) if data is not None else None
    samples: Iterable[Arrays] = opened if opened is not None else list(own_samples(artifact, random_samples))
    reals = opened.reals() if opened is not None else map(partial(_reals, artifact.inputs), samples)
    labels = opened.labels if opened is not None else None
    total = len(opened) if opened is not None else 1 + random_samples
    where = find_runtime(runtime, artifact)
    outputs = {spec.name: spec for spec in artifact.outputs}
    names = list(outputs)
    tallies = tallies_of(artifact)
    fidelity = _Fidelity() if against is not None else None
    same = done = 0
    right = {"reference": 0, "artifact": 0}
    with (
        limited_as_artifact(),
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


def _top1(output: np.ndarray) -> int:
    return int(output.reshape(-1).argmax()) if output.size else -1


def _open_against(against: Against | None, reference: OrtSession) -> OrtSession:
    """ONNX Runtime on the original model; without one, the reference (closing it twice is harmless)."""
    if against is None:
        return reference
    import onnx_ir as ir

    from sparsec.loading.load import vet
    from sparsec.loading.reading import read_proto
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
