"""Quantize to int8: weights symmetric per output channel, activations per tensor, as standard QDQ ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from sparsec.errors import RecipeError
from sparsec.passes.fold_constants import remove_unused_initializers
from sparsec.passes.layers import WEIGHTED
from sparsec.passes.quant_graph import insert, plan, store_weight
from sparsec.passes.quant_ranges import PERCENTILE, Observer, observe, ranges
from sparsec.passes_api import Context, Pass, PassResult


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantize weights and activations to int8 with calibration data (standard QDQ)."""

    name: ClassVar[str] = "quantize"

    observer: Observer = "mse"
    percentile: float = PERCENTILE
    activations: Literal["uint8", "int8"] = "uint8"
    outputs: Literal["float", "int8"] = "float"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    types: tuple[str, ...] = WEIGHTED

    def call(self, model: ir.Model) -> PassResult:
        context = Context.of(model)
        if context.calibration is None:
            raise RecipeError("quantize: int8 activations need --calibration")
        chosen = plan(model, self.include, self.exclude, self.types, self.outputs == "int8")
        found = ranges(observe(model, chosen, context.calibration), self.observer, self.activations, self.percentile)
        scales = {v: found[values[0]].scale for values in chosen.classes for v in values}
        insert(model, chosen, found)
        for step in chosen.layers:
            w = step.layer.read()
            s = np.maximum(np.abs(w).reshape(len(w), -1).max(axis=1) / 127, 1e-12).astype(np.float32)
            q = np.clip(np.rint(w / s[:, None, None, None]), -127, 127).astype(np.int8)
            store_weight(model, step, q, s, scales[step.inputs[0]])
        remove_unused_initializers(model.graph)
        return PassResult(model, True)
