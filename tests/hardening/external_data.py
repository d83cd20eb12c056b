"""Hostile weights in files beside the model: paths that lead elsewhere, ranges that do not fit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hardening.making import BOOL, FLOAT, Maker, floats, graph_of, model, save, value
from onnx import TensorProto, helper


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


def not_text(text: bytes) -> Maker:
    """The same, `text` in the file no UTF-8."""

    def make(folder: Path) -> Path:
        path = external(nothing)(folder)
        path.write_bytes(path.read_bytes().replace(text, b"\xff" * len(text)))
        return path

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
