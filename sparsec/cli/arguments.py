"""Option values of the command line that have a form of their own."""

from __future__ import annotations

from collections.abc import Sequence

from sparsec.errors import UsageError


def parse_shapes(specs: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """`INPUT:1x3x224x224`, split at the last colon.

    >>> parse_shapes(["serving:0:1x16"])
    {'serving:0': (1, 16)}
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in specs:
        name, colon, text = spec.rpartition(":")
        dims = text.lower().split("x")
        if not colon or not name or not all(d.isascii() and d.isdigit() and 0 < int(d) < 1 << 31 for d in dims):
            raise UsageError(f"expected INPUT:1x3x224x224, got {spec!r}", "--shape")
        if name in shapes:
            raise UsageError(f"input {name!r} is given twice", "--shape")
        shapes[name] = tuple(int(d) for d in dims)
    return shapes


def parse_binds(specs: Sequence[str]) -> dict[str, str]:
    """`INPUT=VALUE`, split at the last equals sign."""
    binds: dict[str, str] = {}
    for spec in specs:
        name, equals, value = spec.rpartition("=")
        if not equals or not name or not value:
            raise UsageError(f"expected INPUT=VALUE, got {spec!r}", "--bind")
        if name in binds:
            raise UsageError(f"input {name!r} is given twice", "--bind")
        binds[name] = value
    return binds


def parse_inputs(specs: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """`INPUT=FILE.npy`; both may hold an equals sign, so known input names are tried first."""
    from sparsec.targets import suggest

    files: dict[str, str] = {}
    for spec in specs:
        fitting = [name for name in names if spec.startswith(name + "=")]
        name = max(fitting, key=len) if fitting else spec.partition("=")[0]
        file = spec[len(name) + 1 :]
        if not file:
            raise UsageError(f"expected INPUT=FILE.npy, got {spec!r}", "--input")
        if not fitting:
            raise UsageError(f"the model has no input {name!r}{suggest(name, list(names))}", "--input")
        if name in files:
            raise UsageError(f"input {name!r} is given twice", "--input")
        files[name] = file
    return files
