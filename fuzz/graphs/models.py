"""Random models: hypothesis draws graphs, an opset and the passes that are run on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import helper

from fuzz.graphs.draft import BOOL, F16, F32, F64, I8, I32, I64, U8, Draft, Value, element, model_of
from fuzz.graphs.elementwise import binary, cast, clip, silu, unary, variadic, where
from fuzz.graphs.layers import conv, conv_transpose, integer_product, network, normalize, pool, product, recurrent
from fuzz.graphs.moves import computed_shape, reduce, resize, scan_sum, views
from fuzz.graphs.quantized import dequantize, inside, layer, pair, weights_only

Operator = Callable[[Draft, Value], None]  # adds nodes behind a value, or nothing if it does not apply

ANY: tuple[Operator, ...] = (unary, binary, binary, views, views, reduce, where, cast, computed_shape)
LAYERS: tuple[Operator, ...] = (conv, conv, conv, pool, product, product, normalize, silu, clip, variadic, resize)
FAMILIES: dict[str, tuple[tuple[np.dtype, ...], tuple[Operator, ...]]] = {
    "float32": ((F32,), (*ANY, *LAYERS, conv, product, network, network, conv_transpose, recurrent, scan_sum)),
    "float16": ((F16,), (*ANY, *LAYERS)),
    "quantized": (
        (F32, F32, U8, I8),
        (layer, layer, layer, layer, dequantize, inside, weights_only, pair, *ANY, *LAYERS),
    ),
    "whole": ((I32, I64, BOOL, U8, I8), (*ANY, clip, scan_sum, integer_product, integer_product, pool, dequantize)),
    "float64": ((F64,), (*ANY, conv, product, pool, clip, variadic)),
}
SHARES = ("float32",) * 4 + ("quantized",) * 3 + ("float16",) * 2 + ("whole", "whole", "float64")
OPSETS = (11, 13, 17, 18, 19, 20, 21, 21, 21, 22, 23, 24)

FEW = "fallback=none,samples=4"
EXACT: tuple[tuple[str, ...], ...] = (
    (), ("fold-constants", "remove-no-ops", "explicit-pads"), ("rearrange",), ("quantized-ports",),
)  # fmt: skip
OF_WEIGHTS: tuple[tuple[str, ...], ...] = (
    ("prune:sparsity=0.5,block=4x1",), ("prune:sparsity=0.8,block=1x1",), ("prune:nm=2:4",),
    ("prune:sparsity=0.6,block=4x4", "fold-constants"), ("remove-no-ops", "prune:sparsity=0.9,block=8x1"), ("rearrange",),
    ("prune-channels:sparsity=0.25,round_to=4",), ("prune-channels:sparsity=0.3", "prune:sparsity=0.5,block=4x1"),
    ("prune-channels:dead=true",),
    ("factorize:rank=2,faster=false",), ("factorize:rank=4,residual=sparse,faster=false,samples=2",),
    ("compress:bytes=0.7,samples=2",), (f"quantize:{FEW}",), (f"quantize:activations=int8,rounding=nearest,{FEW}",),
    (f"quantize:outputs=int8,{FEW}",), ("prune:sparsity=0.7,block=4x1", f"quantize:{FEW}"),
    ("quantize:weights=int8,group=16",), ("quantize:weights=int4,group=16,asymmetric=true",),
    (f"quantize:{FEW}", "quantized-ports"),
)  # fmt: skip
WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})


@dataclass(frozen=True)
class Drawn:
    """A model, how many graphs that do not touch each other it holds, and passes; `facts`: what was drawn."""

    model: onnx.ModelProto
    graphs: int
    passes: tuple[str, ...]
    facts: Counter[str] = field(repr=False)


@st.composite
def models(draw: Any, graphs: int = 8) -> Drawn:
    """A model of up to `graphs` graphs, and passes."""
    d = Draft(draw, opset=draw(st.sampled_from(OPSETS)))
    facts: Counter[str] = Counter()
    count = draw(st.integers(1, graphs))
    for _ in range(count):
        family = d.among(SHARES)
        _graph(d, *FAMILIES[family])
        facts[f"family {family}"] += 1
        facts.update(f"type {v.dtype}" for v in d.values)
        facts.update(f"rank {v.rank}" for v in d.values)
    facts.update(f"operator {node.op_type}" for node in d.nodes)
    facts[f"opset {d.opset}"] += count
    facts["broadcasts"] += d.broadcasts
    graph = helper.make_graph(d.nodes, "g", [_info(v) for v in d.inputs], [_info(v) for v in d.outputs], d.tensors)
    return Drawn(model_of(graph, d.opset), count, _passes(d), facts)


def _passes(d: Draft) -> tuple[str, ...]:
    """None or exact ones, or some that change weights, where there are any; `widen` where something is in float16."""
    kinds = {v.dtype for v in d.inputs}
    choices = [*EXACT, *([("widen",)] if F16 in kinds else [])]
    if any(node.op_type in WEIGHTED for node in d.nodes) and d.number(0, 3):
        choices = list(OF_WEIGHTS)
    return d.among(choices)


def _graph(d: Draft, dtypes: tuple[np.dtype, ...], operators: tuple[Operator, ...]) -> None:
    """One to eight operators behind an input; what nothing reads is an output."""
    d.values = []
    x = d.input(d.shape(d.among((4, 4, 4, 3, 2, 2, 1, 5, 0))), d.among(dtypes))
    before = len(d.nodes)
    for _ in range(d.number(1, 8)):
        d.among(operators)(d, d.among(d.values[-3:]))
    if not any(v is not x for v in d.values):
        d.add("Identity", [x.name], x.shape, x.dtype)
    nodes = d.nodes[before:]
    read = {name for node in nodes for name in node.input}
    made = {name for node in nodes for name in node.output}
    d.outputs += [v for v in d.values if v.name in made and v.name not in read]


def _info(value: Value) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(value.name, element(value.dtype), value.shape)
