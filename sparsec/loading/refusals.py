"""What loading refuses: everything that cannot be compiled, all of it in one message."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparsec.errors import ModelError, UnsupportedError
from sparsec.limits import Limits
from sparsec.loading.external_data import RANK
from sparsec.loading.opsets import STANDARD_DOMAINS, listed
from sparsec.passes.normalization.fold_constants import constant, has_subgraph, static_shape
from sparsec.passes.normalization.unroll_recurrent import RECURRENT, refusal


def refuse_types(graph: ir.Graph, where: str) -> None:
    problems = []
    for value in (*graph.inputs, *graph.outputs):
        if value.type is not None and (not isinstance(value.type, ir.TensorType) or value.dtype == ir.DataType.STRING):
            problems.append(f"{value.name!r} is {value.type}")
    if problems:
        raise UnsupportedError(f"inputs and outputs must be tensors of numbers: {listed(problems)}", where)


def refuse_unfinished(model: ir.Model, where: str, limits: Limits) -> None:
    problems = [
        f"input {v.name!r} has {_elements(v)} elements, at most {limits.elements} are read (--limit elements=N)"
        for v in model.graph.inputs
        if _elements(v) > limits.elements
    ]
    for node in model.graph:
        what = f"{node.op_type} {node.name!r}"
        if node.domain not in STANDARD_DOMAINS:
            problems.append(f"{what}: no standard ONNX operator does what its attributes and inputs ask for")
            continue
        if has_subgraph(node):
            problems.append(f"{what}: control flow that depends on the input (--bind may fix an input)")
            continue
        ratio, training = [*node.inputs[1:3], None, None][:2] if node.op_type == "Dropout" else (None, None)
        if training is not None and not _is_false(training) and not (ratio is not None and _is_false(ratio)):
            problems.append(f"{what}: may be in training mode; export the model for inference")
        axis = node.attributes.get("axis")
        if axis is not None and axis.type == ir.AttributeType.INT and not -RANK <= axis.as_int() <= RANK:
            problems.append(f"{what}: its axis {axis.as_int()} does not exist")
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not _is_scale(node):
            problems.append(f"{what}: its scale is not a finite number above zero")
        if node.op_type == "MaxPool" and any(y.uses() or y.is_graph_output() for y in node.outputs[1:]):
            problems.append(f"{what}: the Indices of a MaxPool have no lowering")
        if node.op_type in RECURRENT:
            remedy = "give --limit unroll=N, or compile for one step, with the state as input and output"
            problems.append(f"{what}: {refusal(node, limits.unroll)}; {remedy}")
        for value in node.outputs:
            if not value.name:
                continue
            if value.type is None:
                problems.append(f"{what}: the type of its output {value.name!r} is unknown")
            elif not isinstance(value.type, ir.TensorType) or value.dtype == ir.DataType.STRING:
                problems.append(f"{what}: its output {value.name!r} is no tensor of numbers")
            elif static_shape(value) is None:
                problems.append(f"{what}: the shape of its output {value.name!r} depends on the input's values")
            elif _elements(value) > limits.elements:
                text = (
                    f"its output {value.name!r} has {_elements(value)} elements, at most {limits.elements} are computed"
                )
                problems.append(f"{what}: {text} (--limit elements=N)")
    if problems:
        raise UnsupportedError(listed(_roots_first(problems)), where)
    if not len(model.graph):
        raise ModelError("nothing is left to compute: every output is an input or a constant", where)


def _is_scale(node: ir.Node) -> bool:
    """False for a constant scale that no quantization has; a weight whose channel is all zero may have a scale of 0."""
    scale = constant(node.inputs[1])
    if scale is None:
        return True
    numbers = scale.astype(np.float64)
    return bool(np.isfinite(numbers).all() and ((numbers > 0) | (node.op_type == "DequantizeLinear")).all())


def _elements(value: ir.Value) -> int:
    return int(np.prod(static_shape(value) or (), dtype=object))


def _is_false(value: ir.Value) -> bool:
    array = constant(value)
    return array is not None and not array.any()


def _roots_first(problems: list[str]) -> list[str]:
    """Each distinct line once, control flow before what follows from it."""
    distinct = list(dict.fromkeys(problems))
    return sorted(distinct, key=lambda line: "control flow" not in line)
