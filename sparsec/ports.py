"""Inputs and outputs of a model: name, shape, type, and what whole numbers of 8 bits stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sparsec.errors import DataError


@dataclass(frozen=True)
class Quantization:
    """What whole numbers of 8 bits stand for: real = scale * (stored - zero_point)."""

    scale: float  # a float32
    zero_point: int

    def __str__(self) -> str:
        return f"real = {self.scale:.7g} * (stored - {self.zero_point})".replace("- -", "+ ")

    def quantize(self, real: np.ndarray, dtype: str) -> np.ndarray:
        """As ONNX's QuantizeLinear: divided in float32, rounded half to even, saturated. `dtype`: int8 or uint8.

        >>> Quantization(0.5, 128).quantize(np.array([0.25, 0.75, 100.0]), "uint8")
        array([128, 130, 255], dtype=uint8)
        """
        limits = np.iinfo(dtype)
        steps = np.rint(np.asarray(real, np.float32) / np.float32(self.scale)).astype(np.float64) + self.zero_point
        return np.clip(steps, limits.min, limits.max).astype(dtype)

    def dequantize(self, stored: np.ndarray) -> np.ndarray:
        """As ONNX's DequantizeLinear: float32."""
        return (stored.astype(np.int32) - self.zero_point).astype(np.float32) * np.float32(self.scale)


@dataclass(frozen=True)
class InputSpec:
    """An input or output of a model: `dtype` is NumPy's name."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    quantization: Quantization | None = None

    def stored(self, array: np.ndarray) -> np.ndarray:
        """`array` as the port takes it: floats for an 8-bit port are quantized."""
        if self.quantization is None or array.dtype.kind != "f":
            return array
        return self.quantization.quantize(array, self.dtype)

    def real(self, array: np.ndarray) -> np.ndarray:
        """The numbers that the port's `array` stands for: float32 where the port is quantized."""
        return array if self.quantization is None or array.dtype.kind == "f" else self.quantization.dequantize(array)


def numpy_type(kind: str) -> np.dtype:
    """NumPy's type for ONNX Runtime's word, such as `tensor(float)`. TypeError: it has none."""
    kind = kind.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(kind, kind))


def input_spec(value: ir.Value) -> InputSpec:
    """The spec of a model's input, whose shape is static."""
    assert value.shape is not None and value.dtype is not None
    return InputSpec(str(value.name), tuple(int(str(d)) for d in value.shape), str(value.dtype.numpy()))


def check_inputs(
    arrays: Mapping[str, np.ndarray], inputs: Sequence[InputSpec], where: str = "inputs"
) -> dict[str, np.ndarray]:
    """Exactly one sample for `run`: every input present, of the exact shape; contiguous, cast to the input's dtype."""
    from sparsec.targets import suggest

    names = [spec.name for spec in inputs]
    for name in arrays:
        if name not in names:
            raise DataError(f"{name!r} is no input of the model{suggest(name, names)}", where)
    checked = {}
    for spec in inputs:
        if spec.name not in arrays:
            raise DataError(f"input {spec.name!r} is missing: expected {spec.dtype} {list(spec.shape)}", where)
        array = np.asarray(arrays[spec.name])
        if array.shape != tuple(spec.shape):
            raise DataError(f"input {spec.name!r} expects shape {list(spec.shape)}, got {list(array.shape)}", where)
        if spec.quantization is not None and array.dtype.kind == "f":
            text = (
                f"input {spec.name!r} takes {spec.dtype}, got {array.dtype}; `Artifact.quantize` turns floats into it"
            )
            raise DataError(text, where)
        check_dtype(array, spec, where)
        checked[spec.name] = np.asarray(array, dtype=spec.dtype, order="C")
    return checked


def check_dtype(array: np.ndarray, spec: InputSpec, where: str) -> None:
    """Raise DataError unless `array` can be cast to the input's dtype without a loss, or quantized to it."""
    wanted, got = np.dtype(spec.dtype), array.dtype
    if spec.quantization is not None and got.kind == "f":
        return
    integers = got.kind in "iu" and wanted.kind in "iu"
    if integers or (got.kind == wanted.kind == "f") or np.can_cast(got, wanted, "safe"):
        if integers and array.size:
            limits = np.iinfo(wanted)
            if array.min() < limits.min or array.max() > limits.max:
                raise DataError(f"input {spec.name!r} holds values outside of {wanted}", where)
        return
    raise DataError(f"input {spec.name!r} expects {wanted}, got {got}", where)
