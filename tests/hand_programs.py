"""Small programs assembled by hand, for tests of building and of the C runtime: no lowering involved."""

from __future__ import annotations

import dataclasses

import numpy as np
from tvm.script import tirx as T

from sparsec.program import Arg, Buffer, Constant, Kernel, Program, Step, Tensor
from sparsec.targets import Target, find_target

ROWS, COLUMNS = 37, 64
_BYTES = ROWS * COLUMNS * 4
_PITCH = _BYTES + 256  # a buffer and its slack; a multiple of 64


@T.prim_func(s_tir=True)
def _relu(x: T.Buffer((2368,), "float32"), y: T.Buffer((2368,), "float32"), begin: T.int32, end: T.int32):
    for t in T.serial(begin, end):
        for i in T.vectorized(64):
            y[t * 64 + i] = T.max(x[t * 64 + i], T.float32(0))


@T.prim_func(s_tir=True)
def _add_row(
    x: T.Buffer((2368,), "float32"), row: T.Buffer((64,), "float32"), y: T.Buffer((2368,), "float32"), begin: T.int32,
    end: T.int32,
):  # fmt: skip
    for t in T.serial(begin, end):
        for i in T.vectorized(64):
            y[t * 64 + i] = x[t * 64 + i] + row[i]


@T.prim_func(s_tir=True)
def _reverse_rows(
    x: T.Buffer((2368,), "float32"), y: T.Buffer((2368,), "float32"), scratch: T.Buffer((64,), "float32"),
    begin: T.int32, end: T.int32,
):  # fmt: skip
    for t in T.serial(begin, end):
        for i in T.serial(64):
            scratch[i] = x[t * 64 + i] * T.float32(2)
        for i in T.serial(64):
            y[t * 64 + i] = scratch[63 - i]


@T.prim_func(s_tir=True)
def _power(x: T.Buffer((2368,), "float32"), y: T.Buffer((2368,), "float32"), begin: T.int32, end: T.int32):
    for t in T.serial(begin, end):
        for i in T.serial(64):
            y[t * 64 + i] = T.pow(T.float32(1.5), x[t * 64 + i]) + T.erf(x[t * 64 + i])


def program(target: Target | None = None, seed: int = 0, features: tuple[str, ...] = (), name: str = "hand") -> Program:
    """x -> 2 * reversed(relu(x) + row) -> y, and the row itself -> row; `seed` chooses the row."""
    target = target or find_target("host")
    target = dataclasses.replace(target, features=(*target.features, *features))
    row = np.random.default_rng(seed).standard_normal(COLUMNS).astype(np.float32)
    a, b, c = (Arg("arena", i * _PITCH) for i in range(3))
    weights, scratch = Arg("weights", 64), Arg("scratch", 0)
    return Program(
        name=name,
        target=target,
        kernels=(Kernel("relu", _relu), Kernel("add_row", _add_row), Kernel("reverse_rows", _reverse_rows)),
        steps=(
            Step("relu", (a, b), ROWS, ("Relu_0",)),
            Step("add_row", (b, weights, c), ROWS, ("Add_1",)),
            Step("reverse_rows", (c, a, scratch), ROWS, ("Flip_2",)),
        ),
        buffers=tuple(
            Buffer(name, (ROWS, COLUMNS), "float32", i * _PITCH, _BYTES, 0, 2) for i, name in enumerate(("x", "r", "s"))
        ),
        constants=(Constant("row", row, 64),),
        inputs=(Tensor("x", (ROWS, COLUMNS), "float32", a),),
        outputs=(Tensor("y", (ROWS, COLUMNS), "float32", a), Tensor("row", (COLUMNS,), "float32", weights)),
        arena_bytes=3 * _PITCH,
        scratch_bytes=COLUMNS * 4,
        weights_bytes=64 + COLUMNS * 4,
        layers=(),
    )


def reference(made: Program, x: np.ndarray) -> list[np.ndarray]:
    """What `program` computes, by NumPy."""
    row = made.constants[0].data
    return [(2 * (np.maximum(x, 0) + row))[:, ::-1].copy(), row]


def math_program(target: Target | None = None) -> Program:
    """x -> 1.5^x + erf(x): calls the C library's mathematics."""
    made = program(target, name="math")
    x, y = made.inputs[0], Tensor("y", (ROWS, COLUMNS), "float32", Arg("arena", _PITCH))
    step = Step("power", (x.location, y.location), ROWS, ("Pow_0",))
    return dataclasses.replace(made, kernels=(Kernel("power", _power),), steps=(step,), outputs=(y,), constants=())


def sample(seed: int = 1) -> np.ndarray:
    """An input of `program`."""
    return np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32)
