"""The cases: networks, and how each is pruned. Every engine gets the model that `sparsec.rewrite` wrote."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

import sparsec
from bench.places import cache, digest_of, source_digest
from sparsec import models as builders
from sparsec.runtimes.ort import OrtSession

# Default of `prune`: Conv, Gemm and MatMul but the first convolution and the last weighted layer.
_BLOCKS = "prune:sparsity={},block={}"
# All of the transformer; the spectrogram in front of it is arithmetic written as MatMul, not weights.
_KWT = "prune:sparsity={},block={},types=MatMul+Gemm,include=kws_transformer/*"


@dataclass(frozen=True)
class Case:
    """One network in one state. `source`: a builder, or a file below $SPARSEC_DATA/models."""

    name: str
    title: str
    source: str
    sparsity: float = 0.0
    block: str = ""
    prune: str = _BLOCKS

    @property
    def network(self) -> str:
        """The part of the name that variants share."""
        return self.name.partition("-")[0]

    @property
    def dense(self) -> bool:
        """Whether nothing was pruned."""
        return not self.block

    @property
    def passes(self) -> tuple[str, ...]:
        """Pass specs."""
        return () if self.dense else (self.prune.format(self.sparsity, self.block),)

    @property
    def state(self) -> str:
        """`dense` or `80% 4x1`."""
        if self.dense:
            return "dense"
        return f"{100 * self.sparsity:.0f}% {'unstructured' if self.block == '1x1' else self.block}"


_V2, _KWT_FILE = "mobilenetv2_torchvision.onnx", "kwt1_speech_commands.onnx"
CASES: tuple[Case, ...] = (
    Case("mbv1-dense", "MobileNetV1-224", "mobilenet_v1"),
    Case("mbv1-80-4x1", "MobileNetV1-224", "mobilenet_v1", 0.8, "4x1"),
    Case("mbv1-90-4x1", "MobileNetV1-224", "mobilenet_v1", 0.9, "4x1"),
    Case("mbv1-80-1x1", "MobileNetV1-224", "mobilenet_v1", 0.8, "1x1"),
    Case("mbv2-dense", "MobileNetV2-224", _V2),
    Case("mbv2-70-4x1", "MobileNetV2-224", _V2, 0.7, "4x1"),
    Case("r50-dense", "ResNet-50", "resnet50"),
    Case("r50-80-4x1", "ResNet-50", "resnet50", 0.8, "4x1"),
    Case("r18-dense", "ResNet-18", "resnet18"),
    Case("r18-50-4x1", "ResNet-18", "resnet18", 0.5, "4x1"),
    Case("kwt1-dense", "KWT-1", _KWT_FILE),
    Case("kwt1-70-4x1", "KWT-1", _KWT_FILE, 0.7, "4x1", _KWT),
    Case("squeezenet-dense", "SqueezeNet 1.1", "squeezenet1.1.onnx"),
)


class Missing(Exception):
    """Something cannot be measured here; the text is the reason that the report prints."""


def find_case(name: str) -> Case:
    """The case called `name`."""
    return next(case for case in CASES if case.name == name)


def dense_of(case: Case) -> Case:
    """The same network before pruning."""
    return next(c for c in CASES if c.network == case.network and c.dense)


@dataclass(frozen=True)
class Prepared:
    """Files of one case: the rewritten model, inputs for it and ONNX Runtime's outputs for these, both .npz.

    `tuning`: a file of `sparsec tune` for sparsec's artifact, or nothing.
    """

    case: Case
    model: Path
    inputs: Path
    outputs: Path
    tuning: Path | None = None


def _origin(case: Case) -> onnx.ModelProto | Path:
    if not case.source.endswith(".onnx"):
        return builders.build(case.source)
    data = os.environ.get("SPARSEC_DATA")
    if not data:
        raise Missing(f"{case.source} lies in $SPARSEC_DATA/models, and SPARSEC_DATA is not set")
    path = Path(data, "models", case.source)
    if not path.is_file():
        raise Missing(f"{path} does not exist")
    return path


def prepare(case: Case, tuning: Path | None = None) -> Prepared:
    """Rewrite the model of `case` (kept until sources change). Raises Missing."""
    origin = _origin(case)
    data = origin.read_bytes() if isinstance(origin, Path) else origin.SerializeToString(deterministic=True)
    folder = cache() / "models" / f"{case.name}-{digest_of([source_digest(), data, *case.passes])}"
    made = Prepared(case, folder / "model.onnx", folder / "inputs.npz", folder / "outputs.npz", tuning)
    if made.outputs.is_file():
        return made
    for old in folder.parent.glob(f"{case.name}-????????????????"):
        shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(parents=True)
    ir.save(sparsec.rewrite(origin, passes=case.passes), made.model)
    session = OrtSession(made.model)
    generator = np.random.default_rng(0)
    feed = {spec.name: (0.5 * generator.standard_normal(spec.shape)).astype(spec.dtype) for spec in session.inputs}
    np.savez(made.inputs, **feed)
    np.savez(made.outputs, **session.run(feed))
    return made


def compiled(made: Prepared) -> Path:
    """sparsec's artifact of a prepared model for this machine (kept until sources change)."""
    choices = digest_of([made.tuning.read_bytes()]) if made.tuning else "predicted"
    path = made.model.parent / f"host-{choices}.sparsec"
    if not (path / "manifest.json").is_file():
        sparsec.compile(made.model, "host", tuning=made.tuning, output=path, overwrite=True)
    return path
