"""The forms that a layer may take, by name, each as large as a number of weights allows.

    svd, spatial, tucker   low rank                                       `sparsec.passes.low_rank.decompositions`
    sparse                 the layer as it is, with zeros                 `sparsec.passes.low_rank.residual_sparse`
    monarch                block-diagonal, permutation, block-diagonal    `sparsec.passes.low_rank.monarch`
    cospadi                dictionary, then few coefficients an output    `sparsec.passes.low_rank.cospadi`
    armor                  N:M between block-diagonal wrappers            `sparsec.passes.low_rank.armor`

With residual = sparse every low-rank form is also offered with a part of its weights spent on a sparse S beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sparsec.errors import RecipeError
from sparsec.passes.low_rank.armor import armor_forms
from sparsec.passes.low_rank.cospadi import dictionary_forms
from sparsec.passes.low_rank.decompositions import LOW_RANK, Form, Shape, low_rank_forms
from sparsec.passes.low_rank.monarch import monarch_forms
from sparsec.passes.low_rank.residual_sparse import mixed_forms, sparse_forms
from sparsec.passes.pruning.masks import Pattern

FORMS = (*LOW_RANK, "sparse", "monarch", "cospadi", "armor")
SHARES = (
    0.1,
    0.15,
    0.2,
    0.25,
    0.3,
    0.35,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.9,
)  # of a layer's weights, that forms are made for
SLOW_SHARES = (0.2, 0.35, 0.5, 0.65, 0.8)  # for forms that are searched, not solved
SPLITS = (0.15, 0.35, 0.7)  # of the weights, for S
STORED = ((1, 1), (4, 1), (8, 1), (16, 1), (1, 4), (4, 4), (8, 4))  # blocks that kernels read
STORED_INT8 = ((1, 4), (4, 4), (8, 4), (16, 4))


@dataclass(frozen=True)
class Menu:
    """Which forms are offered: names of FORMS, whether with a sparse residual, and the pattern of sparse parts."""

    names: tuple[str, ...] = LOW_RANK
    residual: bool = False
    pattern: Pattern = field(default_factory=Pattern)

    def __post_init__(self) -> None:
        if not self.names or set(self.names) - set(FORMS):
            raise RecipeError(f"factorize: forms must be some of {'+'.join(FORMS)}, got {'+'.join(self.names)!r}")
        if self.residual and not set(self.names) & set(LOW_RANK):
            raise RecipeError(f"factorize: a residual stands beside {', '.join(LOW_RANK)}; name one of them in forms")

    def offer(
        self, shape: Shape, size: int, multiple: int, shares: Sequence[float] = (), only: Sequence[float] = ()
    ) -> list[Form]:
        """Forms of `shape` for SHARES and `shares` (or for those of `only`) of `size` weights, each once; ranks are
        multiples of `multiple`."""
        found: list[Form] = []
        for share in sorted(only or {*SHARES, *shares}):
            found += low_rank_forms(shape, share * size, multiple, self.names)
            found += sparse_forms(shape, share * size, self.pattern) if "sparse" in self.names else []
        for share in sorted(only or {*SLOW_SHARES, *shares}):
            found += self._slow(shape, share * size, multiple)
        return list(dict.fromkeys(found))

    def _slow(self, shape: Shape, budget: float, multiple: int) -> list[Form]:
        found: list[Form] = []
        if self.residual:
            for split in SPLITS:
                low = list(low_rank_forms(shape, (1 - split) * budget, multiple, self.names))
                found += mixed_forms(low, shape, budget, self.pattern)
        found += monarch_forms(shape, budget) if "monarch" in self.names else []
        found += dictionary_forms(shape, budget) if "cospadi" in self.names else []
        found += armor_forms(shape, budget) if "armor" in self.names else []
        return found


def stored_bytes(factor: np.ndarray) -> int:
    """Bytes of the smallest stored form of [OC, IC, KH, KW] in float32: dense, or R x C blocks with an index of 2 bytes
    each and 4 bytes a group of rows."""
    return _smallest(factor, STORED, 4)


def stored_int8_bytes(factor: np.ndarray, depthwise: bool = False) -> int:
    """The same in int8, with the scale of each output; input channels are filled up to whole words of 4, and of a depthwise
    convolution the rows of its kernel."""
    oc, ic, kh, kw = factor.shape
    if depthwise:
        return oc * (kh * -(-kw // 4) * 4 + 4)
    words = np.zeros((oc, -(-ic // 4) * 4, kh, kw), bool)
    words[:, :ic] = factor != 0
    return _smallest(words, STORED_INT8, 1) + 4 * oc


def _smallest(factor: np.ndarray, forms: tuple[tuple[int, int], ...], item: int) -> int:
    matrix = factor.transpose(0, 2, 3, 1).reshape(len(factor), -1) != 0
    best = item * matrix.size
    for rows, columns in forms:
        if factor.shape[1] % columns:
            continue
        groups = np.add.reduceat(matrix, np.arange(0, len(matrix), rows), axis=0) > 0
        blocks = groups.reshape(len(groups), -1, columns).any(axis=2)
        best = min(best, int(blocks.sum()) * (item * rows * columns + 2) + 4 * (len(groups) + 1))
    return best
