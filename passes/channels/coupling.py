"""Which channels of a network belong together: classes of units that may change places without changing the function.

`Ties` gives atoms (positions of axes of values), pairs of them, and pins. A *unit* is a connected component of atoms:
one channel wherever it appears, rows and biases and columns included. Two units are interchangeable if they look the
same, that is if some order of the atoms of each makes them equal in

    the axes they lie in, and the ties inside them: (tie, color, place of the one atom, place of the other)

with the atoms of a unit ordered by number (axis by axis, along each axis by position). Then exchanging them, atom by
atom in that order, maps every tie onto itself, so by each rule every operator computes the same values, permuted; and
pinned axes (inputs, outputs) are not permuted at all. Equal units that are not pinned form a *class*; any permutation
of a class is a product of such exchanges. Residual Add joins many layers into one class, Concat and Slice cut
an axis into ranges of several classes, a Flatten makes a channel a run of columns, channels that a Pad adds are a
class of their own.

A Reshape that merges axes can leave one of them free at most (`Merge`): a permutation of a product of two axes is not
followed. Axes that are pinned anyway (height, width) come first, then the longest axis stays free: inside attention
heads, the same order in every head.

Components by label propagation with pointer jumping (Shiloach and Vishkin 1982). The idea: DepGraph, Fang et al. 2023,
arXiv:2301.12900; Pool and Yu, Channel Permutations for N:M Sparsity, NeurIPS 2021.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from sparsec.passes.channels.ties import Axis, Merge, Role, Ties, Use


@dataclass(frozen=True)
class Member:
    """Where a class lies along one axis: unit u holds the positions `positions[u]` ([units, copies], ascending)."""

    axis: Axis
    positions: np.ndarray = field(repr=False)

    @property
    def value(self) -> ir.Value:
        """The value that has the axis."""
        return self.axis.value


@dataclass(frozen=True)
class WeightAxis:
    """A member that is the row or column axis of input `index` of `node`."""

    node: ir.Node = field(repr=False)
    index: int
    member: Member


@dataclass(frozen=True)
class ChannelClass:
    """Interchangeable units. `pinned`: why none of them may move, empty for a free class."""

    size: int
    members: tuple[Member, ...] = field(repr=False)
    producers: tuple[WeightAxis, ...] = field(repr=False)  # the class is along their rows
    consumers: tuple[WeightAxis, ...] = field(repr=False)  # the class is along their columns
    pinned: str = ""

    @property
    def free(self) -> bool:
        """Whether the units may change places (or be removed, in a coupling for cutting)."""
        return not self.pinned

    @property
    def name(self) -> str:
        """The first producer, consumer or value, to tell classes apart in messages."""
        for use in (*self.producers, *self.consumers):
            return str(use.node.name)
        return str(self.members[0].value.name)


@dataclass(frozen=True)
class Coupling:
    """All classes of a graph; free ones first in graph order, then pinned ones that hold weight axes."""

    classes: tuple[ChannelClass, ...]

    @property
    def free(self) -> tuple[ChannelClass, ...]:
        """Classes whose units may move."""
        return tuple(c for c in self.classes if c.free)


def couple(graph: ir.Graph, cut: bool = False) -> Coupling:
    """The classes of `graph`. `cut`: units may be removed, rather than permuted."""
    ties = Ties(graph, cut)
    reasons = _settle(ties)
    return Coupling(tuple(_classes(ties, *reasons)))


# ---- components


def components(count: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The least number of each atom's component, shape [count]; a[i] and b[i] are joined.

    >>> components(5, np.array([0, 3]), np.array([4, 1])).tolist()
    [0, 1, 2, 1, 0]
    """
    label = np.arange(count)
    while True:
        first, second = label[a], label[b]
        low = np.minimum(first, second)
        if np.array_equal(first, second):
            return label
        np.minimum.at(label, first, low)
        np.minimum.at(label, second, low)
        while not np.array_equal(label, jumped := label[label]):
            label = jumped


def _settle(ties: Ties) -> tuple[np.ndarray, dict[int, str]]:
    """Labels of all atoms and the reasons of pinned labels, after every Merge was decided; adds ties and pins."""
    open_merges = list(ties.merges)
    while True:
        label, reasons = _label(ties)
        pinned = np.isin(label, np.fromiter(reasons, np.int64, len(reasons)))
        waiting = []
        for position, merge in enumerate(open_merges):
            free = [f for f in merge.factors if not pinned[f.atoms].all()]
            if len(free) > 1:
                waiting.append((position, free))
        done = {position for position, _ in waiting}
        for position, merge in enumerate(open_merges):
            if position not in done:
                _merge(ties, merge, [f for f in merge.factors if not pinned[f.atoms].all()])
        if not open_merges:
            return label, reasons
        if waiting and len(waiting) == len(open_merges):  # nothing decides by itself: the first one chooses
            position, free = waiting[0]
            best = max(range(len(free)), key=lambda i: (free[i].size, i))
            merge = open_merges[position]
            for index, factor in enumerate(free):
                if index != best:
                    what = f"{merge.node.op_type} {merge.node.name!r}"
                    ties.pin_atoms(factor.atoms, f"{what} merges it with an axis of {free[best].size}")
        else:
            open_merges = [open_merges[position] for position, _ in waiting]


def _merge(ties: Ties, merge: Merge, free: Sequence[Axis]) -> None:
    if not free:
        ties.pin_atoms(merge.flat.atoms, f"{merge.node.op_type} {merge.node.name!r} merges pinned axes in it")
        return
    shape = [f.size for f in merge.factors]
    which = next(i for i, f in enumerate(merge.factors) if f is free[0])
    index = np.indices(shape).reshape(len(shape), -1)
    rest = np.ravel_multi_index([*index[:which], *index[which + 1 :]], [*shape[:which], *shape[which + 1 :]])
    ties.tie(free[0].atoms[index[which]], merge.flat, rest)


def _label(ties: Ties) -> tuple[np.ndarray, dict[int, str]]:
    empty = np.zeros(0, np.int64)
    a = np.concatenate([empty, *(link[0] for link in ties.links)])
    b = np.concatenate([empty, *(link[1] for link in ties.links)])
    label = components(ties.count, a, b)
    reasons: dict[int, str] = {}
    for atoms, reason in ties.pins:
        for unit in np.unique(label[atoms]).tolist():
            reasons.setdefault(unit, reason)
    return label, reasons


# ---- classes


def _classes(ties: Ties, label: np.ndarray, reasons: Mapping[int, str]) -> list[ChannelClass]:
    owner = np.repeat(np.arange(len(ties.axes)), [axis.size for axis in ties.axes])
    order = np.argsort(label, kind="stable")  # atoms of one unit in a row, ascending
    starts = np.flatnonzero(np.r_[True, np.diff(label[order]) != 0]) if order.size else np.zeros(0, int)
    place = np.empty(label.size, np.int64)  # of an atom in its unit
    place[order] = np.arange(label.size) - np.repeat(starts, np.diff(np.r_[starts, label.size]))
    pinned = np.isin(label, np.fromiter(reasons, np.int64, len(reasons)))
    weights = {id(use.axis) for use in ties.uses}
    heavy = np.isin(owner, [i for i, axis in enumerate(ties.axes) if id(axis) in weights])
    inside = _inside(ties, label, place, pinned)
    groups: dict[tuple[object, ...], list[np.ndarray]] = defaultdict(list)
    for begin, end in zip(starts.tolist(), [*starts[1:].tolist(), label.size], strict=True):
        atoms = order[begin:end]
        unit = int(label[atoms[0]])
        if unit in reasons:
            if heavy[atoms].any():
                groups["pinned", reasons[unit], owner[atoms].tobytes()].append(atoms)
        else:
            groups["free", owner[atoms].tobytes(), inside.get(unit, b"")].append(atoms)
    uses: dict[int, list[Use]] = defaultdict(list)
    for use in ties.uses:
        uses[id(use.axis)].append(use)
    made = [
        _class(ties, np.stack(atoms), owner, uses, reasons.get(int(label[atoms[0][0]]), ""))
        for atoms in groups.values()
    ]
    # Without a constant in it there is nothing to permute or to cut.
    made = [c for c in made if any(m.value.is_initializer() for m in c.members)]
    return sorted(made, key=lambda c: not c.free)


def _inside(ties: Ties, label: np.ndarray, place: np.ndarray, pinned: np.ndarray) -> dict[int, bytes]:
    """Unit -> its ties as (tie, color, place, place), sorted."""
    rows = []
    for number, (a, b, color) in enumerate(ties.links):
        moves = ~pinned[a]
        if moves.any():
            colors = np.broadcast_to(np.asarray(color), a.shape)[moves]
            a, b = a[moves], b[moves]
            rows.append(np.stack([label[a], np.full(a.size, number), colors, place[a], place[b]]))
    if not rows:
        return {}
    table = np.concatenate(rows, axis=1)
    table = table[:, np.lexsort(table[::-1])]
    cuts = np.flatnonzero(np.r_[True, np.diff(table[0]) != 0])
    ends = np.r_[cuts[1:], table.shape[1]]
    body = np.ascontiguousarray(table[1:].T)
    return {int(table[0, i]): body[i:j].tobytes() for i, j in zip(cuts.tolist(), ends.tolist(), strict=True)}


def _class(
    ties: Ties, atoms: np.ndarray, owner: np.ndarray, uses: Mapping[int, Sequence[Use]], pinned: str
) -> ChannelClass:
    """`atoms` [units, atoms of a unit]."""
    atoms = atoms[np.argsort(atoms[:, 0], kind="stable")]
    columns = owner[atoms[0]]
    members: list[Member] = []
    by_role: dict[Role, list[WeightAxis]] = {"row": [], "column": []}
    for index in dict.fromkeys(columns.tolist()):
        axis = ties.axes[index]
        member = Member(axis, atoms[:, columns == index] - axis.start)
        members.append(member)
        for use in uses.get(id(axis), ()):
            by_role[use.role].append(WeightAxis(use.node, use.index, member))
    return ChannelClass(len(atoms), tuple(members), tuple(by_role["row"]), tuple(by_role["column"]), pinned)


# ---- permuting


def permute(graph: ir.Graph, orders: Sequence[tuple[ChannelClass, np.ndarray]]) -> bool:
    """Put unit order[s] of each class where unit s was, in every initializer; whether any array changed.

    Permutations of different classes commute, since classes share no atom.
    """
    moves: dict[ir.Value, dict[tuple[int, tuple[int, int] | None], np.ndarray]] = defaultdict(dict)
    for units, order in orders:
        if not units.free or sorted(np.asarray(order).tolist()) != list(range(units.size)):
            raise ValueError(f"not a permutation of a free class of {units.size} units: {units.name}")
        for member in units.members:
            if member.value.is_initializer():
                axis = member.axis
                index = moves[member.value].setdefault((axis.axis, axis.rows), np.arange(axis.size))
                index[member.positions] = member.positions[order]
    changed = False
    for value, indices in moves.items():
        tensor = value.const_value
        assert tensor is not None
        array = moved = tensor.numpy()
        for (axis, rows), index in sorted(indices.items(), key=lambda item: item[0][1] is None):
            if rows is None:
                moved = np.take(moved, index, axis=axis)
            else:  # columns of one group; its rows move within the group, later
                moved = moved.copy() if moved is array else moved
                moved[rows[0] : rows[1]] = np.take(moved[rows[0] : rows[1]], index, axis=axis)
        if moved.tobytes() != array.tobytes():
            value.const_value = ir.Tensor(np.ascontiguousarray(moved), dtype=tensor.dtype, name=value.name)
            changed = True
    return changed
