"""Few rows times weights kept in 8 or 4 bits: microseconds a layer beside float32 weights and ONNX Runtime, one thread.

    python tools/weight_only_table.py [MxKxN ...] [--group 32] [--layers 4] [--seconds 6]

Each candidate runs over `layers` layers with weights of their own, so that they come from memory and not from a cache (as
they do in a model); all take turns, medians. ONNX Runtime: MatMul in float32, and com.microsoft.MatMulNBits with the same
integers, at accuracy level 1 (float32 activations, as ours) and 4 (activations rounded to 8 bits as well). The last column
is the largest difference to float64 in units of the largest result.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from sparsec import measure
from sparsec.kernels import gemm, integers, weight_only
from sparsec.kernels.base import KernelCall
from sparsec.kernels.integers import Stored
from sparsec.program import Kernel
from sparsec.targets import find_target

SHAPES = ("1x4096x4096",)
SLOW = 5.0  # times float32: what takes longer is sampled three times


def stored(k: int, n: int, bits: int, group: int, seed: int) -> Stored:
    """A symmetric weight of normal values."""
    rng = np.random.default_rng([k, n, bits, seed])
    top = 127 if bits == 8 else 7
    q = np.clip(np.rint(top / 3 * rng.standard_normal((n, k))), -top, top).astype(np.int8)
    return Stored(bits, group, q, rng.uniform(0.8e-2, 1.2e-2, (n, -(-k // group))).astype(np.float32))


def session(nodes: list[Any], constants: dict[str, np.ndarray], m: int, k: int, n: int) -> ort.InferenceSession:
    """A model of products that all read x, one thread."""
    graph = helper.make_graph(
        nodes, "products", [helper.make_tensor_value_info("x", TensorProto.FLOAT, (m, k))],
        [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, (m, n)) for node in nodes],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    made = helper.make_model(graph, opset_imports=domains, ir_version=10)
    onnx.checker.check_model(made)
    return ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def nbits(layers: list[Stored], m: int, level: int) -> ort.InferenceSession:
    """MatMulNBits: weights unsigned around half of their range, blocks along k, two nibbles a byte."""
    (n, k), bits, group = layers[0].q.shape, layers[0].bits, layers[0].group
    constants, nodes = {}, []
    for i, layer in enumerate(layers):
        u = (layer.q.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
        u = (u[:, ::2] | u[:, 1::2] << 4) if bits == 4 else u
        constants[f"w{i}"] = np.ascontiguousarray(u.reshape(n, k // group, -1))
        constants[f"s{i}"] = np.ascontiguousarray(layer.scale)
        nodes.append(
            helper.make_node(
                "MatMulNBits", ["x", f"w{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft", K=k, N=n, bits=bits,
                block_size=group, accuracy_level=level,
            )
        )  # fmt: skip
    return session(nodes, constants, m, k, n)


def dense(layers: list[Stored], m: int) -> ort.InferenceSession:
    """MatMul of float32."""
    n, k = layers[0].q.shape
    constants = {f"w{i}": np.ascontiguousarray(layer.real().T) for i, layer in enumerate(layers)}
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(len(layers))]
    return session(nodes, constants, m, k, n)


Sampler = Callable[[], float]  # microseconds a layer


def of_session(made: ort.InferenceSession, x: np.ndarray, layers: int) -> tuple[Sampler, np.ndarray]:
    """Its sampler and its last result."""
    y = made.run(None, {"x": x})[-1]

    def sample() -> float:
        start = time.perf_counter()
        made.run(None, {"x": x})
        return (time.perf_counter() - start) / layers * 1e6

    return sample, y


def of_calls(calls: list[KernelCall], x: np.ndarray, shape: tuple[int, int]) -> tuple[Sampler, np.ndarray]:
    """The same of our kernels."""
    library = measure.Library([Kernel(calls[0].name, calls[0].func)], find_target("host"))
    stage = measure.Stage(x.reshape(-1))
    trial = measure.Trial(library, [(call, {"x": "x", "y": "y"}) for call in calls], stage, 1e6)
    trial.run()
    y = stage.rooms["y"].array.reshape(shape).copy()

    def sample() -> float:
        trial.sample()
        return trial.samples[-1] / len(calls)

    return sample, y


def candidates(m: int, k: int, n: int, group: int, count: int) -> dict[str, tuple[Sampler, float]]:
    """Sampler and error of each candidate."""
    machine = find_target("host").machine
    x = np.random.default_rng(0).standard_normal((m, k), np.float32)
    found: dict[str, tuple[Sampler, float]] = {}

    def add(name: str, made: tuple[Sampler, np.ndarray], last: Stored) -> None:
        exact = integers.reference(last, x)
        found[name] = made[0], float(np.abs(made[1] - exact).max() / np.abs(exact).max())

    for bits in (8, 4):
        layers = [stored(k, n, bits, group, i) for i in range(count)]
        if bits == 8:
            add("ours, float32", of_calls([gemm.bind(machine, m=m, w=s.real()) for s in layers], x, (m, n)), layers[-1])
            add("ORT, float32", of_session(dense(layers, m), x, count), layers[-1])
        calls = [weight_only.bind(machine, m=m, stored=s) for s in layers]
        add(f"ours, int{bits}", of_calls(calls, x, (m, n)), layers[-1])
        if bits == 8:
            row = [Stored(8, k, s.q, s.scale[:, :1]) for s in layers]
            add(
                "ours, int8 by output",
                of_calls([weight_only.bind(machine, m=m, stored=s) for s in row], x, (m, n)),
                row[-1],
            )
        for level in (1, 4):
            try:
                add(f"ORT, int{bits}, level {level}", of_session(nbits(layers, m, level), x, count), layers[-1])
            except Exception as error:  # pybind classes without a common base
                print(f"ORT, int{bits}, level {level}: {str(error).splitlines()[0][:120]}", file=sys.stderr)
    return found


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=SHAPES, help="M x K x N")
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=6.0, help="a shape")
    options = parser.parse_args()
    for shape in options.shapes:
        m, k, n = (int(part) for part in shape.split("x"))
        found = candidates(m, k, n, options.group, options.layers)
        samples: dict[str, list[float]] = {name: [] for name in found}
        end = time.perf_counter() + options.seconds
        while time.perf_counter() < end:
            for name, (sampler, _) in found.items():
                if len(samples[name]) < 3 or samples[name][-1] < SLOW * samples["ours, float32"][-1]:
                    samples[name].append(sampler())
        us = {name: statistics.median(values[len(values) // 10 :]) for name, values in samples.items()}
        print(f"\n{shape}, groups of {options.group}, {options.layers} layers, {len(samples['ours, int4'])} rounds\n")
        print("| candidate | us a layer | ours, float32 / it | it / ours, same bits | error |\n|---|---|---|---|---|")
        for name, (_, error) in found.items():
            own = us["ours, int8" if "int8" in name else "ours, int4" if "int4" in name else "ours, float32"]
            print(
                f"| {name} | {us[name]:.0f} | {us['ours, float32'] / us[name]:.2f} | {us[name] / own:.2f} | {error:.1e} |"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
