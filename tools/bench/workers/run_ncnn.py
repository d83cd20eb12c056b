"""ncnn on the CPU in float32, Winograd and packed layouts on (its defaults)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serve import Arrays, Opened, serve


def open_model(model: str, feed: Arrays, threads: int, options: dict[str, Any]) -> Opened:
    """`model` is an .ncnn.param file made by pnnx, its .ncnn.bin beside it."""
    import ncnn
    import numpy as np

    net = ncnn.Net()
    net.opt.num_threads = threads
    for half in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(net.opt, half, False)
    if net.load_param(model) or net.load_model(str(Path(model).with_suffix(".bin"))):
        raise ValueError("ncnn does not load what pnnx wrote")
    # ncnn has no batch axis; pnnx calls inputs in0, in1, ... in the model's order.
    arrays = [np.ascontiguousarray(a[0] if a.ndim > 1 and a.shape[0] == 1 else a) for a in feed.values()]
    mats = [ncnn.Mat(array).clone() for array in arrays]  # a Mat only points to the array
    names = list(net.output_names())

    def fetch() -> Arrays:
        extractor = net.create_extractor()
        for i, mat in enumerate(mats):
            extractor.input(f"in{i}", mat)
        results = {}
        for name, wanted in zip(names, options["outputs"], strict=True):
            code, result = extractor.extract(name)
            if code:
                raise ValueError(f"ncnn fails with code {code}")
            results[wanted] = np.array(result)
        return results

    return fetch, fetch, ""


def version() -> str:
    """Of the package."""
    import ncnn

    return str(ncnn.__version__)


serve(open_model, version)
