"""Gemm and MatMul between integers: DequantizeLinear -> product with a constant weight [bias Add] ... -> QuantizeLinear."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from sparsec.kernels import fc_int8, gemm_int8
from sparsec.kernels.base import KernelCall, Machine
from sparsec.kernels.quantized import QuantType, Requantize, correction
from sparsec.lowering.match import attribute, constant, dims, only_consumer
from sparsec.lowering.prices import SPARSE_FROM, Bound, Prices, Way, choose
from sparsec.lowering.quantized import (
    QuantGroup,
    Source,
    bias,
    fuse_quantized,
    read_past,
    source,
    trial_scale,
    unrounded,
    weight,
)  # fmt: skip
from sparsec.lowering.rules.base import Context, Taken, emit_simple
from sparsec.lowering.structure import detect_structure


def take_quantized_product(node: ir.Node, context: Context) -> Taken | str | None:
    """Gemm, or MatMul with a constant rank-2 right side, of integers."""
    if node.op_type not in ("Gemm", "MatMul") or (x := source(node.inputs[0])) is None:
        return None
    turned = node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
    found = weight(node.inputs[1], 0 if turned else 1)
    if isinstance(found, str):
        return found
    if found.integers.ndim != 2:
        return f"its weight has rank {found.integers.ndim}"
    w = np.ascontiguousarray(found.integers if turned else found.integers.T)
    offset, added = (node.inputs[2] if len(node.inputs) > 2 else None), None
    if node.op_type == "Gemm":
        if attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
            return "its left side is transposed or it is scaled"
    else:
        added, offset = _bias_behind(node, context)
    unit = np.float32(x.type.scale) * found.scale
    units = bias(offset, unit)
    if isinstance(units, str):
        return units
    if units is not None:
        units = np.broadcast_to(units, (w.shape[0],))
    try:
        correction(context.machine.single(), w, units, x.type)
    except ValueError as error:
        return str(error)
    through = read_past(node) + (read_past(added) if added is not None else ())
    group = fuse_quantized(node, context.taken, through=through, added=added)
    if refused := unrounded(offset, unit, group.steps):
        return refused
    m = int(np.prod(dims(x.value)[:-1], dtype=np.int64))
    return bind_quantized_product(group, context, x, m, w, found.scale, units)


def _bias_behind(node: ir.Node, context: Context) -> tuple[ir.Node | None, ir.Value | None]:
    """The Add of a constant vector along the columns that alone reads a MatMul, and the vector."""
    add = only_consumer(node.outputs[0])
    if add is None or add.op_type != "Add" or add in context.taken:
        return None, None
    other = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
    array = constant(other)
    last = dims(node.outputs[0])[-1]
    if array is None or array.size != last or array.shape[-1:] != (last,) or array.ndim > len(dims(node.outputs[0])):
        return None, None
    return add, other


def bind_quantized_product(
    group: QuantGroup, context: Context, x: Source, m: int, w: np.ndarray, scale: np.ndarray, units: np.ndarray | None
) -> Taken:
    """x as [m, K] times the constant w [N, K] transposed, integers, dense or in a stored form."""
    machine = context.machine.single()
    prices = price_quantized_product(machine, m, w, x.type)
    measured = context.tuning.find(group.name, prices) if context.tuning is not None else None
    way, candidates, reason = choose(prices, measured)
    call = _call(machine, m, w, way, x=x.type, w_scale=scale, steps=group.steps, bias=units)
    inputs = {"x": x.value} | ({"residual": group.other} if group.other is not None else {})
    structure, us = str(prices.structure), way.predicted_us
    return Taken(
        group, emit_simple(group, call, inputs, reason, us, weight=w, structure=structure, candidates=candidates)
    )


def price_quantized_product(machine: Machine, m: int, w: np.ndarray, x: QuantType) -> Prices:
    """Price integers x [m, K] times w [N, K] transposed: dense tilings, and stored forms if there are zeros to speak of."""
    structure = detect_structure(w[:, :, None, None])
    n, k = w.shape
    dense = gemm_int8.TABLE[0]
    ways = [Way(dense.name, False, us, dense, t) for us, t in gemm_int8.ranked_tilings(machine, m, k, n)]
    stored = {}
    if structure.zeros >= SPARSE_FROM:
        for form in fc_int8.TABLE:
            packed = fc_int8.pack(w, form)
            ways.append(Way(form.name, True, fc_int8.predict_us(machine, m, packed), form))
            stored[form.name] = round(100 * packed.blocks * packed.columns / (packed.groups * packed.shape[1]))

    def calls(way: Way) -> Bound:
        call = _call(machine, m, w, way, x=x, w_scale=trial_scale(w), steps=Requantize(x))
        return [(call, {"x": "x", "y": "y"})]

    facts = {"op": "Gemm", "element": x.dtype, "x_shape": [m, k], "w_shape": [n, k], "stored": stored}
    return Prices(facts, w, structure, tuple(ways), calls)


def _call(machine: Machine, m: int, w: np.ndarray, way: Way, **options: Any) -> KernelCall:
    if way.sparse:
        return fc_int8.bind(machine, m=m, w=w, form=way.form, **options)
    return gemm_int8.bind(machine, m=m, w=w, tiling=way.tiling, **options)
