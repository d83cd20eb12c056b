"""The straight line: load, rewrite, lower, build, pack, verify.

`compile` is the function to read first: one call for each stage, values of a few named types in between, targets as
parameters.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os as _os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from sparsec.artifact import Artifact, Facts, artifact_path, load, write_artifact
from sparsec.bench import faster
from sparsec.budget import Budget, fit_budget
from sparsec.building.build import build, pack_parity
from sparsec.building.codegen import kernel_text
from sparsec.data import Data, load_data
from sparsec.errors import CheckError, RuntimeUnavailable, UsageError
from sparsec.images import Images
from sparsec.limits import DEFAULT, Limits
from sparsec.loading.load import model_bytes
from sparsec.loading.preflight import preflight
from sparsec.lowering import lower
from sparsec.lowering.predict import layer_price
from sparsec.passes.quantization.ports import QuantizedPorts, port_quantization
from sparsec.ports import InputSpec, input_spec
from sparsec.program import Program
from sparsec.proving.ort_session import limited
from sparsec.proving.samples import conditioned_tolerances, parity_sample, rounding_tolerances
from sparsec.proving.tolerance import floors, for_sample, tolerances
from sparsec.proving.verify import verify
from sparsec.rewriting.pass_specs import resolve_passes
from sparsec.rewriting.pipeline import run_passes
from sparsec.rewriting.recipe import Recipe, load_recipe
from sparsec.staging import check_output, staged
from sparsec.targets import Target, find_target, missing_features, with_cpu_fallback, with_precision
from sparsec.tuning import Lookup, read_tuning

Model = str | _os.PathLike[str] | bytes | onnx.ModelProto | ir.Model
Calibration = str | Path | Mapping[str, np.ndarray] | Images
Progress = Callable[[str], None]
IO = ("float", "quantized")  # what inputs and outputs of an artifact may be


@dataclass(frozen=True)
class Rewritten:
    """A model after its passes, with what the manifest says about them."""

    model: ir.Model
    records: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    digests: dict[str, str | None]
    calibration: Data | None


def compile(
    model: Model,
    target: str | Target | None = None,
    passes: Iterable[Any] = (),
    recipe: str | _os.PathLike[str] | Mapping[str, Any] | Recipe | None = None,
    calibration: Calibration | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    bind: Mapping[str, Any] | None = None,
    cpu: str | None = None,
    os: str | None = None,
    arch: str | None = None,
    host: str | None = None,
    precision: str = "f32",
    allow_cpu_fallback: bool = False,
    threads: int = 1,
    output: str | _os.PathLike[str] | None = None,
    overwrite: bool = False,
    plugins: Sequence[str | _os.PathLike[str]] = (),
    dump: str | _os.PathLike[str] | None = None,
    embed_weights: bool = False,
    io: str = "float",
    preprocess: str | None = None,
    tuning: str | _os.PathLike[str] | None = None,
    budget: str | None = None,
    budget_data: Calibration | None = None,
    limits: Limits = DEFAULT,
    progress: Progress | None = None,
) -> Artifact:
    """Compile a model to an artifact for one target and prove it against ONNX Runtime.

    model: path, bytes, `onnx.ModelProto` or `onnx_ir.Model`; the caller's object is left alone. target: "host", "arm", ...
    (default: the recipe's, else "host"). passes: specs such as "prune:sparsity=0.8,block=4x1", pass objects or classes,
    after those of `recipe`. arch, host: for target "cuda", the GPU's architecture ("sm_87", ...) and the processor beside
    it ("x86_64", "aarch64"). allow_cpu_fallback: operators that the GPU lacks run there instead of being refused.
    calibration: an .npz, a folder of images with `preprocess`, arrays by input name, or `Images`.
    precision: "f32", or "f16" on CPUs with float16 arithmetic: layers store and compute in it, inputs and outputs stay
    float32. shapes: input name to full shape. bind: inputs fixed to a constant. threads: the artifact's default. output: the
    artifact if it ends in ".sparsec", else the folder for it; without it the artifact lives in a temporary directory that
    goes with the object. io: "float" leaves inputs and outputs as the model has them, "quantized" makes 8-bit ones of those
    that it quantizes at once (`sparsec.passes.quantization.ports`); which stay float is noted, a UsageError if all would.
    tuning: a file that `sparsec tune` made, asked before the cost model. budget: "accuracy=1%" or
    "speedup=2x" chooses the pruning (`sparsec.budget`; needs calibration); budget_data, with labels or without, measures
    the drop in the place of a part of the calibration data. limits: what the model may cost to read.
    Raises a `SparsecError`; then nothing is left behind.
    """
    say = progress or (lambda text: None)
    if threads < 1 or threads > 256:
        raise UsageError(f"expected 1 to 256 threads, got {threads}", "--threads")
    if io not in IO:
        raise UsageError(f"expected {' or '.join(IO)}, got {io!r}", "--io")
    chosen = _recipe(recipe)
    machine = (
        target if isinstance(target, Target) else find_target(target or chosen.target or "host", cpu, os, arch, host)
    )
    machine = with_precision(machine, precision)
    if allow_cpu_fallback:
        machine = with_cpu_fallback(machine)
    if tuning is not None and precision != "f32":
        raise UsageError("measured choices are of float32 kernels; leave out --tuning or --precision", "--tuning")
    choices = Lookup(read_tuning(tuning)) if tuning is not None else None
    if choices is not None:
        choices.tuning.check_for(machine.cpu)
    fit = None
    if budget is not None:
        clock = partial(_clock, machine=machine, threads=threads, tuning=tuning)
        fit = partial(_fit, promise=Budget.parse(budget), target=machine, judge_data=budget_data, clock=clock)
    elif budget_data is not None:
        raise UsageError("measures the drop of a --budget, and there is none", "--budget-data")
    name = _model_name(model, output)
    with limited(limits), _destination(output, name, overwrite) as (directory, finish):
        say("loading")
        rewritten = _rewrite(
            model, passes, chosen, calibration, shapes, bind, plugins, dump, preprocess, say, machine, limits, fit, io
        )
        data = model_bytes(rewritten.model)
        say("lowering")
        program = lower(rewritten.model, machine, name, choices)
        _dump_program(dump, program)
        build(program, directory, name=name, threads=threads, embed_weights=embed_weights, progress=say)
        say("packing")
        allowed = tolerances(rewritten.model, machine)
        inputs = [InputSpec(t.name, t.shape, t.dtype, t.quantization) for t in program.inputs]
        sample, expected = parity_sample(data, inputs, rewritten.calibration)
        allowed.update(rounding_tolerances(data, inputs, sample, expected))
        lowest = floors(rewritten.model)
        here = {
            t.name: for_sample(allowed[t.name], lowest.get(t.name, 0.0), y)
            for t, y in zip(program.outputs, expected, strict=True)
        }
        (directory / "parity.bin").write_bytes(pack_parity(sample, expected, list(here.values())))
        facts = Facts(
            digests={**rewritten.digests, "tuning": choices.tuning.digest if choices is not None else None},
            tolerances=allowed,
            passes=rewritten.records,
            threads=threads,
            bind={key: str(value) for key, value in (bind or {}).items()},
            notes=(*rewritten.notes, *(choices.notes() if choices is not None else ())),
            embed_weights=embed_weights,
        )
        write_artifact(directory, program=program, model_bytes=data, facts=facts)
        say("verifying against ONNX Runtime")
        notes, record = _prove(Artifact(directory, json.loads((directory / "manifest.json").read_text())))
        if record is not None:  # what the sample was held to here is what `bench` on a device holds it to
            wider = {output["output"]: output["tolerance"] for output in record["outputs"]}
        else:
            single = machine.precision == "f32"
            wider = conditioned_tolerances(data, inputs, list(here), sample, expected) if single else {}
        held = [max(tolerance, wider.get(name, 0.0)) for name, tolerance in here.items()]
        (directory / "parity.bin").write_bytes(pack_parity(sample, expected, held))
        write_artifact(
            directory,
            program=program,
            model_bytes=data,
            facts=replace(facts, notes=(*facts.notes, *notes)),
            parity=record,
        )
        return finish()


def rewrite(
    model: Model,
    passes: Iterable[Any] = (),
    recipe: str | _os.PathLike[str] | Mapping[str, Any] | Recipe | None = None,
    calibration: Calibration | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    bind: Mapping[str, Any] | None = None,
    plugins: Sequence[str | _os.PathLike[str]] = (),
    dump: str | _os.PathLike[str] | None = None,
    preprocess: str | None = None,
    records: list[dict[str, Any]] | None = None,
    limits: Limits = DEFAULT,
    progress: Progress | None = None,
) -> ir.Model:
    """Only load and rewrite: the model after its passes, a valid standard ONNX model. Arguments as for `compile`.

    records: a list to which one JSON-able record a pass is added.
    """
    say = progress or (lambda text: None)
    with limited(limits):
        done = _rewrite(
            model, passes, _recipe(recipe), calibration, shapes, bind, plugins, dump, preprocess, say, None, limits
        )
    if records is not None:
        records += done.records
    return done.model


def _recipe(recipe: Any) -> Recipe:
    return Recipe() if recipe is None else load_recipe(recipe)


def _rewrite(
    model: Model, passes: Iterable[Any], recipe: Recipe, calibration: Calibration | None, shapes: Any, bind: Any,
    plugins: Any, dump: Any, preprocess: str | None, say: Progress, target: Target | None,
    limits: Limits, fit: Any = None, io: str = "float",
) -> Rewritten:  # fmt: skip
    notes: list[str] = []
    steps = resolve_passes(passes, recipe, plugins)  # a wrong pass is said before the model is read
    before = target if steps or fit is not None else None  # else lowering comes next anyway
    loaded = preflight(model, {**recipe.shapes, **(shapes or {})}, bind, notes, limits, before)
    source = calibration if calibration is not None else recipe.calibration
    data = None
    if source is not None:
        say("reading calibration data")
        data = load_data(source, [input_spec(value) for value in loaded.graph.inputs], preprocess)
    origin = hashlib.sha256(_raw_bytes(model)).hexdigest()

    def tell(step: str, done: int, total: int) -> None:
        say(f"{step} ({done + 1}/{total})" if done < total else step)

    if fit is not None:
        changed, records = fit(loaded, steps, calibration=data, preprocess=preprocess, dump=dump, progress=tell)
    else:
        changed, records = run_passes(
        loaded, steps, calibration=data, target=target, dump=dump, progress=tell,
        price=layer_price(target) if target is not None else None,
    )  # fmt: skip
    document = {**recipe.document(), "passes": [{"name": r["name"], "options": r.get("options", {})} for r in records]}
    if io == "quantized":
        changed = _quantize_ports(changed, notes, dump, len(records))
        document["io"] = io
    digests = {
        "model": origin,
        "recipe": hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest(),
        "calibration": data.digest if data is not None else None,
    }
    return Rewritten(changed, tuple(records), tuple(notes), digests, data)


def _quantize_ports(model: ir.Model, notes: list[str], dump: Any, passes: int) -> ir.Model:
    """`model` with 8-bit inputs and outputs where it quantizes them; `notes` receives those that stay float."""
    changed, (record,) = run_passes(model, [QuantizedPorts()])
    (found,) = record["details"]
    meant = [port_quantization(value) for value in (*changed.graph.inputs, *changed.graph.outputs)]
    if not any(meant):
        text = f"the model quantizes no input or output: {'; '.join(found['float'][:4]) or 'none is float'}"
        raise UsageError(f"{text}; quantize the model (--pass quantize), or leave this out", "--io quantized")
    notes += [f"{text}: it stays float" for text in found["float"]]
    if dump is not None:
        (Path(dump) / f"{10 * (passes + 2)}-quantized-ports.onnx").write_bytes(model_bytes(changed))
    return changed


def _fit(
    model: ir.Model, steps: Any, *, promise: Budget, target: Target, judge_data: Calibration | None, clock: Any,
    calibration: Data | None, preprocess: str | None, dump: Any, progress: Any,
) -> tuple[ir.Model, list[dict[str, Any]]]:  # fmt: skip
    """`run_passes` with the pruning that holds a budget."""
    if calibration is None:
        raise UsageError("measures what a pruning does and needs --calibration", "--budget")
    own = None
    if judge_data is not None:
        images = isinstance(judge_data, (str, _os.PathLike)) and Path(judge_data).is_dir()
        own = load_data(judge_data, [input_spec(value) for value in model.graph.inputs], preprocess if images else None)
    run_passes(model, (), dump=dump)  # writes 10-load.onnx
    found = fit_budget(model, steps, promise, target, calibration, own, clock(model_bytes(model)), progress)
    if dump is not None:
        (Path(dump) / "20-budget.onnx").write_bytes(model_bytes(found[0]))
    return found


def _clock(before: bytes, machine: Target, threads: int, tuning: Any) -> Callable[[bytes], float] | None:
    """What times models against `before`; None if the target's code does not run on this machine."""
    if missing_features(machine):
        return None
    built: list[Artifact] = []

    def measured(data: bytes) -> float:
        for model in (data,) if built else (before, data):
            built.append(compile(model, machine, precision=machine.precision, threads=threads, tuning=tuning))
        return faster(built[0], built[-1])

    return measured


def _raw_bytes(model: Model) -> bytes:
    if isinstance(model, bytes):
        return model
    if isinstance(model, (str, _os.PathLike)):
        return Path(model).read_bytes()
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    return proto.SerializeToString(deterministic=True)


def _model_name(model: Model, output: Any) -> str:
    """The artifact's name: of `-o NAME.sparsec`, else of the file, else of the graph."""
    if output is not None and str(output).endswith(".sparsec"):
        return Path(output).name[: -len(".sparsec")] or "model"
    if isinstance(model, (str, _os.PathLike)):
        return Path(model).stem or "model"
    graph = None if isinstance(model, bytes) else model.graph.name
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in graph or "").strip(".")[:64] or "model"


@contextlib.contextmanager
def _destination(output: Any, name: str, overwrite: bool) -> Iterator[tuple[Path, Callable[[], Artifact]]]:
    """A directory to write into, and what turns it into the finished artifact."""
    if output is None:
        owner = tempfile.TemporaryDirectory(prefix="sparsec-")
        directory = Path(owner.name) / f"{name}.sparsec"
        directory.mkdir()
        try:
            yield directory, lambda: Artifact(directory, json.loads((directory / "manifest.json").read_text()), owner)
        except BaseException:
            owner.cleanup()
            raise
        return
    path = artifact_path(output, name)
    check_output(path, overwrite)
    holder: list[Artifact] = []

    def finish() -> Artifact:
        holder.append(Artifact(path, json.loads((stage / "manifest.json").read_text())))
        return holder[0]

    with staged(path, overwrite) as stage:
        yield stage, finish


def _prove(artifact: Artifact) -> tuple[list[str], dict[str, Any] | None]:
    """Run the artifact where that is possible and compare. CheckError if it disagrees."""
    try:
        result = verify(artifact, random_samples=0)
    except RuntimeUnavailable as error:
        return [f"not run on this machine: {error.message}"], None
    if not result.passed:
        raise CheckError(f"{result.worst.text()}; please report this model", f"output {result.worst.output}")
    return [], result.record()


def _dump_program(dump: Any, program: Program) -> None:
    if dump is None:
        return
    folder = Path(dump)
    (folder / "40-program.txt").write_text(str(program), encoding="utf-8")
    text = "\n\n".join(f"# {kernel.name}: {kernel.text}\n{kernel_text(kernel)}" for kernel in program.kernels)
    (folder / "50-kernels.py").write_text(text + "\n", encoding="utf-8")
    if program.target.gpu is not None:
        from sparsec.cuda.source import cuda_source
        from sparsec.cuda.table import device_kernels

        text = cuda_source(device_kernels(program), program.target.cpu)
        (folder / "60-kernels.cu").write_text(text, encoding="utf-8")


__all__ = ["compile", "load", "rewrite"]
