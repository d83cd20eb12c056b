"""Everything that only a machine with an NVIDIA GPU can show, packed here and run there.

    python tools/gpu_check.py pack DIR [--arch sm_90] [--host x86_64] [--only GLOB,...] [--small]
    python DIR/run.py                    on the GPU's machine: Python and NumPy, no compiler, no network

A pack holds artifacts (MobileNetV2 and SqueezeNet 1.1 on photographs, ResNet-50 of the builder with batches of 1, 8 and 32,
each in float32 and float16; single products: dense, 2:4, blocks, int4 by groups), their inputs, what ONNX Runtime or NumPy
answers, and `run.py`, which prints what was asked beside what it measured. `--only` packs some items, by name: the whole is
about a gigabyte. `--small` packs small ones that take seconds. Real models come from the folder that SPARSEC_DATA names.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_check_kernels as kernels
import numpy as np
import onnx

FILES = ("libmodel.so", "weights.bin", "bench", "parity.bin", "manifest.json", "report.json")
TOLERANCE = {"f32": 1e-4, "f16": 2e-2}  # of the largest reference value
PHOTOGRAPHS = "resize=256,crop=224,scale=255,mean=0.485+0.456+0.406,std=0.229+0.224+0.225"
IMAGES = 20
ROWS = 64  # of a product that are compared
BLOCK_ROWS = (32, 64, 128)  # outputs that are zero together
REAL = {"mobilenetv2": "mobilenetv2_torchvision.onnx", "squeezenet1.1": "squeezenet1.1.onnx"}
Sample = tuple[list[np.ndarray], list[np.ndarray]]  # inputs, expected outputs


@dataclass
class Item:
    """One artifact. `make` gives the model and its samples; `facts` go into the plan as they are."""

    name: str
    precision: str
    make: Callable[[], tuple[onnx.ModelProto, list[Sample]]]
    facts: dict[str, Any] = field(default_factory=dict)


def reference(model: onnx.ModelProto, samples: list[list[np.ndarray]]) -> list[Sample]:
    """The samples with ONNX Runtime's outputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    return [(inputs, session.run(None, dict(zip(names, inputs, strict=True)))) for inputs in samples]


def real(name: str) -> tuple[onnx.ModelProto, list[Sample]]:
    """A model of SPARSEC_DATA on photographs."""
    from sparsec.data import InputSpec, load_data
    from sparsec.images import Images

    folder = Path(os.environ["SPARSEC_DATA"])
    model = onnx.load(folder / "models" / REAL[name])
    port = model.graph.input[0].name
    images = Images.parse(folder / "images/imagenet", PHOTOGRAPHS)
    stream = iter(load_data(images, [InputSpec(port, (1, 3, 224, 224), "float32")]))
    return model, reference(model, [[sample[port]] for sample in itertools.islice(stream, IMAGES)])


def built(builder: str, batch: int) -> tuple[onnx.ModelProto, list[Sample]]:
    """A model of `sparsec.models` with another batch, on noise."""
    from sparsec.models import build

    model = build(builder)
    shapes = [value.type.tensor_type.shape.dim for value in (*model.graph.input, *model.graph.output)]
    for dims in shapes:
        dims[0].dim_value = batch
    del model.graph.value_info[:]
    shape = [dim.dim_value for dim in shapes[0]]
    x = np.random.default_rng(batch).standard_normal(shape).astype(np.float32)
    return model, reference(model, [[x]])


def product(m: int, w: np.ndarray, model: onnx.ModelProto | None = None) -> tuple[onnx.ModelProto, list[Sample]]:
    """x [m, k] times w [k, n], x drawn again where the pack runs."""
    x = np.random.default_rng(m).standard_normal((m, w.shape[0])).astype(np.float16).astype(np.float32)
    return model or kernels.product(m, w), [([], [(x[rows_of(m)] @ w).astype(np.float32)])]


def rows_of(m: int) -> list[int]:
    """Rows of a product with m rows that are compared."""
    return sorted(np.random.default_rng(0).permutation(m)[:ROWS].tolist())


def _product(name: str, m: int, w: Callable[[], np.ndarray], k: int, **facts: Any) -> Item:
    more = {"of": "kernel", "drawn": {"seed": m, "shape": [m, k]}, "rows": rows_of(m), **facts}
    return Item(name, "f16", lambda: product(m, w()), more)


def _integers(name: str, k: int, n: int, zeros: float) -> Item:
    def make() -> tuple[onnx.ModelProto, list[Sample]]:
        model, w = kernels.integers(k, n, zeros)
        return product(1, w, model)

    facts = {"of": "kernel", "drawn": {"seed": 1, "shape": [1, k]}, "rows": rows_of(1), "cold": True}
    return Item(name, "f16", make, facts)


def items(small: bool) -> Iterator[Item]:
    """All that a pack may hold."""
    if small:
        for precision, batch in (("f32", 1), ("f16", 1), ("f32", 2)):
            yield Item(f"demo_{precision}_b{batch}", precision, lambda b=batch: built("demo", b))  # type: ignore[misc]
    else:
        for name, precision in itertools.product(REAL, ("f32", "f16")):
            yield Item(f"{name}_{precision}", precision, lambda n=name: real(n), {"top1": True})  # type: ignore[misc]
        for precision, batch in itertools.product(("f32", "f16"), (1, 8, 32)):
            yield Item(f"resnet50_{precision}_b{batch}", precision, lambda b=batch: built("resnet50", b))  # type: ignore[misc]
    m, k, n = (64, 128, 128) if small else (4096, 4096, 4096)
    yield _product("matmul_dense", m, lambda: kernels.dense(k, n), k)
    yield _product("matmul_2_4", m, lambda: kernels.two_four(kernels.dense(k, n)), k)
    for rows in BLOCK_ROWS:
        yield _product(f"matmul_blocks_{rows}_80", m, lambda r=rows: kernels.blocks(kernels.dense(k, n), r, 0.8), k)  # type: ignore[misc]
    k, n = (256, 192) if small else (4096, 11008)
    yield _integers("matvec_int4_dense", k, n, 0.0)
    yield _integers("matvec_int4_groups_50", k, n, 0.5)


def ratios() -> list[dict[str, Any]]:
    """What is asked of times: `item` is to be `asked` times as fast as `to`, or its ratio is only told (0)."""
    matmul = {"what": "matmul", "options": {"m": 4096, "k": 4096, "n": 4096, "dtype": "float16"}}
    resnet = [
        {"item": f"resnet50_{p}_b{b}", "to": "torch", "asked": asked,
         "torch": {"what": "resnet50", "options": {"batch": b, "dtype": dtype}}}
        for p, b, dtype, asked in (
            ("f16", 32, "float16", 0.5), ("f16", 8, "float16", 0.0), ("f16", 1, "float16", 0.0), ("f32", 32, "float32", 0.0),
            ("f32", 8, "float32", 0.0), ("f32", 1, "float32", 0.0),
        )
    ]  # fmt: skip
    return [
        *resnet,
        {"item": "matmul_dense", "to": "torch", "asked": 0.6, "torch": matmul},
        {"item": "matmul_2_4", "to": "matmul_dense", "asked": 1.25},
        *({"item": f"matmul_blocks_{rows}_80", "to": "matmul_dense", "asked": 2.5} for rows in BLOCK_ROWS),
        {"item": "matvec_int4_groups_50", "to": "matvec_int4_dense", "asked": 1.5},
        {"item": "matvec_int4_groups_50", "to": "memory", "asked": 0.6},
    ]


def wanted(name: str, only: str) -> bool:
    """Whether one of the globs of `only`, commas between, fits."""
    return any(fnmatch.fnmatch(name, glob) for glob in only.split(","))


def pack(folder: Path, arch: str, host: str, only: str, small: bool) -> None:
    """Write the pack into the new `folder`."""
    import sparsec

    (folder / "artifacts").mkdir(parents=True)
    (folder / "data").mkdir()
    plan: dict[str, Any] = {"arch": arch, "host": host, "items": [], "ratios": ratios()}
    for item in items(small):
        if not wanted(item.name, only):
            continue
        model, samples = item.make()
        start = time.monotonic()
        made = sparsec.compile(model, target="cuda", arch=arch, host=host, precision=item.precision)
        seconds = time.monotonic() - start
        target = folder / "artifacts" / f"{item.name}.sparsec"
        target.mkdir()
        for name in FILES:
            shutil.copy2(made.path / name, target / name)
        arrays = {
            f"{side}{port}_{i}": array
            for i, sample in enumerate(samples)
            for side, ports in zip(("in", "out"), sample, strict=True)
            for port, array in enumerate(ports)
        }
        np.savez_compressed(folder / "data" / f"{item.name}.npz", **arrays)
        facts = {"of": "model", **item.facts, "tolerance": TOLERANCE[item.precision], "seconds": round(seconds, 1)}
        place = {"artifact": f"artifacts/{item.name}.sparsec", "samples": f"data/{item.name}.npz"}
        plan["items"].append({"name": item.name, **place, **facts})
        size = sum(file.stat().st_size for file in target.iterdir())
        print(f"{item.name:<28} compiled in {seconds:6.1f} s, {size / 1e6:7.1f} MB", flush=True)
    own = Path(__file__).parent
    shutil.copy(own / "gpu_check_run.py", folder / "run.py")
    shutil.copy(own / "gpu_check_compare.py", folder / "compare.py")
    (folder / "plan.json").write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("verb", choices=["pack"])
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that is not there yet")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--host", default="x86_64", choices=["x86_64", "aarch64"])
    parser.add_argument("--only", default="*", metavar="GLOB,...", help="items by name")
    parser.add_argument("--small", action="store_true", help="small models, for a trial")
    given = parser.parse_args()
    if given.folder.exists():
        parser.error(f"{given.folder} is there already")
    if (
        "SPARSEC_DATA" not in os.environ
        and not given.small
        and any(wanted(f"{n}_{p}", given.only) for n in REAL for p in TOLERANCE)
    ):
        parser.error("SPARSEC_DATA names no folder of models and photographs; pack others with --only")
    pack(given.folder, given.arch, given.host, given.only, given.small)
    return 0


if __name__ == "__main__":
    sys.exit(main())
