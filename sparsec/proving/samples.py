"""Samples to compare on where there is no data: the one in parity.bin, and random ones like it."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparsec.data import Data
from sparsec.errors import ArtifactError
from sparsec.ports import InputSpec
from sparsec.proving.parity import relative_bound
from sparsec.proving.rounding import rounding

if TYPE_CHECKING:
    from sparsec.artifact import Artifact
    from sparsec.runtimes.base import Arrays


_SEED = 20240229


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


def conditioned_tolerances(
    model_bytes: bytes, inputs: Sequence[InputSpec], outputs: Sequence[str], sample: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
) -> dict[str, float]:  # fmt: skip
    """Relative tolerances of floating-point outputs in this one sample from what rounding makes of it (`sparsec.proving.conditioning`)."""
    from sparsec.proving.conditioning import Conditioning

    bounds = Conditioning(model_bytes).bounds({s.name: array for s, array in zip(inputs, sample, strict=True)})
    found = {name: relative_bound(bounds[name], y) for name, y in zip(outputs, expected, strict=True) if name in bounds}
    return {name: value for name, value in found.items() if np.isfinite(value)}


def read_parity(artifact: Artifact) -> Arrays:
    """The inputs in parity.bin."""
    from sparsec.runtimes.batch import decode

    return decode(_parity(artifact), artifact.inputs)


def parity_outputs(artifact: Artifact) -> Arrays:
    """ONNX Runtime's outputs in parity.bin."""
    from sparsec.runtimes.batch import decode, tensor_bytes

    return decode(_parity(artifact)[tensor_bytes(artifact.inputs) :], artifact.outputs)


def _parity(artifact: Artifact) -> bytes:
    """Inputs and outputs in parity.bin, one behind the other."""
    from sparsec.building.emit import HEADER_BYTES, PARITY_FORMAT
    from sparsec.runtimes.batch import tensor_bytes

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
    return raw[start:]


def own_samples(artifact: Artifact, count: int) -> Iterator[Arrays]:
    """The parity sample, then the same integers with random real values."""
    sample = read_parity(artifact)
    yield sample
    for i in range(count):
        drawn = random_sample(artifact.inputs, _SEED + 1 + i)
        yield {spec.name: (drawn if _real(spec) else sample)[spec.name] for spec in artifact.inputs}
