"""8-bit elementwise layers on one thread: our kernels beside the generic route and ONNX Runtime.

    python tools/elementwise_int8_table.py [--cpu NAME] [--rounds 31] [--shape 1,64,56,56]

Each row is a graph of one layer between 8-bit inputs and outputs, with its DequantizeLinear and QuantizeLinear. All run in turns;
ONNX Runtime's microseconds contain those of calling it, about five.
"""

from __future__ import annotations

import argparse
import importlib
import math

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from bench.turns import Burst, pinned, ratio, take_turns
from int8_table import timed
from rich.console import Console
from rich.table import Table

from sparsec.inprocess import InProcess
from sparsec.loading.load import load_model
from sparsec.lowering import lower
from sparsec.program import Program
from sparsec.targets import Target, find_target

select = importlib.import_module("sparsec.lowering.select")
OWN = ("take_lookup", "take_quantized_binary", "take_quantize", "take_dequantize")

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
CONSTANTS = """<float s = {0.05}, uint8 z = {131}, float t = {0.021}, uint8 o = {7}, float u = {0.004}, uint8 n = {0},
    float three = {3}, float six = {6}, float zero = {0}, float sixth = {0.16666667}>"""
X, G = "uint8[SHAPE] a", "uint8[GATE] b"
OPENED = "x = DequantizeLinear(a, s, z)"
BOTH = f"{OPENED}  w = DequantizeLinear(b, t, o)"
CLOSED = "y = QuantizeLinear(r, s, z)"
LAYERS: dict[str, tuple[str, str]] = {
    "quantize": ("float[SHAPE] r", CLOSED),
    "dequantize": (X, "y = DequantizeLinear(a, s, z)"),
    "add": (f"{X}, uint8[SHAPE] b", f"{BOTH}  r = Add(x, w)  {CLOSED}"),
    "mul": (f"{X}, uint8[SHAPE] b", f"{BOTH}  r = Mul(x, w)  {CLOSED}"),
    "mul by a gate": (f"{X}, {G}", f"{BOTH}  r = Mul(x, w)  {CLOSED}"),
    "div": (f"{X}, uint8[SHAPE] b", f"{BOTH}  r = Div(x, w)  {CLOSED}"),
    "sigmoid": (X, f"{OPENED}  r = Sigmoid(x)  {CLOSED}"),
    "hardswish in parts": (
        X, f"{OPENED}  c = Add(x, three)  d = Clip(c, zero, six)  e = Mul(x, d)  r = Mul(e, sixth)  {CLOSED}",
    ),
    "silu, quantized inside": (
        X,
        f"{OPENED}  c = Sigmoid(x)  d = QuantizeLinear(c, u, n)  e = DequantizeLinear(d, u, n)  r = Mul(x, e)  {CLOSED}",
    ),
    "other scale": (X, f"{OPENED}  y = QuantizeLinear(x, t, o)"),
}  # fmt: skip


def model_of(name: str, shape: tuple[int, ...]) -> onnx.ModelProto:
    """The graph of a row."""
    inputs, nodes = LAYERS[name]
    whole, gate = (",".join(map(str, s)) for s in (shape, (*shape[:2], *[1] * (len(shape) - 2))))
    kind = "float" if name == "dequantize" else "uint8"
    text = f"g ({inputs}) => ({kind}[SHAPE] y) {CONSTANTS} {{ {nodes} }}"
    return onnx.parser.parse_model(HEAD + text.replace("SHAPE", whole).replace("GATE", gate))


def feed_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Random inputs."""
    rng, feed = np.random.default_rng(0), {}
    for value in model.graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feed[value.name] = (
            rng.standard_normal(shape).astype("f") if dtype == np.float32 else rng.integers(0, 256, shape, dtype)
        )
    return feed


def generic(model: onnx.ModelProto, target: Target) -> Program:
    """Lowered as if there were no rules for these layers."""
    rules = select.RULES
    select.RULES = tuple(rule for rule in rules if rule.__name__ not in OWN)
    try:
        return lower(load_model(model), target)
    finally:
        select.RULES = rules


def steps_alone(program: Program, feed: dict[str, np.ndarray]) -> Burst:
    """Bursts of the program's steps: its inputs are copied once."""
    made = InProcess(program)
    made.run(feed)
    return timed(lambda: [function(*arguments) for function, arguments in made._calls])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--shape", default="1,64,56,56")
    parser.add_argument("--cpu")
    options = parser.parse_args()
    shape = tuple(int(n) for n in options.shape.split(","))
    target = find_target("host", options.cpu)
    table = Table(
        "layer", "own us", "GB/s", "generic us", "over generic", "ONNX Runtime us", "over ONNX Runtime",
        title=f"{'x'.join(map(str, shape))} on {target.cpu}",
    )  # fmt: skip
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    for name in LAYERS:
        model = model_of(name, shape)
        feed = feed_of(model)
        session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        program = lower(load_model(model), target)
        bursts = {
            "own": steps_alone(program, feed),
            "generic": steps_alone(generic(model, target), feed),
            "ort": timed(lambda session=session, feed=feed: session.run(None, feed)),
        }
        with pinned():
            found = take_turns(bursts, options.rounds, 0.005)
        us = {key: 1e6 * float(np.median(values)) for key, values in found.items()}
        moved = sum(array.nbytes for array in feed.values()) + math.prod(shape) * (4 if name == "dequantize" else 1)
        others = [ratio(found[other], found["own"]).median for other in ("generic", "ort")]
        table.add_row(
            name, f"{us['own']:.1f}", f"{moved / us['own'] / 1e3:.0f}", f"{us['generic']:.1f}", f"{others[0]:.1f}x",
            f"{us['ort']:.1f}", f"{others[1]:.1f}x",
        )  # fmt: skip
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
