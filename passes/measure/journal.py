"""A JSON file that a long measurement continues from: what was measured, under the digest of what was measured on.

    {"version": 1, "key": sha256, "entries": {name: any JSON}}

Written whole beside the old file and renamed over it, so that a stop at any time leaves a readable file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsec.errors import RecipeError

VERSION = 1
MOST_BYTES = 1 << 28


def digest(model: ir.Model, samples: Iterable[Mapping[str, np.ndarray]], *facts: Any) -> str:
    """sha256 of a model, of samples and of facts (JSON)."""
    hasher = hashlib.sha256(ir.to_proto(model).SerializeToString(deterministic=True))
    for sample in samples:
        for name in sorted(sample):
            array = np.ascontiguousarray(sample[name])
            hasher.update(f"\0{name}\0{array.dtype.str}{array.shape}\0".encode() + array.tobytes())
    hasher.update(json.dumps(facts, sort_keys=True).encode())
    return hasher.hexdigest()


class Journal:
    """Entries by name, kept in `path`; with an empty path only in memory.

    RecipeError: the file is damaged, or of another model, calibration data or way of pruning (`key`).
    """

    def __init__(self, path: str | os.PathLike[str], key: str) -> None:
        self._path = Path(path) if str(path) else None
        self._key = key
        self._entries: dict[str, Any] = {}
        if self._path is None or not self._path.exists():
            return
        where = str(self._path)
        try:
            if self._path.stat().st_size > MOST_BYTES:
                raise ValueError("too large")
            document = json.loads(self._path.read_text(encoding="utf-8"))
            fits = isinstance(document, dict) and document["version"] == VERSION
            entries, found = (dict(document["entries"]), document["key"]) if fits else ({}, None)
        except OSError as error:
            raise RecipeError(f"cannot be read: {error.strerror}", where) from error
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(
                "is not a file of measurements of this version; delete it or name another", where
            ) from error
        if found != key:
            text = "was measured on another model, calibration data or way of pruning"
            raise RecipeError(f"{text}; delete it or name another file", where)
        self._entries = entries

    def get(self, name: str) -> Any:
        """The entry, or None."""
        return self._entries.get(name)

    def put(self, name: str, entry: Any) -> None:
        """Keep `entry` (JSON) and write the file. RecipeError: it cannot be written."""
        self._entries[name] = entry
        if self._path is None:
            return
        document = {"version": VERSION, "key": self._key, "entries": self._entries}
        stage = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            stage.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(stage, self._path)
        except OSError as error:
            stage.unlink(missing_ok=True)
            raise RecipeError(f"cannot be written: {error.strerror}", str(self._path)) from error
