"""Softmax and layer normalization against float64, on rows around the vector width."""

from __future__ import annotations

import numpy as np
import pytest
from harness import run_kernel

from sparsec.kernels import normalize
from sparsec.targets import find_target, missing_features

EPS = 2.0**-23
COUNTS = (1, 3, 4, 7, 8, 15, 16, 17, 31, 64, 65, 99, 200)
CPUS = ("x86-64-v2", "x86-64-v3", "x86-64-v4")


def targets():
    """The x86 CPUs that run here."""
    known = [find_target("host", cpu) for cpu in CPUS]
    return [target for target in known if not missing_features(target)]


pytestmark = pytest.mark.skipif(find_target("host").arch != "x86_64", reason="the lanes tried are x86 ones")


@pytest.mark.parametrize("count", COUNTS)
def test_softmax(count: int) -> None:
    rng = np.random.default_rng(count)
    x = (rng.standard_normal((19, count)) * 10).astype(np.float32)
    x[0] = -1e30  # equal and huge: the maximum must be taken off first
    for target in targets():
        call = normalize.bind_softmax(target.machine, rows=19, count=count)
        _, y = run_kernel(call.func, [x, np.full_like(x, np.nan)], call.tiles, target)
        # x - max is rounded once, by at most eps / 2 of the largest difference, which exp turns into a relative error.
        spread = np.abs(x - x.max(axis=-1, keepdims=True)).astype(np.float64)
        want = normalize.reference_softmax(x)
        limit = want * EPS * (8 + spread + np.sqrt(count)) + 1e-37
        assert (np.abs(y - want) <= limit).all(), target.cpu


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("shifted", [True, False])
def test_layernorm(count: int, shifted: bool) -> None:
    rng = np.random.default_rng(count)
    x = (rng.standard_normal((19, count)) * 3 + 5).astype(np.float32)
    gamma, beta = (rng.standard_normal(count).astype(np.float32) for _ in range(2))
    for target in targets():
        call = normalize.bind_layernorm(
            target.machine, rows=19, gamma=gamma, beta=beta if shifted else None, epsilon=1e-2
        )
        y = run_kernel(call.func, [x, np.full_like(x, np.nan), call.constants["scales"]], call.tiles, target)[1]
        want = normalize.reference_layernorm(x, gamma, beta if shifted else None, 1e-2)
        # Subtracting the mean leaves an absolute error of a few eps of the largest |x|; the deviation is at least 0.1.
        deviation = np.sqrt(x.astype(np.float64).var(axis=-1, keepdims=True) + 1e-2)
        scale = np.abs(x).max(axis=-1, keepdims=True) / deviation * np.abs(gamma) + np.abs(want) + 1
        assert (np.abs(y - want) <= EPS * (8 + np.sqrt(count)) * scale).all(), target.cpu


def test_rows_stay_apart() -> None:
    """Nothing is written behind the last row: the harness's slack keeps its fill."""
    target = find_target("host")
    x = np.ones((3, 5), np.float32)
    padded = np.full(15 + 16, 7, np.float32)
    call = normalize.bind_softmax(target.machine, rows=3, count=5)
    y = run_kernel(call.func, [x, padded], call.tiles, target)[1]
    assert (y[15:] == 7).all()
    assert np.allclose(y[:15], 0.2, rtol=1e-6)
