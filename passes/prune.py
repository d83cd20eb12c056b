"""Prune weights by magnitude: unstructured, in RxC blocks, or N of M along the input axis.

A block b of a layer's weight W[OC, IC, KH, KW] holds |b| weights (a ragged last block holds fewer); its importance is

    s(b) = (1/|b|) * sum over w in b of w^2

Blocks are zeroed in ascending order of s (ties: graph order, then row-major order) until zeros are the asked share of
all weights, those counted that were zero before:

    layer    zeros(W) = sparsity * |W| in every matched layer, what rounding to a block left carried to the next layer
    global   over all matched layers together, each keeping at least `floor` of its blocks, the most important ones
    N:M      of M consecutive weights along IC at one kernel position the N largest |w| stay (a ragged rest keeps <= N)

The total misses sparsity * sum |W| by at most half a block, unless there were more zeros before. Pruning what is
already pruned changes nothing, because zero blocks come first and add no zero. Where enough zeros were there before but
scattered over the blocks, the pass refuses. Never changed: shapes, biases, layers that do not match.

Magnitude pruning: Han et al. 2015, arXiv:1506.02626. Blocks: Gray et al. 2017, "GPU kernels for block-sparse weights".
N:M: Mishra et al. 2021, arXiv:2104.08378. Layer collapse: Tanaka et al. 2020, arXiv:2006.05467.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from sparsec.errors import RecipeError
from sparsec.passes.layers import WEIGHTED, WeightedLayer, block_sums, parse_block, select_layers, spread_blocks
from sparsec.passes.masks import Pattern, draw_masks, draw_masks_globally, magnitude
from sparsec.passes_api import Context, Pass, PassResult

DEFAULT_SPARSITY = 0.5
SCATTERED = 0.75  # zeros count as scattered if blocks of zeros are less than this part of the share asked for


@dataclass(frozen=True)
class Prune(Pass):
    """Zero the least important weights, by magnitude: unstructured, RxC blocks or N:M.

    `sparsity`: zero share over the matched layers together. `block`: output x input channels. `nm`: N:M
    instead of `sparsity` and `block`. `floor`: share of its blocks that each layer keeps under scope=global.
    `include`, `exclude`: globs over node names. `types`: operators considered.
    """

    name: ClassVar[str] = "prune"

    sparsity: float = DEFAULT_SPARSITY
    block: str = "1x1"
    nm: str = ""
    scope: Literal["layer", "global"] = "layer"
    floor: float = 0.05
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    types: tuple[str, ...] = WEIGHTED

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise RecipeError(f"prune: sparsity is a share from 0 to 1, got {self.sparsity}")
        if not 0 <= self.floor <= 1:
            raise RecipeError(f"prune: floor is a share from 0 to 1, got {self.floor}")
        if self.scope not in ("layer", "global"):
            raise RecipeError(f"prune: scope must be layer or global, got {self.scope!r}")
        Pattern.parse(self.block, self.nm)
        if self.nm:
            if self.block != "1x1" or self.sparsity != DEFAULT_SPARSITY:
                raise RecipeError("prune: nm fixes the pattern and the share; give it without block and sparsity")
        unknown = [t for t in self.types if t not in WEIGHTED]
        if unknown or not self.types:
            raise RecipeError(f"prune: types must be some of {'+'.join(WEIGHTED)}, got {'+'.join(self.types)!r}")

    def call(self, model: ir.Model) -> PassResult:
        selection = select_layers(model, self.include, self.exclude, self.types)
        selection.require()
        layers = selection.layers
        pattern = Pattern.parse(self.block, self.nm)
        weights = [layer.read() for layer in layers]
        scores = [magnitude(w) for w in weights]
        if self.scope == "global" and not self.nm:
            masks = draw_masks_globally(weights, scores, pattern, self.sparsity, self.floor)
        else:
            masks = draw_masks(weights, scores, pattern, self.sparsity)
        if not self.nm:
            self._refuse_scattered(layers, masks)
        context = Context.of(model)
        modified = False
        for index, (layer, mask) in enumerate(zip(layers, masks, strict=True)):
            modified |= _apply(layer, mask, context)
            context.tell(f"prune {layer.name}", index + 1, len(layers))
        return PassResult(model, modified)

    def _refuse_scattered(self, layers: Sequence[WeightedLayer], masks: Sequence[np.ndarray]) -> None:
        """RecipeError if the zeros asked for exist already, but not in blocks: nothing would change, silently."""
        weights = [layer.read() for layer in layers]
        if any(np.any(w[~mask] != 0) for w, mask in zip(weights, masks, strict=True)):
            return
        rows, columns = parse_block(self.block)
        total = sum(w.size for w in weights)
        zeros = sum(w.size - int(np.count_nonzero(w)) for w in weights) / total
        filled = 0
        for w in weights:
            dead = block_sums((w != 0).astype(np.int64), rows, columns) == 0
            filled += int(spread_blocks(dead, rows, columns, w.shape).sum())
        if zeros >= self.sparsity and filled / total < SCATTERED * self.sparsity:
            text = f"the matched layers are {zeros:.3f} zero already, but {self.block} blocks hold only"
            raise RecipeError(f"{text} {filled / total:.3f} of the weights; ask for a sparsity above {zeros:.3f}")


def _apply(layer: WeightedLayer, mask: np.ndarray, context: Context) -> bool:
    weight = layer.read()
    changed = bool(np.any(weight[~mask] != 0))
    if changed:
        layer.write(np.where(mask, weight, np.zeros((), weight.dtype)))
    zeros = layer.size - int(np.count_nonzero(layer.read()))
    context.records.append({"layer": layer.name, "weights": layer.size, "zeros": zeros, "changed": changed})
    return changed
