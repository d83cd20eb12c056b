"""Hostile structure: recursion, depth, cycles, bytes that are no model, values that no model has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hardening.making import BOOL, Maker, floats, graph_of, model, save, value
from onnx import NodeProto, helper, numpy_helper


def functions(calls: dict[str, Sequence[str]], top: str = "f0") -> Maker:
    """Functions of one input and one output that call each other in sequence."""

    def make(folder: Path) -> Path:
        bodies = []
        for name, called in calls.items():
            nodes = []
            for i, other in enumerate(called):
                domain = "own" if other in calls else ""
                source, target = (f"t{i}" if i else "a"), (f"t{i + 1}" if i + 1 < len(called) else "b")
                nodes.append(helper.make_node(other, [source], [target], domain=domain))
            opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
            bodies.append(helper.make_function("own", name, ["a"], ["b"], nodes, opsets))
        node = helper.make_node(top, ["x"], ["y"], domain="own")
        return save(folder, model([node], functions=bodies, opsets=[helper.make_opsetid("own", 1)]))

    return make


def nested_ifs(depth: int) -> Maker:
    def make(folder: Path) -> Path:
        inner = [helper.make_node("Relu", ["x"], ["z0"])]
        for i in range(1, depth + 1):
            branch = graph_of(inner, f"z{i - 1}")
            inner = [
                helper.make_node(
                    "If",
                    ["c"],
                    [f"z{i}"],
                    then_branch=branch,
                    else_branch=branch if i < 4 else graph_of([helper.make_node("Relu", ["x"], ["e"])], "e"),
                )
            ]
        inputs = [value("x", [1, 4]), value("c", [], BOOL)]
        return save(folder, model(inner, inputs=inputs, outputs=[value(f"z{depth}", None)]))

    return make


def cyclic(folder: Path) -> Path:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    return save(folder, model([*nodes, helper.make_node("Relu", ["b"], ["y"])]))


def nodes_of(*nodes: NodeProto, **other: Any) -> Maker:
    return lambda folder: save(folder, model(nodes, **other))


def many_nodes(folder: Path) -> Path:
    nodes = [helper.make_node("Relu", ["x" if i == 0 else f"v{i}"], [f"v{i + 1}"]) for i in range(60_000)]
    return save(folder, model([*nodes, helper.make_node("Relu", ["v60000"], ["y"])]))


def invalid_utf8(folder: Path) -> Path:
    data = model([helper.make_node("Relu", ["x"], ["y"], name="NAMENAME")]).SerializeToString()
    return save(folder, data.replace(b"NAMENAME", b"\xff\xfe\xc0\x80\xf5\x80\x80\x80"))


def sparse(*indices: int, size: int = 4, scalars: bool = False) -> Maker:
    """`indices` of ones; `scalars`: values and indices of rank 0."""

    def make(folder: Path) -> Path:
        proto = model([helper.make_node("Add", ["x", "s"], ["y"])])
        shape = () if scalars else (len(indices),)
        tensor = onnx.SparseTensorProto(
            values=numpy_helper.from_array(np.ones(shape, np.float32), "s"),
            indices=numpy_helper.from_array(np.array(indices, np.int64).reshape(shape), "s_at"),
            dims=[size],
        )
        proto.graph.sparse_initializer.append(tensor)
        return save(folder, proto)

    return make


def varint(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _varint(number: int) -> bytes:
    out = bytearray()
    while True:
        out.append(number & 127 | (128 if number > 127 else 0))
        number >>= 7
        if not number:
            return bytes(out)


def claims(length: int) -> Maker:
    """A graph field that claims `length` bytes."""
    return lambda folder: save(folder, varint(1, 10) + _varint(7 << 3 | 2) + _varint(length) + bytes(16))


def groups(folder: Path) -> Path:
    """Start-group tags without end: recursion of the parser."""
    return save(folder, varint(1, 10) + _varint(99 << 3 | 3) * 200_000)


def attributes_nested(folder: Path) -> Path:
    """attribute -> graph -> node -> attribute ..., 2000 deep, by hand."""
    data = b""
    for _ in range(2000):
        graph = _varint(1 << 3 | 2) + _varint(len(data)) + data
        attribute = _varint(6 << 3 | 2) + _varint(len(graph)) + graph
        data = _varint(5 << 3 | 2) + _varint(len(attribute)) + attribute
    graph = _varint(1 << 3 | 2) + _varint(len(data)) + data
    return save(folder, varint(1, 10) + _varint(7 << 3 | 2) + _varint(len(graph)) + graph)


def scales(number: float) -> Maker:
    """A quantized layer whose scale is no number."""

    def make(folder: Path) -> Path:
        tensors = [
            numpy_helper.from_array(np.array(number, np.float32), "s"),
            numpy_helper.from_array(np.array(0, np.uint8), "z"),
            floats("w", 4, 5),
        ]
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
            helper.make_node("MatMul", ["d", "w"], ["y"]),
        ]
        return save(folder, model(nodes, tensors))

    return make


def old_upsample(folder: Path) -> Path:
    """What onnx's version converter cannot read: an old operator without the attribute it needs."""
    node = helper.make_node("Upsample", ["x"], ["y"])
    return save(folder, model([node], opset=7, inputs=[value("x", [1, 1, 2, 2])]))


def empty_attribute(folder: Path) -> Path:
    node = helper.make_node("Softmax", ["x"], ["y"])
    node.attribute.add(name="axis")
    return save(folder, model([node], opset=9))


def plain(kind: str) -> Maker:
    def make(folder: Path) -> Path:
        path = folder / "hostile.onnx"
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        elif kind == "huge":
            with path.open("wb") as file:
                file.truncate(1 << 33)
        elif kind == "empty":
            path.touch()
        return path

    return make
