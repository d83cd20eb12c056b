"""Conv between integers: DequantizeLinear -> Conv [activation] [residual Add] -> QuantizeLinear by the 8-bit families."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsec.kernels import depthwise_int8
from sparsec.kernels.base import Format, Machine
from sparsec.kernels.conv import Geometry, gathered, int8, paired
from sparsec.kernels.quantized import QuantType, Requantize, correction
from sparsec.lowering.calls import Calls
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
)
from sparsec.lowering.rules.base import Context, Taken, declare, emit_simple, node_names, record
from sparsec.lowering.rules.convolution import ConvNode, read_window
from sparsec.lowering.rules.quantized_product import bind_quantized_product
from sparsec.lowering.structure import detect_structure


def price_quantized_conv(machine: Machine, geometry: Geometry, w: np.ndarray, x: QuantType) -> Prices:
    """Price every stored form and tiling of an 8-bit convolution; sparse ones only if there are zeros to speak of."""
    structure = detect_structure(w)
    ways: list[Way] = []
    stored = {}
    for form in int8.TABLE:
        if form.sparse and structure.zeros < SPARSE_FROM:
            continue
        columns = int8.stored_words(w, form, machine, geometry)
        ways += [Way(form.name, form.sparse, us, form, t) for us, t in int8.ranked(machine, geometry, form, columns)]
        if form.sparse:
            groups = -(-w.shape[0] // form.rows)
            stored[form.name] = round(100 * columns[form.rows] / (groups * int8.in_words(geometry).taps))

    for form in gathered.TABLE if structure.zeros >= SPARSE_FROM else ():
        quads = gathered.quads(w, form.rows)
        live = int(w.any(axis=0).sum())
        us = gathered.predict_us(machine, geometry, form, quads, live)
        ways.append(Way(form.name, True, us, form, gathered.tiling_of(machine, geometry, form)))
        stored[form.name] = round(100 * quads * int8.WORD / (-(-w.shape[0] // form.rows) * geometry.taps))

    if paired.able(machine):
        ways += [Way(paired.FORM.name, False, us, paired.FORM, t) for us, t in paired.ranked(machine, geometry)]

    def calls(way: Way) -> Bound:
        scale = trial_scale(w)
        prepare, main = _family(way.form).bind(
            machine, geometry, w, x=x, w_scale=scale, steps=Requantize(x), form=way.form, tiling=way.tiling
        )
        if prepare is None:
            return [(main, {"x": "x", "y": "y"})]
        return [(prepare, {"x": "x", "prepared": "prepared"}), (main, {"x": "prepared", "y": "y"})]

    shape = {key: list(value) for key, value in asdict(geometry).items()}
    facts = {"op": "Conv", "element": x.dtype, **shape, "stored": stored}
    return Prices(facts, w.reshape(w.shape[0], -1), structure, tuple(ways), calls)


def _family(form: Format) -> Any:
    """The module of kernels that a stored form belongs to."""
    return next(family for family in (int8, gathered, paired) if form in family.TABLE)


def take_quantized_conv(node: ir.Node, context: Context) -> Taken | str | None:
    """Conv of integers: groups 1, or depthwise."""
    if node.op_type != "Conv" or (x := source(node.inputs[0])) is None:
        return None
    w = weight(node.inputs[1], 0)
    if isinstance(w, str):
        return w
    read = read_window(node, w.integers)
    if isinstance(read, str):
        return read
    offset, unit = node.inputs[2] if len(node.inputs) > 2 else None, np.float32(x.type.scale) * w.scale
    units = bias(offset, unit)
    if isinstance(units, str):
        return units
    machine = context.machine.single()
    try:
        correction(machine, read.w, units, x.type)
    except ValueError as error:
        return str(error)
    shape = {"strides": read.strides, "pads": read.pads, "dilations": read.dilations}
    if read.groups > 1:
        refused = depthwise_int8.refusal(machine, read.x_shape, read.w.shape, read.groups, **shape)
        if refused is not None:
            return refused
    group = fuse_quantized(node, context.taken, through=read_past(node))
    if refused := unrounded(offset, unit, group.steps):
        return refused
    if read.groups > 1:
        call = depthwise_int8.bind(
            machine, x_shape=read.x_shape, w=read.w, bias=units, x=x.type, w_scale=w.scale, steps=group.steps, **shape
        )
        us = depthwise_int8.predict_us(machine, read.x_shape, read.w.shape, **shape)
        inputs = {"x": x.value} | ({"residual": group.other} if group.other is not None else {})
        return Taken(group, emit_simple(group, call, inputs, "depthwise", us))
    if read.one_pixel:
        return bind_quantized_product(
            group, context, x, read.x_shape[0], read.w.reshape(read.w.shape[0], -1), w.scale, units
        )
    return Taken(group, lambda calls: _emit(calls, group, read, x, w.scale, units, machine, context))


def _emit(
    calls: Calls, group: QuantGroup, read: ConvNode, x: Source, scale: np.ndarray, units: np.ndarray | None,
    machine: Machine, context: Context,
) -> None:  # fmt: skip
    geometry = read.geometry
    prices = price_quantized_conv(machine, geometry, read.w, x.type)
    way, candidates, reason = choose(prices, context.tuning.find(group.name, prices) if context.tuning else None)
    prepare, main = _family(way.form).bind(
        machine,
        geometry,
        read.w,
        x=x.type,
        w_scale=scale,
        steps=group.steps,
        form=way.form,
        bias=units,
        tiling=way.tiling,
    )
    names = node_names(group)
    origin = declare(calls, x.value)
    y = declare(calls, group.output, "float32")
    if prepare is not None:
        shape = _family(way.form).padded(geometry).prepared_shape
        prepared = calls.value(calls.fresh(f"{group.name}/prepared"), shape, x.type.dtype)
        calls.emit(prepare, {"x": origin, "prepared": prepared}, ("prepared",), names, group.name)
        origin = prepared
    bound = {"x": origin, "y": y}
    if group.other is not None:
        bound["residual"] = declare(calls, group.other, "float32")
    calls.emit(main, bound, ("y",), names, group.name)
    record(
        calls, group, main.name, reason, zeros=float(np.mean(read.w == 0)), structure=str(prices.structure),
        candidates=candidates, bytes=sum(a.nbytes for a in main.constants.values()), predicted_us=way.predicted_us,
    )  # fmt: skip
