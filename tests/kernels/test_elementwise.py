"""Elementwise layers: every way to broadcast, ragged sizes, activations, several tiles."""

from __future__ import annotations

import numpy as np
import pytest
from layers import Layer, check_layers

from sparsec.kernels import elementwise
from sparsec.kernels.epilogue import KINDS, NONE, RELU, Activation


def layer(machine, op, a_shape, b_shape, *, activation=NONE, swapped=False):
    rng = np.random.default_rng([*a_shape, len(b_shape)])
    a, b = (rng.uniform(0.5, 2, shape).astype(np.float32) * rng.choice([-1, 1], shape) for shape in (a_shape, b_shape))
    a, b = a.astype(np.float32), b.astype(np.float32)
    call = elementwise.bind(machine, op, a_shape=a_shape, b_shape=b_shape, activation=activation, swapped=swapped)
    return Layer(call, elementwise.reference(op, a, b, activation, swapped), 2e-6, a=a, b=b)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div"])
def test_every_spread(target, op):
    machine = target.machine
    cases = []
    for a, b in [
        ((1, 3, 7, 7), (1, 3, 7, 7)), ((9000,), (9000,)), ((2, 5, 3, 3), (5, 1, 1)), ((2, 5, 6, 7), (2, 5, 1, 1)),
        ((3, 50, 20), (20,)), ((3, 50, 20), (1,)), ((2, 3, 5000), (5000,)), ((8192,), (8192,)), ((1, 40, 9, 15), (1, 40, 1, 1)),
    ]:  # fmt: skip
        cases.append(layer(machine, op, a, b, activation=RELU))
        cases.append(layer(machine, op, a, b, swapped=True))
    check_layers(cases, target)


def test_sizes_around_the_vector(target):
    check_layers(
        [layer(target.machine, "add", (n,), (n,)) for n in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33)], target
    )


def test_activations_alone(target):
    layers = []
    for i, kind in enumerate(KINDS):
        activation = Activation(kind, 0.25, 0.5)
        x = np.random.default_rng(i).uniform(-8, 8, 4096 + 7 * i).astype(np.float32)
        call = elementwise.bind_unary(target.machine, size=x.size, activation=activation)
        layers.append(Layer(call, elementwise.reference_activation(activation, x), 3e-6, x=x))
    check_layers(layers, target)


def test_spread_names_what_it_cannot_do():
    assert elementwise.spread((2, 3, 4), (2, 3, 4))[0] == "same"
    assert elementwise.spread((2, 3, 4, 4), (1, 3, 1, 1)) == ("channel", 3, 16)
    assert elementwise.spread((2, 3, 4), (3, 4)) == ("row", 12, 12)
    assert elementwise.spread((2, 3, 4), (2, 1, 4)) is None
    assert elementwise.spread((3, 4), (2, 3, 4)) is None
    with pytest.raises(ValueError, match="does not broadcast"):
        elementwise.bind(None, "add", a_shape=(2, 3, 4), b_shape=(2, 1, 4))
