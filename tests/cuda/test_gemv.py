"""Few rows times a constant weight on CUDA devices against float64, emulated."""

from __future__ import annotations

import numpy as np
import pytest
from device_layers import ARCHS, GPU, DeviceLayer, check_device_layers, check_resources, round_to

from sparsec.kernels.cuda import gemm, gemv
from sparsec.kernels.cuda.gemv import Plan
from sparsec.kernels.epilogue import NONE, RELU, Activation

ELEMENTS = ("float32", "float16")
EPS = {"float32": 2.0**-23, "float16": 2.0**-10}
PLANS = tuple(Plan(columns, parts) for columns in (1, 2, 4) for parts in (1, gemv.WARPS))


def on(element):
    return GPU.half() if element == "float16" else GPU


def layer(element, m, k, n, plan=None, *, activation=NONE, residual="none"):
    rng = np.random.default_rng([m, k, n])
    x, w, other = round_to(element, *(rng.standard_normal(s) for s in ((m, k), (n, k), (m, n))))
    bias = rng.standard_normal(n).astype("f")
    call = gemv.bind(on(element), m=m, w=w.astype("f"), bias=bias, activation=activation, residual=residual, plan=plan)
    expected = gemv.reference(x, w, bias, activation, residual, other)
    size = gemv.reference(np.abs(x), np.abs(w)) + 8
    tolerance = (k + 8) * EPS["float32"] * size + EPS[element] * (np.abs(expected) + 2.0**-14)
    return DeviceLayer((call,), expected, tolerance, {"x": x, "residual": other} if residual != "none" else {"x": x})


def layers(element):
    sizes = [(1, 1, 1), (1, 300, 33), (2, 1029, 18), (3, 70, 40), (8, 515, 21), (5, 4100, 9)]
    found = [layer(element, *size, plan, activation=RELU) for size, plan in zip(sizes, PLANS, strict=True)]
    found.append(layer(element, 1, 2048, 5, Plan(1, 1), residual="before", activation=Activation("silu")))
    return [*found, layer(element, 4, 96, 50, residual="after", activation=RELU)]


@pytest.mark.parametrize("element", ELEMENTS)
def test_against_float64(element):
    check_device_layers(layers(element), element)


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills(arch):
    for element in ELEMENTS:
        check_resources(
            [layer(element, m, 2100, 40, plan) for m, plan in ((1, PLANS[0]), (8, PLANS[-1]), (4, PLANS[2]))], arch
        )


@pytest.mark.parametrize("element", ELEMENTS)
def test_weights_come_back(element):
    w = round_to(element, np.random.default_rng(0).standard_normal((37, 21)))[0].astype("f")
    for plan in PLANS:
        np.testing.assert_array_equal(gemv.unpack(gemv.pack(on(element), w, plan), 37, 21).astype("f"), w)


def test_prices_follow_bytes_and_beat_tiles_for_one_row():
    half = GPU.half()
    assert gemv.predict_us(half, 1, 11008, 4096) < gemv.predict_us(GPU, 1, 11008, 4096)
    assert gemv.predict_us(half, 1, 4096, 4096) < gemm.predict_us(half, 1, 4096, 4096)
    assert gemv.plans(half, 1, 8192, 64)[0][1].parts > 1


def test_many_rows_are_refused():
    with pytest.raises(ValueError, match="at most 8 rows"):
        gemv.bind(GPU, m=9, w=np.zeros((4, 4), np.float32))
