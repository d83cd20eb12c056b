"""Convolutions on every tile compiled for devices: no local memory, and a block fits a multiprocessor."""

from __future__ import annotations

import pytest
from dense_layers import ELEMENTS, direct, gathered
from device_layers import ARCHS, GPU, check_resources

from sparsec.kernels.cuda import conv, gemm


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_every_tile_fits_a_multiprocessor(element, arch):
    for name, (registers, _, shared) in check_resources([*gathered(element), direct(element)[0]], arch).items():
        known = gemm.tiles_of(element) if "_1x1" in name or element == "float32" else conv.GATHER_TILES
        tile = next(tile for tile in known if f"_{tile}_" in name)
        assert shared + tile.dynamic <= tile.shared
        assert registers * tile.threads <= GPU.registers
