"""Conv: the register-tile family for groups of 1 or few, dense or sparse by predicted cost; depthwise by its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsec.kernels import conv, depthwise
from sparsec.kernels.base import Machine, roofline_us
from sparsec.lowering.calls import Calls
from sparsec.lowering.match import Group, attribute, constant, dims, fuse
from sparsec.lowering.prices import SPARSE_FROM, Bound, Prices, Way, choose
from sparsec.lowering.rules.base import Context, Emitter, Taken, declare, emit_simple, float_input, node_names, record
from sparsec.lowering.rules.product import bind_product
from sparsec.lowering.structure import detect_structure
from sparsec.passes.normalization.windows import automatic_pads
from sparsec.tuning import Choices


def window_pads(
    node: ir.Node, size: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]
) -> tuple[int, ...]:
    """Begin and end pads by axis, `auto_pad` resolved as the ONNX operator page defines it."""
    mode = attribute(node, "auto_pad", "NOTSET")
    if mode != "NOTSET":
        return tuple(automatic_pads(mode, size, kernel, strides, dilations))
    return tuple(attribute(node, "pads", (0,) * (2 * len(size))))


@dataclass(frozen=True)
class ConvNode:
    """A Conv as 2-D: 1-D convolutions get a height of 1."""

    x_shape: tuple[int, int, int, int]
    w: np.ndarray
    bias: np.ndarray | None
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    groups: int

    @property
    def one_pixel(self) -> bool:
        """Whether its window covers all of x, once: a product."""
        return self.groups == 1 and self.x_shape[2:] == self.w.shape[2:] and not any(self.pads)

    @property
    def geometry(self) -> conv.Geometry:
        """Of one group."""
        n, c, h, w = self.x_shape
        part_shape = (self.w.shape[0] // self.groups, *self.w.shape[1:])
        return conv.Geometry((n, c // self.groups, h, w), part_shape, self.strides, self.pads, self.dilations)


def read_conv(node: ir.Node) -> ConvNode | str:
    """The node with constant weights, or why it has no kernel."""
    w = constant(node.inputs[1])
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if w is None or (len(node.inputs) > 2 and node.inputs[2] is not None and bias is None):
        return "its weights are computed, not constant"
    x = float_input(node)
    if isinstance(x, str):
        return x
    return read_window(node, w, bias)


def read_window(node: ir.Node, w: np.ndarray, bias: np.ndarray | None = None) -> ConvNode | str:
    """The node as 2-D with weights `w`, or why it has no kernel."""
    x = node.inputs[0]
    assert x is not None
    rank = w.ndim - 2
    if rank not in (1, 2):
        return f"it is a {rank}-D convolution"
    strides: Any = tuple(attribute(node, "strides", (1,) * rank))
    dilations: Any = tuple(attribute(node, "dilations", (1,) * rank))
    shape: Any = dims(x)
    pads: Any = window_pads(node, shape[2:], w.shape[2:], strides, dilations)
    if rank == 1:
        shape, w = (*shape[:2], 1, shape[2]), w[:, :, None, :]
        strides, dilations, pads = (1, *strides), (1, *dilations), (0, pads[0], 0, pads[1])
    if min(pads) < 0:
        return "its pads are negative"
    return ConvNode(shape, w, bias, strides, pads, dilations, int(attribute(node, "group", 1)))


def price_conv(machine: Machine, geometry: conv.Geometry, w: np.ndarray) -> Prices:
    """Price every format and tiling; sparse ones only if there are zeros to speak of. `w`: of all groups."""
    structure = detect_structure(w)
    part = w[: geometry.w_shape[0]]
    ways: list[Way] = []
    stored = {}
    for form in conv.TABLE:
        if form.sparse and structure.zeros < SPARSE_FROM:
            continue
        columns = conv.stored_columns(part, form, machine, geometry)
        ranked = conv.ranked_tilings(machine, geometry, form, columns)
        ways += [Way(machine.named(form.name), form.sparse, us, form, tiling) for us, tiling in ranked]
        if form.sparse:
            groups = -(-part.shape[0] // form.rows)
            stored[form.name] = round(100 * columns[form.rows] / (groups * geometry.taps))

    def calls(way: Way) -> Bound:
        bias = np.zeros(geometry.w_shape[0], np.float32)
        prepare, main = conv.bind(machine, geometry, part, form=way.form, bias=bias, tiling=way.tiling)
        if prepare is None:
            return [(main, {"x": "x", "y": "y"})]
        return [(prepare, {"x": "x", "prepared": "prepared"}), (main, {"x": "prepared", "y": "y"})]

    facts = {"op": "Conv", **{key: list(value) for key, value in asdict(geometry).items()}, "stored": stored}
    return Prices(facts, part.reshape(part.shape[0], -1), structure, tuple(ways), calls)


def take_conv(node: ir.Node, context: Context) -> Taken | str | None:
    """Conv, groups 1 or few, by the register-tile family; depthwise by its own."""
    if node.op_type != "Conv":
        return None
    read = read_conv(node)
    if isinstance(read, str):
        return read
    x = node.inputs[0]
    assert x is not None
    group, machine = fuse(node, context.taken), context.machine
    if read.groups > 1 and depthwise.refusal(read.x_shape, read.w.shape, read.groups) is None:
        inputs = {"x": x} | ({"residual": group.other} if group.other is not None else {})
        call = depthwise.bind(
            machine,
            x_shape=read.x_shape,
            w=read.w,
            bias=read.bias,
            strides=read.strides,
            pads=read.pads,
            dilations=read.dilations,
            activation=group.activation,
            residual=group.residual,
        )
        moved = 4.0 * (np.prod(read.x_shape) + np.prod(dims(group.output)))
        us = roofline_us(machine, 2.0 * np.prod(dims(group.output)) * np.prod(read.w.shape[2:]), moved)
        return Taken(group, emit_simple(group, call, inputs, "depthwise", us))
    if read.groups > 1 and (read.x_shape[0] != 1 or read.groups > 32):
        return f"{read.groups} groups"
    if read.one_pixel:
        return bind_product(group, context, x, read.x_shape[0], read.w.reshape(read.w.shape[0], -1), read.bias)
    return Taken(group, _emit_conv(group, read, machine, context.tuning))


def _emit_conv(group: Group, read: ConvNode, machine: Machine, tuning: Choices | None) -> Emitter:
    g = read.groups
    _, c, h, w = read.x_shape
    part_shape = (read.w.shape[0] // g, *read.w.shape[1:])
    geometry = read.geometry

    def emit(calls: Calls) -> None:
        x = declare(calls, group.main.inputs[0])  # type: ignore[arg-type]
        y = declare(calls, group.output)
        other = declare(calls, group.other) if group.other is not None else ""
        prices = price_conv(machine, geometry, read.w)
        way, candidates, reason = choose(prices, tuning.find(group.name, prices) if tuning is not None else None)
        stored, names = 0, node_names(group)
        for i in range(g):
            rows = slice(i * part_shape[0], (i + 1) * part_shape[0])
            prepare, main = conv.bind(
                machine,
                geometry,
                read.w[rows],
                form=way.form,
                bias=None if read.bias is None else read.bias[rows],
                activation=group.activation,
                residual=group.residual,
                tiling=way.tiling,
            )
            suffix = f"/group{i}" if g > 1 else ""
            at_x = {"x": i * (c // g) * h * w * machine.item}
            at_y = dict.fromkeys(("y", "residual"), i * part_shape[0] * geometry.pixels * machine.item)
            source = x
            if prepare is not None:
                fresh = calls.fresh(f"{group.name}{suffix}/prepared")
                source = calls.value(fresh, geometry.prepared_shape, machine.element)
                calls.emit(prepare, {"x": x, "prepared": source}, ("prepared",), names, group.name + suffix, at_x)
                at_x = {}
            bound = {"x": source, "y": y} | ({"residual": other} if other else {})
            calls.emit(main, bound, ("y",), names, group.name + suffix, at_x | at_y)
            stored += sum(array.nbytes for array in main.constants.values())
        record(
            calls, group, main.name, reason, zeros=float(np.mean(read.w == 0)), structure=str(prices.structure),
            candidates=tuple(replace(k, predicted_us=k.predicted_us * g) for k in candidates),
            bytes=stored, predicted_us=g * way.predicted_us,
        )  # fmt: skip

    return emit
