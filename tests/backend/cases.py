"""The node tests of `onnx.backend.test` run against sparsec as a backend, and what is expected of each.

Counted are the tests of the standard domain up to opset 26 whose inputs and outputs are float16/32/64, integer or
bool tensors. An outcome is one of

    pass       every output is as near to ONNX's as its test asks
    rounding   not in some elements, but there no farther from the same model evaluated in float64 than ONNX's own
    refused    an UnsupportedError or ModelError, at the latest when it is compiled
    wrong      another value, or any other error
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.backend.test.runner import Runner
from onnx.reference import ReferenceEvaluator

from sparsec.backend import Backend
from sparsec.errors import ModelError, UnsupportedError
from sparsec.limits import Limits

EXPECTED = Path(__file__).with_name("expected_failures.txt")
NEWEST = 26  # opset
_WHOLE = (f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64))
TYPES = frozenset(getattr(TensorProto, name) for name in ("FLOAT16", "FLOAT", "DOUBLE", "BOOL", *_WHOLE))
STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class Outcome:
    """What became of one test."""

    name: str
    operator: str
    kind: str  # pass, rounding, refused, wrong
    why: str = ""

    @property
    def passed(self) -> bool:
        return self.kind in ("pass", "rounding")


@functools.cache
def collected() -> dict[str, Any]:
    """The tests that count, by name."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {case.name: case for case in collect_testcases(None) if _counts(case.model)}


def _counts(model: onnx.ModelProto) -> bool:
    opset = max((o.version for o in model.opset_import if o.domain in STANDARD), default=0)
    values = (*model.graph.input, *model.graph.output)
    return (
        opset <= NEWEST
        and all(node.domain in STANDARD for node in model.graph.node)
        and all(v.type.WhichOneof("value") == "tensor_type" and v.type.tensor_type.elem_type in TYPES for v in values)
    )


def sample(share: int) -> list[str]:
    """One test in `share`, always the same ones."""
    return [name for name in collected() if int(hashlib.sha256(name.encode()).hexdigest(), 16) % share == 0]


def operator_of(case: Any) -> str:
    """What the test is about: its one node, or the operator whose function body it is."""
    nodes = case.model.graph.node
    if len(nodes) == 1:
        return str(nodes[0].op_type)
    known = {name.lower(): name for name in {schema.name for schema in onnx.defs.get_all_schemas()}}
    words = case.name.removeprefix("test_").split("_")
    for end in range(len(words), 0, -1):
        if "".join(words[:end]) in known:
            return known["".join(words[:end])]
    return next((str(n.op_type) for n in reversed(nodes) if n.op_type not in ("Identity", "Cast")), "several")


def run(names: Iterable[str]) -> Iterator[Outcome]:
    """The outcome of each test."""
    for name in names:
        case = collected()[name]
        try:
            kind, why = _outcome(case)
        except (UnsupportedError, ModelError) as error:
            kind, why = "refused", " ".join(str(error).split())
        except Exception as error:  # whatever it is, it is ours
            kind, why = "wrong", f"{type(error).__name__}: {error}"
        yield Outcome(name, operator_of(case), kind, why)


def _outcome(case: Any) -> tuple[str, str]:
    prepared = Backend.prepare(case.model, limits=Limits(isolate=0))  # ONNX's own files
    kind, why = "pass", ""
    for inputs, expected in case.data_sets:
        feeds, wanted = [_array(x) for x in inputs], [_array(y) for y in expected]
        got = prepared.run(feeds)
        try:
            Runner.assert_similar_outputs(wanted, got, case.rtol, case.atol)
        except AssertionError as error:
            if not _nearer(case, feeds, wanted, got):
                return "wrong", " ".join(str(error).split())[:300]
            kind, why = "rounding", "where it differs it is no farther from the result in float64 than ONNX's"
    return kind, why


def _array(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else value


def _nearer(case: Any, feeds: list[Any], wanted: list[Any], got: Any) -> bool:
    """Whether each floating-point element that differs is at most as far from its value in float64 as ONNX's own."""
    wide = _in_float64(case.model)
    names = [value.name for value in case.model.graph.input]
    exact = ReferenceEvaluator(wide).run(
        None, {n: x.astype(np.float64) if x.dtype.kind == "f" else x for n, x in zip(names, feeds, strict=True)}
    )
    for y, theirs, ours in zip(exact, wanted, got, strict=True):
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            return False
        a, b = ours.astype(np.float64), theirs.astype(np.float64)
        apart = ~np.isclose(a, b, case.rtol, case.atol, equal_nan=True)
        if apart.any() and (theirs.dtype.kind != "f" or not (np.abs(a - y) <= np.abs(b - y))[apart].all()):
            return False
    return True


def _in_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph on float64: its inputs, outputs and constants, and what it casts to."""
    floats = (TensorProto.FLOAT16, TensorProto.FLOAT)
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    for value in (*wide.graph.input, *wide.graph.output):
        if value.type.tensor_type.elem_type in floats:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for node in wide.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in floats:
                attribute.i = TensorProto.DOUBLE
            elif attribute.t.data_type in floats:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float64)))
    return wide


def expected_failures() -> dict[str, str]:
    """Test name -> reason, as in the file: `name: reason`, lines of `#` and empty ones apart."""
    entries: dict[str, str] = {}
    for line in EXPECTED.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            name, _, reason = line.partition(":")
            if name in entries or not reason.strip():
                raise ValueError(f"{EXPECTED.name}: {name!r} is there twice or has no reason")
            entries[name] = reason.strip()
    return entries


def unexpected(outcomes: Iterable[Outcome], entries: dict[str, str]) -> list[str]:
    """What the file does not say: failures that are not in it, entries that pass; results that are wrong in any case."""
    problems = []
    for outcome in outcomes:
        if outcome.kind == "wrong":
            problems.append(f"{outcome.name} is wrong: {outcome.why}")
        elif not outcome.passed and outcome.name not in entries:
            problems.append(f"{outcome.name} is refused: {outcome.why}")
        elif outcome.passed and outcome.name in entries:
            problems.append(f"{outcome.name} passes, but {EXPECTED.name} says it fails: {entries[outcome.name]}")
    return problems
