"""Run a piece of a graph in ONNX Runtime, batch by batch: values in, values out.

A segment is the set of nodes between `starts` (values that are given) and `ends` (values that are wanted):

    nodes = { n : n is needed for some end, and is not behind a start }

A batch of b samples is a dict value name -> array [b, *shape of the value]; the axis in front is ours, so that values
of any layout travel the same way. Where every start and end has a leading dimension of 1, the b samples run as one
[b, ...] call: the leading 1 of constant Reshape targets becomes -1 or 0. Whether that gives the same values as sample
by sample is not assumed: the first batch is run both ways (`SAME`), and a segment that differs (products over
positions, a batch that is transposed away) falls back to one call a sample.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from sparsec.errors import ModelError, SparsecError, one_line
from sparsec.proving.ort_session import open_session

BATCH = 16  # samples a call: enough to fill a matrix product, few enough for the widest activation
SAME = 1e-3  # of the largest value: batching reorders sums, a wrong batching gives other numbers altogether
Batch = Mapping[str, np.ndarray]


def batches(samples: Iterable[Mapping[str, np.ndarray]], size: int = BATCH) -> Iterator[dict[str, np.ndarray]]:
    """Samples stacked in front, `size` at a time; the last batch may be smaller."""
    stream = iter(samples)
    while chunk := list(islice(stream, size)):
        yield {name: np.stack([sample[name] for sample in chunk]) for name in chunk[0]}


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def values_of(model: ir.Model) -> dict[str, ir.Value]:
    """Every value of the main graph that has a name: inputs, initializers, node outputs."""
    found = {v.name: v for v in model.graph.inputs if v.name}
    found.update({v.name: v for v in model.graph.initializers.values() if v.name})
    for node in model.graph:
        found.update({v.name: v for v in node.outputs if v.name})
    return found


class Segment:
    """The nodes of `model` that lead from `starts` to `ends`, loaded in ONNX Runtime as they are now.

    `starts`: value names, by default the model's inputs. Raises ModelError if an end needs a model input that is not
    among the starts, or if ONNX Runtime refuses the piece.
    """

    def __init__(self, model: ir.Model, starts: Sequence[str] | None, ends: Sequence[str]) -> None:
        values = values_of(model)
        names = [str(v.name) for v in model.graph.inputs] if starts is None else list(starts)
        self.ends = tuple(dict.fromkeys(ends))
        for name in (*names, *self.ends):
            if name not in values:
                raise ModelError("is no value of the model's graph", f"value {name!r}")
        nodes, self.starts = _needed(model, names, self.ends)
        shapes = [_shape(values[n]) for n in (*self.starts, *self.ends)]
        self._batched: bool | None = None if all(s and s[0] == 1 for s in shapes) else False  # None: not tried
        self._load = partial(_session, model, nodes, [values[n] for n in self.starts], self.ends)
        self._free = self._load(batched=True) if self._batched is None else None
        self._fixed: ort.InferenceSession | None = None

    def run(self, batch: Batch) -> dict[str, np.ndarray]:
        """The ends for one batch: name -> [b, *shape]."""
        count = len(next(iter(batch.values())))
        if self._batched is None:
            self._batched = self._agrees(batch) if count > 1 else None
        if self._batched and self._free is not None:
            feeds = {n: batch[n].reshape(count, *batch[n].shape[2:]) for n in self.starts}
            outputs = self._free.run(list(self.ends), feeds)
            return {n: y.reshape(count, 1, *y.shape[1:]) for n, y in zip(self.ends, outputs, strict=True)}
        rows = [self._one({n: batch[n][i] for n in self.starts}) for i in range(count)]
        return {n: np.stack([row[k] for row in rows]) for k, n in enumerate(self.ends)}

    def _one(self, feeds: Batch) -> list[np.ndarray]:
        if self._fixed is None:
            self._fixed = self._load(batched=False)
        return self._fixed.run(list(self.ends), {name: np.asarray(x) for name, x in feeds.items()})  # scalars too

    def _agrees(self, batch: Batch) -> bool:
        """Whether two samples in one call give what they give alone."""
        assert self._free is not None
        try:
            feeds = {n: batch[n][:2].reshape(2, *batch[n].shape[2:]) for n in self.starts}
            together = self._free.run(list(self.ends), feeds)
        except Exception:  # a shape that is fixed inside: ONNX Runtime's exceptions have no common base
            return False
        alone = [self._one({n: batch[n][i] for n in self.starts}) for i in range(2)]
        for k, y in enumerate(together):
            expected = np.concatenate([alone[0][k], alone[1][k]])
            if y.shape != expected.shape or not np.isfinite(expected).all():
                return False
            if np.abs(y - expected).max(initial=0.0) > SAME * np.abs(expected).max(initial=0.0):
                return False
        return True


def _needed(model: ir.Model, starts: Sequence[str], ends: Sequence[str]) -> tuple[list[ir.Node], tuple[str, ...]]:
    """The nodes between, in graph order, and the starts that they (or the ends) read."""
    given, wanted = set(starts), set(ends)
    inputs = {v.name for v in model.graph.inputs}
    nodes = []
    for node in reversed(list(model.graph)):
        if any(y.name in wanted and y.name not in given for y in node.outputs):
            nodes.append(node)
            wanted.update(name for name in _reads(node) if name)
    missing = sorted(str(name) for name in wanted & inputs - given)
    if missing:
        raise ModelError(f"depends on {', '.join(missing)}, which is not given", f"values {', '.join(ends)}")
    return nodes[::-1], tuple(name for name in dict.fromkeys(starts) if name in wanted)


def _reads(node: ir.Node) -> Iterator[str | None]:
    """Names that a node reads, those that its subgraphs capture included."""
    for x in node.inputs:
        yield None if x is None else x.name
    for attribute in node.attributes.values():
        graphs = {ir.AttributeType.GRAPH: lambda a: [a.as_graph()], ir.AttributeType.GRAPHS: lambda a: a.as_graphs()}
        for graph in graphs.get(attribute.type, lambda a: [])(attribute):
            for inner in graph:
                yield from _reads(inner)
            yield from (v.name for v in graph.outputs)


def value_bytes(value: ir.Value) -> int | None:
    """Memory of a value of one sample; None if its shape or type is not known."""
    if value.shape is None or not value.shape.is_static() or value.dtype is None:
        return None
    return int(np.prod(value.shape.numpy(), dtype=np.int64)) * int(value.dtype.itemsize)


def _shape(value: ir.Value) -> tuple[int, ...]:
    """The static shape, () if it is not known."""
    if value.shape is None or not value.shape.is_static():
        return ()
    return value.shape.numpy()


def _session(
    model: ir.Model, nodes: Sequence[ir.Node], starts: Sequence[ir.Value], ends: Sequence[str], batched: bool
) -> ort.InferenceSession:
    graph = onnx.GraphProto(name="segment")
    used: dict[str, ir.Value] = {}
    for node in nodes:
        graph.node.append(ir.serde.serialize_node(node))
        for name in _reads(node):
            if name is not None and name in model.graph.initializers:
                used[name] = model.graph.initializers[name]
    targets = _leading_ones(nodes) if batched else {}
    for name, value in used.items():
        assert value.const_value is not None
        tensor = ir.serde.serialize_tensor(value.const_value)
        if name in targets:
            tensor = onnx.numpy_helper.from_array(targets[name], name)
        tensor.name = name
        graph.initializer.append(tensor)
    made = {name for node in graph.node for name in node.output}
    for value in starts:
        shape: list[int | None] = list(_shape(value))
        shape = [None, *shape[1:]] if batched and shape else shape
        kind = onnx.TensorProto.FLOAT if value.dtype is None else int(value.dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(str(value.name), kind, shape or None))
    for name in ends:
        if name not in made:
            raise ModelError("is a start or a constant: there is nothing to run", f"value {name!r}")
        graph.output.append(onnx.ValueInfoProto(name=name))
    proto = onnx.ModelProto(ir_version=min(model.ir_version, onnx.IR_VERSION), graph=graph)
    for domain, version in model.opset_imports.items():
        proto.opset_import.append(onnx.helper.make_opsetid(domain, version))
    # Calls are short and NumPy works between them: threads that spin would take its processors.
    entries = {"session.intra_op.allow_spinning": "0"}
    try:
        return open_session(
            proto, threads=processors(), entries=entries, where=f"a piece of the model: {', '.join(ends)}"
        )
    except SparsecError:
        raise
    except Exception as error:  # pybind classes without a common base
        raise ModelError(
            f"ONNX Runtime does not load a piece of the model: {one_line(error, 200)}", ", ".join(ends)
        ) from error


def _leading_ones(nodes: Sequence[ir.Node]) -> dict[str, np.ndarray]:
    """Constant Reshape targets [1, ...] for any batch, where the reshaped value leads with 1 too."""
    targets = {}
    for node in nodes:
        if node.op_type != "Reshape":
            continue
        value, target = node.inputs[0], node.inputs[1]
        if value is None or target is None or target.const_value is None or _shape(value)[:1] != (1,):
            continue
        shape = target.const_value.numpy().copy()
        if shape.size and shape.flat[0] == 1:
            if -1 not in shape:
                shape.flat[0] = -1
            elif not node.attributes.get_int("allowzero", 0):
                shape.flat[0] = 0
            targets[str(target.name)] = shape
    return targets
