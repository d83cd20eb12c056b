"""Every tile of dense products compiled for devices: no local memory, and a block fits a multiprocessor."""

from __future__ import annotations

import pytest
from dense_layers import ELEMENTS, ragged
from device_layers import ARCHS, GPU, check_resources

from sparsec.kernels.cuda import gemm


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_every_tile_fits_a_multiprocessor(element, arch):
    tiles = gemm.tiles_of(element)
    for name, (registers, _, shared) in check_resources([ragged(element, tile) for tile in tiles], arch).items():
        tile = next(tile for tile in tiles if f"_{tile}_" in name)
        assert shared + tile.dynamic <= tile.shared
        assert registers * tile.threads <= GPU.registers
