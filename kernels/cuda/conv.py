"""Dense convolution on CUDA devices as a matrix product whose right side is gathered on the way (implicit GEMM).

    y[i, oc, p] = act(bias[oc] + sum over (tap, c) of w[oc, c, tap] * x[i, c, oy(p) * sh + kh * dh - top, ox(p) * sw + kw * dw - left])

Rows of a tile are output channels, columns are pixels of all images, counted image by image (whole chunks to an image), the
depth is (tap, channel). Three right sides, x in NCHW as it lies:

    direct    1x1, stride 1, no pads: x itself, rows across the depth, copied in chunks of 16 bytes (8, 4 where planes are so)
    runs      float16: a thread gathers 8 channels of one tap and one pixel, 8 neighbouring pixels a quarter of a warp, and
              stores them as one chunk along the depth: one test of the borders and one address for 8 loads
    elements  float32: asynchronous copies of 4 bytes straight to rows across the depth

Few input channels fill a run with 2, 4 or 8 taps. Weights [groups][OC'][K'], whole tiles, in the order of the depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels.base import Format, unique
from sparsec.kernels.conv import Geometry
from sparsec.kernels.conv import reference as reference_group
from sparsec.kernels.cuda import emit, gemm, operands
from sparsec.kernels.cuda.base import DeviceCall, Gpu
from sparsec.kernels.cuda.gemm import Plan, Tile
from sparsec.kernels.cuda.stores import PlaneStore
from sparsec.kernels.cuda.tensor_tiles import EACH, TensorTile
from sparsec.kernels.epilogue import NONE, Activation, Residual, reference_finish
from sparsec.program import Launch

__all__ = ["TABLE", "Shape", "bind", "pack", "plans", "predict_us", "reference", "unpack"]

TABLE: tuple[Format, ...] = (
    Format(
        "cuda_conv_f32", "Conv", "dense", "float32", "convolution by implicit matrix product", "2-D, constant weights"
    ),
)

GATHER_TILES: tuple[TensorTile, ...] = (  # narrower warps than products have: gathered values wait in registers
    TensorTile(128, 128, 32, (2, 4), 3),
    TensorTile(64, 128, 32, (2, 4), 3),
    TensorTile(128, 64, 32, (4, 2), 3),
    TensorTile(64, 64, 32, (2, 2), 4),
    TensorTile(32, 64, 64, (2, 2), 3),
    TensorTile(16, 64, 64, (1, 2), 3),
)
GATHER = {"float16": 2.5, "float32": 12.0}  # instructions of a thread for one element that it gathers


@dataclass(frozen=True)
class Shape:
    """What is convolved: x [N, C, H, W], w [OC, C / groups, KH, KW]; pads top, left, bottom, right."""

    x: tuple[int, int, int, int]
    w: tuple[int, int, int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def plane(self) -> tuple[int, int]:
        """Output rows and columns."""
        sizes = []
        for axis in range(2):
            span = self.dilations[axis] * (self.w[2 + axis] - 1) + 1
            sizes.append((self.x[2 + axis] + self.pads[axis] + self.pads[2 + axis] - span) // self.strides[axis] + 1)
        return sizes[0], sizes[1]

    @property
    def pixels(self) -> int:
        """Of an output plane."""
        return self.plane[0] * self.plane[1]

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return self.w[2] * self.w[3]

    @property
    def rows(self) -> int:
        """Output channels of a group."""
        return self.w[0] // self.groups

    def direct(self, element: str) -> bool:
        """Whether x itself is the right side."""
        item = 2 if element == "float16" else 4
        plain = self.taps == 1 and self.strides == (1, 1) and not any(self.pads)
        return plain and operands.unit_of(self.x[2] * self.x[3], item=item) >= 4

    def pitch(self, element: str) -> int:
        """Tile columns of an image."""
        each = 8 if element == "float16" else 4
        return self.pixels if self.x[0] == 1 else -(-self.pixels // each) * each

    def run(self, element: str) -> int:
        """Channels of a tap in a run of 8 of the depth; 1 where there are no runs."""
        if element != "float16" or self.direct(element):
            return 1
        return min(EACH, 1 << (self.w[1] - 1).bit_length())

    def channels(self, element: str) -> int:
        """Channels of a tap as they are stored."""
        run = self.run(element)
        return -(-self.w[1] // run) * run

    def depth(self, element: str) -> int:
        """Length of the sums, with what runs leave empty."""
        return self.taps * self.channels(element)


def tiles_of(shape: Shape, element: str) -> tuple[Tile, ...]:
    """The tiles for a convolution."""
    return gemm.tiles_of(element) if element == "float32" or shape.direct(element) else GATHER_TILES


@cache
def plans(gpu: Gpu, shape: Shape) -> tuple[tuple[float, Plan], ...]:
    """Predicted microseconds of every tile, split where that helps, cheapest first."""
    element = gpu.element
    m, k, n = shape.rows, shape.depth(element), shape.x[0] * shape.pitch(element)
    found = []
    for tile in tiles_of(shape, element):
        if not gpu.resident(tile.threads, tile.registers, tile.shared):
            continue
        gathered = 0.0 if shape.direct(element) else GATHER[element] * tile.columns * tile.depth / 128
        ways = []
        for splits in gemm.SPLITS:
            if splits > 1 and k < 4 * splits * tile.depth:
                break
            plan = Plan(tile, splits)
            us = gemm.tile_us(gpu, plan, m, k, n, shape.groups, gathered)
            if splits > 1:
                us += 4.0 * (splits + 1) * m * n * shape.groups / (gpu.l2_gbps * 1e3) + gpu.launch_us
            ways.append((us, plan))
        found.append(min(ways, key=lambda way: way[0]))
    return tuple(sorted(found, key=lambda way: way[0]))


def predict_us(gpu: Gpu, shape: Shape) -> float:
    """Time of the best plan."""
    return plans(gpu, shape)[0][0]


def reference(
    shape: Shape, x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None, activation: Activation = NONE,
    residual: Residual = "none", other: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """The convolution in float64, by definition. x [N, C, H, W], w [OC, C / groups, KH, KW] -> [N, OC, OH, OW]."""
    n, _, h, wide = shape.x
    inside = (n, shape.w[1], h, wide)
    geometry = Geometry(inside, (shape.rows, *shape.w[1:]), shape.strides, shape.pads, shape.dilations)
    parts = zip(np.split(x, shape.groups, 1), np.split(w, shape.groups, 0), strict=True)
    y = np.concatenate([reference_group(geometry, part, weights) for part, weights in parts], axis=1)
    return reference_finish(y if bias is None else y + bias[None, :, None, None], activation, residual, other)


# --- packing ---------------------------------------------------------------------------------------------------------


def pack(gpu: Gpu, w: np.ndarray, shape: Shape, plan: Plan) -> np.ndarray:
    """w [OC, C / groups, KH, KW] -> [groups][OC'][K'], the depth as (tap, channel)."""
    tile, element = plan.tile, gpu.element
    channels, rows = shape.channels(element), -(-shape.rows // tile.rows) * tile.rows
    deep = plan.steps(shape.depth(element)) * tile.depth * plan.splits
    ordered = np.zeros((shape.groups, rows, shape.taps, channels), np.float32)
    by_group = w.reshape(shape.groups, shape.rows, shape.w[1], shape.taps)
    ordered[:, : shape.rows, :, : shape.w[1]] = by_group.swapaxes(2, 3)
    whole = np.zeros((shape.groups, rows, deep), np.float32)
    whole[:, :, : shape.depth(element)] = ordered.reshape(shape.groups, rows, -1)
    return gpu.array(whole)


def unpack(packed: np.ndarray, shape: Shape) -> np.ndarray:
    """The inverse of `pack`."""
    element = str(packed.dtype)
    channels = shape.channels(element)
    taken = packed[:, : shape.rows, : shape.depth(element)].reshape(shape.groups, shape.rows, shape.taps, channels)
    return taken[..., : shape.w[1]].swapaxes(2, 3).reshape(shape.w)


# --- right sides -----------------------------------------------------------------------------------------------------


class _Pixels:
    """Where the pixel of a tile column lies in x, for one thread: computed once, before the first step."""

    def __init__(self, shape: Shape, pitch: int, column: Any, channel: Any) -> None:
        self.shape = shape
        n, c, h, w = shape.x
        image = T.bind(column // pitch) if n > 1 else 0
        pixel = T.bind(column % pitch) if n > 1 else column
        exists = column < n * pitch if pitch == shape.pixels else tirx.all(column < n * pitch, pixel < shape.pixels)
        self.top = T.bind(pixel // shape.plane[1] * shape.strides[0] - shape.pads[0])
        self.left = T.bind(pixel % shape.plane[1] * shape.strides[1] - shape.pads[1])
        # Outside of all images no row is inside.
        self.top = T.bind(T.if_then_else(exists, self.top, -(h + shape.dilations[0] * shape.w[2])))
        self.origin = T.bind((image * c + channel) * (h * w) + self.top * w + self.left)

    def at(self, tap: Any) -> tuple[Any, Any]:
        """Index of a tap in channel 0, and whether it lies inside x."""
        _, _, h, w = self.shape.x
        kh, kw = tap // self.shape.w[3] * self.shape.dilations[0], tap % self.shape.w[3] * self.shape.dilations[1]
        y, x = self.top + kh, self.left + kw
        inside = tirx.all(y >= 0, y < h, x >= 0, x < w)
        return self.origin + kh * w + kw, inside


class Gathered:
    """What `Runs` and `Elements` share: a thread's share of the units of a slot, `across` columns x `down`."""

    def __init__(
        self, placement: operands.Placement, memory: Any, shape: Shape, pitch: int, first: Any, channel: Any,
        across: int, down: int, threads: int, thread: Any,
    ) -> None:  # fmt: skip
        assert max(across, threads) % min(across, threads) == 0 and across * down % threads == 0
        self.placement, self.memory, self.shape = placement, memory, shape
        self.plane = shape.x[2] * shape.x[3]
        self.columns, self.units = [], []
        for start in range(0, min(across, across * down), threads):
            column = T.bind((thread + start) % across)
            self.columns.append((column, _Pixels(shape, pitch, first + column, channel)))
        each = max(1, threads // across)  # units that all threads cover at once
        unit = T.bind(thread // across) if each > 1 else 0
        for u in range(0, down, each):
            self.units += [(column, pixels, unit + u) for column, pixels in self.columns]


class Runs(Gathered):
    """float16: 8 of the depth of a pixel at a time, as a chunk of [columns][depth]."""

    def __init__(self, placement: operands.Placement, *arguments: Any, run: int, depth: int) -> None:
        super().__init__(placement, *arguments)
        self.run, self.depth = run, depth
        self.held = emit.local(len(self.units) * EACH, "float16")

    def issue(self, step: Any, shared: Any, slot: Any) -> None:
        """Load the values of `step` into registers."""
        channels, run = self.shape.w[1], self.run
        blocks = -(-channels // run)  # runs of a tap
        for i, (_, pixels, unit) in enumerate(self.units):
            for part in range(EACH // run):
                number = (step * self.placement.chunks + unit) * (EACH // run) + part
                tap, first = T.bind(number // blocks), T.bind(number % blocks * run)
                index, inside = pixels.at(tap)
                index = T.bind(index + first * self.plane)
                inside = T.bind(tirx.all(inside, tap < self.shape.taps))
                at = i * EACH + part * run
                if channels % run == 0 or channels < run:
                    name = f"sparsec_gather<{min(run, channels)}, {self.plane}>"
                    exists = T.if_then_else(inside, 1, 0)
                    emit.call(name, emit.address(self.held, at), emit.address(self.memory, index), exists)
                    for c in range(channels, run):
                        T.buffer_store(self.held, T.float16(0), [at + c])
                    continue
                for c in range(run):
                    exists = T.if_then_else(tirx.all(inside, first + c < channels), 1, 0)
                    source = emit.address(self.memory, index + c * self.plane)
                    emit.call("sparsec_load_if", emit.address(self.held, at + c), source, exists)

    def settle(self, shared: Any, slot: Any) -> None:
        """Store them as chunks."""
        for i, (column, _, unit) in enumerate(self.units):
            target = emit.address(shared, slot + self.placement.at(column, unit))
            emit.call("sparsec_put16", target, emit.address(self.held, i * EACH))


class Elements(Gathered):
    """float32: one element at a time to [depth][columns]."""

    def __init__(self, placement: operands.Placement, *arguments: Any, depth: int) -> None:
        super().__init__(placement, *arguments)
        self.depth = depth

    def issue(self, step: Any, shared: Any, slot: Any) -> None:
        """Start the copies of `step`."""
        channels, deep = self.shape.w[1], self.depth
        even = channels % deep == 0  # a step stays within one tap
        if even:
            tap, first = T.bind(step * deep // channels), T.bind(step * deep % channels)
        for column, pixels, unit in self.units:
            if not even:
                k = T.bind(step * deep + unit)
                tap, first = T.bind(k // channels), T.bind(k % channels)
            index, inside = pixels.at(tap)
            index = index + (first + unit if even else first) * self.plane
            inside = T.bind(tirx.all(inside, tap < self.shape.taps))
            target = emit.address(shared, slot + unit * self.placement.pitch + column)
            source = emit.address(self.memory, T.if_then_else(inside, index, 0))
            emit.call("sparsec_copy4", target, source, T.if_then_else(inside, 1, 0))

    def settle(self, shared: Any, slot: Any) -> None:
        """Nothing is left to do."""


def direct_operand(
    shape: Shape, element: str, item: int, pitch: int, first: Any, channel: Any, step_depth: int
) -> operands.Source:
    """The source of x as the right side: `pitch` columns to an image."""
    n, c, h, w = shape.x
    each, pixels, depth = operands.CHUNK // item, h * w, shape.w[1]

    def source(step: Any, row: Any, chunk: Any) -> tuple[Any, Any]:
        k, column = step * step_depth + row, first + chunk * each
        image = column // pitch if n > 1 else 0
        pixel = column % pitch if n > 1 else column
        inside = tirx.all(k < depth, column < n * pitch)
        valid = T.if_then_else(inside, operands.within(pixels - pixel, each), 0)
        start = T.if_then_else(inside, (image * c + channel + k) * pixels + pixel, 0)
        return start, valid

    return source


# --- kernels ---------------------------------------------------------------------------------------------------------


def bind(
    gpu: Gpu, shape: Shape, *, w: np.ndarray, bias: np.ndarray | None = None, activation: Activation = NONE,
    residual: Residual = "none", plan: Plan | None = None,
) -> tuple[DeviceCall, ...]:  # fmt: skip
    """The calls for one convolution, one, or two where the sums are split. w [OC, C / groups, KH, KW] float32, bias [OC].

    Roles (x, y[, residual], weights, bias), or (x, weights, parts) and (parts, y[, residual], bias): "parts" is a value
    of `splits` times y in float32.
    """
    element = gpu.element
    plan = plan or plans(gpu, shape)[0][1]
    tile, steps, split = plan.tile, plan.steps(shape.depth(element)), plan.splits > 1
    n, oc, pixels, pitch = shape.x[0], shape.w[0], shape.pixels, shape.pitch(element)
    packed = pack(gpu, w, shape, plan)
    rows, deep = packed.shape[1:]
    held = np.zeros((shape.groups, rows), np.float32)
    held[:, : shape.rows] = 0 if bias is None else np.reshape(bias, (shape.groups, -1))
    high, wide = rows // tile.rows, -(-n * pitch // tile.columns)
    direct, turned = shape.direct(element), isinstance(tile, TensorTile) and not shape.direct(element)
    per_part = high * wide * shape.groups

    def body(*arguments: Any) -> None:
        *buffers, (block,), (thread,) = arguments
        named = dict(zip(roles, buffers, strict=True))
        row, column = gemm.tile_of_block(block % (high * wide), high, wide)
        group = T.bind(block // (high * wide) % shape.groups) if shape.groups > 1 else 0
        part = T.bind(block // per_part) if split else 0
        first = (T.bind(row * tile.rows), T.bind(column * tile.columns))
        channel = T.bind(group * shape.w[1]) if shape.groups > 1 else 0
        base = group * (rows * deep) + part * (steps * tile.depth)
        left = operands.matrix(base, deep, deep, gpu.item, first[0], rows, tile.depth, True)
        a = operands.Chunks(tile.left(), named["weights"], left, 16, tile.threads, thread, packed=True)
        place = tile.right(turned)
        b: operands.Operand
        if direct:
            source = direct_operand(shape, element, gpu.item, pitch, first[1], channel, tile.depth)
            unit = operands.unit_of(pixels, item=gpu.item)
            b = operands.Chunks(place, named["x"], _later(source, part * steps), unit, tile.threads, thread)
        else:
            facts = (named["x"], shape, pitch, first[1], channel, tile.columns)
            if turned:
                b = Runs(place, *facts, place.chunks, tile.threads, thread, run=shape.run(element), depth=tile.depth)
            else:
                b = Elements(place, *facts, tile.depth, tile.threads, thread, depth=tile.depth)
            if split:
                b = _Later(b, part * steps)
        facts = (n, oc, pixels, pitch, shape.rows, first, group * shape.rows)
        whole = shape.rows % tile.rows == 0
        if split:
            store = PlaneStore(*facts, named["parts"], whole_rows=whole, base=part * (n * oc * pixels))
        else:
            store = PlaneStore(
                *facts, named["y"], whole_rows=whole, bias=named["bias"], bias_at=group * rows,
                other=named.get("residual"), residual=residual, activation=activation,
            )  # fmt: skip
        gemm.run_product(tile, steps, a, b, turned, thread, store)

    size = n * oc * pixels
    sizes = {
        "x": (int(np.prod(shape.x)), element), "y": (size, element), "residual": (size, element),
        "weights": (packed.size, element), "bias": (held.size, "float32"), "parts": (plan.splits * size, "float32"),
    }  # fmt: skip
    others = ("residual",) if residual != "none" else ()
    roles = ("x", "weights", "parts") if split else ("x", "y", *others, "weights", "bias")
    grid = per_part * plan.splits
    func = emit.function([(role, *sizes[role]) for role in roles], grid, tile.threads, body, tile.dynamic)
    kernel = f"{shape.w[2]}x{shape.w[3]}s{shape.strides[0]}{shape.strides[1]}"
    stem = f"{gpu.named(TABLE[0].name)}_{kernel}_{tile}"
    facts = (shape, plan, element) + (() if split else (activation, residual))
    text = f"convolution {kernel}, {shape.x[1]} to {oc} channels, {n} x {shape.plane[0]}x{shape.plane[1]}, tiles {plan}"
    launch = Launch((grid, 1, 1), (tile.threads, 1, 1), tile.dynamic)
    if split:
        main = DeviceCall(unique(stem, *facts), func, roles, {"weights": packed}, launch, {}, f"{text}: parts of sums")
        last = gemm.bind_parts(
            gpu, rows=n, columns=oc * pixels, splits=plan.splits, bias=held[:, : shape.rows].reshape(-1),
            bias_pitch=pixels, activation=activation, residual=residual,
        )  # fmt: skip
        return main, last
    text += f", {activation.name}, residual {residual}"
    return (DeviceCall(unique(stem, *facts), func, roles, {"weights": packed, "bias": held}, launch, {}, text),)


def _later(source: operands.Source, steps: Any) -> operands.Source:
    """`source` with `steps` steps left out."""
    return lambda step, row, chunk: source(step + steps, row, chunk)


class _Later:
    """An operand with `steps` steps left out."""

    def __init__(self, operand: operands.Operand, steps: Any) -> None:
        self.placement, self.operand, self.steps = operand.placement, operand, steps
        self.settle: Callable[[Any, Any], None] = operand.settle

    def issue(self, step: Any, shared: Any, slot: Any) -> None:
        """Start the loads."""
        self.operand.issue(step + self.steps, shared, slot)
