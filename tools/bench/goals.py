"""What the figures should reach: each goal is a row; `check` says met, missed, straddled or not measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.turns import Spread

Results = Mapping[str, Any]
Figure = Spread | str  # or why there is none


@dataclass(frozen=True)
class Goal:
    """`bar` is a least value, or a largest one if `at_most`. `unit` is printed behind the numbers."""

    what: str
    bar: float
    read: Callable[[Results], Figure]
    unit: str = "x"
    at_most: bool = False


@dataclass(frozen=True)
class Verdict:
    """A goal with what was measured. A figure straddles if the bar lies between its 10th and 90th percentile."""

    goal: Goal
    figure: Figure

    @property
    def text(self) -> str:
        """met, missed, straddles or the reason why it was not measured."""
        if isinstance(self.figure, str):
            return f"not measured: {self.figure}"
        low, high = self.figure.p10, self.figure.p90
        if low != high and low < self.goal.bar < high:
            return "straddles, median " + ("met" if self._met(self.figure.median) else "missed")
        return "met" if self._met(self.figure.median) else "missed"

    def _met(self, value: float) -> bool:
        return value <= self.goal.bar if self.goal.at_most else value >= self.goal.bar


def _spread(stored: Mapping[str, Any]) -> Spread:
    return Spread(stored["median"], stored["p10"], stored["p90"], stored["rounds"])


def _exact(value: float) -> Spread:
    return Spread(value, value, value, 1)


def _at(results: Results, *path: str) -> Any:
    """The value at `path`, or the reason why there is none, as text."""
    value: Any = results
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return "not run"
        value = value[key]
        if isinstance(value, Mapping) and "missing" in value:
            return str(value["missing"])
    return value


def _speedup(case: str, over: str = "") -> Callable[[Results], Figure]:
    """sparsec's speed-up over ONNX Runtime on the dense model, or over another engine on the same model."""

    def read(results: Results) -> Figure:
        path = ("engines", over, "sparsec_is") if over else ("engines", "sparsec", "speedup")
        found = _at(results, "models", case, *path)
        return found if isinstance(found, str) else _spread(found)

    return read


def _generic(results: Results) -> Figure:
    found = _at(results, "layers")
    if isinstance(found, str):
        return found
    shares = [row["largest_generic_share"] for row in found.values() if "missing" not in row]
    return _exact(100 * max(shares)) if shares else "no model was measured"


def _ideal(shape: str, density: float) -> Callable[[Results], Figure]:
    def read(results: Results) -> Figure:
        points = _at(results, "curves", shape, "blocks", "4x1", "points")
        if isinstance(points, str):
            return points
        found = _spread(next(p["ideal_share"] for p in points if p["density"] == density))
        return Spread(100 * found.median, 100 * found.p10, 100 * found.p90, found.rounds)

    return read


def _break_even(results: Results) -> Figure:
    shapes = _at(results, "curves")
    if isinstance(shapes, str):
        return shapes
    values = [shape["blocks"]["4x1"]["break_even"] for shape in shapes.values() if "missing" not in shape]
    return _exact(min(values)) if values else "no curve was measured"


def _threads(case: str) -> Callable[[Results], Figure]:
    def read(results: Results) -> Figure:
        found = _at(results, "threads", case, "sparsec", "scaling")
        return found if isinstance(found, str) else _spread(found)

    return read


def _instructions(key: str) -> Callable[[Results], Figure]:
    def read(results: Results) -> Figure:
        found = _at(results, "arm", "instructions", key)
        return found if isinstance(found, str) else _exact(found["insns"] / 1e6)

    return read


def _memory(results: Results) -> Figure:
    own = _at(results, "models", "mbv1-80-4x1", "memory", "total")
    theirs = _at(results, "models", "mbv1-80-4x1", "engines", "ort", "growth_bytes")
    if isinstance(own, str) or isinstance(theirs, str) or not theirs:
        return own if isinstance(own, str) else str(theirs or "this system does not report peak memory")
    return _exact(own / theirs)


_LAYER = "1x1 512x512, 14x14"
GOALS: tuple[Goal, ...] = (
    Goal("MobileNetV1 dense over ONNX Runtime", 1.0, _speedup("mbv1-dense")),
    Goal("MobileNetV1 80% 4x1 over ONNX Runtime dense", 2.6, _speedup("mbv1-80-4x1")),
    Goal("MobileNetV1 90% 4x1 over ONNX Runtime dense", 3.3, _speedup("mbv1-90-4x1")),
    Goal("MobileNetV1 80% unstructured over ONNX Runtime dense", 1.9, _speedup("mbv1-80-1x1")),
    Goal("MobileNetV1 80% unstructured over DeepSparse", 1.25, _speedup("mbv1-80-1x1", "deepsparse")),
    Goal("MobileNetV2 dense over ONNX Runtime", 1.0, _speedup("mbv2-dense")),
    Goal("MobileNetV2 70% 4x1 over ONNX Runtime dense", 1.7, _speedup("mbv2-70-4x1")),
    Goal("ResNet-50 dense over ONNX Runtime", 0.95, _speedup("r50-dense")),
    Goal("ResNet-50 80% 4x1 over ONNX Runtime dense", 3.3, _speedup("r50-80-4x1")),
    Goal("ResNet-18 50% 4x1 over ONNX Runtime dense", 1.6, _speedup("r18-50-4x1")),
    Goal("KWT-1 dense over ONNX Runtime", 0.9, _speedup("kwt1-dense")),
    Goal("KWT-1 70% 4x1 over ONNX Runtime dense", 1.5, _speedup("kwt1-70-4x1")),
    Goal("largest share of a generic operator, any model", 5.0, _generic, "%", at_most=True),
    *(
        Goal(f"layer {_LAYER}, {100 - 100 * d:.0f}% 4x1: share of the ideal", 85.0, _ideal(_LAYER, d), "%")
        for d in (0.5, 0.2, 0.1)
    ),
    Goal("break-even density of 4x1, the worst of the shapes", 0.85, _break_even, ""),
    Goal("2 threads over 1, MobileNetV1 dense", 1.75, _threads("mbv1-dense")),
    Goal("2 threads over 1, MobileNetV1 80% 4x1", 1.75, _threads("mbv1-80-4x1")),
    Goal("Arm instructions, MobileNetV1 dense", 190.0, _instructions("mbv1-dense f32"), " M", at_most=True),
    Goal("Arm instructions, MobileNetV1 80% 4x1", 62.0, _instructions("mbv1-80-4x1 f32"), " M", at_most=True),
    Goal("Arm instructions, MobileNetV1 80% unstructured", 80.0, _instructions("mbv1-80-1x1 f32"), " M", at_most=True),
    Goal("Arm instructions, MobileNetV1 dense, float16", 110.0, _instructions("mbv1-dense f16"), " M", at_most=True),
    Goal("Arm instructions, MobileNetV1 80% 4x1, float16", 42.0, _instructions("mbv1-80-4x1 f16"), " M", at_most=True),
    Goal("memory of MobileNetV1 80% 4x1 over ONNX Runtime's", 0.5, _memory, at_most=True),
)


def verdicts(results: Results) -> list[Verdict]:
    """Every goal against these results."""
    return [Verdict(goal, goal.read(results)) for goal in GOALS]
