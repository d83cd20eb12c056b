"""MNN's CPU backend in float32 (precision "high")."""

from __future__ import annotations

from typing import Any

from serve import Arrays, Opened, serve


def open_model(model: str, feed: Arrays, threads: int, options: dict[str, Any]) -> Opened:
    """`model` is an .mnn file."""
    import MNN.expr as expr
    import MNN.nn as nn

    runtime = nn.create_runtime_manager(({"backend": 0, "precision": "high", "numThread": threads},))
    outputs = options["outputs"]
    net = nn.load_module_from_file(model, list(feed), outputs, runtime_manager=runtime)
    inputs = [expr.const(array, list(array.shape), expr.NCHW) for array in feed.values()]

    def fetch() -> Arrays:
        results = net.forward(inputs)
        return {name: result.read() for name, result in zip(outputs, results, strict=True)}

    return fetch, fetch, ""


def version() -> str:
    """Of the package."""
    import MNN

    return str(MNN.version())


serve(open_model, version)
