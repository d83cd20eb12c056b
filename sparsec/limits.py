"""What a model may cost before it is refused. Every limit has a name: `--limit nodes=500000`, `Limits(nodes=500_000)`.

A model file is untrusted: a few hundred bytes can ask for gigabytes (a Range), for years (a Loop) or for a crash (a
malformed attribute of an old operator). Counts are compared before work is done; what a count cannot foresee, the
memory and the time of the process that loads the model (`sparsec.loading.isolation`), is limited by the system.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sparsec.errors import UsageError

_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


@dataclass(frozen=True)
class Limits:
    """Bounds on one model. Bytes, counts and seconds are positive integers."""

    file_bytes: int = (1 << 31) - 1  # the .onnx file; protobuf itself ends here
    weight_bytes: int = 1 << 34  # data in other files, all tensors together
    nodes: int = 50_000  # with functions inlined and loops written out
    depth: int = 12  # graphs inside graphs, functions inside functions
    elements: int = 1 << 30  # of one tensor, stored or computed
    folded_bytes: int = 1 << 28  # constants that folding computes, all together
    unroll: int = 64  # steps of a loop or of a recurrent operator that are written out
    memory: int = 3 << 29  # bytes that loading may take beyond `MEMORY_FACTOR` times the model's own size
    seconds: int = 60  # processor time of loading
    isolate: int = 1  # 0: load in this process, for a model of one's own

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "isolate" else 1
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 62:
                raise UsageError(f"{field.name} takes a number from {least}, got {value!r}", "--limit")


MEMORY_FACTOR = 8  # a parsed model, its serialised form, converted, checked and folded copies of it
DEFAULT = Limits()


def parse_limits(specs: Iterable[str]) -> Limits:
    """`NAME=VALUE`, with k, M or G (powers of 1024) behind the number; `_` or `-` in names.

    >>> parse_limits(["folded-bytes=512M", "seconds=300"]).folded_bytes
    536870912
    """
    from sparsec.targets import suggest

    names = [field.name for field in dataclasses.fields(Limits)]
    given: dict[str, Any] = {}
    for spec in specs:
        text, equals, value = spec.partition("=")
        name = text.strip().replace("-", "_")
        if not equals or name not in names:
            known = ", ".join(n.replace("_", "-") for n in names)
            raise UsageError(f"expected NAME=NUMBER with one of {known}, got {spec!r}{suggest(name, names)}", "--limit")
        if name in given:
            raise UsageError(f"{text} is given twice", "--limit")
        given[name] = _number(value, spec)
    return Limits(**given)


def _number(text: str, spec: str) -> int:
    digits = text.strip().lower()
    unit = _UNITS.get(digits[-1:], 1)
    digits = digits[:-1] if unit > 1 else digits
    if not digits.isascii() or not digits.isdigit() or len(digits) > 18:
        raise UsageError(f"expected a whole number, perhaps with k, M or G, got {spec!r}", "--limit")
    return int(digits) * unit
