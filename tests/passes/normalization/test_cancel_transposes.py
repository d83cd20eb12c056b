from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsec.passes.normalization.cancel_transposes import CancelTransposes
from sparsec.rewriting.pipeline import check_equal

DOWN, UP = "perm = [0, 2, 3, 1]", "perm = [0, 3, 1, 2]"  # to channels last, and back
GENERATOR = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return GENERATOR.standard_normal(shape).astype(np.float32)


GONE = {
    "meeting": ("t = Transpose<{down}>(x) y = Transpose<{up}>(t)", {}, []),
    "three": ("t = Transpose<{down}>(x) u = Transpose<{down}>(t) y = Transpose<{down}>(u)", {}, []),
    "activations": ("t = Transpose<{down}>(x) a = Relu(t) b = Sigmoid(a) y = Transpose<{up}>(b)", {}, ["Relu", "Sigmoid"]),
    "constants": (
        "t = Transpose<{down}>(x) a = Mul(t, c) b = Add(s, a) d = PRelu(b, c) y = Transpose<{up}>(d)",
        {"c": floats(3), "s": floats(1, 1, 5, 1)}, ["Mul", "Add", "PRelu"],
    ),
    "residual": (
        "t = Transpose<{down}>(x) r = Relu(t) u = Transpose<{up}>(r) v = Neg(u) w = Transpose<{down}>(v)"
        " z = Add(r, w) y = Transpose<{up}>(z)", {}, ["Relu", "Neg", "Add"],
    ),
    "concat": (
        "t = Transpose<{down}>(x) e = Exp(x) u = Transpose<{down}>(e) z = Concat<axis = -1>(t, u) y = Transpose<{up}>(z)",
        {}, ["Exp", "Concat"],
    ),
    "pad": (
        "t = Transpose<{down}>(x) z = Pad(t, p) y = Transpose<{up}>(z)",
        {"p": np.array([0, 1, 2, 0, 0, 3, 0, 1])}, ["Pad"],
    ),
    "reduce": (
        "t = Transpose<{down}>(x) z = ReduceMean(t, p) y = Transpose<{up}>(z)", {"p": np.array([1, -2])}, ["ReduceMean"],
    ),
    "quantized": (
        "t = Transpose<{down}>(x) q = QuantizeLinear(t, s, z) d = DequantizeLinear(q, s, z) y = Transpose<{up}>(d)",
        {"s": np.float32(0.1), "z": np.int8(3)}, ["QuantizeLinear", "DequantizeLinear"],
    ),
}  # fmt: skip


def text(body: str) -> str:
    return f"g (float[2,3,4,5] x) => (float[a,b,c,d] o) {{ {body.format(down=DOWN, up=UP)} o = Abs(y) }}"


@pytest.mark.parametrize(("body", "weights", "left"), GONE.values(), ids=GONE)
def test_gone(model, rewrite, body: str, weights: dict, left: list[str]) -> None:
    assert rewrite(model(text(body), **weights), CancelTransposes()) == [*left, "Abs"]


KEPT = {
    "one": "y = Transpose<{down}>(x)",
    "read by something else": "t = Transpose<{down}>(x) r = Relu(t) m = ReduceSum<keepdims = 0>(t) q = Add(r, m) y = Transpose<{up}>(q)",
    "another order": "t = Transpose<{down}>(x) r = Relu(t) y = Transpose<perm = [0, 2, 1, 3]>(r)",
    "an operator in the way": "t = Transpose<{down}>(x) r = Softmax(t) y = Transpose<{up}>(r)",
}  # fmt: skip


@pytest.mark.parametrize("body", KEPT.values(), ids=KEPT)
def test_must_not_match(model, body: str) -> None:
    made = model(text(body))
    before = [node.op_type for node in made.graph]
    result = CancelTransposes()(made)
    after = [node.op_type for node in made.graph]
    if body == KEPT["another order"]:  # two meet and become one
        assert after.count("Transpose") == 1
    else:
        assert not result.modified
        assert after == before


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(["Relu", "Transpose", "Mul", "Concat", "Softmax", "Add"]), min_size=2, max_size=8),
    st.integers(0, 10**6),
)
def test_any_chain_stays_equal(model, operators: list[str], seed: int) -> None:
    rng, body, value = np.random.default_rng(seed), [], "x"
    for i, kind in enumerate(operators):
        order = ", ".join(map(str, rng.permutation(3)))
        body.append({
            "Transpose": f"v{i} = Transpose<perm = [{order}]>({value})",
            "Mul": f"v{i} = Mul({value}, c)",
            "Concat": f"v{i} = Concat<axis = {rng.integers(3)}>({value}, {value})",
            "Softmax": f"v{i} = Softmax<axis = {rng.integers(3)}>({value})",
            "Add": f"a{i} = Exp({value}) v{i} = Add({value}, a{i})",
            "Relu": f"v{i} = Relu({value})",
        }[kind])  # fmt: skip
        value = f"v{i}"
    made = model(f"g (float[2,3,4] x) => (float[a,b,c] y) {{ {' '.join(body)} y = Abs({value}) }}", c=np.float32(0.5))
    before, orders = ir.to_proto(made), [node.op_type for node in made.graph].count("Transpose")
    CancelTransposes()(made)
    check_equal(before.SerializeToString(), ir.to_proto(made).SerializeToString(), "cancel-transposes")
    assert [node.op_type for node in made.graph].count("Transpose") <= orders
