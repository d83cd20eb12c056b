"""Every tile of dense products and convolutions compiled for devices: no local memory, and a block fits a multiprocessor."""

from __future__ import annotations

import pytest
from dense_layers import ELEMENTS, direct, gathered, ragged
from device_layers import ARCHS, GPU, check_resources

from sparsec.kernels.cuda import conv, gemm

TILES = (*gemm.TENSOR_TILES, *gemm.CORE_TILES, *conv.GATHER_TILES)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_every_tile_fits_a_multiprocessor(element, arch):
    layers = [ragged(element, tile) for tile in gemm.tiles_of(element)]
    layers += [*gathered(element), direct(element)[0]]
    for name, (registers, _, shared) in check_resources(layers, arch).items():
        tiles = [tile for tile in TILES if f"_{tile}_" in name]
        assert shared <= max(tile.shared for tile in tiles)
        assert registers * max(tile.threads for tile in tiles) <= GPU.registers
