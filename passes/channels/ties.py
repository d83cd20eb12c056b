"""What every operator says about the axes of its inputs and outputs: which positions move together.

Let each position of each axis of each value be an atom. For an operator y = f(x_1, ..., x_k) a rule states pairs of
atoms (a tie) such that f is equivariant: whatever permutation of the atoms within their axes maps the set of pairs onto
itself, applying it to the inputs is the same as applying it to the output. Examples, a ~ b for "tied":

    Add, Relu, ...        y[.., i, ..] ~ x[.., i, ..]                 where x is not broadcast along the axis
    Conv, groups 1        x[:, i] ~ W[:, i],  y[:, o] ~ W[o] ~ b[o]   sums over i and over the kernel do not care
    depthwise             x[:, g] ~ y[:, g m + j] ~ W[g m + j] ~ b[g m + j]
    Gemm, MatMul          the three pairs of equal axes
    Concat                y[:, offset_k + i] ~ x_k[:, i]
    Slice, Gather, Pad    y[:, j] ~ x[:, index(j)]; positions that a Pad adds hold one constant and are tied to nothing
    Flatten, Reshape      y[:, i n + j] ~ x[:, i, :]                  all but one of the merged axes pinned
    reductions            nothing along the reduced axis: a sum does not care for the order

An atom is pinned if it may not move; a rule that does not know pins. In a `Ties` made for cutting (channels removed,
not moved) normalizations, Softmax and reductions pin the axis they mix, and groups of a convolution stay equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from sparsec.passes.normalization.fold_constants import constant, static_shape

Role = Literal["row", "column"]
SEVERAL_OUTPUTS = ("GRU", "LSTM", "RNN", "Split", "TopK")  # their rules follow each of them


class Unknown(Exception):
    """The rule cannot say what the node ties; its message is the reason."""


@dataclass(frozen=True)
class Axis:
    """`size` positions of `axis` of `value`, atoms `start` ... `start + size - 1`.

    `rows`: only the rows (axis 0) in this range, for the columns of one group of a convolution.
    """

    value: ir.Value = field(repr=False)
    axis: int
    rows: tuple[int, int] | None
    start: int
    size: int

    @property
    def atoms(self) -> np.ndarray:
        """Atom numbers, shape [size]."""
        return np.arange(self.start, self.start + self.size)


@dataclass(frozen=True)
class Use:
    """Input `index` of `node` is a weight whose `role` (rows make outputs, columns read inputs) lies along `axis`."""

    node: ir.Node = field(repr=False)
    index: int
    role: Role
    axis: Axis


@dataclass(frozen=True)
class Merge:
    """Atoms of one axis, and the axes that it is the row-major product of (a Reshape)."""

    node: ir.Node
    flat: Axis
    factors: tuple[Axis, ...]


class Ties:
    """All atoms, ties and pins of a graph. `cut`: for removing channels, not for permuting them."""

    def __init__(self, graph: ir.Graph, cut: bool = False) -> None:
        self.cut = cut
        self.axes: list[Axis] = []
        self.uses: list[Use] = []
        self.merges: list[Merge] = []
        self.pins: list[tuple[np.ndarray, str]] = []
        self.links: list[tuple[np.ndarray, np.ndarray, np.ndarray | int]] = []  # atoms, atoms, color
        self.count = 0
        self._known: dict[tuple[ir.Value, int, tuple[int, int] | None], Axis] = {}
        for value in graph.inputs:
            self.pin(value, "is a graph input")
        for value in graph.outputs:
            self.pin(value, "is a graph output")
        for node in ir.traversal.RecursiveGraphIterator(graph):
            if node.graph is graph:
                self._visit(node)
            else:  # what a branch or a loop body reads from outside
                for x in node.inputs:
                    self.pin(x, f"is read inside a subgraph by {_label(node)}")
        self._pin_overlapping()

    # ---- what rules call

    def axis(self, value: ir.Value | None, axis: int, rows: tuple[int, int] | None = None) -> Axis:
        """The axis (negative counts from the end). Raises Unknown if there is none of a known size."""
        shape = None if value is None else static_shape(value)
        if value is None or shape is None:
            raise Unknown("its shape is not known")
        axis %= max(len(shape), 1)
        if axis >= len(shape):
            raise Unknown("its rank is not the operator's")
        key = value, axis, rows
        if key not in self._known:
            self._known[key] = Axis(value, axis, rows, self.count, shape[axis])
            self.axes.append(self._known[key])
            self.count += shape[axis]
        return self._known[key]

    def tie(self, a: Axis | np.ndarray, b: Axis | np.ndarray, color: np.ndarray | int = 0) -> None:
        """Position i of `a` moves with position i of `b`; pairs of different `color` (integers) never change places."""
        first, second = (x.atoms if isinstance(x, Axis) else x for x in (a, b))
        if first.size != second.size:
            raise Unknown(f"{first.size} positions meet {second.size}")
        self.links.append((first, second, color))

    def pin(self, value: ir.Value | None, reason: str, axis: int | None = None) -> None:
        """All positions of one axis, or of all axes, stay where they are."""
        shape = None if value is None else static_shape(value)
        for index in range(len(shape)) if shape is not None and axis is None else (axis,):
            if shape is not None and index is not None:
                self.pins.append((self.axis(value, index).atoms, reason))

    def pin_atoms(self, atoms: np.ndarray, reason: str) -> None:
        """These positions stay where they are."""
        self.pins.append((atoms, reason))

    def use(self, node: ir.Node, index: int, role: Role, axis: Axis) -> None:
        """Note a weight's axis."""
        self.uses.append(Use(node, index, role, axis))

    def same(self, a: ir.Value, b: ir.Value, axes: Iterator[int] | range) -> None:
        """Tie equally numbered axes."""
        for axis in axes:
            self.tie(self.axis(a, axis), self.axis(b, axis))

    def broadcast(self, x: ir.Value | None, y: ir.Value, skip: int = 0) -> None:
        """Tie the axes of `x` to those of `y` from the last, where equally long; `skip` leaves the last ones out."""
        rank, full = len(shape_of(x)), len(shape_of(y))
        for back in range(1 + skip, rank + 1):
            a, b = self.axis(x, rank - back), self.axis(y, full - back)
            if a.size == b.size:
                self.tie(a, b)
            elif a.size != 1:
                raise Unknown("its shapes do not broadcast")

    # ---- the walk

    def _visit(self, node: ir.Node) -> None:
        from sparsec.passes.channels.tie_rules import RULES

        rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        marks = len(self.links), len(self.uses), len(self.merges)
        try:
            if rule is None:
                raise Unknown("no rule for the operator")
            if any(static_shape(v) is None for v in (*node.inputs, *node.outputs) if v is not None and v.name):
                raise Unknown("a shape is not known")
            if node.op_type not in SEVERAL_OUTPUTS and any(_is_read(y) for y in node.outputs[1:]):
                raise Unknown("its further outputs are read")
            understood = rule(self, node)
        except Unknown as reason:
            del self.links[marks[0] :], self.uses[marks[1] :], self.merges[marks[2] :]
            for value in (*node.inputs, *node.outputs):
                self.pin(value, f"{_label(node)}: {reason}")
            return
        for index, value in enumerate(node.inputs):
            if index not in understood:
                self.pin(value, f"{_label(node)} reads it as a parameter")

    def _pin_overlapping(self) -> None:
        """Columns seen once as a whole and once group by group, or with different groups, cannot move."""
        views: dict[tuple[ir.Value, int], list[Axis]] = {}
        for axis in self.axes:
            views.setdefault((axis.value, axis.axis), []).append(axis)
        for several in views.values():
            sizes = {None if a.rows is None else a.rows[1] - a.rows[0] for a in several}
            if len(sizes) > 1:
                for axis in several:
                    self.pin_atoms(axis.atoms, f"{axis.value.name!r} is read with different groups")


Rule = Callable[[Ties, ir.Node], set[int]]  # which inputs it has understood; the others are pinned


def _is_read(value: ir.Value) -> bool:
    return bool(value.name) and (bool(value.uses()) or value.is_graph_output())


def _label(node: ir.Node) -> str:
    return f"{node.op_type} {node.name!r}"


def shape_of(value: ir.Value | None) -> tuple[int, ...]:
    """The static shape. Raises Unknown without one."""
    shape = None if value is None else static_shape(value)
    if shape is None:
        raise Unknown("its shape is not known")
    return shape


def ints(node: ir.Node, index: int, attribute: str = "") -> list[int] | None:
    """Constant integers of an input or an attribute; None where absent. Raises Unknown if they are computed."""
    if attribute and attribute in node.attributes:
        return list(node.attributes.get_ints(attribute))
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None:
        return None
    array = constant(value)
    if array is None:
        raise Unknown(f"{value.name!r} is not constant")
    return [int(v) for v in array.reshape(-1)]


def every_input(node: ir.Node) -> set[int]:
    """Their numbers: the rule has understood all of them."""
    return set(range(len(node.inputs)))


def pin_space(ties: Ties, node: ir.Node, *values: ir.Value | None) -> None:
    """Pin the axes behind batch and channels."""
    for value in values:
        for axis in range(2, len(shape_of(value))):
            ties.pin(value, f"{node.op_type} {node.name!r} moves a window along it", axis)


def row_parameters(ties: Ties, node: ir.Node, indices: tuple[int, ...], y: ir.Value) -> set[int]:
    """Tie inputs of one value a channel to axis 1 of y; their numbers."""
    for index in indices:
        if index < len(node.inputs) and node.inputs[index] is not None:
            ties.tie(ties.axis(node.inputs[index], 0), ties.axis(y, 1))
    return set(indices)
