"""Moves of bytes against their definition: every way, sizes around the vector, types."""

from __future__ import annotations

import math

import numpy as np
import pytest
from harness import Library, Room
from hypothesis import given
from hypothesis import strategies as st
from layers import Layer, check_layers

from sparsec.kernels import moves_int8
from sparsec.kernels.moves_int8 import Arrangement, Axis, row_major, simplified, way
from sparsec.program import Kernel

UNWRITTEN = 0x5A  # what `layers` fills outputs with


def transposed(shape, perm):
    strides, y = row_major(shape), [shape[p] for p in perm]
    axes = tuple(Axis(shape[p], strides[p], s) for p, s in zip(perm, row_major(y), strict=True))
    return Arrangement(math.prod(shape), math.prod(y), axes)


def layer(machine, arrangement, kind, element="uint8"):
    """`kind`: the way that it is meant to test."""
    assert way(simplified(arrangement)) == kind
    rng = np.random.default_rng(arrangement.count)
    x = rng.integers(0, 256, arrangement.x_size).astype(np.uint8).view(element)
    y = np.full(arrangement.y_size, UNWRITTEN, np.uint8).view(element)
    call = moves_int8.bind(machine, arrangement, element)
    return Layer(call, moves_int8.reference(arrangement, x, y).astype(np.float32), 0.5, x=x)


def test_every_way(dot_target):
    machine = dot_target.machine
    cases = [
        layer(machine, transposed((2, 40, 35), (0, 2, 1)), "transpose"),
        layer(machine, transposed((16, 3, 64), (2, 1, 0)), "transpose", "int8"),
        layer(machine, transposed((50, 17, 3), (2, 1, 0)), "gather"),
        layer(machine, transposed((5, 7, 100), (1, 0, 2)), "run", "int8"),
        layer(machine, Arrangement(9, 9 * 70, (Axis(9, 1, 70), Axis(70, 0, 1))), "fill"),
        layer(machine, Arrangement(50, 90, (Axis(9, 5, 1),), 3, 2), "gather"),
        layer(machine, Arrangement(50, 90, (Axis(9, -5, 10), Axis(3, 1, 1)), 45, 2), "run", "int8"),
        layer(machine, Arrangement(30, 20, (Axis(4, (7, 2, 7, 1), 5), Axis(3, (9, 0, 5), 1))), "gather"),
        layer(machine, Arrangement(30, 20, (Axis(4, (20, 2, 7, 1), 5), Axis(4, 1, 1))), "run"),
        layer(machine, Arrangement(30, 30, (Axis(5, 1, 6),), 3, 2), "gather"),  # a column of y
        layer(machine, Arrangement(12000, 24000, (Axis(120, 100, 200), Axis(100, 1, 1))), "run"),
    ]
    for i, n in enumerate((1, 3, 16, 17, 33, 64, 100)):
        cases.append(layer(machine, Arrangement(3 * n, 4 * n, (Axis(3, n, n), Axis(n, 1, 1))[i % 2 :]), "run"))
        if n > 1:
            r, row = (2, 4, 8)[i % 3], 2 * n + 3
            cases.append(layer(machine, Arrangement(3 * row, 3 * n, (Axis(3, row, n), Axis(n, 2, 1))), "even"))
            cases.append(layer(machine, Arrangement(n, n * r, (Axis(n, 1, r), Axis(r, 0, 1))), "repeat", "int8"))
    check_layers(cases, dot_target)


def test_fill(dot_target):
    for size, value, element in ((1, 7, "uint8"), (20000, 255, "uint8"), (100, -128, "int8")):
        call = moves_int8.bind_fill(dot_target.machine, size=size, value=value, element=element)
        room = Room(np.zeros(size, element))
        Library([Kernel(call.name, call.func)], dot_target).call(call.name, [room], call.tiles)
        assert (room.array == value).all()


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_simplified_is_the_same(sizes, random):
    """Any mixture of strides and tables, against the definition."""
    shape = [size * (2 if kind == 3 else 1) for size, kind in sizes]
    strides = row_major(shape)
    axes = []
    for (size, kind), extent, stride in zip(sizes, shape, strides, strict=True):
        x = random.randrange(-2, 3) * 8
        if kind == 1:
            x = tuple(random.randrange(0, 9) for _ in range(extent))
        elif kind == 3:  # each twice
            x = tuple(8 * i for i in range(size) for _ in range(2))
        axes.append(Axis(extent, x, stride))
    lowest = -sum(int(a.offsets.min(initial=0)) for a in axes)
    arrangement = Arrangement(1000, math.prod(shape), tuple(axes), lowest)
    found = simplified(arrangement)
    x, y = np.arange(1000), np.full(math.prod(shape), -1)
    expected = moves_int8.reference(arrangement, x, y)
    np.testing.assert_array_equal(moves_int8.reference(found, x, y), expected)
    assert (expected >= 0).all()
    assert len(found.axes) <= 2 * len(axes) and all(axis.size > 1 for axis in found.axes)


@pytest.mark.parametrize(("shape", "perm", "axes"), [((2, 3, 4), (0, 1, 2), 1), ((2, 3, 4), (1, 2, 0), 2)])
def test_neighbouring_axes_are_one(shape, perm, axes):
    assert len(simplified(transposed(shape, perm)).axes) == axes
