"""Hostile sizes: little that unfolds to much, loops without end, weights that are not as large as they say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hardening.making import BOOL, FLOAT, INT64, Maker, floats, int64, model, save, value
from onnx import NodeProto, TensorProto, helper, numpy_helper


def bomb(op: str, *sizes: int, **attributes: Any) -> Maker:
    """An operator that makes much from little, of constants."""

    def make(folder: Path) -> Path:
        first = {
            "ConstantOfShape": [int64("s", *sizes)],
            "Expand": [floats("c", 1), int64("s", *sizes)],
            "Tile": [floats("c", *[1] * len(sizes)), int64("s", *sizes)],
            "Range": [numpy_helper.from_array(np.array(n, np.int64), f"n{i}") for i, n in enumerate(sizes)],
            "EyeLike": [floats("c", 1)],
        }[op]
        nodes = [helper.make_node(op, [t.name for t in first], ["big"], **attributes)]
        nodes.append(helper.make_node("Cast", ["big"], ["float"], to=FLOAT))
        nodes += [helper.make_node("Add", ["x0", "float"], ["y"])]
        return save(folder, model(nodes, first, inputs=[value("x0", [1])]))

    return make


def chain_of_tiles(folder: Path) -> Path:
    """Each step is within what folding may grow by; all together are not."""
    start = floats("c0", 1 << 20)
    nodes = [helper.make_node("Concat", [f"c{i}"] * 3, [f"c{i + 1}"], axis=0) for i in range(12)]
    nodes.append(helper.make_node("Add", ["x", "c12"], ["y"]))
    return save(folder, model(nodes, [start], inputs=[value("x", [1])]))


def loop(trips: int, body: Sequence[NodeProto] = ()) -> Maker:
    def make(folder: Path) -> Path:
        inputs = [value("i", [], INT64), value("go", [], BOOL), value("v", [1, 4])]
        nodes = [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["v", "v"], ["w"])]
        inner = helper.make_graph([*nodes, *body], "body", inputs, [value("go_on", [], BOOL), value("w", [1, 4])])
        node = helper.make_node("Loop", ["trips", "true", "x"], ["y"], body=inner)
        true = numpy_helper.from_array(np.array(True), "true")
        return save(folder, model([node], [numpy_helper.from_array(np.array(trips, np.int64), "trips"), true]))

    return make


def loops_in_loops(folder: Path) -> Path:
    """60^4 additions."""
    trips = numpy_helper.from_array(np.array(60, np.int64), "trips")
    true = numpy_helper.from_array(np.array(True), "true")

    def level(depth: int) -> list[NodeProto]:
        if depth == 0:
            return [helper.make_node("Add", [f"v{depth + 1}", "x"], [f"w{depth + 1}"])]
        names = value(f"i{depth}", [], INT64), value(f"go{depth}", [], BOOL), value(f"v{depth}", [1, 4])
        keep = helper.make_node("Identity", [f"go{depth}"], [f"on{depth}"])
        inner = helper.make_graph(
            [keep, *level(depth - 1)], "b", names, [value(f"on{depth}", [], BOOL), value(f"w{depth}", [1, 4])]
        )
        return [helper.make_node("Loop", ["trips", "true", f"v{depth + 1}"], [f"w{depth + 1}"], body=inner)]

    def renamed(depth: int) -> list[NodeProto]:
        nodes = level(depth)
        nodes[0].input[2], nodes[0].output[0] = "x", "y"
        return nodes

    return save(folder, model(renamed(4), [trips, true]))


def without_condition(folder: Path) -> Path:
    """A Loop with neither a trip count nor a condition that ends it."""
    inputs = [value("i", [], INT64), value("go", [], BOOL), value("v", [1, 4])]
    nodes = [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["v", "v"], ["w"])]
    inner = helper.make_graph(nodes, "body", inputs, [value("go_on", [], BOOL), value("w", [1, 4])])
    node = helper.make_node("Loop", ["", "true", "x"], ["y"], body=inner)
    return save(folder, model([node], [numpy_helper.from_array(np.array(True), "true")]))


def large_input(*sizes: int) -> Maker:
    return lambda folder: save(folder, model([helper.make_node("Relu", ["x"], ["y"])], inputs=[value("x", sizes)]))


def grows_at_run_time(folder: Path) -> Path:
    """x[1, 4] broadcast to 2^40 elements: nothing to fold, everything to compute."""
    nodes = [helper.make_node("Expand", ["x", "s"], ["y"])]
    return save(folder, model(nodes, [int64("s", 1 << 19, 1 << 19, 4)]))


def eats_memory_at_run_time(folder: Path) -> Path:
    """Within the limit of elements, each; not within the memory, together."""
    nodes = [helper.make_node("Expand", ["x", "s"], ["big"])]
    nodes += [helper.make_node("Relu", ["big"], [f"r{i}"]) for i in range(8)]
    nodes.append(helper.make_node("Sum", [f"r{i}" for i in range(8)], ["y"]))
    return save(folder, model(nodes, [int64("s", 1 << 13, 1 << 13, 4)]))


def weight(change: Callable[[TensorProto], None]) -> Maker:
    """A MatMul whose weight [4, 5] is damaged."""

    def make(folder: Path) -> Path:
        tensor = floats("w", 4, 5)
        change(tensor)
        return save(folder, model([helper.make_node("MatMul", ["x", "w"], ["y"])], [tensor]))

    return make


def set_dims(*sizes: int) -> Callable[[TensorProto], None]:
    def change(tensor: TensorProto) -> None:
        del tensor.dims[:]
        tensor.dims.extend(sizes)

    return change


def set_type(kind: int) -> Callable[[TensorProto], None]:
    def change(tensor: TensorProto) -> None:
        tensor.data_type = kind

    return change


def short_raw(tensor: TensorProto) -> None:
    tensor.raw_data = tensor.raw_data[:-4]


def typed_short(tensor: TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.float_data.extend([1.0] * 19)
