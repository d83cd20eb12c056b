"""The artifact: a directory `NAME.sparsec/` with a manifest that names and checksums every file in it.

Written, it is whole or absent (`sparsec.staging`). Read, its manifest (`sparsec.manifest`) and each file's sha256 are
checked before anything is used.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsec.errors import ArtifactError
from sparsec.images import Images
from sparsec.manifest import (
    MANIFEST,
    SCHEMA,
    SUFFIX,
    check_manifest,
    code_file,
    dump_json,
    file_names,
    read_json,
    sha256,
)
from sparsec.ports import InputSpec, Quantization

if TYPE_CHECKING:
    from sparsec.bench import Timing
    from sparsec.program import Program
    from sparsec.proving.verify import Verification

TOOLS = ("apache-tvm", "numpy", "onnx", "onnx-ir", "onnxruntime", "ziglang")
DIGESTS = ("model", "recipe", "calibration", "tuning")


def artifact_path(output: str | Path | None, name: str) -> Path:
    """Where the artifact of model `name` goes: `output` itself if it ends in .sparsec, else `output`/NAME.sparsec."""
    if output is None:
        return Path(name + SUFFIX)
    path = Path(output)
    return path if path.name.endswith(SUFFIX) and path.name != SUFFIX else path / (name + SUFFIX)


@dataclass(frozen=True)
class Facts:
    """What the manifest says besides the program."""

    digests: Mapping[str, str | None]  # of DIGESTS: sha256 of what went in
    tolerances: Mapping[str, float]  # relative error allowed for each output
    passes: Sequence[Mapping[str, Any]] = ()  # each pass's record
    threads: int = 1  # default at run time
    bind: Mapping[str, str] = field(default_factory=dict)  # inputs fixed to a constant
    notes: Sequence[str] = ()  # what the user should know
    embed_weights: bool = False


def tool_versions() -> dict[str, str]:
    """Versions of sparsec and of what made the artifact."""
    from sparsec import __version__

    versions = {"sparsec": __version__}
    for tool in TOOLS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[tool] = metadata.version(tool)
    return versions


def write_artifact(
    directory: Path, *, program: Program, model_bytes: bytes, facts: Facts, parity: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Complete what `build` left in `directory`: model.onnx, report.json and, last, manifest.json, which is returned.

    May be called again on the same directory once `parity` (`Verification.record()`) is known.
    """
    from sparsec.inspection import port_row, report

    (directory / "model.onnx").write_bytes(model_bytes)
    sizes = {
        name: (directory / name).stat().st_size
        for name in file_names(program.target.arch, facts.embed_weights)
        if name != "report.json"
    }
    (directory / "report.json").write_text(dump_json(report(program, model_bytes, sizes)), encoding="utf-8")
    target = program.target
    manifest = {
        "schema": SCHEMA,
        "name": program.name,
        "target": {key: getattr(target, key) for key in ("name", "cpu", "arch", "os", "runtime", "precision")},
        "features": list(target.features),
        "inputs": [port_row(t) for t in program.inputs],
        "outputs": [port_row(t) for t in program.outputs],
        "arena_bytes": program.arena_bytes,
        "scratch_bytes": program.scratch_bytes,
        "weights_bytes": program.weights_bytes,
        "embed_weights": facts.embed_weights,
        "threads": facts.threads,
        "bind": dict(facts.bind),
        "tools": tool_versions(),
        "digests": {key: facts.digests.get(key) for key in DIGESTS},
        "passes": [dict(record) for record in facts.passes],
        "notes": list(facts.notes),
        "tolerances": {name: float(value) for name, value in facts.tolerances.items()},
        "parity": dict(parity) if parity is not None else None,
        "files": {
            name: {"bytes": (directory / name).stat().st_size, "sha256": sha256(directory / name)}
            for name in file_names(target.arch, facts.embed_weights)
        },
    }
    if target.gpu is not None:
        manifest["device"] = _device(program)
    manifest = json.loads(dump_json(manifest))  # exactly what a reader gets
    check_manifest(manifest, directory)
    (directory / MANIFEST).write_text(dump_json(manifest), encoding="utf-8")
    return manifest


def _device(program: Program) -> dict[str, Any]:
    """What the manifest says of a CUDA device: its architecture, the compiler, the driver it needs, every launch."""
    from sparsec.cuda import nvrtc
    from sparsec.inspection import launch_rows

    launches = launch_rows(program)
    version = nvrtc.version() if launches else ""
    return {"arch": program.target.cpu, "nvrtc": version, "driver": nvrtc.DRIVER, "launches": launches}


def load(path: str | Path) -> Artifact:
    """Open an artifact directory. Raises ArtifactError if it is incomplete, damaged or of another version.

    Every file is read once to compare its sha256.
    """
    directory = Path(path)
    if not directory.is_dir():
        found = "is a file" if directory.exists() else "does not exist"
        raise ArtifactError(f"{found}; expected an artifact directory NAME{SUFFIX}", str(path))
    manifest = read_json(directory / MANIFEST)
    check_manifest(manifest, directory)
    for name, facts in manifest["files"].items():
        file = directory / name
        if not file.is_file():
            raise ArtifactError("is missing from the artifact; compile the model again", str(file))
        if file.stat().st_size != facts["bytes"] or sha256(file) != facts["sha256"]:
            raise ArtifactError("differs from the checksum in manifest.json; compile the model again", str(file))
    return Artifact(directory, manifest)


class Artifact:
    """A compiled model on disk. `path`, `manifest` and `report` are its directory, manifest.json and report.json."""

    def __init__(self, path: Path, manifest: dict[str, Any], owner: object | None = None) -> None:
        self.path = Path(path)
        self.manifest = manifest
        self._owner = owner  # keeps a temporary directory alive

    def __repr__(self) -> str:
        return f"<sparsec artifact {self.name!r} for {self.manifest['target']['name']} at {str(self.path)!r}>"

    @property
    def name(self) -> str:
        """The model's name; prefixes the symbols of libmodel.a."""
        return self.manifest["name"]

    @property
    def report(self) -> dict[str, Any]:
        """Layers and totals, as `sparsec inspect --json` prints them."""
        return read_json(self.path / "report.json")

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """Inputs in signature order."""
        return _specs(self.manifest["inputs"])

    @property
    def outputs(self) -> tuple[InputSpec, ...]:
        """Outputs in signature order."""
        return _specs(self.manifest["outputs"])

    @property
    def bytes(self) -> dict[str, int]:
        """Stored bytes: packed weights, code (libmodel.so, model.wasm) and the ONNX model beside them."""
        files = self.manifest["files"]
        weights = files["weights.bin"]["bytes"] if "weights.bin" in files else 0
        code = files[code_file(self.manifest["target"]["arch"])]["bytes"]
        return {"weights": weights, "code": code, "onnx": files["model.onnx"]["bytes"]}

    def quantize(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`inputs` as `run` takes them: floats for an 8-bit input become its integers, all else stays as it is."""
        ports = {spec.name: spec for spec in self.inputs}
        return {name: ports[name].stored(np.asarray(a)) if name in ports else a for name, a in inputs.items()}

    def dequantize(self, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What `run` gave as real numbers: an 8-bit output becomes float32, all else stays as it is."""
        ports = {spec.name: spec for spec in self.outputs}
        return {name: ports[name].real(np.asarray(a)) if name in ports else a for name, a in outputs.items()}

    def run(
        self, inputs: Mapping[str, np.ndarray], runtime: str | None = None, threads: int | None = None
    ) -> dict[str, np.ndarray]:
        """Outputs of one sample, on the artifact's own runtime unless `runtime` names another.

        Arrays have the ports' types; `quantize` and `dequantize` lie between those of 8 bits and real numbers.
        Raises DataError if an input is missing or of another shape, RuntimeUnavailable if the runtime is not here.
        """
        from sparsec.ports import check_inputs
        from sparsec.runtimes.base import find_runtime

        feed = check_inputs(inputs, self.inputs)
        with find_runtime(runtime, self).open(self, threads) as session:
            return session.run(feed)

    def verify(
        self,
        data: str | Path | Mapping[str, np.ndarray] | Images | None = None,
        against: Any = None,
        runtime: str | None = None,
        preprocess: str | None = None,
    ) -> Verification:
        """Compare with ONNX Runtime: `.passed`, `.parity`, `.fidelity`, `.accuracy`. See `sparsec.proving.verify.verify`."""
        from sparsec.proving.verify import verify

        return verify(self, data=data, against=against, runtime=runtime, preprocess=preprocess)

    def bench(
        self, runs: int = 50, threads: int | None = None, runtime: str | None = None, against: Sequence[str] = ()
    ) -> Timing:
        """Latency: `.median_ms`, `.p10_ms`, `.p90_ms`, `.min_ms`. See `sparsec.bench.bench`."""
        from sparsec.bench import bench

        return bench(self, runs=runs, threads=threads, runtime=runtime, against=against)


def _specs(tensors: list[dict[str, Any]]) -> tuple[InputSpec, ...]:
    return tuple(InputSpec(t["name"], tuple(t["shape"]), t["dtype"], _meaning(t["quantization"])) for t in tensors)


def _meaning(entry: dict[str, Any] | None) -> Quantization | None:
    return None if entry is None else Quantization(float(entry["scale"]), int(entry["zero_point"]))
