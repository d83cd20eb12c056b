"""Layers with constant weights, and one geometry for all of them.

Every weight is seen as W[OC, IC, KH, KW] with y[oc] = sum over ic, kh, kw of W[oc, ic, kh, kw] * x[ic, ...]:

    Conv     [OC, IC/groups, K...]      as stored (1-D: KH = 1; 3-D: the first two kernel axes are one)
    Gemm     B [N, K] with transB=1     [N, K, 1, 1]; without: B.T
    MatMul   x @ B, B [K, N]            [N, K, 1, 1] = B.T;  A @ x with constant A [M, K]: [M, K, 1, 1]

A block RxC is R consecutive output channels x C consecutive input channels at one kernel position; a ragged last block
is smaller.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from sparsec.errors import RecipeError

WEIGHTED = ("Conv", "Gemm", "MatMul")
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class WeightedLayer:
    """A node with a constant float weight. `oc`, `ic`: channels of the canonical view (ic: within one group)."""

    node: ir.Node = field(repr=False)
    op: str  # Conv, Gemm, MatMul
    input_index: int  # which input of the node is the weight
    transposed: bool  # the stored matrix is [IC, OC]
    groups: int = 1

    @property
    def name(self) -> str:
        """The node's name."""
        return self.node.name or ""

    @property
    def weight(self) -> ir.Value:
        """The initializer."""
        value = self.node.inputs[self.input_index]
        assert value is not None
        return value

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The initializer's tensor, as stored."""
        tensor = self.weight.const_value
        assert tensor is not None
        return tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """OC, IC, KH, KW."""
        dims = _dims(self.tensor)
        if self.op == "Conv":
            oc, ic, *kernel = dims
            return oc, ic, int(np.prod(kernel[:-1], dtype=np.int64)), kernel[-1]
        rows, columns = dims[-2:]
        return (columns, rows, 1, 1) if self.transposed else (rows, columns, 1, 1)

    @property
    def size(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def depthwise(self) -> bool:
        """A grouped convolution with one input channel a group."""
        return self.op == "Conv" and self.groups > 1 and self.shape[1] == 1

    @property
    def orientation(self) -> tuple[object, ...]:
        """Two layers that read one initializer the same way have equal orientations."""
        return self.op == "Conv", self.transposed, self.groups, self.shape

    def read(self) -> np.ndarray:
        """The weight as [OC, IC, KH, KW]; may be a view, do not write to it."""
        array = self.tensor.numpy()
        if self.op == "Conv":
            return array.reshape(self.shape)
        matrix = array.reshape(array.shape[-2:])
        return (matrix.T if self.transposed else matrix).reshape(self.shape)

    def stored(self, oihw: np.ndarray) -> np.ndarray:
        """[OC, IC, KH, KW] in the initializer's own form and type."""
        matrix = oihw if self.op == "Conv" else oihw.reshape(self.shape[:2])
        stored = (matrix.T if self.transposed else matrix).reshape(_dims(self.tensor))
        return np.asarray(stored, order="C").astype(self.tensor.dtype.numpy(), copy=False)

    def write(self, oihw: np.ndarray) -> None:
        """Store [OC, IC, KH, KW] back in the node's own form, for every reader of the initializer."""
        dtype = self.tensor.dtype
        self.weight.const_value = ir.Tensor(self.stored(oihw), dtype=dtype, name=self.weight.name)


def readers(layer: WeightedLayer) -> tuple[WeightedLayer, ...]:
    """The layers that read the weight of `layer` the way it does, itself among them: the steps of a recurrence, say."""
    found = [as_layer(use.node) for use in layer.weight.uses()]
    return tuple(
        other
        for other in found
        if isinstance(other, WeightedLayer)
        and other.weight is layer.weight
        and (other.op, other.orientation) == (layer.op, layer.orientation)
    )


def _dims(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(int(str(d)) for d in tensor.shape)


def weighted_layers(model: ir.Model) -> Iterator[WeightedLayer]:
    """Every Conv, Gemm and MatMul of the graph with a constant float weight, in graph order."""
    for node in model.graph:
        layer = as_layer(node)
        if isinstance(layer, WeightedLayer):
            yield layer


def as_layer(node: ir.Node) -> WeightedLayer | str:
    """The node as a layer, or the reason why it is none."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in WEIGHTED:
        return f"{node.op_type} has no weight"
    if node.op_type == "Conv":
        dims = _weight_dims(node.inputs[1])
        if dims is None:
            return "its weight is not a constant float tensor"
        if len(dims) < 3:
            return "its kernel has no spatial axis"
        return WeightedLayer(node, "Conv", 1, transposed=False, groups=node.attributes.get_int("group", 1))
    if node.op_type == "Gemm":
        if _weight_dims(node.inputs[1]) is None:
            return "its B is not a constant float tensor"
        return WeightedLayer(node, "Gemm", 1, transposed=not node.attributes.get_int("transB", 0))
    for index, transposed in ((1, True), (0, False)):
        dims = _weight_dims(node.inputs[index])
        if dims is not None:
            if len(dims) < 2 or any(d != 1 for d in dims[:-2]):
                return f"its constant operand has shape {list(dims)}, expected one matrix"
            return WeightedLayer(node, "MatMul", index, transposed=transposed)
    return "neither operand is a constant float matrix"


def _weight_dims(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a constant float weight, None for anything else."""
    if value is None or value.const_value is None or value.is_graph_input() or value.const_value.dtype not in FLOATS:
        return None
    dims = _dims(value.const_value)
    return None if 0 in dims else dims


@dataclass(frozen=True)
class Selection:
    """`layers` were chosen; `refused` are (layer name, reason) of the others."""

    layers: tuple[WeightedLayer, ...]
    refused: tuple[tuple[str, str], ...]

    def require(self) -> None:
        """RecipeError if nothing was chosen: `0 of 53 layers matched: ...` with the reasons, most frequent first."""
        if self.layers:
            return
        if not self.refused:
            raise RecipeError("0 of 0 layers matched: the model has no Conv, Gemm or MatMul with a constant weight")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.refused:
            reasons.setdefault(reason, []).append(name)
        parts = []
        for reason, names in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0])):
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            parts.append(f"{len(names)} {reason} ({shown})")
        raise RecipeError(f"0 of {len(self.refused)} layers matched: {'; '.join(parts)}")


def select_layers(
    model: ir.Model,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    types: Sequence[str] = WEIGHTED,
) -> Selection:
    """The layers that a pass on weights works on.

    By default: Conv with groups 1, Gemm and MatMul, except the first convolution and the last weighted layer. `include`
    and `exclude` are globs over node names; a layer that `include` names is taken even if it is the first or last.
    An initializer with several readers counts once, and only if every reader is chosen and sees it the same way.
    """
    layers = list(weighted_layers(model))
    first = next((layer for layer in layers if layer.op == "Conv"), None)
    last = layers[-1] if layers else None
    reasons: dict[str, str] = {}
    chosen: list[WeightedLayer] = []
    for layer in layers:
        reason = _refusal(layer, layer is first, layer is last, include, exclude, types)
        if reason:
            reasons[layer.name] = reason
        else:
            chosen.append(layer)
    picked: list[WeightedLayer] = []
    seen: set[ir.Value] = set()
    nodes = {layer.node: layer for layer in chosen}
    for layer in chosen:
        if layer.weight in seen:
            continue
        for user, index in layer.weight.uses():
            other = nodes.get(user)
            if other is None or other.input_index != index or other.orientation != layer.orientation:
                reasons[layer.name] = "share their weight with a node that is not matched or reads it differently"
                break
        else:
            seen.add(layer.weight)
            picked.append(layer)
    order = [(layer.name, reasons[layer.name]) for layer in layers if layer.name in reasons]
    return Selection(tuple(picked), tuple(order))


def _refusal(
    layer: WeightedLayer, first: bool, last: bool, include: Sequence[str], exclude: Sequence[str], types: Sequence[str]
) -> str:
    if layer.op not in types:
        return f"have another type than {'+'.join(types)}"
    if any(fnmatch.fnmatchcase(layer.name, glob) for glob in exclude):
        return f"are excluded by {'+'.join(exclude)}"
    if include and not any(fnmatch.fnmatchcase(layer.name, glob) for glob in include):
        return f"are not named by include={'+'.join(include)}"
    if layer.groups != 1:
        return "are depthwise or grouped convolutions"
    if first and not include:
        return "is the first convolution (include=NAME takes it)"
    if last and not include:
        return "is the last weighted layer (include=NAME takes it)"
    return ""


def parse_block(text: str) -> tuple[int, int]:
    """`RxC` as (R, C): output channels x input channels. Raises ValueError.

    >>> parse_block("4x1")
    (4, 1)
    """
    rows, _, columns = text.partition("x")
    r, c = int(rows), int(columns)
    if r < 1 or c < 1:
        raise ValueError(text)
    return r, c


def block_sums(oihw: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Sums over the blocks, shape [ceil(OC/rows), ceil(IC/columns), KH, KW]; a ragged last block sums what there is."""
    summed = np.add.reduceat(oihw, np.arange(0, oihw.shape[0], rows), axis=0)
    return np.add.reduceat(summed, np.arange(0, oihw.shape[1], columns), axis=1)


def spread_blocks(blocks: np.ndarray, rows: int, columns: int, shape: Sequence[int]) -> np.ndarray:
    """One value a block to one value a weight: the transpose of `block_sums`, cut to `shape` [OC, IC, KH, KW]."""
    return np.repeat(np.repeat(blocks, rows, axis=0), columns, axis=1)[: shape[0], : shape[1]]
