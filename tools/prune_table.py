"""Prune real classifiers with calibration data and measure what is left of their accuracy, and what each part gives.

Every figure is paired with the dense model on the same samples, which calibration never saw: drop of top-1 in points,
KL of the outputs, agreement of the top class, samples that turned right or wrong. Labels are used for top-1 only.
Every pruned model is also compiled for this machine and run on `PARITY` of the samples that it was measured on: the
largest relative error to ONNX Runtime, and on how many the top class is the same.

Each cell runs in a process of its own (its peak memory is reported) and is written at once; cells that the JSON holds
are not run again. Data from the folder that SPARSEC_DATA names. `--keep` names a folder for the pruned models and for
what their allocations measured: ablations that share it do not measure it again, and `--recover` starts from there.

    SPARSEC_DATA=... python tools/prune_table.py --out docs/benchmarks/pruning
    SPARSEC_DATA=... python tools/prune_table.py --model mobilenetv2 --variant "50% 4x1" --ablations --keep /tmp/kept
    SPARSEC_DATA=... python tools/prune_table.py --model mobilenetv2 --variant 2:4 --recover minutes=40 --keep /tmp/kept
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
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

MEAN, STD = "0.485+0.456+0.406", "0.229+0.224+0.225"
PHOTOGRAPHS = f"resize=232,crop=224,scale=255,mean={MEAN},std={STD}"
FILES = {
    "mobilenetv2": "mobilenetv2_torchvision.onnx",
    "squeezenet1.1": "squeezenet1.1.onnx",
    "resnet20": "resnet20_cifar10.onnx",
    "kwt1": "kwt1_speech_commands.onnx",
    "dscnn": "dscnn_kws_mlperf_tiny.onnx",
}
VARIANTS = {
    "30% 4x1": "sparsity=0.3,block=4x1",
    "50% 4x1": "sparsity=0.5,block=4x1",
    "50% 1x1": "sparsity=0.5",
    "2:4": "nm=2:4",
    "70% 1x1": "sparsity=0.7",
}
ROWS = {"mobilenetv2": tuple(VARIANTS), **{name: ("50% 4x1", "70% 1x1") for name in FILES if name != "mobilenetv2"}}
ABLATIONS = {
    "all": "",
    "importance=magnitude": "importance=magnitude",
    "importance=activation": "importance=activation",
    "allocation=uniform": "allocation=uniform",
    "regrow=true": "regrow=true",
    "refit=layer": "refit=layer",
    "refit=none": "refit=none",
    "rescale=false": "rescale=false",
    "repair=false": "repair=false",
    "no calibration": "none",
}
STATELESS = ("no calibration", "allocation=uniform")  # nothing is measured
PARITY = 25
KWT_ORDER = ["silence", "unknown", "yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"]
Arrays = tuple[np.ndarray, np.ndarray]  # samples [N, ...] without a batch axis, labels [N]


def photographs(folder: Path) -> tuple[Arrays, Arrays]:
    """Classes divisible by 4 to calibrate, the others to measure."""
    from sparsec.images import Images

    images = Images.parse(folder / "images/imagenet", PHOTOGRAPHS)
    files = images.files()
    labels = np.array([int(path.name.split("_")[0]) for path in files])
    x = np.stack([images.load(path) for path in files])
    return (x[labels % 4 == 0], labels[labels % 4 == 0]), (x[labels % 4 != 0], labels[labels % 4 != 0])


def cifar(folder: Path) -> tuple[Arrays, Arrays]:
    """500 training images to calibrate, the 2000 test images to measure."""
    mean, std = (np.array([float(v) for v in text.split("+")], np.float32) for text in (MEAN, STD))

    def read(name: str, step: int) -> Arrays:
        with np.load(folder / "cifar10" / name, allow_pickle=False) as archive:
            x = (archive["x"][::step] / np.float32(255) - mean) / std
            return x.transpose(0, 3, 1, 2).astype(np.float32), archive["y"][::step].astype(int)

    return read("cifar10_train_2000.npz", 4), read("cifar10_test_2000.npz", 1)


def speech(folder: Path) -> tuple[Arrays, Arrays]:
    """Every other clip to calibrate, the rest to measure."""
    with np.load(folder / "audio/speech_commands_408.npz", allow_pickle=False) as archive:
        x = archive["x"].astype(np.float32) / 32768
        names = [str(name) for name in archive["labels"]]
        y = np.array([KWT_ORDER.index(names[label]) for label in archive["y"]])
    return (x[::2], y[::2]), (x[1::2], y[1::2])


def keywords(folder: Path) -> tuple[Arrays, Arrays]:
    """Every other recording to calibrate, the rest to measure."""
    with np.load(folder / "audio/kws_mfcc_500.npz", allow_pickle=False) as archive:
        x = (archive["x"].astype(np.float32) - np.float32(archive["zero_point"])) * np.float32(archive["scale"])
        y = archive["y"].astype(int)
    return (x[::2], y[::2]), (x[1::2], y[1::2])


DATA = {"mobilenetv2": photographs, "squeezenet1.1": photographs, "resnet20": cifar, "kwt1": speech, "dscnn": keywords}


@dataclass(frozen=True)
class Cell:
    """One measurement: `passes` after another on `model`."""

    model: str
    variant: str
    ablation: str
    passes: tuple[str, ...]
    threads: int
    keep: str = ""

    def stem(self, ablation: str) -> Path:
        """Where the folder `keep` holds files of the cell with `ablation` in the place of its own."""
        return Path(self.keep) / re.sub(r"[^a-z0-9]+", "-", f"{self.model} {self.variant} {ablation}".lower())

    def specs(self) -> list[str]:
        """The passes, with a state file where ablations measure the same."""
        specs = list(self.passes)
        index = next((i for i, spec in enumerate(specs) if spec.startswith("prune:")), None)
        if self.keep and index is not None and self.variant != "2:4" and not self.ablation.startswith(STATELESS):
            same = re.search(r"importance=\w+|refit=none", specs[index])
            measured = " ".join([*specs[:index], same.group() if same else "", "state"])
            specs[index] += f",state={self.stem(measured).with_suffix('.json')}"
        return specs


def in_floats(path: Path) -> bytes:
    """The model with weights that are stored as whole numbers written out, so that they can be pruned."""
    import onnx
    from onnx import numpy_helper
    from onnx.reference import ReferenceEvaluator

    proto = onnx.load(path)
    constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    for node in list(proto.graph.node):
        if node.op_type == "DequantizeLinear" and all(name in constants for name in node.input):
            value = ReferenceEvaluator(node).run(None, {name: constants[name] for name in node.input})[0]
            proto.graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
            proto.graph.node.remove(node)
    return proto.SerializeToString()


def logits(model: Any, x: np.ndarray) -> np.ndarray:
    """The model's first output for each sample, [N, classes]."""
    from sparsec.passes.measure.segments import Segment, batches

    name, result = str(model.graph.inputs[0].name), str(model.graph.outputs[0].name)
    segment = Segment(model, None, [result])
    parts = [segment.run(batch)[result] for batch in batches({name: sample[None]} for sample in x)]
    return np.concatenate(parts).reshape(len(x), -1)


def log_softmax(y: np.ndarray) -> np.ndarray:
    """Log probabilities of logits; of probabilities their logarithm."""
    if (y >= 0).all() and np.allclose(y.sum(axis=1), 1, atol=1e-3):
        return np.log(np.maximum(y, 1e-12))
    y = y - y.max(axis=1, keepdims=True)
    return y - np.log(np.exp(y).sum(axis=1, keepdims=True))


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Prune and compare with the dense model."""
    import sparsec
    from sparsec.loading.load import load_model, model_bytes
    from sparsec.passes.layers import select_layers

    calibration, held = DATA[cell.model](folder)
    dense = load_model(in_floats(folder / "models" / FILES[cell.model]))
    name = str(dense.graph.inputs[0].name)
    start = time.perf_counter()
    data = None if cell.ablation == "no calibration" else {name: calibration[0]}
    specs, source = cell.specs(), dense
    pruned_before = cell.stem(cell.ablation.partition(", recover")[0]).with_suffix(".onnx")
    if specs[-1].startswith("recover:") and cell.keep and pruned_before.exists():
        source = load_model(pruned_before)
        specs = [f"{specs[-1]},teacher={folder / 'models' / FILES[cell.model]}"]
    cpu = time.process_time()
    pruned = sparsec.rewrite(source, passes=specs, calibration=data)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if cell.keep:
        cell.stem(cell.ablation).with_suffix(".onnx").write_bytes(model_bytes(pruned))
    layers = select_layers(pruned).layers
    zeros = sum(layer.size - int(np.count_nonzero(layer.read())) for layer in layers)
    x, y = held
    before, after = logits(dense, x), logits(pruned, x)
    a, b = log_softmax(before), log_softmax(after)
    first, second = before.argmax(axis=1), after.argmax(axis=1)
    with tempfile.TemporaryDirectory() as made:
        artifact = sparsec.compile(pruned, "host", output=Path(made) / "model.sparsec")
        parity = artifact.verify(data={name: x[:PARITY]})
    return {
        **{key: value for key, value in asdict(cell).items() if key != "keep"},
        "samples": len(x),
        "calibration": len(calibration[0]),
        "zeros": zeros / sum(layer.size for layer in layers),
        "dense_top1": 100 * float((first == y).mean()),
        "top1": 100 * float((second == y).mean()),
        "drop": 100 * float((first == y).mean() - (second == y).mean()),
        "kl": float((np.exp(a) * (a - b)).sum(axis=1).mean()),
        "agreement": 100 * float((first == second).mean()),
        "turned_wrong": int(((first == y) & (second != y)).sum()),
        "turned_right": int(((first != y) & (second == y)).sum()),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mib": peak,
        "parity": parity.worst.max_relative_error,
        "same_top1": f"{parity.same_top1}/{parity.samples}",
    }


def cells(arguments: argparse.Namespace) -> Iterable[Cell]:
    """What is to be measured, in order."""
    before = tuple(arguments.before)
    for model in arguments.model or FILES:
        for variant in arguments.variant or ROWS[model]:
            chosen = ABLATIONS if arguments.ablations else {"all": ""}
            for ablation, options in chosen.items():
                if arguments.only and ablation not in arguments.only:
                    continue
                spec = VARIANTS[variant] + (f",{options}" if options and options != "none" else "")
                label = ablation if not before else f"{ablation}, after {' '.join(before)}"
                if variant == "2:4" and ablation == "allocation=uniform":
                    continue  # N:M fixes every layer's share
                passes = (*before, f"prune:{spec}")
                if arguments.recover:
                    passes, label = (*passes, f"recover:{arguments.recover}"), f"{label}, recover:{arguments.recover}"
                yield Cell(model, variant, label, passes, arguments.threads, arguments.keep)


def run(cell: Cell) -> dict[str, Any]:
    """`measure` in a process of its own."""
    environment = {**os.environ, **dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), str(cell.threads))}
    command = [sys.executable, __file__, "--cell", json.dumps(asdict(cell))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{cell.model} {cell.variant} {cell.ablation}: {result.stderr.strip()[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


HEADS = (
    "model",
    "variant",
    "parts",
    "zeros",
    "dense",
    "top-1",
    "drop",
    "KL",
    "agreement",
    "wrong / right",
    "CPU seconds",
    "MiB",
    "compiled: error, same top-1",
)


def table(results: Iterable[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(HEADS) + " |", "|" + " --- |" * len(HEADS)]
    for r in results:
        fields = (
            r["model"], r["variant"], r["ablation"], f"{100 * r['zeros']:.1f}%", f"{r['dense_top1']:.1f}",
            f"{r['top1']:.1f}", f"{r['drop']:.1f}", f"{r['kl']:.3f}", f"{r['agreement']:.1f}",
            f"{r['turned_wrong']} / {r['turned_right']}", f"{r['cpu_seconds']:.0f}", f"{r['peak_mib']:.0f}",
            f"{r['parity']:.1e}, {r['same_top1']}",
        )  # fmt: skip
        lines.append("| " + " | ".join(fields) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing and write both files after every cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=FILES)
    parser.add_argument("--variant", action="append", choices=VARIANTS)
    parser.add_argument("--ablations", action="store_true", help="also with each part switched off alone")
    parser.add_argument("--before", action="append", default=[], metavar="SPEC", help="a pass before prune")
    parser.add_argument("--only", action="append", choices=ABLATIONS, help="of the ablations, these")
    parser.add_argument("--recover", default="", metavar="OPTIONS", help="train afterwards, as in minutes=40")
    parser.add_argument("--keep", default="", metavar="FOLDER", help="an existing folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("pruning"), help="OUT.json and OUT.md")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "SPARSEC_DATA" not in os.environ:
        sys.exit("SPARSEC_DATA names no folder of models and data")
    folder = Path(os.environ["SPARSEC_DATA"])
    if arguments.cell:
        given = json.loads(arguments.cell)
        print(json.dumps(measure(Cell(**{**given, "passes": tuple(given["passes"])}), folder)))
        return
    document, report = arguments.out.with_suffix(".json"), arguments.out.with_suffix(".md")
    results: list[dict[str, Any]] = json.loads(document.read_text()) if document.exists() else []
    for cell in cells(arguments):
        if any((r["model"], r["variant"], r["ablation"]) == (cell.model, cell.variant, cell.ablation) for r in results):
            continue
        print(f"{cell.model} {cell.variant} {cell.ablation}", file=sys.stderr, flush=True)
        results.append(run(cell))
        document.write_text(json.dumps(results, indent=1) + "\n")
        text = "# Pruning with calibration data\n\nMade by `tools/prune_table.py`, which says what is measured how.\n\n"
        report.write_text(text + table(results))
        print(table(results[-1:]).splitlines()[-1], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
