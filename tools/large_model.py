"""A model above 2 GB: made, pruned to 4x1 blocks by `sparsec rewrite`, read back. `python tools/large_model.py FOLDER [--gigabytes 3]`

Prints seconds and the peak memory of the process and of the one that reads the model. The folder needs twice the size.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROWS, COLUMNS = 4096, 8192
BYTES = 4 * ROWS * COLUMNS


def make(folder: Path, gigabytes: float) -> Path:
    """x[1, 4096] through pairs of products with a Relu between, weights in large.onnx.data."""
    pairs = max(1, round(gigabytes * 2**30 / (2 * BYTES)))
    rng = np.random.default_rng(0)
    base = rng.standard_normal(ROWS * COLUMNS, np.float32) / np.float32(64)
    nodes, tensors, value = [], [], "x"
    with (folder / "large.onnx.data").open("wb") as file:
        for i in range(2 * pairs):
            shape = (ROWS, COLUMNS) if i % 2 == 0 else (COLUMNS, ROWS)
            file.write(np.roll(base, 12345 * i).data)
            tensor = TensorProto(
                name=f"w{i}", data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL
            )
            for key, text in (("location", "large.onnx.data"), ("offset", str(i * BYTES)), ("length", str(BYTES))):
                tensor.external_data.add(key=key, value=text)
            tensors.append(tensor)
            nodes.append(helper.make_node("MatMul", [value, f"w{i}"], [f"p{i}"], name=f"product{i}"))
            nodes.append(helper.make_node("Relu", [f"p{i}"], [f"r{i}"], name=f"relu{i}"))
            value = f"r{i}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, ROWS]) for n in ("x", value)]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], tensors)
    path = folder / "large.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    )
    return path


PROGRAM = """
import resource, sys
from sparsec import cli
from sparsec.loading import isolation
worst = [0]
check = isolation._check_ending
def remember(ending, *others):
    worst[0] = max(worst[0], ending["peak"])
    check(ending, *others)
isolation._check_ending = remember
code = cli.run(sys.argv[1:])
print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, worst[0], file=sys.stderr)
sys.exit(code)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    path = make(given.folder, given.gigabytes)
    out = given.folder / "pruned.onnx"
    command = ["rewrite", str(path), "-o", str(out), "--overwrite", "--pass", "prune:sparsity=0.5,block=4x1", "--json"]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PROGRAM, *command], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    print(done.stdout.strip() or done.stderr)
    if done.returncode:
        sys.exit(1)
    _, own, worker = (int(text) for text in done.stderr.split()[-3:])
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    size = (given.folder / "large.onnx.data").stat().st_size
    print(
        f"weights {size / 2**30:.2f} GiB; peak {own / 2**30:.2f} GiB, of the process that reads {worker / 2**30:.2f} GiB;"
    )
    print(f"{seconds:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of the processor")
    written = onnx.load(str(out), load_external_data=False)
    zeros = json.loads(done.stdout)["zeros"]
    (tensor,) = (t for t in written.graph.initializer if t.name == "w0")
    entries = {e.key: e.value for e in tensor.external_data}
    if entries:
        file, at = out.with_name(entries["location"]), int(entries["offset"])
        first: np.ndarray = np.memmap(file, np.float32, "r", at, (ROWS, COLUMNS))
    else:  # below 2 GB
        first = numpy_helper.to_array(tensor)
    blocks = first.T.reshape(COLUMNS // 4, 4, ROWS) != 0
    torn = int((blocks.any(axis=1) != blocks.all(axis=1)).sum())
    print(f"{len(written.graph.initializer)} tensors, {100 * zeros:.1f}% zero, {torn} blocks of the first in part")


if __name__ == "__main__":
    main()
