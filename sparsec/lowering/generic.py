"""The generic route: what no kernel of ours claims is lowered through Relax.

    onnx_ir nodes -> groups -> PrimFuncs (sparsec.lowering.primfuncs) -> loop nests (sparsec.lowering.nests; for CUDA devices
    sparsec.lowering.device) -> steps

An operator and the elementwise operators behind it form a group, which is imported, legalized and fused alone: the group
keeps the names of its ONNX nodes, which Relax would lose. It is the route for correctness; see `nests` for its speed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir
from tvm import tirx

from sparsec.errors import UnsupportedError
from sparsec.kernels.base import Machine
from sparsec.kernels.cuda.base import Gpu
from sparsec.lowering.device import DeviceNest, split_device
from sparsec.lowering.nests import Nest, split_nests
from sparsec.lowering.primfuncs import Call, Refused, Walk, group_model, import_group, last_line, shape_of
from sparsec.program import Kernel

ELEMENTWISE = frozenset({
    "Abs", "Add", "And", "Cast", "Ceil", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu",
    "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Less", "LessOrEqual",
    "Log", "Max", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round",
    "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Tanh", "ThresholdedRelu", "Where",
    "Xor",
})  # fmt: skip


ON_CPU = "--allow-cpu-fallback runs on the host's CPU what has a lowering there"


@dataclass(frozen=True)
class ScratchBuffer:
    """A buffer that only one step uses, too large for the stack; placed in the arena like an activation."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class GenericStep:
    """One kernel call. `kernel.func` takes the buffers `inputs + outputs + scratch` in this order, then begin and end where
    it is a CPU's.
    """

    kernel: Kernel
    inputs: tuple[str, ...]  # ONNX values, constants of the region or temporaries
    outputs: tuple[str, ...]  # every element is written
    scratch: tuple[ScratchBuffer, ...]
    tiles: int
    nodes: tuple[str, ...]  # ONNX nodes it came from
    flops: int
    bytes: int  # read and written once each
    why: str = ""  # a step of the CPU where there is a GPU: what the GPU lacks


@dataclass(frozen=True)
class GenericRegion:
    """Steps in execution order. Names in them are ONNX value names, or keys of `temporaries` or `constants`."""

    steps: tuple[GenericStep, ...]
    temporaries: dict[str, tuple[tuple[int, ...], str]]  # shape and dtype
    constants: dict[str, np.ndarray] = field(repr=False)


def lower_generic(
    nodes: Sequence[onnx_ir.Node], machine: Machine, opset: int | None = None, gpu: Gpu | None = None,
    cpu_fallback: bool = False,
) -> GenericRegion:  # fmt: skip
    """Lower a topologically ordered convex run of nodes with static shapes, for `gpu` if there is one.

    cpu_fallback: what the GPU lacks becomes steps of `machine`, their kernels without a launch. `opset` defaults to the one
    that the nodes' graph imports. Raises UnsupportedError that lists every node for which there is no route.
    """
    if opset is None:
        graph = nodes[0].graph if nodes else None
        opset = graph.opset_imports.get("", 17) if graph is not None else 17
    region = _Region(machine, opset, gpu, cpu_fallback)
    problems: list[str] = []
    for group in _groups(nodes):
        problems += region.add(group)
    if problems:
        raise unsupported(problems, gpu is not None and not cpu_fallback)
    return GenericRegion(tuple(region.steps), region.temporaries, region.constants)


def unsupported(problems: Sequence[str], gpu: bool = False) -> UnsupportedError:
    """The error that names every node of `problems`; gpu: which the GPU lacks."""
    nodes = "1 node" if len(problems) == 1 else f"{len(problems)} nodes"
    text = f"no kernel and no generic lowering for {nodes}: " + "; ".join(problems)
    return UnsupportedError(f"{text}; {ON_CPU}" if gpu else text, problems=problems)


def _groups(nodes: Sequence[onnx_ir.Node]) -> list[list[onnx_ir.Node]]:
    """Each node with its weights' DequantizeLinear before and the elementwise nodes of its shape behind it.

    Groups come in execution order.
    """
    groups: list[list[onnx_ir.Node]] = []
    home: dict[onnx_ir.Value, int] = {}
    members = set(nodes)
    for node in nodes:
        if _weight_reader(node) in members:
            continue
        sources = [v for v in node.inputs if v is not None and v in home]
        latest = max((home[v] for v in sources), default=-1)
        shapes = {shape_of(v) for v in sources if home[v] == latest}
        if latest >= 0 and node.op_type in ELEMENTWISE and node.domain == "" and shapes == {shape_of(node.outputs[0])}:
            groups[latest] += _with_weights(node)
        else:
            latest = len(groups)
            groups.append(_with_weights(node))
        home.update((v, latest) for v in node.outputs)
    return groups


def _weight_reader(node: onnx_ir.Node) -> onnx_ir.Node | None:
    """The one reader of a dequantized constant, which thereby becomes a constant of the reader's kernel."""
    if node.op_type != "DequantizeLinear" or any(v is not None and v.const_value is None for v in node.inputs):
        return None
    uses = list(node.outputs[0].uses())
    return uses[0].node if len(uses) == 1 and not node.outputs[0].is_graph_output() else None


def _with_weights(node: onnx_ir.Node) -> list[onnx_ir.Node]:
    """`node` behind the DequantizeLinear nodes of its weights."""
    producers = [v.producer() for v in node.inputs if v is not None]
    return [p for p in producers if p is not None and _weight_reader(p) is node] + [node]


class _Region:
    """Collects the steps of the groups."""

    def __init__(self, machine: Machine, opset: int, gpu: Gpu | None, cpu_fallback: bool) -> None:
        self.machine = machine
        self.gpu = gpu
        self.cpu_fallback = cpu_fallback
        self.opset = opset
        self.steps: list[GenericStep] = []
        self.temporaries: dict[str, tuple[tuple[int, ...], str]] = {}
        self.constants: dict[str, np.ndarray] = {}
        self._fresh = 0
        self._why = ""
        self._by_content: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def add(self, group: list[onnx_ir.Node]) -> list[str]:
        """Append the steps of `group`; returns the reasons why not, one a node. Values without elements need none."""
        group = [node for node in group if any(0 not in shape_of(v) for v in node.outputs if v.name)]
        if not group:
            return []
        try:
            self._lower(group, fuse=True)
            return []
        except Refused as reason:
            parts = [_with_weights(node) for node in group if _weight_reader(node) not in group]
            if len(parts) > 1:
                return [problem for part in parts for problem in self.add(part)]
            try:
                self._lower(group, fuse=False)
                return []
            except Refused:
                if self.gpu is not None and self.cpu_fallback:
                    return self._on_cpu(group, str(reason))
                return [f"{group[-1].name or group[-1].outputs[0].name} ({group[-1].op_type}): {reason}"]

    def _on_cpu(self, group: list[onnx_ir.Node], why: str) -> list[str]:
        """The same for the processor beside the GPU. `why`: what the GPU lacks."""
        gpu, self.gpu, self._why = self.gpu, None, why
        try:
            return self.add(group)
        finally:
            self.gpu, self._why = gpu, ""

    def _lower(self, group: list[onnx_ir.Node], fuse: bool) -> None:
        model = group_model(group, self.opset)
        module = import_group(model, fuse)
        ordered = sorted(group, key=lambda node: _weight_reader(node) in group)  # weights do not name a kernel
        names = tuple(node.name or str(node.outputs[0].name) for node in ordered)
        walk = Walk(module, model, names[0], "_".join(dict.fromkeys(node.op_type for node in ordered)))
        calls = list(walk.calls())
        pieces = [(call, *self._nests(call)) for call in calls]  # all can fail before anything is added
        self.temporaries.update(walk.temporaries)
        renamed = {name: self._constant(name, array) for name, array in walk.constants.items()}
        for call, nests, intermediates in pieces:
            buffers = {f"p{i}": renamed.get(name, name) for i, name in enumerate(call.arguments)}
            users = {t: sum(t in nest.buffers for nest in nests) for t in intermediates}
            for t, (shape, dtype) in intermediates.items():
                buffers[t] = f"{names[0]}/tmp{self._fresh}"
                self._fresh += 1
                self.temporaries[buffers[t]] = (shape, dtype)
            for nest in nests:
                self._step(nest, buffers, users, names, walk.label)

    def _nests(self, call: Call) -> tuple[Sequence[Nest | DeviceNest], dict[str, tuple[tuple[int, ...], str]]]:
        try:
            if self.gpu is not None:
                return split_device(call.func, self.gpu)
            return split_nests(call.func, self.machine.lanes)
        except (RuntimeError, ValueError, TypeError) as error:  # TVM's InternalError is a RuntimeError
            raise Refused(last_line(error)) from error

    def _step(
        self,
        nest: Nest | DeviceNest,
        buffers: dict[str, str],
        users: dict[str, int],
        names: tuple[str, ...],
        label: str,
    ) -> None:
        scratch = [b for b in nest.buffers if users.get(b) == 1]
        outputs = [b for b in nest.writes if b not in scratch]
        inputs = [b for b in nest.buffers if b not in outputs and b not in scratch]
        order = [*inputs, *outputs, *scratch]
        parameter = dict(zip(nest.buffers, nest.func.params, strict=False))
        rest = list(nest.func.params[len(nest.buffers) :])
        func = tirx.PrimFunc(
            [*(parameter[b] for b in order), *rest], nest.func.body, nest.func.ret_type, nest.func.attrs
        )
        digest = hashlib.sha256(func.script().encode()).hexdigest()[:12]
        name = f"generic_{re.sub(r'[^a-z0-9_]', '', label.lower())[:40]}_{digest}"
        rooms = tuple(ScratchBuffer(buffers[b], *self.temporaries.pop(buffers[b])) for b in scratch)
        self.steps.append(
            GenericStep(
                kernel=Kernel(name, func, label.replace("_", "+"), getattr(nest, "launch", None)),
                inputs=tuple(buffers[b] for b in inputs),
                outputs=tuple(buffers[b] for b in outputs),
                scratch=rooms,
                tiles=nest.tiles,
                nodes=names,
                flops=nest.flops,
                bytes=nest.bytes,
                why=self._why,
            )
        )

    def _constant(self, name: str, array: np.ndarray) -> str:
        key = (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).digest())
        known = self._by_content.setdefault(key, name)
        self.constants[known] = array
        return known
