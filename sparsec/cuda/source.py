"""PrimFuncs that bind threads to CUDA C: the one module that touches TVM's CUDA back end.

As for CPUs (`sparsec.building.codegen`) kernels become plain functions over pointers:

    extern "C" __global__ void NAME(T0 *a0, T1 *a1, ...)

whose launch is static and read off the function (`launch_of`). TVM's own prelude, which wants headers of a CUDA toolkit,
is replaced by `PRELUDE` and `kernels/cuda/device.h`.
"""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

import tvm
import tvm_ffi
from tvm import ir, s_tir, tirx

from sparsec.building.phases import BUILD_ERRORS, last_line, over_pointers, phases
from sparsec.errors import BuildError
from sparsec.kernels.cuda.emit import SHARED
from sparsec.program import Kernel, Launch

PRELUDE = """\
#include <cuda_fp16.h>
#include <math_constants.h>
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
"""

_AXES = ("blockIdx.x", "blockIdx.y", "blockIdx.z", "threadIdx.x", "threadIdx.y", "threadIdx.z")


# A value of TVM's tree over the last 32 or fewer parts of a sum where it cannot use shuffles.
_IN_STEP = re.compile(r"\bw_\d+_\d+ = ")


def launch_of(func: Any) -> Launch:
    """Grid and block of a function that binds threads; axes it does not bind are 1. Shared memory: its attribute."""
    extents = dict.fromkeys(_AXES, 1)

    def visit(node: Any) -> None:
        if isinstance(node, tirx.AttrStmt) and node.attr_key == "thread_extent":
            tag = str(node.node.thread_tag)
        elif isinstance(node, tirx.For) and node.thread_binding is not None:
            tag = str(node.thread_binding.thread_tag)
        else:
            return
        extent = node.value if isinstance(node, tirx.AttrStmt) else node.extent
        if tag in extents:
            extents[tag] = max(extents[tag], int(extent))

    tvm_ffi.structural_walk(func.body, ((tirx.AttrStmt, tirx.For), visit))
    sizes = tuple(extents.values())
    return Launch(sizes[:3], sizes[3:], int(func.attrs[SHARED]) if SHARED in func.attrs else 0)


def _passes(target: Any) -> list[Any]:
    """What is for every target, then what threads that share memory need."""
    return [
        *phases(target, device=True),
        s_tir.transform.ThreadSync("shared"),
        s_tir.transform.ThreadSync("warp"),
        s_tir.transform.LowerThreadAllreduce(),
        tirx.transform.LowerWarpMemory(),
    ]


def _device(func: Any, name: str, target: Any, launch: Launch) -> Any:
    """`func` over pointers, marked as a kernel."""
    pointers, others, body = over_pointers(func, "global")
    if others:
        raise BuildError(f"a kernel for CUDA takes buffers only, got {others[0].name!r}", name)
    plain = tirx.PrimFunc(pointers, body, func.ret_type, func.attrs)
    bound = [axis for axis, extent in zip(_AXES, (*launch.grid, *launch.block), strict=True) if extent > 1]
    return plain.with_attrs({
        "global_symbol": name, "calling_conv": 2, "target": target, "tirx.is_global_func": True,
        "tirx.kernel_launch_params": bound, "tirx.noalias": True,
    })  # fmt: skip


def cuda_source(kernels: tuple[Kernel, ...], arch: str) -> str:
    """One CUDA C translation unit with every kernel. Raises BuildError.

    Since compute capability 7.0 the threads of a warp need not go in step. What relies on it is refused, as TVM's trees over
    8-bit values do; and its shuffles, which all threads of a block reach, name the threads that there are instead of those
    that happen to be active.
    """
    target = tvm.target.Target({"kind": "cuda", "arch": arch})
    try:
        functions = {kernel.name: kernel.func.with_attrs({"global_symbol": kernel.name}) for kernel in kernels}
        bound = target.with_host(tvm.target.Target("llvm"))
        module = ir.transform.Sequential(_passes(bound))(tvm.IRModule(functions))
        launches = {kernel.name: launch_of(kernel.func) for kernel in kernels}
        plain = {
            var.name_hint: _device(func, var.name_hint, target, launches[var.name_hint])
            for var, func in module.functions.items()
        }
        module = tirx.transform.LowerIntrin()(tvm.IRModule(plain))
        text = str(tvm.get_global_func("target.build.cuda")(module, target).inspect_source())
    except BUILD_ERRORS as error:
        raise BuildError(f"TVM could not build {len(kernels)} kernels: {last_line(error)}", arch) from error
    body = text[text.index('extern "C"') :] if 'extern "C"' in text else ""
    body = body.replace("__activemask()", "sparsec_warp_mask()")
    if _IN_STEP.search(body):
        raise BuildError("threads of a warp would exchange values without a barrier", arch)
    return f"{PRELUDE}\n{device_header()}\n{body}"


def reduces_across_threads(func: Any) -> bool:
    """Whether threads of a block join their parts of a sum, which TVM's passes write out."""
    found: list[Any] = []
    lowered = s_tir.transform.LowerCrossThreadReduction()(tvm.IRModule({"main": func}))["main"]
    name = "tirx.tvm_thread_allreduce"
    tvm_ffi.structural_walk(
        lowered.body, (ir.Call, lambda call: found.append(call) if getattr(call.op, "name", "") == name else None)
    )
    return bool(found)


_SHARED = re.compile(r"__shared__ alignas\(\d+\) ((?:unsigned |signed )?(?:long )?\w+) \w+\[(\d+)\]")
_SIZES = {
    "half": 2, "short": 2, "ushort": 2, "unsigned short": 2, "double": 8, "int64_t": 8, "uint64_t": 8, "long long": 8,
    "bool": 1, "char": 1, "uchar": 1, "signed char": 1, "unsigned char": 1, "int8_t": 1, "uint8_t": 1,
}  # fmt: skip


def declared_shared(source: str) -> int:
    """Bytes of shared memory that the kernels of `source` declare together; types that are not known count four."""
    return sum(_SIZES.get(kind, 4) * int(count) for kind, count in _SHARED.findall(source))


def device_header() -> str:
    """`kernels/cuda/device.h`."""
    return resources.files("sparsec.kernels.cuda").joinpath("device.h").read_text(encoding="utf-8")
