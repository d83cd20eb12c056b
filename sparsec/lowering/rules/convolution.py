"""Conv: the register-tile family for groups of 1 or few, dense or sparse by predicted cost; depthwise by its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsec.kernels import conv, depthwise
from sparsec.kernels.base import Machine
from sparsec.lowering.calls import Calls
from sparsec.lowering.match import Group, attribute, constant, dims, fuse
from sparsec.lowering.rules.base import (
    SPARSE_FROM,
    Context,
    Emitter,
    Taken,
    declare,
    dtype_of,
    emit_simple,
    node_names,
    roofline_us,
    why,
)
from sparsec.lowering.rules.product import bind_product
from sparsec.lowering.structure import Structure, detect_structure
from sparsec.program import Candidate, Layer
from sparsec.tuning import Choices, Entry


def window_pads(
    node: ir.Node, size: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]
) -> tuple[int, ...]:
    """Begin and end pads by axis, `auto_pad` resolved as the ONNX operator page defines it."""
    mode = attribute(node, "auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        begins, ends = [], []
        for length, k, stride, dilation in zip(size, kernel, strides, dilations, strict=True):
            total = max(0, (-(-length // stride) - 1) * stride + (k - 1) * dilation + 1 - length)
            small, large = total // 2, total - total // 2
            begins.append(small if mode == "SAME_UPPER" else large)
            ends.append(large if mode == "SAME_UPPER" else small)
        return (*begins, *ends)
    if mode == "VALID":
        return (0,) * (2 * len(size))
    return tuple(attribute(node, "pads", (0,) * (2 * len(size))))


@dataclass(frozen=True)
class _ConvNode:
    """A Conv as 2-D: 1-D convolutions get a height of 1."""

    x_shape: tuple[int, int, int, int]
    w: np.ndarray
    bias: np.ndarray | None
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    groups: int


def _read_conv(node: ir.Node) -> _ConvNode | str:
    x = node.inputs[0]
    w = constant(node.inputs[1])
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if x is None or w is None or (len(node.inputs) > 2 and node.inputs[2] is not None and bias is None):
        return "its weights are computed, not constant"
    if dtype_of(x) != "float32":
        return f"its data is {dtype_of(x)}, not float32"
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
    return _ConvNode(shape, w, bias, strides, pads, dilations, int(attribute(node, "group", 1)))


@dataclass(frozen=True)
class ConvPrices:
    """What every way to run a convolution is predicted to cost. `w`: of one group, if there are several."""

    geometry: conv.Geometry
    w: np.ndarray
    structure: Structure
    ranked: dict[conv.Format, list[tuple[float, conv.Tiling]]]  # microseconds, cheapest first
    stored: dict[str, int]  # percent of the columns that each sparse format stores

    def option(self, kernel: str, rows: int, vectors: int, lanes: int) -> tuple[conv.Format, conv.Tiling, float] | None:
        """The format, tiling and price so described, if it is among them."""
        for form, ranked in self.ranked.items():
            for us, tiling in ranked:
                if (form.name, tiling.rows, tiling.vectors, tiling.lanes) == (kernel, rows, vectors, lanes):
                    return form, tiling, us
        return None


def price_conv(machine: Machine, geometry: conv.Geometry, w: np.ndarray) -> ConvPrices:
    """Price every format and tiling; sparse ones only if there are zeros to speak of."""
    structure = detect_structure(w)
    part = w[: geometry.w_shape[0]]
    ranked, stored = {}, {}
    for form in conv.TABLE:
        if form.sparse and structure.zeros < SPARSE_FROM:
            continue
        columns = conv.stored_columns(part, form, machine, geometry)
        ranked[form] = conv.ranked_tilings(machine, geometry, form, columns)
        if form.sparse:
            groups = -(-part.shape[0] // form.rows)
            stored[form.name] = round(100 * columns[form.rows] / (groups * geometry.taps))
    return ConvPrices(geometry, part, structure, ranked, stored)


def choose_conv(
    prices: ConvPrices, measured: Entry | None = None
) -> tuple[conv.Format, conv.Tiling, tuple[Candidate, ...], str]:
    """The format and tiling measured fastest, else the cheapest predicted: (format, tiling, all candidates, reason)."""
    best = {form: ranked[0] for form, ranked in prices.ranked.items()}
    form = min(best, key=lambda f: best[f][0])
    if measured is not None:
        choice = measured.choice
        found = prices.option(choice.kernel, choice.rows, choice.vectors, choice.lanes)
        assert found is not None, choice
        form = found[0]
        best[form] = (found[2], found[1])
    candidates = tuple(Candidate(f.name, round(us, 3)) for f, (us, _) in sorted(best.items(), key=lambda b: b[1][0]))
    if measured is not None:
        reason = _measured_reason(measured)
    else:
        sparse = [(us, f.name) for f, (us, _) in best.items() if f.sparse]
        reason = why(prices.structure.zeros, best[conv.DENSE][0], sparse)
    return form, best[form][1], candidates, reason


def _measured_reason(entry: Entry) -> str:
    choice = entry.choice
    reason = f"measured {choice.measured_us:.1f} us"
    if choice.kernel != conv.DENSE.name:
        dense = entry.best(conv.DENSE.name)
        return reason if dense is None else f"{reason}, dense measured {dense.measured_us:.1f} us"
    sparse = entry.best(other_than=conv.DENSE.name)
    return reason if sparse is None else f"{reason}, best sparse {sparse.kernel} measured {sparse.measured_us:.1f} us"


def take_conv(node: ir.Node, context: Context) -> Taken | str | None:
    """Conv, groups 1 or few, by the register-tile family; depthwise by its own."""
    if node.op_type != "Conv":
        return None
    read = _read_conv(node)
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
    if read.groups == 1 and read.x_shape[2:] == read.w.shape[2:] and not any(read.pads):  # one pixel out: a product
        return bind_product(group, machine, x, read.x_shape[0], read.w.reshape(read.w.shape[0], -1), read.bias)
    return Taken(group, _emit_conv(group, read, machine, context.tuning))


def _emit_conv(group: Group, read: _ConvNode, machine: Machine, tuning: Choices | None) -> Emitter:
    g = read.groups
    n, c, h, w = read.x_shape
    part_shape = (read.w.shape[0] // g, *read.w.shape[1:])
    geometry = conv.Geometry((n, c // g, h, w), part_shape, read.strides, read.pads, read.dilations)

    def emit(calls: Calls) -> None:
        x = declare(calls, group.main.inputs[0])  # type: ignore[arg-type]
        y = declare(calls, group.output)
        other = declare(calls, group.other) if group.other is not None else ""
        prices = price_conv(machine, geometry, read.w)
        measured = tuning.conv(group.name, prices) if tuning is not None else None
        form, tiling, candidates, reason = choose_conv(prices, measured)
        stored, us, names = 0, 0.0, node_names(group)
        for i in range(g):
            rows = slice(i * part_shape[0], (i + 1) * part_shape[0])
            prepare, main = conv.bind(
                machine,
                geometry,
                read.w[rows],
                form=form,
                bias=None if read.bias is None else read.bias[rows],
                activation=group.activation,
                residual=group.residual,
                tiling=tiling,
            )
            suffix = f"/group{i}" if g > 1 else ""
            at_x = {"x": i * (c // g) * h * w * 4}
            at_y = dict.fromkeys(("y", "residual"), i * part_shape[0] * geometry.pixels * 4)
            source = x
            if prepare is not None:
                source = calls.value(calls.fresh(f"{group.name}{suffix}/prepared"), geometry.prepared_shape, "float32")
                calls.emit(prepare, {"x": x, "prepared": source}, ("prepared",), names, group.name + suffix, at_x)
                at_x = {}
            bound = {"x": source, "y": y} | ({"residual": other} if other else {})
            calls.emit(main, bound, ("y",), names, group.name + suffix, at_x | at_y)
            stored += sum(array.nbytes for array in main.constants.values())
        us = g * min(candidate.predicted_us for candidate in candidates if candidate.kernel == form.name)
        calls.layers.append(
            Layer(
                group.name,
                group.op,
                dims(group.output),
                "native",
                main.name,
                reason,
                zeros=float(np.mean(read.w == 0)),
                structure=str(prices.structure),
                candidates=tuple(replace(k, predicted_us=k.predicted_us * g) for k in candidates),
                bytes=stored,
                predicted_us=us,
                nodes=names,
            )
        )

    return emit
