"""What `gpu_check_run.py` compares: items with each other, with the memory's speed, and with PyTorch where it is present.

PyTorch runs in the same process, right after: matmul is cuBLAS, ResNet-50 eager with channels last is cuDNN; medians of
CUDA events around each call.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARMUP = 5


def check_ratios(
    table: Any, plan: dict, ms: dict[str, float], device: dict, folder: Path, with_torch: bool, runs: int
) -> None:
    """Adds a row for each ratio that the plan asks for."""
    torch = _torch() if with_torch else None
    for row in plan["ratios"]:
        name, asked = row["item"], row["asked"]
        if name not in ms:
            continue
        if row["to"] == "memory":
            item = next(item for item in plan["items"] if item["name"] == name)
            manifest = json.loads((folder / item["artifact"] / "manifest.json").read_text(encoding="utf-8"))
            gbps, read = float(device["gbps"]), manifest["weights_bytes"]
            share = read / (gbps * 1e9) / (ms[name] / 1e3) if gbps and ms[name] else None
            table.at_least(f"{name}: share of {gbps:.0f} GB/s", asked, share, why="speed of memory unknown")
        elif row["to"] == "torch":
            value = _torch_ms(torch, row["torch"], runs) if torch is not None else None
            what = f"{name}: to PyTorch {row['torch']['what']}" + (f", {value:.4f} ms" if value else "")
            table.at_least(
                what, asked, value / ms[name] if value and ms[name] else None, why="no PyTorch with CUDA here"
            )
        else:
            other = ms.get(row["to"])
            ratio = other / ms[name] if other and ms[name] else None
            table.at_least(f"{name}: to {row['to']}", asked, ratio)


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def _torch_ms(torch: Any, what: dict, runs: int) -> float:
    with torch.inference_mode():
        call = (_matmul if what["what"] == "matmul" else _resnet50)(torch, **what["options"])
        times = []
        for i in range(-WARMUP, runs):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if i >= 0:
                times.append(begin.elapsed_time(end))
    return statistics.median(times)


def _matmul(torch: Any, m: int, k: int, n: int, dtype: str) -> Callable[[], Any]:
    a = torch.randn(m, k, device="cuda", dtype=getattr(torch, dtype))
    b = torch.randn(k, n, device="cuda", dtype=getattr(torch, dtype))
    return lambda: a @ b


def _resnet50(torch: Any, batch: int, dtype: str) -> Callable[[], Any]:
    """ResNet-50 (arXiv 1512.03385) with stride in the 3x3, as torchvision has it; weights do not matter for time."""
    nn = torch.nn

    def conv(ic: int, oc: int, size: int, stride: int = 1) -> list[Any]:
        return [nn.Conv2d(ic, oc, size, stride, size // 2, bias=False), nn.BatchNorm2d(oc)]

    class Block(nn.Module):
        def __init__(self, ic: int, width: int, stride: int) -> None:
            super().__init__()
            relu = nn.ReLU(inplace=True)
            parts = [*conv(ic, width, 1), relu, *conv(width, width, 3, stride), relu, *conv(width, 4 * width, 1)]
            self.main = nn.Sequential(*parts)
            same = ic == 4 * width and stride == 1
            self.side = nn.Identity() if same else nn.Sequential(*conv(ic, 4 * width, 1, stride))

        def forward(self, x: Any) -> Any:
            return torch.relu_(self.main(x) + self.side(x))

    layers = [*conv(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    ic = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(count):
            layers.append(Block(ic, width, stride if i == 0 else 1))
            ic = 4 * width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)]
    kind = getattr(torch, dtype)
    model = nn.Sequential(*layers).eval().to("cuda", kind, memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 224, 224, device="cuda", dtype=kind).to(memory_format=torch.channels_last)
    return lambda: model(x)
