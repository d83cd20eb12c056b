"""Write GRU, LSTM and RNN as matrix products and elementwise operators, one step after the other.

With x_t [B, I], h_t [B, H], weights W [G*H, I] and R [G*H, H] of one direction, sums as operators of ONNX:

    all steps at once     a = X W^T + b_W (+ b_R where it is only added)                    [T, B, G*H]
    RNN    (G = 1)        h' = f(a_t + h R^T)
    GRU    (G = 3: z r n) z, r = f(a_t + h R^T);  n = g(a_t + r * (h R_n^T + b_Rn))         linear_before_reset = 1
                                                  n = g(a_t + (r * h) R_n^T)                otherwise
                          h' = (1 - z) * n + z * h
    LSTM   (G = 4: i o f c)  i, f = f(a_t + h R^T + p * c);  c' = f * c + i * g(...);  o = f(... + p_o * c')
                          h' = o * k(c')

The products become layers like any other: they are pruned, quantized and get (sparse) kernels. Steps of one direction
read the same weights. A sequence longer than `steps` stays as it is; sequence_lens stops a row where it is short.

Equal to the operator up to rounding: https://onnx.ai/onnx/operators/onnx__LSTM.html and its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from sparsec.passes.normalization.control_flow import UNROLL_STEPS
from sparsec.passes.normalization.fold_constants import FoldConstants, constant, static_shape
from sparsec.rewriting.passes_api import Context, Pass, PassResult

_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
RECURRENT = frozenset(_GATES)
_DEFAULTS = {"RNN": ("Tanh",), "GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}
_PLAIN = ("Relu", "Tanh", "Sigmoid", "Softsign", "Softplus")
_WITH_ALPHA = {"LeakyRelu": 0.01, "ThresholdedRelu": 1.0, "Elu": 1.0}

Apply = Callable[[ir.Value], ir.Value]


@dataclass(frozen=True)
class UnrollRecurrent(Pass):
    """Write GRU, LSTM and RNN out step by step, so that their products get kernels of their own."""

    name: ClassVar[str] = "unroll-recurrent"
    exact: ClassVar[bool] = True

    steps: int = UNROLL_STEPS  # the longest sequence that is written out

    def call(self, model: ir.Model) -> PassResult:
        done = []
        for node in list(model.graph):
            if node.op_type in _GATES and node.domain in ("", "ai.onnx") and refusal(node, self.steps) is None:
                done.append(f"{node.op_type} {node.name}")
                _Unrolled(model.graph, node).write()
        if done:
            FoldConstants()(model)
            Context.of(model).records.append({"unrolled": done})
        return PassResult(model, bool(done))


def refusal(node: ir.Node, steps: int) -> str | None:
    """Why a recurrent node is not written out, or None."""
    assert node.inputs[0] is not None
    shape = static_shape(node.inputs[0])
    if shape is None:
        return "the shape of its input is not known"
    length = shape[1 if node.attributes.get_int("layout", 0) else 0]
    if length > steps:
        return f"its sequence has {length} steps, at most {steps} are written out"
    for name in _activations(node):
        if name not in (*_PLAIN, *_WITH_ALPHA, "HardSigmoid", "ScaledTanh", "Affine"):
            return f"the activation {name!r} is unknown"
    return None


def _activations(node: ir.Node) -> list[str]:
    directions = 2 if node.attributes.get_string("direction", "forward") == "bidirectional" else 1
    given = node.attributes.get("activations")
    return list(given.as_strings()) if given is not None else list(_DEFAULTS[node.op_type]) * directions


class _Unrolled:
    """Writes what replaces `node` in front of it."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        self.name = str(node.name or node.outputs[0].name)
        self.count = 0
        self.kind = node.op_type
        self.hidden = self._hidden_size()
        assert node.inputs[0] is not None
        assert node.inputs[0].dtype is not None
        self.dtype = node.inputs[0].dtype.numpy()
        self.clip = node.attributes.get_float("clip", 0.0)

    def _hidden_size(self) -> int:
        recurrence = self.node.inputs[2]
        shape = static_shape(recurrence) if recurrence is not None else None
        return shape[-1] if shape is not None else self.node.attributes.get_int("hidden_size", 0)

    # -- nodes

    def op(self, kind: str, *inputs: ir.Value | None, outputs: int = 1, what: str = "", **attributes: Any) -> Any:
        """The output of a new node, or its outputs."""
        name = f"{self.name}/{what or kind.lower()}_{self.count}"
        self.count += 1
        node = ir.node(kind, list(inputs), attributes=attributes or None, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = f"{name}_output" if outputs == 1 else f"{name}_output_{i}"
        self.graph.insert_before(self.node, node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def const(self, array: Any, dtype: Any = np.int64) -> ir.Value:
        """A new initializer."""
        data = np.asarray(array, dtype)
        name = f"{self.name}/constant_{self.count}"
        self.count += 1
        tensor = ir.tensor(data, name=name)
        value = ir.Value(name=name, shape=ir.Shape(data.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def part(self, value: ir.Value, start: int, stop: int, axis: int) -> ir.Value:
        """value[..., start:stop, ...]"""
        return self.op("Slice", value, self.const([start]), self.const([stop]), self.const([axis]))

    def squeezed(self, value: ir.Value, axis: int) -> ir.Value:
        return self.op("Squeeze", value, self.const([axis]))

    def unsqueezed(self, value: ir.Value, axis: int) -> ir.Value:
        return self.op("Unsqueeze", value, self.const([axis]))

    def split(self, value: ir.Value, parts: int, axis: int) -> list[ir.Value]:
        """`parts` equal parts along `axis`."""
        if parts == 1:
            return [value]
        return self.op("Split", value, outputs=parts, axis=axis, num_outputs=parts)

    def turned(self, value: ir.Value) -> ir.Value:
        """The transpose of a matrix; of a constant at once."""
        return self.op("Transpose", value, perm=[1, 0])

    # -- the whole

    def write(self) -> None:
        node = self.node
        x, w, r, bias, lengths, h0, c0, peepholes = [*node.inputs, *[None] * 8][:8]
        assert x is not None
        assert w is not None
        assert r is not None
        batch_first = bool(node.attributes.get_int("layout", 0))
        if batch_first:
            x = self.op("Transpose", x, perm=[1, 0, 2])
            h0, c0 = (self.op("Transpose", v, perm=[1, 0, 2]) if v is not None else None for v in (h0, c0))
        shape = static_shape(node.inputs[0])  # type: ignore[arg-type]
        assert shape is not None
        steps, batch = (shape[1], shape[0]) if batch_first else (shape[0], shape[1])
        kept = constant(lengths)
        if kept is not None and (kept == steps).all():
            lengths = None
        direction = node.attributes.get_string("direction", "forward")
        backwards = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
        zero = self.const(np.zeros((batch, self.hidden)), self.dtype)
        every, last_h, last_c = [], [], []
        for d, backward in enumerate(backwards):

            def own(value: ir.Value | None, d: int = d) -> ir.Value | None:
                return None if value is None else self.squeezed(self.part(value, d, d + 1, 0), 0)

            h, c = own(h0) or zero, own(c0) or zero
            cell, projected = self._direction(x, own(w), own(r), own(bias), own(peepholes), d, len(backwards))
            inputs = [self.squeezed(part, 0) for part in self.split(projected, steps, 0)]
            outputs: list[ir.Value] = []
            for t in reversed(range(steps)) if backward else range(steps):
                new_h, new_c = cell(inputs[t], h, c)
                seen = new_h
                if lengths is not None:
                    inside = self.unsqueezed(
                        self.op("Greater", self.op("Cast", lengths, to=int(ir.DataType.INT64)), self.const(t)), 1
                    )
                    seen = self.op("Where", inside, new_h, zero)
                    new_h, new_c = self.op("Where", inside, new_h, h), self.op("Where", inside, new_c, c)
                h, c = new_h, new_c
                outputs.append(self.unsqueezed(seen, 0))
            outputs = outputs[::-1] if backward else outputs
            every.append(outputs[0] if steps == 1 else self.op("Concat", *outputs, axis=0))
            last_h.append(h)
            last_c.append(c)
        self._finish(every, last_h, last_c, batch_first)

    def _finish(self, every: list[ir.Value], last_h: list[ir.Value], last_c: list[ir.Value], batch_first: bool) -> None:
        def stacked(values: Sequence[ir.Value], axis: int) -> ir.Value:
            parts = [self.unsqueezed(v, axis) for v in values]
            return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=axis)

        whole = [(every, 1, [2, 0, 1, 3]), (last_h, 0, [1, 0, 2]), (last_c, 0, [1, 0, 2])]
        for old, (values, axis, order) in zip(self.node.outputs, whole, strict=False):
            if not old.name or not (old.uses() or old.is_graph_output()):
                continue
            new = stacked(values, axis)
            new = self.op("Transpose", new, perm=order) if batch_first else self.op("Identity", new)
            name = old.name
            old.name, new.name = f"{name}__recurrent", name
            new.shape, new.type = old.shape, old.type
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)

    def _direction(
        self, x: ir.Value, w: Any, r: Any, bias: ir.Value | None, peepholes: ir.Value | None, d: int, directions: int
    ) -> tuple[Callable[..., tuple[ir.Value, ir.Value]], ir.Value]:
        """The cell of one direction, (a_t, h, c) -> (h, c), and the projected inputs [T, B, G*H]."""
        functions = self._functions(d, directions)
        size = _GATES[self.kind] * self.hidden
        inner_bias = None
        if bias is not None:
            of_x, of_h = self.part(bias, 0, size, 0), self.part(bias, size, 2 * size, 0)
            if self.kind == "GRU" and self.node.attributes.get_int("linear_before_reset", 0):
                gates = 2 * self.hidden
                inner_bias = self.part(of_h, gates, size, 0)
                added = self.op("Concat", self.part(of_h, 0, gates, 0), self.const(np.zeros(self.hidden), self.dtype), axis=0)  # fmt: skip
                bias = self.op("Add", of_x, added)
            else:
                bias = self.op("Add", of_x, of_h)
        projected = self.op("MatMul", x, self.turned(w), what="input")
        if bias is not None:
            projected = self.op("Add", projected, bias)
        if self.kind == "RNN":
            recurrence = self.turned(r)
            return lambda a, h, c: (self._rnn(a, h, recurrence, functions), c), projected
        if self.kind == "GRU":
            return self._gru(r, inner_bias, functions), projected
        return self._lstm(r, peepholes, functions), projected

    # -- cells

    def _functions(self, d: int, directions: int) -> list[Apply]:
        names = _activations(self.node)
        own = len(names) // directions
        alphas, betas = (
            list(self.node.attributes[key].as_floats()) if key in self.node.attributes else []
            for key in ("activation_alpha", "activation_beta")
        )
        made: list[Apply] = []
        for name in names:  # values are handed out in the order of the functions that take one
            defaults = {"HardSigmoid": 0.2, "ScaledTanh": 1.0, "Affine": 1.0, **_WITH_ALPHA}
            alpha = alphas.pop(0) if alphas and name in defaults else defaults.get(name, 0.0)
            takes_beta = {"HardSigmoid": 0.5, "ScaledTanh": 1.0, "Affine": 0.0}
            beta = betas.pop(0) if betas and name in takes_beta else takes_beta.get(name, 0.0)
            made.append(self._function(name, alpha, beta))
        return made[d * own : (d + 1) * own]

    def _function(self, name: str, alpha: float, beta: float) -> Apply:
        def apply(x: ir.Value) -> ir.Value:
            if self.clip:
                low, high = (self.const(b, self.dtype) for b in (-self.clip, self.clip))
                x = self.op("Clip", x, low, high)
            if name in _PLAIN:
                return self.op(name, x)
            if name in _WITH_ALPHA:
                return self.op(name, x, alpha=alpha)
            if name == "HardSigmoid":
                return self.op(name, x, alpha=alpha, beta=beta)
            a, b = self.const(alpha, self.dtype), self.const(beta, self.dtype)
            if name == "Affine":
                return self.op("Add", self.op("Mul", x, a), b)
            return self.op("Mul", self.op("Tanh", self.op("Mul", x, b)), a)  # ScaledTanh

        return apply

    def _rnn(self, a: ir.Value, h: ir.Value, recurrence: ir.Value, functions: Sequence[Apply]) -> ir.Value:
        return functions[0](self.op("Add", a, self.op("MatMul", h, recurrence, what="recurrence")))

    def _gru(self, r: ir.Value, inner_bias: ir.Value | None, functions: Sequence[Apply]) -> Callable[..., Any]:
        before = bool(self.node.attributes.get_int("linear_before_reset", 0))
        size = self.hidden
        one = self.const(1.0, self.dtype)
        whole = self.turned(r) if before else self.turned(self.part(r, 0, 2 * size, 0))
        last = None if before else self.turned(self.part(r, 2 * size, 3 * size, 0))
        f, g = functions[:2]

        def cell(a: ir.Value, h: ir.Value, c: ir.Value) -> tuple[ir.Value, ir.Value]:
            own = self.split(a, 3, 1)
            parts = self.split(self.op("MatMul", h, whole, what="recurrence"), 3 if before else 2, 1)
            z, reset = (f(self.op("Add", x, y)) for x, y in zip(own[:2], parts[:2], strict=True))
            if last is None:
                inner = parts[2] if inner_bias is None else self.op("Add", parts[2], inner_bias)
                inner = self.op("Mul", reset, inner)
            else:
                inner = self.op("MatMul", self.op("Mul", reset, h), last, what="recurrence")
            n = g(self.op("Add", own[2], inner))
            return self.op("Add", self.op("Mul", self.op("Sub", one, z), n), self.op("Mul", z, h)), c

        return cell

    def _lstm(self, r: ir.Value, peepholes: ir.Value | None, functions: Sequence[Apply]) -> Callable[..., Any]:
        recurrence = self.turned(r)
        coupled = bool(self.node.attributes.get_int("input_forget", 0))
        one = self.const(1.0, self.dtype) if coupled else None
        looks = self.split(peepholes, 3, 0) if peepholes is not None else None  # i, o, f
        f, g, k = functions[:3]

        def seen(gate: ir.Value, c: ir.Value, which: int) -> ir.Value:
            return gate if looks is None else self.op("Add", gate, self.op("Mul", looks[which], c))

        def cell(a: ir.Value, h: ir.Value, c: ir.Value) -> tuple[ir.Value, ir.Value]:
            gates = self.op("Add", a, self.op("MatMul", h, recurrence, what="recurrence"))
            i, o, forget, new = self.split(gates, 4, 1)
            i = f(seen(i, c, 0))
            forget = self.op("Sub", one, i) if one is not None else f(seen(forget, c, 2))
            c = self.op("Add", self.op("Mul", forget, c), self.op("Mul", i, g(new)))
            return self.op("Mul", f(seen(o, c, 1)), k(c)), c

        return cell
