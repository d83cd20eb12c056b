"""Structure detection: names the block that made the zeros, counts what a kernel stores."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.lowering.structure import BLOCKS, detect_structure


def block_sparse(oc: int, ic: int, k: int, rows: int, columns: int, sparsity: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    grid = rng.random((-(-oc // rows), -(-ic // columns), k, k)) >= sparsity
    mask = np.repeat(np.repeat(grid, rows, 0), columns, 1)[:oc, :ic]
    return (rng.uniform(0.5, 1.0, (oc, ic, k, k)) * mask).astype(np.float32)


def stored(weight: np.ndarray, rows: int, columns: int) -> float:
    """The definition, block by block."""
    oc, ic, kh, kw = weight.shape
    kept = 0
    for o in range(0, oc, rows):
        for i in range(0, ic, columns):
            for h in range(kh):
                for w in range(kw):
                    kept += bool(np.any(weight[o : o + rows, i : i + columns, h, w]))
    return kept * rows * columns / weight.size


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{b[0]}x{b[1]}")
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8, 0.9])
@pytest.mark.parametrize("k", [1, 3])
def test_names_the_block(block: tuple[int, int], sparsity: float, k: int) -> None:
    found = detect_structure(block_sparse(64, 64, k, *block, sparsity))
    assert found.name == f"{block[0]}x{block[1]}"
    assert found.block == block
    assert abs(found.zeros - sparsity) < 0.1


def test_ragged_last_block() -> None:
    found = detect_structure(block_sparse(30, 33, 1, 4, 4, 0.5))
    assert found.name == "4x4"


def test_stray_zeros_do_not_hide_blocks() -> None:
    weight = block_sparse(64, 64, 1, 4, 1, 0.3)
    weight[np.random.default_rng(1).random(weight.shape) < 0.016] = 0
    assert detect_structure(weight).name == "4x1"


def test_few_zeros_are_dense() -> None:
    weight = np.ones((64, 64, 1, 1), np.float32)
    assert (detect_structure(weight).name, str(detect_structure(weight))) == ("dense", "dense")
    weight[np.random.default_rng(0).random(weight.shape) < 0.016] = 0
    found = detect_structure(weight)
    assert found.name == "dense"
    assert found.block is None
    assert "zero" in str(found)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (1, 2)])
def test_n_of_m(n: int, m: int) -> None:
    rng = np.random.default_rng(3)
    scores = rng.random((32, 64 // m, m))
    mask = np.argsort(np.argsort(scores, axis=2), axis=2) < n
    weight = (rng.uniform(0.5, 1, (32, 64)) * mask.reshape(32, 64)).astype(np.float32)
    found = detect_structure(weight)
    assert found.nm == (n, m)
    assert found.name == f"{n}:{m}"
    assert found.block == (1, 1)


def test_all_zero_and_empty() -> None:
    assert detect_structure(np.zeros((8, 8), np.float32)).blocks[4, 1] == 0
    assert detect_structure(np.zeros((0, 8), np.float32)).name == "dense"
    with pytest.raises(ValueError, match="shape"):
        detect_structure(np.zeros(4, np.float32))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 19), st.integers(1, 9), st.sampled_from([1, 3]), st.floats(0, 1), st.integers(0, 100))
def test_density_is_its_definition(oc: int, ic: int, k: int, sparsity: float, seed: int) -> None:
    weight = block_sparse(oc, ic, k, 1, 1, sparsity, seed)
    found = detect_structure(weight)
    for (rows, columns), density in found.blocks.items():
        assert density == pytest.approx(stored(weight, rows, columns))
    assert found.nonzeros == np.count_nonzero(weight)


def test_fast_on_large_weights() -> None:
    weight = block_sparse(512, 512, 3, 4, 1, 0.8)
    start = time.perf_counter()
    detect_structure(weight)
    assert time.perf_counter() - start < 1.0


def test_a_ragged_last_group_keeps_n_of_m() -> None:
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((16, 30, 1, 1)).astype(np.float32)
    for row in range(16):
        for start in range(0, 30, 4):
            weight[row, start : start + 4] = 1
            weight[row, start + rng.permutation(min(4, 30 - start))[:2]] = 0
    assert detect_structure(weight).name == "2:4"
    weight[0, 28:] = 1
    assert detect_structure(weight).name == "2:4"
    weight[0, :4] = 1
    assert detect_structure(weight).name == "1x1"


@pytest.mark.parametrize(("rows", "columns"), [(12, 0), (0, 9), (12, 9)])
def test_whole_channels_are_named(rows: int, columns: int) -> None:
    rng = np.random.default_rng(3)
    weight = rng.uniform(0.5, 1, (48, 40, 3, 3)).astype(np.float32)
    weight[rng.permutation(48)[:rows]] = 0
    weight[:, rng.permutation(40)[:columns]] = 0
    found = detect_structure(weight)
    assert found.channels == (rows, columns)
    assert str(found).startswith("whole channels (")
    for count, text in ((rows, f"{rows} of 48 output"), (columns, f"{columns} of 40 input")):
        assert (text in str(found)) == bool(count)
    assert found.block is not None  # kernels still see blocks


def test_zeros_elsewhere_are_not_called_channels() -> None:
    weight = block_sparse(48, 40, 3, 4, 1, 0.5)
    weight[:2] = 0
    assert detect_structure(weight).channels[0] >= 2
    assert str(detect_structure(weight)).startswith("4x1 blocks")
