"""The light models of `onnx.backend.test` (AlexNet ... VGG-19) against sparsec as a backend, built in memory.

Their weights are ConstantOfShape nodes, up to 400 MB each, more than loading folds by default: a file of 9 kB that asks for
half a gigabyte is what a hostile one looks like. Equal weights make equal outputs, so each model can also have drawn ones.
"""

from __future__ import annotations

import functools
import os
import tempfile
import unittest
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
from onnx import numpy_helper

from sparsec.backend import Backend
from sparsec.limits import Limits

FOLDER = Path(onnx.backend.test.__file__).parent / "data" / "light"
LIMITS = Limits(isolate=0, folded_bytes=1 << 30)  # ONNX's own files


def names() -> list[str]:
    """Of the models."""
    return sorted(path.stem.removeprefix("light_") for path in FOLDER.glob("light_*.onnx"))


@functools.cache
def _suite() -> type[unittest.TestCase]:
    """ONNX's own tests, with our limits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {f"test_{name}": {"limits": LIMITS} for name in names()}
        suite = onnx.backend.test.BackendTest(Backend, __name__, test_kwargs=options)
    found: type[unittest.TestCase] = suite.test_cases["OnnxBackendRealModelTest"]
    return found


def run(name: str) -> None:
    """ONNX's own test of a model: its input, its expected output and tolerances. Raises AssertionError or what sparsec raises."""
    with _own_folder():
        _suite()(f"test_{name}_cpu").debug()


@contextmanager
def _own_folder() -> Iterator[None]:
    """The suite writes its inputs to a folder in the home directory otherwise."""
    before = os.environ.get("ONNX_MODELS")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ONNX_MODELS"] = folder
        try:
            yield
        finally:
            os.environ.pop("ONNX_MODELS")
            if before is not None:
                os.environ["ONNX_MODELS"] = before


def drawn(name: str, seed: int = 0) -> onnx.ModelProto:
    """The model with normal weights as initializers, of variance 2 / (inputs of an output); vectors stay as they are."""
    model = onnx.load(str(FOLDER / f"light_{name}.onnx"))
    graph, rng = model.graph, np.random.default_rng(seed)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(node)
            continue
        shape = tuple(stored[node.input[0]])
        (value,) = (numpy_helper.to_array(a.t) for a in node.attribute)
        array = np.full(shape, value.reshape(-1)[0])
        if len(shape) > 1:
            array = rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / np.prod(shape[1:])))
        graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in kept for name in node.input}
    tensors = [tensor for tensor in graph.initializer if tensor.name in used]
    inputs = [value for value in graph.input if value.name not in {tensor.name for tensor in graph.initializer}]
    for field, left in ((graph.initializer, tensors), (graph.input, inputs)):
        del field[:]
        field.extend(left)
    model.ir_version = max(model.ir_version, 4)  # before, initializers had to be inputs
    return model
