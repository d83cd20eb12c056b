"""Pooling: MaxPool and AveragePool over windows, and means over whole planes (GlobalAveragePool, spatial ReduceMean).

    max      y[c, oy, ox] = act(max over the window's elements inside the plane)
    average  y[c, oy, ox] = act(sum over the window's elements inside the plane / count[oy, ox])
    global   y[c] = act(mean of x[c, :])                      global_max: max in place of mean

count is the window's size inside the plane, or inside the padded plane with count_include_pad; it is a product of a row
count and a column count, whose reciprocals are stored: `scales[oy]`, then `scales[OH + ox]`. Planes are read in place (see
`planes`), -inf or 0 outside.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit, planes
from sparsec.kernels.base import Format, KernelCall, Machine, unique
from sparsec.kernels.epilogue import NONE, Activation, activate
from sparsec.kernels.epilogue import reference as reference_activation

Mode = Literal["max", "average"]


TABLE: tuple[Format, ...] = (
    Format("maxpool_f32", "MaxPool", "dense", "float32", "maximum over windows, on planes",
           f"2-D, at most {planes.MAX_TAPS} window positions, no Indices output"),
    Format("averagepool_f32", "AveragePool", "dense", "float32", "mean over windows, on planes",
           f"2-D, at most {planes.MAX_TAPS} window positions"),
    Format("globalpool_f32", "GlobalAveragePool, GlobalMaxPool, ReduceMean", "dense", "float32",
           "mean or maximum of each plane", "reduction over all trailing axes"),
)  # fmt: skip


def refusal(x_shape: tuple[int, ...], kernel: tuple[int, ...]) -> str | None:
    """Why windows of `kernel` on x cannot run here, or None."""
    if len(x_shape) != 4 or len(kernel) != 2:
        return f"pooling kernels are 2-D, got {len(kernel)}-D windows"
    if kernel[0] * kernel[1] > planes.MAX_TAPS:
        return f"{kernel[0]}x{kernel[1]} window: at most {planes.MAX_TAPS} positions are unrolled"
    return None


def counts(window: planes.Window, include_pad: bool) -> tuple[np.ndarray, np.ndarray]:
    """Elements that each output row's and column's windows span: int [OH], int [OW]."""
    found = []
    sizes = ((window.height, window.pads[0], window.pads[2]), (window.width, window.pads[1], window.pads[3]))
    for axis, (size, before, after) in enumerate(sizes):
        at = np.arange(window.shape[axis])[:, None] * window.strides[axis] - before
        at = at + np.arange(window.kernel[axis]) * window.dilations[axis]
        low, high = (-before, size + after) if include_pad else (0, size)
        found.append(((at >= low) & (at < high)).sum(axis=1))
    return found[0], found[1]


def reference(
    mode: Mode, x: np.ndarray, window: planes.Window, include_pad: bool = False, activation: Activation = NONE
) -> np.ndarray:
    """Pooling of x [N, C, H, W] in float64, by definition."""
    oh, ow = window.shape
    (sh, sw), (dh, dw), (top, left, _, _) = window.strides, window.dilations, window.pads
    bottom = max(0, (oh - 1) * sh + (window.kernel[0] - 1) * dh + 1 - window.height - top)
    right = max(0, (ow - 1) * sw + (window.kernel[1] - 1) * dw + 1 - window.width - left)
    fill = -np.inf if mode == "max" else 0.0
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    y = np.full((*x.shape[:2], oh, ow), fill)
    for kh in range(window.kernel[0]):
        for kw in range(window.kernel[1]):
            tap = padded[:, :, kh * dh : kh * dh + (oh - 1) * sh + 1 : sh, kw * dw : kw * dw + (ow - 1) * sw + 1 : sw]
            y = np.maximum(y, tap) if mode == "max" else y + tap
    if mode == "average":
        rows, cols = counts(window, include_pad)
        y = y / (rows[:, None] * cols[None, :])
    return reference_activation(activation, y)


def pack(window: planes.Window, include_pad: bool, surplus: int) -> np.ndarray:
    """Reciprocal counts: float32 [OH + OW + surplus]; vector loads of the last columns may read the surplus."""
    rows, cols = counts(window, include_pad)
    tail = np.zeros(surplus)
    return np.concatenate([1.0 / np.maximum(rows, 1), 1.0 / np.maximum(cols, 1), tail]).astype(np.float32)


def bind(
    machine: Machine,
    mode: Mode,
    *,
    x_shape: tuple[int, int, int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilations: tuple[int, int] = (1, 1),
    ceil_mode: bool = False,
    count_include_pad: bool = False,
    activation: Activation = NONE,
) -> KernelCall:
    """The call for one pooling layer, x [N, C, H, W], pads top, left, bottom, right.

    Roles (x, y) for `max`, (x, y, scales) for `average`. Tiles: planes, or bands of their rows.
    """
    n, channels, height, width = x_shape
    window = planes.Window(height, width, kernel, strides, pads, dilations, ceil_mode).flat()
    spare = machine.registers - window.kernel[1] - 2
    sweep = planes.plan(machine, window, n * channels, max(2, min(8, spare)), 1)
    in_plane, out_plane = height * width, window.shape[0] * window.shape[1]
    out_rows = window.shape[0]

    def step(acc: Any, tap: Any, _position: int, _lanes: int) -> Any:
        return acc + tap if mode == "average" else T.max(acc, tap)

    def body(*buffers: Any) -> None:
        x, y = buffers[:2]
        begin, end = buffers[-2:]

        def last(acc: Any, oy: Any, ox: Any, _at: Any, lanes: int) -> Any:
            if mode == "average":
                acc = acc * (emit.splat(buffers[2][oy], lanes) * emit.load(buffers[2], out_rows + ox, lanes))
            return activate(activation, acc)

        fill = 0.0 if mode == "average" else float("-inf")
        reduction = planes.Reduction(fill, lambda lanes: emit.constant(fill, lanes, machine.element), step, last)
        with T.serial(begin, end) as t:
            plane = T.bind(t // sweep.bands) if sweep.bands > 1 else t
            planes.emit_sweep(
                sweep, x, T.bind(plane * in_plane), y, T.bind(plane * out_plane), t % sweep.bands, reduction
            )

    constants = {}
    element = machine.element
    arguments = [("x", n * channels * in_plane, element), ("y", n * channels * out_plane, element)]
    if mode == "average":
        constants["scales"] = machine.array(pack(window, count_include_pad, machine.lanes))
        arguments.append(("scales", constants["scales"].size, element))
    shape = f"{kernel[0]}x{kernel[1]}s{strides[0]}{strides[1]}"
    name = unique(f"{machine.named(mode + 'pool_f32')}_{shape}", mode, x_shape, window, activation, machine)
    text = f"{mode} pooling {shape} on {channels}x{height}x{width}, {activation.name}"
    func = emit.function(arguments, body)
    roles = tuple(argument[0] for argument in arguments)
    return KernelCall(name, func, roles, constants, n * channels * sweep.bands, 0, text)


def reference_global(mode: Mode, x: np.ndarray, activation: Activation = NONE) -> np.ndarray:
    """x [rows, count] reduced over its last axis, in float64."""
    x = x.astype(np.float64)
    return reference_activation(activation, x.mean(axis=1) if mode == "average" else x.max(axis=1))


def bind_global(machine: Machine, mode: Mode, *, rows: int, count: int, activation: Activation = NONE) -> KernelCall:
    """The call for the mean or maximum of each of `rows` runs of `count` elements: x [N, C, H, W] has N * C rows.

    Roles (x, y). Tiles: 16 rows each, the last fewer.
    """
    lanes = machine.lanes
    while lanes > 1 and lanes > count:
        lanes //= 2
    chains = max(1, min(4, count // lanes))  # independent accumulators, to cover the adder's latency
    stride = lanes * chains
    per_tile = 16

    def combine(a: Any, b: Any) -> Any:
        return a + b if mode == "average" else T.max(a, b)

    def body(x: Any, y: Any, begin: Any, end: Any) -> None:
        with T.serial(begin * per_tile, T.min(end * per_tile, rows)) as row:
            base = T.bind(row * count)
            acc = emit.registers(chains, lanes)  # float32 also where x is float16
            for c in range(chains):
                T.buffer_store(acc, emit.load_float(x, base + c * lanes, lanes), [c])
            if count // stride > 1:
                with T.serial(1, count // stride) as i:
                    for c in range(chains):
                        T.buffer_store(
                            acc, combine(acc[c], emit.load_float(x, base + i * stride + c * lanes, lanes)), [c]
                        )
            done = count // stride * stride
            while count - done >= lanes:
                T.buffer_store(acc, combine(acc[0], emit.load_float(x, base + done, lanes)), [0])
                done += lanes
            total = acc[0]
            for c in range(1, chains):
                total = T.bind(combine(total, acc[c]))
            total = T.bind(total)
            left = [emit.load_float(x, base + i, 1) for i in range(done, count)]
            scalar = reduce_lanes(total, lanes, combine)
            for value in left:
                scalar = T.bind(combine(scalar, value))
            if mode == "average":
                scalar = scalar * T.float32(1.0 / count)
            T.buffer_store(y, emit.convert(activate(activation, scalar), machine.element), [row])

    func = emit.function([("x", rows * count, machine.element), ("y", rows, machine.element)], body)
    name = unique(f"global{machine.named(mode + 'pool_f32')}", mode, rows, count, activation, machine)
    text = f"{mode} of {rows} planes of {count}, {activation.name}"
    return KernelCall(name, func, ("x", "y"), {}, -(-rows // per_tile), 0, text)


def reduce_lanes(vector: Any, lanes: int, combine: Any) -> Any:
    """All lanes of a vector combined into a scalar, halving it."""
    while lanes > 1:
        lanes //= 2
        low = T.Shuffle([vector], list(range(lanes)))
        high = T.Shuffle([vector], list(range(lanes, 2 * lanes)))
        vector = T.bind(combine(low, high))
    return vector
