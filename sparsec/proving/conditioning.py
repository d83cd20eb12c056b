"""How far two correct implementations may differ in one sample, where sums of the model cancel in it.

`sparsec.proving.tolerance` takes every rounding as a share of the result of its sum. Where a sum cancels, roundings are of the
size of its terms and may be large beside the result, and the layers behind it enlarge them: silence in a detector of
speech, say. That depends on the sample and is measured in it, by Monte Carlo arithmetic (Parker, Pierce and Eggert,
"Monte Carlo arithmetic", 2000): the model is run with a normal error behind every operator, as large as that of one
implementation. A sum s = t_1 + ... + t_k has partial sums s_j; each addition rounds by at most u s_j, u = 2^-24, and with terms
in any order

    E s_j^2 = (j / k)^2 s^2 + j (k - j) / (k - 1) (Q - s^2 / k) / k,     Q = t_1^2 + ... + t_k^2
    variance of the error of s = sum over j of v E s_j^2 <= v k (s^2 / 3 + Q / 6),     v = u^2 / 3 of evenly distributed ones

Q is the same operator on squared inputs. A bias is one of the terms of a short sum and joins a long one at its end, as in
the kernels. What is no sum is off by sqrt(v n) |y|, n the roundings that the tolerance counts; a Sigmoid by u besides, in
absolute terms, and in normalizations x is rounded once more before its mean is taken. What an operator stores in float16 is
off by w |y|, w = 2^-11 / sqrt(3), and is rounded to float16 again.

A run with errors beside one without is one implementation beside another: 4 (standard deviations) times the largest root
mean square over RUNS of an element's difference is what two may differ by. Deterministic: the n-th call sees the n-th
random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from sparsec.kernels.base import LATE
from sparsec.proving.tolerance import HALF_ROUNDOFF, SIGMAS, UNIT_ROUNDOFF, roundings
from sparsec.runtimes.ort import OrtSession

RUNS = 8
ROUNDING = UNIT_ROUNDOFF / math.sqrt(3)  # root mean square
HALF_ROUNDING = HALF_ROUNDOFF / math.sqrt(3)

Arrays = Mapping[str, np.ndarray]

_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_MEANS = frozenset({"ReduceMean", "AveragePool", "GlobalAveragePool"})
_NORMALIZATIONS = frozenset({"LayerNormalization", "InstanceNormalization", "GroupNormalization"})


class Conditioning:
    """The law for one model, given as bytes with the types and shapes of all values."""

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._sessions: tuple[OrtSession, OrtSession] | None = None

    def bounds(self, sample: Arrays) -> dict[str, float]:
        """The largest absolute difference of each floating-point output in `sample`; NaN where there is none."""
        if self._sessions is None:
            shaken = with_errors(onnx.load_model_from_string(self._model)).SerializeToString()
            plain, noisy = (OrtSession(m, where="model.onnx", optimize=False) for m in (self._model, shaken))
            self._sessions = plain, noisy
        plain, noisy = self._sessions
        wanted = {name: y.astype(np.float64) for name, y in plain.run(dict(sample)).items() if y.dtype.kind == "f"}
        squares = {name: np.zeros_like(y) for name, y in wanted.items()}
        for _ in range(RUNS):
            got = noisy.run(dict(sample))
            for name, y in wanted.items():
                squares[name] += (got[name] - y) ** 2
        return {name: SIGMAS * math.sqrt(float(total.max(initial=0)) / RUNS) for name, total in squares.items()}


def with_errors(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the error of one float32 implementation behind every operator that rounds."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    writer = _Writer()
    for node, known in zip(model.graph.node, ir.from_proto(model).graph, strict=True):
        writer.add(node, known)
    del made.graph.node[:]
    made.graph.node.extend(writer.nodes)
    made.graph.initializer.extend(writer.constants)
    return made


class _Writer:
    """Writes a graph's nodes anew, with errors."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, node: onnx.NodeProto, known: ir.Node) -> None:
        """One node of the model; `known`: the same with types and shapes."""
        length = roundings(known)
        half = any(y.dtype == ir.DataType.FLOAT16 for y in known.outputs)
        if half and (length or node.op_type == "Cast"):
            self._other(node, known, length)
        elif not length or all(y.dtype != ir.DataType.FLOAT for y in known.outputs):
            self.nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
        elif node.op_type in _PRODUCTS:
            self._product(node, known, length)
        elif node.op_type in _MEANS or node.op_type == "ReduceSum":
            x, *axes = node.input
            squares = self._like(node, [self._op("Mul", x, x), *axes])
            if node.op_type in _MEANS:  # of x / k, whose squares are k times smaller than their mean's
                squares = self._op("Mul", squares, self._constant(1 / length))
            self._sum(self._like(node, list(node.input)), squares, length, node.output[0])
        else:
            self._other(node, known, length)

    def _product(self, node: onnx.NodeProto, known: ir.Node, length: int) -> None:
        """op(a, b) with its error; a bias is a term of it, or added behind."""
        a, b, *rest = node.input
        total = self._like(node, [a, b])
        squares = self._like(node, [self._op("Mul", a, a), self._op("Mul", b, b)], squared=True)
        if not rest or not rest[0]:
            self._sum(total, squares, length, node.output[0])
            return
        bias = rest[0]
        if node.op_type == "Gemm":
            beta = next((x.f for x in node.attribute if x.name == "beta"), 1.0)
            bias = self._op("Mul", bias, self._constant(beta))
        else:
            spatial = len(known.outputs[0].shape or ()) - 2
            bias = self._op("Unsqueeze", bias, self._constant(list(range(1, 1 + spatial)), np.int64))
        if length >= LATE:
            self._op("Add", self._sum(total, squares, length), bias, into=node.output[0])
        else:
            squares = self._op("Add", squares, self._op("Mul", bias, bias))
            self._sum(self._op("Add", total, bias), squares, length, node.output[0])

    def _sum(self, total: str, squares: str, length: int, into: str = "") -> str:
        """total + sqrt(v k / 3) total g + sqrt(v k / 6 Q) g', g and g' normal."""
        of_total = self._error(total, total, ROUNDING * math.sqrt(length / 3))
        of_terms = self._error(total, self._op("Sqrt", squares), ROUNDING * math.sqrt(length / 6))
        return self._op("Add", total, self._op("Add", of_total, of_terms), into=into)

    def _other(self, node: onnx.NodeProto, known: ir.Node, length: int) -> None:
        """Errors that are a share of the result."""
        inputs = list(node.input)
        if (
            node.op_type in _NORMALIZATIONS
            and known.inputs[0] is not None
            and known.inputs[0].dtype == ir.DataType.FLOAT
        ):
            inputs[0] = self._op("Add", inputs[0], self._error(inputs[0], inputs[0], ROUNDING))
        plain = [f"{name}/plain" if name else "" for name in node.output]
        made = self._copied(node, inputs)
        made.output.extend(plain)
        self.nodes.append(made)
        for value, name, y in zip(known.outputs, plain, node.output, strict=True):
            if not y:
                continue
            if value.dtype == ir.DataType.FLOAT16:
                wide = self._cast(name, onnx.TensorProto.FLOAT)
                noisy = self._op("Add", wide, self._error(wide, wide, HALF_ROUNDING))
                self._cast(noisy, onnx.TensorProto.FLOAT16, into=y)
                continue
            if value.dtype != ir.DataType.FLOAT:
                self._op("Identity", name, into=y)
                continue
            error = self._error(name, name, ROUNDING * math.sqrt(length))
            if node.op_type == "Sigmoid":
                error = self._op("Add", error, self._error(name, self._constant(1.0), UNIT_ROUNDOFF))
            self._op("Add", name, error, into=y)

    def _error(self, like: str, size: str, factor: float) -> str:
        """Normal values in the shape of `like`, times `size` and `factor`."""
        drawn = self._fresh()
        self.nodes.append(
            helper.make_node("RandomNormalLike", [like], [drawn], scale=factor, seed=float(len(self.nodes)))
        )
        return self._op("Mul", drawn, size)

    def _like(self, node: onnx.NodeProto, inputs: list[str], squared: bool = False) -> str:
        """The result of the same operator on other inputs, without a bias. squared: a factor counts twice."""
        made = self._copied(node, inputs)
        for attribute in made.attribute:
            if squared and attribute.name == "alpha":
                attribute.f *= attribute.f
        made.output.append(self._fresh())
        self.nodes.append(made)
        return made.output[0]

    def _copied(self, node: onnx.NodeProto, inputs: list[str]) -> onnx.NodeProto:
        made = onnx.NodeProto.FromString(node.SerializeToString())
        del made.input[:], made.output[:]
        made.input.extend(inputs)
        made.ClearField("name")
        return made

    def _op(self, kind: str, *inputs: str, into: str = "") -> str:
        result = into or self._fresh()
        self.nodes.append(helper.make_node(kind, list(inputs), [result]))
        return result

    def _cast(self, x: str, to: int, into: str = "") -> str:
        result = into or self._fresh()
        self.nodes.append(helper.make_node("Cast", [x], [result], to=to))
        return result

    def _constant(self, value: Any, dtype: Any = np.float32) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), self._fresh()))
        return self.constants[-1].name

    def _fresh(self) -> str:
        return f"sparsec/error/{len(self.nodes)}/{len(self.constants)}"
