"""The order of sums of products: what runs as one layer, what must stay, and that ONNX Runtime agrees."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from programs import agree, parse

from sparsec.loading.load import load_model, model_bytes
from sparsec.lowering import schedule
from sparsec.lowering.rules.base import Taken
from sparsec.lowering.sums import gather_sums, trees
from sparsec.targets import find_target

MATRIX = "g (float[1,7,8] x, float[8,4] w1, float[4,8] w2, float[8,8] ws, float[8] wb"
PARTS = "v = MatMul(x, w1) u = MatMul(v, w2) s = MatMul(x, ws)"
IMAGE = "g (float[1,8,5,6] x, float[4,8,1,1] w1, float[8,4,1,1] w2, float[8,8,1,1] ws, float[8] wb"
CONVS = "v = Conv(x, w1) u = Conv(v, w2, wb) s = Conv(x, ws)"
FUSED = {
    "bias, then shortcut": (MATRIX, f"{PARTS} t = Add(u, s) b = Add(t, wb) y = Add(b, x)", "7,8"),
    "shortcut, then bias": (MATRIX, f"{PARTS} t = Add(u, s) b = Add(x, t) y = Add(wb, b)", "7,8"),
    "shortcut alone": (MATRIX, f"{PARTS} t = Add(s, u) y = Add(t, x)", "7,8"),
    "bias alone": (MATRIX, f"{PARTS} t = Add(u, s) y = Add(t, wb)", "7,8"),
    "activation behind": (MATRIX, f"{PARTS} t = Add(u, s) b = Add(t, wb) r = Add(b, x) y = Relu(r)", "7,8"),
    "convolutions": (IMAGE, f"{CONVS} t = Add(u, s) r = Add(t, x) y = Relu(r)", "8,5,6"),
}


def loaded(case: tuple[str, str, str]) -> ir.Model:
    head, body, shape = case
    return load_model(parse(f"{head}) => (float[1,{shape}] y) {{ {body} }}"))


def layers_of(graph: ir.Graph) -> list[str]:
    """What runs, in order: `Conv+Relu`, and `(Op)` for the generic route."""
    found = []
    for item in schedule(graph, find_target("host")):
        found += [item.group.op] if isinstance(item, Taken) else [f"({node.op_type})" for node, _ in item]
    return found


@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED)
def test_every_add_becomes_part_of_a_product(case: tuple[str, str, str]) -> None:
    layers = layers_of(gather_sums(loaded(case)).graph)
    assert len(layers) == 3 and all(layer.startswith(("MatMul", "Conv")) for layer in layers), layers
    assert sum(layer.count("Add") for layer in layers) == case[1].count("Add(")
    head, body, shape = case
    agree(parse(f"{head}) => (float[1,{shape}] y) {{ {body} }}", {"ws": 0.8}))


@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED)
def test_the_model_given_stays_and_a_second_run_changes_nothing(case: tuple[str, str, str]) -> None:
    model = loaded(case)
    before = model_bytes(model)
    gathered = gather_sums(model)
    assert model_bytes(model) == before
    assert {n.name for n in gathered.graph} == {n.name for n in model.graph}
    assert model_bytes(gather_sums(gathered)) == model_bytes(gathered)


@pytest.mark.parametrize(
    "body",
    [
        f"{PARTS} t = Add(u, s) n = Neg(t) y = Add(t, n)",  # the sum is read twice
        "v = MatMul(x, w1) u = MatMul(v, w2) t = Add(u, wb) y = Add(t, x)",  # one product
        f"{PARTS} y = Add(u, s)",  # nothing besides the products
        f"{PARTS} t = Add(u, s) a = Relu(t) y = Add(a, x)",  # something between
        "u = MatMul(x, ws) s = MatMul(x, ws) p = MatMul(x, x2) t = Add(u, p) n = Neg(u) y = Add(t, n)",
    ],
)
def test_other_sums_stay(body: str) -> None:
    head = MATRIX + (", float[1,8,8] x2" if "x2" in body else "")
    model = load_model(parse(f"{head}) => (float[1,7,8] y) {{ {body} }}"))
    assert not list(trees(model.graph))
    assert gather_sums(model) is model


def test_sums_that_broadcast_stay() -> None:
    text = f"{MATRIX}, float[1,1,8] x2) => (float[1,7,8] y) {{ {PARTS} t = Add(u, s) y = Add(t, x2) }}"
    assert not list(trees(load_model(parse(text)).graph))


def test_a_long_chain_of_sums() -> None:
    adds = " ".join(f"a{i + 1} = Add(a{i}, x)" for i in range(1500))
    text = f"{MATRIX}) => (float[1,7,8] y) {{ {PARTS} a0 = Add(u, s) {adds} y = Neg(a1500) }}"
    gathered = gather_sums(load_model(parse(text)))
    assert np.sum([n.op_type == "Add" for n in gathered.graph]) == 1501
