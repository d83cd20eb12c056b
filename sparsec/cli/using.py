"""`sparsec inspect`, `verify`, `bench` and `run`: what is done with an artifact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from sparsec.cli.arguments import parse_inputs
from sparsec.cli.options import MACHINE, PREPROCESS, REPORT, RUNTIME, SHAPES, Fixed, Machine, only_for_models
from sparsec.errors import UsageError
from sparsec.terminal import note, print_json, progress, stdout


@click.command("inspect")
@click.argument("path", metavar="MODEL.onnx|ARTIFACT")
@MACHINE
@SHAPES
@REPORT
def inspect_verb(path: str, machine: Machine, fixed: Fixed, as_json: bool, verbose: bool) -> None:
    """Layers, zeros, the structure found, the kernel chosen and why, sizes."""
    from sparsec.inspection import inspect_artifact, inspect_model, print_report

    if Path(path).is_dir():
        from sparsec.artifact import load

        only_for_models(fixed, machine)
        result = inspect_artifact(load(path))
    else:
        target = machine.find()
        from sparsec.loading.preflight import preflight

        notes: list[str] = []
        with progress() as say:
            say("lowering")
            result = inspect_model(
                preflight(path, fixed.shapes, fixed.bind, notes, fixed.limits), target, Path(path).stem
            )
        for text in notes:
            note(text)
    if as_json:
        print_json(result)
    else:
        print_report(result, stdout(), verbose)


@click.command("verify")
@click.argument("path", metavar="ARTIFACT")
@click.option("--against", metavar="MODEL.onnx", help="The model before any pass, for fidelity.")
@click.option("--data", metavar="DATA", help="An .npz (with 'label': accuracy), or a folder with --preprocess.")
@PREPROCESS
@RUNTIME
@REPORT
def verify_verb(
    path: str, against: str | None, data: str | None, preprocess: str | None, runtime: str | None, as_json: bool,
    verbose: bool,
) -> None:  # fmt: skip
    """Compare an artifact with ONNX Runtime, the original model and labels."""
    from sparsec.artifact import load
    from sparsec.proving.verify import print_verification, verify

    if preprocess is not None and data is None:
        raise UsageError("needs --data, a folder of images", "--preprocess")
    artifact = load(path)
    with progress() as say:
        result = verify(artifact, data=data, against=against, runtime=runtime, preprocess=preprocess, progress=say)
    if as_json:
        print_json(result.json())
    else:
        print_verification(result, stdout())
    if not result.passed:
        raise click.exceptions.Exit(1)


@click.command("bench")
@click.argument("path", metavar="ARTIFACT|MODEL.onnx")
@click.option("--against", default="", metavar="NAME,...", help="Runtimes to time beside it: ort, torch.")
@RUNTIME
@click.option("--runs", default=50, show_default=True, metavar="N", help="Timed runs.")
@click.option("--threads", type=int, metavar="N", help="Workers.  [default: the artifact's]")
@SHAPES
@REPORT
def bench_verb(
    path: str, against: str, runtime: str | None, runs: int, threads: int | None, fixed: Fixed, as_json: bool,
    verbose: bool,
) -> None:  # fmt: skip
    """Latency of an artifact, or of a model compiled as it is for this machine."""
    from sparsec.bench import bench, check_options, print_timing

    names = [name for name in against.split(",") if name]
    check_options(runs, threads, names)
    with progress() as say:
        if Path(path).is_dir():
            from sparsec.artifact import load

            only_for_models(fixed)
            artifact = load(path)
        else:
            from sparsec.compiler import compile

            artifact = compile(path, "host", **fixed.arguments, threads=threads or 1, progress=say)
        timing = bench(artifact, runs=runs, threads=threads, runtime=runtime, against=names, progress=say)
    if timing.runtime == "emulated":
        note("times under emulation say nothing about a device")
    elif names and timing.runtime.partition(":")[0] in ("adb", "ssh"):
        note(f"{', '.join(names)} ran on this machine, the artifact on another: not a comparison")
    if as_json:
        print_json(timing.json())
    else:
        print_timing(timing, stdout())


@click.command("run")
@click.argument("path", metavar="ARTIFACT")
@click.option("--input", "inputs", multiple=True, metavar="INPUT=FILE.npy", help="One for each input.")
@click.option("-o", "--output", metavar="OUT.npz", help="Where the outputs go, keyed by name.")
@RUNTIME
@click.option("--threads", type=click.IntRange(1, 256), metavar="N", help="Workers.  [default: the artifact's]")
@REPORT
def run_verb(
    path: str, inputs: tuple[str, ...], output: str | None, runtime: str | None, threads: int | None, as_json: bool,
    verbose: bool,
) -> None:  # fmt: skip
    """One sample through an artifact; floats for an input of 8 bits are quantized, outputs come as they are stored."""
    from sparsec.artifact import load
    from sparsec.npz import read_npy, write_npz
    from sparsec.staging import staged_file

    artifact = load(path)
    files = parse_inputs(inputs, [spec.name for spec in artifact.inputs])
    inputs_given = artifact.quantize({name: read_npy(file) for name, file in files.items()})
    outputs = artifact.run(inputs_given, runtime=runtime, threads=threads)
    ports = {spec.name: spec for spec in artifact.outputs}
    if output is not None:
        with staged_file(Path(output), overwrite=True) as stage:
            write_npz(stage, outputs)
    rows = []
    for name, array in outputs.items():
        row: dict[str, Any] = {"name": name, "shape": list(array.shape), "dtype": str(array.dtype)}
        if (meaning := ports[name].quantization) is not None:
            row["quantization"] = asdict(meaning)
        if array.size:
            row |= {"min": float(array.min()), "max": float(array.max()), "argmax": int(array.reshape(-1).argmax())}
        rows.append(row)
    if as_json:
        print_json({"outputs": rows, "file": output})
        return
    for row in rows:
        span = f"  {row['min']:.6g} .. {row['max']:.6g}, largest at {row['argmax']}" if "min" in row else ""
        meaning = ports[row["name"]].quantization
        click.echo(f"{row['name']}  {row['dtype']} {row['shape']}{span}{'' if meaning is None else f', {meaning}'}")
