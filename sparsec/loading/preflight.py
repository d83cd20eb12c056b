"""Everything that stands in the way of a model, said at once: the first step of `compile`, and what `inspect` does.

    loads, and nothing else stands in the way      the loaded model
    does not load                                  why not, and every operator of the file that has no lowering in any shape
    loads, but operators have no lowering          each with its reason, before passes spend minutes on the model

A problem names the node, the reason and what to do. Operators that any model has (`ROUTINE`) are not tried here; `lower`
lists what it finds among them in the same form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx
import onnx_ir as ir

from sparsec.errors import SparsecError, UnsupportedError
from sparsec.limits import DEFAULT, Limits
from sparsec.loading.load import load_model
from sparsec.loading.opsets import INLINED, STANDARD_DOMAINS, all_nodes, listed
from sparsec.loading.reading import read_source
from sparsec.targets import Target

ROUTINE = frozenset({
    "AveragePool", "Concat", "Conv", "DequantizeLinear", "Expand", "Flatten", "Gather", "Gemm", "GlobalAveragePool", "Identity",
    "LayerNormalization", "MatMul", "MaxPool", "QuantizeLinear", "ReduceMean", "ReduceSum", "Reshape", "Slice", "Softmax",
    "Split", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip

# Folded or written out when a model is loaded, if what they depend on is constant; loading says where it is not.
LOADED = frozenset({
    "CastLike", "Constant", "ConstantOfShape", "GRU", "If", "LSTM", "Loop", "NonZero", "Optional", "Range", "RNN", "Scan",
    "SequenceAt", "SequenceConstruct", "Shape", "Size", "SplitToSequence", "ConcatFromSequence", "QLinearConv", "QLinearMatMul",
})  # fmt: skip

_CUT = "cut the model in front of it (onnx.utils.extract_model) and do the rest in the application"
REMEDIES: Mapping[str, str] = {
    **dict.fromkeys(("NonMaxSuppression", "Unique", "NonZero", "Compress"), f"its result has no fixed size: {_CUT}"),
    **dict.fromkeys(("ImageDecoder", "StringNormalizer", "StringConcat", "StringSplit", "RegexFullMatch"), _CUT),
    **dict.fromkeys(
        ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
        "export the model for inference, or make the random numbers an input",
    ),
    "BitCast": "export the model at opset 21 or earlier",
}
DEFAULT_REMEDY = f"export the model with other operators, or {_CUT}"


def preflight(
    model: Any,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    bind: Mapping[str, Any] | None = None,
    notes: list[str] | None = None,
    limits: Limits = DEFAULT,
    target: Target | None = None,
) -> ir.Model:
    """The loaded model. Arguments as of `load_model`; `target`: whether its operators have a lowering there too.

    Raises what `load_model` raises, UnsupportedError with all there is to say, also as `problems`.
    """
    try:
        loaded = load_model(model, shapes, bind, notes, limits)
    except UnsupportedError as error:
        further = [line for line in lacking(model, limits) if line.partition(":")[0] not in error.message]
        if not further:
            raise
        problems = [error.message, *further]
        raise UnsupportedError(listed(problems), error.where, problems) from error
    problems = [*_refused(loaded, target)] if target is not None else []
    if problems:
        raise UnsupportedError(listed(problems), "", problems)
    return loaded


def lacking(model: Any, limits: Limits = DEFAULT) -> list[str]:
    """Nodes of a file whose operator has no lowering, whatever its shapes: `Op 'node': reason; remedy`."""
    proto = _proto(model, limits)
    if proto is None:
        return []
    functions = {(f.domain, f.name) for f in proto.functions}
    found = []
    for i, node in enumerate(all_nodes(proto.graph)):
        if node.domain not in STANDARD_DOMAINS or (node.domain, node.op_type) in functions or _known(node.op_type):
            continue
        remedy = REMEDIES.get(node.op_type, DEFAULT_REMEDY)
        found.append(f"{node.op_type} {node.name or f'{node.op_type}_{i}'!r}: the operator has no lowering; {remedy}")
    return found


def _known(operator: str) -> bool:
    from tvm.relax.frontend.onnx.onnx_frontend import _get_convert_map

    from sparsec.lowering.expansions import EXPANSIONS

    if operator in _get_convert_map() or operator in EXPANSIONS or operator in LOADED | INLINED:
        return operator not in ("NonMaxSuppression", "Unique")  # their results' shapes depend on data
    try:
        schema: Any = onnx.defs.get_schema(operator)
    except onnx.defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)


def _proto(model: Any, limits: Limits) -> onnx.ModelProto | None:
    if isinstance(model, ir.Model):
        return ir.to_proto(model)
    try:
        return model if isinstance(model, onnx.ModelProto) else read_source(model, limits, lazy=True).proto
    except SparsecError:  # loading said it
        return None


def _refused(model: ir.Model, target: Target) -> Iterator[str]:
    """Nodes that lowering refuses, tried one by one, each kind once."""
    from sparsec.lowering.generic import ELEMENTWISE, ON_CPU, lower_generic

    machine = target.machine.single()
    tried: dict[Any, str] = {}
    for node in model.graph:
        if node.op_type in ROUTINE | ELEMENTWISE:
            continue
        key = (node.op_type, str(node.attributes), *(str(v.shape) if v is not None else "" for v in node.inputs))
        constants = any(v is not None and v.const_value is not None for v in node.inputs)
        if key not in tried or constants:
            try:
                lower_generic([node], machine, gpu=target.gpu, cpu_fallback=target.cpu_fallback)
                tried[key] = ""
            except UnsupportedError as error:
                (problem, *_) = error.problems or (error.message,)
                tried[key] = problem.rpartition("): ")[2] or problem
        if tried[key]:
            remedy = REMEDIES.get(node.op_type, DEFAULT_REMEDY)
            remedy = ON_CPU if target.gpu is not None and not target.cpu_fallback else remedy
            yield f"{node.op_type} {node.name!r}: {tried[key]}; {remedy}"
