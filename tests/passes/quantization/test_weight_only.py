"""Weight-only: grouped integers in front of products whose activations stay float."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from sparsec.errors import RecipeError
from sparsec.passes.measure.segments import Segment
from sparsec.passes.normalization.fold_constants import constant
from sparsec.passes.quantization.quantize import Quantize
from sparsec.rewriting.passes_api import Context, Stacked
from tests.passes.conftest import save
from tests.passes.quant_networks import calibrated, checked, error, outputs, stored_weights

RNG = np.random.default_rng(4)
TEXT = """g (float[1,6,40] x) => (float[1,6,12] y) {
    a = MatMul(x, w0)
    b = Add(a, b0)
    r = Relu(b)
    f = Reshape(r, rows)
    h = Gemm<transB = 1>(f, w1, b1)
    u = Relu(h)
    v = Gemm(u, w2)
    y = Reshape(v, back)
}"""


def f32(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


WEIGHTS = {
    "w0": f32(40, 50), "b0": f32(50), "w1": f32(64, 50), "b1": f32(64), "w2": f32(64, 12),
    "rows": np.array([6, 50]), "back": np.array([1, 6, 12]),
}  # fmt: skip


def data(count: int = 32, seed: int = 0) -> Stacked:
    """Correlated inputs, whose error feedback has something to work with."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((10, 40))
    x = rng.standard_normal((count, 6, 10)) @ mix + 0.2 * rng.standard_normal((count, 6, 40)) + 0.5
    return Stacked({"x": x.astype(np.float32)})


def products(model) -> ir.Model:
    return calibrated(model(TEXT, **WEIGHTS), data())


def wide(node: ir.Node, array: np.ndarray, like: np.ndarray) -> np.ndarray:
    axis = node.attributes.get_int("axis", 1)
    return np.repeat(array, node.attributes.get_int("block_size", 0), axis=axis).take(
        range(like.shape[axis]), axis=axis
    )


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_stored_groups_are_the_weights(model, bits: str, asymmetric: bool, group: int) -> None:
    """Groups that do not divide the sum, and ones longer than it."""
    made = products(model)
    before = outputs(made, data(8, 5))
    Quantize(weights=bits, group=group, asymmetric=asymmetric, rounding="nearest", correct=False, fallback="none")(made)
    checked(made)
    found = list(stored_weights(made))
    assert len(found) == 3
    for node, q, scale, zero in found:
        name = str(node.inputs[0].name).removesuffix("_quantized")
        assert q.dtype.name == ("u" if asymmetric else "") + bits
        real = (q.astype(np.float64) - wide(node, zero.astype(np.float64), q)) * wide(node, scale, q)
        step = np.float64(wide(node, scale, q))
        assert (np.abs(real - WEIGHTS[name]) <= 1.01 * step * 4).all()  # the ends are clipped
        assert np.mean(np.abs(real - WEIGHTS[name]) <= 0.501 * step) > 0.95
    limit = {"int8": 3e-4, "int4": 0.05}[bits]
    assert error(outputs(made, data(8, 5)), before) < limit


def test_eight_bits_are_near_lossless(model) -> None:
    made = products(model)
    before = outputs(made, data(8, 5))
    Quantize(weights="int8")(made)
    assert error(outputs(made, data(8, 5)), before) < 1e-4


def test_feedback_and_descent_err_less(model) -> None:
    errors = {}
    for rounding in ("nearest", "feedback", "descent"):
        made = products(model)
        before = outputs(made, data(24, 5))
        Quantize(weights="int4", group=16, rounding=rounding, fallback="none")(made)
        errors[rounding] = error(outputs(made, data(24, 5)), before)
    assert errors["feedback"] < 0.8 * errors["nearest"]
    assert errors["descent"] < 0.8 * errors["nearest"]


def test_asymmetric_groups_fit_weights_of_one_sign(model) -> None:
    positive = {**WEIGHTS, "w0": np.abs(WEIGHTS["w0"]) + 0.3}
    errors = []
    for asymmetric in (False, True):
        made = calibrated(model(TEXT, **positive), data())
        before = outputs(made, data(8, 5))
        Quantize(weights="int4", asymmetric=asymmetric, include=("MatMul_0",), correct=False, fallback="none")(made)
        errors.append(error(outputs(made, data(8, 5)), before))
    assert errors[1] < errors[0]


def test_biases_take_the_shift_of_the_mean(model) -> None:
    shifts = []
    for correct in (False, True):
        made = model("g (float[1,6,40] x) => (float[1,6,50] y) { a = MatMul(x, w0) y = Add(a, b0) }",
                     w0=WEIGHTS["w0"], b0=WEIGHTS["b0"])  # fmt: skip
        before = outputs(calibrated(made, data()), data())
        Quantize(weights="int4", rounding="nearest", correct=correct, fallback="none")(made)
        shifts.append(np.abs((outputs(made, data()) - before).mean(axis=(0, 1))).mean())
    assert shifts[1] < 1e-3 * shifts[0]


def test_activations_stay_float_in_pieces_of_the_model_too(model) -> None:
    """ONNX Runtime would round them to 8 bits beside grouped weights, by itself."""
    made = calibrated(model("g (float[1,64] x) => (float[1,32] y) { y = MatMul(x, w) }", w=f32(64, 32)), data())
    Quantize(weights="int8", fallback="none", rounding="nearest", correct=False)(
        calibrated(made, Stacked({"x": f32(4, 64)}))
    )
    x = f32(64, 64).reshape(64, 1, 64)
    ((node, q, scale, _),) = stored_weights(made)
    expected = x.astype(np.float64) @ (q * np.float64(wide(node, scale, q)))
    got = Segment(made, None, ["y"]).run({"x": x})["y"]
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_needs_no_data(model) -> None:
    made = model(TEXT, **WEIGHTS)
    Quantize(weights="int8")(made)
    checked(made)
    assert len(list(stored_weights(made))) == 3
    assert constant(made.graph.initializers["b1"]) is not None


def test_a_second_run_changes_nothing(model, rewrite) -> None:
    rewrite(products(model), Quantize(weights="int8", fallback="none"))


def test_layers_that_four_bits_break_go_back(model) -> None:
    """Differences of large numbers behind a product: no 4-bit grid holds them."""
    w = np.ones((32, 16), np.float32) + 0.01 * f32(32, 16)
    made = model(
        "g (float[1,32] x) => (float[1,8] y) { a = MatMul(x, w) m = ReduceMean<keepdims = 1>(a, axes) d = Sub(a, m)"
        " y = MatMul(d, v) }",
        w=w, v=300 * f32(16, 8), axes=np.array([1]),
    )  # fmt: skip
    calibrated(made, Stacked({"x": f32(32, 32)}))
    Quantize(weights="int4", group=32, rounding="nearest", correct=False)(made)
    record = Context.of(made).records[-1]
    assert record["floats"] == ["MatMul_0"]
    assert record["damage_all"] > 0.02 >= record["damage"]
    assert [str(node.inputs[0].name) for node, *_ in stored_weights(made)] == ["v_quantized"]


def test_convolutions_are_no_matrices(model) -> None:
    made = model("g (float[1,4,4,4] x) => (float[1,4,4,4] y) { y = Conv(x, w) }", w=f32(4, 4, 1, 1))
    before = save(made)
    with pytest.raises(RecipeError, match="is no Gemm or MatMul"):
        Quantize(weights="int4")(made)
    assert save(made) == before
