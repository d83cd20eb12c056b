"""Normalizations along the last axis on CUDA devices: softmax, layer normalization and root mean square normalization.

    softmax     y[r, i] = exp(x[r, i] - max x[r]) / sum over j of exp(x[r, j] - max x[r])
    layernorm   y[r, i] = (x[r, i] - mean x[r]) / sqrt(var x[r] + epsilon) * gamma[i] + beta[i]
    rmsnorm     y[r, i] = x[r, i] / sqrt(mean of x[r]^2 + epsilon) * gamma[i]

A warp has a row, or a block where rows are long; a lane keeps its elements, every 32nd or so, in registers, so that x is
read once. What a row shares is combined by shuffles, and by shared memory between warps, in a fixed order. Rows too long
for registers are read once more for each pass. Arithmetic is float32. Variance is taken from the differences to the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit as tir
from sparsec.kernels.base import Format, unique
from sparsec.kernels.cuda import emit
from sparsec.kernels.cuda.base import DeviceCall, Gpu, roofline_us
from sparsec.kernels.epilogue import exp
from sparsec.kernels.normalize import reference_layernorm, reference_softmax
from sparsec.program import Launch

__all__ = [
    "TABLE",
    "bind_norm",
    "bind_softmax",
    "predict_us",
    "reference_layernorm",
    "reference_rmsnorm",
    "reference_softmax",
]

TABLE: tuple[Format, ...] = (
    Format("cuda_softmax_f32", "Softmax", "dense", "float32", "softmax over the last axis", "the axis is the last"),
    Format("cuda_layernorm_f32", "LayerNormalization", "dense", "float32", "layer normalization over the last axis",
           "the axis is the last"),
    Format("cuda_rmsnorm_f32", "RMSNormalization", "dense", "float32", "root mean square normalization over the last axis",
           "the axis is the last"),
)  # fmt: skip

ROWS = 4  # of a block, where a warp has a row
WARP_ROW = 512  # elements of a row, at most, that a warp takes
KEPT = 32  # elements that a thread keeps in registers
BLOCKS = (128, 256, 512, 1024)  # threads of a row


def reference_rmsnorm(x: np.ndarray, gamma: np.ndarray, epsilon: float) -> np.ndarray:
    """Root mean square normalization over the last axis in float64."""
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * gamma


def predict_us(gpu: Gpu, rows: int, count: int) -> float:
    """Time by memory."""
    passes = 1 if count <= KEPT * BLOCKS[-1] else 3
    return roofline_us(gpu, 0.0, gpu.item * (passes + 1.0) * rows * count)


class _Row:
    """One thread's part of a row of `count` elements that `lanes` threads share: what every pass over it uses."""

    def __init__(self, x: Any, base: Any, count: int, lanes: int, lane: Any, warp: Any) -> None:
        self.x, self.base, self.count, self.lanes, self.lane, self.warp = x, base, count, lanes, lane, warp
        self.rounds = -(-count // lanes)
        self.kept = emit.local(self.rounds) if self.rounds <= KEPT else None

    def _guarded(self, index: Any, round_: Any, then: Callable[[], None]) -> None:
        if isinstance(round_, int) and (round_ + 1) * self.lanes <= self.count:
            then()
        else:
            with T.If(index < self.count), T.Then():
                then()

    def each(self, one: Callable[[Any, Any, Any], None]) -> None:
        """`one(slot, index, value)` for this thread's elements: in which slot it is kept, if it is, and where in the row."""
        if self.kept is None:
            with T.serial(0, self.rounds) as i:
                index = T.bind(i * self.lanes + self.lane)
                self._guarded(index, i, lambda: one(i, index, tir.convert(self.x[self.base + index], "float32")))
            return
        for i in range(self.rounds):
            index = i * self.lanes + self.lane
            self._guarded(index, i, lambda i=i, index=index: one(i, index, self.kept[i]))

    def load(self) -> None:
        """Fill what is kept."""
        for i in range(self.rounds if self.kept is not None else 0):
            index = i * self.lanes + self.lane
            value = tir.convert(self.x[self.base + index], "float32")
            self._guarded(index, i, lambda i=i, value=value: T.buffer_store(self.kept, value, [i]))

    def reduce(self, what: Literal["sum", "max"], term: Callable[[Any], Any]) -> Any:
        """The sum or maximum of term(value) over the row, in all its threads."""
        total = emit.local(1)
        T.buffer_store(total, T.float32(0 if what == "sum" else float("-inf")), [0])

        def combine(a: Any, b: Any) -> Any:
            return a + b if what == "sum" else T.max(a, b)

        self.each(lambda _slot, _index, value: T.buffer_store(total, combine(total[0], term(value)), [0]))
        emit.call(f"sparsec_warp_{what}", emit.address(total, 0))
        if self.lanes > emit.WARP:
            warps = self.lanes // emit.WARP
            parts = emit.shared(warps)
            with T.If(self.lane % emit.WARP == 0), T.Then():
                T.buffer_store(parts, total[0], [self.warp])
            emit.barrier()
            T.buffer_store(total, parts[0], [0])
            for w in range(1, warps):
                T.buffer_store(total, combine(total[0], parts[w]), [0])
        return total[0]


def _bind(
    gpu: Gpu, name: str, rows: int, count: int, constants: dict[str, np.ndarray], facts: tuple[Any, ...], text: str,
    one: Callable[[_Row, Any, dict[str, Any]], None],
) -> DeviceCall:  # fmt: skip
    """A call of one kernel a row: `one(row, y, constants by role)` emits it."""
    by_warp = count <= WARP_ROW
    lanes = emit.WARP if by_warp else next((b for b in BLOCKS if count <= b * KEPT // 4), BLOCKS[-1])
    threads = ROWS * emit.WARP if by_warp else lanes
    grid = -(-rows // ROWS) if by_warp else rows

    def body(*arguments: Any) -> None:
        x, y, *held, (block,), (thread,) = arguments
        r = T.bind(block * ROWS + thread // emit.WARP) if by_warp else block
        lane = T.bind(thread % emit.WARP) if by_warp else thread
        row = _Row(x, T.bind(r * count), count, lanes, lane, 0 if by_warp else T.bind(thread // emit.WARP))
        named = dict(zip(constants, held, strict=True))
        if by_warp and rows % ROWS:
            with T.If(r < rows), T.Then():
                row.load()
                one(row, y, named)
        else:
            row.load()
            one(row, y, named)

    size = rows * count
    arguments = [("x", size, gpu.element), ("y", size, gpu.element)]
    arguments += [(role, array.size, "float32") for role, array in constants.items()]
    func = emit.function(arguments, grid, threads, body)
    roles = tuple(argument[0] for argument in arguments)
    launch = Launch((grid, 1, 1), (threads, 1, 1))
    return DeviceCall(
        unique(gpu.named(name), rows, count, *facts, gpu.element), func, roles, constants, launch, {}, text
    )


def bind_softmax(gpu: Gpu, *, rows: int, count: int) -> DeviceCall:
    """The call for softmax of x [rows, count]. Roles (x, y)."""

    def one(row: _Row, y: Any, _: dict[str, Any]) -> None:
        top = row.reduce("max", lambda value: value)
        if row.kept is not None:

            def power(slot: Any, _: Any, value: Any) -> None:
                T.buffer_store(row.kept, exp(value - top), [slot])

            row.each(power)
            total = row.reduce("sum", lambda value: value)
        else:
            total = row.reduce("sum", lambda value: exp(value - top))
        scale = emit.local(1)
        T.buffer_store(scale, T.float32(1) / total, [0])

        def store(_: Any, index: Any, value: Any) -> None:
            power = value if row.kept is not None else exp(value - top)
            T.buffer_store(y, tir.convert(power * scale[0], gpu.element), [row.base + index])

        row.each(store)

    text = f"softmax of {rows} rows of {count}"
    return _bind(gpu, "cuda_softmax_f32", rows, count, {}, (), text, one)


def bind_norm(
    gpu: Gpu, kind: Literal["layer", "rms"], *, rows: int, gamma: np.ndarray, beta: np.ndarray | None = None,
    epsilon: float,
) -> DeviceCall:  # fmt: skip
    """The call for a normalization of x [rows, len(gamma)]. Roles (x, y, gamma[, beta])."""
    count = gamma.size
    constants = {"gamma": np.ascontiguousarray(gamma, np.float32)}
    if beta is not None:
        constants["beta"] = np.ascontiguousarray(beta, np.float32)

    def one(row: _Row, y: Any, held: dict[str, Any]) -> None:
        mean, inverse = emit.local(1), emit.local(1)
        T.buffer_store(mean, T.float32(0), [0])
        if kind == "layer":
            T.buffer_store(mean, row.reduce("sum", lambda value: value) * T.float32(1.0 / count), [0])

        def centred(value: Any) -> Any:
            return value - mean[0] if kind == "layer" else value

        squares = row.reduce("sum", lambda value: centred(value) * centred(value))
        T.buffer_store(inverse, T.float32(1) / T.sqrt(squares * T.float32(1.0 / count) + T.float32(epsilon)), [0])

        def store(_: Any, index: Any, value: Any) -> None:
            scaled = centred(value) * inverse[0] * held["gamma"][index]
            scaled = scaled + held["beta"][index] if "beta" in held else scaled
            T.buffer_store(y, tir.convert(scaled, gpu.element), [row.base + index])

        row.each(store)

    text = f"{kind} normalization of {rows} rows of {count}"
    facts = (kind, epsilon, beta is None)
    return _bind(gpu, f"cuda_{kind}norm_f32", rows, count, constants, facts, text, one)
