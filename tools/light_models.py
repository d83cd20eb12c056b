"""The light models of `onnx.backend.test` (AlexNet ... VGG-19, with made-up weights) against ONNX Runtime, built in memory.

    python tools/light_models.py [--models squeezenet vgg19 ...]

Their weights are ConstantOfShape nodes, up to 400 MB each, which loading refuses to fold (a file of 9 kB that asks for
half a gigabyte is what a hostile one looks like); they become initializers here first. Each model has a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
from onnx import numpy_helper

FOLDER = Path(onnx.backend.test.__file__).parent / "data" / "light"
RTOL, ATOL = 1e-3, 1e-7  # of the suite


def written_out(path: Path) -> onnx.ModelProto:
    """The model with its weights as initializers that are no inputs."""
    model = onnx.load(str(path))
    graph = model.graph
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        if node.op_type == "ConstantOfShape" and node.input[0] in shapes:
            (value,) = (numpy_helper.to_array(a.t) for a in node.attribute)
            array = np.full(shapes[node.input[0]], value.reshape(-1)[0])
            graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    del graph.input[:]
    graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, 4)  # before, initializers had to be inputs
    return model


def check(name: str) -> str:
    """Lower, build and run one model; a line about it."""
    import onnxruntime

    from sparsec.backend import Backend
    from sparsec.limits import Limits

    model = written_out(FOLDER / f"light_{name}.onnx")
    rng = np.random.default_rng(0)
    feeds = {
        v.name: rng.random([d.dim_value for d in v.type.tensor_type.shape.dim], np.float32) for v in model.graph.input
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    expected = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feeds)
    started = time.process_time()
    results = Backend.prepare(model, limits=Limits(isolate=0)).run(feeds)
    seconds = time.process_time() - started
    error = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(results, expected, strict=True))
    right = all(np.allclose(a, b, rtol=RTOL, atol=ATOL) for a, b in zip(results, expected, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return f"{'ok' if right else 'WRONG'}  relative error {error:.1e}, {seconds:.0f} s of CPU, {peak} MB"


def main() -> int:
    """Command line."""
    known = sorted(path.name[len("light_") : -len(".onnx")] for path in FOLDER.glob("*.onnx"))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=known, default=known)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(check(options.one))
        return 0
    failed = 0
    for name in options.models:
        done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True, check=False)
        lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no output"]
        failed += not lines[-1].startswith("ok")
        print(f"{name:<14} {lines[-1]}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
