"""ONNX Runtime's CPU provider, every graph optimization, sequential."""

from __future__ import annotations

from typing import Any

from serve import Arrays, Opened, serve


def open_model(model: str, feed: Arrays, threads: int, options: dict[str, Any]) -> Opened:
    """`model` is an ONNX file."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.log_severity_level = 3
    # Workers spin within a run, not after it: another engine runs then.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda: session.run(names, feed), lambda: dict(zip(names, session.run(names, feed), strict=True)), ""


def version() -> str:
    """Of the package."""
    import onnxruntime

    return str(onnxruntime.__version__)


serve(open_model, version)
