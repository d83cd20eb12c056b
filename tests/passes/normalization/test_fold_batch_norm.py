from __future__ import annotations

import numpy as np
import pytest

from sparsec.passes import FoldBatchNorm

RNG = np.random.default_rng(1)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def norm(channels: int) -> dict[str, np.ndarray]:
    return {"g": f32(channels), "h": f32(channels), "m": f32(channels), "v": np.abs(f32(channels)) + np.float32(0.1)}


@pytest.mark.parametrize("bias", ["", ", b"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_batch_norm_folds_into_conv(model, rewrite, bias: str, groups: int) -> None:
    weights = {"w": f32(8, 4 // groups, 3, 3), **norm(8)}
    if bias:
        weights["b"] = f32(8)
    made = model(
        f"""g (float[1,4,6,6] x) => (float[1,8,4,4] y) {{
            c = Conv<group = {groups}>(x, w{bias})
            y = BatchNormalization<epsilon = 0.001>(c, g, h, m, v)
        }}""",
        **weights,
    )
    assert rewrite(made, FoldBatchNorm()) == ["Conv"]
    assert [y.name for y in made.graph.outputs] == ["y"]
    assert len(made.graph.initializers) == 2


@pytest.mark.parametrize("attributes", ["", "<transB = 1>", "<alpha = 0.5, beta = 2.0>"])
@pytest.mark.parametrize("bias", ["", ", b"])
def test_batch_norm_folds_into_gemm(model, rewrite, attributes: str, bias: str) -> None:
    weights = {"w": f32(5, 7) if "transB" in attributes else f32(7, 5), **norm(5)}
    if bias:
        weights["b"] = f32(1, 5)
    made = model(
        f"""g (float[3,7] x) => (float[3,5] y) {{
            c = Gemm{attributes}(x, w{bias})
            y = BatchNormalization(c, g, h, m, v)
        }}""",
        **weights,
    )
    assert rewrite(made, FoldBatchNorm()) == ["Gemm"]


def test_affine_operators_fold_one_after_another(model, rewrite) -> None:
    made = model(
        """g (float[1,2,4,4] x) => (float[1,3,4,4] y) {
            c = Conv(x, w)
            d = Mul(c, s)
            e = Sub(t, d)
            f = Div(e, s)
            y = Add(k, f)
        }""",
        w=f32(3, 2, 1, 1), s=np.abs(f32(3, 1, 1)) + np.float32(0.5), t=f32(1, 3, 1, 1), k=f32(1),
    )  # fmt: skip
    assert rewrite(made, FoldBatchNorm()) == ["Conv"]


def test_batch_norm_without_a_layer_becomes_mul_and_add(model, rewrite) -> None:
    made = model("g (float[1,4,6,6] x) => (float[1,4,6,6] y) { y = BatchNormalization(x, g, h, m, v) }", **norm(4))
    assert rewrite(made, FoldBatchNorm()) == ["Mul", "Add"]
    assert made.graph.outputs[0].name == "y"


MUST_NOT_MATCH = {
    "another reader": "c = Conv(x, w) d = Mul(c, s) y = Add(c, d)",
    "not per channel": "c = Conv(x, w) y = Mul(c, column)",
    "not a constant": "c = Conv(x, w) p = GlobalAveragePool(c) y = Mul(c, p)",
    "shared weight": "a = Conv(x, w) b = Relu(a) c = Conv(b, w) d = Mul(c, s) e = Relu(d) y = Add(e, a)",
    "division by the layer": "c = Conv(x, w) y = Div(s, c)",
    "activation between": "c = Conv(x, w) r = Relu(c) y = Mul(r, s)",
}


@pytest.mark.parametrize("body", MUST_NOT_MATCH.values(), ids=MUST_NOT_MATCH)
def test_must_not_match(model, rewrite, body: str) -> None:
    weights = {"w": f32(3, 3, 1, 1)}
    if " s)" in body or "(s" in body:
        weights["s"] = f32(1, 3, 1, 1)
    if "column" in body:
        weights["column"] = f32(4)
    made = model(f"g (float[1,3,4,4] x) => (float[1,3,4,4] y) {{ {body} }}", **weights)
    before = [node.op_type for node in made.graph]
    assert rewrite(made, FoldBatchNorm()) == before


def test_layer_whose_output_the_user_reads_stays(model, rewrite) -> None:
    made = model(
        "g (float[1,3,4,4] x) => (float[1,3,4,4] y, float[1,3,4,4] c) { c = Conv(x, w) y = Mul(c, s) }",
        w=f32(3, 3, 1, 1), s=f32(3, 1, 1),
    )  # fmt: skip
    assert rewrite(made, FoldBatchNorm()) == ["Conv", "Mul"]


def test_scaling_by_infinity_stays(model, rewrite) -> None:
    made = model(
        "g (float[1,3,4,4] x) => (float[1,3,4,4] y) { c = Conv(x, w) y = Mul(c, s) }",
        w=f32(3, 3, 1, 1), s=np.full((3, 1, 1), np.inf, np.float32),
    )  # fmt: skip
    FoldBatchNorm()(made)
    assert [node.op_type for node in made.graph] == ["Conv", "Mul"]
