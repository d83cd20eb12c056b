"""Compile every builder and the real models for host and arm, dense and pruned, and compare with ONNX Runtime on real inputs.

For each artifact: the largest relative error over the samples, whether top-1 is identical on every sample, compile seconds and peak
memory of the compiling process, and the stored bytes. Builders and ImageNet models take photographs, the others their own data; all
from the folder that SPARSEC_DATA names. Exit code 1 if a figure misses its bar.

    SPARSEC_DATA=... python tools/check_zoo.py --targets host arm --json zoo.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

BUILDERS = ("mobilenet_v1", "mobilenet_v2", "resnet18", "resnet50", "squeezenet", "efficientnet_lite0", "demo")
MODELS = ("mobilenetv2_torchvision", "squeezenet1.1", "resnet20_cifar10", "dscnn_kws_mlperf_tiny")
VARIANTS = {"dense": None, "50% 4x1": "prune:sparsity=0.5,block=4x1", "80% 4x1": "prune:sparsity=0.8,block=4x1"}
BARS = {"host": (2e-5, 50), "arm": (5e-5, 5)}  # relative error, samples
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESS = f"resize=256,crop=224,scale=255,mean={'+'.join(map(str, MEAN))},std={'+'.join(map(str, STD))}"


def samples(name: str, data: Path, count: int) -> np.ndarray:
    """`count` real inputs for a model, [count, ...] float32."""
    if name == "demo":
        from sparsec.models.demo_data import generate

        return generate("test", count)[0]
    if name == "resnet20_cifar10":
        x = np.load(data / "cifar10" / "cifar10_test_2000.npz")["x"][:: 2000 // count][:count]
        x = (x.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2).astype(np.float32))
    if name == "dscnn_kws_mlperf_tiny":
        held = np.load(data / "audio" / "kws_mfcc_500.npz")
        return ((held["x"][:count].astype(np.float32) - held["zero_point"]) * held["scale"]).astype(np.float32)
    from sparsec.data import load_data
    from sparsec.images import Images
    from sparsec.ports import InputSpec

    images = Images.parse(data / "images" / "imagenet", PREPROCESS)
    stream = iter(load_data(images, [InputSpec("x", (1, 3, 224, 224), "float32")]))
    return np.concatenate([next(stream)["x"].reshape(1, 3, 224, 224) for _ in range(count)])


def compile_and_check(name: str, target: str, variant: str, data: Path) -> dict[str, Any]:
    """One row of the table; runs in a process of its own, so that peak memory is its own."""
    import sparsec
    from sparsec import models

    model: Any = models.build(name) if name in BUILDERS else str(data / "models" / f"{name}.onnx")
    bar, count = BARS[target]
    with tempfile.TemporaryDirectory() as folder:
        passes = [VARIANTS[variant]] if VARIANTS[variant] else []
        started = time.monotonic()
        artifact = sparsec.compile(model, target, passes=passes, output=Path(folder) / "model.sparsec")
        seconds = time.monotonic() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        x = samples(name, data, count)
        # The compiled input is one sample; [N, ...] stands in front of it, or replaces its batch of 1.
        result = artifact.verify(data={artifact.inputs[0].name: x})
        stored = artifact.bytes
        row = {
            "model": name, "target": target, "variant": variant, "samples": result.samples, "error": result.worst.max_relative_error,
            "same_top1": result.same_top1, "seconds": round(seconds, 1), "peak_mb": peak // 1024, "weights": stored["weights"],
            "code": stored["code"], "bar": bar,
            "generic_share": artifact.report["totals"]["generic_share"],
        }  # fmt: skip
    row["passed"] = row["error"] <= bar and row["same_top1"] == row["samples"]
    return row


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=list(BARS), default=list(BARS))
    parser.add_argument("--models", nargs="+", default=[*BUILDERS, *MODELS])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "SPARSEC_DATA" not in os.environ:
        parser.error("set SPARSEC_DATA to the folder with models and images")
    data = Path(os.environ["SPARSEC_DATA"])
    if options.row:
        print(json.dumps(compile_and_check(*options.row, data)))
        return 0
    rows: list[dict[str, Any]] = []
    console = Console(stderr=True)
    for target in options.targets:
        for name in options.models:
            for variant in options.variants:
                command = [sys.executable, __file__, "--row", name, target, variant]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    rows.append({"model": name, "target": target, "variant": variant, "passed": False})
                    console.print(f"{target} {name} {variant}: {done.stderr.strip().splitlines()[-1]}", markup=False)
                else:
                    rows.append(json.loads(done.stdout.splitlines()[-1]))
                    console.print(json.dumps(rows[-1]), markup=False, soft_wrap=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print_rows(rows)
    return 0 if all(row["passed"] for row in rows) else 1


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table(
        "model", "target", "variant", "error", "top-1 same", "compile s", "peak MB", "weights kB", "code kB", ""
    )
    for row in rows:
        cells = ["-"] * 6
        if "error" in row:
            cells = [
                f"{row['error']:.1e}", f"{row['same_top1']}/{row['samples']}", f"{row['seconds']:.1f}", str(row["peak_mb"]),
                str(row["weights"] // 1000), str(row["code"] // 1000),
            ]  # fmt: skip
        table.add_row(row["model"], row["target"], row["variant"], *cells, "ok" if row["passed"] else "FAILED")
    Console(width=140).print(table)


if __name__ == "__main__":
    sys.exit(main())
