"""Where peers live: one virtual environment an engine under the cache folder, made by `setup.py`."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKERS = Path(__file__).resolve().parent / "workers"


@dataclass(frozen=True)
class Environment:
    """What one virtual environment needs: `packages` with their dependencies, `bare` without, and a Python version."""

    packages: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()  # pip install --no-deps
    python: str = ""  # "3.12"; empty: the running one
    check: str = ""  # a statement that succeeds once the environment works
    note: str = ""


ENVIRONMENTS: dict[str, Environment] = {
    "openvino": Environment(("openvino",), check="import openvino"),
    "mnn": Environment(("MNN", "numpy"), check="import MNN.nn"),
    # pnnx asks for torch, which only its TorchScript side needs.
    "ncnn": Environment(("ncnn", "numpy"), ("pnnx",), check="import ncnn"),
    "litert": Environment(("ai-edge-litert", "numpy"), check="import ai_edge_litert.interpreter"),
    "litert-convert": Environment(
        ("onnx2tf>=2.6,<3",), python="3.12", check="import onnx2tf", note="makes .tflite from ONNX for litert"
    ),
    # End of life: its last release names packages that have moved on, so each is listed.
    "deepsparse": Environment(
        (
            "numpy<2", "onnx<1.15", "protobuf<4", "pydantic>=2,<3", "click", "requests", "tqdm", "pyyaml", "pandas",
            "geocoder", "py-machineid",
        ),
        ("deepsparse==1.8.0", "sparsezoo==1.8.1"),
        python="3.11", check="import deepsparse", note="x86-64 with AVX2 or AVX-512 only",
    ),
}  # fmt: skip


def cache() -> Path:
    """Folder for environments, converted models and artifacts: $SPARSEC_BENCH_CACHE or ~/.cache/sparsec/bench."""
    named = os.environ.get("SPARSEC_BENCH_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else base / "sparsec" / "bench"


def environment_path(engine: str) -> Path:
    """The virtual environment of `engine`, whether or not it exists."""
    return cache() / engine


def environment_python(engine: str) -> Path:
    """Its interpreter."""
    return environment_path(engine) / "bin" / "python"


def find_python(version: str) -> Path | None:
    """An interpreter of `version` ("3.12"; "" is the running one): running, on the PATH, of pyenv or of uv."""
    if not version or version == f"{sys.version_info[0]}.{sys.version_info[1]}":
        return Path(sys.executable)
    found: list[Path] = []
    for folder in (Path.home() / ".pyenv/versions", Path.home() / ".local/share/uv/python"):
        found += sorted(folder.glob(f"*{version}*/bin/python{version}"))
    named = shutil.which(f"python{version}")
    if named and ".pyenv/shims" not in named:  # a shim exists for versions that are not active
        found.insert(0, Path(named))
    return found[0] if found else None


def digest_of(parts: Iterable[bytes | str]) -> str:
    """A short name for a combination of inputs."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()[:16]


def source_digest() -> str:
    """Digest of the compiler's sources: artifacts of another state of the tree are not reused."""
    folders = ("sparsec", "passes", "kernels", "runtimes", "models")
    files = sorted(
        f for d in folders for f in (ROOT / d).rglob("*") if f.suffix in {".py", ".c", ".h", ".toml", ".map"}
    )
    return digest_of(part for f in files for part in (str(f.relative_to(ROOT)), f.read_bytes()))
