"""What a pass is: a frozen dataclass derived from `Pass`, whose fields are its options, and the `Context` it may read.

`pass_registry` beside it knows where passes come from, `pass_specs` makes them of text, `pipeline` runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult

__all__ = ["Context", "Pass", "PassResult", "Samples", "Stacked"]

META_KEY = "sparsec"

Progress = Callable[[str, int, int], None]  # what, done, total
Price = Callable[[Any, np.ndarray], float]  # a `sparsec.passes.layers.WeightedLayer` and its weight; microseconds


class Samples(Protocol):
    """A finite stream of samples, input name -> array of the model's input shape; iterating again starts again."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...


@dataclass(frozen=True)
class Stacked:
    """Samples in arrays [N, ...] by input name, for inputs whose own first dimension is 1."""

    arrays: Mapping[str, np.ndarray] = field(repr=False)

    def __len__(self) -> int:
        return max(len(array) for array in self.arrays.values())

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for i in range(len(self)):
            yield {name: array[i if len(array) > 1 else 0][None] for name, array in self.arrays.items()}


@dataclass
class Context:
    """What a pass may read besides the model, and where it reports; found in `model.meta["sparsec"]`.

    `calibration`: samples that can be iterated again and again, each a dict input name -> array of the input's shape,
    or None (arrays [N, ...] by input name, as given outside the pipeline, are wrapped). `target`: a
    `sparsec.targets.Target`, or None where only ONNX is written. `records`: a pass appends JSON-able dicts that say
    what it did (one a layer); they go into the manifest, so no times and no absolute paths. `original`: ONNX bytes of
    the last model that still computed what the loaded one does: the loaded model after the exact passes before the
    first inexact one; None outside the pipeline. `price`: (layer, weight [OC, IC, KH, KW]) -> microseconds that the
    target's cost model predicts, or None without a target.
    """

    calibration: Samples | None = None
    target: Any = None
    progress: Progress | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    original: bytes | None = field(default=None, repr=False)
    price: Price | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.calibration, Mapping):
            self.calibration = Stacked(self.calibration)

    @staticmethod
    def of(model: ir.Model) -> Context:
        """The model's context; an empty one if the pass runs outside the pipeline."""
        return model.meta.setdefault(META_KEY, Context())

    def tell(self, what: str, done: int, total: int) -> None:
        """Report progress, if anybody listens."""
        if self.progress is not None:
            self.progress(what, done, total)


@dataclass(frozen=True)
class Pass(ir.passes.InPlacePass):
    """A rewrite of an ONNX model in place.

    Derive a frozen dataclass, set `name`, write the one-line summary as first docstring line, and implement
    `call(model) -> PassResult`. `exact` claims that the outputs stay equal up to rounding: the pipeline then compares
    ONNX Runtime before and after.
    """

    name: ClassVar[str] = ""
    exact: ClassVar[bool] = False

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite `model` in place; `PassResult(model, modified)`."""
        raise NotImplementedError(f"{type(self).__name__}.call")
