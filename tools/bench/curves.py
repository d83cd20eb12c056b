"""Break-even curves: time against density for several block shapes, measured and as the cost model predicts.

Kernels are measured alone, without a network around them, in turns with our dense kernel and ONNX Runtime's.
Break-even is the density at which a sparse kernel takes as long as our own dense one, interpolated between densities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from bench.loaded import bind, room_of, seconds
from bench.turns import Burst, Say, Spread, pinned, take_turns
from sparsec.kernels import conv
from sparsec.kernels.base import KernelCall
from sparsec.measure import Library, Room
from sparsec.program import Kernel
from sparsec.runtimes.ort import OrtSession
from sparsec.targets import find_target

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1.0)
BLOCKS = ("1x1", "2x1", "4x1", "8x1")


@dataclass(frozen=True)
class Shape:
    """One layer: `kernel` x `kernel`, stride 1, same size in and out."""

    oc: int
    ic: int
    size: int
    kernel: int = 1

    @property
    def name(self) -> str:
        """`1x1 512x512, 14x14`."""
        return f"{self.kernel}x{self.kernel} {self.oc}x{self.ic}, {self.size}x{self.size}"

    @property
    def geometry(self) -> conv.Geometry:
        """As the kernel family says it."""
        pad = self.kernel // 2
        return conv.Geometry(
            (1, self.ic, self.size, self.size), (self.oc, self.ic, self.kernel, self.kernel), pads=(pad,) * 4
        )


SHAPES = (Shape(512, 512, 14), Shape(128, 128, 56), Shape(256, 256, 14, 3))


def weights(shape: Shape, form: conv.Format, density: float, seed: int = 0) -> np.ndarray:
    """Random weights of which exactly round(density * blocks) blocks of `form` are not zero, anywhere."""
    generator = np.random.default_rng(seed)
    geometry = shape.geometry
    w = generator.standard_normal(geometry.w_shape).astype(np.float32)
    if not form.sparse:
        return w
    grid = (shape.oc // form.rows, shape.ic // form.columns, shape.kernel, shape.kernel)
    count = int(np.prod(grid))
    mask = np.zeros(count, bool)
    mask[generator.permutation(count)[: round(density * count)]] = True
    spread = mask.reshape(grid).repeat(form.rows, axis=0).repeat(form.columns, axis=1)
    return np.where(spread, w, np.float32(0))


class Bound:
    """One layer's calls (preparing the input, the convolution) with memory of their own."""

    def __init__(self, calls: Sequence[KernelCall], geometry: conv.Geometry) -> None:
        self._calls = calls
        shapes = {"x": geometry.x_shape, "prepared": geometry.prepared_shape, "y": geometry.y_shape}
        self._sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        self._memory: list[dict[str, Room]] = []

    def link(self, library: Library, x: np.ndarray) -> Burst:
        """A burst of whole layers."""
        shared = {name: room_of(x) if name == "x" else Room(size, "float32") for name, size in self._sizes.items()}
        steps = []
        for call in self._calls:
            rooms = {role: room_of(array) for role, array in call.constants.items()}
            rooms |= {"scratch": Room(call.scratch, "uint8")} | {r: shared[r] for r in call.roles if r in shared}
            if "prepared" not in call.roles and len(self._calls) > 1:
                rooms["x"] = shared["prepared"]
            self._memory.append(rooms)
            pointers = [int(rooms[role].pointer.value or 0) for role in call.roles]
            steps.append((bind(library, call.name, pointers), call.tiles))

        def burst(runs: int) -> list[float]:
            return [sum(seconds(call, tiles) for call, tiles in steps) for _ in range(runs + 1)][1:]

        return burst


def _form(block: str) -> conv.Format:
    return conv.DENSE if block == "dense" else next(f for f in conv.TABLE if f.format == block)


def _ort_burst(shape: Shape, w: np.ndarray, x: np.ndarray) -> Burst:
    geometry = shape.geometry
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=list(geometry.pads))
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
        for name, dims in (("x", geometry.x_shape), ("y", geometry.y_shape))
    ]
    graph = helper.make_graph([node], "layer", tensors[:1], tensors[1:], [numpy_helper.from_array(w, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    call = OrtSession(model.SerializeToString()).once({"x": x})

    def burst(runs: int) -> list[float]:
        return [seconds(lambda begin, end: call() if end else None, 1) for _ in range(runs + 1)][1:]

    return burst


def measure_shape(shape: Shape, rounds: int) -> dict[str, Any]:
    """Times by `dense`, `ort` and block and density; break-even and share of the ideal of each block."""
    target = find_target("host")
    machine, geometry = target.machine, shape.geometry
    points = [("dense", 1.0), *((block, density) for block in BLOCKS for density in DENSITIES)]
    bounds, predicted, kernels = {}, {}, {}
    for block, density in points:
        form = _form(block)
        w = weights(shape, form, density)
        tiling, cost = conv.best_tiling(machine, geometry, form, conv.stored_columns(w, form, machine, geometry))
        calls = [call for call in conv.bind(machine, geometry, w, form=form, tiling=tiling) if call is not None]
        kernels.update({call.name: Kernel(call.name, call.func) for call in calls})
        bounds[block, density], predicted[block, density] = Bound(calls, geometry), cost
    library = Library(list(kernels.values()), target)
    x = np.random.default_rng(1).standard_normal(geometry.x_shape).astype(np.float32)
    bursts = {f"{block} {density}": bounds[block, density].link(library, x) for block, density in points}
    with pinned():
        bursts["ort"] = _ort_burst(shape, weights(shape, conv.DENSE, 1.0), x)
        times = take_turns(bursts, rounds, seconds=0.004)
    dense = times["dense 1.0"]
    found: dict[str, Any] = {
        "dense": {"us": _us(dense), "predicted_us": round(predicted["dense", 1.0], 2)},
        "ort": {"us": _us(times["ort"])},
        "blocks": {},
    }
    for block in BLOCKS:
        rows = []
        for density in DENSITIES:
            own = times[f"{block} {density}"]
            share = Spread.of([density * a / b for a, b in zip(dense, own, strict=True)])
            us, cost = _us(own), round(predicted[block, density], 2)
            rows.append({"density": density, "us": us, "predicted_us": cost, "ideal_share": share.json()})
        medians = [row["us"]["median"] for row in rows]
        found["blocks"][block] = {
            "points": rows,
            "break_even": break_even(DENSITIES, medians, found["dense"]["us"]["median"]),
            "predicted_break_even": break_even(
                DENSITIES, [row["predicted_us"] for row in rows], found["dense"]["predicted_us"]
            ),
        }
    return found


def _us(values: Sequence[float]) -> dict[str, Any]:
    return Spread.of([1e6 * value for value in values]).json()


def break_even(densities: Sequence[float], times: Sequence[float], dense: float) -> float:
    """The lowest density at which `times` reaches `dense`, linear between points; 1 if it never does.

    >>> break_even((0.2, 0.5, 1.0), (20.0, 50.0, 100.0), 75.0)
    0.75
    >>> break_even((0.5, 1.0), (50.0, 99.0), 100.0)
    1.0
    >>> break_even((0.5, 1.0), (110.0, 200.0), 100.0)
    0.0
    """
    if times[0] >= dense:
        return 0.0
    for i in range(1, len(times)):
        if times[i] >= dense:
            share = (dense - times[i - 1]) / (times[i] - times[i - 1])
            return round(densities[i - 1] + share * (densities[i] - densities[i - 1]), 3)
    return 1.0


def measure(rounds: int, say: Say) -> dict[str, Any]:
    """All shapes."""
    found = {}
    for shape in SHAPES:
        say(f"curves: {shape.name}")
        found[shape.name] = measure_shape(shape, rounds)
    return found
