"""Pooling on CUDA devices: MaxPool and AveragePool over windows, means and maxima over whole planes.

    max      y[c, oy, ox] = act(max over the window's elements inside the plane)
    average  y[c, oy, ox] = act(sum over the window's elements inside the plane / count[oy, ox])
    global   y[c] = act(mean of x[c, :])                      global_max: max in place of mean

Windows: a thread an output, neighbours along columns; reciprocal counts are stored, `scales[oy]`, then `scales[OH + ox]`.
Global: a warp a plane, lanes read neighbours and combine by shuffles. Sums are float32.
"""

from __future__ import annotations

from typing import Any, Literal

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit as tir
from sparsec.kernels.base import Format, unique
from sparsec.kernels.cuda import emit
from sparsec.kernels.cuda.base import DeviceCall, Gpu, roofline_us
from sparsec.kernels.epilogue import NONE, Activation, activate
from sparsec.kernels.planes import Window
from sparsec.kernels.pool import pack, reference, reference_global
from sparsec.program import Launch

__all__ = ["TABLE", "bind", "bind_global", "pack", "predict_us", "reference", "reference_global"]

Mode = Literal["max", "average"]

TABLE: tuple[Format, ...] = (
    Format("cuda_maxpool_f32", "MaxPool", "dense", "float32", "maximum over windows, a thread an output",
           "2-D, no Indices output"),
    Format("cuda_averagepool_f32", "AveragePool", "dense", "float32", "mean over windows, a thread an output", "2-D"),
    Format("cuda_globalpool_f32", "GlobalAveragePool, GlobalMaxPool, ReduceMean", "dense", "float32",
           "mean or maximum of each plane, a warp a plane", "reduction over all trailing axes"),
)  # fmt: skip

THREADS = 128  # of a block
UNROLLED = 32  # window positions that are written out; larger windows loop over rows
LOWEST = float("-inf")


def predict_us(gpu: Gpu, read: int, written: int, taps: int = 1) -> float:
    """Time by memory, or by loads that hit L1."""
    cycles = written * taps / emit.WARP / gpu.multiprocessors
    moved = gpu.item * float(read + written)
    return max(roofline_us(gpu, 0.0, moved), cycles / (gpu.ghz * 1e3) + gpu.launch_us)


def bind(
    gpu: Gpu, mode: Mode, *, planes: int, window: Window, count_include_pad: bool = False,
    activation: Activation = NONE,
) -> DeviceCall:  # fmt: skip
    """The call for one pooling layer of `planes` planes. Roles (x, y) for `max`, (x, y, scales) for `average`."""
    (oh, ow), (kh_count, kw_count) = window.shape, window.kernel
    size = planes * oh * ow

    def body(*arguments: Any) -> None:
        x, y = arguments[:2]
        (block,), (thread,) = arguments[-2:]
        i = T.bind(block * THREADS + thread)
        with T.If(i < size), T.Then():
            ox, oy, plane = T.bind(i % ow), T.bind(i // ow % oh), T.bind(i // (ow * oh))
            top, left = T.bind(oy * window.strides[0] - window.pads[0]), T.bind(ox * window.strides[1] - window.pads[1])
            start = T.bind(plane * (window.height * window.width) + top * window.width + left)
            total = emit.local(1)
            T.buffer_store(total, T.float32(LOWEST if mode == "max" else 0), [0])

            def row(kh: Any) -> None:
                down = kh * window.dilations[0]
                for kw in range(kw_count):
                    along = kw * window.dilations[1]
                    inside = tirx.all(
                        top + down >= 0, top + down < window.height, left + along >= 0, left + along < window.width
                    )
                    with T.If(inside), T.Then():
                        value = tir.convert(x[start + down * window.width + along], "float32")
                        T.buffer_store(total, T.max(total[0], value) if mode == "max" else total[0] + value, [0])

            if kh_count * kw_count <= UNROLLED:
                for kh in range(kh_count):
                    row(kh)
            else:
                with T.serial(0, kh_count) as kh:
                    row(kh)
            value = total[0]
            if mode == "average":
                scales = arguments[2]
                value = value * (scales[oy] * scales[oh + ox])
            T.buffer_store(y, tir.convert(activate(activation, value), gpu.element), [i])

    arguments = [("x", planes * window.height * window.width, gpu.element), ("y", size, gpu.element)]
    constants = {}
    if mode == "average":
        constants["scales"] = pack(window, count_include_pad, 0)
        arguments.append(("scales", constants["scales"].size, "float32"))
    grid = -(-size // THREADS)
    func = emit.function(arguments, grid, THREADS, body)
    shape = f"{kh_count}x{kw_count}s{window.strides[0]}{window.strides[1]}"
    name = unique(f"{gpu.named(f'cuda_{mode}pool_f32')}_{shape}", mode, planes, window, activation, gpu.element)
    text = f"{mode} pooling {shape} of {planes} planes of {window.height}x{window.width}, {activation.name}"
    roles = tuple(argument[0] for argument in arguments)
    return DeviceCall(name, func, roles, constants, Launch((grid, 1, 1), (THREADS, 1, 1)), {}, text)


def bind_global(gpu: Gpu, mode: Mode, *, rows: int, count: int, activation: Activation = NONE) -> DeviceCall:
    """The call for the mean or maximum of each of `rows` runs of `count` elements. Roles (x, y)."""
    warps = THREADS // emit.WARP

    def body(x: Any, y: Any, blocks: Any, threads: Any) -> None:
        (block,), (thread,) = blocks, threads
        lane, row = T.bind(thread % emit.WARP), T.bind(block * warps + thread // emit.WARP)
        with T.If(row < rows), T.Then():
            total = emit.local(1)
            T.buffer_store(total, T.float32(LOWEST if mode == "max" else 0), [0])

            def add(index: Any) -> None:
                value = tir.convert(x[row * count + index], "float32")
                T.buffer_store(total, T.max(total[0], value) if mode == "max" else total[0] + value, [0])

            if count >= emit.WARP:
                with T.serial(0, count // emit.WARP) as i:
                    add(i * emit.WARP + lane)
            if count % emit.WARP:
                with T.If(lane < count % emit.WARP), T.Then():
                    add(count - count % emit.WARP + lane)
            emit.call("sparsec_warp_max" if mode == "max" else "sparsec_warp_sum", emit.address(total, 0))
            with T.If(lane == 0), T.Then():
                value = total[0] if mode == "max" else total[0] * T.float32(1.0 / count)
                T.buffer_store(y, tir.convert(activate(activation, value), gpu.element), [row])

    grid = -(-rows // warps)
    func = emit.function([("x", rows * count, gpu.element), ("y", rows, gpu.element)], grid, THREADS, body)
    name = unique(f"cuda_global{gpu.named(mode + 'pool_f32')}", mode, rows, count, activation, gpu.element)
    text = f"{mode} of {rows} planes of {count}, {activation.name}"
    return DeviceCall(name, func, ("x", "y"), {}, Launch((grid, 1, 1), (THREADS, 1, 1)), {}, text)
