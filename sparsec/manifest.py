"""manifest.json: the files of an artifact with their checksums, and everything that must be known to run it.

Read, it is untrusted input: `check_manifest` holds it against its form, key by key, before anything in it is used.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from sparsec.errors import ArtifactError
from sparsec.targets import container

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
_MAX_JSON = 64 << 20  # bytes


def file_names(arch: str, embed_weights: bool) -> tuple[str, ...]:
    """The files beside the manifest in an artifact for `arch`."""
    files = FILES[container(arch)]
    return files if embed_weights else (*files, "weights.bin")


def code_file(arch: str) -> str:
    """The file that holds the kernels in an artifact for `arch`."""
    return CODE[container(arch)]


def dump_json(value: object) -> str:
    """The same text for the same value."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


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


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
_OPTIONAL = frozenset({"device"})  # of artifacts for CUDA devices


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
    if set(top) - _OPTIONAL != _KEYS:
        missing, extra = sorted(_KEYS - set(top)), sorted(set(top) - _KEYS - _OPTIONAL)
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
    if "device" in top:
        _check_device(c, c.table(top["device"], "device"))
    files = c.table(top["files"], "files")
    names = file_names(target["arch"], top["embed_weights"])
    if set(files) != set(names):
        raise c.fail("files", f"exactly {', '.join(names)}", sorted(files))
    for name, facts in files.items():
        entry = c.table(facts, f"files.{name}")
        c.number(entry.get("bytes"), f"files.{name}.bytes", 0, 1 << 48)
        c.sha(entry.get("sha256"), f"files.{name}.sha256")


def _check_device(c: _Checker, device: dict[str, Any]) -> None:
    if set(device) != {"arch", "nvrtc", "driver", "launches"}:
        raise c.fail("device", "arch, nvrtc, driver and launches", sorted(device))
    for key in ("arch", "nvrtc", "driver"):
        c.text(device[key], f"device.{key}")
    for name, launch in c.table(device["launches"], "device.launches").items():
        key = f"device.launches.{name}"
        if set(c.table(launch, key)) != {"grid", "block", "shared"}:
            raise c.fail(key, "grid, block and shared", launch)
        c.number(launch["shared"], f"{key}.shared", 0, 1 << 20)
        for side in ("grid", "block"):
            extents = c.items(launch[side], f"{key}.{side}")
            if len(extents) != 3:
                raise c.fail(f"{key}.{side}", "three extents", extents)
            for extent in extents:
                c.number(extent, f"{key}.{side}", 1, (1 << 31) - 1)


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
