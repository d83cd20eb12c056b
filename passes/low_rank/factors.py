"""A layer as a sum of chains of smaller layers, and the standard nodes that compute it.

    W[OC, IC, KH, KW]  ~  sum over chains c of  F_cn o ... o F_c2 o F_c1          F_c1 is applied first

Factors are seen as weights are in `sparsec.passes.layers`: F[OC', IC', KH', KW']. Of the factors of a chain at most one
is wider than 1 along each kernel axis, so two of them compose to

    (G o F)[o, i, a + b, c + d] = sum over r of G[o, r, b, d] F[r, i, a, c]           a = 0 or b = 0,  c = 0 or d = 0

Each factor becomes a node of the layer's own kind: Conv, Gemm or MatMul. Stride, padding and dilation of an axis go to
the factor that is wide along it (to the first, if none is), which leaves every sum over zeros of the padding as it was,
because only the last node has a bias. Several chains are added; the first of them carries the bias. The last node writes
the value that the layer wrote, so nothing else in the graph changes. Nodes that read one weight the same way (the steps of
a recurrence) become chains that read the same factors. A factor may hold zeros: permutations and diagonal blocks are zeros
of a weight like others, which the lowering reads off it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
import onnx_ir as ir

from sparsec.passes.initializers import add_initializer, free_name
from sparsec.passes.layers import WeightedLayer, as_layer, readers
from sparsec.passes.measure.statistics import input_of

Constant = Callable[[str, np.ndarray], ir.Value]  # name, array -> a value that holds it


@dataclass(frozen=True)
class Factors:
    """Chains of (suffix of the node's name, factor [OC', IC', KH', KW']), first applied first."""

    kind: str  # what the report calls it: "svd 16", "tucker 8+12", "svd 8 + 1x1 30%"
    chains: tuple[tuple[tuple[str, np.ndarray], ...], ...] = field(repr=False)

    @property
    def parameters(self) -> int:
        """Nonzero weights."""
        return sum(int(np.count_nonzero(f)) for chain in self.chains for _, f in chain)

    def dense(self) -> np.ndarray:
        """What the chains compute, as one weight [OC, IC, KH, KW]."""
        return sum(reduce(compose, (f for _, f in chain)) for chain in self.chains)  # type: ignore[return-value]

    def scaled(self, rows: np.ndarray) -> Factors:
        """With every output channel times its number of `rows` [OC]."""
        chains = [(*c[:-1], (c[-1][0], c[-1][1] * rows[:, None, None, None])) for c in self.chains]
        return Factors(self.kind, tuple(chains))

    def rounded(self, dtype: np.dtype) -> Factors:
        """With factors of the type that they are stored in."""
        return Factors(self.kind, tuple(tuple((s, f.astype(dtype)) for s, f in c) for c in self.chains))


def compose(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The weight that applies `first` [R, IC, KH, KW], then `second` [OC, R, KH', KW']."""
    (_, i, a, c), (o, _, b, d) = first.shape, second.shape
    assert (a == 1 or b == 1) and (c == 1 or d == 1), (first.shape, second.shape)
    return np.einsum("orbd,riac->oiabcd", second, first, optimize=True).reshape(o, i, a * b, c * d)


def refusal(layer: WeightedLayer) -> str:
    """Why a layer, and all that read its weight, cannot become chains, "" if they can."""
    if layer.groups != 1:
        return "are depthwise or grouped convolutions"
    alike = readers(layer)
    if len(alike) != len(layer.weight.uses()):
        return "share their weight with a node that reads it differently"
    return next((reason for reader in alike if (reason := _refusal(reader))), "")


def _refusal(layer: WeightedLayer) -> str:
    node = layer.node
    if input_of(layer).const_value is not None:
        return "multiply a constant"
    if layer.op == "Conv" and len(layer.tensor.shape) > 4:
        return "are 3-D convolutions"
    attributes = node.attributes
    if layer.op == "Gemm" and (
        attributes.get_int("transA", 0)
        or attributes.get_float("alpha", 1.0) != 1
        or attributes.get_float("beta", 1.0) != 1
    ):
        return "have an alpha, a beta or a transposed left side"
    if not all(_static(v) for v in (input_of(layer), node.outputs[0])):
        return "have inputs or outputs of unknown shape"
    return ""


def _static(value: ir.Value) -> bool:
    return value.shape is not None and value.shape.is_static()


# ---- nodes


def replace(model: ir.Model, layer: WeightedLayer, factors: Factors) -> list[ir.Node]:
    """Put `factors` in the place of `layer` and of all that read its weight, a bias behind the last; the new nodes in order.
    Chains of one weight read the same factors."""
    graph, old = model.graph, layer.weight
    made: dict[str, ir.Value] = {}
    taken = {n.name for n in graph}
    nodes: list[ir.Node] = []
    for reader in readers(layer):
        stem = f"{reader.name}/"

        def constant(name: str, array: np.ndarray, stem: str = stem) -> ir.Value:
            part = name.removeprefix(stem)
            if part not in made:
                made[part] = add_initializer(graph, name, array)
            return made[part]

        nodes += _put(graph, reader, factors, constant, taken)
    if not old.uses() and old.name in graph.initializers:
        del graph.initializers[old.name]
    return nodes


def _put(
    graph: ir.Graph, layer: WeightedLayer, factors: Factors, constant: Constant, taken: set[str | None]
) -> list[ir.Node]:
    """The nodes of `factors` in the place of the layer's own. `taken`: names of nodes."""
    node = layer.node
    own = node.inputs[2] if layer.op != "MatMul" and len(node.inputs) > 2 else None
    y = node.outputs[0]
    nodes = _nodes(layer, factors, input_of(layer), own, constant)
    for made in nodes:
        name, count = made.name, 0
        while made.name in taken:
            count += 1
            made.name = f"{name}_{count}"
        taken.add(made.name)
        for value in made.outputs:
            value.name = free_name(graph, str(value.name))
        graph.insert_before(node, made)
    last, name = nodes[-1].outputs[0], y.name
    for user, index in list(y.uses()):
        user.replace_input_with(index, last)
    for index, output in enumerate(graph.outputs):
        if output is y:
            graph.outputs[index] = last
    graph.remove(node, safe=True)
    y.name, last.name = None, name
    return nodes


def layers_of(layer: WeightedLayer, factors: Factors) -> Iterator[WeightedLayer]:
    """The parts as layers that stand in no graph, to be priced. The Adds between chains are not among them."""
    given = input_of(layer)
    x = ir.Value(name="x", shape=given.shape, type=given.type)
    for node in _nodes(layer, factors, x, None, _loose):
        found = as_layer(node)
        if isinstance(found, WeightedLayer):
            yield found


def _loose(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def _nodes(
    layer: WeightedLayer, factors: Factors, x: ir.Value, bias: ir.Value | None, constant: Constant
) -> list[ir.Node]:
    """The nodes in order; the last one's output is the layer's."""
    nodes: list[ir.Node] = []
    sums: list[ir.Value] = []
    y = layer.node.outputs[0]
    for number, chain in enumerate(factors.chains):
        value, wide = x, _wide([f for _, f in chain])
        for place, (suffix, factor) in enumerate(chain):
            last = place == len(chain) - 1
            name = f"{layer.name}/{suffix}"
            weight = constant(f"{name}/weight", _stored(layer, factor))
            given = bias if last and number == 0 else None
            shape = _shape(layer, value, factor, [place == w for w in wide])
            made = ir.Value(name=name, shape=ir.Shape(shape), type=y.type)
            if layer.op == "MatMul":
                inputs = [value, weight] if layer.input_index == 1 else [weight, value]
            else:
                inputs = [value, weight] if given is None else [value, weight, given]
            attributes = _attributes(layer, factor, [place == w for w in wide])
            nodes.append(ir.Node("", layer.op, inputs, attributes, outputs=[made], name=name))
            value = made
        sums.append(value)
    total = sums[0]
    for number, other in enumerate(sums[1:], 1):
        name = f"{layer.name}/sum" if number == 1 else f"{layer.name}/sum{number}"
        made = ir.Value(name=name, shape=y.shape, type=y.type)
        nodes.append(ir.Node("", "Add", [total, other], outputs=[made], name=name))
        total = made
    return nodes


def _wide(factors: Sequence[np.ndarray]) -> tuple[int, int]:
    """Which factor of a chain is wide along each kernel axis; the first if none is."""
    first, second = (next((i for i, f in enumerate(factors) if f.shape[axis] > 1), 0) for axis in (2, 3))
    return first, second


def _stored(layer: WeightedLayer, factor: np.ndarray) -> np.ndarray:
    dims = [int(str(d)) for d in layer.tensor.shape]
    if layer.op == "Conv":
        return np.ascontiguousarray(factor.reshape(*factor.shape[:2], *factor.shape[2:][-(len(dims) - 2) :]))
    matrix = factor.reshape(factor.shape[:2])
    matrix = matrix.T if layer.transposed else matrix
    return np.ascontiguousarray(matrix.reshape(*dims[:-2], *matrix.shape))


def _attributes(layer: WeightedLayer, factor: np.ndarray, mine: Sequence[bool]) -> list[ir.Attr]:
    given = layer.node.attributes
    if layer.op == "MatMul":
        return []
    if layer.op == "Gemm":
        return [ir.AttrInt64("transB", 0 if layer.transposed else 1)]
    dims = len(layer.tensor.shape) - 2
    mine, kernel = list(mine)[-dims:], list(factor.shape[2:])[-dims:]

    def pick(name: str, default: int) -> list[int]:
        values = list(given.get_ints(name, [default] * dims))
        return [v if own else default for v, own in zip(values, mine, strict=True)]

    pads = list(given.get_ints("pads", [0] * 2 * dims))
    return [
        ir.AttrInt64s("kernel_shape", kernel),
        ir.AttrInt64s("strides", pick("strides", 1)),
        ir.AttrInt64s("dilations", pick("dilations", 1)),
        ir.AttrInt64s("pads", [p if mine[i % dims] else 0 for i, p in enumerate(pads)]),
    ]


def _shape(layer: WeightedLayer, x: ir.Value, factor: np.ndarray, mine: Sequence[bool]) -> list[int]:
    """The shape of what a factor gives; along an axis that it owns it is the layer's."""
    source = [int(str(d)) for d in x.shape]  # type: ignore[union-attr]
    final = [int(str(d)) for d in layer.node.outputs[0].shape]  # type: ignore[union-attr]
    if layer.op == "Conv":
        dims = len(source) - 2
        sizes = [f if own else s for s, f, own in zip(source[2:], final[2:], list(mine)[-dims:], strict=True)]
        return [source[0], factor.shape[0], *sizes]
    shape = list(final)
    shape[-2 if layer.input_index == 0 else -1] = factor.shape[0]
    return shape
