"""Inputs get static shapes, or become constants.

A symbolic leading dimension is a batch and becomes 1; any other is said by `--shape`. An input with a default value, or
one that `--bind` fixes, is an initializer from here on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsec.errors import UnsupportedError, UsageError
from sparsec.loading.opsets import listed
from sparsec.loading.refusals import refuse_types
from sparsec.targets import suggest


def drop_initializer_inputs(graph: ir.Graph, bind: Mapping[str, Any], notes: list[str]) -> None:
    """Inputs with a default value are constants of that value, unless `bind` gives another."""
    dropped = []
    for value in [v for v in graph.inputs if v.is_initializer()]:
        if value.name in bind:
            del graph.initializers[str(value.name)]
            continue
        graph.inputs.remove(value)
        if value.uses():
            dropped.append(value.name)
    if dropped:
        notes.append(f"{len(dropped)} inputs have default values and became constants")


def fix_shapes(graph: ir.Graph, shapes: dict[str, Any], bind: dict[str, Any], where: str, notes: list[str]) -> None:
    """Every input static: `shapes` by name, values of `bind`; raises UsageError, and UnsupportedError for all at once."""
    names = [str(v.name) for v in graph.inputs]
    for option, given in (("--shape", shapes), ("--bind", bind)):
        for name in given:
            if name not in names:
                raise UsageError(f"the model has no input {name!r}{suggest(str(name), names)}", option)
    refuse_types(graph, where)
    symbols = _symbols(graph, shapes, bind, notes)
    problems = []
    for value in graph.inputs:
        dims = _dims(value)
        if value.name in shapes or value.name in bind:
            continue
        if dims is None:
            problems.append(f"input {value.name!r} has no shape: give --shape {value.name}:1x3x224x224")
            continue
        fixed = [symbols.get(d, d) if isinstance(d, str) else d for d in dims]
        if fixed and not isinstance(fixed[0], int):
            fixed[0] = 1
            notes.append(f"input {value.name!r}: batch {_dim_text(dims[0])} became 1")
        if all(isinstance(d, int) and d > 0 for d in fixed):
            value.shape = ir.Shape(fixed)
            continue
        open_dims = ", ".join(f"dimension {i} is {_dim_text(d)}" for i, d in enumerate(fixed) if not _is_size(d))
        example = "x".join(str(d) if _is_size(d) else "N" for d in fixed)
        problems.append(f"input {value.name!r}: {open_dims}; give --shape {value.name}:{example} with a number for N")
    if problems:
        raise UnsupportedError(f"every shape must be fixed at compile time: {listed(problems)}", where)
    for name, given in bind.items():
        _bind(graph, next(v for v in graph.inputs if v.name == name), given)


def _dims(value: ir.Value) -> list[int | str | None] | None:
    if value.shape is None:
        return None
    return [int(d) if isinstance(d, int) else d.value for d in value.shape.dims]


def _is_size(dim: int | str | None) -> bool:
    return isinstance(dim, int) and dim > 0


def _dim_text(dim: int | str | None) -> str:
    return f"symbolic ({dim})" if isinstance(dim, str) and dim else "symbolic" if not isinstance(dim, int) else str(dim)


def _symbols(graph: ir.Graph, shapes: dict[str, Any], bind: dict[str, Any], notes: list[str]) -> dict[str, int]:
    """Sizes of named dimensions: what `shapes` say, then 1 for every name that leads an input (a batch)."""
    symbols: dict[str, int] = {}
    for value in graph.inputs:
        dims = _dims(value)
        if value.name not in shapes:
            continue
        shape = tuple(int(d) for d in shapes[value.name])
        declared = "x".join("?" if not isinstance(d, int) else str(d) for d in dims) if dims is not None else "any"
        wrong = dims is not None and len(dims) != len(shape)
        wrong |= any(d < 0 or (d == 0 and (dims is None or wrong or dims[i] != 0)) for i, d in enumerate(shape))
        if not wrong and dims is not None:
            for dim, size in zip(dims, shape, strict=True):
                if isinstance(dim, int) and dim > 0:
                    wrong |= dim != size
                elif isinstance(dim, str) and symbols.setdefault(dim, size) != size:
                    text = f"{dim} cannot be {symbols[dim]} and {size} at once"
                    raise UsageError(text, f"--shape {value.name}")
        if wrong:
            text = f"input {value.name!r} is {declared}, got {'x'.join(map(str, shape))}"
            raise UsageError(f"{text}; symbolic dimensions (?) may be chosen, the others are fixed", "--shape")
        value.shape = ir.Shape(shape)
    for value in graph.inputs:
        dims = _dims(value)
        if dims and isinstance(dims[0], str) and value.name not in bind and dims[0] not in symbols:
            symbols[dims[0]] = 1
            notes.append(f"input {value.name!r}: batch {_dim_text(dims[0])} became 1")
    return symbols


def _bind(graph: ir.Graph, value: ir.Value, given: Any) -> None:
    option = f"--bind {value.name}"
    if value.dtype is None:
        raise UsageError("the input has no element type", option)
    dtype = value.dtype.numpy()
    try:
        array = np.asarray(_numbers(given) if isinstance(given, str) else given)
    except (TypeError, ValueError):
        array = np.asarray("")
    if array.dtype.kind not in "biuf":
        raise UsageError(f"expected numbers of type {dtype}, got {given!r}", option)
    whole = np.issubdtype(dtype, np.integer)
    if whole and not (np.isfinite(array).all() and np.array_equal(array, array.astype(dtype))):
        raise UsageError(f"expected whole numbers of type {dtype}, got {given!r}", option)
    dims = _dims(value)
    fixed = [d for d in dims or () if isinstance(d, int) and d > 0]
    if dims is not None and len(fixed) == len(dims):  # one number fills the input, a flat list takes its shape
        if array.size == 1:
            array = np.full(fixed, array.reshape(-1)[0])
        elif array.size == np.prod(fixed, dtype=np.int64):
            array = array.reshape(fixed)
    if dims is not None and (
        len(dims) != array.ndim or any(_is_size(d) and d != s for d, s in zip(dims, array.shape, strict=True))
    ):
        raise UsageError(f"the input has shape {dims}, got a value of shape {list(array.shape)}", option)
    graph.inputs.remove(value)
    value.shape = ir.Shape(array.shape)
    value.const_value = ir.tensor(np.asarray(array.astype(dtype), order="C"), name=value.name)
    graph.register_initializer(value)


def _numbers(text: str) -> list[float] | float:
    """`2`, `0.5` or `1+2+3`."""
    numbers = [int(p) if p.strip().lstrip("-").isdigit() else float(p) for p in text.split("+")]
    return numbers if len(numbers) > 1 else numbers[0]
