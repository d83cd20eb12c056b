"""Products with a constant weight: microseconds of our kernels beside ONNX Runtime's, float32 and 8 bits, on one thread.

    python tools/product_table.py [MxKxN ...] [--seconds 3]

A session's fixed costs are left out by the difference between a model of many such layers, each with weights of its own,
and one of a single layer; ours run over as many weights. All candidates are sampled in turns; medians. The two 8-bit
results are compared byte by byte.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from sparsec import measure
from sparsec.kernels import gemm, gemm_int8
from sparsec.kernels.base import KernelCall
from sparsec.kernels.quantized import QuantType, Requantize
from sparsec.program import Kernel
from sparsec.targets import find_target

SHAPES = ("1x1024x1000", "98x64x256", "98x256x64")
LAYERS = 9
X, Y = QuantType(0.02, 128), QuantType(0.05, 120)


@dataclass(frozen=True)
class Weights:
    """One layer in 8 bits."""

    w: np.ndarray  # int8 [N, K]
    scale: np.ndarray  # float32 [N]
    bias: np.ndarray  # int32 [N]

    @property
    def real(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight and bias as float32."""
        return self.w * self.scale[:, None], (self.bias * self.scale * np.float32(X.scale)).astype(np.float32)


def weights(k: int, n: int, seed: int) -> Weights:
    """Weights whose results fill the range of Y."""
    rng = np.random.default_rng([k, n, seed])
    w = np.clip(np.rint(40 * rng.standard_normal((n, k))), -127, 127).astype(np.int8)
    scale = np.full(n, 2.0 / (40 * 75 * X.scale * np.sqrt(k)), np.float32) * rng.uniform(0.8, 1.2, n).astype("f")
    return Weights(w, scale, rng.integers(-2000, 2000, n).astype(np.int32))


def model(m: int, k: int, n: int, layers: list[Weights], quantized: bool) -> bytes:
    """All layers read the same x."""
    constants: dict[str, np.ndarray] = {}
    nodes = []

    def dequantize(name: str, scale: np.ndarray | float, zero: np.ndarray, axis: int | None = None) -> str:
        constants[f"{name}_s"], constants[f"{name}_z"] = np.asarray(scale, np.float32), zero
        options = {} if axis is None else {"axis": axis}
        nodes.append(helper.make_node("DequantizeLinear", [name, f"{name}_s", f"{name}_z"], [f"{name}_r"], **options))
        return f"{name}_r"

    x = dequantize("x", X.scale, np.array(X.zero_point, np.uint8)) if quantized else "x"
    for i, layer in enumerate(layers):
        if not quantized:
            constants[f"w{i}"], constants[f"b{i}"] = layer.real
            nodes.append(helper.make_node("Gemm", [x, f"w{i}", f"b{i}"], [f"y{i}"], transB=1))
            continue
        constants[f"w{i}"], constants[f"b{i}"] = layer.w, layer.bias
        w = dequantize(f"w{i}", layer.scale, np.zeros(n, np.int8), 0)
        b = dequantize(f"b{i}", layer.scale * np.float32(X.scale), np.zeros(n, np.int32), 0)
        constants["y_s"], constants["y_z"] = np.float32(Y.scale), np.array(Y.zero_point, np.uint8)
        nodes.append(helper.make_node("Gemm", [x, w, b], [f"f{i}"], transB=1))
        nodes.append(helper.make_node("QuantizeLinear", [f"f{i}", "y_s", "y_z"], [f"y{i}"]))
    kind = TensorProto.UINT8 if quantized else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "products", [helper.make_tensor_value_info("x", kind, (m, k))],
        [helper.make_tensor_value_info(f"y{i}", kind, (m, n)) for i in range(len(layers))],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(made)
    return made.SerializeToString()


def session(m: int, k: int, n: int, layers: list[Weights], quantized: bool) -> ort.InferenceSession:
    """Of such a model, one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(model(m, k, n, layers, quantized), options, providers=["CPUExecutionProvider"])


def timed(run: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def candidates(m: int, k: int, n: int) -> tuple[dict[str, Callable[[], float]], str]:
    """A sampler, microseconds a layer, for each candidate, and what the comparison of results says."""
    machine, target = find_target("host").machine, find_target("host")
    layers = [weights(k, n, i) for i in range(LAYERS)]
    x = np.random.default_rng(0).integers(0, 256, (m, k)).astype(np.uint8)
    found: dict[str, Callable[[], float]] = {}
    results = []
    for quantized in (False, True):
        feed = {"x": x if quantized else X.dequantize(x)}
        many, one = (session(m, k, n, part, quantized) for part in (layers, layers[:1]))
        results.append(many.run(None, feed))

        def sample(many=many, one=one, feed=feed) -> float:
            slope = timed(lambda: many.run(None, feed)) - timed(lambda: one.run(None, feed))
            return slope / (LAYERS - 1) * 1e6

        found["ORT int8" if quantized else "ORT f32"] = sample
    for name, calls in {
        "our f32": [gemm.bind(machine, m=m, w=real[0], bias=real[1]) for real in (layer.real for layer in layers)],
        "our int8": [
            gemm_int8.bind(machine, m=m, w=layer.w, x=X, w_scale=layer.scale, steps=Requantize(Y), bias=layer.bias)
            for layer in layers
        ],
    }.items():
        library = measure.Library([Kernel(calls[0].name, calls[0].func)], target)
        stage = measure.Stage(x.reshape(-1) if name == "our int8" else X.dequantize(x).reshape(-1))

        def bound(call: KernelCall) -> dict[str, str]:
            return {"x": "x", "y": "y"}

        trial = measure.Trial(library, [(call, bound(call)) for call in calls], stage, 1e6)
        check = measure.Trial(library, [(calls[0], bound(calls[0]))], stage, 1e6)
        check.run()
        ours = stage.rooms["y"].array.reshape(m, n).copy()

        def sample_ours(trial=trial) -> float:
            trial.sample()
            return trial.samples[-1] / LAYERS

        found[name] = sample_ours
    apart = np.abs(ours.astype(int) - results[1][0].astype(int))
    return found, f"{100 * np.mean(apart == 0):.3f}% equal, at most {apart.max()} apart"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=SHAPES, help="M x K x N")
    parser.add_argument("--seconds", type=float, default=3.0, help="a shape")
    options = parser.parse_args()
    print("| M x K x N | ORT f32 us | our f32 | ORT int8 | our int8 | ORT int8 / ours | our f32 / int8 | results |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in options.shapes:
        m, k, n = (int(part) for part in shape.split("x"))
        samplers, compared = candidates(m, k, n)
        samples: dict[str, list[float]] = {name: [] for name in samplers}
        end = time.perf_counter() + options.seconds
        while time.perf_counter() < end:
            for name, sampler in samplers.items():
                samples[name].append(sampler())
        us = {name: statistics.median(values[len(values) // 10 :]) for name, values in samples.items()}
        row = [us[name] for name in ("ORT f32", "our f32", "ORT int8", "our int8")]
        ratios = f"{row[2] / row[3]:.2f} | {row[1] / row[3]:.2f}"
        print(f"| {m}x{k}x{n} | {' | '.join(f'{v:.1f}' for v in row)} | {ratios} | {compared} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
