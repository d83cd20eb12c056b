"""Measured choices: a JSON file that says, for layers of one CPU, which kernel was fastest. `sparsec tune` writes it.

A layer is its geometry and how much of it each format stores: layers that (nearly) agree in that run alike, whatever their
weights. The file holds for one CPU and for the kernels of one version. It is untrusted input: its form is checked
when it is read, and a choice must be one that lowering would consider itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sparsec.errors import TuningError

if TYPE_CHECKING:
    from sparsec.lowering.prices import Prices

SCHEMA = 2
_MAX_BYTES = 64 << 20
_MAX_LAYERS = 100_000
_MAX_CANDIDATES = 1000
_AGAIN = "; run `sparsec tune` again"
ALIKE = 1.08  # ratio up to which two layers' stored columns count as the same


@dataclass(frozen=True)
class Measured:
    """One way to run a layer, and its time.

    Register tiles of `rows` x `vectors` vectors of `lanes` (0: the kernel's own), `depth` terms a pass (0: all).
    """

    kernel: str
    rows: int
    vectors: int
    lanes: int
    depth: int
    predicted_us: float
    measured_us: float

    @property
    def tile(self) -> tuple[int, int, int, int]:
        """`rows`, `vectors`, `lanes`, `depth`."""
        return self.rows, self.vectors, self.lanes, self.depth

    @property
    def shape(self) -> str:
        """Rows x pixels (or columns) of the register tile, for people."""
        return f"{self.rows}x{self.vectors * self.lanes}" if self.rows else ""


@dataclass(frozen=True)
class Entry:
    """What was measured of one layer: the choice first."""

    layer: Mapping[str, Any]
    candidates: tuple[Measured, ...]

    @property
    def choice(self) -> Measured:
        """The fastest; among equals the one that the model prefers."""
        return self.candidates[0]

    def best(self, wanted: Callable[[str], bool]) -> Measured | None:
        """The fastest candidate with a wanted kernel."""
        found = [c for c in self.candidates if wanted(c.kernel)]
        return min(found, key=lambda c: c.measured_us, default=None)


class Choices(Protocol):
    """What lowering asks while it chooses."""

    def find(self, name: str, prices: Prices) -> Entry | None:
        """What was measured of the layer at node `name`; None: choose by prediction."""


def layer_key(facts: Mapping[str, Any]) -> str:
    """A short digest of `Prices.facts`."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """The largest ratio between what two layers store in any one form; infinite if they differ in anything else."""
    first, second = a.get("stored"), b.get("stored")
    if not isinstance(first, dict) or not isinstance(second, dict) or first.keys() != second.keys():
        return math.inf
    if any(a.get(key) != b.get(key) for key in (a.keys() | b.keys()) - {"stored"}):
        return math.inf
    pairs = [(max(first[key], 1), max(second[key], 1)) for key in first]
    return max((max(x / y, y / x) for x, y in pairs), default=1.0)


@cache
def kernels_version() -> str:
    """Digest of the kernels' source and the code generator's version: what else decides how fast a choice runs."""
    digest = hashlib.sha256(metadata.version("apache-tvm").encode())
    for folder in (resources.files("sparsec.kernels"), resources.files("sparsec.kernels.conv")):
        for file in sorted((f for f in folder.iterdir() if f.name.endswith(".py")), key=lambda f: f.name):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:24]


@dataclass(frozen=True)
class Tuning:
    """The content of such a file. `model`: the CPU it was measured on; `cpu`: the stanza it was compiled for."""

    model: str
    cpu: str
    kernels: str
    entries: dict[str, Entry] = field(default_factory=dict)
    path: str = ""
    digest: str = ""  # sha256 of the file

    def nearest(self, facts: Mapping[str, Any]) -> Entry | None:
        """What was measured of a layer like this, the most similar one."""
        exact = self.entries.get(layer_key(facts))
        if exact is not None:
            return exact
        near = min(self.entries.values(), key=lambda entry: distance(entry.layer, facts), default=None)
        return near if near is not None and distance(near.layer, facts) <= ALIKE else None

    def document(self) -> dict[str, Any]:
        """The file as JSON."""
        layers = {
            key: {"layer": dict(entry.layer), "candidates": [dataclasses.asdict(c) for c in entry.candidates]}
            for key, entry in self.entries.items()
        }
        return {"schema": SCHEMA, "model": self.model, "cpu": self.cpu, "kernels": self.kernels, "layers": layers}

    def write(self, path: Path) -> None:
        """Replace the file in one step."""
        from sparsec.manifest import dump_json
        from sparsec.staging import staged_file, storage_error

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, path) from error
        with staged_file(path, overwrite=True) as stage:
            stage.write_text(dump_json(self.document()), encoding="utf-8")

    def check_for(self, cpu: str) -> None:
        """Raise TuningError unless it holds for code of this version for `cpu`."""
        if self.cpu != cpu:
            raise TuningError(f"measured for {self.cpu}, compiling for {cpu}; leave it out or give another", self.path)
        if self.kernels != kernels_version():
            raise TuningError(f"measured with other kernels than this version has{_AGAIN}", self.path)


@dataclass
class Lookup:
    """The choices of a `Tuning` for one lowering, with a count of what it knew; one per lowering, never shared."""

    tuning: Tuning
    asked: int = 0
    found: int = 0

    def find(self, name: str, prices: Prices) -> Entry | None:
        """See `Choices`. Raises TuningError for a choice that this version does not have."""
        entry = self.tuning.nearest(prices.facts)
        self.asked += 1
        if entry is None:
            return None
        if prices.find(entry.choice.kernel, entry.choice.tile) is None:
            what = f"{entry.choice.kernel} in tiles of {'x'.join(map(str, entry.choice.tile))}"
            raise TuningError(f"chooses {what}, which this version does not offer for {name}{_AGAIN}", self.tuning.path)
        self.found += 1
        return entry

    def notes(self) -> tuple[str, ...]:
        """What the user should know: layers that were not measured."""
        if self.found == self.asked:
            return ()
        rest = self.asked - self.found
        return (f"tuning: {rest} of {self.asked} layers were not measured and are chosen by prediction",)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_tuning(path: str | os.PathLike[str]) -> Tuning:
    """Read and check a tuning file. Raises TuningError."""
    where = str(path)
    try:
        if Path(path).stat().st_size > _MAX_BYTES:
            raise TuningError(f"larger than {_MAX_BYTES} bytes", where)
        raw = Path(path).read_bytes()
        document = json.loads(raw)
    except OSError as error:
        raise TuningError(f"cannot read: {error.strerror}; `sparsec tune` makes one", where) from error
    except (ValueError, RecursionError) as error:
        raise TuningError(f"not JSON ({str(error).splitlines()[0]}){_AGAIN}", where) from error
    c = _Checker(where)
    c.keys(document, {"schema", "model", "cpu", "kernels", "layers"}, "file")
    if document["schema"] != SCHEMA or isinstance(document["schema"], bool):
        raise TuningError(
            f"schema {c.shown(document['schema'])}, this version of sparsec reads schema {SCHEMA}{_AGAIN}", where
        )
    layers = document["layers"]
    if not isinstance(layers, dict) or len(layers) > _MAX_LAYERS:
        raise c.fail("layers", f"an object of at most {_MAX_LAYERS} layers", layers)
    entries = {key: _entry(c, key, value) for key, value in layers.items()}
    model, cpu, kernels = (c.text(document[key], key) for key in ("model", "cpu", "kernels"))
    return Tuning(model, cpu, kernels, entries, where, hashlib.sha256(raw).hexdigest())


def _entry(c: _Checker, key: str, value: object) -> Entry:
    where = f"layers.{c.shown(key)}"
    table = c.keys(value, {"layer", "candidates"}, where)
    layer, rows = table["layer"], table["candidates"]
    if not isinstance(layer, dict) or layer_key(layer) != key:
        raise c.fail(f"{where}.layer", "the facts that the key is the digest of", layer)
    if not isinstance(layer.get("stored"), dict):
        raise c.fail(f"{where}.layer.stored", "an object of percents", layer.get("stored"))
    for name, percent in layer["stored"].items():
        c.size(percent, f"{where}.layer.stored.{c.shown(name)}")
    if not isinstance(rows, list) or not 1 <= len(rows) <= _MAX_CANDIDATES:
        raise c.fail(f"{where}.candidates", f"a list of 1 to {_MAX_CANDIDATES}", rows)
    names = {f.name for f in dataclasses.fields(Measured)}
    candidates = []
    for i, row in enumerate(rows):
        at = f"{where}.candidates[{i}]"
        c.keys(row, names, at)
        sizes = (c.size(row[name], f"{at}.{name}") for name in ("rows", "vectors", "lanes", "depth"))
        times = (c.time(row[name], f"{at}.{name}") for name in ("predicted_us", "measured_us"))
        candidates.append(Measured(c.text(row["kernel"], f"{at}.kernel"), *sizes, *times))
    return Entry(layer, tuple(candidates))


class _Checker:
    """Each method returns an untrusted value in the type it promises or raises TuningError."""

    def __init__(self, where: str) -> None:
        self._where = where

    def shown(self, value: object) -> str:
        text = re.sub(r"[^ -~]", "?", value if isinstance(value, str) else repr(value))
        return text[:40] + "..." if len(text) > 40 else text

    def fail(self, key: str, expected: str, value: object) -> TuningError:
        return TuningError(f"{key}: expected {expected}, got {self.shown(value)}; is this a tuning file?", self._where)

    def keys(self, value: object, names: set[str], key: str) -> dict[str, Any]:
        if not isinstance(value, dict) or set(value) != names:
            raise self.fail(key, f"an object of {', '.join(sorted(names))}", value)
        return value

    def text(self, value: object, key: str) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= 200:
            raise self.fail(key, "a short string", value)
        return value

    def size(self, value: object, key: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 4096:
            raise self.fail(key, "an integer from 0 to 4096", value)
        return value

    def time(self, value: object, key: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:  # nor NaN
            raise self.fail(key, "a time in microseconds", value)
        return float(value)
