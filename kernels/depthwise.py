"""Depthwise convolution: every output channel reads one input channel.

    y[n, c, oy, ox] = act(bias[c] + sum over (kh, kw) of w[c, kh, kw] * x[n, c // m, oy * sh + kh - top, ox * sw + kw - left])

m = OC / IC is the channel multiplier. Planes are read in place (see `planes`); the channel's weights stay in registers
where they fit. Stored form: `weights[c][kh * KW + kw]`, then the bias.

Source: register tiles of several output rows as in XNNPACK's dwconv2d-chw kernels; here without their input padding rules.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit, planes
from sparsec.kernels.base import Format, KernelCall, Machine, unique
from sparsec.kernels.epilogue import NONE, Activation, Residual, finish, reference_finish

TABLE: tuple[Format, ...] = (
    Format("depthwise_f32", "Conv", "dense", "float32", "depthwise convolution on planes, one channel a tile",
           f"groups == input channels, at most {planes.MAX_TAPS} kernel positions"),
)  # fmt: skip


def refusal(x_shape: tuple[int, ...], w_shape: tuple[int, ...], groups: int) -> str | None:
    """Why this family cannot run a Conv, or None if it can. w [OC, 1, KH, KW]."""
    if len(x_shape) != 4 or len(w_shape) != 4:
        return f"depthwise kernels take 2-D convolutions, got weights of rank {len(w_shape)}"
    if groups != x_shape[1] or w_shape[1] != 1 or w_shape[0] % groups:
        return f"not depthwise: {groups} groups for {x_shape[1]} input channels"
    if w_shape[2] * w_shape[3] > planes.MAX_TAPS:
        return f"{w_shape[2]}x{w_shape[3]} kernel: at most {planes.MAX_TAPS} positions are unrolled"
    return None


def pack(w: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """w [OC, 1, KH, KW], bias [OC] or None -> [OC, KH * KW + 1] with the bias last."""
    rows = w.reshape(w.shape[0], -1)
    last = np.zeros(w.shape[0]) if bias is None else bias
    return np.ascontiguousarray(np.concatenate([rows, np.reshape(last, (-1, 1))], axis=1).astype(np.float32))


def unpack(packed: np.ndarray, kernel: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `pack`: w [OC, 1, KH, KW] and bias [OC]."""
    return packed[:, :-1].reshape(packed.shape[0], 1, *kernel), packed[:, -1]


def reference(
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilations: tuple[int, int] = (1, 1),
    activation: Activation = NONE,
    residual: Residual = "none",
    other: np.ndarray | None = None,
) -> np.ndarray:
    """The convolution in float64, by definition. x [N, IC, H, W], w [OC, 1, KH, KW] -> [N, OC, OH, OW]."""
    (sh, sw), (top, left, bottom, right) = strides, pads
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    padded = np.repeat(padded, w.shape[0] // x.shape[1], axis=1)
    oh, ow = planes.Window(x.shape[2], x.shape[3], w.shape[2:], strides, pads, dilations).shape
    y = np.zeros((x.shape[0], w.shape[0], oh, ow))
    for kh in range(w.shape[2]):
        for kw in range(w.shape[3]):
            rows = slice(kh * dilations[0], kh * dilations[0] + (oh - 1) * sh + 1, sh)
            cols = slice(kw * dilations[1], kw * dilations[1] + (ow - 1) * sw + 1, sw)
            y += w[None, :, 0, kh, kw, None, None].astype(np.float64) * padded[:, :, rows, cols]
    if bias is not None:
        y += bias[None, :, None, None]
    return reference_finish(y, activation, residual, other)


def bind(
    machine: Machine,
    *,
    x_shape: tuple[int, int, int, int],
    w: np.ndarray,
    bias: np.ndarray | None = None,
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilations: tuple[int, int] = (1, 1),
    activation: Activation = NONE,
    residual: Residual = "none",
) -> KernelCall:
    """The call for one layer. x [N, IC, H, W], w [OC, 1, KH, KW] float32, bias [OC], pads top, left, bottom, right.

    Roles (x, y[, residual], weights). y must not overlap x or residual. Tiles: output planes, or bands of rows of them.
    """
    n, channels, height, width = x_shape
    out_channels, taps = w.shape[0], w.shape[2] * w.shape[3]
    multiplier = out_channels // channels
    window = planes.Window(height, width, (w.shape[2], w.shape[3]), strides, pads, dilations).flat()
    resident = 2 * taps <= machine.registers + 2  # the channel's weights stay in registers
    spare = machine.registers - (taps if resident else 0) - window.kernel[1] - 1
    sweep = planes.plan(machine, window, n * out_channels, max(2, min(8, spare)), 1)
    in_plane, out_plane = height * width, window.shape[0] * window.shape[1]

    def body(*buffers: Any) -> None:
        x, y, weights = buffers[0], buffers[1], buffers[-3]
        begin, end = buffers[-2:]
        with T.serial(begin, end) as t:
            plane = T.bind(t // sweep.bands) if sweep.bands > 1 else t
            channel = T.bind(plane % out_channels) if n > 1 else plane
            source = plane // multiplier if multiplier > 1 else plane  # also right for n > 1: OC is a multiple of m
            base = T.bind(channel * (taps + 1))

            def weight(k: int, lanes: int) -> Any:
                return emit.splat(weights[base + k], lanes)

            first = {lanes: T.bind(weight(taps, lanes)) for lanes in sweep.lanes}
            held = {
                (k, lanes): T.bind(weight(k, lanes)) for k in range(taps if resident else 0) for lanes in sweep.lanes
            }

            def step(acc: Any, tap: Any, k: int, lanes: int) -> Any:
                return acc + tap * (held[k, lanes] if resident else weight(k, lanes))

            def last(acc: Any, _oy: Any, _ox: Any, at: Any, lanes: int) -> Any:
                other = emit.load(buffers[2], at, lanes) if residual != "none" else None
                return finish(acc, activation, residual, other)

            reduction = planes.Reduction(0.0, lambda lanes: first[lanes], step, last)
            planes.emit_sweep(
                sweep, x, T.bind(source * in_plane), y, T.bind(plane * out_plane), t % sweep.bands, reduction
            )

    packed = machine.array(pack(w, bias))
    roles = ("x", "y", "residual", "weights") if residual != "none" else ("x", "y", "weights")
    sizes = {"x": n * channels * in_plane, "y": n * out_channels * out_plane, "weights": packed.size}
    sizes["residual"] = sizes["y"]
    func = emit.function([(role, sizes[role], machine.element) for role in roles], body)
    facts = (x_shape, w.shape, strides, pads, dilations, activation, residual, machine)
    kernel = f"{w.shape[2]}x{w.shape[3]}s{strides[0]}{strides[1]}"
    name = unique(f"{machine.named('depthwise_f32')}_{kernel}", *facts)
    text = f"depthwise {kernel} on {channels}x{height}x{width}, {activation.name}, residual {residual}"
    tiles = n * out_channels * sweep.bands
    return KernelCall(name, func, roles, {"weights": packed}, tiles, 0, text)
