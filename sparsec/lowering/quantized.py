"""Quantized layers on the graph: what is read through a DequantizeLinear, and what ends in a QuantizeLinear.

    q -> DequantizeLinear -> main [activation] [QuantizeLinear -> DequantizeLinear] [residual Add] [activation] -> QuantizeLinear

A kernel reads the integers in front of a DequantizeLinear and writes those behind a QuantizeLinear. A DequantizeLinear may
have several readers and belongs to no group: it is `through` for those that read past it, and is computed only if somebody
wants its reals.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from sparsec.kernels.epilogue import NONE, Activation
from sparsec.kernels.quantized import QuantType, Requantize
from sparsec.lowering.match import (
    Group,
    attribute,
    constant,
    dims,
    find_activation,
    in_graph_order,
    only_consumer,
)

EIGHT = ("uint8", "int8")


@dataclass(frozen=True)
class Source:
    """Integers that a layer reads past their DequantizeLinear."""

    value: ir.Value
    type: QuantType
    through: ir.Node


@dataclass(frozen=True)
class Weight:
    """A constant of integers around zero. `scale`: one for each index of the channel axis; real = scale * integers."""

    integers: np.ndarray
    scale: np.ndarray
    through: ir.Node


@dataclass(frozen=True)
class QuantGroup(Group):
    """A group whose `output` may be integers and whose `other` may be; `steps` says how."""

    steps: Requantize = field(default_factory=lambda: Requantize(None))
    through: tuple[ir.Node, ...] = ()


def type_of(node: ir.Node) -> QuantType | None:
    """The per-tensor 8-bit quantization of a QuantizeLinear or DequantizeLinear with constant parameters."""
    scale, zero = constant(node.inputs[1]), constant(node.inputs[2]) if len(node.inputs) > 2 else None
    given = len(node.inputs) > 2 and node.inputs[2] is not None
    if scale is None or scale.size != 1 or (given and zero is None) or attribute(node, "block_size", 0):
        return None
    integers = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    if integers is None or integers.dtype is None or scale.dtype != np.float32:
        return None
    dtype, factor = str(integers.dtype.numpy()), float(scale.reshape(-1)[0])
    if dtype not in EIGHT or not (math.isfinite(factor) and factor > 0):
        return None
    return QuantType(factor, 0 if zero is None else int(zero.reshape(-1)[0]), dtype)


def source(value: ir.Value | None) -> Source | None:
    """The computed integers that `value` is the dequantized form of, or None."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear":
        return None
    integers, found = node.inputs[0], type_of(node)
    if found is None or integers is None or integers.const_value is not None:
        return None
    return Source(integers, found, node)


def weight(value: ir.Value | None, axis: int) -> Weight | str:
    """Constant integers behind `value`, with a scale along `axis` or one for all; or why there are none."""
    node = value.producer() if value is not None else None
    if value is None or node is None or node.op_type != "DequantizeLinear":
        return "its weights are not quantized"
    integers, scale = constant(node.inputs[0]), constant(node.inputs[1])
    if integers is None or scale is None:
        return "its weights are computed, not constant"
    if integers.dtype != np.int8:
        return f"its weights are {integers.dtype}, not int8"
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if zero is not None and np.any(zero):
        return "its weights have a zero point"
    if attribute(node, "block_size", 0):
        return "its weights are quantized by groups"
    along = int(attribute(node, "axis", 1)) % max(integers.ndim, 1)
    if scale.size > 1 and along != axis % integers.ndim:
        return f"its weights are quantized along axis {along}, not {axis}"
    channels = integers.shape[axis]
    return Weight(integers, np.broadcast_to(scale.reshape(-1), (channels,)).astype(np.float32), node)


def bias(value: ir.Value | None, scale: np.ndarray) -> np.ndarray | str | None:
    """A bias as int32 in units of `scale` [OC], None where there is none, or why it cannot be had.

    A bias in float is rounded: half a unit of a sum of products is nothing beside the rounding of the result. Where the
    result is not rounded, ask `unrounded`.
    """
    if value is None:
        return None
    found = constant(value)
    if found is None:
        return "its bias is computed, not constant"
    if (found.size != 1 and found.shape[-1:] != (scale.size,)) or found.size not in (1, scale.size):
        return "its bias is not one vector along the channels"
    units = np.rint(_units(found, scale))
    if np.abs(units).max(initial=0) >= 1 << 31:
        return f"its bias is {np.abs(units).max():.3g} times the product of its scales: more than 32 bits"
    return units.astype(np.int64)


def unrounded(value: ir.Value | None, scale: np.ndarray, steps: Requantize) -> str:
    """Why a bias cannot be rounded to units of `scale` in front of `steps`; empty where it can."""
    found = constant(value) if steps.y is None else None
    if found is None:
        return ""
    units = _units(found, scale)
    whole = np.abs(units - np.rint(units)) <= 2.0**-22 * np.maximum(
        np.abs(units), 1
    )  # of int32, dequantized in float32
    return "" if whole.all() else "its bias and its result are in float"


def _units(array: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return array.reshape(-1).astype(np.float64) / scale.astype(np.float64)


def _quantize_behind(value: ir.Value, taken: Set[ir.Node]) -> tuple[ir.Node, QuantType] | None:
    node = only_consumer(value)
    if node is None or node.op_type != "QuantizeLinear" or node in taken or node.inputs[0] is not value:
        return None
    found = type_of(node)
    return (node, found) if found is not None else None


def _add_behind(value: ir.Value, taken: Set[ir.Node]) -> tuple[ir.Node, ir.Value] | None:
    """The Add that alone reads `value`, and its other, computed operand of the same shape."""
    node = only_consumer(value)
    if node is None or node.op_type != "Add" or node in taken:
        return None
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    if other is None or other is value or other.const_value is not None or dims(other) != dims(value):
        return None
    produced = other.producer()
    if produced is not None and produced.op_type == "DequantizeLinear" and source(other) is None:
        return None  # a constant, or a quantization that kernels do not read
    return node, other


def fuse_quantized(
    main: ir.Node,
    taken: Set[ir.Node],
    *,
    through: tuple[ir.Node, ...] = (),
    added: ir.Node | None = None,
    residual: bool = True,
    activation: bool = True,
) -> QuantGroup:
    """`main` with all that can be fused behind it, up to its QuantizeLinear; `through`: what it reads past.

    `added`: the node that alone reads `main` and adds its bias.
    """

    def act(value: ir.Value) -> tuple[Activation, list[ir.Node], ir.Value] | None:
        found = find_activation(value) if activation else None
        return found if found is not None and taken.isdisjoint(found[1]) else None

    nodes = [main] if added is None else [main, added]
    value, applied = nodes[-1].outputs[0], NONE
    if (found := act(value)) is not None:
        applied, more, value = found
        nodes += more
    quantized = _quantize_behind(value, taken)
    plain = QuantGroup(main, (), value, activation=applied, steps=Requantize(None, applied), through=through)
    if quantized is not None:
        node, y = quantized
        plain = replace(plain, output=node.outputs[0], steps=Requantize(y, applied))
    ended = replace(plain, nodes=in_graph_order([*nodes, *([quantized[0]] if quantized else [])]))
    if not residual:
        return ended
    inner: QuantType | None = None
    if quantized is not None:
        again = only_consumer(quantized[0].outputs[0])
        if again is None or again.op_type != "DequantizeLinear" or type_of(again) != quantized[1]:
            return ended
        nodes += [quantized[0], again]
        inner, value = quantized[1], again.outputs[0]
    sum_of = _add_behind(value, taken)
    if sum_of is None:
        return ended
    nodes.append(sum_of[0])
    other, past, value = sum_of[1], source(sum_of[1]), sum_of[0].outputs[0]
    second = NONE
    if (found := act(value)) is not None:
        if applied != NONE:
            return ended
        second, more, value = found
        nodes += more
    last = _quantize_behind(value, taken)
    if last is None and quantized is not None:
        return ended
    if last is not None:
        nodes.append(last[0])
        value = last[0].outputs[0]
    kind = "after" if applied != NONE else "before"
    steps = Requantize(
        last[1] if last else None, applied if applied != NONE else second, kind, inner, past.type if past else None
    )  # fmt: skip
    return QuantGroup(
        main, in_graph_order(nodes), value, activation=steps.activation, residual=kind,
        other=past.value if past else other, steps=steps, through=(*through, *([past.through] if past else [])),
    )  # fmt: skip


def read_past(node: ir.Node) -> tuple[ir.Node, ...]:
    """The DequantizeLinear nodes in front of a node."""
    makers = [value.producer() for value in node.inputs if value is not None]
    return tuple(maker for maker in makers if maker is not None and maker.op_type == "DequantizeLinear")


def unread(node: ir.Node, groups: dict[ir.Node, Group]) -> bool:
    """Whether nobody wants the reals of a DequantizeLinear. `groups`: the group of every claimed node.

    Those who read past it do not; nor, where it is constant, does anybody: its reals are a constant for all.
    """
    if node.op_type != "DequantizeLinear":
        return False
    if all(value is None or value.const_value is not None for value in node.inputs):
        return True
    if node.outputs[0].is_graph_output():
        return False

    def past(reader: ir.Node) -> bool:
        group = groups.get(reader)
        return isinstance(group, QuantGroup) and node in group.through

    return all(past(reader) for reader, _ in node.outputs[0].uses())


def trial_scale(w: np.ndarray) -> np.ndarray:
    """Scales of w [OC, ...] int8 with which random bytes give results all over 8 bits: float32 [OC]."""
    norm = np.sqrt((w.reshape(w.shape[0], -1).astype(np.float64) ** 2).sum(axis=1))
    return (0.8 / np.maximum(norm, 1.0)).astype(np.float32)
