"""The generic route on CUDA devices: operators against ONNX Runtime, emulated; how kernels share their work; refusals."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir
import pytest
from cuda_emulator import EmulatedLibrary
from harness import Room
from operator_cases import CASES, Case, floats
from operator_cases.reference import compare, expected, model_of
from programs import agree, parse

import sparsec
from sparsec.cuda import nvrtc
from sparsec.cuda.source import cuda_source, declared_shared, launch_of
from sparsec.errors import UnsupportedError
from sparsec.loading.load import load_model
from sparsec.loading.preflight import preflight
from sparsec.lowering import lower
from sparsec.lowering.device import STATIC_SHARED
from sparsec.lowering.generic import GenericRegion, lower_generic
from sparsec.targets import find_target, with_cpu_fallback, with_precision

CUDA = find_target("cuda", arch="sm_90")

# Elementwise operators are one schedule: one for each way TVM writes them in CUDA C.
ELEMENTWISE = {"Add", "Pow", "Erf", "Round", "Clip", "PRelu", "Where", "Cast", "Mod", "IsNaN", "Mish"}
LACKED = {"CumSum", "ScatterND"}

# Sums over few and many terms, with and without what follows them, of results that no block of threads divides.
ODD = [
    Case("ReduceMean", (floats(1, 37, 5, 5),), attributes={"axes": [2, 3], "keepdims": 1}, name="37x25", depth=25),
    Case("ReduceMean", (floats(67, 61),), attributes={"axes": [1], "keepdims": 0}, name="67x61", depth=61),
    Case("ReduceL2", (floats(131, 3),), attributes={"axes": [1]}, name="131x3", depth=3),
    Case("ReduceMean", (floats(3, 1009),), attributes={"axes": [1]}, name="3x1009", depth=1009),
    Case("ReduceSumSquare", (floats(1009, 3),), attributes={"axes": [0]}, name="columns", depth=1009),
    Case("ReduceMax", (floats(5, 7, 300),), attributes={"axes": [0, 2], "keepdims": 0}, name="outer and inner"),
    Case("AveragePool", (floats(1, 3, 23, 29),), attributes={"kernel_shape": [3, 3], "strides": [2, 2]}, name="odd", depth=9),
    Case("MaxPool", (floats(1, 7, 13, 11),), attributes={"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, name="odd"),
    Case("MaxPool", (np.arange(-64, 64, dtype=np.int8).reshape(1, 2, 8, 8),), attributes={"kernel_shape": [4, 4]}, name="bytes"),
    Case("ArgMax", (floats(3, 97),), attributes={"axis": 1}, name="odd"),
    Case("Softmax", (floats(3, 97),), attributes={"axis": 1}, name="odd"),
    Case("MatMul", (floats(13, 17), floats(17, 19)), name="odd", depth=17),
]  # fmt: skip


def chosen() -> list[Case]:
    """One case of each operator that is no other's schedule, and the odd shapes."""
    first: dict[str, Case] = {}
    plain = {case.op for case in CASES if len(case.x) == 1 and not case.constants and not case.attributes}
    for case in CASES:
        if case.op not in LACKED and (case.op in ELEMENTWISE or case.op not in plain):
            first.setdefault(f"{case.op} of {case.x[0].dtype.kind}", case)
    return [*first.values(), *ODD]


@dataclass(frozen=True)
class Lowered:
    """Regions by case, their kernels as one emulated library."""

    regions: dict[str, GenericRegion]
    library: EmulatedLibrary


@pytest.fixture(scope="module")
def lowered() -> Lowered:
    regions = {}
    for case in chosen():
        nodes = list(onnx_ir.from_proto(model_of(case)).graph)
        regions[case.id] = lower_generic(nodes, CUDA.machine, gpu=CUDA.gpu)
    kernels = {step.kernel.name: step.kernel for region in regions.values() for step in region.steps}
    return Lowered(regions, EmulatedLibrary(list(kernels.values())))


@pytest.mark.parametrize("case", chosen(), ids=lambda case: case.id)
def test_operator(case: Case, lowered: Lowered) -> None:
    region, references = lowered.regions[case.id], expected(case)
    results = [_run(case, region, references, lowered.library, order) for order in (0, 1)]
    for up, down, reference in zip(*results, references, strict=True):
        assert up.tobytes() == down.tobytes(), "depends on the order of threads"
        compare(case, reference, up)


def _run(
    case: Case, region: GenericRegion, references: list[np.ndarray], library: EmulatedLibrary, order: int
) -> list[np.ndarray]:
    garbage = {f"y{i}": np.full(y.shape, 99).astype(y.dtype) for i, y in enumerate(references)}
    values = {f"x{i}": array for i, array in enumerate(case.x)} | region.constants | garbage
    for name, (shape, dtype) in region.temporaries.items():
        values[name] = np.full(shape, 99).astype(dtype)
    for step in region.steps:
        values |= {room.name: np.full(room.shape, 99).astype(room.dtype) for room in step.scratch}
    rooms = {name: Room(np.ascontiguousarray(array)) for name, array in values.items()}
    for step in region.steps:
        names = [*step.inputs, *step.outputs, *(room.name for room in step.scratch)]
        assert step.kernel.launch is not None
        library.run(step.kernel.name, [rooms[n].array.ctypes.data for n in names], step.kernel.launch, order)
        for name in names:
            rooms[name].check(f"{step.kernel.name}: {name}")
    return [rooms[f"y{i}"].array for i in range(len(references))]


def test_every_kernel_has_threads_for_its_work(lowered: Lowered) -> None:
    for name, region in lowered.regions.items():
        for step in region.steps:
            launch = step.kernel.launch
            assert launch == launch_of(step.kernel.func)
            threads = launch.blocks * math.prod(launch.block)
            assert threads > 1 or step.flops <= 32, f"{name}: {threads} threads for {step.flops} operations"
            assert threads >= 32 or step.flops < 1024, f"{name}: {threads} threads for {step.flops} operations"
            assert math.prod(launch.block) <= 1024


def test_no_kernel_asks_for_more_shared_memory_than_every_device_has(lowered: Lowered) -> None:
    used = [declared_shared(text) for text in lowered.library.source.split('extern "C"')]
    assert 0 < max(used) <= STATIC_SHARED
    several = "__shared__ alignas(64) float a[8];\n__shared__ alignas(64) signed char b[32];__shared__ alignas(16) int64_t c[2];"
    assert declared_shared(several) == 32 + 32 + 16


@pytest.mark.parametrize("arch", ["sm_87", "sm_90"])
def test_kernels_compile(lowered: Lowered, arch: str) -> None:
    try:
        nvrtc.version()
    except Exception as error:
        pytest.skip(str(error))
    kernels = {step.kernel.name: step.kernel for region in lowered.regions.values() for step in region.steps}
    cubin, ptx = nvrtc.compile_cuda(cuda_source(tuple(kernels.values()), arch), arch)
    assert cubin.startswith(b"\x7fELF")
    assert all(f".entry {name}".encode() in ptx for name in kernels)


def test_threads_of_a_warp_never_exchange_values_without_a_barrier() -> None:
    case = Case("ReduceMax", (np.zeros((3, 500), np.int8),), attributes={"axes": [1]}, opset=13)
    nodes = list(onnx_ir.from_proto(model_of(case)).graph)
    (step,) = lower_generic(nodes, CUDA.machine, gpu=CUDA.gpu).steps
    text = cuda_source((step.kernel,), "sm_90")
    assert "__activemask" not in text
    assert "volatile" not in text[text.index('extern "C"') :]


MOVES = """
moves (float[1, 6, 5, 3] x, float[1, 2, 5, 3] z) => (float[1, 12, 5, 3] y, float[1, 2, 5, 3] u, float[1, 90] flat)
{
    begin = Constant <value_ints = [0]> ()
    end = Constant <value_ints = [1]> ()
    axis = Constant <value_ints = [1]> ()
    a, b = Split <axis = 1, num_outputs = 2> (x)
    c = Relu (a)
    first = Slice (b, begin, end, axis)
    o = Neg (first)
    y = Concat <axis = 1> (c, x, z, o)
    u = Exp (z)
    flat = Flatten (x)
}
"""


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_views_and_concatenation_in_place(precision: str) -> None:
    program = agree(parse(MOVES), with_precision(CUDA, precision))
    moved = [step.kernel for step in program.steps if step.kernel.startswith(("cuda_copy", "cuda_cast"))]
    assert len(moved) >= 2, "inputs of the model are copied into a Concat, or converted in their place there"
    free = {layer.op for layer in program.layers if layer.route == "free"}
    assert free >= {"Split", "Slice", "Flatten"}


HALF = """
half (float16[1, 3, 8, 8] x, float16[8, 3, 3, 3] w0, float16[8] w1, float16[1, 8, 1, 1] w2, float16[10, 8] w3)
    => (float16[1, 10] y, float16[1, 3, 8, 8] z)
{
    a = Conv <pads = [1, 1, 1, 1]> (x, w0, w1)
    b = Relu (a)
    c = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (b)
    d = Max (c, w2)
    e = Min (d, w2)
    f = Erf (e)
    g = Round (x)
    h = Ceil (x)
    i = Abs (x)
    j = Floor (i)
    k = Sub (h, j)
    z = Mul (g, k)
    l = GlobalAveragePool (f)
    m = Flatten (l)
    n = Gemm <transB = 1> (m, w3)
    y = Softmax (n)
}
"""


@pytest.mark.parametrize("passes", [(), ("widen",)])
def test_a_model_in_float16(passes: tuple[str, ...]) -> None:
    program = agree(onnx_ir.to_proto(sparsec.rewrite(parse(HALF), passes=passes)), CUDA)
    names = {layer.op for layer in program.layers}
    assert ("Cast" in names) == bool(passes)
    if importlib.util.find_spec("nvidia.cuda_nvrtc"):
        cubin, _ = nvrtc.compile_cuda(cuda_source(program.kernels, "sm_87"), "sm_87")
        assert cubin.startswith(b"\x7fELF")


@pytest.mark.parametrize("name", ["max", "half", "exp", "\u8f93\u5165", "a/b.c"])
def test_a_name_of_the_graph_is_none_of_the_compilers(name: str) -> None:
    (step,) = lower_generic(list(onnx_ir.from_proto(_named(name)).graph), CUDA.machine, gpu=CUDA.gpu).steps
    text = cuda_source((step.kernel,), "sm_90")
    assert text.isascii()
    if importlib.util.find_spec("nvidia.cuda_nvrtc"):
        assert nvrtc.compile_cuda(text, "sm_90")[0].startswith(b"\x7fELF")


def _named(name: str) -> onnx.ModelProto:
    """y = exp(max(x, x)), x called `name`."""
    kind = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4, 5])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4, 5])
    nodes = [onnx.helper.make_node("Relu", [name], ["r"]), onnx.helper.make_node("Exp", ["r"], ["y"])]
    graph = onnx.helper.make_graph(nodes, "g", [kind], [out])
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(made)


LACKING = """
lacking (float[4, 30] x, float[2, 30] updates) => (float[4, 30] y)
{
    axis = Constant <value = int64 {1}> ()
    at = Constant <value = int64[2, 1] {2, 0}> ()
    a = Relu (x)
    b = CumSum (a, axis)
    c = ScatterND (b, at, updates)
    y = Exp (c)
}
"""


def test_what_the_gpu_lacks_is_refused_at_once() -> None:
    model = parse(LACKING)
    loaded = load_model(model)
    with pytest.raises(UnsupportedError) as caught:
        lower(loaded, CUDA)
    assert all(f"({op})" in caught.value.message for op in LACKED)
    assert caught.value.message.endswith("--allow-cpu-fallback runs on the host's CPU what has a lowering there")
    with pytest.raises(UnsupportedError) as caught:
        preflight(model, target=CUDA)
    assert sorted(problem.split()[0] for problem in caught.value.problems) == sorted(LACKED)
    assert all("--allow-cpu-fallback" in problem for problem in caught.value.problems)


def test_what_the_gpu_lacks_runs_on_the_host_where_that_is_allowed() -> None:
    target = with_cpu_fallback(CUDA)
    preflight(parse(LACKING), target=target)
    program = agree(parse(LACKING), target)
    launches = {kernel.name: kernel.launch for kernel in program.kernels}
    host = [layer for layer in program.layers if launches.get(layer.kernel) is None and layer.route == "generic"]
    assert {layer.op for layer in host} == LACKED
    assert all(layer.reason.startswith("on the host's CPU: its loops depend on each other") for layer in host)
    assert {layer.op for layer in program.layers if launches.get(layer.kernel) is not None} >= {"Relu", "Exp"}
