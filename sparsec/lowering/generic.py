"""The generic route: what no kernel of ours claims is lowered through Relax.

    onnx_ir nodes -> groups -> small ONNX models -> Relax -> PrimFuncs -> loop nests (sparsec.lowering.nests) -> steps

An operator and the elementwise operators behind it form a group, which is imported, legalized and fused alone: the group
keeps the names of its ONNX nodes, which Relax would lose. It is the route for correctness; see `nests` for its speed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir
import tvm
from tvm import ir as tvm_ir
from tvm import relax, te, tirx
from tvm.relax.backend import DispatchSortScan
from tvm.relax.frontend.onnx import from_onnx
from tvm.relax.frontend.onnx.onnx_frontend import _get_convert_map

from sparsec.errors import UnsupportedError
from sparsec.kernels.base import Machine
from sparsec.lowering.expand import ExpansionError, expand_nodes
from sparsec.lowering.fold import normalize
from sparsec.lowering.nests import Nest, split_nests
from sparsec.program import Kernel

ELEMENTWISE = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "Cast",
        "Ceil",
        "Clip",
        "Cos",
        "Div",
        "Elu",
        "Equal",
        "Erf",
        "Exp",
        "Floor",
        "Gelu",
        "Greater",
        "GreaterOrEqual",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LeakyRelu",
        "Less",
        "LessOrEqual",
        "Log",
        "Max",
        "Min",
        "Mish",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "PRelu",
        "Pow",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Sigmoid",
        "Sign",
        "Sin",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Sub",
        "Tanh",
        "ThresholdedRelu",
        "Where",
        "Xor",
    ]
)


@dataclass(frozen=True)
class ScratchBuffer:
    """A buffer that only one step uses, too large for the stack; placed in the arena like an activation."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class GenericStep:
    """One kernel call. `kernel.func` takes the buffers `inputs + outputs + scratch` in this order, then begin and end."""

    kernel: Kernel
    inputs: tuple[str, ...]  # ONNX values, constants of the region or temporaries
    outputs: tuple[str, ...]  # every element is written
    scratch: tuple[ScratchBuffer, ...]
    tiles: int
    nodes: tuple[str, ...]  # ONNX nodes it came from
    flops: int
    bytes: int  # read and written once each


@dataclass(frozen=True)
class GenericRegion:
    """Steps in execution order. Names in them are ONNX value names, or keys of `temporaries` or `constants`."""

    steps: tuple[GenericStep, ...]
    temporaries: dict[str, tuple[tuple[int, ...], str]]  # shape and dtype
    constants: dict[str, np.ndarray] = field(repr=False)


class _Refused(Exception):
    """Why a group cannot be lowered; one line."""


def lower_generic(nodes: Sequence[onnx_ir.Node], machine: Machine, opset: int | None = None) -> GenericRegion:
    """Lower a topologically ordered convex run of nodes with static shapes.

    `opset` defaults to the one that the nodes' graph imports. Raises UnsupportedError that lists every node for which
    there is no route.
    """
    if opset is None:
        graph = nodes[0].graph if nodes else None
        opset = graph.opset_imports.get("", 17) if graph is not None else 17
    region = _Region(machine, opset)
    problems: list[str] = []
    for group in _groups(nodes):
        problems += region.add(group)
    if problems:
        raise unsupported(problems)
    return GenericRegion(tuple(region.steps), region.temporaries, region.constants)


def unsupported(problems: Sequence[str]) -> UnsupportedError:
    """The error that names every node of `problems`."""
    nodes = "1 node" if len(problems) == 1 else f"{len(problems)} nodes"
    return UnsupportedError(f"no kernel and no generic lowering for {nodes}: " + "; ".join(problems), problems=problems)


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
        shapes = {_shape(v) for v in sources if home[v] == latest}
        if latest >= 0 and node.op_type in ELEMENTWISE and node.domain == "" and shapes == {_shape(node.outputs[0])}:
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


def _shape(value: onnx_ir.Value) -> tuple[int, ...]:
    if value.shape is None or not value.shape.is_static():
        raise UnsupportedError(f"expected a static shape, got {value.shape}", str(value.name))
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]


class _Region:
    """Collects the steps of the groups."""

    def __init__(self, machine: Machine, opset: int) -> None:
        self.machine = machine
        self.opset = opset
        self.steps: list[GenericStep] = []
        self.temporaries: dict[str, tuple[tuple[int, ...], str]] = {}
        self.constants: dict[str, np.ndarray] = {}
        self._fresh = 0
        self._by_content: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def add(self, group: list[onnx_ir.Node]) -> list[str]:
        """Append the steps of `group`; returns the reasons why not, one a node. Values without elements need none."""
        group = [node for node in group if any(0 not in _shape(v) for v in node.outputs if v.name)]
        if not group:
            return []
        try:
            self._lower(group, fuse=True)
            return []
        except _Refused as reason:
            parts = [_with_weights(node) for node in group if _weight_reader(node) not in group]
            if len(parts) > 1:
                return [problem for part in parts for problem in self.add(part)]
            try:
                self._lower(group, fuse=False)
                return []
            except _Refused:
                return [f"{group[-1].name or group[-1].outputs[0].name} ({group[-1].op_type}): {reason}"]

    def _lower(self, group: list[onnx_ir.Node], fuse: bool) -> None:
        model = group_model(group, self.opset)
        module = _import(model, fuse)
        ordered = sorted(group, key=lambda node: _weight_reader(node) in group)  # weights do not name a kernel
        names = tuple(node.name or str(node.outputs[0].name) for node in ordered)
        walk = _Walk(module, model, names[0], "_".join(dict.fromkeys(node.op_type for node in ordered)))
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

    def _nests(self, call: _Call) -> tuple[list[Nest], dict[str, tuple[tuple[int, ...], str]]]:
        try:
            return split_nests(call.func, self.machine.lanes)
        except (RuntimeError, ValueError, TypeError) as error:  # TVM's InternalError is a RuntimeError
            raise _Refused(_last_line(error)) from error

    def _step(
        self, nest: Nest, buffers: dict[str, str], users: dict[str, int], names: tuple[str, ...], label: str
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
                kernel=Kernel(name, func, label.replace("_", "+")),
                inputs=tuple(buffers[b] for b in inputs),
                outputs=tuple(buffers[b] for b in outputs),
                scratch=rooms,
                tiles=nest.tiles,
                nodes=names,
                flops=nest.flops,
                bytes=nest.bytes,
            )
        )

    def _constant(self, name: str, array: np.ndarray) -> str:
        key = (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).digest())
        known = self._by_content.setdefault(key, name)
        self.constants[known] = array
        return known


def group_model(group: Sequence[onnx_ir.Node], opset: int) -> onnx.ModelProto:
    """An ONNX model of exactly these nodes: outside values are inputs, constants initializers; shapes are static."""
    inside = {value for node in group for value in node.outputs}
    members = set(group)
    inputs: dict[str, onnx.ValueInfoProto] = {}
    initializers: dict[str, onnx.TensorProto] = {}
    types: dict[str, onnx.ValueInfoProto] = {}
    outputs = []
    for node in group:
        for value in node.inputs:
            if value is None or value in inside:
                continue
            if value.const_value is not None:
                initializers[str(value.name)] = onnx.numpy_helper.from_array(value.const_value.numpy(), str(value.name))
            else:
                inputs[str(value.name)] = _value_info(value)
        for value in node.outputs:
            if not value.name:
                continue
            used = [use.node for use in value.uses()]
            if value.is_graph_output() or any(user not in members for user in used):
                outputs.append(_value_info(value))
            elif used:
                types[value.name] = _value_info(value)
    known = {**inputs, **types, **{o.name: o for o in outputs}}
    try:
        protos = expand_nodes(
            [onnx_ir.to_proto(n) for n in group], known, initializers, _get_convert_map().keys(), opset
        )
    except ExpansionError as error:
        raise _Refused(str(error)) from error
    read = {name for proto in protos for name in proto.input}
    weights = [tensor for name, tensor in initializers.items() if name in read]
    graph = onnx.helper.make_graph(
        protos, "group", list(inputs.values()), outputs, weights, value_info=list(types.values())
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)


def _value_info(value: onnx_ir.Value) -> onnx.ValueInfoProto:
    if value.dtype is None:
        raise UnsupportedError("its element type is unknown; run ONNX shape inference", str(value.name))
    return onnx.helper.make_tensor_value_info(str(value.name), int(value.dtype), _shape(value))


def _import(model: onnx.ModelProto, fuse: bool) -> Any:
    """`model` as a Relax module whose main only calls PrimFuncs."""
    passes = [
        DispatchSortScan(),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        *((relax.transform.FuseOps(), relax.transform.FuseTIR()) if fuse else ()),
        relax.transform.DeadCodeElimination(),
    ]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), tvm.target.Target("llvm"):
            warnings.simplefilter("ignore")
            module = relax.transform.DecomposeOpsForInference()(from_onnx(model))
            return tvm_ir.transform.Sequential(passes)(normalize(module))
    except Exception as error:  # the importer raises whatever the failing line raises
        raise _Refused(_last_line(error)) from error


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        _, lacking, operators = line.partition("operators are not supported for frontend ONNX: ")
        if lacking:
            return f"{operators} has no lowering"
    return lines[-1][:200] if lines else type(error).__name__


_LINKS = (relax.Var, tvm_ir.Tuple, tvm_ir.TupleGetItem)


@dataclass(frozen=True)
class _Call:
    func: Any
    arguments: tuple[str, ...]  # a name for each buffer parameter


class _Walk:
    """The calls of a legalized main, with ONNX names for its variables."""

    def __init__(self, module: Any, model: onnx.ModelProto, node: str, label: str) -> None:
        self.module = module
        self.label = label
        self.node = node
        self.temporaries: dict[str, tuple[tuple[int, ...], str]] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.outputs = {o.name: o.type.tensor_type for o in model.graph.output}
        self.names: dict[Any, Any] = {}  # relax variable -> name, or tuple of names
        main = module["main"]
        for var, info in zip(main.params, model.graph.input, strict=True):
            self.names[var] = info.name
        self.main = main

    def calls(self) -> Iterator[_Call]:
        """Each call in order; then a copy for each output that is an input, a constant or another output."""
        bindings = [b for block in self.main.body.blocks for b in block.bindings]
        result = self._returned(bindings)
        claimed: dict[tuple[Any, int], str] = {}  # result of a call -> the output it is
        for (name, expected), expr in zip(self.outputs.items(), result, strict=True):
            dtype = onnx.helper.tensor_dtype_to_np_dtype(expected.elem_type).name
            shape = [d.dim_value for d in expected.shape.dim]
            if str(expr.ty.dtype) != dtype or _static(expr.ty) != tuple(shape):
                got = f"{expr.ty.dtype}{list(_static(expr.ty))}"
                raise _Refused(f"Relax computes {got} where ONNX says {dtype}{shape}")
            item = isinstance(expr, tvm_ir.TupleGetItem)
            root = expr.tuple_value if item else expr
            if isinstance(root, relax.Var) and root not in self.names:
                claimed.setdefault((root, int(expr.index) if item else 0), name)
        for binding in bindings:
            value = binding.value
            if isinstance(value, tvm_ir.Call) and value.op == tvm_ir.Op.get("relax.call_tir"):
                yield self._call(binding.var, value, claimed)
            elif isinstance(value, relax.Var | tvm_ir.Tuple | tvm_ir.TupleGetItem | tvm_ir.GenericConst):
                self.names[binding.var] = self._resolve(value)
            else:
                op = getattr(getattr(value, "op", None), "name", type(value).__name__)
                raise _Refused(f"Relax cannot legalize {op}")
        for name, expr in zip(self.outputs, result, strict=True):
            source = self._resolve(expr)
            if source != name:
                yield _Call(_copy(expr.ty), (source, name))

    def _returned(self, bindings: list[Any]) -> list[Any]:
        """The expressions that main returns, variables followed to what they are bound to."""
        bound = {b.var: b.value for b in bindings}

        def follow(expr: Any) -> Any:
            while isinstance(expr, relax.Var) and isinstance(bound.get(expr), _LINKS):
                expr = bound[expr]
            if isinstance(expr, tvm_ir.TupleGetItem):
                whole = follow(expr.tuple_value)
                return follow(whole.fields[expr.index]) if isinstance(whole, tvm_ir.Tuple) else whole[expr.index]
            return expr

        expr = follow(self.main.body.body)
        return [follow(field) for field in expr.fields] if isinstance(expr, tvm_ir.Tuple) else [expr]

    def _call(self, var: Any, value: Any, claimed: dict[tuple[Any, int], str]) -> _Call:
        func = self.module[value.args[0]]
        arguments = [self._resolve(a) for a in value.args[1].fields]
        types = list(var.ty.fields) if isinstance(var.ty, tvm_ir.TupleType) else [var.ty]
        results = []
        for i, ty in enumerate(types):
            name = claimed.get((var, i))
            if name is None:
                name = f"{self.node}/value{len(self.temporaries)}"
                self.temporaries[name] = (_static(ty), str(ty.dtype))
            results.append(name)
        self.names[var] = tuple(results) if isinstance(var.ty, tvm_ir.TupleType) else results[0]
        return _Call(func, (*arguments, *results))

    def _resolve(self, expr: Any) -> Any:
        if isinstance(expr, relax.Var):
            return self.names[expr]
        if isinstance(expr, tvm_ir.TupleGetItem):
            return self._resolve(expr.tuple_value)[int(expr.index)]
        if isinstance(expr, tvm_ir.Tuple):
            return tuple(self._resolve(f) for f in expr.fields)
        if isinstance(expr, tvm_ir.GenericConst):
            name = f"{self.node}/const{len(self.constants)}"
            self.constants[name] = expr.value.numpy()
            return name
        raise _Refused(f"Relax left a {type(expr).__name__}")


def _static(ty: Any) -> tuple[int, ...]:
    """The shape of a tensor type, which must not depend on data."""
    try:
        return tuple(int(d) for d in ty.shape)
    except TypeError:
        raise _Refused("its result's shape depends on data") from None


def _copy(ty: Any) -> Any:
    x = te.placeholder(_static(ty), str(ty.dtype), "x")
    return te.create_prim_func([x, te.compute(x.shape, lambda *i: x(*i), "y")])
