"""The schedule rule: what it may fuse, split and vectorize, and what it must not."""

from __future__ import annotations

import numpy as np
import pytest
from harness import run_kernel
from tvm import te
from tvm.script import tirx as T

from sparsec.lowering.nests import split_nests

LANES = 8


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def run(func, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The parameters of `func` after its nests ran in order."""
    nests, temporaries = split_nests(func, LANES)
    memory = {f"p{i}": array for i, array in enumerate(arrays)}
    memory.update({name: np.full(shape, np.nan, dtype) for name, (shape, dtype) in temporaries.items()})
    for nest in nests:
        results = run_kernel(nest.func, [memory[name] for name in nest.buffers], nest.tiles)
        memory.update(zip(nest.buffers, results, strict=True))
    return [memory[f"p{i}"] for i in range(len(arrays))]


@pytest.mark.parametrize("n", [1, 3, 7, 8, 9, 23, 1024, 2049, 5000])
def test_every_length_is_covered(n: int) -> None:
    x = te.placeholder((n,), "float32", "x")
    func = te.create_prim_func([x, te.compute((n,), lambda i: x[i] + 1, "y")])
    values = floats(n)
    _, y = run(func, [values, np.full(n, np.nan, np.float32)])
    np.testing.assert_array_equal(y, values + np.float32(1))


@T.prim_func(s_tir=True)
def scan(x: T.Buffer((40,), "float32"), y: T.Buffer((41,), "float32")):
    y[0] = T.float32(0)
    for i in range(40):
        y[i + 1] = y[i] + x[i]


def test_a_loop_carried_sum_stays_one_tile_and_scalar() -> None:
    nests, _ = split_nests(scan, LANES)
    assert all(nest.tiles == 1 for nest in nests)
    x = floats(40)
    y = run(scan, [x, np.full(41, np.nan, np.float32)])[1]
    np.testing.assert_allclose(y[1:], np.cumsum(x, dtype=np.float64), atol=40 * 40 * np.finfo(np.float32).eps)


@T.prim_func(s_tir=True)
def stencil(x: T.Buffer((99, 200), "float32"), y: T.Buffer((98, 200), "float32")):
    t = T.alloc_buffer((99, 200), "float32")
    for i, j in T.grid(99, 200):
        t[i, j] = x[i, j] * T.float32(2)
    for i, j in T.grid(98, 200):
        y[i, j] = t[i, j] + t[i + 1, j]


def test_rows_that_need_their_neighbour_are_not_fused() -> None:
    nests, temporaries = split_nests(stencil, LANES)
    assert len(nests) == 2
    assert list(temporaries.values()) == [((99, 200), "float32")]
    x = floats(99, 200)
    y = run(stencil, [x, np.full((98, 200), np.nan, np.float32)])[1]
    np.testing.assert_array_equal(y, x[:-1] * np.float32(2) + x[1:] * np.float32(2))


@T.prim_func(s_tir=True)
def normalize(x: T.Buffer((99, 200), "float32"), y: T.Buffer((99, 200), "float32")):
    total = T.alloc_buffer((99,), "float32")
    for i in range(99):
        total[i] = T.float32(0)
        for j in range(200):
            total[i] = total[i] + x[i, j]
    for i, j in T.grid(99, 200):
        y[i, j] = x[i, j] - total[i]


def test_row_wise_functions_become_one_kernel_without_memory_between() -> None:
    nests, temporaries = split_nests(normalize, LANES)
    assert [nest.tiles for nest in nests] == [99]
    assert not temporaries
    assert "vectorized" in nests[0].func.script()
    x = floats(99, 200)
    y = run(normalize, [x, np.full((99, 200), np.nan, np.float32)])[1]
    exact = x - x.sum(axis=1, keepdims=True, dtype=np.float64)
    np.testing.assert_allclose(y, exact, atol=200 * np.finfo(np.float32).eps * np.abs(x).sum(axis=1).max())


def test_too_many_buffers_are_refused() -> None:
    xs = [te.placeholder((9,), "float32", f"x{i}") for i in range(8)]
    total = te.compute((9,), lambda i: sum((x[i] for x in xs[1:]), xs[0][i]), "y")
    with pytest.raises(ValueError, match="9 buffers"):
        split_nests(te.create_prim_func([*xs, total]), LANES)
