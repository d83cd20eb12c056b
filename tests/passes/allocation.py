"""A small residual network with two outputs to prune, samples for it, and magnitude pruning of one layer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparsec.passes.layers import WeightedLayer, select_layers
from sparsec.passes.normalization.fold_constants import FoldConstants
from tests.passes.conftest import parse

NET = """g (float[1,3,6,6] x) => (float[1,5] y, float[1,4,6,6] side) {
    a = Conv(x, first)
    r = Relu(a)
    side = Conv(r, aside)
    b = Conv<pads = [1, 1, 1, 1]>(r, middle, bias)
    s = Add(b, r)
    c = Conv(s, point)
    t = Relu(c)
    p = GlobalAveragePool(t)
    f = Flatten(p)
    h = Gemm(f, hidden)
    y = MatMul(h, last)
}"""
NAMES = ("Conv_2", "Conv_3", "Conv_5", "Gemm_9")


def network(seed: int = 0) -> ir.Model:
    rng = np.random.default_rng(seed)

    def drawn(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    weights = {
        "first": drawn(8, 3, 1, 1), "aside": drawn(4, 8, 1, 1), "middle": drawn(8, 8, 3, 3) / 6, "bias": drawn(8),
        "point": drawn(12, 8, 1, 1), "hidden": drawn(12, 16), "last": drawn(16, 5),
    }  # fmt: skip
    made = parse(NET, weights)
    FoldConstants()(made)
    return made


def chosen(made: ir.Model) -> list[WeightedLayer]:
    return list(select_layers(made).layers)


def data(count: int = 10, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((1, 3, 6, 6)).astype(np.float32)} for _ in range(count)]


def by_magnitude(layer: WeightedLayer, sparsity: float) -> np.ndarray:
    """The smallest weights of the layer zero."""
    weight = layer.read()
    pruned = weight.reshape(-1).copy()
    pruned[np.argsort(np.abs(pruned), kind="stable")[: round(sparsity * pruned.size)]] = 0
    return pruned.reshape(weight.shape)
