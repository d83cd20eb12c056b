"""GRU, LSTM and RNN as differentiable functions of torch tensors: the page's equations, a Python loop over the steps.

    RNN    h' = tanh(x W^T + b_w + h R^T + b_r)
    GRU    z, r = sigmoid(...),  n = tanh(x W_n^T + b_wn + r * (h R_n^T + b_rn))    linear_before_reset = 1
                                 n = tanh(x W_n^T + b_wn + (r * h) R_n^T + b_rn)    otherwise
           h' = (1 - z) n + z h
    LSTM   i, o, f, c~ = ...;  c' = f c + i c~;  h' = o tanh(c')

Shapes: X [T, B, I], W [D, G*H, I], R [D, G*H, H], B [D, 2*G*H], h and c [D, B, H]; Y [T, D, B, H]. D: directions.
Source: https://onnx.ai/onnx/operators/onnx__LSTM.html and its neighbours (gate order z r h, and i o f c).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparsec.passes.training.torch_spec import Function, Spec, Tensor, Unsupported

Cell = Callable[[Tensor, tuple[Tensor, ...], Tensor, Tensor], tuple[Tensor, ...]]


def _rnn_cell(gates: Tensor, state: tuple[Tensor, ...], r: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return (torch.tanh(gates + state[0] @ r.mT + b),)


def _gru_cell(before_reset: bool) -> Cell:
    def cell(gates: Tensor, state: tuple[Tensor, ...], r: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        (h,) = state
        size = h.shape[-1]
        both = gates[..., : 2 * size] + h @ r[: 2 * size].mT + b[: 2 * size]
        z, reset = torch.sigmoid(both).split(size, -1)
        if before_reset:
            inner = reset * (h @ r[2 * size :].mT + b[2 * size :])
        else:
            inner = (reset * h) @ r[2 * size :].mT + b[2 * size :]
        n = torch.tanh(gates[..., 2 * size :] + inner)
        return ((1 - z) * n + z * h,)

    return cell


def _lstm_cell(gates: Tensor, state: tuple[Tensor, ...], r: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    h, c = state
    i, o, f, g = (gates + h @ r.mT + b).split(h.shape[-1], -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _recurrent(gates: int, cell: Callable[[Spec], Cell], states: int) -> Callable[[Spec], Function]:
    def make(spec: Spec) -> Function:
        direction = spec.text("direction", "forward")
        backward = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[direction]
        for name in ("activations", "clip", "layout", "input_forget"):
            if name in spec.node.attributes and (name != "layout" or spec.int("layout", 0)):
                raise Unsupported(f"its {name} is not the default")
        if spec.has(4) or spec.has(7):
            raise Unsupported("it has sequence lengths or peepholes")
        size = spec.shape(2)[-1]
        step = cell(spec)

        def apply(
            x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, _: Tensor | None = None,
            h0: Tensor | None = None, c0: Tensor | None = None,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            zero = x.new_zeros(len(backward), x.shape[1], size)
            starts = [zero if s is None else s for s in (h0, c0)[:states]]
            bias = w.new_zeros(len(backward), 2 * gates * size) if b is None else b
            sequences, finals = [], []
            for d, reverse in enumerate(backward):
                fixed = x @ w[d].mT + bias[d, : gates * size]
                state = tuple(s[d] for s in starts)
                made: list[Tensor] = []
                for t in range(x.shape[0] - 1, -1, -1) if reverse else range(x.shape[0]):
                    state = step(fixed[t], state, r[d], bias[d, gates * size :])
                    made.append(state[0])
                sequences.append(torch.stack(made[::-1] if reverse else made))
                finals.append(state)
            last = tuple(torch.stack([final[k] for final in finals]) for k in range(states))
            return torch.stack(sequences, 1), *last

        return apply

    return make


RECURRENT: dict[str, Callable[[Spec], Function]] = {
    "GRU": _recurrent(3, lambda spec: _gru_cell(bool(spec.int("linear_before_reset", 0))), 1),
    "LSTM": _recurrent(4, lambda spec: _lstm_cell, 2),
    "RNN": _recurrent(1, lambda spec: _rnn_cell, 1),
}
