"""Model files that a stranger might send, each made by a few lines: `CASES` maps a name to (maker, what the refusal says).

A maker gets an empty folder and returns the path of the model in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

Maker = Callable[[Path], Path]
FLOAT, INT64, BOOL, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING


def value(name: str, dims: Sequence[int | str] | None, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, dims)


def model(
    nodes: Sequence[NodeProto], initializers: Sequence[TensorProto] = (), opset: int = 21, **other: Any
) -> ModelProto:
    """x[1, 4] to y."""
    inputs = other.pop("inputs", [value("x", [1, 4])])
    outputs = other.pop("outputs", [value("y", None)])
    graph = helper.make_graph(list(nodes), "g", inputs, outputs, list(initializers))
    opsets = [helper.make_opsetid("", opset), *other.pop("opsets", [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, **other)


def save(folder: Path, proto: ModelProto | bytes) -> Path:
    path = folder / "hostile.onnx"
    path.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
    return path


def int64(name: str, *numbers: int) -> TensorProto:
    return numpy_helper.from_array(np.array(numbers, np.int64), name)


def floats(name: str, *shape: int) -> TensorProto:
    return numpy_helper.from_array(np.ones(shape, np.float32), name)


def graph_of(nodes: Sequence[NodeProto], output: str, inputs: Sequence[onnx.ValueInfoProto] = ()) -> GraphProto:
    return helper.make_graph(list(nodes), "inner", list(inputs), [value(output, None)])


# ---- external data


def external(change: Callable[[Path, TensorProto], None], **entries: str) -> Maker:
    """A MatMul whose weight [4, 5] lies in weights.bin; `change` makes it hostile."""

    def make(folder: Path) -> Path:
        (folder / "weights.bin").write_bytes(bytes(80))
        tensor = floats("w", 4, 5)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in {"location": "weights.bin", **entries}.items():
            tensor.external_data.add(key=key, value=text)
        change(folder, tensor)
        return save(folder, model([helper.make_node("MatMul", ["x", "w"], ["y"])], [tensor]))

    return make


def nothing(folder: Path, tensor: TensorProto) -> None:
    pass


def secret(folder: Path) -> Path:
    path = folder.parent / f"{folder.name}-secret"
    path.write_bytes(bytes(80))
    return path


def symlink(folder: Path, tensor: TensorProto) -> None:
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").symlink_to(secret(folder))


def symlinked_folder(folder: Path, tensor: TensorProto) -> None:
    (folder / "sub").symlink_to(secret(folder).parent)


def hard_link(folder: Path, tensor: TensorProto) -> None:
    (folder / "weights.bin").unlink()
    os.link(secret(folder), folder / "weights.bin")


def fifo(folder: Path, tensor: TensorProto) -> None:
    (folder / "weights.bin").unlink()
    os.mkfifo(folder / "weights.bin")


def repeated_key(folder: Path, tensor: TensorProto) -> None:
    tensor.external_data.add(key="location", value="/etc/passwd")


def raw_too(folder: Path, tensor: TensorProto) -> None:
    tensor.raw_data = bytes(80)


def dims(*sizes: int) -> Callable[[Path, TensorProto], None]:
    def change(folder: Path, tensor: TensorProto) -> None:
        del tensor.dims[:]
        tensor.dims.extend(sizes)

    return change


def overlapping(folder: Path) -> Path:
    (folder / "weights.bin").write_bytes(bytes(100))
    tensors = []
    for name, offset in (("a", 0), ("b", 16)):
        tensor = TensorProto(name=name, data_type=FLOAT, dims=[4, 5], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="weights.bin")
        tensor.external_data.add(key="offset", value=str(offset))
        tensors.append(tensor)
    nodes = [helper.make_node("Add", ["a", "b"], ["w"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
    return save(folder, model(nodes, tensors))


def one_range_many_times(folder: Path) -> Path:
    """A sparse gigabyte on disk that 40 tensors claim."""
    with (folder / "weights.bin").open("wb") as file:
        file.truncate(1 << 30)
    tensors = []
    for i in range(40):
        tensor = TensorProto(name=f"w{i}", data_type=FLOAT, dims=[1 << 28], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="weights.bin")
        tensors.append(tensor)
    return save(folder, model([helper.make_node("Sum", [t.name for t in tensors], ["y"])], tensors))


def external_in_branch(folder: Path) -> Path:
    """Traversal from a constant inside a branch of an If."""
    tensor = TensorProto(name="c", data_type=FLOAT, dims=[20], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../x")
    inner = graph_of([helper.make_node("Constant", [], ["z"], value=tensor)], "z")
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)]
    return save(folder, model(nodes, inputs=[value("c", [], BOOL)]))


# ---- sizes


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


# ---- structure


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


def sparse(*indices: int, size: int = 4) -> Maker:
    def make(folder: Path) -> Path:
        proto = model([helper.make_node("Add", ["x", "s"], ["y"])])
        tensor = onnx.SparseTensorProto(
            values=numpy_helper.from_array(np.ones(len(indices), np.float32), "s"),
            indices=numpy_helper.from_array(np.array(indices, np.int64), "s_at"),
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


def attribute_tensor(name: str, array: np.ndarray) -> TensorProto:
    return numpy_helper.from_array(array, name)


CASES: dict[str, tuple[Maker, str]] = {
    "traversal": (external(nothing, location="../hostile-secret"), "lies outside the model's folder"),
    "traversal-deep": (external(nothing, location="a/b/../../../../../../etc/passwd"), "lies outside"),
    "absolute": (external(nothing, location="/etc/passwd"), "expected a relative path"),
    "backslash": (external(nothing, location="..\\secret"), "expected a relative path"),
    "nul": (external(nothing, location="weights.bin\0x"), "expected a relative path"),
    "long-location": (external(nothing, location="x" * 70000), "a path of 70000 characters"),
    "long-name": (nodes_of(helper.make_node("Relu", ["x"], ["y"], name="n" * 70000)), "more than 4096 characters"),
    "empty-location": (external(nothing, location=""), "expected a relative path"),
    "folder-location": (external(nothing, location="."), "lies outside the model's folder"),
    "symlink": (external(symlink), "lies outside the model's folder"),
    "symlinked-folder": (external(symlinked_folder, location="sub/x-secret"), "lies outside|no such file"),
    "hard-link": (external(hard_link), "hard links"),
    "fifo": (external(fifo), "not a regular file"),
    "repeated-key": (external(repeated_key), "given twice"),
    "raw-and-external": (external(raw_too), "data of its own and in another file"),
    "negative-offset": (external(nothing, offset="-4"), "offset -4"),
    "huge-offset": (external(nothing, offset=str(1 << 62)), "expected at least"),
    "overflowing-offset": (external(nothing, offset=str((1 << 64) - 80)), "must be integers|at least"),
    "negative-length": (external(nothing, length="-80"), "got length -80"),
    "long-number": (external(nothing, length="9" * 5000), "must be integers"),
    "past-the-end": (external(nothing, offset="4"), "expected at least 84"),
    "external-huge-dims": (external(dims(1 << 40, 1 << 40)), "elements"),
    "external-overflowing-dims": (external(dims(1 << 32, 1 << 32)), "elements"),
    "external-negative-dims": (external(dims(-4, -5)), "negative dimension"),
    "overlapping": (overlapping, "overlaps"),
    "one-range-many-times": (one_range_many_times, "bytes of external data"),
    "external-in-branch": (external_in_branch, "lies outside"),
    "huge-dims": (weight(set_dims(1 << 40)), "elements"),
    "overflowing-dims": (weight(set_dims(1 << 32, 1 << 32)), "elements"),
    "negative-dims": (weight(set_dims(-4, -5)), "negative dimension"),
    "many-dims": (weight(set_dims(*[1] * 100)), "100 dimensions"),
    "short-data": (weight(short_raw), "got 76"),
    "short-typed-data": (weight(typed_short), "got 19"),
    "long-data": (weight(set_dims(4, 4)), "got 80"),
    "unknown-type": (weight(set_type(77)), "unknown element type 77"),
    "undefined-type": (weight(set_type(0)), "unknown element type 0"),
    "wrong-type": (weight(set_type(TensorProto.INT32)), "."),
    "string-weight": (weight(set_type(STRING)), "got 0"),
    "input-huge": (large_input(1 << 20, 1 << 20), "elements"),
    "input-negative": (large_input(1, -4), "-4"),
    "constant-of-shape": (bomb("ConstantOfShape", 1 << 20, 1 << 20), "elements"),
    "expand": (bomb("Expand", 1 << 20, 1 << 20), "elements"),
    "tile": (bomb("Tile", 1 << 20, 1 << 20), "elements"),
    "range": (bomb("Range", 0, 1 << 40, 1), "elements"),
    "range-backwards": (bomb("Range", 1 << 40, 0, -1), "elements"),
    "range-without-step": (bomb("Range", 0, 10, 0), "step of 0"),
    "chain-of-tiles": (chain_of_tiles, "folded-bytes|elements"),
    "grows-at-run-time": (grows_at_run_time, "elements"),
    "eats-memory": (eats_memory_at_run_time, "limit memory"),
    "loop": (loop(1 << 40), "at most 64 are written out"),
    "loop-without-end": (without_condition, "at most 64 are written out"),
    "loops-in-loops": (loops_in_loops, "limit unroll"),
    "recursive-function": (functions({"f0": ["f0"]}), "calls itself"),
    "mutual-recursion": (functions({"f0": ["f1"], "f1": ["f2"], "f2": ["Relu", "f0"]}), "calls itself"),
    "billion-functions": (functions({**{f"f{i}": [f"f{i + 1}"] * 10 for i in range(9)}, "f9": ["Relu"]}), "limit nodes"),
    "deep-functions": (functions({**{f"f{i}": [f"f{i + 1}"] for i in range(40)}, "f40": ["Relu"]}), "limit depth"),
    "nested-ifs": (nested_ifs(20), "limit depth"),
    "nested-messages": (attributes_nested, "cannot be decoded"),
    "unending-groups": (groups, "cannot be decoded"),
    "claims-4-gb": (claims((1 << 32) - 1), "cannot be decoded"),
    "claims-2-to-63": (claims((1 << 63) - 1), "cannot be decoded"),
    "cyclic": (cyclic, "topologically sorted"),
    "many-nodes": (many_nodes, "limit nodes"),
    "duplicate-output": (
        nodes_of(helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["y"])), "SSA|single assignment"
    ),
    "missing-input": (nodes_of(helper.make_node("Add", ["x", "nowhere"], ["y"])), "nowhere"),
    "too-few-inputs": (nodes_of(helper.make_node("Conv", ["x"], ["y"])), "Conv"),
    "wrong-attribute": (nodes_of(helper.make_node("Softmax", ["x"], ["y"], axis="one")), "axis"),
    "axis-out-of-range": (nodes_of(helper.make_node("Softmax", ["x"], ["y"], axis=1 << 40)), "does not exist"),
    "unknown-operator": (nodes_of(helper.make_node("RunShellCommand", ["x"], ["y"])), "RunShellCommand"),
    "custom-library": (
        nodes_of(helper.make_node("Evil", ["x"], ["y"], domain="evil.so"), opsets=[helper.make_opsetid("evil.so", 1)]),
        "Evil",
    ),
    "invalid-utf-8": (invalid_utf8, "not UTF-8"),
    "sparse-out-of-range": (sparse(1, 99), "lies outside"),
    "sparse-negative": (sparse(-1, 2), "lies outside"),
    "sparse-huge": (sparse(0, size=1 << 29), "written out"),
    "nan-scale": (scales(float("nan")), "scale"),
    "zero-scale": (scales(0.0), "scale"),
    "infinite-scale": (scales(float("inf")), "scale"),
    "upsample-without-scales": (old_upsample, "."),
    "attribute-without-type": (empty_attribute, "."),
    "opset-of-the-future": (nodes_of(helper.make_node("Relu", ["x"], ["y"]), opset=1 << 40), "."),
    "opset-negative": (nodes_of(helper.make_node("Relu", ["x"], ["y"]), opset=-3), "."),
    "file-fifo": (plain("fifo"), "not a regular file"),
    "file-device": (plain("device"), "not a regular file"),
    "file-folder": (plain("folder"), "this is a folder"),
    "file-huge": (plain("huge"), "at most"),
    "file-empty": (plain("empty"), "empty"),
}  # fmt: skip
