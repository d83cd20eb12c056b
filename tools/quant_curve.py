"""Accuracy against latency on MobileNetV2: float32 and int8, dense and pruned, with the Pareto front marked.

float32 is pruned in 4x1 blocks, int8 in 4x4 (one load of four weights feeds a dot-product instruction), at 30, 50 and
70%, calibrated without labels on every other photograph of the classes divisible by 4 (all of them for `quantize`, which
leaves no layer in float32); accuracy is that of the 250 others. Latency is of this machine, one thread: all models in
turn, ROUNDS times, the median counts, ONNX Runtime on the dense ones beside.

Two steps, so that latency can wait for a quiet machine: `--prepare` prunes, quantizes and measures accuracy, each model
once, kept in the folder; `--time` compiles what is missing, measures latency in one process and draws.

    SPARSEC_DATA=... python tools/quant_curve.py --keep /tmp/curve --prepare
    SPARSEC_DATA=... python tools/quant_curve.py --keep /tmp/curve --time --out docs/benchmarks/quantization-curve
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from prune_table import DATA, FILES, in_floats, logits
from quant_table import followed

MODEL = "mobilenetv2"
SHARES = (0, 30, 50, 70)
KINDS = {"float32": "4x1", "int8": "4x4"}
ROUNDS = 40
WARM = 5
BESIDE = "ONNX Runtime"


def label(kind: str, share: int) -> str:
    """What a point is called."""
    return f"{kind} dense" if not share else f"{kind} {share}% {KINDS[kind]}"


def stored(keep: Path, kind: str, share: int) -> Path:
    """The model of a point."""
    return keep / f"{label(kind, share)}.onnx".replace("%", "")


def pruned(keep: Path, block: str, share: int) -> Path:
    """The float32 model pruned in these blocks."""
    return keep / f"{share} {block}.onnx"


def prepare(keep: Path, folder: Path, kind: str, share: int) -> dict[str, Any]:
    """Prune and quantize where that is not done yet; accuracy on the held-out photographs."""
    import sparsec
    from sparsec.loading.load import load_model, model_bytes

    calibration, (x, y) = DATA[MODEL](folder)
    source = in_floats(folder / "models" / FILES[MODEL])
    dense, block = load_model(source), KINDS[kind]
    data = {str(dense.graph.inputs[0].name): calibration[0]}
    model = load_model(source)
    if share:
        file = pruned(keep, block, share)
        if not file.exists():
            spec = f"prune:sparsity={share / 100},block={block},samples=32,state={keep / block}.json"
            some = {name: x[::2] for name, x in data.items()}
            file.write_bytes(model_bytes(sparsec.rewrite(model, passes=[spec], calibration=some)))
        model = load_model(file)
    if kind == "int8":
        model = followed(model, dense, ["quantize:fallback=none"], data)
    stored(keep, kind, share).write_bytes(model_bytes(model))
    before, after = logits(dense, x).argmax(axis=1), logits(model, x).argmax(axis=1)
    return {
        "label": label(kind, share), "kind": kind, "share": share, "top1": 100 * float((after == y).mean()),
        "agreement": 100 * float((after == before).mean()),
    }  # fmt: skip


def time_all(keep: Path, points: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Milliseconds of every model in every round, all in one process, in turn."""
    import sparsec
    from sparsec.artifact import load
    from sparsec.runtimes.native import NativeSession
    from sparsec.runtimes.ort import OrtSession

    once = {}
    sample = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    for point in points:
        source = stored(keep, point["kind"], point["share"])
        made = source.with_suffix(".sparsec")
        if not made.exists():
            sparsec.compile(source, "host", output=made)
        artifact = load(made)
        session = NativeSession(artifact, 1)
        once[point["label"]] = session.once({artifact.inputs[0].name: sample})
        point["bytes"] = sum((made / file).stat().st_size for file in ("weights.bin", "libmodel.so"))
        if not point["share"]:
            other = OrtSession(source.read_bytes())
            once[f"{BESIDE}, {point['label']}"] = other.once({artifact.inputs[0].name: sample})
    found: dict[str, list[float]] = {name: [] for name in once}
    for turn in range(WARM + ROUNDS):
        for name, call in once.items():
            start = time.perf_counter()
            call()
            if turn >= WARM:
                found[name].append(1000 * (time.perf_counter() - start))
    return found


def front(points: Sequence[dict[str, Any]]) -> list[str]:
    """Labels of the points that no other is both faster and more accurate than, by latency."""
    chosen, best = [], -1.0
    for point in sorted(points, key=lambda p: (p["ms"], -p["top1"])):
        if point["top1"] > best:
            chosen.append(point["label"])
            best = point["top1"]
    return chosen


def draw(points: Sequence[dict[str, Any]], beside: dict[str, float], path: Path) -> None:
    """One plot, latency against top-1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for kind, colour, marker in (("float32", "tab:blue", "o"), ("int8", "tab:red", "s")):
        mine = sorted((p for p in points if p["kind"] == kind), key=lambda p: p["ms"])
        axes.plot([p["ms"] for p in mine], [p["top1"] for p in mine], marker, color=colour, label=f"sparsec, {kind}")
        for p in mine:
            text = "dense" if not p["share"] else f"{p['share']}% {KINDS[kind]}"
            axes.annotate(text, (p["ms"], p["top1"]), textcoords="offset points", xytext=(6, -10), fontsize=8)
        dense = next(p for p in points if p["kind"] == kind and not p["share"])
        axes.plot(
            beside[f"{BESIDE}, {dense['label']}"], dense["top1"], "x", color=colour, label=f"{BESIDE}, {kind} dense"
        )
    best = [p for name in front(points) for p in points if p["label"] == name]
    axes.plot([p["ms"] for p in best], [p["top1"] for p in best], "k--", linewidth=1, label="Pareto front", zorder=0)
    axes.set(
        xlabel="milliseconds, one thread", ylabel="top-1, %", title="MobileNetV2, 250 photographs not calibrated on"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """One step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, required=True, metavar="FOLDER", help="models, states, accuracies")
    parser.add_argument("--prepare", action="store_true", help="prune, quantize, measure accuracy")
    parser.add_argument("--time", action="store_true", help="compile, measure latency, draw")
    parser.add_argument("--out", type=Path, default=Path("quantization-curve"), help="OUT.json and OUT.png")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "SPARSEC_DATA" not in os.environ:
        sys.exit("SPARSEC_DATA names no folder of models and data")
    keep, folder = arguments.keep, Path(os.environ["SPARSEC_DATA"])
    keep.mkdir(parents=True, exist_ok=True)
    if arguments.point:
        kind, share = arguments.point
        print(json.dumps(prepare(keep, folder, kind, int(share))))
        return
    document = keep / "accuracy.json"
    points: list[dict[str, Any]] = json.loads(document.read_text()) if document.exists() else []
    if arguments.prepare:
        for kind in KINDS:
            for share in SHARES:
                if any(p["label"] == label(kind, share) for p in points):
                    continue
                command = [sys.executable, __file__, "--keep", str(keep), "--point", kind, str(share)]
                result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
                if result.returncode:
                    sys.exit(f"{label(kind, share)} failed")
                points.append(json.loads(result.stdout.strip().splitlines()[-1]))
                document.write_text(json.dumps(points, indent=1) + "\n")
                print(points[-1], file=sys.stderr, flush=True)
    if arguments.time:
        rounds = time_all(keep, points)
        medians = {name: statistics.median(values) for name, values in rounds.items()}
        for point in points:
            point["ms"] = medians[point["label"]]
        beside = {name: value for name, value in medians.items() if name.startswith(BESIDE)}
        result = {"model": MODEL, "rounds": ROUNDS, "points": points, "beside": beside, "front": front(points)}
        arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        draw(points, beside, arguments.out.with_suffix(".png"))
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
