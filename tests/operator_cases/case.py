"""A case of one operator, and the arrays that cases are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """One node: `x` are activations, `constants` follow them as initializers (None: input left out)."""

    op: str
    x: tuple[Any, ...]
    constants: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    depth: int = 1  # length of the longest sum behind one result
    outputs: int = 1
    opset: int = 17

    @property
    def id(self) -> str:
        return self.op + (f"-{self.name}" if self.name else "")


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return np.abs(floats(*shape, seed=3)) + np.float32(0.1)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def logical(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.5


A, B = floats(2, 5, 7, seed=1), floats(2, 5, 7, seed=2)
IMAGE = floats(1, 6, 9, 11)
INTS = np.random.default_rng(5).integers(-9, 9, (3, 10))
F32 = np.float32
BYTES = np.random.default_rng(6).integers(0, 256, (1, 6, 9, 11)).astype(np.uint8)
SIGNED = (BYTES.astype(np.int16) - 128).astype(np.int8)
HALVES = np.array([[-1e9, -3.75, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 40.25, 1e9]], F32)  # halves of the scale 0.5
