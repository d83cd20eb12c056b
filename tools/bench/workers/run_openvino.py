"""OpenVINO's CPU plugin. Option `precision`: "f32", or empty for what OpenVINO chooses (bf16 where the CPU has it)."""

from __future__ import annotations

from typing import Any

from serve import Arrays, Opened, serve


def open_model(model: str, feed: Arrays, threads: int, options: dict[str, Any]) -> Opened:
    """`model` is an ONNX file."""
    import openvino as ov

    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
    settings["ENABLE_CPU_PINNING"] = False  # the process is pinned
    if options.get("precision"):
        settings["INFERENCE_PRECISION_HINT"] = options["precision"]
    compiled = ov.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    inputs = [feed[port.any_name] for port in compiled.inputs]

    def call() -> object:
        return request.infer(inputs, share_inputs=True, share_outputs=True)

    def fetch() -> Arrays:
        results = request.infer(inputs)
        return {port.any_name: results[port] for port in compiled.outputs}

    precision = compiled.get_property("INFERENCE_PRECISION_HINT")
    return call, fetch, f"runs in {precision.to_string() if hasattr(precision, 'to_string') else precision}"


def version() -> str:
    """Of the package."""
    import openvino

    return str(openvino.__version__).partition("-")[0]


serve(open_model, version)
