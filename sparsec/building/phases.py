"""What kernels for every target go through before code is generated: TVM's phases, and plain pointers as parameters."""

from __future__ import annotations

import re
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.ir import PointerType, PrimType

BUILD_ERRORS = (tvm.error.InternalError, RuntimeError, ValueError, TypeError)  # what TVM raises while it builds


def phases(target: Any, device: bool = False) -> list[Any]:
    """TVM's own phases from scheduled TIR to flat, vectorized loops, in order; `device`: of one thread of many.

    Left out of TVM's default list: for CPUs what is for GPUs, and `CanonicalizeLoop`, which in 0.27 loses the offset of an
    outer loop inside the bounds of a loop nested in it (`for t in (b, e): for i in (t % 6, ...)` reads t as t - b).
    """

    def threads(*names: str) -> list[Any]:
        return [getattr(s_tir.transform, name)() for name in names] if device else []

    return [
        tirx.transform.BindTarget(target),
        *threads("LowerCrossThreadReduction"),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        *threads("LiftThreadBinding"),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        *threads("UnifyThreadBinding"),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.NarrowDataType(32),
        tirx.transform.VectorizeLoop(True),
        *threads("InjectVirtualThread"),
        tirx.transform.StorageRewrite(),
        tirx.transform.UnrollLoop(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
    ]


def over_pointers(func: Any, scope: str = "") -> tuple[list[Any], list[Any], Any]:
    """Buffer parameters as pointers into memory of `scope`: (pointers, other parameters, the body that declares buffers)."""
    pointers, others, declarations = [], [], []
    for param in func.params:
        if not tirx.is_buffer_var(param):
            others.append(param)
            continue
        element = PrimType(str(param.dtype))
        # C, which may be made of it, has fewer names than a graph, and other uses for some of them.
        name = f"p_{re.sub(r'[^0-9A-Za-z_]', '_', param.name)}"
        pointer = tirx.Var(name, PointerType(element, scope) if scope else PointerType(element))
        pointers.append(pointer)
        declarations.append(tirx.DeclBuffer(param, data=pointer))
    body = tirx.SeqStmt([*declarations, func.body]) if declarations else func.body
    return pointers, others, body


def last_line(error: Exception) -> str:
    """What an error of TVM says after its traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
