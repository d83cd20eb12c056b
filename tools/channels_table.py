"""What removing channels is worth in ONNX Runtime itself: multiply-adds, time beside the whole model, and equality.

    python tools/channels_table.py [--models resnet18,resnet50] [--flops 0.5] [--round-to 8,16] [--pairs 30]

Times are of pairs: the whole and the cut model run in turn, one thread, so that whatever slows the machine down slows
both; the median of the ratios, and the ratio of the fastest runs. Equality: the cut model against the whole one with
the same rows and columns set to zero, max |difference| / max |reference|. Weights are seeded, not trained: shapes
decide the time.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import onnxruntime as ort

from sparsec.loading.load import load_model
from sparsec.models import build
from sparsec.passes import PruneChannels
from sparsec.passes.channels.channel_choice import work
from sparsec.passes.channels.cut import cut, silence
from sparsec.rewriting.passes_api import Context
from sparsec.rewriting.pipeline import model_bytes, relative_error


def session(data: bytes) -> ort.InferenceSession:
    """One thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def seconds(run: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> float:
    """Of one inference."""
    start = time.perf_counter()
    run.run(None, feeds)
    return time.perf_counter() - start


def row(name: str, flops: float, width: int, pairs: int) -> str:
    """One line of the table."""
    whole, twin, small = (load_model(build(name)) for _ in range(3))
    step = PruneChannels(flops=flops, round_to=width)
    for model, apply in ((twin, silence), (small, cut)):
        apply(model.graph, step.choose(model, Context()))
    before, after = work(whole.graph), work(small.graph)
    first, masked, second = (session(model_bytes(m)) for m in (whole, twin, small))
    feeds = {x.name: np.random.default_rng(0).standard_normal(x.shape).astype(np.float32) for x in first.get_inputs()}
    error = max(relative_error(a, b) for a, b in zip(masked.run(None, feeds), second.run(None, feeds), strict=True))
    times = np.array([[seconds(first, feeds), seconds(second, feeds)] for _ in range(pairs)])
    ratios = times[:, 0] / times[:, 1]
    low, high = np.percentile(ratios, (10, 90))
    best = times.min(axis=0)
    return (
        f"| {name} | {width} | {before.multiply_adds / 1e9:.2f} -> {after.multiply_adds / 1e9:.2f} | "
        f"{before.weights / 1e6:.1f} -> {after.weights / 1e6:.1f} | {best[0] * 1e3:.1f} -> {best[1] * 1e3:.1f} | "
        f"{best[0] / best[1]:.2f} | {np.median(ratios):.2f} ({low:.2f} to {high:.2f}) | {error:.1e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet18,resnet50")
    parser.add_argument("--flops", type=float, default=0.5)
    parser.add_argument("--round-to", default="8,16")
    parser.add_argument("--pairs", type=int, default=30)
    options = parser.parse_args()
    print(
        "| model | round_to | G multiply-adds | M weights | best ms | faster (best) | faster (10% to 90%) | max error |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in options.models.split(","):
        for width in map(int, options.round_to.split(",")):
            print(row(name, options.flops, width, options.pairs), flush=True)


if __name__ == "__main__":
    main()
