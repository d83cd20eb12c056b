"""Matrix products on CUDA devices against float64, emulated: every tile, ragged sizes, split sums, epilogues, two activations."""

from __future__ import annotations

import numpy as np
import pytest
from dense_layers import ELEMENTS, close, on, product, ragged
from device_layers import GPU, ORIN, DeviceLayer, check_device_layers, round_to

from sparsec.kernels.cuda import gemm
from sparsec.kernels.epilogue import NONE, RELU, Activation


def dynamic(element, batch, m, k, n, plan=None, *, transposed=False, a_shared=False, b_shared=False, **options):
    rng = np.random.default_rng([batch, m, k, n])
    a = rng.standard_normal((1 if a_shared else batch, m, k))
    b = rng.standard_normal((1 if b_shared else batch, *((n, k) if transposed else (k, n))))
    a, b = round_to(element, a, b)
    call = gemm.bind_matmul(
        on(element), batch=batch, m=m, k=k, n=n, transposed=transposed, a_shared=a_shared, b_shared=b_shared, plan=plan,
        **options,
    )  # fmt: skip
    exact = gemm.reference_matmul(a, b, transposed) * options.get("scale", 1.0)
    expected = np.maximum(exact, 0) if options.get("activation") == RELU else exact
    tolerance = close(element, k, gemm.reference_matmul(np.abs(a), np.abs(b), transposed), expected)
    return DeviceLayer((call,), expected, np.broadcast_to(tolerance, expected.shape), {"a": a, "b": b})


def every_tile(element):
    """Each tile on ragged sizes, some on whole tiles, weights and activations as right sides."""
    tiles = gemm.tiles_of(element)
    layers = [ragged(element, tile) for tile in tiles]
    for tile in (tiles[0], tiles[-2]):
        plan = gemm.Plan(tile)
        layers.append(product(element, tile.rows, 3 * tile.depth, tile.columns, plan, with_bias=False))
        layers.append(dynamic(element, 1, 19, tile.depth + 3, tile.columns - 3, plan))
        layers.append(dynamic(element, 2, tile.rows, 6 * tile.depth, 11, plan, transposed=True))
    return layers


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_tile(element):
    check_device_layers(every_tile(element), element)


@pytest.mark.parametrize("element", ELEMENTS)
def test_small_and_ragged_sizes(element):
    sizes = [(1, 1, 1), (3, 5, 7), (17, 40, 33), (5, 130, 70), (130, 16, 8)]
    check_device_layers([product(element, *size, activation=RELU) for size in sizes], element)


@pytest.mark.parametrize("element", ELEMENTS)
def test_epilogues_and_parts(element):
    silu, tile = Activation("silu"), gemm.tiles_of(element)[-2]
    layers = [
        product(element, 18, 40, 24, gemm.Plan(tile, splits), residual=residual, activation=activation)
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
