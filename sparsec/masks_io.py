"""Masks as a file, for people who retrain in their own code: `.npz`, one boolean array a layer, True where a weight stays.

    export   m = (w != 0)        of every layer whose zeros have a structure worth a name (`lowering.structure`)
    apply    w <- w * m          of the layers the file names; anything that does not fit is refused, all of it at once

A key is the name of the weight's initializer, which exporters take from the framework's own parameter ("conv1.weight"),
so a training loop finds its tensors by it; a node's name is understood too. Shapes are those of the stored tensor. A
file is never unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparsec.errors import DataError, ModelError
from sparsec.npz import read_npz, write_npz
from sparsec.passes.layers import WeightedLayer, weighted_layers

SHOWN = 5  # mistakes named in one message; the rest are counted


@dataclass(frozen=True)
class MaskRow:
    """One layer: `zeros` of `weights` are masked; `changed` weights became zero."""

    layer: str
    weight: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    structure: str
    changed: int = 0


def export_masks(model: ir.Model, every: bool = False) -> tuple[dict[str, np.ndarray], list[MaskRow]]:
    """Masks by initializer name, in the stored shape; `every`: of dense layers too. ModelError if there is none."""
    masks: dict[str, np.ndarray] = {}
    rows = []
    for layer in weighted_layers(model):
        name = str(layer.weight.name)
        if name in masks:
            continue
        row = _row(layer)
        if every or not row.structure.startswith("dense"):
            masks[name] = layer.tensor.numpy() != 0
            rows.append(row)
    if not masks:
        raise ModelError("no layer has zeros with a structure; nothing to export (--all exports dense layers too)")
    return masks, rows


def write_masks(path: Path, masks: Mapping[str, np.ndarray]) -> None:
    """Write masks as an `.npz` of booleans."""
    write_npz(path, {name: np.asarray(mask, bool) for name, mask in masks.items()})


def read_masks(path: str | Path) -> dict[str, np.ndarray]:
    """Masks of an `.npz`: booleans, or numbers that are all 0 or 1. Raises DataError; never unpickles."""
    masks = {}
    wrong = []
    for name, array in read_npz(path).items():
        if array.dtype != bool and (array.dtype.kind not in "iuf" or not np.isin(array, (0, 1)).all()):
            wrong.append(f"{name!r} is {array.dtype}, not all 0 or 1")
        masks[name] = array.astype(bool)
    if wrong or not masks:
        raise DataError(f"expected masks of 0 and 1: {_listing(wrong) or 'the file is empty'}", str(path))
    return masks


def apply_masks(model: ir.Model, masks: Mapping[str, np.ndarray], where: str = "masks") -> list[MaskRow]:
    """Zero in place what the masks exclude. DataError, one line, if a name or shape does not fit; then nothing changed."""
    from sparsec.targets import suggest

    by_weight: dict[str, WeightedLayer] = {}
    by_node: dict[str, WeightedLayer] = {}
    for layer in weighted_layers(model):
        by_weight.setdefault(str(layer.weight.name), layer)
        by_node.setdefault(layer.name, layer)
    chosen: dict[str, tuple[WeightedLayer, np.ndarray]] = {}
    wrong = []
    for name, mask in masks.items():
        found = by_weight.get(name) or by_node.get(name)
        if found is None:
            wrong.append(f"{name!r} is no weight of the model{suggest(name, list(by_weight))}")
            continue
        weight, shape = str(found.weight.name), _dims(found)
        if mask.shape != shape:
            wrong.append(f"{name!r} has shape {list(mask.shape)}, its weight {list(shape)}")
        elif weight in chosen and not np.array_equal(chosen[weight][1], mask):
            wrong.append(f"{name!r} is the same weight as another mask, which differs")
        chosen[weight] = found, mask
    if wrong:
        raise DataError(f"the masks do not fit the model: {_listing(wrong)}", where)
    rows = []
    for layer, mask in chosen.values():
        weight = layer.tensor.numpy()
        changed = int(np.count_nonzero(weight[~mask]))
        if changed:
            kept = np.where(mask, weight, np.zeros((), weight.dtype))
            layer.weight.const_value = ir.Tensor(kept, dtype=layer.tensor.dtype, name=layer.weight.name)
        rows.append(_row(layer, changed))
    return rows


def _row(layer: WeightedLayer, changed: int = 0) -> MaskRow:
    from sparsec.lowering.structure import detect_structure

    found = detect_structure(layer.read())
    zeros = layer.size - found.nonzeros
    return MaskRow(layer.name, str(layer.weight.name), _dims(layer), layer.size, zeros, str(found), changed)


def _dims(layer: WeightedLayer) -> tuple[int, ...]:
    return tuple(int(str(d)) for d in layer.tensor.shape)


def _listing(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more
