"""Models written as ONNX text, lowered and run step by step without linking, and compared with ONNX Runtime.

In the text every graph input whose name starts with `w` is a weight: it becomes an initializer of random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import cuda_emulator
import numpy as np
import onnx
import onnx.parser
import onnxruntime
from harness import Library, ranges

from sparsec.loading.load import load_model, model_bytes
from sparsec.lowering import lower
from sparsec.program import ALIGNMENT, SLACK, Program, Step
from sparsec.proving.tolerance import tolerances
from sparsec.targets import Target, find_target

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'


def parse(text: str, zeros: Mapping[str, float] | float = 0.0, seed: int = 0) -> onnx.ModelProto:
    """A model of `name (inputs and weights) => (outputs) { nodes }`. `zeros`: share of zeros of the weights, or by name."""
    model = onnx.parser.parse_model(HEAD + text)
    rng = np.random.default_rng(seed)
    inputs = []
    for value in model.graph.input:
        if not value.name.startswith("w"):
            inputs.append(value)
            continue
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        share = zeros if isinstance(zeros, float) else zeros.get(value.name, 0.0)
        fan_in = np.prod(shape[1:]) * (1 - share) if len(shape) > 1 else 1.0
        array = rng.standard_normal(shape).astype("f") / np.sqrt(max(fan_in, 1.0))
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        array = np.where(rng.random(shape) < share, 0, array).astype(dtype)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    onnx.checker.check_model(model)
    return model


def feeds_of(model: onnx.ModelProto, seed: int = 1) -> dict[str, np.ndarray]:
    """Random inputs."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        shape = [d.dim_value for d in tensor.shape.dim]
        floating = np.issubdtype(dtype, np.floating)
        feeds[value.name] = (rng.standard_normal(shape) if floating else rng.integers(0, 2, shape)).astype(dtype)
    return feeds


def onnx_runtime(model: bytes, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What ONNX Runtime computes, without its graph optimizations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _memory(size: int) -> np.ndarray:
    memory = np.full(size + ALIGNMENT, 0xFF, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]


def run_program(program: Program, feeds: Mapping[str, np.ndarray], splits: int = 3) -> dict[str, np.ndarray]:
    """The outputs. Tiles run in uneven ranges, last first; one for a CUDA device runs in the emulation of its kernels."""
    if program.target.gpu is not None:
        return cuda_emulator.run_program(program, feeds)
    library = Library(program.kernels, program.target) if program.kernels else None

    def run(step: Step, spaces: Mapping[str, np.ndarray]) -> None:
        assert library is not None
        for span in ranges(step.tiles, splits):
            spaces["scratch"][...] = 0xFF
            library.run(step.kernel, [(spaces[arg.space], arg.offset) for arg in step.args], [span])

    return execute(program, feeds, run)


def execute(
    program: Program, feeds: Mapping[str, np.ndarray], run: Callable[[Step, Mapping[str, np.ndarray]], None]
) -> dict[str, np.ndarray]:
    """The outputs; `run(step, bytes of each space)` runs a step. Memory is filled with NaN as soon as its value is dead."""
    spaces = {
        "arena": _memory(program.arena_bytes), "weights": _memory(program.weights_bytes),
        "scratch": _memory(program.scratch_bytes + SLACK),
    }  # fmt: skip
    for constant in program.constants:
        data = np.ascontiguousarray(constant.data).reshape(-1).view(np.uint8)
        spaces["weights"][constant.offset : constant.offset + data.size] = data
    weights = spaces["weights"].copy()

    for tensor in program.inputs:
        data = np.ascontiguousarray(feeds[tensor.name]).reshape(-1).view(np.uint8)
        spaces["arena"][tensor.location.offset : tensor.location.offset + data.size] = data
    for i, step in enumerate(program.steps):
        dead = np.ones(program.arena_bytes, bool)
        for buffer in program.buffers:
            if buffer.first < i <= buffer.last:
                dead[buffer.offset : buffer.offset + buffer.size] = False
        spaces["arena"][dead] = 0xFF
        run(step, spaces)
    assert (spaces["weights"] == weights).all(), "a kernel wrote into the weights"
    outputs = {}
    for tensor in program.outputs:
        space = spaces[tensor.location.space]
        data = space[tensor.location.offset : tensor.location.offset + tensor.size].copy()
        outputs[tensor.name] = data.view(tensor.dtype).reshape(tensor.shape)
    return outputs


def agree(
    model: onnx.ModelProto, target: Target | None = None, feeds: Mapping[str, np.ndarray] | None = None
) -> Program:
    """Lower and run `model`, compare every output with ONNX Runtime's on the same model; the program."""
    loaded = load_model(model)
    target = target or find_target("host")
    program = lower(loaded, target)
    feeds = feeds or feeds_of(model)
    expected = onnx_runtime(model_bytes(loaded), feeds)
    allowed = tolerances(loaded, target)
    results = run_program(program, feeds)
    assert list(results) == list(expected)
    for name, value in expected.items():
        assert results[name].shape == value.shape, name
        assert results[name].dtype == value.dtype, name
        np.testing.assert_array_equal(np.isnan(results[name]), np.isnan(value), err_msg=name)
        largest = np.abs(value.astype(np.float64)).max(initial=1e-30)
        error = np.abs(results[name].astype(np.float64) - value.astype(np.float64)).max(initial=0.0)
        assert error <= allowed[name] * largest, f"{name}: off by {error / largest:.3g}, tolerance {allowed[name]:.3g}"
    return program


def routes(program: Program) -> dict[str, str]:
    """Operators of each layer -> its route."""
    return {layer.op: layer.route for layer in program.layers}
