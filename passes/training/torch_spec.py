"""One ONNX node as the makers of torch functions see it: attributes, static shapes, constant inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

Tensor = torch.Tensor
Function = Callable[..., Any]  # Tensor | None, ... -> Tensor, or a tuple of them


class Unsupported(Exception):
    """Why a node cannot be executed in torch."""


@dataclass(frozen=True)
class Spec:
    """One node as the makers below see it: attributes, static shapes, constant inputs; `floats`: what floats are held in."""

    node: ir.Node
    floats: torch.dtype = torch.float32

    def int(self, name: str, default: int) -> int:
        """An integer attribute."""
        return self.node.attributes.get_int(name, default)

    def float(self, name: str, default: float) -> float:
        """A float attribute."""
        return self.node.attributes.get_float(name, default)

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        return self.node.attributes.get_string(name, default)

    def ints(self, name: str) -> list[int] | None:
        """An attribute of several integers, None if absent."""
        found = self.node.attributes.get_ints(name, None)
        return None if found is None else list(found)

    def has(self, index: int) -> bool:
        """Whether the optional input is given."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def constant(self, index: int, what: str) -> list[Any]:
        """The elements of a constant input. Raises Unsupported if it is computed."""
        value = self.node.inputs[index]
        if value is None or value.const_value is None or value.is_graph_input():
            raise Unsupported(f"its {what} is computed")
        return value.const_value.numpy().reshape(-1).tolist()

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """The static shape of an input. Raises Unsupported if it has none."""
        return static_shape(self.node.inputs[index])

    def out(self, index: int = 0) -> tuple[int, ...]:
        """The static shape of an output. Raises Unsupported if it has none."""
        return static_shape(self.node.outputs[index])

    def axis(self, default: int, rank: int) -> int:
        """The attribute `axis` counted from the front."""
        return self.int("axis", default) % max(rank, 1)


def following(constant: Tensor) -> Callable[[Tensor], Tensor]:
    """Gives a function's own constant on the device of what it meets, floats in its type; moved once."""
    moved: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def at(x: Tensor) -> Tensor:
        key = x.device, x.dtype if constant.is_floating_point() else constant.dtype
        if key not in moved:
            moved[key] = constant.to(*key)
        return moved[key]

    return at


def static_shape(value: ir.Value | None) -> tuple[int, ...]:
    if value is not None and value.shape is None and value.const_value is not None:
        return tuple(int(str(d)) for d in value.const_value.shape)
    if value is None or value.shape is None or not all(isinstance(d, int) for d in value.shape):
        raise Unsupported("its shape is not fixed")
    return tuple(int(str(d)) for d in value.shape)
