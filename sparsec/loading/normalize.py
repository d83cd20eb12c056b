"""The line of loading, from what was read to a normalized model, in this process.

read (sparsec.loading.reading) -> inline functions -> refuse what is not plain ONNX -> upgrade to `OPSET` -> name the nodes -> fix
input shapes, bind inputs (sparsec.loading.input_shapes) -> the passes of `normalization`, in this order -> check that every value
has a static shape and a type (sparsec.loading.refusals). Deterministic; weights keep their values except where BatchNorm is
folded into them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from sparsec.errors import ModelError, SparsecError, one_line
from sparsec.limits import DEFAULT, Limits
from sparsec.loading.exchange import mapped, without_data
from sparsec.loading.external_data import Extent
from sparsec.loading.input_shapes import drop_initializer_inputs, fix_shapes
from sparsec.loading.opsets import inline_functions, to_working_opset
from sparsec.loading.reading import Source, check_proto, read_source
from sparsec.loading.refusals import refuse_unfinished
from sparsec.passes import (
    CancelTransposes,
    ExplicitPads,
    FoldBatchNorm,
    FoldConstants,
    FuseLayerNorm,
    ImportQOperator,
    NormalizeQdq,
    RemoveNoOps,
    UnrollRecurrent,
)
from sparsec.passes.normalization.fold_constants import remove_unused_initializers
from sparsec.rewriting.passes_api import META_KEY, Pass

Say = Callable[[str], None]
Beside = dict[str, tuple[ir.Tensor, Extent]]


def normalization(limits: Limits = DEFAULT) -> tuple[Pass, ...]:
    """The passes of loading, in order.

    Shapes first (the others need them) but behind what has no standard operator yet; again at the end, since folding
    may leave constants to fold.
    """
    fold = FoldConstants(limits.unroll, limits.folded_bytes, limits.nodes)
    return (
        ImportQOperator(),
        fold,
        UnrollRecurrent(limits.unroll),
        RemoveNoOps(),
        CancelTransposes(),
        NormalizeQdq(),
        ExplicitPads(),
        FoldBatchNorm(),
        fold,
        FuseLayerNorm(),
    )


def load_here(
    source: str | os.PathLike[str] | bytes | onnx.ModelProto,
    shapes: dict[str, Any],
    bind: dict[str, Any],
    notes: list[str],
    limits: Limits = DEFAULT,
    say: Say = lambda text: None,
    on_map: Callable[[int], None] = lambda size: None,
) -> tuple[ir.Model, Beside]:
    """`sparsec.loading.load.load_model` in this process; with the model its large initializers that still lie in a file beside."""
    say("reading the file")
    read = read_source(source, limits, on_map=on_map)
    try:
        return _load(read, shapes, bind, notes, limits, say)
    except (SparsecError, MemoryError):
        raise
    except Exception as error:  # what onnx.checker lets through and the libraries below then stumble over
        text = one_line(f"{type(error).__name__}: {error}")
        raise ModelError(f"cannot be normalized: {text}", read.where) from error


def _load(
    read: Source, shapes: dict[str, Any], bind: dict[str, Any], notes: list[str], limits: Limits, say: Say
) -> tuple[ir.Model, Beside]:
    where = read.where
    say("onnx.checker")
    check_proto(read.proto, where)
    say("inlining functions")
    proto = inline_functions(read.proto, where)
    say("the opset conversion")
    model = ir.from_proto(to_working_opset(proto, where))
    beside = _attach(model.graph, read)
    say("shape inference and constant folding")
    _name_nodes(model.graph)
    drop_initializer_inputs(model.graph, bind, notes)
    fix_shapes(model.graph, shapes, bind, where, notes)
    _forget_inferred_shapes(model.graph)
    normalize(model, limits)
    refuse_unfinished(model, where, limits)
    _tidy(model)
    say("onnx.checker on the normalized model")
    check_proto(without_data(model), where)
    return model, beside


def _attach(graph: ir.Graph, read: Source) -> Beside:
    """Give the large external initializers their data back, mapped."""
    beside: Beside = {}
    for value in [v for v in graph.inputs if v.name in read.lazy]:
        name = str(value.name)
        proto, extent = read.lazy[name]
        tensor = mapped(read.files.view(extent), ir.serde.TensorProtoTensor(proto), name, read.where)
        beside[name] = tensor, extent
        value.const_value = tensor
        if value.name not in read.declared:
            graph.inputs.remove(value)
        graph.register_initializer(value)
    return beside


def normalize(model: ir.Model, limits: Limits = DEFAULT) -> None:
    """Run the passes of loading in place."""
    for step in normalization(limits):
        step(model)
    common.RemoveUnusedNodesPass()(model)
    remove_unused_initializers(model.graph)
    common.TopologicalSortPass()(model)
    model.meta.pop(META_KEY, None)


def _name_nodes(graph: ir.Graph) -> None:
    """Every node gets a unique name; missing ones are `OPERATOR_INDEX`, the index counting nodes of the file."""
    taken = {node.name for node in graph if node.name}
    seen: set[str] = set()
    for index, node in enumerate(graph):
        name = node.name or f"{node.op_type}_{index}"
        if node.name in seen or (not node.name and name in taken):
            base, count = name, 1
            while name in taken:
                name, count = f"{base}_{count}", count + 1
        taken.add(name)
        seen.add(name)
        node.name = name


def _forget_inferred_shapes(graph: ir.Graph) -> None:
    """Declared shapes of intermediate values may hold the batch of the export; they are inferred anew."""
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for value in node.outputs:
            value.shape = None


def _tidy(model: ir.Model) -> None:
    """Only what the model computes stays: no documentation strings, no exporter's metadata, no unused domains."""
    for domain in [d for d in model.opset_imports if d]:
        del model.opset_imports[domain]
    common.ClearMetadataAndDocStringPass()(model)
    _name_nodes(model.graph)
    model.graph.name = model.graph.name or "model"
    model.producer_name, model.producer_version = "", ""
