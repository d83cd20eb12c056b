"""8-bit depthwise convolution against its definition: sums bit by bit, widths around the vector, edges, strides, types."""

from __future__ import annotations

import numpy as np
import pytest
from layers import Layer, check_layers, share

from sparsec.kernels import depthwise_int8, planes, quantized, words
from sparsec.kernels.base import Machine
from sparsec.kernels.epilogue import NONE, RELU, RELU6, Activation
from sparsec.kernels.quantized import QuantType, Requantize
from sparsec.targets import find_target

X, S = QuantType(0.02, 7), QuantType(0.03, -5, "int8")
Y = QuantType(0.05, 3)


def layer(machine, shape, kernel=(3, 3), *, steps=None, x_type=X, multiplier=1, with_bias=True, strides=(1, 1), pads=None,
          dilations=(1, 1), exact=False):  # fmt: skip
    """`exact`: what is stored is the sum itself, as float32."""
    rng = np.random.default_rng([*shape, *kernel])
    window = {
        "strides": strides,
        "pads": (kernel[0] // 2, kernel[1] // 2) * 2 if pads is None else pads,
        "dilations": dilations,
    }
    x = rng.integers(*x_type.range, shape, endpoint=True).astype(x_type.dtype)
    count = shape[1] * multiplier
    w = rng.integers(-128, 128, (count, 1, *kernel)).astype(np.int8)
    bias = rng.integers(-3000, 3000, count).astype(np.int32) if with_bias else None
    w_scale = np.full(count, 1 / x_type.scale, np.float32) if exact else rng.uniform(0.001, 0.003, count)
    steps = Requantize(None) if exact else steps or Requantize(Y)
    assert depthwise_int8.refusal(machine, shape, w.shape, shape[1], **window) is None
    call = depthwise_int8.bind(machine, x_shape=shape, w=w, bias=bias, x=x_type, w_scale=w_scale, steps=steps, **window)
    sums = depthwise_int8.reference(x, w, bias, x_type, **window)
    if exact:
        assert np.abs(sums).max() < 1 << 24  # so float32 holds every sum
        return Layer(call, sums.astype(np.float32), 0.01, x=x)
    given = {"x": x}
    if steps.residual != "none":
        other = rng.integers(-100, 100, sums.shape)
        given["residual"] = other.astype(np.float32) / 50 if steps.other is None else other.astype(steps.other_element)
    factor = steps.multipliers(x_type, w_scale)[:, None, None]
    expected = quantized.reference_requantize(sums, factor, steps, given.get("residual"))
    # float32 in another order may round to the other side; never further
    tolerance = (
        1e-4 if steps.y is None else 0.5 if steps.residual == "none" and steps.activation.kind in _PLAIN else 1.5
    )
    return Layer(call, expected.astype(np.float32), tolerance, **given)


_PLAIN = ("none", "relu", "clip")


def check(cases, target, parts):
    """Every case: shape, options of `layer`."""
    check_layers([layer(target.machine, shape, **options) for shape, options in share(cases, target, parts)], target)


def test_sums_at_widths_around_the_vector(dot_target):
    widths = (1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 25, 31, 33, 50, 80)
    check([((1, 3, 3, width), {"exact": True}) for width in widths], dot_target, 7)


def test_planes(dot_target):
    pads = [(1, 1, 1, 1), (0, 0, 1, 1), (0, 0, 0, 0), (2, 3, 1, 0)]
    sizes = {(1, 1): 5, (2, 2): 5, (2, 1): 5, (3, 3): 2}
    cases = [
        (
            (1, 18, *size),
            {
                "strides": strides, "pads": pads[i % 4], "x_type": (X, S)[i % 2],
                "steps": Requantize((Y, QuantType(0.05, -7, "int8"))[(i + strides[1]) % 2], RELU6),
            },
        )
        for strides, count in sizes.items()
        for i, size in enumerate([(14, 14), (7, 7), (9, 33), (20, 28), (35, 5)] if count == 5 else [(9, 10), (9, 50)])
    ]  # fmt: skip
    check(cases, dot_target, 7)


def test_kernels(dot_target):
    kernels = [(5, 5), (1, 1), (2, 2), (7, 7), (9, 1), (1, 9)]
    cases = [
        ((1, 17, 13, 18), {"kernel": kernel, "strides": strides, "exact": True})
        for kernel in kernels for strides in ((1, 1), (2, 2))
    ]  # fmt: skip
    check(cases, dot_target, 7)


def test_dilation_multiplier_batch_and_bands(dot_target):
    shape = (2, 9, 11, 19)
    cases = [
        (shape, {"multiplier": 3, "strides": (2, 2)}),
        (shape, {"dilations": (2, 2), "pads": (2, 2, 2, 2), "x_type": S}),
        ((1, 17, 40, 70), {"dilations": (3, 5), "strides": (2, 2), "pads": (2, 9, 2, 9)}),
        (shape, {"with_bias": False}),
        ((1, 16, 3, 3), {"pads": (5, 4, 3, 6)}),
        ((1, 5, 50, 1), {"kernel": (9, 1), "pads": (4, 0, 4, 0)}),
        *(((1, 2, h, w), {"strides": (s, s)}) for h, w in ((40, 40), (41, 6)) for s in (1, 2)),
    ]
    assert layer(dot_target.machine, (1, 2, 41, 6), strides=(2, 2)).call.tiles > 2
    check(cases, dot_target, 7)


def test_what_follows_the_sum(dot_target):
    shape, inner = (1, 17, 9, 21), QuantType(0.03, 100)
    cases = [
        (shape, Requantize(QuantType(0.05, 0), RELU)), (shape, Requantize(S, Activation("clip", -0.7, 1.31))),
        (shape, Requantize(Y, Activation("hardswish"))), (shape, Requantize(None, RELU)),
        (shape, Requantize(Y, RELU, "before", inner, S)), (shape, Requantize(Y, NONE, "before", None, None)),
        ((1, 17, 3, 7), Requantize(Y, RELU, "after", None, S)),
    ]  # fmt: skip
    check([(shape, {"steps": steps}) for shape, steps in cases], dot_target, 3)


def test_prediction_follows_the_work():
    machine = find_target("host", "cascadelake").machine
    shape = {"pads": (1, 1, 1, 1)}
    small, large = (depthwise_int8.predict_us(machine, (1, c, 56, 56), (c, 1, 3, 3), **shape) for c in (32, 128))
    assert large == pytest.approx(4 * small)
    strided = depthwise_int8.predict_us(machine, (1, 32, 56, 56), (32, 1, 3, 3), strides=(2, 2), **shape)
    wide = depthwise_int8.predict_us(machine, (1, 32, 56, 56), (32, 1, 7, 7), pads=(3, 3, 3, 3))
    assert strided < 0.5 * small < small < wide


def test_results_beyond_32_bits_saturate(dot_target):
    machine, shape = dot_target.machine, (1, 16, 4, 8)
    w, x = np.full((16, 1, 3, 3), 127, np.int8), np.full(shape, 255, np.uint8)
    bias = np.where(np.arange(16) % 2, -(1 << 30), 1 << 30).astype(np.int32)
    call = depthwise_int8.bind(
        machine, x_shape=shape, w=w, bias=bias, x=QuantType(1.0, 0), w_scale=np.full(16, 64.0), steps=Requantize(Y),
        pads=(1, 1, 1, 1),
    )  # fmt: skip
    expected = np.broadcast_to(np.where(bias > 0, 255, 0)[:, None, None], shape).astype(np.float32)
    check_layers([Layer(call, expected, 0.5, x=x)], dot_target)


def test_words_are_where_the_definition_says():
    """Every tap of every output is in exactly one byte of one word, and every byte of a load is reachable."""
    for cpu in ("x86-64-v2", "x86-64-v3", "cascadelake", "znver5"):
        machine = find_target("host", cpu).machine
        for width, kernel, stride, dilation in [
            (14, 3, 1, 1),
            (56, 3, 2, 1),
            (33, 5, 1, 2),
            (7, 3, 1, 1),
            (64, 7, 2, 1),
        ]:
            window = planes.Window(1, width, (1, kernel), (1, stride), (0, kernel // 2, 0, kernel // 2), (1, dilation))
            reader = words.reader(machine, window)
            for segment in words.segments(reader.lanes, window.shape[1]):
                columns, outside = reader.columns(segment), reader.outside(segment)
                for v, vector in enumerate(reader.picks(segment)):
                    for u, how in enumerate(vector):
                        wanted = np.where((columns[v, u] >= 0) & ~outside[v, u], columns[v, u], words.ANY).reshape(-1)
                        found = _picked(how, machine)
                        assert ((wanted == words.ANY) | (wanted == found)).all(), (cpu, width, segment)


def _picked(how: words.Pick, machine: Machine) -> np.ndarray:
    """Columns of the bytes that a pick gives."""
    loaded = np.concatenate([np.arange(c, c + how.size) for c in how.columns])
    size = len(how.order)
    source = np.tile(loaded, size // loaded.size) if loaded.size < size else loaded
    if how.spread:
        source = source.reshape(-1, 4)[list(how.spread)].reshape(-1)
    if machine.byte_permute and size == 64:
        return source[list(how.order)]
    return source[np.asarray(how.order) + np.arange(size) // 16 * 16]


def test_refusals_say_why():
    machine = find_target("host", "x86-64-v3").machine
    assert depthwise_int8.refusal(machine, (1, 8, 4, 4), (8, 1, 3, 3), 8) is None
    assert "groups" in depthwise_int8.refusal(machine, (1, 8, 4, 4), (8, 4, 3, 3), 2)
    assert "16 bytes" in depthwise_int8.refusal(machine, (1, 8, 40, 40), (8, 1, 3, 3), 8, strides=(7, 7))
