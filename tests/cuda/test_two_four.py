"""2:4 weights on sparse tensor cores against float64, emulated: the stored form, every tile, ragged sizes, epilogues."""

from __future__ import annotations

import numpy as np
import pytest
from device_layers import ARCHS, GPU, DeviceLayer, check_device_layers, check_resources, round_to

from sparsec.kernels.cuda import conv, gemm, two_four, two_four_form
from sparsec.kernels.cuda.conv import Shape
from sparsec.kernels.epilogue import NONE, RELU6, Activation

HALF = GPU.half()


def two_of_four(rng, *shape):
    """Random values of which 0, 1 or 2 of every 4 neighbours of the last axis are kept."""
    w = rng.standard_normal(shape).astype("f")
    padded = -(-shape[-1] // 4)
    rank = np.argsort(np.argsort(rng.random((*shape[:-1], padded, 4))))
    most = rng.choice([0, 1, 2, 2, 2], (*shape[:-1], padded, 1))
    return w * (rank < most).reshape(*shape[:-1], padded * 4)[..., : shape[-1]]


def tolerance(terms, size, values):
    """Sums of products of magnitude `size` in float32, rounded once to float16."""
    return (terms + 8) * 2.0**-23 * (size + 8) + 2.0**-10 * (np.abs(values) + 2.0**-14)


def product(m, k, n, tile=None, *, activation=NONE, residual="none", with_bias=True):
    rng = np.random.default_rng([m, k, n])
    x, w, other = round_to("float16", rng.standard_normal((m, k)), two_of_four(rng, n, k), rng.standard_normal((m, n)))
    bias = rng.standard_normal(n).astype("f") if with_bias else None
    options = {"activation": activation, "residual": residual}
    call = two_four.bind_gemm(HALF, m=m, w=w.astype("f"), bias=bias, tile=tile, **options)
    expected = gemm.reference(x, w, bias, activation, residual, other)
    given = {"x": x, "residual": other} if residual != "none" else {"x": x}
    return DeviceLayer((call,), expected, tolerance(k, gemm.reference(np.abs(x), np.abs(w)), expected), given)


def convolution(shape, tile=None, *, activation=NONE, residual="none"):
    rng = np.random.default_rng([*shape.x, *shape.w])
    oc, c, kh, kw = shape.w
    weight = two_of_four(rng, oc, kh, kw, c).transpose(0, 3, 1, 2)
    out = (shape.x[0], oc, *shape.plane)
    x, w, other = round_to("float16", rng.standard_normal(shape.x), weight, rng.standard_normal(out))
    bias = rng.standard_normal(oc).astype("f")
    options = {"activation": activation, "residual": residual}
    call = two_four.bind_conv(HALF, shape, w=w.astype("f"), bias=bias, tile=tile, **options)
    expected = conv.reference(shape, x, w, bias, activation, residual, other)
    given = {"x": x, "residual": other} if residual != "none" else {"x": x}
    size = conv.reference(shape, np.abs(x), np.abs(w))
    return DeviceLayer((call,), expected, tolerance(kh * kw * c, size, expected), given)


def shape_of(n, c, h, w, oc, k, stride=1):
    return Shape((n, c, h, w), (oc, c, k, k), (stride, stride), (k // 2,) * 4)


def every_tile():
    layers = [product(tile.columns - 3, 70, tile.rows - 9, tile, activation=RELU6) for tile in two_four.TILES]
    layers += [convolution(shape_of(1, 72, 4, 8, tile.rows - 7, 1), tile) for tile in two_four.TILES[1:]]
    layers += [
        convolution(shape_of(1, 12, 5, 7, tile.rows - 5, 3), tile, activation=RELU6) for tile in two_four.GATHER_TILES
    ]
    return layers


def test_every_tile():
    check_device_layers(every_tile(), "float16")


@pytest.mark.parametrize("arch", ARCHS)
def test_every_tile_fits_a_multiprocessor(arch):
    tiles = {str(tile): tile for tile in (*two_four.GATHER_TILES, *two_four.TILES)}
    for name, (registers, _, shared) in check_resources(every_tile(), arch).items():
        tile = next(tile for text, tile in tiles.items() if f"_{text}_" in name)
        assert shared <= tile.shared
        assert registers * tile.threads <= GPU.registers


def test_sizes_and_epilogues():
    silu, small = Activation("silu"), two_four.TILES[-2]
    check_device_layers([
        product(1, 4, 1), product(3, 5, 7, with_bias=False), product(17, 200, 40), product(9, 128, 64, small),
        product(18, 40, 24, residual="before", activation=silu), product(18, 40, 24, residual="after", activation=RELU6),
        convolution(shape_of(2, 20, 4, 6, 24, 1), residual="before", activation=silu),
        convolution(shape_of(3, 3, 9, 7, 16, 3, 2), residual="after", activation=RELU6),
        convolution(shape_of(1, 6, 5, 5, 8, 1)),
    ], "float16")  # fmt: skip


def test_the_stored_form_holds_the_weight():
    rng = np.random.default_rng(0)
    w = two_of_four(rng, 48, 192).astype(np.float16)
    assert two_four_form.fits(w)
    values, metadata = two_four_form.pack(w)
    np.testing.assert_array_equal(two_four_form.unpack(values, metadata), w)
    assert values.size == 48 * (192 // 2 + 16)
    order = two_four.deal(128, 64)
    assert sorted(order) == list(range(128))
    assert order[:3].tolist() == [0, 8, 16] and order[8] == 1


def test_weights_that_are_not_are_refused():
    w = np.zeros((4, 8), np.float32)
    w[1, 4:7] = 1
    assert "more than 2 of 4" in two_four.refusal(w)
    with pytest.raises(ValueError, match="more than 2 of 4"):
        two_four.bind_gemm(HALF, m=1, w=w)
    assert two_four.refusal(np.float32(w != 0)[:, :, None, None], shape_of(1, 8, 3, 3, 4, 1)) is not None
    w[1, 4] = 0
    assert two_four.refusal(w) is None


def test_it_is_predicted_to_pay():
    assert 1.25 * two_four.gemm_tiles(HALF, 4096, 4096, 4096)[0][0] < gemm.predict_us(HALF, 4096, 4096, 4096)
