"""The two plots, as SVG: speed-up of every engine on every model, and time against density."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.engines import ENGINES
from bench.models import CASES, Missing

COLORS = {"1x1": "#d62728", "2x1": "#ff7f0e", "4x1": "#1f77b4", "8x1": "#2ca02c"}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise Missing("plots need matplotlib: pip install 'sparsec[bench]'") from error
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sparsec"  # the same file for the same figures
    import matplotlib.pyplot as plt

    return plt


def plot_models(models: Mapping[str, Any], path: Path) -> None:
    """Bars: speed-up over ONNX Runtime on the dense model, with the spread over rounds. Raises Missing."""
    plt = _pyplot()
    cases = [case for case in CASES if "engines" in models.get(case.name, {})]
    figure, axes = plt.subplots(figsize=(max(6.0, 1.6 * len(cases) + 2), 5))
    width = 0.85 / len(ENGINES)
    for i, engine in enumerate(ENGINES):
        at, heights, lows, highs = [], [], [], []
        for k, case in enumerate(cases):
            speed = models[case.name]["engines"].get(engine.name, {}).get("speedup")
            if speed:
                at.append(k + (i - len(ENGINES) / 2 + 0.5) * width)
                heights.append(speed["median"])
                lows.append(speed["median"] - speed["p10"])
                highs.append(speed["p90"] - speed["median"])
        style = {"hatch": "///", "alpha": 0.5} if engine.name == "openvino-default" else {}
        label = f"{engine.title} (not float32)" if engine.name == "openvino-default" else engine.title
        color = f"C{i - 1}" if i else "black"
        if at:
            axes.bar(at, heights, width, yerr=[lows, highs], label=label, color=color, error_kw={"lw": 0.7}, **style)
    axes.axhline(1.0, color="gray", lw=0.8)
    axes.set_xticks(range(len(cases)), [f"{case.title}\n{case.state}" for case in cases], fontsize=7)
    axes.set_ylabel("times as fast as ONNX Runtime on the dense model")
    axes.set_title("One thread, engines in turns; bars: median, lines: 10th to 90th percentile", fontsize=9)
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def plot_curves(curves: Mapping[str, Any], path: Path) -> None:
    """Time against density, measured (marks) and predicted (dashes), dense kernels as lines. Raises Missing."""
    plt = _pyplot()
    figure, panels = plt.subplots(1, len(curves), figsize=(5 * len(curves), 4.2), squeeze=False)
    for axes, (shape, found) in zip(panels[0], curves.items(), strict=True):
        for block, facts in found["blocks"].items():
            density = [p["density"] for p in facts["points"]]
            median = [p["us"]["median"] for p in facts["points"]]
            low = [m - p["us"]["p10"] for m, p in zip(median, facts["points"], strict=True)]
            high = [p["us"]["p90"] - m for m, p in zip(median, facts["points"], strict=True)]
            label = f"{block}, break-even {facts['break_even']:.2f}"
            axes.errorbar(density, median, yerr=[low, high], marker="o", ms=3, lw=1, color=COLORS[block], label=label)
            axes.plot(density, [p["predicted_us"] for p in facts["points"]], "--", lw=0.8, color=COLORS[block])
        dense, ort = found["dense"]["us"]["median"], found["ort"]["us"]["median"]
        axes.axhline(dense, color="black", lw=1, label="our dense kernel")
        axes.axhline(found["dense"]["predicted_us"], color="black", lw=0.8, ls="--")
        axes.axhline(ort, color="gray", lw=1, ls=":", label="ONNX Runtime dense")
        axes.set(title=shape, xlabel="density (stored blocks)", ylabel="microseconds", xlim=(0, 1.02))
        axes.set_ylim(0, 1.6 * max(dense, ort))
        axes.legend(fontsize=7)
    figure.suptitle("Time against density: measured (marks) and predicted (dashes)", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
