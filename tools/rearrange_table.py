"""What the order of channels is worth: kept importance before and after `rearrange`, and the time it takes.

    python tools/rearrange_table.py [--data DIR] [--sparsity 0.5] [--block 4x1]

Kept importance: the share of sum w^2 in the blocks that stay when every layer that `prune` matches keeps its best
blocks, all layers together. The gap is that to row-wise unstructured pruning at the same sparsity (every row keeps its
largest weights), which no order of channels can reach. DIR holds models/*.onnx (default: $SPARSEC_DATA); ResNet-50 has
seeded weights, so its gap says little and its time is the point.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparsec.loading.load import load_model
from sparsec.models import build
from sparsec.passes import Rearrange
from sparsec.passes.layers import block_sums, parse_block, select_layers
from sparsec.rewriting.pipeline import check_equal, model_bytes

TRAINED = ("mobilenetv2_torchvision", "squeezenet1.1", "resnet20_cifar10")


def kept(model: ir.Model, rows: int, columns: int, sparsity: float) -> tuple[float, float]:
    """Share of sum w^2 that blocks keep, and that the largest weights of every row keep."""
    blocks = single = total = 0.0
    for layer in select_layers(model).layers:
        squares = np.square(layer.read(), dtype=np.float64)
        sums = block_sums(squares, rows, columns).reshape(-1)
        blocks += np.sort(sums)[sums.size - round(sums.size * (1 - sparsity)) :].sum()
        ordered = np.sort(squares.reshape(len(squares), -1), axis=1)
        single += ordered[:, ordered.shape[1] - round(ordered.shape[1] * (1 - sparsity)) :].sum()
        total += squares.sum()
    return blocks / total, single / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("SPARSEC_DATA", "."))
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--block", default="4x1")
    options = parser.parse_args()
    rows, columns = parse_block(options.block)
    print(f"{options.block}, {options.sparsity:.0%} zeros: share of sum w^2 kept")
    print("| model | before | after | row-wise unstructured | gap closed | max relative error | seconds (CPU) |")
    print("|---|---|---|---|---|---|---|")
    for name in (*TRAINED, "resnet50"):
        path = Path(options.data) / "models" / f"{name}.onnx"
        if name != "resnet50" and not path.exists():
            print(f"| {name} | {path} is missing |")
            continue
        model = load_model(build(name) if name == "resnet50" else path)
        original = model_bytes(model)
        before, single = kept(model, rows, columns, options.sparsity)
        wall, cpu = time.perf_counter(), time.process_time()
        Rearrange(block=options.block, sparsity=options.sparsity)(model)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        after, _ = kept(model, rows, columns, options.sparsity)
        closed = (after - before) / (single - before)
        error = check_equal(original, model_bytes(model), "rearrange")
        figures = f"{before:.3f} | {after:.3f} | {single:.3f} | {closed:.1%} | {error:.1e} | {wall:.1f} ({cpu:.1f})"
        print(f"| {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
