"""The artifact: a directory `NAME.sparsec/` with a manifest that names and checksums every file in it.

Writing: everything is made in a hidden directory beside the target and renamed when complete, so an artifact is either
whole or absent, whatever interrupts. Reading: the manifest is untrusted input; its form and each file's sha256 are
checked before anything is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsec.data import Images, InputSpec, Quantization
from sparsec.errors import ArtifactError, BuildError, SparsecError, UsageError
from sparsec.targets import container

if TYPE_CHECKING:
    from sparsec.bench import Timing
    from sparsec.program import Program
    from sparsec.verify import Verification

SCHEMA = 1
SUFFIX = ".sparsec"
MANIFEST = "manifest.json"
CODE = {"elf": "libmodel.so", "wasm": "model.wasm"}  # by `Target.container`
FILES = {
    "elf": ("bench", "libmodel.a", "libmodel.so", "model.h", "model.onnx", "parity.bin", "report.json"),
    "wasm": ("model.d.ts", "model.js", "model.onnx", "model.wasm", "parity.bin", "report.json"),
}  # weights.bin apart
DTYPES = frozenset(
    {"float16", "float32", "float64", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool"}
)
TOOLS = ("apache-tvm", "numpy", "onnx", "onnx-ir", "onnxruntime", "ziglang")
DIGESTS = ("model", "recipe", "calibration", "tuning")
_MAX_JSON = 64 << 20  # bytes


# --- writing ------------------------------------------------------------------------------------------------------


def artifact_path(output: str | Path | None, name: str) -> Path:
    """Where the artifact of model `name` goes: `output` itself if it ends in .sparsec, else `output`/NAME.sparsec."""
    if output is None:
        return Path(name + SUFFIX)
    path = Path(output)
    return path if path.name.endswith(SUFFIX) and path.name != SUFFIX else path / (name + SUFFIX)


def check_output(path: Path, overwrite: bool) -> None:
    """Raise UsageError, before any work is done, if `path` may not be written."""
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise UsageError("exists already; give --overwrite to replace it", str(path))
    if path.name.endswith(SUFFIX) and not ((path / MANIFEST).is_file() or (path.is_dir() and not any(path.iterdir()))):
        raise UsageError("exists and is not an artifact; remove it yourself or choose another -o", str(path))
    if path.is_dir() != path.name.endswith(SUFFIX):
        raise UsageError("exists and is a folder; choose another -o", str(path))


def storage_error(error: OSError, path: Path) -> SparsecError:
    """`error` of the file system as one line."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BuildError("the disk is full; free some space or choose another -o", str(path))
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return UsageError(f"cannot write: {error.strerror}; choose another -o", str(path))
    return UsageError(f"cannot write: {error.strerror or error}", str(error.filename or path))


@contextlib.contextmanager
def staged(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside `path` that becomes `path` when the block ends, or vanishes when it raises.

    An existing artifact is exchanged in one step, so one of the two is always there. Raises UsageError before the block
    runs if `path` exists and `overwrite` is false or the folder cannot be written.
    """
    path = Path(path)
    check_output(path, overwrite)
    made: list[Path] = []
    stage: Path | None = None
    try:
        for folder in reversed((path.parent, *path.parent.parents)):
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
        stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        yield stage
        stage.chmod(0o755)
        _commit(stage, path)
    except BaseException as error:
        full = _full(path.parent)
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise storage_error(error, path) from error
        if isinstance(error, BuildError) and full:
            raise storage_error(OSError(errno.ENOSPC, ""), path) from error
        raise


@contextlib.contextmanager
def staged_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Like `staged` for one file: the block writes the yielded path, which is then renamed to `path`."""
    path = Path(path)
    check_output(path, overwrite)
    stage: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
        stage = Path(name)
        yield stage
        mask = os.umask(0)
        os.umask(mask)
        stage.chmod(0o666 & ~mask)
        stage.replace(path)
    except BaseException as error:
        if stage is not None:
            stage.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise storage_error(error, path) from error
        raise


def _full(folder: Path) -> bool:
    try:
        facts = os.statvfs(folder)
    except OSError:
        return False
    return facts.f_bavail * facts.f_frsize < 1 << 16


def _commit(stage: Path, path: Path) -> None:
    if not path.exists():
        stage.rename(path)
    elif _exchange(stage, path):
        shutil.rmtree(stage, ignore_errors=True)  # the old artifact by now
    else:
        old = stage.with_suffix(".old")
        path.rename(old)
        try:
            stage.rename(path)
        except BaseException:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step (Linux renameat2, RENAME_EXCHANGE); false where the system cannot."""
    at_cwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), rename_exchange) == 0


def dump_json(value: object) -> str:
    """The same text for the same value."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        for name in _names(program.target.arch, facts.embed_weights)
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
            for name in _names(target.arch, facts.embed_weights)
        },
    }
    manifest = json.loads(dump_json(manifest))  # exactly what a reader gets
    check_manifest(manifest, directory)
    (directory / MANIFEST).write_text(dump_json(manifest), encoding="utf-8")
    return manifest


def _names(arch: str, embed_weights: bool) -> tuple[str, ...]:
    files = FILES[container(arch)]
    return files if embed_weights else (*files, "weights.bin")


def code_file(arch: str) -> str:
    """The file that holds the kernels in an artifact for `arch`."""
    return CODE[container(arch)]


# --- reading ------------------------------------------------------------------------------------------------------


class _Checker:
    """Walks an untrusted JSON value; each method returns the value in the type it promises or raises ArtifactError."""

    def __init__(self, where: Path) -> None:
        self._where = str(where / MANIFEST)

    def fail(self, key: str, expected: str, value: object) -> ArtifactError:
        text = repr(value)
        return ArtifactError(
            f"{key}: expected {expected}, got {text[:40] + '...' if len(text) > 40 else text}", self._where
        )

    def table(self, value: object, key: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(key, "an object", value)
        return value

    def items(self, value: object, key: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.fail(key, "a list", value)
        return value

    def text(self, value: object, key: str) -> str:
        if not isinstance(value, str) or len(value) > 4096:
            raise self.fail(key, "a short string", value)
        return value

    def number(self, value: object, key: str, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(key, f"an integer from {low} to {high}", value)
        return value

    def real(self, value: object, key: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise self.fail(key, "a number >= 0", value)
        return float(value)

    def sha(self, value: object, key: str) -> str:
        if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
            raise self.fail(key, "a sha256 in hexadecimal", value)
        return value


_KEYS = frozenset({
    "schema", "name", "target", "features", "inputs", "outputs", "arena_bytes", "scratch_bytes", "weights_bytes",
    "embed_weights", "threads", "bind", "tools", "digests", "passes", "notes", "tolerances", "parity", "files",
})  # fmt: skip


def check_manifest(manifest: object, directory: Path) -> None:
    """Raise ArtifactError unless `manifest` has exactly the form that `write_artifact` gives it."""
    c = _Checker(directory)
    top = c.table(manifest, "manifest")
    schema = top.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        raise ArtifactError(
            f"schema {schema!r}, this version of sparsec reads schema {SCHEMA}; compile the model again",
            str(directory / MANIFEST),
        )
    if set(top) != _KEYS:
        missing, extra = sorted(_KEYS - set(top)), sorted(set(top) - _KEYS)
        raise ArtifactError(f"keys missing: {missing}, unknown: {extra}", str(directory / MANIFEST))
    c.text(top["name"], "name")
    target = c.table(top["target"], "target")
    for key in ("name", "cpu", "arch", "os", "runtime", "precision"):
        c.text(target.get(key), f"target.{key}")
    for i, feature in enumerate(c.items(top["features"], "features")):
        c.text(feature, f"features[{i}]")
    for side in ("inputs", "outputs"):
        _check_signature(c, c.items(top[side], side), side)
    for key in ("arena_bytes", "scratch_bytes", "weights_bytes"):
        c.number(top[key], key, 0, 1 << 48)
    if not isinstance(top["embed_weights"], bool):
        raise c.fail("embed_weights", "true or false", top["embed_weights"])
    c.number(top["threads"], "threads", 1, 1024)
    for table in ("bind", "tools"):
        for name, value in c.table(top[table], table).items():
            c.text(value, f"{table}.{name}")
    for name, value in c.table(top["digests"], "digests").items():
        if value is not None:
            c.sha(value, f"digests.{name}")
    for i, record in enumerate(c.items(top["passes"], "passes")):
        c.text(c.table(record, f"passes[{i}]").get("name"), f"passes[{i}].name")
    for i, note in enumerate(c.items(top["notes"], "notes")):
        c.text(note, f"notes[{i}]")
    outputs = [tensor["name"] for tensor in top["outputs"]]
    tolerances = c.table(top["tolerances"], "tolerances")
    if sorted(tolerances) != sorted(outputs):
        raise c.fail("tolerances", f"one for each of {outputs}", tolerances)
    for name, value in tolerances.items():
        c.real(value, f"tolerances.{name}")
    if top["parity"] is not None:
        parity = c.table(top["parity"], "parity")
        if not isinstance(parity.get("passed"), bool):
            raise c.fail("parity.passed", "true or false", parity.get("passed"))
        c.items(parity.get("outputs"), "parity.outputs")
    files = c.table(top["files"], "files")
    names = _names(target["arch"], top["embed_weights"])
    if set(files) != set(names):
        raise c.fail("files", f"exactly {', '.join(names)}", sorted(files))
    for name, facts in files.items():
        entry = c.table(facts, f"files.{name}")
        c.number(entry.get("bytes"), f"files.{name}.bytes", 0, 1 << 48)
        c.sha(entry.get("sha256"), f"files.{name}.sha256")


def _check_signature(c: _Checker, tensors: list[Any], side: str) -> None:
    names = []
    for i, tensor in enumerate(tensors):
        key = f"{side}[{i}]"
        entry = c.table(tensor, key)
        names.append(c.text(entry.get("name"), f"{key}.name"))
        dims = c.items(entry.get("shape"), f"{key}.shape")
        if len(dims) > 32:
            raise c.fail(f"{key}.shape", "at most 32 dimensions", dims)
        elements = 1
        for dim in dims:
            elements *= c.number(dim, f"{key}.shape", 0, 1 << 31)
        if elements > 1 << 36:
            raise c.fail(f"{key}.shape", "at most 2**36 elements", dims)
        if entry.get("dtype") not in DTYPES:
            raise c.fail(f"{key}.dtype", f"one of {', '.join(sorted(DTYPES))}", entry.get("dtype"))
        if entry.get("quantization") is not None:
            meaning = c.table(entry["quantization"], f"{key}.quantization")
            if entry["dtype"] not in ("int8", "uint8") or set(meaning) != {"scale", "zero_point"}:
                raise c.fail(f"{key}.quantization", "scale and zero_point of an 8-bit tensor", meaning)
            if not c.real(meaning["scale"], f"{key}.quantization.scale"):
                raise c.fail(f"{key}.quantization.scale", "a number above 0", meaning["scale"])
            limits = np.iinfo(entry["dtype"])
            c.number(meaning["zero_point"], f"{key}.quantization.zero_point", int(limits.min), int(limits.max))
    if len(set(names)) != len(names) or (side == "outputs" and not names):
        raise c.fail(side, "distinct names, at least one output", names)


def read_json(path: Path) -> Any:
    """A JSON file of ours. Raises ArtifactError."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ArtifactError(f"larger than {_MAX_JSON} bytes", str(path))
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"cannot read: {error.strerror}; is this an artifact?", str(path)) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"damaged: not JSON ({str(error).splitlines()[0]}); compile the model again", str(path)
        ) from error


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
        from sparsec.data import check_inputs
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
        """Compare with ONNX Runtime: `.passed`, `.parity`, `.fidelity`, `.accuracy`. See `sparsec.verify.verify`."""
        from sparsec.verify import verify

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
