"""Small quantized models as ONNX text, run and compared with ONNX Runtime in steps.

Scales and zero points that every model has: s, z and u, o for uint8, t, n for int8.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
from programs import onnx_runtime, parse, run_program

from sparsec.loading.load import load_model, model_bytes
from sparsec.lowering import lower
from sparsec.program import Program
from sparsec.targets import find_target

CONSTANTS = """<float s = {0.05}, uint8 z = {131}, float t = {0.021}, int8 n = {-7}, float u = {0.004}, uint8 o = {0},
    float half = {0.5}, float three = {3}, float six = {6}, float zero = {0}, float sixth = {0.16666667}"""
QUANT = ("QuantizeLinear", "DequantizeLinear")


def graph(inputs: str, outputs: str, nodes: str, constants: str = "") -> onnx.ModelProto:
    """Q(x, s, z) and D(q, s, z) stand for the quantizing operators."""
    for short, name in zip("QD", QUANT, strict=True):
        nodes = nodes.replace(f" {short}(", f" {name}(").replace(f" {short}<", f" {name}<")
    return parse(f"g ({inputs}) => ({outputs}) {CONSTANTS}{constants}> {{ {nodes} }}")


def feeds_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Every byte, over and over, in an order of its own for each input; floats around a few hundred steps."""
    rng, feeds = np.random.default_rng(7), {}
    for value in model.graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        count = int(np.prod(shape))
        if dtype == np.float32:
            feeds[value.name] = (10 * rng.standard_normal(shape)).astype(dtype)
        else:
            order = np.concatenate([rng.permutation(256) for _ in range(-(-count // 256))])[:count]
            feeds[value.name] = order.astype(np.uint8).view(dtype).reshape(shape)
    return feeds


def optimized(model: bytes, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What ONNX Runtime computes with its own fusions, QLinearAdd and so on."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def check(model: onnx.ModelProto, exact: bool = False) -> Program:
    """Lowered and run for the host: within one step of ONNX Runtime with and without its fusions; `exact`: equal without.

    Floats that are dequantized in the end are compared in steps of 0.05, the scale `s`.
    """
    loaded = load_model(model)
    program, feeds = lower(loaded, find_target("host")), feeds_of(model)
    data, results = model_bytes(loaded), run_program(program, feeds)
    for run in (onnx_runtime, optimized):
        for name, value in run(data, feeds).items():
            assert results[name].dtype == value.dtype
            step = 1 if value.dtype != np.float32 else 0.05
            off = np.abs(results[name].astype(np.float64) - value.astype(np.float64)) / step
            assert off.max() <= 1.001 and np.mean(off > 0.001) < 0.02, (name, run.__name__, off.max(), np.mean(off > 0))
            if exact and run is onnx_runtime:
                np.testing.assert_array_equal(results[name], value)
    return program


def kernels(program: Program) -> list[tuple[str, str]]:
    """(operators, kernel without its shape) of each layer; none took the generic route."""
    assert all(layer.route != "generic" for layer in program.layers), [(x.op, x.reason) for x in program.layers]
    return [(layer.op, layer.kernel.rpartition("_")[0] or layer.kernel) for layer in program.layers]
