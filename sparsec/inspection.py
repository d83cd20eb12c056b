"""`sparsec inspect`: what became of each layer, why, and what the whole stores and needs."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.manifest import code_file
from sparsec.ports import Quantization

if TYPE_CHECKING:
    import onnx_ir
    from rich.console import Console
    from rich.table import Table

    from sparsec.artifact import Artifact
    from sparsec.program import Layer, Program, Tensor
    from sparsec.targets import Target


def layer_row(layer: Layer) -> dict[str, Any]:
    """One layer in the JSON form of `inspect`; `zeros` is a share, `bytes` what the kernel stores."""
    return {
        "name": layer.name,
        "op": layer.op,
        "shape": list(layer.shape),
        "zeros": round(float(layer.zeros), 6),
        "structure": layer.structure,
        "kernel": layer.kernel,
        "route": layer.route,
        "reason": layer.reason,
        "candidates": [{"kernel": c.kernel, "predicted_us": _us(c.predicted_us)} for c in layer.candidates],
        "predicted_us": _us(layer.predicted_us),
        "bytes": int(layer.bytes),
        "nodes": list(layer.nodes),
    }


def launch_rows(program: Program) -> dict[str, dict[str, Any]]:
    """Kernels of a CUDA device -> their grid in blocks and their block in threads, along x, y, z; shared memory in bytes that
    a launch asks for.
    """
    launches = {kernel.name: kernel.launch for kernel in program.kernels}
    return {
        name: {"grid": list(launch.grid), "block": list(launch.block), "shared": launch.shared}
        for name, launch in sorted(launches.items())
        if launch is not None
    }


def port_row(tensor: Tensor) -> dict[str, Any]:
    """An input or output in the JSON form of `inspect` and of the manifest; `quantization` is null where it has none."""
    meaning = None if tensor.quantization is None else asdict(tensor.quantization)
    return {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype, "quantization": meaning}


def _us(value: float) -> float:
    return round(float(value), 3)


def weight_counts(model_bytes: bytes) -> dict[str, int]:
    """Constants of an ONNX model: `raw_bytes` of all floats; elements and zeros of those with two axes or more."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    raw = elements = nonzeros = 0
    model = onnx.load_from_string(model_bytes)
    for tensor in _constants(model.graph):
        array = numpy_helper.to_array(tensor)
        if array.dtype.kind != "f":
            continue
        raw += array.nbytes
        if array.ndim >= 2:
            elements += array.size
            nonzeros += int(np.count_nonzero(array))
    return {"raw_bytes": raw, "weights": elements, "weight_zeros": elements - nonzeros}


def count_weights(model: Any) -> dict[str, int]:
    """`weight_counts` of an `onnx_ir.Model`, one tensor at a time."""
    import numpy as np

    raw = elements = nonzeros = 0
    for value in model.graph.initializers.values():
        array = value.const_value.numpy()
        if array.dtype.kind == "f":
            raw += array.nbytes
            elements += array.size if array.ndim >= 2 else 0
            nonzeros += int(np.count_nonzero(array)) if array.ndim >= 2 else 0
    return {"raw_bytes": raw, "weights": elements, "weight_zeros": elements - nonzeros}


def _constants(graph: Any) -> list[Any]:
    found = list(graph.initializer)
    for node in graph.node:
        if node.op_type == "Constant":
            found += [a.t for a in node.attribute if a.name == "value"]
    return found


def report(program: Program, model_bytes: bytes, sizes: Mapping[str, int] | None = None) -> dict[str, Any]:
    """`{layers, totals}` of a program; `sizes`: bytes of the files built from it, absent for an ONNX model."""
    layers = [layer_row(layer) for layer in program.layers]
    if program.target.gpu is not None:
        launches = launch_rows(program)
        layers = [{**row, "launch": launches.get(row["kernel"])} for row in layers]
    counts = weight_counts(model_bytes)
    predicted = sum(layer.predicted_us for layer in program.layers)
    generic = sum(layer.predicted_us for layer in program.layers if layer.route == "generic")
    code = None if sizes is None else sizes[code_file(program.target.arch)]
    weights = program.weights_bytes if sizes is None else sizes.get("weights.bin", 0)
    return {
        "model": program.name,
        "target": program.target.name,
        "cpu": program.target.cpu,
        "precision": program.target.precision,
        "inputs": [port_row(tensor) for tensor in program.inputs],
        "outputs": [port_row(tensor) for tensor in program.outputs],
        "layers": layers,
        "totals": {
            "layers": len(layers),
            **counts,
            "zeros": round(counts["weight_zeros"] / counts["weights"], 6) if counts["weights"] else 0.0,
            "packed_bytes": weights,
            "code_bytes": code,
            "arena_bytes": program.arena_bytes,
            "scratch_bytes": program.scratch_bytes,
            "ram_bytes": program.arena_bytes + program.weights_bytes + program.scratch_bytes,
            "predicted_us": _us(predicted),
            "generic_share": round(generic / predicted, 6) if predicted else 0.0,
        },
    }


def inspect_model(model: onnx_ir.Model, target: Target, name: str = "model") -> dict[str, Any]:
    """Report on a loaded ONNX model as it is, lowered for `target` but not built."""
    from sparsec.loading.load import model_bytes
    from sparsec.lowering import lower

    data = model_bytes(model)
    program = lower(model, target, name)
    result = report(program, data)
    packed = sorted(program.constants, key=lambda c: c.offset)
    result["totals"]["gzip_bytes"] = _gzip(c.data.tobytes() for c in packed)
    return result


def layer_choices(passes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What passes that choose layer by layer chose, from a manifest's `passes`: layer, pass, choice, errors, why.

    `predicted_error`: share of the power of the layer's output that is lost, by the moments of its inputs;
    `measured_error`: the share that was lost. Either is None where the pass says nothing.
    """
    rows = []
    for made in passes:
        for record in made.get("details", ()):
            choice = record.get("choice", record.get("form"))
            if "layer" not in record or (choice is None and "kept" not in record):
                continue
            rows.append({
                "layer": record["layer"], "pass": made["name"], "choice": choice or "as it is",
                "predicted_error": record.get("predicted_error"),
                "measured_error": record.get("measured_error", record.get("error")), "why": record.get("kept", ""),
            })  # fmt: skip
    return rows


def inspect_artifact(artifact: Artifact) -> dict[str, Any]:
    """Report on an artifact: its report.json, what passes chose for layers (`choices`), and how small its weights and code
    become when compressed."""
    result = artifact.report
    result["choices"] = layer_choices(artifact.manifest["passes"])
    code = code_file(artifact.manifest["target"]["arch"])
    files = [artifact.path / code, artifact.path / "weights.bin"]
    result["totals"]["gzip_bytes"] = _gzip(_chunks([file for file in files if file.exists()]))
    return result


def _chunks(files: list[Path]) -> Any:
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                yield chunk


def _gzip(chunks: Any) -> int:
    """Bytes after deflate at level 6, what an app store's package or `gzip` reaches."""
    deflate = zlib.compressobj(6)
    return sum(len(deflate.compress(chunk)) for chunk in chunks) + len(deflate.flush())


def print_report(result: Mapping[str, Any], console: Console, verbose: bool = False) -> None:
    """The report as a table; `verbose` adds each layer's candidates and nodes."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(f"{result['model']} for {result['target']} ({result['cpu']}, {result['precision']})"),
        title_justify="left",
    )
    launched = any("launch" in row for row in result["layers"])
    columns = ["layer", "op", "shape", "zeros", "structure", "kernel", "launch", "bytes", "predicted us", "why"]
    for column in columns if launched else (c for c in columns if c != "launch"):
        right = column in ("zeros", "bytes", "predicted us")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in result["layers"]:
        why = row["reason"]
        if verbose and row["candidates"]:
            others = ", ".join(f"{c['kernel']} {c['predicted_us']:.0f}" for c in row["candidates"])
            why = f"{why} [{others}]" if why else others
        shape = "x".join(map(str, row["shape"]))
        cells = [row["name"], row["op"], shape, f"{100 * row['zeros']:.1f}%", row["structure"], row["kernel"]]
        cells += [_launch(row["launch"])] if launched else []
        cells += [f"{row['bytes']:,}", f"{row['predicted_us']:.1f}", why]
        table.add_row(*map(escape, cells))
    console.print(table)
    if result.get("choices"):
        console.print(_choices_table(result["choices"]))
    totals = result["totals"]
    ports = [f"{side:<9}{_port(row)}" for side in ("inputs", "outputs") for row in result[side] if row["quantization"]]
    code = f" + {totals['code_bytes']:,} B code" if totals["code_bytes"] is not None else ""
    lines = [
        f"weights  {totals['weights']:,}, {100 * totals['zeros']:.1f}% zero",
        f"size     {totals['raw_bytes']:,} B of floats -> {totals['packed_bytes']:,} B packed{code},"
        f" {totals['gzip_bytes']:,} B compressed",
        f"memory   {totals['ram_bytes']:,} B (activations {totals['arena_bytes']:,},"
        f" scratch {totals['scratch_bytes']:,} a thread, the rest weights)",
        f"time     {totals['predicted_us'] / 1000:.2f} ms predicted{'' if launched else ' on one thread'},"
        f" {100 * totals['generic_share']:.1f}% of it in the generic route",
    ]
    for line in [*ports, *lines]:
        console.print(line, highlight=False, markup=False)


def _launch(launch: Mapping[str, Any] | None) -> str:
    """`56*2 x 256`: blocks, threads of a block; empty where nothing is launched."""
    if launch is None:
        return ""
    sides = (
        side[: max([i + 1 for i, n in enumerate(side) if n > 1], default=1)]
        for side in (launch["grid"], launch["block"])
    )
    return " x ".join("*".join(map(str, side)) for side in sides)


def _port(row: Mapping[str, Any]) -> str:
    return f"{row['name']} {row['dtype']}[{'x'.join(map(str, row['shape']))}], {Quantization(**row['quantization'])}"


def _choices_table(choices: Iterable[Mapping[str, Any]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="chosen by passes; errors as shares of the power of a layer's output", title_justify="left")
    for column in ("layer", "pass", "choice", "predicted error", "measured error", "why"):
        right = column.endswith("error")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in choices:
        errors = ["" if row[key] is None else f"{row[key]:.2g}" for key in ("predicted_error", "measured_error")]
        table.add_row(*map(escape, (row["layer"], row["pass"], row["choice"], *errors, row["why"])))
    return table
