from __future__ import annotations

import numpy as np
import pytest

from sparsec.passes import FuseLayerNorm

I64 = np.int64
GAMMA = np.linspace(0.5, 1.5, 8, dtype=np.float32)
BETA = np.linspace(-1, 1, 8, dtype=np.float32)
EPS = np.array(1e-3, np.float32)
HEAD = "m = ReduceMean<keepdims = 1>(x, last) d = Sub(x, m) "
SPREAD = "v = ReduceMean<keepdims = 1>(q, last) e = Add(v, eps) s = Sqrt(e) "
KERAS = "r = Reciprocal(s) a = Mul(r, gamma) p = Mul(x, a) n = Mul(m, a) b = Sub(beta, n) y = Add(p, b)"
LAST = np.array([-1], I64)

FUSED = {
    "torch": HEAD + "q = Pow(d, two) " + SPREAD + "n = Div(d, s) g = Mul(n, gamma) y = Add(g, beta)",
    "no shift": HEAD + "q = Mul(d, d) " + SPREAD + "n = Div(d, s) y = Mul(gamma, n)",
    "neither": HEAD + "q = Mul(d, d) " + SPREAD + "y = Div(d, s)",
    "reciprocal": HEAD
    + "q = Mul(d, d) "
    + SPREAD
    + "r = Reciprocal(s) n = Mul(d, r) g = Mul(n, gamma) y = Add(beta, g)",
    "keras": HEAD + "q = Mul(d, d) " + SPREAD + KERAS,
    "pooled": "m = GlobalAveragePool(x) d = Sub(x, m) q = Mul(d, d) v = GlobalAveragePool(q) e = Add(eps, v) s = Sqrt(e) "
    + KERAS,
}


def weights(body: str) -> dict[str, np.ndarray]:
    held = {"gamma": GAMMA, "beta": BETA, "eps": EPS, "last": LAST, "two": np.array(2, np.float32)}
    return {name: array for name, array in held.items() if name in body}


@pytest.mark.parametrize("body", FUSED.values(), ids=FUSED)
def test_fused(model, rewrite, body: str) -> None:
    made = model(f"g (float[2,5,8] x) => (float[2,5,8] y) {{ {body} }}", **weights(body))
    assert rewrite(made, FuseLayerNorm()) == ["LayerNormalization"]
    node = next(iter(made.graph))
    assert node.attributes.get_int("axis") == -1
    assert node.attributes.get_float("epsilon") == pytest.approx(1e-3)
    assert made.graph.outputs[0].name == "y"


KEPT = {
    "a value in between is an output": (
        HEAD + "q = Mul(d, d) " + SPREAD + "y = Div(d, s)",
        "float[2,5,8] y, float[2,5,8] d",
    ),
    "another tensor's mean": (
        "k = Neg(x) m = ReduceMean<keepdims = 1>(k, last) d = Sub(x, m) q = Mul(d, d) " + SPREAD + "y = Div(d, s)",
        "float[2,5,8] y",
    ),
    "a cube": (HEAD + "q = Pow(d, two) " + SPREAD + "y = Div(d, s)", "float[2,5,8] y"),
    "the first axis": (HEAD + "q = Mul(d, d) " + SPREAD + "y = Div(d, s)", "float[2,5,8] y"),
}


@pytest.mark.parametrize("case", KEPT)
def test_must_not_match(model, rewrite, case: str) -> None:
    body, outputs = KEPT[case]
    held = weights(body)
    if case == "a cube":
        held["two"] = np.array(3, np.float32)
    if case == "the first axis":
        held["last"] = np.array([0], I64)
    made = model(f"g (float[2,5,8] x) => ({outputs}) {{ {body} }}", **held)
    before = [node.op_type for node in made.graph]
    assert rewrite(made, FuseLayerNorm()) == before


def test_two_in_a_row(model, rewrite) -> None:
    first = HEAD + "q = Pow(d, two) " + SPREAD + "n = Div(d, s) g = Mul(n, gamma) o = Add(g, beta) "
    second = (
        "m2 = ReduceMean<keepdims = 1>(o, last) d2 = Sub(o, m2) q2 = Mul(d2, d2) v2 = ReduceMean<keepdims = 1>(q2, last) "
        "e2 = Add(v2, eps) s2 = Sqrt(e2) n2 = Div(d2, s2) g2 = Mul(n2, gamma) y = Add(g2, beta)"
    )
    made = model(f"g (float[2,5,8] x) => (float[2,5,8] y) {{ {first} {second} }}", **weights(FUSED["torch"]))
    assert rewrite(made, FuseLayerNorm()) == ["LayerNormalization", "LayerNormalization"]
