"""The engines that are compared: where each runs, how it gets the model, and the process that times it.

Adding one: a worker in `workers/` (see `serve.py`), an environment in `places.py` if it needs one, a row in `ENGINES`.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx

from bench.models import Missing, Prepared, compiled
from bench.places import ENVIRONMENTS, WORKERS, cache, digest_of, environment_path, environment_python

LOAD_SECONDS = 300
RUN_SECONDS = 120
Options = dict[str, Any]
Convert = Callable[[Prepared], Path]


@dataclass(frozen=True)
class Engine:
    """One row of the comparison. `tolerance`: largest error against ONNX Runtime, as a share of its largest output."""

    name: str
    title: str
    worker: str
    convert: Convert
    environment: str = ""  # of places.ENVIRONMENTS; empty: this process's own
    options: Options = field(default_factory=dict)
    tolerance: float = 1e-3
    label: str = ""  # what a reader must know to compare
    pruned_only: bool = False  # left out on dense models, where it is another row's twin


# --- conversions: each once for a model, kept in the cache ----------------------------------------------------------


def _converted(made: Prepared, kind: str, make: Callable[[Path, Path], Path]) -> Path:
    """`make(model, empty folder)` gives the converted file; the folder is kept by the model's digest."""
    folder = cache() / "converted" / f"{kind}-{digest_of([made.model.read_bytes()])}"
    done = folder / "done"
    if done.is_file():
        return folder / done.read_text(encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = make(made.model, folder)
    if not result.is_file():
        raise Missing(f"the converter wrote no {result.name}")
    done.write_text(result.name, encoding="utf-8")
    return result


def _call(command: Iterable[str | Path], folder: Path) -> None:
    arguments = [str(part) for part in command]
    try:
        done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=LOAD_SECONDS, check=False)
    except OSError as error:
        raise Missing(f"{Path(arguments[0]).name} does not start: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise Missing(f"{Path(arguments[0]).name} took longer than {LOAD_SECONDS} s") from error
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise Missing(f"conversion fails: {lines[-1][:160] if lines else f'exit status {done.returncode}'}")


def _onnx(made: Prepared) -> Path:
    return made.model


def _artifact(made: Prepared) -> Path:
    return compiled(made)


def _mnn(*flags: str) -> Convert:
    def convert(model: Path, folder: Path) -> Path:
        result = folder / "model.mnn"
        tool = environment_path("mnn") / "bin" / "mnnconvert"
        _call([tool, "-f", "ONNX", "--modelFile", model, "--MNNModel", result, "--bizCode", "bench", *flags], folder)
        return result

    return lambda made: _converted(made, "mnn" + "".join(flags), convert)


def _pnnx(model: Path, folder: Path) -> Path:
    shutil.copy(model, folder / "model.onnx")  # pnnx writes beside its input
    tools = sorted(environment_path("ncnn").glob("lib/python*/site-packages/pnnx/pnnx"))
    if not tools:
        raise Missing("pnnx is not in the environment of ncnn")
    _call([tools[0], "model.onnx", "fp16=0"], folder)
    _check_supported(folder / "model.ncnn.param")
    return folder / "model.ncnn.param"


def _check_supported(param: Path) -> None:
    """pnnx writes operators that ncnn lacks under their ONNX names; ncnn crashes on some of these."""
    lines = param.read_text(encoding="utf-8").splitlines() if param.is_file() else []
    foreign = sorted({line.split()[0] for line in lines[2:] if "." in line.split()[0] or "_" in line.split()[0]})
    if foreign:
        raise Missing(f"ncnn has no {', '.join(foreign[:3])}")


def _tflite(model: Path, folder: Path) -> Path:
    tool = environment_path("litert-convert") / "bin" / "onnx2tf"
    if not tool.is_file():
        text = (
            "no converter to .tflite: python tools/bench/setup.py litert-convert (needs Python 3.12), or give --tflite"
        )
        raise Missing(text)
    _call([tool, "-i", model, "-o", folder, "-tb", "flatbuffer_direct", "-n"], folder)
    return folder / f"{model.stem}_float32.tflite"


def _old_onnx(model: Path, folder: Path) -> Path:
    """Opset 17, IR 8: DeepSparse 1.8 reads nothing newer. The outputs are compared afterwards, as everyone's are."""
    proto = onnx.load(model)
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and len(node.input) == 2:
            if node.input[1] not in constants:
                raise Missing(f"{node.op_type} with computed axes needs opset 18")
            axes = onnx.numpy_helper.to_array(constants[node.input[1]])
            node.attribute.append(onnx.helper.make_attribute("axes", axes.tolist()))
            del node.input[1]
            kept = [attribute for attribute in node.attribute if attribute.name != "noop_with_empty_axes"]
            del node.attribute[:]
            node.attribute.extend(kept)
    for entry in proto.opset_import:
        entry.version = 17 if entry.domain == "" else entry.version
    proto.ir_version = 8
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise Missing(f"is not a model of opset 17: {str(error).splitlines()[0][:120]}") from error
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


ENGINES: tuple[Engine, ...] = (
    Engine("sparsec", "sparsec", "run_sparsec.py", _artifact),
    Engine("ort", "ONNX Runtime", "run_ort.py", _onnx),
    Engine(
        "openvino", "OpenVINO f32", "run_openvino.py", _onnx, "openvino",
        {"precision": "f32"}, label="float32 forced",
    ),
    Engine(
        "openvino-default", "OpenVINO default", "run_openvino.py", _onnx, "openvino",
        tolerance=0.25, label="its own choice of precision: bfloat16 where the CPU has it, which few phones do",
    ),
    Engine("mnn", "MNN", "run_mnn.py", _mnn(), "mnn"),
    Engine("mnn-sparse", "MNN sparse", "run_mnn.py", _mnn("--detectSparseSpeedUp"), "mnn",
           label="converted with --detectSparseSpeedUp; on dense models it is MNN", pruned_only=True),
    Engine("ncnn", "ncnn", "run_ncnn.py", lambda made: _converted(made, "ncnn", _pnnx), "ncnn"),
    Engine("litert", "LiteRT", "run_litert.py", lambda made: _converted(made, "tflite", _tflite), "litert",
           label="XNNPACK, which skips its sparse kernels on x86 with AVX"),
    Engine("deepsparse", "DeepSparse", "run_deepsparse.py", lambda made: _converted(made, "opset17", _old_onnx),
           "deepsparse", label="end of life, x86 only"),
)  # fmt: skip


# --- the process ----------------------------------------------------------------------------------------------------


class Worker:
    """An engine with a model loaded, in a process of its own. Raises Missing with the reason if it cannot be."""

    def __init__(
        self, engine: Engine, made: Prepared, cpus: Iterable[int], threads: int = 1, model: Path | None = None
    ) -> None:
        python = Path(sys.executable)
        if engine.environment:
            python = environment_python(engine.environment)
            if not python.exists():
                note = ENVIRONMENTS[engine.environment].note
                text = f"not installed: python tools/bench/setup.py {engine.environment}"
                raise Missing(f"{text} ({note})" if note else text)
        self.engine = engine
        with np.load(made.outputs, allow_pickle=False) as stored:
            expected = {name: stored[name] for name in stored.files}
        path = model or engine.convert(made)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the worker)
        ours = ("PYTHONPATH", "VIRTUAL_ENV") if engine.environment else ()
        environment = {key: value for key, value in os.environ.items() if key not in ours}
        environment["BENCH_CPUS"] = ",".join(map(str, sorted(cpus)))
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        self._process = subprocess.Popen(
            [str(python), str(WORKERS / engine.worker)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment,
        )  # fmt: skip
        try:
            with tempfile.TemporaryDirectory(prefix="sparsec-bench-") as folder:
                results = Path(folder, "outputs.npz")
                request = {"do": "load", "model": str(path), "inputs": str(made.inputs), "outputs": str(results)}
                options = {**engine.options, "outputs": list(expected)}
                answer = self._ask({**request, "threads": threads, "options": options}, LOAD_SECONDS)
                with np.load(results, allow_pickle=False) as stored:
                    self.error = largest_error(expected, {name: stored[name] for name in stored.files})
            if not self.error <= engine.tolerance:
                raise Missing(f"gives wrong results: error {self.error:.2g} of the largest output")
        except BaseException:
            self.close()
            raise
        self.version: str = answer["version"]
        self.note: str = answer["note"]
        self.growth: int | None = answer["growth"]

    def run(self, runs: int) -> list[float]:
        """Seconds of `runs` single inferences, after one that is not timed."""
        return self._ask({"do": "run", "runs": runs}, RUN_SECONDS)["seconds"]

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise Missing(self._last_words()) from None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            raise Missing(f"gave no answer to {request['do']} within {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise Missing(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise Missing(answer["error"])
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        how = f"died of signal {-code}" if code < 0 else f"exited with status {code}"
        return f"{how}: {lines[-1][:160]}" if lines else how

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def largest_error(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> float:
    """Largest difference over all outputs as a share of that output's largest magnitude; inf if sizes differ or NaN."""
    worst = 0.0
    for name, reference in expected.items():
        if name not in found or found[name].size != reference.size:
            return float("inf")
        difference = np.abs(found[name].astype(np.float64).reshape(-1) - reference.astype(np.float64).reshape(-1))
        error = float(difference.max() / max(float(np.abs(reference).max()), 1e-30)) if reference.size else 0.0
        worst = max(worst, error if np.isfinite(error) else float("inf"))
    return worst
