from __future__ import annotations

import numpy as np
import pytest

from sparsec.lowering import lower
from sparsec.lowering.predict import layer_price
from sparsec.passes.layers import select_layers, weighted_layers
from sparsec.passes.normalization.fold_constants import FoldConstants
from sparsec.targets import find_target
from tests.passes.conftest import parse

NET = """g (float[1,16,12,12] x) => (float[1,8] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, first)
    r = Relu(a)
    b = Conv(r, point)
    c = Conv(b, whole)
    f = Flatten(c)
    h = Gemm<transB = 1>(f, hidden)
    y = MatMul(h, last)
}"""


def network(zeros: float = 0.0):
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        weight = rng.standard_normal(shape).astype(np.float32)
        groups = rng.random((shape[0] // 4, *shape[1:])) < zeros
        return np.where(np.repeat(groups, 4, axis=0), 0, weight).astype(np.float32)

    made = parse(NET, {
        "first": drawn(64, 16, 3, 3), "point": drawn(128, 64, 1, 1), "whole": drawn(64, 128, 12, 12),
        "hidden": drawn(64, 64), "last": drawn(64, 8),
    })  # fmt: skip
    FoldConstants()(made)
    return made


@pytest.mark.parametrize("target", ["host", "arm", "cuda"])
@pytest.mark.parametrize("zeros", [0.0, 0.8])
def test_the_price_is_what_lowering_predicts(target: str, zeros: float) -> None:
    made, machine = network(zeros), find_target(target)
    predicted = {layer.name: layer.predicted_us for layer in lower(made, machine).layers}
    price = layer_price(machine)
    layers = list(weighted_layers(made))
    assert len(layers) == 5
    for layer in layers:
        assert price(layer, layer.read()) == pytest.approx(predicted[layer.name], rel=1e-6)


def test_the_price_is_of_the_weight_that_is_given_and_the_model_stays() -> None:
    dense, sparse = network(), network(0.8)
    price = layer_price(find_target("host"))
    for a, b in zip(select_layers(dense).layers, select_layers(sparse).layers, strict=True):
        kept = a.read().copy()
        assert price(a, b.read()) == pytest.approx(price(b, b.read()), rel=1e-9)
        assert price(a, b.read()) < price(a, a.read())
        np.testing.assert_array_equal(a.read(), kept)


def test_a_product_with_the_constant_on_the_left_costs_its_dense_arithmetic() -> None:
    made = parse("g (float[8,4] x) => (float[6,4] y) { y = MatMul(w, x) }", {"w": np.ones((6, 8), np.float32)})
    FoldConstants()(made)
    (layer,) = weighted_layers(made)
    price = layer_price(find_target("host"))
    assert price(layer, 0 * layer.read()) == price(layer, layer.read()) > 0
