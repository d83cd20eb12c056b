"""Activations against float64, on scalars and on vectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from harness import run_kernel
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit, epilogue
from sparsec.kernels.epilogue import KINDS, Activation, activate, finish, reference, reference_finish

COUNT = 4096
SPECIAL = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e30, -1e30, 1e-30], np.float32)


def _points() -> np.ndarray:
    rng = np.random.default_rng(0)
    small = rng.standard_normal(COUNT - 3500 - 8) * 1e-3
    parts = [np.linspace(-12, 12, 2000), np.linspace(-110, 95, 1500), small, SPECIAL]
    return np.concatenate(parts).astype(np.float32)


def _vectors(function, lanes):
    def body(x, y, begin, end):
        with T.serial(begin, end) as t:
            emit.store(y, t * lanes, function(emit.load(x, t * lanes, lanes)), lanes)

    return emit.function([("x", COUNT, "float32"), ("y", COUNT, "float32")], body)


def _run(function, lanes=16):
    x = _points()
    return x, run_kernel(_vectors(function, lanes), [x, np.zeros_like(x)], COUNT // lanes)[1]


def test_exp_is_within_two_ulp():
    x, y = _run(epilogue.exp)
    with np.errstate(over="ignore"):
        expected = np.exp(x.astype(np.float64))
        normal = (expected > np.finfo(np.float32).tiny) & (expected < np.finfo(np.float32).max)
        ulp = np.abs(y[normal] - expected[normal]) / np.spacing(expected[normal].astype(np.float32))
    assert ulp.max() <= 2
    subnormal = (expected > 0) & (expected < 1e-37)
    assert (np.abs(y[subnormal] - expected[subnormal]) < 1e-43).all()
    np.testing.assert_array_equal(y[-8:-6], [np.inf, 0])
    assert np.isnan(y[-6])


@pytest.mark.parametrize(
    ("function", "expected", "tolerance"),
    [
        (epilogue.erf, np.vectorize(math.erf, otypes=[np.float64]), 1e-7),
        (epilogue.tanh, np.tanh, 1e-7),
        (epilogue.sigmoid, lambda x: reference(Activation("sigmoid"), x), 1.2e-7),
    ],
)
def test_bounded_functions(function, expected, tolerance):
    x, y = _run(function)
    number = ~np.isnan(x)
    assert np.abs(y[number] - expected(x[number].astype(np.float64))).max() <= tolerance
    assert np.isnan(y[~number]).all()


@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_every_kind_agrees_with_float64(lanes):
    for kind in KINDS:
        activation = Activation(kind, 0.25, 0.5)
        x, y = _run(lambda v, a=activation: activate(a, v), lanes)
        finite = np.isfinite(x)
        expected = reference(activation, x[finite])
        # one rounding of the result, and the bounded factor's absolute error times |x|
        tolerance = 4e-7 * np.maximum(1, np.abs(x[finite].astype(np.float64)))
        assert (np.abs(y[finite] - expected) <= tolerance).all(), kind
        assert np.isnan(y[np.isnan(x)]).all(), f"{kind} hides NaN"


def test_special_values():
    for kind, at_inf, at_minus_inf in [
        ("relu", np.inf, 0), ("clip", 0.5, 0.25), ("sigmoid", 1, 0), ("tanh", 1, -1), ("hardsigmoid", 1, 0),
    ]:  # fmt: skip
        activation = Activation(kind, 0.25, 0.5)
        _, y = _run(lambda v, a=activation: activate(a, v))
        np.testing.assert_array_equal(y[-8:-6], [at_inf, at_minus_inf], err_msg=kind)


@pytest.mark.parametrize("residual", ["none", "before", "after"])
def test_order_of_residual_and_activation(residual):
    x, y = _run(lambda v: finish(v, epilogue.RELU, residual, v * emit.splat(T.float32(-2), 16)))
    finite = np.isfinite(x) & (np.abs(x) < 1e29)
    expected = reference_finish(x[finite].astype(np.float64), epilogue.RELU, residual, -2.0 * x[finite])
    np.testing.assert_array_equal(y[finite], expected.astype(np.float32))


def test_names_are_identifiers_and_differ():
    some = [Activation(kind) for kind in KINDS] + [Activation("clip", 0.0, v) for v in (1.0, 6.0, math.inf)]
    some += [Activation("leaky_relu", v) for v in (0.1, 0.2)]
    names = {activation.name for activation in some}
    assert len(names) == len(some)
    assert all(name.isidentifier() for name in names)


def test_bad_activations_are_refused():
    with pytest.raises(ValueError, match="known: none"):
        Activation("swishy")
    with pytest.raises(ValueError, match="min <= max"):
        Activation("clip", 1.0, 0.0)
