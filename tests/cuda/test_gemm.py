"""Matrix products on CUDA devices against float64, emulated: every tile, ragged sizes, split sums, epilogues, two activations."""

from __future__ import annotations

import numpy as np
import pytest
from device_layers import ARCHS, GPU, ORIN, DeviceLayer, check_device_layers, check_resources, round_to

from sparsec.kernels.cuda import gemm
from sparsec.kernels.epilogue import NONE, RELU, Activation

EPS = {"float32": 2.0**-23, "float16": 2.0**-10}  # of what is stored; sums are float32 always
ELEMENTS = ("float32", "float16")


def on(element):
    return GPU.half() if element == "float16" else GPU


def close(element, terms, size, values):
    """A sum of `terms` products of magnitude `size` in float32, then rounded to the element."""
    return (terms + 8) * EPS["float32"] * (size + 8) + EPS[element] * (np.abs(values) + 2.0**-14)


def constant(element, m, k, n, plan=None, *, activation=NONE, residual="none", with_bias=True):
    rng = np.random.default_rng([m, k, n])
    x, w, other = round_to(element, *(rng.standard_normal(s) for s in ((m, k), (n, k), (m, n))))
    bias = rng.standard_normal(n).astype("f") if with_bias else None
    gpu = on(element)
    calls = gemm.bind(gpu, m=m, w=w.astype("f"), bias=bias, activation=activation, residual=residual, plan=plan)
    expected = gemm.reference(x, w, bias, activation, residual, other)
    tolerance = close(element, k, gemm.reference(np.abs(x), np.abs(w)), expected)
    given = {"x": x, "residual": other} if residual != "none" else {"x": x}
    rooms = {"parts": (calls[1].func.params[0].shape[0].value, "float32")} if len(calls) > 1 else {}
    return DeviceLayer(calls, expected, tolerance, given, rooms)


def dynamic(element, batch, m, k, n, plan=None, *, transposed=False, a_shared=False, b_shared=False, **options):
    rng = np.random.default_rng([batch, m, k, n])
    a = rng.standard_normal((1 if a_shared else batch, m, k))
    b = rng.standard_normal((1 if b_shared else batch, *((n, k) if transposed else (k, n))))
    a, b = round_to(element, a, b)
    call = gemm.bind_matmul(
        on(element), batch=batch, m=m, k=k, n=n, transposed=transposed, a_shared=a_shared, b_shared=b_shared, plan=plan,
        **options,
    )  # fmt: skip
    product = gemm.reference_matmul(a, b, transposed) * options.get("scale", 1.0)
    expected = np.maximum(product, 0) if options.get("activation") == RELU else product
    tolerance = close(element, k, gemm.reference_matmul(np.abs(a), np.abs(b), transposed), expected)
    return DeviceLayer((call,), expected, np.broadcast_to(tolerance, expected.shape), {"a": a, "b": b})


def ragged(element, tile):
    return constant(element, tile.rows + 3, 2 * tile.depth + 5, tile.columns + 9, gemm.Plan(tile), residual="before")


def every_tile(element):
    """Each tile on ragged sizes, some on whole tiles, weights and activations as right sides."""
    tiles = gemm.tiles_of(element)
    layers = [ragged(element, tile) for tile in tiles]
    for tile in (tiles[0], tiles[-2]):
        plan = gemm.Plan(tile)
        layers.append(constant(element, tile.rows, 3 * tile.depth, tile.columns, plan, with_bias=False))
        layers.append(dynamic(element, 1, 19, tile.depth + 3, tile.columns - 3, plan))
        layers.append(dynamic(element, 2, tile.rows, 6 * tile.depth, 11, plan, transposed=True))
    return layers


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_tile(element):
    check_device_layers(every_tile(element), element)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_every_tile_fits_a_multiprocessor(element, arch):
    layers = [ragged(element, tile) for tile in gemm.tiles_of(element)]
    for name, (registers, _, shared) in check_resources(layers, arch).items():
        tile = next(t for t in gemm.tiles_of(element) if f"_{t}_" in name)
        assert shared <= tile.shared
        assert registers * tile.threads <= GPU.registers


@pytest.mark.parametrize("element", ELEMENTS)
def test_small_and_ragged_sizes(element):
    sizes = [(1, 1, 1), (3, 5, 7), (17, 40, 33), (5, 130, 70), (130, 16, 8)]
    check_device_layers([constant(element, *size, activation=RELU) for size in sizes], element)


@pytest.mark.parametrize("element", ELEMENTS)
def test_epilogues_and_parts(element):
    silu, tile = Activation("silu"), gemm.tiles_of(element)[-2]
    layers = [
        constant(element, 18, 40, 24, gemm.Plan(tile, splits), residual=residual, activation=activation)
        for splits in (1, 3)
        for residual, activation in (("before", silu), ("after", silu), ("before", RELU), ("none", NONE))
    ]
    check_device_layers(layers, element)


@pytest.mark.parametrize("element", ELEMENTS)
def test_two_activations(element):
    sizes = [(1, 1, 1, 1), (3, 5, 7, 9), (2, 19, 16, 40)]
    layers = [dynamic(element, *size, transposed=transposed) for size in sizes for transposed in (False, True)]
    layers += [dynamic(element, 3, 6, 8, 20, a_shared=True), dynamic(element, 3, 6, 8, 20, b_shared=True)]
    layers.append(dynamic(element, 2, 6, 8, 20, transposed=True, b_shared=True, scale=0.125, activation=RELU))
    check_device_layers(layers, element)


@pytest.mark.parametrize("element", ELEMENTS)
def test_weights_come_back(element):
    w = round_to(element, np.random.default_rng(0).standard_normal((37, 21)))[0].astype("f")
    for tile in gemm.tiles_of(element):
        for splits in (1, 3):
            plan = gemm.Plan(tile, splits)
            np.testing.assert_array_equal(gemm.unpack(gemm.pack(on(element), w, plan), 37, 21, plan).astype("f"), w)


def test_choice_follows_the_work():
    half = GPU.half()
    assert gemm.plans(half, 4096, 4096, 4096)[0][1] in [gemm.Plan(tile) for tile in gemm.TENSOR_TILES[:2]]
    few = gemm.plans(half, 64, 8192, 256)[0][1]
    assert few.splits > 1 and few.tile.rows <= 64
    assert gemm.predict_us(half, 1024, 1024, 1024) < gemm.predict_us(GPU, 1024, 1024, 1024)
    assert gemm.predict_us(GPU, 512, 512, 512) < gemm.predict_us(ORIN, 512, 512, 512)
