"""PrimFuncs to object code: the one module that touches TVM's build pipeline and LLVM back end.

Kernels become plain C functions (see `sparsec.program`), not TVM packed functions: after TVM's own lowering passes the
buffer parameters are replaced by raw pointers and `MakePackedAPI` is left out. The object then needs no TVM runtime, no
workspace hooks and no argument checks; accumulators are stack slots that LLVM turns into registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import ir, tirx
from tvm.ir import PointerType, PrimType
from tvm.tirx.build import codegen_build

from sparsec.building.phases import BUILD_ERRORS, last_line, over_pointers, phases
from sparsec.errors import BuildError
from sparsec.program import MAX_ARGS, Kernel
from sparsec.targets import Target


def tvm_target(target: Target) -> Any:
    """TVM's description of `target`."""
    plain = tvm.target.Target({"kind": "llvm", "num-cores": 1, **target.llvm})
    return plain.with_host(plain)


def _plain_c(func: Any) -> Any:
    """`func` with each buffer parameter replaced by a pointer, padded to MAX_ARGS pointers, then begin and end."""
    pointers, scalars, body = over_pointers(func)
    if len(pointers) > MAX_ARGS or len(scalars) != 2:
        raise BuildError(
            f"a kernel takes at most {MAX_ARGS} buffers and (begin, end), got {len(pointers)} and {len(scalars)}"
        )
    unused = [tirx.Var(f"unused{i}", PointerType(PrimType("uint8"))) for i in range(MAX_ARGS - len(pointers))]
    return tirx.PrimFunc([*pointers, *unused, *scalars], body, func.ret_type, func.attrs)


def _with_fmax(func: Any) -> Any:
    """`func` with floating-point maxima and minima as Arm's FMAX and FMIN.

    `x < c ? c : x` with a constant c is a maximum that passes NaN on, as FMAX does; LLVM makes two or three
    instructions of the selection because it would keep -0 where c is 0.
    """

    def call(name: str, x: Any, y: Any) -> Any:
        return tirx.call_llvm_pure_intrin(str(x.ty.dtype), name, x, y)

    def select(node: Any) -> Any:
        test, bound, x = node.condition, node.true_value, node.false_value
        constant = bound.value if isinstance(bound, tirx.Broadcast) else bound
        if not isinstance(test, tirx.LT | tirx.GT) or not isinstance(constant, tirx.FloatImm):
            return node
        less, more = (test.a, test.b) if isinstance(test, tirx.LT) else (test.b, test.a)
        for name, left, right in (("llvm.maximum", x, bound), ("llvm.minimum", bound, x)):
            if tvm_ffi.structural_equal(less, left) and tvm_ffi.structural_equal(more, right):
                return call(name, x, bound)
        return node

    def extreme(node: Any) -> Any:
        if not str(node.ty.dtype).startswith("float"):
            return node
        return call("llvm.maximum" if isinstance(node, tirx.Max) else "llvm.minimum", node.a, node.b)

    body = tvm_ffi.structural_map(func.body, [(tirx.Select, select), ((tirx.Max, tirx.Min), extreme)])
    return tirx.PrimFunc(func.params, body, func.ret_type, func.attrs)


def lower_kernels(kernels: tuple[Kernel, ...], target: Target) -> Any:
    """The kernels as one TVM module of plain C functions, ready for LLVM."""
    functions = {}
    for kernel in kernels:
        functions[kernel.name] = kernel.func.with_attrs({"global_symbol": kernel.name, "tirx.noalias": True})
    bound = tvm_target(target)
    module = ir.transform.Sequential(phases(bound))(tvm.IRModule(functions))
    plain = {var: _plain_c(func) for var, func in module.functions.items()}
    if target.arch == "aarch64":
        plain = {var: _with_fmax(func) for var, func in plain.items()}
    return tirx.transform.LowerIntrin()(tvm.IRModule(plain, attrs=module.attrs))


def compile_kernels(kernels: tuple[Kernel, ...], target: Target, path: Path) -> None:
    """Write one relocatable object with every kernel as a global function to `path`. Raises BuildError."""
    _machine_code(kernels, target, lambda library: library.write_to_file(str(path), "o"))


def assembly(kernels: tuple[Kernel, ...], target: Target) -> str:
    """The same code as the target's assembly, for reading. Raises BuildError."""
    return _machine_code(kernels, target, lambda library: library.inspect_source("s"))


def _machine_code(kernels: tuple[Kernel, ...], target: Target, use: Callable[[Any], Any]) -> Any:
    try:
        return use(codegen_build(lower_kernels(kernels, target), tvm_target(target).host))
    except BUILD_ERRORS as error:
        raise BuildError(f"TVM could not build {len(kernels)} kernels: {last_line(error)}", target.name) from error


def argument_bytes(kernel: Kernel) -> tuple[int, ...]:
    """Bytes of what each pointer of the kernel points to; one element where there is nothing: TIR has no empty buffers."""
    buffers = [param for param in kernel.func.params if tirx.is_buffer_var(param)]
    counts = [math.prod(int(extent) for extent in buffer.shape) for buffer in buffers]
    widths = [max(1, tvm.DataType(str(buffer.dtype)).bits // 8) for buffer in buffers]
    return tuple(count * width for count, width in zip(counts, widths, strict=True))


def same_code(a: Kernel, b: Kernel) -> bool:
    """Whether two kernels compute the same from the same arguments."""
    return a.func is b.func or bool(tvm_ffi.structural_equal(a.func, b.func))


def kernel_text(kernel: Kernel) -> str:
    """The kernel's TIR as TVM script."""
    return kernel.func.script()
