"""The command line. Verbs parse their options, call the Python API and print; results on stdout, the rest on stderr.

Exit codes: 0 success, 1 a check failed, 2 usage or bad input, 3 the environment lacks something, 130 interrupted.
Everything heavy is imported inside the verbs: `sparsec --help` waits for nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsec.arguments import parse_binds, parse_inputs, parse_shapes
from sparsec.errors import SparsecError, UsageError
from sparsec.terminal import listing, note, print_json, progress, stdout

if TYPE_CHECKING:
    from sparsec.artifact import Artifact


class Verbs(click.Group):
    """A group that suggests the nearest verb for an unknown one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from sparsec.targets import suggest

        name = args[0].replace("_", "-")
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            raise UsageError(f"unknown verb {args[0]!r}{suggest(name, self.list_commands(ctx))}", "sparsec")
        return super().resolve_command(ctx, args)


def _underscores(name: str) -> str:
    """`_` stands for `-` in options and verbs."""
    return name.replace("_", "-")


SETTINGS = {"token_normalize_func": _underscores, "help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=Verbs, context_settings=SETTINGS)
@click.version_option(package_name="sparsec", prog_name="sparsec", message="%(prog)s %(version)s")
def cli() -> None:
    """Compile ONNX models into small, fast artifacts for phones, boards and servers, and prove the result."""


def _options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


REPORTING = _options(
    click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
    click.option("-v", "--verbose", is_flag=True, help="More detail; tracebacks of errors."),
)
PASSES = _options(
    click.option("--recipe", metavar="NAME|FILE.yaml", help="Passes to run, from a built-in or written recipe."),
    click.option("--pass", "passes", multiple=True, metavar="SPEC", help="NAME[:key=value,...]; see `sparsec passes`."),
    click.option(
        "--plugin", "plugins", multiple=True, metavar="FILE.py", help="A Python file with passes of your own."
    ),
    click.option("--calibration", metavar="DATA", help="An .npz, or a folder of images with --preprocess."),
    click.option("--preprocess", metavar="SPEC", help="resize=256,crop=224,scale=255,mean=...,std=...,color=rgb"),
    click.option("--dump", metavar="DIR", help="Write what each step made."),
)
SHAPES = _options(
    click.option("--shape", "shapes", multiple=True, metavar="INPUT:1x3x224x224", help="Fix an input's shape."),
    click.option("--bind", "binds", multiple=True, metavar="INPUT=VALUE", help="Fix an input to a constant."),
)
MACHINE = _options(
    click.option("--target", metavar="NAME", help="host, arm, ...; see `sparsec targets`.  [default: host]"),
    click.option("--cpu", metavar="NAME", help="The target's CPU; see `sparsec targets`."),
    click.option("--os", "system", metavar="NAME", help="android or linux."),
    click.option("--precision", metavar="f32|f16", help="What layers store and compute in.  [default: f32]"),
)
RUNTIME = click.option("--runtime", metavar="NAME", help="native, emulated, adb[:SERIAL], ssh:[USER@]HOST, ort.")


# --- verbs ------------------------------------------------------------------------------------------------------------


@cli.command("compile")
@click.argument("model", metavar="MODEL.onnx")
@MACHINE
@click.option("-o", "--output", default=".", metavar="PATH", help="NAME.sparsec, or the folder for it.  [default: .]")
@click.option("--overwrite", is_flag=True, help="Replace an existing artifact.")
@PASSES
@SHAPES
@click.option(
    "--threads", default=1, show_default=True, metavar="N", help="The artifact's default; run time may differ."
)
@click.option("--embed-weights", is_flag=True, help="Put the weights into the code instead of weights.bin.")
@click.option("--tuning", metavar="FILE", help="Measured choices, of `sparsec tune`, before predicted ones.")
@REPORTING
def compile_verb(
    model: str, target: str | None, cpu: str | None, system: str | None, precision: str | None, output: str, overwrite: bool,
    recipe: str | None, passes: tuple[str, ...], plugins: tuple[str, ...], calibration: str | None,
    preprocess: str | None, dump: str | None, shapes: tuple[str, ...], binds: tuple[str, ...], threads: int,
    embed_weights: bool, tuning: str | None, as_json: bool, verbose: bool,
) -> None:  # fmt: skip
    """An ONNX model into an artifact for one target."""
    shape, bind = parse_shapes(shapes), parse_binds(binds)
    _early(model, output, overwrite, target, cpu, system, precision)
    from sparsec.compiler import compile

    start = time.perf_counter()
    with progress() as say:
        artifact = compile(
            model, target, passes=passes, recipe=recipe, calibration=calibration, shapes=shape, bind=bind, cpu=cpu,
            os=system, precision=precision or "f32", threads=threads, output=output, overwrite=overwrite, plugins=plugins, dump=dump,
            embed_weights=embed_weights, preprocess=preprocess, tuning=tuning, progress=say,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    manifest = artifact.manifest
    for text in manifest["notes"]:
        note(text)
    if as_json:
        print_json({
            "artifact": str(artifact.path),
            "target": manifest["target"]["name"],
            "cpu": manifest["target"]["cpu"],
            "precision": manifest["target"]["precision"],
            "bytes": artifact.bytes,
            "layers": artifact.report["layers"],
            "passes": manifest["passes"],
            "parity": _parity_json(manifest),
            "notes": manifest["notes"],
            "seconds": round(seconds, 3),
        })  # fmt: skip
        return
    _print_compiled(artifact, seconds, verbose)


def _early(
    model: str, output: str, overwrite: bool, target: str | None, cpu: str | None, system: str | None, precision: str | None
) -> None:  # fmt: skip
    """The cheap mistakes, said before TVM is imported."""
    from sparsec.artifact import SUFFIX, artifact_path, check_output
    from sparsec.targets import find_target, with_precision

    if target is not None or precision is not None:
        with_precision(find_target(target or "host", cpu, system), precision or "f32")
    if os.path.isfile(model):
        check_output(artifact_path(output, Path(model).name.removesuffix(".onnx").removesuffix(SUFFIX)), overwrite)


def _parity_json(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """`{passed, max_relative_error, tolerance}` of the output nearest to its tolerance; null if it was not run."""
    record = manifest["parity"]
    if record is None:
        return None
    worst = max(record["outputs"], key=lambda p: p["max_relative_error"] or 0.0)
    keys = ("max_relative_error", "tolerance")
    return {"passed": record["passed"], **{key: worst[key] for key in keys}, "runtime": record["runtime"]}


def _print_compiled(artifact: Artifact, seconds: float, verbose: bool) -> None:
    from sparsec.inspection import inspect_artifact, print_report

    console = stdout()
    if verbose:
        print_report(inspect_artifact(artifact), console, verbose=True)
    target, size, totals = artifact.manifest["target"], artifact.bytes, artifact.report["totals"]
    click.echo(f"{artifact.path}  for {target['name']} ({target['cpu']}, {target['os']}), {seconds:.1f} s")
    click.echo(
        f"  {totals['layers']} layers, {100 * totals['zeros']:.1f}% of the weights are zero;"
        f" {size['weights']:,} B weights + {size['code']:,} B code (floats were {totals['raw_bytes']:,} B)"
    )
    parity = _parity_json(artifact.manifest)
    if parity is not None:
        error, allowed = parity["max_relative_error"], parity["tolerance"]
        click.echo(f"  equals ONNX Runtime: relative error {error:.3g}, allowed {allowed:.3g} ({parity['runtime']})")


@cli.command("rewrite")
@click.argument("model", metavar="MODEL.onnx")
@click.option("-o", "--output", required=True, metavar="OUT.onnx", help="The rewritten model.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@PASSES
@SHAPES
@REPORTING
def rewrite_verb(
    model: str, output: str, overwrite: bool, recipe: str | None, passes: tuple[str, ...], plugins: tuple[str, ...],
    calibration: str | None, preprocess: str | None, dump: str | None, shapes: tuple[str, ...],
    binds: tuple[str, ...], as_json: bool, verbose: bool,
) -> None:  # fmt: skip
    """An ONNX model into an ONNX model."""
    from sparsec.artifact import staged_file

    shape, bind = parse_shapes(shapes), parse_binds(binds)
    start = time.perf_counter()
    with staged_file(Path(output), overwrite) as stage:
        from sparsec.compiler import rewrite
        from sparsec.loading import model_bytes

        with progress() as say:
            result = rewrite(
                model, passes=passes, recipe=recipe, calibration=calibration, shapes=shape, bind=bind,
                plugins=plugins, dump=dump, preprocess=preprocess, progress=say,
            )  # fmt: skip
        data = model_bytes(result)
        stage.write_bytes(data)
    from sparsec.inspection import weight_counts

    counts = weight_counts(data)
    zeros = counts["weight_zeros"] / counts["weights"] if counts["weights"] else 0.0
    seconds = time.perf_counter() - start
    if as_json:
        facts = {"model": output, "bytes": {"onnx": len(data)}, "weights": counts["weights"], "zeros": round(zeros, 6)}
        print_json({**facts, "nodes": len(list(result.graph)), "seconds": round(seconds, 3)})
    else:
        click.echo(f"{output}  {len(data):,} B, {100 * zeros:.1f}% of the weights are zero, {seconds:.1f} s")


@cli.command("inspect")
@click.argument("path", metavar="MODEL.onnx|ARTIFACT")
@MACHINE
@SHAPES
@REPORTING
def inspect_verb(
    path: str, target: str | None, cpu: str | None, system: str | None, precision: str | None, shapes: tuple[str, ...],
    binds: tuple[str, ...], as_json: bool, verbose: bool,
) -> None:  # fmt: skip
    """Layers, zeros, the structure found, the kernel chosen and why, sizes."""
    from sparsec.inspection import inspect_artifact, inspect_model, print_report

    shape, bind = parse_shapes(shapes), parse_binds(binds)
    if Path(path).is_dir():
        from sparsec.artifact import load

        _only_for_models(target=target, cpu=cpu, os=system, precision=precision, shape=shape, bind=bind)
        result = inspect_artifact(load(path))
    else:
        from sparsec.targets import find_target, with_precision

        machine = with_precision(find_target(target or "host", cpu, system), precision or "f32")
        from sparsec.loading import load_model

        notes: list[str] = []
        with progress() as say:
            say("lowering")
            result = inspect_model(load_model(path, shape, bind, notes), machine, Path(path).stem)
        for text in notes:
            note(text)
    if as_json:
        print_json(result)
    else:
        print_report(result, stdout(), verbose)


def _only_for_models(**options: Any) -> None:
    for name, value in options.items():
        if value:
            raise UsageError("is decided in an artifact; give a MODEL.onnx, or leave it out", f"--{name}")


@cli.command("verify")
@click.argument("path", metavar="ARTIFACT")
@click.option("--against", metavar="MODEL.onnx", help="The model before any pass, for fidelity.")
@click.option("--data", metavar="DATA", help="An .npz (with 'label': accuracy), or a folder with --preprocess.")
@click.option("--preprocess", metavar="SPEC", help="resize=256,crop=224,scale=255,mean=...,std=...,color=rgb")
@RUNTIME
@REPORTING
def verify_verb(
    path: str, against: str | None, data: str | None, preprocess: str | None, runtime: str | None, as_json: bool,
    verbose: bool,
) -> None:  # fmt: skip
    """Compare an artifact with ONNX Runtime, the original model and labels."""
    from sparsec.artifact import load
    from sparsec.verify import print_verification, verify

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


@cli.command("bench")
@click.argument("path", metavar="ARTIFACT|MODEL.onnx")
@click.option("--against", default="", metavar="NAME,...", help="Runtimes to time beside it: ort.")
@RUNTIME
@click.option("--runs", default=50, show_default=True, metavar="N", help="Timed runs.")
@click.option("--threads", type=int, metavar="N", help="Workers.  [default: the artifact's]")
@SHAPES
@REPORTING
def bench_verb(
    path: str, against: str, runtime: str | None, runs: int, threads: int | None, shapes: tuple[str, ...],
    binds: tuple[str, ...], as_json: bool, verbose: bool,
) -> None:  # fmt: skip
    """Latency of an artifact, or of a model compiled as it is for this machine."""
    from sparsec.bench import bench, check_options, print_timing

    names = [name for name in against.split(",") if name]
    check_options(runs, threads, names)
    shape, bind = parse_shapes(shapes), parse_binds(binds)
    with progress() as say:
        if Path(path).is_dir():
            from sparsec.artifact import load

            _only_for_models(shape=shape, bind=bind)
            artifact = load(path)
        else:
            from sparsec.compiler import compile

            artifact = compile(path, "host", shapes=shape, bind=bind, threads=threads or 1, progress=say)
        timing = bench(artifact, runs=runs, threads=threads, runtime=runtime, against=names, progress=say)
    if timing.runtime == "emulated":
        note("times under emulation say nothing about a device")
    elif names and timing.runtime.partition(":")[0] in ("adb", "ssh"):
        note(f"{', '.join(names)} ran on this machine, the artifact on another: not a comparison")
    if as_json:
        print_json(timing.json())
    else:
        print_timing(timing, stdout())


@cli.command("tune")
@click.argument("path", metavar="ARTIFACT|MODEL.onnx")
@click.option("--target", metavar="NAME", help="Only host: kernels are measured where this runs.  [default: host]")
@click.option("--cpu", metavar="NAME", help="The CPU to compile for; see `sparsec targets`.")
@click.option("--cache", metavar="FILE", help="Where choices are kept.  [default: a file for this CPU]")
@click.option("--time-limit", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Stop then.")
@click.option("--again", is_flag=True, help="Measure layers too that the file has already.")
@SHAPES
@REPORTING
def tune_verb(
    path: str, target: str | None, cpu: str | None, cache: str | None, time_limit: float | None, again: bool,
    shapes: tuple[str, ...], binds: tuple[str, ...], as_json: bool, verbose: bool,
) -> None:  # fmt: skip
    """Measure candidate kernels on this machine, one thread; `compile --tuning FILE` then uses the fastest."""
    from sparsec.targets import find_target

    if find_target(target or "host", cpu).name != "host":
        raise UsageError(f"{target!r} cannot be measured here; only host can", "--target")
    shape, bind = parse_shapes(shapes), parse_binds(binds)
    model: Any = path
    if Path(path).is_dir():
        from sparsec.artifact import load

        _only_for_models(shape=shape, bind=bind)
        model = load(path)
    from sparsec.tuner import print_tuned, tune

    start, notes = time.perf_counter(), list[str]()
    with progress() as say:
        result = tune(model, cpu, cache, time_limit, again, shape, bind, notes, say)
    for text in notes:
        note(text)
    if result.skipped:
        note(f"not measured for lack of time: {', '.join(result.skipped)}; run it again to go on")
    if as_json:
        print_json({**result.json(), "seconds": round(time.perf_counter() - start, 3)})
    else:
        print_tuned(result, stdout(), verbose)


@cli.command("run")
@click.argument("path", metavar="ARTIFACT")
@click.option("--input", "inputs", multiple=True, metavar="INPUT=FILE.npy", help="One for each input.")
@click.option("-o", "--output", metavar="OUT.npz", help="Where the outputs go, keyed by name.")
@RUNTIME
@click.option("--threads", type=click.IntRange(1, 256), metavar="N", help="Workers.  [default: the artifact's]")
@REPORTING
def run_verb(
    path: str, inputs: tuple[str, ...], output: str | None, runtime: str | None, threads: int | None, as_json: bool,
    verbose: bool,
) -> None:  # fmt: skip
    """One sample through an artifact."""
    from sparsec.artifact import load, staged_file
    from sparsec.data import read_npy, write_npz

    artifact = load(path)
    files = parse_inputs(inputs, [spec.name for spec in artifact.inputs])
    outputs = artifact.run({name: read_npy(file) for name, file in files.items()}, runtime=runtime, threads=threads)
    if output is not None:
        with staged_file(Path(output), overwrite=True) as stage:
            write_npz(stage, outputs)
    rows = []
    for name, array in outputs.items():
        row: dict[str, Any] = {"name": name, "shape": list(array.shape), "dtype": str(array.dtype)}
        if array.size:
            row |= {"min": float(array.min()), "max": float(array.max()), "argmax": int(array.reshape(-1).argmax())}
        rows.append(row)
    if as_json:
        print_json({"outputs": rows, "file": output})
        return
    for row in rows:
        span = f"  {row['min']:.6g} .. {row['max']:.6g}, largest at {row['argmax']}" if "min" in row else ""
        click.echo(f"{row['name']}  {row['dtype']} {row['shape']}{span}")


@cli.command("models")
@click.argument("name", required=False, metavar="[NAME]")
@click.option("-o", "--output", metavar="MODEL.onnx", help="Write the model NAME.")
@click.option("--data", metavar="FILE.npz", help="Write the demo model's held-out data, with labels.")
@click.option("--count", default=500, show_default=True, type=click.IntRange(1, 100_000), help="Samples of --data.")
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@REPORTING
def models_verb(
    name: str | None, output: str | None, data: str | None, count: int, overwrite: bool, as_json: bool, verbose: bool
) -> None:
    """List model builders; write one; write the demo's held-out data."""
    from sparsec.artifact import check_output, staged_file
    from sparsec.models import BUILDERS, build, write_data
    from sparsec.targets import suggest

    if name is not None and name not in BUILDERS:
        name = name.replace("-", "_")
    if name is not None and name not in BUILDERS:
        raise UsageError(f"unknown model {name!r}{suggest(name, list(BUILDERS))}", "models")
    if name is None and output is not None:
        raise UsageError(f"give the model's NAME too: {', '.join(BUILDERS)}", "-o")
    if name is not None and output is None and data is None:
        raise UsageError("give -o MODEL.onnx to write it", f"models {name}")
    if data is not None and name not in (None, "demo"):
        raise UsageError("only the demo model has data", "--data")
    if data is not None:
        check_output(Path(data), overwrite)
    written = {}
    if name is not None and output is not None:
        with staged_file(Path(output), overwrite) as stage:
            stage.write_bytes(build(name).SerializeToString(deterministic=True))
        written["model"] = output
    if data is not None:
        with staged_file(Path(data), overwrite) as stage:
            write_data(stage, count)
        written["data"] = data
    if not written:
        rows = [
            {"name": b.name, "input": list(b.input_shape), "summary": b.summary, "options": b.options}
            for b in BUILDERS.values()
        ]
        table = rows if as_json else [{**row, "input": "x".join(map(str, row["input"]))} for row in rows]
        listing("models", table, as_json, ("name", "input", "summary"))
    elif as_json:
        print_json(written)
    else:
        for path in written.values():
            click.echo(f"{path}  {os.path.getsize(path):,} B")


@cli.command("passes")
@click.option("--plugin", "plugins", multiple=True, metavar="FILE.py", help="A Python file with passes of your own.")
@REPORTING
def passes_verb(plugins: tuple[str, ...], as_json: bool, verbose: bool) -> None:
    """Known passes with their options and defaults."""
    from sparsec.passes_api import describe_passes

    listing("passes", describe_passes(plugins), as_json, ("name", "summary", "options", "origin"))


@cli.command("targets")
@REPORTING
def targets_verb(as_json: bool, verbose: bool) -> None:
    """Known targets with their CPUs; the first CPU and system is the default."""
    from sparsec.targets import cpu_names, host_cpu, table

    rows = []
    for name, stanza in table()["target"].items():
        cpus = cpu_names(name)
        if name == "host":
            with contextlib.suppress(SparsecError):
                own = host_cpu()
                cpus = [own, *(cpu for cpu in cpus if cpu != own)]
        row = {"name": name, "description": stanza["description"], "cpus": cpus}
        rows.append({**row, "os": list(stanza["os"]), "runtime": stanza["runtime"]})
    table_rows = rows if as_json else [{**r, "cpus": " ".join(r["cpus"]), "os": " ".join(r["os"])} for r in rows]
    listing("targets", table_rows, as_json, ("name", "description", "cpus", "os", "runtime"))


@cli.command("kernels")
@REPORTING
def kernels_verb(as_json: bool, verbose: bool) -> None:
    """Kernel families and their variants."""
    from sparsec.kernels import tables

    columns = ("name", "op", "format", "dtype", "text")
    listing("kernels", [{key: getattr(row, key) for key in columns} for row in tables()], as_json, columns)


# --- errors -----------------------------------------------------------------------------------------------------------


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; every error becomes one line, or one JSON object with --json."""
    as_json = "--json" in arguments
    verbose = "-v" in arguments or "--verbose" in arguments
    try:
        with cli.make_context("sparsec", list(arguments)) as context:
            cli.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as end:
        sys.stdout.flush()
        return end.exit_code
    except SparsecError as error:
        _fail(error.kind, error.message, error.where, as_json, verbose)
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
        _fail("UsageError", " ".join(error.format_message().split()), where, as_json, verbose)
        return 2
    except KeyboardInterrupt:
        kept = "what was measured is kept" if "tune" in arguments[:1] else "nothing was written"
        _fail("Interrupted", f"interrupted; {kept}", "", as_json, False)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
        return 141
    except OSError as error:
        _fail("UsageError", error.strerror or str(error), str(error.filename or ""), as_json, verbose)
        return 2
    except Exception as error:  # a bug of ours: still one line
        lines = str(error).strip().splitlines()
        text = f"internal error: {type(error).__name__}: {lines[0] if lines else ''}; -v shows where; please report it"
        _fail("InternalError", text, "", as_json, verbose)
        return 1


def _fail(kind: str, message: str, where: str, as_json: bool, verbose: bool) -> None:
    if verbose:
        traceback.print_exc()
    message = message if verbose else _one_line(message)
    if as_json:
        print_json({"error": {"kind": kind, "message": message, "where": where}})
    else:
        click.echo(f"error: {where}: {message}" if where else f"error: {message}", err=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    """Entry point of the `sparsec` command."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)  # SystemExit runs the clean-up that a signal would skip

    signal.signal(signal.SIGTERM, end)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
