"""LiteRT (ai-edge-litert, else tflite_runtime) with its XNNPACK delegate."""

from __future__ import annotations

from typing import Any

from serve import Arrays, Opened, serve


def _interpreter() -> Any:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        from tflite_runtime.interpreter import Interpreter
    return Interpreter


def open_model(model: str, feed: Arrays, threads: int, options: dict[str, Any]) -> Opened:
    """`model` is a .tflite file; its inputs may be channels-last."""
    import numpy as np

    interpreter = _interpreter()(model_path=model, num_threads=threads)
    interpreter.allocate_tensors()
    pairs = []
    for detail, array in zip(interpreter.get_input_details(), feed.values(), strict=True):
        shape = tuple(int(d) for d in detail["shape"])
        if shape != array.shape and array.ndim == 4 and shape == tuple(array.shape[i] for i in (0, 2, 3, 1)):
            array = array.transpose(0, 2, 3, 1)
        if shape != array.shape:
            raise ValueError(f"the .tflite takes {shape}, the model {array.shape}")
        pairs.append((detail["index"], np.ascontiguousarray(array.astype(detail["dtype"]))))
    outputs = [detail["index"] for detail in interpreter.get_output_details()]

    def fetch() -> Arrays:
        for index, array in pairs:
            interpreter.set_tensor(index, array)
        interpreter.invoke()
        names = options["outputs"]
        return dict(zip(names, (interpreter.get_tensor(index) for index in outputs), strict=True))

    return fetch, fetch, "channels last"


def version() -> str:
    """Of the package; imports it."""
    from importlib import metadata

    _interpreter()
    for package in ("ai-edge-litert", "tflite-runtime"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


serve(open_model, version)
