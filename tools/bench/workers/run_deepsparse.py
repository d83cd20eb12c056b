"""DeepSparse, the x86 engine for sparse models; end of life at 1.8."""

from __future__ import annotations

import os
from typing import Any

from serve import Arrays, Opened, serve

os.environ["NM_DISABLE_ANALYTICS"] = "1"


def open_model(model: str, feed: Arrays, threads: int, options: dict[str, Any]) -> Opened:
    """`model` is an ONNX file of IR version 9 or older."""
    import deepsparse

    engine = deepsparse.Engine(model, batch_size=1, num_cores=threads)
    inputs = list(feed.values())
    names = options["outputs"]
    return lambda: engine.run(inputs), lambda: dict(zip(names, engine.run(inputs), strict=True)), ""


def version() -> str:
    """Of the package."""
    import deepsparse

    return str(deepsparse.__version__)


serve(open_model, version)
