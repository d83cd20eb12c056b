"""How far two correct implementations of a quantized model may differ.

A QuantizeLinear rounds. Two implementations that sum in another order, or fuse a scale into another, hand it values that
differ in their last bits; where one of them lies at a tie, they round to neighbouring steps, and that difference is
rounded again, and grows, in every layer behind. So no bound of a few units in the last place holds, and "one step of the
output" holds for most elements only. What does hold is derived from the model and the sample by chance, never from what
the compiled code returned:

    step     of an output: the scale s of the last QuantizeLinear before it. Where float operators stand behind that,
             sqrt(6) * rms(d), d the difference that random rounding of the last QuantizeLinear makes at the output
             (random rounding, up with the probability of the fraction, has variance s^2 / 6 where no operator follows),
             and at least what float arithmetic makes of an output that no rounding reaches in this sample
    bound    of the largest difference in a sample: FURTHEST times the largest that RUNS random roundings of every
             QuantizeLinear make in it, or that the witness has from the reference: an engine's fused kernels may lie
             further from the operators one by one than rounding alone would have it
    witness  another correct implementation: node by node in float32, each value changed by up to LAST_BITS of itself
             (HALF_BITS behind float16) before it is rounded, as another order of summation does. Ties fall either way
    share    of elements beyond one step, at most SHARE; or, where the witness itself has k such elements among the same
             ones, twice what may lie behind such a count (k + 3 + 2 sqrt(k), 97% of a Poisson distribution)

A QuantizeLinear of an input of the model sees the same numbers everywhere and rounds them the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from sparsec.passes.normalization.fold_constants import constant
from sparsec.passes.normalization.normalize_qdq import MOVES
from sparsec.proving.tolerance import behind_half, derive_stored_half_tolerance, derive_tolerance
from sparsec.runtimes.ort import OrtSession

SHARE = 0.001
FURTHEST = 2.0
RUNS = 4
LAST_BITS = 2.0**-20  # 16 units of float32: two sums of 128 products, 2^-24 * sqrt(2 * 128)
HALF_BITS = 2.0**-10  # two implementations that round to neighbouring numbers of float16

Arrays = Mapping[str, np.ndarray]

_SELECTING = frozenset({*MOVES, "Clip", "Concat", "Identity", "Pad", "Relu"})


class Rounding:
    """The law for one quantized model; `outputs` are the names of those that a QuantizeLinear reaches.

    Everything is deterministic: the n-th call sees the n-th random numbers.
    """

    def __init__(self, model: bytes) -> None:
        self._proto = onnx.load_model_from_string(model)
        whole = ir.from_proto(self._proto)
        self._graph = whole.graph
        halves, floats, half = (
            behind_half(whole.graph.outputs),
            derive_tolerance(whole),
            derive_stored_half_tolerance(whole),
        )
        self._floats = {str(y.name): half if y.name in halves else floats for y in whole.graph.outputs}
        last = {str(y.name): [str(node.name) for node in _last(y)] for y in self._graph.outputs}
        self._last = {name: nodes for name, nodes in last.items() if nodes}
        self._own = {str(y.name): _own_step(y) for y in self._graph.outputs}
        rounds = {str(node.name): node.inputs[0] for node in self._graph if _rounds(node)}
        self._all = list(rounds)
        halves = behind_half(x for x in rounds.values() if x is not None)
        self._bits = {
            name: HALF_BITS if x is not None and x.name in halves else LAST_BITS for name, x in rounds.items()
        }
        self._sessions: dict[tuple[str, ...], OrtSession] = {}

    @property
    def signature(self) -> tuple[str, ...]:
        """Names of all outputs."""
        return tuple(self._own)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names in signature order."""
        return tuple(self._last)

    def witness(self, sample: Arrays) -> dict[str, np.ndarray]:
        """Outputs of another correct implementation."""
        return self._run(self._bits, sample, relative=True)

    def step(self, name: str, sample: Arrays) -> float:
        """One step of an output, in the output's own unit (1 for stored whole numbers)."""
        own = self._own[name]
        if own is not None:
            return own
        plain = self._run({}, sample)[name]
        rounded = self._moved(self._last[name], sample)[name]
        floats = self._floats[name] * float(np.abs(plain[np.isfinite(plain)]).max(initial=0))
        return max(math.sqrt(6 * float(np.mean(rounded**2))), floats)

    def bounds(self, sample: Arrays, reference: Arrays | None = None) -> dict[str, float]:
        """The largest difference that each output may have from `reference`, at least its step."""
        furthest = {name: float(moved.max(initial=0)) for name, moved in self._moved(self._all, sample).items()}
        if reference is not None:
            witness = self.witness(sample)
            apart = {name: float(_difference(witness[name], reference[name]).max(initial=0)) for name in self.outputs}
            furthest = {name: max(furthest[name], apart[name]) for name in self.outputs}
        return {name: max(FURTHEST * furthest[name], self.step(name, sample)) for name in self.outputs}

    def _moved(self, nodes: list[str], sample: Arrays) -> dict[str, np.ndarray]:
        """|difference| that random rounding of `nodes` makes, [RUNS, ...] by output."""
        plain = self._run({}, sample)
        runs = [self._run(dict.fromkeys(nodes, 0.5), sample) for _ in range(RUNS)]
        return {name: np.stack([_difference(run[name], plain[name]) for run in runs]) for name in self.outputs}

    def _run(self, amplitudes: Mapping[str, float], sample: Arrays, relative: bool = False) -> dict[str, np.ndarray]:
        key = (str(relative), *amplitudes)
        if key not in self._sessions:
            shaken = _shaken(self._proto, amplitudes, relative)
            self._sessions[key] = OrtSession(shaken.SerializeToString(), where="model.onnx", optimize=False)
        return self._sessions[key].run(dict(sample))


def rounding(model: bytes) -> Rounding | None:
    """The law for a model; None if rounding reaches none of its outputs."""
    law = Rounding(model)
    return law if law.outputs else None


def beyond(got: np.ndarray, reference: np.ndarray, step: float) -> int:
    """How many elements differ by more than a step; float arithmetic around it may add a thousandth."""
    return int(np.count_nonzero(~(_difference(got, reference) <= 1.001 * step)))


def allowed_count(elements: int, witnessed: int) -> float:
    """How many of `elements` may be beyond a step, where the witness has `witnessed`."""
    return max(SHARE * elements, 2 * (witnessed + 3 + 2 * math.sqrt(witnessed)))


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(np.float64) - b.astype(np.float64))


# ---- which QuantizeLinear matter


def _rounds(node: ir.Node) -> bool:
    """Whether it is a QuantizeLinear of something computed."""
    if node.op_type != "QuantizeLinear":
        return False
    value = node.inputs[0]
    while value is not None:
        maker = value.producer()
        if maker is None:
            return False
        if maker.op_type not in (*MOVES, "Identity", "Pad"):
            return True
        value = maker.inputs[0]
    return False


def _last(output: ir.Value) -> list[ir.Node]:
    """QuantizeLinear nodes from which a way leads to `output` without another one."""
    found: list[ir.Node] = []
    seen: set[ir.Value] = set()
    pending = [output]
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None or value in seen:
            continue
        seen.add(value)
        if node.op_type == "QuantizeLinear":
            found += [node] if _rounds(node) else []
        else:
            pending += [x for x in node.inputs if x is not None]
    return found


def _own_step(output: ir.Value) -> float | None:
    """The scale in which `output` is counted, if only operators that select values stand behind its QuantizeLinear."""
    steps: set[float] = set()
    pending = [output]
    real = False
    while pending:
        node = pending.pop().producer()
        if node is None:
            continue
        if node.op_type == "QuantizeLinear":
            scale = constant(node.inputs[1])
            if scale is None:
                return None
            steps.add(float(scale.max()) if real else 1.0)
        elif node.op_type == "DequantizeLinear" or node.op_type in _SELECTING:
            real = real or node.op_type == "DequantizeLinear"
            data = node.inputs if node.op_type == "Concat" else node.inputs[:1]
            pending += [x for x in data if x is not None]
        else:
            return None
    return max(steps) if steps else None


# ---- random rounding


def _shaken(proto: onnx.ModelProto, amplitudes: Mapping[str, float], relative: bool = False) -> onnx.ModelProto:
    """`proto` where what the QuantizeLinear nodes of `amplitudes` read is moved at random by up to so many steps.

    relative: by up to so much of itself.
    """
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    nodes: list[onnx.NodeProto] = []
    for i, node in enumerate(made.graph.node):
        amplitude = amplitudes.get(node.name)
        if amplitude is not None:
            x, base = node.input[0], f"{node.name}/{i}"
            seed: dict[str, Any] = {"low": -amplitude, "high": amplitude, "seed": float(i + 1)}
            noise = [f"{base}/steps", f"{base}/noise", f"{base}/moved"]
            nodes.append(helper.make_node("RandomUniformLike", [x], noise[:1], **seed))
            unit = helper.make_node("Mul", [noise[0], x], noise[1:2])
            nodes.append(unit if relative else _scaled(node, noise[0], noise[1], made.graph))
            nodes.append(helper.make_node("Add", [x, noise[1]], noise[2:]))
            node.input[0] = noise[2]
        nodes.append(node)
    fresh = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del made.graph.node[:]
    made.graph.node.extend(fresh)
    return made


def _scaled(node: onnx.NodeProto, steps: str, noise: str, graph: onnx.GraphProto) -> onnx.NodeProto:
    """steps * scale: DequantizeLinear knows how a scale lies along its axis, but reads whole numbers only."""
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    scale = next((t for t in graph.initializer if t.name == node.input[1]), None)
    if scale is None or not scale.dims:
        return helper.make_node("Mul", [steps, node.input[1]], [noise])
    shape = next(v.type.tensor_type.shape for v in (*graph.value_info, *graph.output) if v.name == node.output[0])
    wide = [1] * len(shape.dim)
    wide[axis] = -1
    tensor = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale).reshape(wide), f"{noise}/scale")
    graph.initializer.append(tensor)
    return helper.make_node("Mul", [steps, tensor.name], [noise])
