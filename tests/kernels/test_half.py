"""Every family in float16 against float64: on Arm, whose arithmetic it is, and on the host, which converts."""

from __future__ import annotations

import re

import numpy as np
import pytest
from harness import Library
from layers import Layer, check_layers
from tvm.tirx.build import codegen_build

from sparsec.building.codegen import lower_kernels, tvm_target
from sparsec.kernels import conv, depthwise, elementwise, fc, gemm, normalize, planes, pool
from sparsec.kernels.base import CHAIN
from sparsec.kernels.epilogue import KINDS, NONE, RELU, RELU6, Activation, reference
from sparsec.program import Kernel
from sparsec.runtimes.base import machine_arch
from sparsec.runtimes.emulated import find_emulator
from sparsec.targets import find_target

U = 2.0**-11
HOST = find_target("host")
ARM = find_target("arm")
TARGETS = [HOST, *([ARM] if machine_arch() != "aarch64" and find_emulator() else [])]


@pytest.fixture(params=TARGETS, ids=lambda target: target.name)
def target(request):
    return request.param


def run(layer, target):
    """What the layer computes."""
    rooms = layer.rooms()
    Library([Kernel(layer.call.name, layer.call.func)], target).call(layer.call.name, rooms, layer.call.tiles)
    return rooms[layer.call.roles.index("y")].array


def random(rng, *shape):
    """Normal values that float16 holds exactly."""
    return rng.standard_normal(shape).astype(np.float16)


def weights(rng, *shape, density=1.0):
    """The same as float32, `density` of them not zero."""
    return np.where(rng.random(shape) < density, random(rng, *shape), 0).astype(np.float32)


def bound(terms, size, steepness=1.2):
    """Largest error of a sum of `terms` whose sizes add up to `size`, rounded at each step, and of what follows it."""
    return U * steepness * ((terms + 6) * size + 8)


def convolution(machine, form, size, channels, rows, kernel=(1, 1), strides=(1, 1), pads=(0, 0, 0, 0), density=0.4,
                activation=RELU6, residual="none"):  # fmt: skip
    geometry = conv.Geometry((1, channels, *size), (rows, channels, *kernel), strides, pads)
    rng = np.random.default_rng([*size, channels, rows])
    x, other = random(rng, *geometry.x_shape), random(rng, *geometry.y_shape)
    w, bias = weights(rng, *geometry.w_shape, density=density), weights(rng, rows)
    prepare, main = conv.bind(machine, geometry, w, form=form, bias=bias, activation=activation, residual=residual)
    expected = conv.reference(geometry, x, w, bias, activation, residual, other)
    magnitude = conv.reference(geometry, np.abs(x), np.abs(w), np.abs(bias)) + np.abs(other)
    terms = int(np.count_nonzero(w.reshape(rows, -1), axis=1).max())
    if prepare is not None:
        (sh, sw), (top, left, bottom, right) = strides, pads
        padded = np.pad(x, ((0, 0), (0, 0), (top, bottom + sh), (left, right + sw)))
        _, height, width = geometry.phase_shape
        phases = [padded[:, :, r::sh, c::sw][:, :, :height, :width] for r, c in geometry.phases]
        x = np.ascontiguousarray(np.stack(phases, axis=2))
    given = {"x": x, "residual": other} if residual != "none" else {"x": x}
    return Layer(main, expected, bound(terms, magnitude), **given)


@pytest.mark.parametrize("form", conv.TABLE, ids=lambda form: form.name)
def test_convolution(target, form):
    machine, rows, columns = target.machine.half(), max(form.rows, 6), 4 * form.columns
    activations = (NONE, RELU6, Activation("hardswish"), Activation("silu"))
    layers = [
        convolution(machine, form, size, columns + i % 2, rows + i % 3, activation=activations[i % 4],
                    residual=("none", "after", "before")[i % 3])
        for i, size in enumerate([(7, 7), (1, 9), (4, 15), (13, 17), (1, 3), (1, 1)])
    ]  # fmt: skip
    layers.append(convolution(machine, form, (9, 15), 4, rows, (3, 3), (2, 2), (1, 1, 1, 1)))
    layers.append(convolution(machine, form, (6, 11), 3, rows, (3, 3), pads=(1, 1, 1, 1)))
    check_layers(layers, target)
    assert all("_f16_" in layer.call.name for layer in layers)


def test_long_sums_are_cut_into_chains(target):
    """Half the error of one chain, and no more than twice that of the rounding of chains."""
    machine, terms = target.machine.half(), 8 * CHAIN
    errors = {}
    rng = np.random.default_rng(0)
    x, w = random(rng, 8, terms), weights(rng, 40, terms)
    geometry = conv.Geometry((1, terms, 1, 8), (40, terms, 1, 1))
    expected = gemm.reference(x, w)
    _, call = conv.bind(machine, geometry, w[:, :, None, None])
    columns = Layer(
        call, expected.T.reshape(geometry.y_shape), np.inf, x=np.ascontiguousarray(x.T).reshape(geometry.x_shape)
    )
    for name, layer in (("conv", columns), ("gemm", Layer(gemm.bind(machine, m=8, w=w), expected, np.inf, x=x))):
        y = run(layer, target)
        errors[name] = np.sqrt(np.mean((y.astype(np.float64) - layer.expected) ** 2) / np.mean(layer.expected**2))
    model = U * np.sqrt((CHAIN + terms / CHAIN) / 12)  # see sparsec.proving.tolerance: u / sqrt(3) of sums that grow
    assert max(errors.values()) < 1.3 * model
    assert 1.3 * model < 0.5 * U * np.sqrt(terms / 12)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_depthwise(target, strides):
    layers = []
    for size in [(7, 7), (14, 14), (5, 28), (9, 3)]:
        rng = np.random.default_rng(size)
        x, w, bias = random(rng, 1, 18, *size), weights(rng, 18, 1, 3, 3), weights(rng, 18)
        options = {"strides": strides, "pads": (1, 1, 1, 1), "activation": RELU6}
        call = depthwise.bind(target.machine.half(), x_shape=x.shape, w=w, bias=bias, **options)
        magnitude = depthwise.reference(np.abs(x), np.abs(w), np.abs(bias), strides=strides, pads=(1, 1, 1, 1))
        layers.append(Layer(call, depthwise.reference(x, w, bias, **options), bound(9, magnitude), x=x))
    check_layers(layers, target)


def test_products(target):
    machine, layers = target.machine.half(), []
    for m, k, n in [(1, 70, 33), (5, 33, 20), (9, 3 * CHAIN, 12)]:
        rng = np.random.default_rng([m, k, n])
        x, bias, other = random(rng, m, k), weights(rng, n), random(rng, m, n)
        for i, form in enumerate([None, *fc.TABLE]):
            w = weights(rng, n, k, density=1.0 if form is None else 0.3)
            more = {
                "bias": bias,
                "activation": (RELU, Activation("gelu"))[i % 2],
                "residual": ("none", "before")[i % 2],
            }
            call = (
                gemm.bind(machine, m=m, w=w, **more) if form is None else fc.bind(machine, m=m, w=w, form=form, **more)
            )
            magnitude = gemm.reference(np.abs(x), np.abs(w), np.abs(bias)) + np.abs(other)
            given = {"x": x, "residual": other} if i % 2 else {"x": x}
            layers.append(Layer(call, gemm.reference(x, w, **more, other=other), bound(k, magnitude), **given))
    check_layers(layers, target)


@pytest.mark.parametrize("transposed", [False, True])
def test_two_activations(target, transposed):
    layers = []
    for m, k, n in [(9, 17, 21), (3, 40, 8)]:
        rng = np.random.default_rng([m, k, n])
        a, b = random(rng, 3, m, k), random(rng, 3, *((n, k) if transposed else (k, n)))
        call = gemm.bind_matmul(target.machine.half(), batch=3, m=m, k=k, n=n, transposed=transposed, scale=0.3)
        expected = 0.3 * gemm.reference_matmul(a, b, transposed)
        layers.append(
            Layer(call, expected, bound(k, gemm.reference_matmul(np.abs(a), np.abs(b), transposed)), a=a, b=b)
        )
    check_layers(layers, target)


@pytest.mark.parametrize("mode", ["max", "average"])
def test_pooling(target, mode):
    machine = target.machine.half()
    x = random(np.random.default_rng(0), 1, 20, 11, 13)
    window = planes.Window(11, 13, (3, 3), (2, 2), (1, 1, 1, 1))
    call = pool.bind(machine, mode, x_shape=x.shape, kernel=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1))
    layers = [Layer(call, pool.reference(mode, x, window), bound(9, 2.0) if mode == "average" else 1e-9, x=x)]
    rows = x.reshape(20, 143) + np.float16(8)  # a float16 sum of 143 of them would be off by more than one in 1000
    expected = pool.reference_global(mode, rows)
    layers.append(
        Layer(pool.bind_global(machine, mode, rows=20, count=143), expected, 1.01 * U * np.abs(expected), x=rows)
    )
    check_layers(layers, target)


def test_normalization(target):
    machine, rng = target.machine.half(), np.random.default_rng(0)
    x, gamma = random(rng, 19, 45), weights(rng, 45)
    expected = normalize.reference_layernorm(x, gamma, gamma, 1e-5)
    large = 40 * x  # float32 inside: nothing overflows
    softmax = normalize.reference_softmax(large)
    check_layers([
        Layer(normalize.bind_layernorm(machine, rows=19, gamma=gamma, beta=gamma, epsilon=1e-5), expected,
              1.1 * U * np.abs(expected) + 1e-5, x=x),
        Layer(normalize.bind_softmax(machine, rows=19, count=45), softmax, 2.1 * U * softmax + 2.0**-24, x=large),
    ], target)  # fmt: skip


def test_elementwise(target):
    machine, rng, layers = target.machine.half(), np.random.default_rng(0), []
    a = random(rng, 1, 6, 5, 9)
    for op, shape in (("add", a.shape), ("mul", (6, 1, 1)), ("sub", (9,)), ("div", (1,))):
        b = (1 + rng.random(shape)).astype(np.float16)
        expected = elementwise.reference(op, a, b)
        call = elementwise.bind(machine, op, a_shape=a.shape, b_shape=b.shape)
        layers.append(Layer(call, expected, 1.01 * U * np.abs(expected) + 1e-7, a=a, b=b))
    check_layers(layers, target)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_activations(target, kind):
    """One rounding of a float32 result, or three where float16 computes it; the ends of the range are as in float64."""
    activation = Activation(
        kind, *{"clip": (-1.5, 1e9), "hardsigmoid": (0.25, 0.5), "leaky_relu": (0.125, 0.0)}.get(kind, ())
    )
    x = np.concatenate([np.linspace(-12, 12, 997), [0.0, -0.0, 60000, -60000, 6e-8]]).astype(np.float16)
    expected = reference(activation, x)
    plain = kind in ("hardswish", "hardsigmoid")
    tolerance = (4 if plain else 1.01) * U * (np.abs(expected) + (np.abs(x) / 4 if plain else 0)) + 2.0**-23
    call = elementwise.bind_unary(target.machine.half(), size=x.size, activation=activation)
    check_layers([Layer(call, expected, tolerance, x=x)], target)


@pytest.mark.parametrize("kind", ["relu", "clip", "hardswish", "silu", "gelu"])
def test_nan_passes(target, kind):
    for machine, dtype in ((target.machine, np.float32), (target.machine.half(), np.float16)):
        x = np.array([np.nan, 1.0] * 9, dtype)
        activation = Activation(kind, 0.0, 6.0)
        layer = Layer(elementwise.bind_unary(machine, size=18, activation=activation), np.zeros(18), np.inf, x=x)
        assert np.isnan(run(layer, target)[::2]).all()


@pytest.mark.parametrize("form", ["dense", "1x1", "4x1"])
def test_inner_loops_on_arm_multiply_by_element(form):
    """No conversion, no broadcast register: `fmla v.8h, v.8h, v.h[i]`."""
    form = next(row for row in conv.TABLE if row.format == form)
    w = weights(np.random.default_rng(0), 64, 64, 1, 1, density=0.3 if form.sparse else 1.0)
    _, call = conv.bind(ARM.machine.half(), conv.Geometry((1, 64, 14, 14), w.shape), w, form=form, activation=RELU6)
    module = codegen_build(lower_kernels((Kernel(call.name, call.func),), ARM), tvm_target(ARM).host)
    text = module.inspect_source("asm")
    code = text[text.index(f"{call.name}:") :].split(".Lfunc_end")[0]
    products = re.findall(r"fmla\s+v\d+\.8h, v\d+\.8h, v\d+\.h\[\d\]", code)
    assert len(products) >= 28
    assert len(re.findall(r"\sfmla\s", code)) == len(products)
    assert not re.search(r"\s(fcvt\w*|dup)\s", code)
