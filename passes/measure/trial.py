"""What a model does with other weights: the nodes behind the changed initializers, run in ONNX Runtime.

Only nodes that depend on a changed initializer compute anything new. A `Part` is those nodes; what they read from
elsewhere is computed once by the original (`fetch`) and serves every trial. Sessions are made anew from bytes for each
set of weights: weights that are constants are packed by ONNX Runtime, and for a dozen samples that is cheaper than
feeding them as inputs (MobileNetV2, one thread: 44 ms once and 8 ms a run, against 13 to 17 ms a run).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import numpy_helper

from sparsec.data import load_data
from sparsec.errors import DataError
from sparsec.passes.layers import WeightedLayer
from sparsec.passes.measure.fidelity import Fidelity
from sparsec.passes.measure.segments import processors
from sparsec.ports import input_spec
from sparsec.proving.ort_session import open_session

Arrays = Mapping[str, np.ndarray]
Weights = Mapping[str, np.ndarray]  # initializer name -> array as stored
Pruned = np.ndarray | tuple[np.ndarray, Weights]  # [OC, IC, KH, KW], and other initializers that change with it
PruneLayer = Callable[[WeightedLayer, float], Pruned]
T = TypeVar("T")
R = TypeVar("R")

WORKERS = 8  # at most; each holds a session
PRUNED_BYTES = 1 << 29  # pruned weights that are kept for the next trial


def in_parallel(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`function` of each item, in order, on as many threads as this process may use; ONNX Runtime runs outside the GIL."""
    workers = min(WORKERS, processors())
    if workers < 2 or len(items) < 2:
        return _in_turn(function, items)
    contexts = [copy_context() for _ in items]  # one cannot be entered twice at a time
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda context, item: context.run(function, item), contexts, items))


def replacement(layer: WeightedLayer, pruned: Pruned) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The new weight [OC, IC, KH, KW], and every initializer that becomes another, as stored."""
    weight, others = pruned if isinstance(pruned, tuple) else (pruned, {})
    if weight.shape != layer.shape:
        raise ValueError(f"{layer.name}: expected a weight of shape {layer.shape}, got {weight.shape}")
    return weight, {str(layer.weight.name): layer.stored(weight), **others}


def pick_samples(model: ir.Model, calibration: Any, count: int) -> list[dict[str, np.ndarray]]:
    """`count` samples evenly spread over the calibration data (all, if there are fewer), each of the model's shape.

    calibration: an iterable of samples with a length, or arrays [N, ...] by input name. Spread, because data is often
    sorted by class. DataError: there are none.
    """
    if isinstance(calibration, Mapping):
        calibration = load_data(calibration, [input_spec(value) for value in model.graph.inputs])
    total = len(calibration)
    wanted = set(np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist())
    picked = [dict(sample) for i, sample in enumerate(calibration) if i in wanted]
    if not picked:
        raise DataError("the calibration data holds no sample", "--calibration")
    return picked


class Part:
    """The nodes of `model` that depend on any initializer of `names`, or all of them; a copy.

    inputs: values that the nodes read from elsewhere. outputs: which of the model's outputs they compute.
    """

    def __init__(self, model: ir.Model, names: Collection[str] | None = None) -> None:
        proto = ir.to_proto(model)
        graph = proto.graph
        constants = {t.name for t in graph.initializer}
        changed = set(names or ())
        inside: list[onnx.NodeProto] = []
        outside: list[onnx.NodeProto] = []
        for node in graph.node:
            depends = names is None or any(name in changed for name in node.input)
            (inside if depends else outside).append(node)
            if depends:
                changed.update(node.output)
        read = dict.fromkeys(name for node in inside for name in node.input if name)
        self.inputs: tuple[str, ...] = tuple(n for n in read if n not in changed and n not in constants)
        self._outside = {name for node in outside for name in node.input} & constants
        self.outputs: tuple[int, ...] = tuple(i for i, y in enumerate(graph.output) if y.name in changed)
        known = {v.name: v for v in (*graph.value_info, *graph.input, *graph.output)}  # an output may be read too
        self._proto = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
        self._proto.graph.name = graph.name
        self._proto.graph.node.extend(inside)
        self._proto.graph.input.extend(known[name] for name in self.inputs)
        self._proto.graph.output.extend(graph.output[i] for i in self.outputs)
        self._tensors = {t.name: t for t in graph.initializer if t.name in read}

    def session(self, weights: Weights) -> ort.InferenceSession:
        """A session whose initializers are `weights` where they are given. ValueError: a node outside reads one, too."""
        strangers = [name for name in weights if name not in self._tensors or name in self._outside]
        if strangers:
            raise ValueError(f"not read by the changed part alone: {', '.join(strangers)}")
        proto = onnx.ModelProto()
        proto.CopyFrom(self._proto)
        for name, tensor in self._tensors.items():
            proto.graph.initializer.append(numpy_helper.from_array(weights[name], name) if name in weights else tensor)
        return open_session(proto)

    def run(self, weights: Weights, samples: Iterable[Arrays]) -> list[np.ndarray]:
        """The outputs that depend on the part, [samples, ...] each; a sample holds `inputs`."""
        session = self.session(weights)
        results = [session.run(None, {name: sample[name] for name in self.inputs}) for sample in samples]
        return [np.stack(ys) for ys in zip(*results, strict=True)]


def fetch(model: ir.Model, names: Collection[str], samples: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
    """The values `names` (inputs and intermediate ones) that the model computes from each sample."""
    proto = ir.to_proto(model)
    known = {v.name: v for v in (*proto.graph.value_info, *proto.graph.output)}
    inputs = {v.name for v in proto.graph.input}
    computed = [name for name in dict.fromkeys(names) if name not in inputs]
    given = [name for name in dict.fromkeys(names) if name in inputs]
    if not computed:
        return [{name: sample[name] for name in given} for sample in samples]
    del proto.graph.output[:]
    proto.graph.output.extend(known[name] for name in computed)
    session = open_session(proto)
    fed = [x.name for x in session.get_inputs()]

    def one(sample: Arrays) -> dict[str, np.ndarray]:
        values = session.run(computed, {name: sample[name] for name in fed})
        return {**{name: sample[name] for name in given}, **dict(zip(computed, values, strict=True))}

    return in_parallel(one, samples)


def reference_outputs(model: ir.Model, samples: Sequence[Arrays]) -> tuple[list[str], list[np.ndarray]]:
    """Names of the model's outputs, and each [samples, ...]."""
    names = [str(y.name) for y in model.graph.outputs]
    values = fetch(model, names, samples)
    return names, [np.stack([v[name] for v in values]) for name in names]


class Trials:
    """The whole model with any layers pruned to any sparsity, compared with the original on `samples`."""

    def __init__(
        self, model: ir.Model, layers: Sequence[WeightedLayer], prune_layer: PruneLayer, samples: Sequence[Arrays]
    ) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self._prune = prune_layer
        self._whole = Part(model)
        self._samples = samples
        self._fidelity = Fidelity(*reference_outputs(model, samples))
        self._pruned: dict[tuple[str, float], dict[str, np.ndarray]] = {}
        self._bytes = 0

    @property
    def measure(self) -> str:
        """What a damage is, for the report."""
        return str(self._fidelity)

    def __len__(self) -> int:
        return len(self._samples)

    def weights(self, sparsities: Mapping[str, float]) -> dict[str, np.ndarray]:
        """Every initializer that changes, as stored; sparsity 0 leaves a layer as it is."""
        changed: dict[str, np.ndarray] = {}
        for name, sparsity in sparsities.items():
            if sparsity <= 0:
                continue
            stored = self._pruned.get((name, sparsity))
            if stored is None:
                layer = self._layers[name]
                stored = replacement(layer, self._prune(layer, sparsity))[1]
                size = sum(array.nbytes for array in stored.values())
                if self._bytes + size <= PRUNED_BYTES:
                    self._pruned[name, sparsity] = stored
                    self._bytes += size
            changed.update(stored)
        return changed

    def damages(self, sparsities: Mapping[str, float]) -> np.ndarray:
        """The damage of each sample."""
        outputs = self._run(self.weights(sparsities), range(len(self._samples)))
        return self._fidelity.damages(outputs)

    def damages_of(self, several: Sequence[Mapping[str, float]], rows: Sequence[int]) -> list[float]:
        """The mean damage of each allocation on the samples `rows`."""

        def one(weights: Weights) -> float:
            outputs = self._run(weights, rows, parallel=False)
            return float(self._fidelity.damages(outputs, np.asarray(rows)).mean())

        return in_parallel(one, [self.weights(sparsities) for sparsities in several])

    def measured(self, sparsities: Mapping[str, float]) -> tuple[float, float | None]:
        """Mean damage over all samples, and the share of them whose top class changed (None: no classifier)."""
        outputs = self._run(self.weights(sparsities), range(len(self._samples)))
        changed = float(self._fidelity.changed(outputs).mean()) if self._fidelity.classifies else None
        return float(self._fidelity.damages(outputs).mean()), changed

    def _run(self, weights: Weights, rows: Sequence[int], parallel: bool = True) -> list[np.ndarray]:
        session = self._whole.session(weights)

        def one(row: int) -> list[np.ndarray]:
            return session.run(None, {name: self._samples[row][name] for name in self._whole.inputs})

        results = in_parallel(one, rows) if parallel else _in_turn(one, rows)
        return [np.stack(ys) for ys in zip(*results, strict=True)]


def _in_turn(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    return [function(item) for item in items]
