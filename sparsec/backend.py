"""sparsec as an ONNX backend (`onnx.backend.base.Backend`): `sparsec.backend.Backend.prepare(model).run(inputs)`.

sparsec compiles for fixed shapes, so a prepared model is compiled at its first run, for the shapes of the inputs that it
is given, and again when they change. Inputs that shapes depend on (the second input of Reshape, the pads of Pad, ...)
are compile-time constants: their values are part of what it is compiled for. Code runs in this process
(`sparsec.inprocess`); `sparsec.compile` makes artifacts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.backend.base import Backend as OnnxBackend
from onnx.backend.base import BackendRep, namedtupledict

from sparsec.errors import DataError, UnsupportedError
from sparsec.inprocess import InProcess
from sparsec.limits import DEFAULT, Limits
from sparsec.loading.load import load_model
from sparsec.lowering import lower
from sparsec.program import Program
from sparsec.targets import Target, find_target

# Inputs by position that decide a shape, or that lowering needs as numbers.
SHAPE_INPUTS: Mapping[str, tuple[int, ...]] = {
    "AffineGrid": (1,),
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "Compress": (1,),
    "ConstantOfShape": (0,),
    "CumProd": (1,),
    "CumSum": (1,),
    "DFT": (1, 2),
    "Dropout": (1, 2),
    "Expand": (1,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "If": (0,),
    "Loop": (0, 1),
    "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1, 2, 3, 4),
    "NonZero": (0,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "ReduceL1": (1,),
    "ReduceL2": (1,),
    "ReduceLogSum": (1,),
    "ReduceLogSumExp": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceProd": (1,),
    "ReduceSum": (1,),
    "ReduceSumSquare": (1,),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "STFT": (1, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "SplitToSequence": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
SHAPE_RANK = 1  # of an input that shapes are computed from by other operators


def shape_inputs(graph: onnx.GraphProto) -> list[str]:
    """Names of the graph's inputs that shapes depend on: directly, or through any nodes if they are lists of numbers."""
    direct: set[str] = set()
    wanted: set[str] = set()
    for node in reversed(graph.node):
        if node.domain not in ("", "ai.onnx"):
            continue
        direct.update(node.input[i] for i in SHAPE_INPUTS.get(node.op_type, ()) if i < len(node.input))
        if node.op_type not in ("Shape", "Size") and any(name in wanted | direct for name in node.output):
            wanted.update(node.input)
        for inner in _subgraphs(node):
            direct.update(shape_inputs(inner))
    lists = {v.name for v in graph.input if len(v.type.tensor_type.shape.dim) <= SHAPE_RANK}
    return [value.name for value in graph.input if value.name in direct | (wanted & lists)]


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def lowered(
    model: onnx.ModelProto, inputs: Mapping[str, np.ndarray], target: Target, limits: Limits = DEFAULT
) -> Program:
    """`model` lowered for the shapes of `inputs`, the values of those that shapes depend on fixed."""
    fixed = {*shape_inputs(model.graph), *(value.name for value in model.graph.initializer)}
    bound = [name for name in inputs if name in fixed]
    shapes = {name: array.shape for name, array in inputs.items() if name not in fixed}
    if bound:
        model = _with_constants(model, {name: inputs[name] for name in bound})
    return lower(load_model(model, shapes, limits=limits), target)


def _with_constants(model: onnx.ModelProto, values: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """`model` with inputs turned into initializers, which all of loading sees."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    for kind in (graph.input, graph.initializer):
        kept = [entry for entry in kind if entry.name not in values]
        del kind[:]
        kind.extend(kept)
    graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in values.items())
    return changed


class Prepared(BackendRep):
    """A model that is compiled when it first sees inputs, and for each new set of shapes."""

    def __init__(self, model: onnx.ModelProto, target: Target, limits: Limits = DEFAULT) -> None:
        self._model = model
        self._limits = limits
        self._target = target
        constant = {value.name for value in model.graph.initializer}
        self._names = [value.name for value in model.graph.input if value.name not in constant]
        self._shape_inputs = set(shape_inputs(model.graph))
        self._compiled: dict[tuple[Any, ...], InProcess] = {}

    def run(self, inputs: Any, **kwargs: Any) -> tuple[np.ndarray, ...]:
        """Outputs in the graph's order. `inputs`: arrays by name, or in the graph's order.

        Raises UnsupportedError for what cannot be compiled (sequences, strings, shapes that depend on data), DataError
        for inputs that do not fit.
        """
        feeds = self._feeds(inputs)
        key = tuple(
            (name, array.shape, array.tobytes() if name in self._shape_inputs else b"") for name, array in feeds.items()
        )
        if key not in self._compiled:
            self._compiled[key] = InProcess(lowered(self._model, feeds, self._target, self._limits))
        executable = self._compiled[key]
        results = executable.run({tensor.name: feeds[tensor.name] for tensor in executable.program.inputs})
        names = [value.name for value in self._model.graph.output]
        return namedtupledict("Outputs", names)(*(results[name] for name in names))

    def _feeds(self, inputs: Any) -> dict[str, np.ndarray]:
        if isinstance(inputs, Mapping):
            feeds = dict(inputs)
        else:
            given: Sequence[Any] = inputs if isinstance(inputs, (list, tuple)) else [inputs]
            if len(given) > len(self._names):
                raise DataError(f"expected {len(self._names)} inputs, got {len(given)}", "run")
            feeds = dict(zip(self._names, given, strict=False))
        wrong = [name for name, value in feeds.items() if not isinstance(value, (np.ndarray, np.generic))]
        if wrong:
            raise UnsupportedError(f"inputs must be tensors of numbers: {', '.join(map(repr, wrong))}")
        return {name: np.asarray(value) for name, value in feeds.items()}


class Backend(OnnxBackend):
    """The interface of `onnx.backend.base`; device "CPU" is this machine."""

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> Prepared:
        """`model`, to be compiled at its first run. `target`: a `Target`, by default this machine's CPU; `limits`: `Limits`."""
        # Not ONNX's own check of the model: loading makes it, and outputs without a shape are valid there.
        return Prepared(model, kwargs.get("target") or find_target("host"), kwargs.get("limits") or DEFAULT)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Only "CPU"."""
        return device == "CPU"


prepare = Backend.prepare
run_model = Backend.run_model
supports_device = Backend.supports_device

__all__ = ["Backend", "Prepared", "prepare", "run_model", "shape_inputs", "supports_device"]
