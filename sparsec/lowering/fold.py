"""Imported Relax modules made ready for legalization: constants folded in NumPy, indices kept inside.

Relax's own FoldConstant compiles a function for each constant expression, tens of milliseconds apiece; most of them are
a bias reshaped for broadcasting or an index made positive. Its gathers read out of bounds if an index is; indices are
clipped instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import ir, relax
from tvm.relax.expr_functor import PyExprMutator, mutator


def _shape(call: Any) -> tuple[int, ...]:
    return tuple(int(d) for d in call.ty.shape)


def _reshaped(call: Any, x: np.ndarray, *_: Any) -> np.ndarray:
    return x.reshape(_shape(call))


def _transposed(call: Any, x: np.ndarray) -> np.ndarray:
    return np.transpose(x, None if call.attrs.axes is None else [int(a) for a in call.attrs.axes])


_OPS: dict[str, Callable[..., np.ndarray]] = {
    "relax.reshape": _reshaped,
    "relax.expand_dims": _reshaped,
    "relax.squeeze": _reshaped,
    "relax.permute_dims": _transposed,
    "relax.broadcast_to": lambda call, x, *_: np.broadcast_to(x, _shape(call)),
    "relax.astype": lambda call, x: x.astype(str(call.ty.dtype)),
    "relax.add": lambda _, a, b: a + b,
    "relax.subtract": lambda _, a, b: a - b,
    "relax.multiply": lambda _, a, b: a * b,
    "relax.divide": lambda _, a, b: a / b,
    "relax.sqrt": lambda _, x: np.sqrt(x),
    "relax.less": lambda _, a, b: a < b,
    "relax.where": lambda _, c, a, b: np.asarray(np.where(c, a, b)),
}


@mutator
class _Folder(PyExprMutator):
    def _constant(self, expr: Any) -> np.ndarray | None:
        if isinstance(expr, relax.Var):
            expr = self.lookup_binding(expr)
        return expr.value.numpy() if isinstance(expr, ir.GenericConst) else None

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        if call.op == ir.Op.get("relax.take") and str(call.attrs.mode) == "fast":
            axis = None if call.attrs.axis is None else int(call.attrs.axis)
            return relax.op.take(call.args[0], call.args[1], axis, mode="clip")
        rule = _OPS.get(getattr(call.op, "name", ""))
        if rule is None:
            return call
        tensors = [self._constant(a) for a in call.args if not isinstance(a, relax.ShapeExpr)]
        if any(t is None for t in tensors):
            return call
        result = np.ascontiguousarray(rule(call, *tensors)).reshape(_shape(call))
        return relax.const(result, str(call.ty.dtype)) if str(result.dtype) == str(call.ty.dtype) else call


def normalize(module: Any) -> Any:
    """`module` with the foldable constant expressions of its main replaced by constants and gathers made safe."""
    folder = _Folder(module)
    main = folder.visit_expr(module["main"])
    changed = tvm.IRModule({**{v: f for v, f in module.functions.items() if v.name_hint != "main"}})
    changed["main"] = main
    return relax.transform.CanonicalizeBindings()(changed)
