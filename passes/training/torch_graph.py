"""Execute an ONNX model in torch, differentiably, many samples at a time.

The graph computes values v = f_v(x, w) from inputs x and constants w. `TorchGraph` makes one torch function a node
(`torch_ops.OPERATORS`) and walks them in graph order; constants are tensors that a caller may replace, so

    graph.run(x, weights={"w": W}, wanted=["y"])        and        dL/dW = torch.autograd.grad(L(y), W)

Models have the batch size that they were exported with, most often 1, written into shapes inside. Samples therefore
carry an axis in front, [N, *shape of the input], and so do results. Two ways to run N samples:

    native   the leading 1 of the inputs is widened to N and runs through the graph as a batch
    vmap     torch.func.vmap over the graph as it is: right by construction, some 15% slower

Native is taken if every output of the model is [1, ...] and two different samples give together what they give alone.
Floats are float32 whatever the model stores, or of the type given. A node that torch cannot execute is refused, all of them in one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from sparsec.errors import UnsupportedError
from sparsec.passes.training.torch_ops import OPERATORS
from sparsec.passes.training.torch_recurrent import RECURRENT
from sparsec.passes.training.torch_spec import Function, Spec, Unsupported

Tensor = torch.Tensor
ROUNDING = 1e-4  # of max |value|: far above float32 rounding of two ways to sum, far below a mixed-up batch


class TorchGraph:
    """`model` (static shapes) as torch functions on `device`, its floats as `floats`.

    Raises UnsupportedError naming every node at fault.
    """

    def __init__(
        self, model: ir.Model, device: str | torch.device = "cpu", floats: torch.dtype = torch.float32
    ) -> None:
        self.device = torch.device(device)
        self.floats = floats
        self.inputs = {str(x.name): _shape(x) for x in model.graph.inputs}
        self.outputs = [str(y.name) for y in model.graph.outputs]
        self.constants = self._constants(model)
        self._steps = _compile(model, floats)
        self._native: bool | None = None
        self._plans: dict[Any, tuple[list[int], dict[int, list[str]]]] = {}

    def _constants(self, model: ir.Model) -> dict[str, Tensor]:
        found = {}
        for name, value in model.graph.initializers.items():
            if value.const_value is not None and not value.is_graph_input():
                constant = as_tensor(value.const_value.numpy())
                found[name] = constant.to(self.device, self.floats if constant.is_floating_point() else None)
        return found

    def run(
        self,
        feeds: Mapping[str, Tensor],
        wanted: Sequence[str] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        given: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Values by name, [N, *shape], for inputs [N, *shape].

        `wanted`: value names, default the outputs. `weights` replace constants of the same names, without a sample
        axis. `given`: values [N, *shape] known already; what lies only before them is not computed.
        """
        names = self.outputs if wanted is None else list(wanted)
        start = {**feeds, **(given or {})}
        constants = {**self.constants, **(weights or {})}
        if self._native is None:
            self._native = self._runs_native({name: feeds[name] for name in self.inputs if name in feeds})
        if self._native:
            found = self._walk({name: _drop_one(x) for name, x in start.items()}, constants, names)
            return {name: found[name].unsqueeze(1) for name in names}
        return self._map(start, constants, names)

    def run_one(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs for one sample as the model has it: nothing has a sample axis, floats are `floats`."""
        return self._walk(dict(feeds), self.constants, self.outputs)

    def _map(self, start: dict[str, Tensor], constants: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        def one(sample: dict[str, Tensor]) -> dict[str, Tensor]:
            return self._walk(sample, constants, names)

        return torch.func.vmap(one)(start)

    def _walk(self, start: dict[str, Tensor], constants: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        values = dict(start)
        plan, last = self._plan(frozenset(start), tuple(names))
        for index in plan:
            step = self._steps[index]
            arguments = [
                None if name is None else values[name] if name in values else constants[name] for name in step.inputs
            ]
            while arguments and arguments[-1] is None:
                arguments.pop()
            made = step.function(*arguments)
            for name, value in zip(step.outputs, made if isinstance(made, (tuple, list)) else (made,), strict=False):
                values[name] = value
            for name in last[index]:
                del values[name]
        return {name: values[name] if name in values else constants[name] for name in names}

    def _plan(self, start: frozenset[str], names: tuple[str, ...]) -> tuple[list[int], dict[int, list[str]]]:
        """The steps needed for `names` in order, and the values that each is the last to read."""
        key = (start, names)
        if key not in self._plans:
            needed, order = set(names) - start, []
            for index in range(len(self._steps) - 1, -1, -1):
                step = self._steps[index]
                if any(name in needed for name in step.outputs):
                    order.append(index)
                    needed |= {name for name in step.inputs if name is not None and name not in start}
            order.reverse()
            last: dict[int, list[str]] = {index: [] for index in order}
            kept = set(names) | start
            for index in reversed(order):
                for name in {*self._steps[index].inputs, *self._steps[index].outputs}:
                    if name is not None and name not in kept and name not in self.constants and name not in self.inputs:
                        kept.add(name)
                        last[index].append(name)
            self._plans[key] = (order, last)
        return self._plans[key]

    def _runs_native(self, feeds: dict[str, Tensor]) -> bool:
        if any(shape[:1] != (1,) for shape in self.inputs.values()):
            return False
        generator = torch.Generator().manual_seed(0)
        pair = {}
        for name, shape in self.inputs.items():
            first = feeds[name][:1] if name in feeds else torch.zeros(1, *shape, device=self.device)
            noise = torch.randn((1, *shape), generator=generator).to(self.device)
            other = noise * first.std() + first if first.is_floating_point() and first.numel() > 1 else first
            pair[name] = torch.cat([first, other])
        with torch.no_grad():
            try:
                together = self._walk({n: x.squeeze(1) for n, x in pair.items()}, self.constants, self.outputs)
            except (RuntimeError, IndexError):  # a shape written into the graph does not take two samples
                return False
            for index in range(2):
                alone = self._walk({n: x[index] for n, x in pair.items()}, self.constants, self.outputs)
                for name, y in alone.items():
                    both = together[name]
                    if y.shape[:1] != (1,) or both.shape != (2, *y.shape[1:]) or not y.is_floating_point():
                        return False
                    if not torch.allclose(both[index], y[0], rtol=0, atol=ROUNDING * float(y.abs().max()) + 1e-30):
                        return False
        return True


def as_tensor(array: np.ndarray) -> Tensor:
    """A torch tensor of its own memory; every float becomes float32."""
    array = np.asarray(array)
    if array.dtype.kind not in "iub":
        return torch.from_numpy(np.array(array, np.float32, order="C"))
    wide = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}.get(array.dtype.name, array.dtype)
    return torch.from_numpy(np.array(array, wide, order="C"))


class _Step:
    """One node."""

    __slots__ = ("function", "inputs", "outputs")

    def __init__(self, node: ir.Node, function: Function) -> None:
        self.function = function
        self.inputs = [None if x is None else str(x.name) for x in node.inputs]
        self.outputs = [str(y.name) for y in node.outputs]


def _compile(model: ir.Model, floats: torch.dtype) -> list[_Step]:
    steps: list[_Step] = []
    problems: dict[str, list[str]] = {}
    for node in model.graph:
        table = OPERATORS if node.op_type in OPERATORS else RECURRENT
        if node.domain not in ("", "ai.onnx") or node.op_type not in table:
            kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            problems.setdefault(kind, []).append(node.name or "")
            continue
        try:
            steps.append(_Step(node, table[node.op_type](Spec(node, floats))))
        except Unsupported as error:
            problems.setdefault(f"{node.op_type}: {error}", []).append(node.name or "")
    if problems:
        texts = [f"{kind} ({', '.join(n[:3])}{', ...' if len(n) > 3 else ''})" for kind, n in problems.items()]
        raise UnsupportedError(f"cannot be executed in torch: {'; '.join(texts)}", "training", texts)
    return steps


def _shape(value: ir.Value) -> tuple[int, ...]:
    if value.shape is None or not all(isinstance(d, int) for d in value.shape):
        raise UnsupportedError("every input needs a fixed shape", f"input {value.name!r}")
    return tuple(int(str(d)) for d in value.shape)


def _drop_one(x: Tensor) -> Tensor:
    return x.squeeze(1)
