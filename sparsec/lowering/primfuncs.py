"""A group of ONNX nodes as calls of PrimFuncs: imported, legalized and fused by Relax.

    onnx_ir nodes -> a small ONNX model, expanded (sparsec.lowering.expand) -> Relax -> calls over ONNX names

What one of them cannot do is `Refused` with its reason.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir
import tvm
from tvm import ir as tvm_ir
from tvm import relax, te
from tvm.relax.backend import DispatchSortScan
from tvm.relax.frontend.onnx import from_onnx
from tvm.relax.frontend.onnx.onnx_frontend import _get_convert_map

from sparsec.errors import UnsupportedError
from sparsec.lowering.expand import ExpansionError, expand_nodes
from sparsec.lowering.fold import normalize


class Refused(Exception):
    """Why a group cannot be lowered; one line."""


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
        raise Refused(str(error)) from error
    read = {name for proto in protos for name in proto.input}
    weights = [tensor for name, tensor in initializers.items() if name in read]
    graph = onnx.helper.make_graph(
        protos, "group", list(inputs.values()), outputs, weights, value_info=list(types.values())
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)


def _value_info(value: onnx_ir.Value) -> onnx.ValueInfoProto:
    if value.dtype is None:
        raise UnsupportedError("its element type is unknown; run ONNX shape inference", str(value.name))
    return onnx.helper.make_tensor_value_info(str(value.name), int(value.dtype), shape_of(value))


def shape_of(value: onnx_ir.Value) -> tuple[int, ...]:
    """The static shape. Raises UnsupportedError without one."""
    if value.shape is None or not value.shape.is_static():
        raise UnsupportedError(f"expected a static shape, got {value.shape}", str(value.name))
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]


def import_group(model: onnx.ModelProto, fuse: bool) -> Any:
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
        raise Refused(last_line(error)) from error


def last_line(error: Exception) -> str:
    """What an error of TVM says at its end, or which operators it lacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        _, lacking, operators = line.partition("operators are not supported for frontend ONNX: ")
        if lacking:
            return f"{operators} has no lowering"
    return lines[-1][:200] if lines else type(error).__name__


_LINKS = (relax.Var, tvm_ir.Tuple, tvm_ir.TupleGetItem)


@dataclass(frozen=True)
class Call:
    """A PrimFunc and the buffers it is called with."""

    func: Any
    arguments: tuple[str, ...]  # a name for each buffer parameter


class Walk:
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

    def calls(self) -> Iterator[Call]:
        """Each call in order; then a copy for each output that is an input, a constant or another output."""
        bindings = [b for block in self.main.body.blocks for b in block.bindings]
        result = self._returned(bindings)
        claimed: dict[tuple[Any, int], str] = {}  # result of a call -> the output it is
        for (name, expected), expr in zip(self.outputs.items(), result, strict=True):
            dtype = onnx.helper.tensor_dtype_to_np_dtype(expected.elem_type).name
            shape = [d.dim_value for d in expected.shape.dim]
            if str(expr.ty.dtype) != dtype or _static(expr.ty) != tuple(shape):
                got = f"{expr.ty.dtype}{list(_static(expr.ty))}"
                raise Refused(f"Relax computes {got} where ONNX says {dtype}{shape}")
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
                raise Refused(f"Relax cannot legalize {op}")
        for name, expr in zip(self.outputs, result, strict=True):
            source = self._resolve(expr)
            if source != name:
                yield Call(_copy(expr.ty), (source, name))

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

    def _call(self, var: Any, value: Any, claimed: dict[tuple[Any, int], str]) -> Call:
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
        return Call(func, (*arguments, *results))

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
        raise Refused(f"Relax left a {type(expr).__name__}")


def _static(ty: Any) -> tuple[int, ...]:
    """The shape of a tensor type, which must not depend on data."""
    try:
        return tuple(int(d) for d in ty.shape)
    except TypeError:
        raise Refused("its result's shape depends on data") from None


def _copy(ty: Any) -> Any:
    x = te.placeholder(_static(ty), str(ty.dtype), "x")
    return te.create_prim_func([x, te.compute(x.shape, lambda *i: x(*i), "y")])
