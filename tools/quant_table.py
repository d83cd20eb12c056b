"""Quantize real classifiers and measure what is left of their accuracy, and what each part gives.

Every figure is paired with the float32 model on the same samples, which calibration never saw: drop of top-1 in points,
agreement of the top class, KL of the outputs. Photographs: the classes divisible by 4 calibrate, the others are
measured; labels are used for top-1 only. With `--compile` every model is also built for this machine and compared with
ONNX Runtime on the same quantized model: the share of outputs within one quantization step, the same for another correct
implementation (`sparsec.proving.rounding`), and on how many of `PARITY` samples the top class is the same.

Each cell runs in a process of its own (its peak memory is reported) and is written at once; cells that the JSON holds
are not run again, but compiled where that is missing and `--keep` names the folder that has the model. Data from the
folder that SPARSEC_DATA names.

    SPARSEC_DATA=... python tools/quant_table.py --compile --out docs/benchmarks/quantization
    SPARSEC_DATA=... python tools/quant_table.py --model dscnn --variant "equalize=weights" --out /tmp/try
    SPARSEC_DATA=... python tools/quant_table.py --orders 0.5 0.7 --model resnet20 --out docs/benchmarks/quantization
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from prune_table import DATA, FILES, in_floats, log_softmax, logits

PARITY = 100
WHOLE = "int8"
VARIANTS = {
    WHOLE: "quantize",
    "equalize=weights": "quantize:equalize=weights",
    "equalize=activations": "quantize:equalize=activations",
    "equalize=none": "quantize:equalize=none",
    "observer=minmax": "quantize:observer=minmax",
    "observer=average": "quantize:observer=average",
    "observer=percentile": "quantize:observer=percentile",
    "observer=entropy": "quantize:observer=entropy",
    "rounding=nearest": "quantize:rounding=nearest",
    "rounding=feedback": "quantize:rounding=feedback",
    "scales=max": "quantize:scales=max",
    "correct=false": "quantize:correct=false",
    "trust=0": "quantize:trust=0",
    "fallback=none": "quantize:fallback=none",
    "activations=int8": "quantize:activations=int8",
    "plain": "quantize:observer=minmax,rounding=nearest,scales=max,correct=false,fallback=none",
    **{f"weights {bits} / {group}": f"quantize:weights={bits},group={group}" for bits in ("int8", "int4") for group in (32, 64, 128)},
    "weights int4 / 64, asymmetric": "quantize:weights=int4,asymmetric=true",
    "weights int4 / 64, nearest": "quantize:weights=int4,rounding=nearest",
    "weights int4 / 64, no data": "none|quantize:weights=int4",
    "weights int8 / 64, no data": "none|quantize:weights=int8",
}  # fmt: skip
MATRICES = ("kwt1",)  # models whose weights are mostly those of products
ORDERS = {
    "pruned, float": ("prune:{prune}",),
    "prune, refit, quantize towards the original": ("prune:{prune}", "quantize"),
    "prune, refit, quantize for itself": ("prune:{prune}", "quantize:trust=0"),
    "prune, quantize, no refit": ("prune:{prune},refit=none", "quantize:trust=0,correct=false"),
    "quantize, then prune": ("prune:{prune},refit=none", "quantize"),
}
AFTER = "quantize, then prune"


@dataclass(frozen=True)
class Cell:
    """One measurement: `passes` after another on `model`. A first pass `none` stands for no calibration data."""

    model: str
    variant: str
    passes: tuple[str, ...]
    build: bool
    keep: str = ""

    @property
    def kept(self) -> Path | None:
        """Where the resulting model is kept."""
        name = re.sub(r"[^a-z0-9.]+", "-", f"{self.model} {self.variant}".lower())
        return Path(self.keep) / f"{name}.onnx" if self.keep else None


def quantized_then_pruned(dense: Any, pruned: Any, passes: list[str], data: Any) -> Any:
    """The dense model quantized, then its integers zeroed where `pruned` has zeros."""
    import onnx_ir as ir

    import sparsec
    from sparsec.passes.layers import weighted_layers

    masks = {str(layer.weight.name): layer.tensor.numpy() != 0 for layer in weighted_layers(pruned)}
    made = sparsec.rewrite(dense, passes=passes, calibration=data)
    for name, mask in masks.items():
        value = made.graph.initializers.get(f"{name}_quantized")
        if value is not None:
            array = np.where(mask, value.const_value.numpy(), 0).astype(np.int8)
            value.const_value = ir.Tensor(array, name=value.name)
    return made


def stored(model: Any) -> tuple[int, int, float]:
    """Weights in integers, in floats, and the share of zeros among all."""
    from sparsec.passes.layers import weighted_layers
    from sparsec.passes.normalization.fold_constants import constant

    floats = [layer.read() for layer in weighted_layers(model)]
    integers = []
    for node in model.graph:
        q = constant(node.inputs[0]) if node.op_type == "DequantizeLinear" else None
        if q is not None and q.ndim > 1 and q.dtype != np.int32:
            integers.append(np.asarray(q).astype(np.int16))
    zeros = sum(int((w == 0).sum()) for w in (*floats, *integers))
    counts = sum(q.size for q in integers), sum(w.size for w in floats)
    return *counts, zeros / max(sum(counts), 1)


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Quantize and compare with the float32 model."""
    import sparsec
    from sparsec.loading.load import load_model, model_bytes

    calibration, (x, y) = DATA[cell.model](folder)
    source = in_floats(folder / "models" / FILES[cell.model])
    dense = load_model(source)
    name = str(dense.graph.inputs[0].name)
    passes, data = list(cell.passes), {name: calibration[0]}
    if passes[0] == "none":
        passes, data = passes[1:], None
    kept = Path(cell.keep) / f"{cell.model} {passes[0]}.onnx".replace(":", " ") if cell.keep else None
    start, cpu = load_model(source), time.process_time()
    if kept is not None and passes[0].startswith("prune"):
        if not kept.exists():
            kept.write_bytes(model_bytes(sparsec.rewrite(start, passes=passes[:1], calibration=data)))
        pruned, rest = load_model(kept), passes[1:]
        if cell.variant.startswith(AFTER):
            made = quantized_then_pruned(start, pruned, rest, data)
        else:
            made = followed(pruned, start, rest, data) if rest else pruned
    else:
        made = sparsec.rewrite(start, passes=passes, calibration=data)
    cpu = time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before, after = logits(dense, x), logits(made, x)
    a, b = log_softmax(before), log_softmax(after)
    first, second = before.argmax(axis=1), after.argmax(axis=1)
    integers, floats, zeros = stored(made)
    result = {
        **{key: value for key, value in asdict(cell).items() if key not in ("keep", "build")},
        "samples": len(x),
        "calibration": 0 if data is None else len(calibration[0]),
        "weights_int": integers,
        "weights_float": floats,
        "zeros": zeros,
        "float_top1": 100 * float((first == y).mean()),
        "top1": 100 * float((second == y).mean()),
        "drop": 100 * float((first == y).mean() - (second == y).mean()),
        "agreement": 100 * float((first == second).mean()),
        "kl": float((np.exp(a) * (a - b)).sum(axis=1).mean()),
        "cpu_seconds": cpu,
        "peak_mib": peak,
    }
    if cell.kept is not None:
        cell.kept.write_bytes(model_bytes(made))
    return {**result, **built(made, {name: x[:PARITY]})} if cell.build else result


def build(cell: Cell, folder: Path) -> dict[str, Any]:
    """`built` of a model that was kept."""
    from sparsec.loading.load import load_model

    model = load_model(cell.kept)
    return built(model, {str(model.graph.inputs[0].name): DATA[cell.model](folder)[1][0][:PARITY]})


def followed(pruned: Any, original: Any, passes: list[str], data: Any) -> Any:
    """`passes` on a model that was pruned before, as in one run after `original`."""
    from sparsec.loading.load import model_bytes
    from sparsec.rewriting.pass_specs import parse_spec
    from sparsec.rewriting.passes_api import Context

    for spec in passes:
        step = parse_spec(spec)
        pruned.meta["sparsec"] = Context(data, original=model_bytes(original))
        pruned = step(pruned).model
        pruned.meta.pop("sparsec", None)
    return pruned


def built(model: Any, data: dict[str, np.ndarray]) -> dict[str, Any]:
    """Compiled for this machine, against ONNX Runtime on the same model."""
    import sparsec

    with tempfile.TemporaryDirectory() as folder:
        artifact = sparsec.compile(model, "host", output=Path(folder) / "model.sparsec")
        proof = artifact.verify(data=data)
        steps = proof.worst.steps
        within, witness = (
            None if steps is None else 100 * (1 - count / max(steps.elements, 1))
            for count in ((steps.beyond, steps.witnessed) if steps is not None else (0, 0))
        )
        sizes = sum((artifact.path / file).stat().st_size for file in ("weights.bin", "libmodel.so"))
    return {
        "parity_passed": bool(proof.passed),
        "within_one_step": within,
        "witness_within_one_step": witness,
        "max_relative_error": float(proof.worst.max_relative_error),
        "same_top1": proof.same_top1,
        "parity_samples": proof.samples,
        "bytes": sizes,
    }


def cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    """What is to be measured, in order."""
    for model in arguments.model or FILES:
        if arguments.orders:
            for share in arguments.orders:
                for order, passes in ORDERS.items():
                    prune = f"sparsity={share},block={arguments.block}"
                    label = f"{order}, {round(100 * share)}% {arguments.block}"
                    yield Cell(model, label, tuple(p.format(prune=prune) for p in passes), False, arguments.keep)
            continue
        chosen = arguments.variant or [
            WHOLE,
            *([v for v in VARIANTS if v.startswith("weights")] if model in MATRICES else []),
        ]
        for variant in chosen:
            passes = tuple(VARIANTS[variant].split("|"))
            yield Cell(model, variant, passes, arguments.compile, arguments.keep)


def run(cell: Cell, what: str = "--cell") -> dict[str, Any]:
    """`measure` (or `build`) in a process of its own, on one thread."""
    environment = {**os.environ, **dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")}
    command = [sys.executable, __file__, what, json.dumps(asdict(cell))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{cell.model} {cell.variant}: {result.stderr.strip()[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


HEADS = (
    "model", "variant", "weights in integers", "zeros", "float32 top-1", "top-1", "drop", "agreement", "KL",
    "CPU seconds", "MiB", "compiled: within one step (a witness), same top-1",
)  # fmt: skip


def table(results: Iterable[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(HEADS) + " |", "|" + " --- |" * len(HEADS)]
    for r in results:
        compiled = ""
        if "same_top1" in r:
            share = (
                "float outputs"
                if r["within_one_step"] is None
                else f"{r['within_one_step']:.2f}% ({r['witness_within_one_step']:.2f}%)"
            )
            compiled = f"{share}, {r['same_top1']}/{r['parity_samples']}" + ("" if r["parity_passed"] else ", FAILED")
        share = r["weights_int"] / max(r["weights_int"] + r["weights_float"], 1)
        fields = (
            r["model"], r["variant"], f"{100 * share:.1f}%", f"{100 * r['zeros']:.1f}%", f"{r['float_top1']:.1f}",
            f"{r['top1']:.1f}", f"{r['drop']:.1f}", f"{r['agreement']:.1f}", f"{r['kl']:.4f}", f"{r['cpu_seconds']:.0f}",
            f"{r['peak_mib']:.0f}", compiled,
        )  # fmt: skip
        lines.append("| " + " | ".join(fields) + " |")
    return "\n".join(lines) + "\n"


def report(results: list[dict[str, Any]]) -> str:
    """The whole page."""
    orders = [r for r in results if r["passes"][0].startswith("prune")]
    plain = [r for r in results if r not in orders]
    parts = ["# Quantization\n", "Made by `tools/quant_table.py`, which says what is measured how.\n"]
    if plain:
        parts += ["## Accuracy\n", table(plain)]
    if orders:
        text = "CPU seconds are those of quantization alone where the pruned model was kept from another row.\n"
        parts += ["## Pruning and quantization, in which order\n", text, table(orders)]
    return "\n".join(parts)


def main() -> None:
    """Measure what is missing and write both files after every cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=FILES)
    parser.add_argument("--variant", action="append", choices=VARIANTS)
    parser.add_argument("--orders", nargs="+", type=float, metavar="SHARE", help="prune and quantize in every order")
    parser.add_argument("--block", default="4x4", help="of the orders")
    parser.add_argument("--keep", default="", metavar="FOLDER", help="an existing folder for pruned models")
    parser.add_argument("--compile", action="store_true", help="also build each for this machine")
    parser.add_argument("--out", type=Path, default=Path("quantization"), help="OUT.json and OUT.md")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--build", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "SPARSEC_DATA" not in os.environ:
        sys.exit("SPARSEC_DATA names no folder of models and data")
    folder = Path(os.environ["SPARSEC_DATA"])
    if arguments.cell or arguments.build:
        given = json.loads(arguments.cell or arguments.build)
        cell = Cell(**{**given, "passes": tuple(given["passes"])})
        print(json.dumps(measure(cell, folder) if arguments.cell else build(cell, folder)))
        return
    if arguments.orders and not arguments.keep:
        sys.exit("--orders needs --keep FOLDER, where pruned models are shared")
    document = arguments.out.with_suffix(".json")
    results: list[dict[str, Any]] = json.loads(document.read_text()) if document.exists() else []
    for cell in cells(arguments):
        row = next((r for r in results if (r["model"], r["variant"]) == (cell.model, cell.variant)), None)
        if row is not None and (not cell.build or "same_top1" in row or cell.kept is None or not cell.kept.exists()):
            continue
        print(f"{cell.model} {cell.variant}", file=sys.stderr, flush=True)
        if row is None:
            results.append(run(cell))
        else:
            row.update(run(cell, "--build"))
        document.write_text(json.dumps(results, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(report(results))
        print(table([row or results[-1]]).splitlines()[-1], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
