"""Models to compile without downloading any: well-known networks with seeded weights, and a small trained one."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx

from sparsec.errors import UsageError
from sparsec.models import demo_data
from sparsec.models.demo import demo
from sparsec.models.demo_data import write_data
from sparsec.models.mobilenet import efficientnet_lite0, mobilenet_v1, mobilenet_v2
from sparsec.models.resnet import resnet18, resnet50
from sparsec.models.squeezenet import squeezenet

__all__ = ["BUILDERS", "Builder", "build", "demo_data", "write_data"]

SMALLEST = 32  # resolution; below, pooling would leave no pixel


@dataclass(frozen=True)
class Builder:
    """One model: its function, the first line of that function's docstring, and the input's shape by default."""

    name: str
    function: Callable[..., onnx.ModelProto]
    summary: str
    input_shape: tuple[int, int, int, int]

    @property
    def options(self) -> dict[str, Any]:
        """Option names and defaults."""
        return {key: each.default for key, each in inspect.signature(self.function).parameters.items()}


def _builder(function: Callable[..., onnx.ModelProto], shape: tuple[int, int, int, int] = (1, 3, 224, 224)) -> Builder:
    summary = (inspect.getdoc(function) or "").partition("\n")[0]
    return Builder(function.__name__, function, summary, shape)


BUILDERS: dict[str, Builder] = {
    builder.name: builder
    for builder in (
        _builder(mobilenet_v1),
        _builder(mobilenet_v2),
        _builder(resnet18),
        _builder(resnet50),
        _builder(squeezenet),
        _builder(efficientnet_lite0),
        _builder(demo, (1, demo_data.CHANNELS, demo_data.SIZE, demo_data.SIZE)),
    )
}


def _nearest(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(word, words, 1)
    return f", did you mean {close[0]!r}?" if close else f", expected one of {', '.join(words) or 'none'}"


def build(name: str, **options: Any) -> onnx.ModelProto:
    """The model `name` of `BUILDERS`; `options` as in its function (resolution, width, classes, seed).

    >>> build("mobilenet_v1", resolution=96, width=0.25).graph.output[0].name
    'logits'
    """
    if name not in BUILDERS:
        raise UsageError(f"unknown model {name!r}{_nearest(name, list(BUILDERS))}", where="models")
    builder = BUILDERS[name]
    for key in options:
        if key not in builder.options:
            raise UsageError(f"unknown option {key!r}{_nearest(key, list(builder.options))}", where=f"model {name}")
    for key, least in (("resolution", SMALLEST), ("classes", 1), ("seed", 0)):
        value = options.get(key, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"option {key}: expected an integer >= {least}, got {value!r}", where=f"model {name}")
    width = options.get("width", 1.0)
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0.0 < width <= 8.0:
        raise UsageError(f"option width: expected a factor in (0, 8], got {width!r}", where=f"model {name}")
    return builder.function(**options)
