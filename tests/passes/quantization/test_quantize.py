"""The pass `quantize`: ONNX Runtime before and after, its form, what it leaves alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sparsec.errors import DataError, RecipeError
from sparsec.loading.load import load_model, model_bytes
from sparsec.passes.layers import block_sums, weighted_layers
from sparsec.passes.normalization.fold_constants import constant, quiet_session
from sparsec.passes.pruning.masks import Pattern, draw_masks
from sparsec.passes.quantization.fallback import Trial
from sparsec.passes.quantization.quantize import Quantize
from sparsec.rewriting.pass_specs import parse_spec
from sparsec.rewriting.passes_api import Context, Stacked
from sparsec.rewriting.pipeline import run_passes
from tests.passes.conftest import save
from tests.passes.quant_networks import (
    CLASSIFIER,
    calibrated,
    checked,
    classifier,
    classifier_weights,
    error,
    images,
    outputs,
    stored_weights,
)  # fmt: skip

RNG = np.random.default_rng(3)
QUICK = {"rounding": "nearest", "scales": "max", "correct": False, "fallback": "none"}


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def records(made: ir.Model, kind: str) -> list[dict]:
    return [record for record in Context.of(made).records if record.get("type") == kind]


@pytest.mark.parametrize("observer", ["minmax", "average", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_outputs_stay_near(observer: str, activations: str) -> None:
    made, held = classifier(), images(40, seed=7)
    before = outputs(made, held)
    Quantize(observer=observer, activations=activations)(made)
    checked(made)
    assert error(outputs(made, held), before) < 0.01
    assert len(records(made, "int8")) == 5


@pytest.mark.parametrize("rounding", ["nearest", "feedback", "descent"])
@pytest.mark.parametrize("correct", [False, True])
def test_every_rounding_gives_the_inner_form(rounding: str, correct: bool) -> None:
    made = classifier()
    Quantize(rounding=rounding, correct=correct)(made)
    proto = checked(made)
    assert min(o.version for o in proto.opset_import) >= 13
    kinds = Counter(node.op_type for node in made.graph)
    assert kinds["Conv"] == 3 and kinds["Gemm"] == kinds["MatMul"] == 1
    for node in made.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert len(node.inputs) == 3
            assert all(constant(x) is not None for x in node.inputs[1:])
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            assert all(x is None or x.producer().op_type == "DequantizeLinear" for x in node.inputs)
    stored = list(stored_weights(made))
    assert len(stored) == 5
    for _, q, scale, zero in stored:
        assert q.dtype == np.int8
        assert q.min() >= -127
        assert not zero.any()
        assert scale.shape == zero.shape


def test_biases_are_counted_in_products_of_both_scales() -> None:
    made = classifier()
    Quantize(**QUICK)(made)
    for node in made.graph:
        if node.op_type not in ("Conv", "Gemm") or len(node.inputs) < 3:
            continue
        x, w, b = (value.producer() for value in node.inputs)
        q, unit, zero = (constant(v) for v in b.inputs)
        assert q.dtype == np.int32 and not zero.any()
        np.testing.assert_array_equal(unit, constant(x.inputs[1]) * constant(w.inputs[1]))


def test_activations_are_rounded_where_integers_are_read_and_nowhere_else() -> None:
    made = classifier()
    Quantize(**QUICK)(made)
    quantized = {str(node.inputs[0].name) for node in made.graph if node.op_type == "QuantizeLinear"}
    assert quantized == {"x", "r", "m", "c", "e", "t", "j", "p", "f", "u"}
    scales = {str(n.inputs[0].name): n.inputs[1].name for n in made.graph if n.op_type == "QuantizeLinear"}
    assert scales["r"] == scales["m"]  # what moves keeps its scale
    assert scales["t"] == scales["c"] == scales["j"]
    assert scales["p"] == scales["f"]


def test_results_may_be_integers_too() -> None:
    made = classifier()
    Quantize(outputs="int8", **QUICK)(made)
    (y,) = made.graph.outputs
    assert y.name == "y"
    assert y.producer().op_type == "DequantizeLinear"
    scale = float(constant(y.producer().inputs[1]))
    steps = outputs(made, images(4)) / scale
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)


def test_a_second_run_changes_nothing(rewrite) -> None:
    rewrite(classifier(), Quantize(fallback="none"))


def test_a_second_run_takes_what_was_left() -> None:
    made = classifier()
    Quantize(exclude=("Conv_*",), **QUICK)(made)
    before = {v.name: v.const_value.numpy() for v in made.graph.initializers.values()}
    assert {record["layer"] for record in records(made, "float")} == {"Conv_0", "Conv_3", "Conv_5"}
    Quantize(**QUICK)(made)
    assert len(list(stored_weights(made))) == 5
    for name in ("w3_quantized", "w4_quantized"):
        np.testing.assert_array_equal(made.graph.initializers[name].const_value.numpy(), before[name])
    checked(made)


@pytest.mark.parametrize(
    ("options", "floats"),
    [
        ({"exclude": ("Conv_0", "Mat*")}, {"w0", "w4"}),
        ({"include": ("Conv_5",)}, {"w0", "w1", "w3", "w4"}),
        ({"types": ("Gemm",)}, {"w0", "w1", "w2", "w4"}),
    ],
)
def test_layers_that_are_not_asked_for_keep_their_weights(options: dict, floats: set[str]) -> None:
    made = classifier()
    Quantize(**options, **QUICK)(made)
    for name, array in classifier_weights().items():
        if name in floats:
            np.testing.assert_array_equal(made.graph.initializers[name].const_value.numpy(), array)
    assert len(list(stored_weights(made))) == 5 - len(floats)
    assert {str(node.inputs[1].name) for node in made.graph if node.op_type in ("Conv", "Gemm", "MatMul")} >= floats
    checked(made)


# ---- zeros


def masked(pattern: str) -> dict[str, np.ndarray]:
    weights = classifier_weights()
    for name in ("w0", "w2", "w3", "w4"):
        w = weights[name] if name != "w4" else weights[name].T
        wide = w.reshape(*w.shape, *[1] * (4 - w.ndim))
        if pattern == "rows":
            mask = np.ones(wide.shape, bool)
            mask[::3] = False
        else:
            how = Pattern.parse(nm=pattern) if ":" in pattern else Pattern.parse(pattern)
            (mask,) = draw_masks([wide], [np.square(wide)], how, 0.6)
        w = (wide * mask).reshape(w.shape)
        weights[name] = np.ascontiguousarray(w if name != "w4" else w.T)
    return {name: weights[name] for name in ("w0", "w2", "w3", "w4")}


@pytest.mark.parametrize("pattern", ["1x1", "4x1", "1x4", "4x4", "8x4", "2:4", "rows"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rounding": "nearest", "correct": False},
        {"rounding": "feedback", "trust": 1.0},
        {"weights": "int8", "group": 16},
        {"weights": "int4", "group": 16, "asymmetric": True},
    ],
    ids=str,
)
def test_zeros_stay_zero(pattern: str, options: dict) -> None:
    weights = masked(pattern)
    made = classifier(**weights)
    Quantize(fallback="none", **options)(made)
    found = {str(node.inputs[0].name): (q, zero, node) for node, q, _, zero in stored_weights(made)}
    for name, w in weights.items():
        if f"{name}_quantized" not in found:
            continue
        q, zero, node = found[f"{name}_quantized"]
        size = node.attributes.get_int("block_size", 0)
        if size:
            axis = node.attributes.get_int("axis", 1)
            zero = np.repeat(zero, size, axis=axis).take(range(q.shape[axis]), axis=axis)
        assert (q.astype(int) - (zero.astype(int) if size else 0))[w == 0].size
        assert not (q.astype(int) - (zero.astype(int) if size else 0))[w == 0].any()
    assert len(found) == (2 if options.get("weights") else 5)


@pytest.mark.parametrize("block", ["4x1", "1x4", "4x4", "8x4"])
def test_pruning_before_is_made_up_for_with_the_mask_held(block: str) -> None:
    """Rounded towards the outputs before pruning: better than rounding what pruning left towards itself."""
    made, held, data = classifier(), images(60, seed=7), images(96)
    reference = outputs(made, held)
    arranged = f"rearrange:block={block},include=Conv_5+Gemm*"
    prune = f"prune:sparsity=0.5,block={block},allocation=uniform,include=Conv_5+Gemm*"
    joint, alone = (
        run_passes(ir.from_proto(ir.to_proto(made)), passes, calibration=data)[0]
        for passes in (
            [arranged, prune, "quantize:fallback=none"],
            [arranged, f"{prune},refit=none", "quantize:fallback=none,trust=0,correct=false"],
        )
    )
    assert error(outputs(joint, held), reference) < 0.6 * error(outputs(alone, held), reference)
    rows, columns = map(int, block.split("x"))
    found = {str(node.inputs[0].name): q for node, q, *_ in stored_weights(joint)}
    for name in ("w2_quantized", "w3_quantized"):
        kept = block_sums(np.abs(found[name].astype(int)).reshape(*found[name].shape[:2], 1, 1), rows, columns)
        assert np.mean(kept == 0) == pytest.approx(0.5, abs=0.13)


# ---- what decides accuracy


def test_rounding_by_the_layer_s_output_is_better_than_to_nearest() -> None:
    errors = {}
    for rounding in ("nearest", "feedback", "descent"):
        made = classifier()
        Quantize(rounding=rounding, fallback="none", trust=0.0)(made)
        errors[rounding] = {record["layer"]: record["error"] for record in records(made, "int8")}
    for name, least in errors["descent"].items():
        assert least <= errors["nearest"][name] * 1.02
    total = {rounding: sum(found.values()) for rounding, found in errors.items()}
    assert total["descent"] < 0.95 * total["nearest"]
    # Only the first layer reads the same numbers in all three.
    assert errors["descent"]["Conv_0"] <= errors["feedback"]["Conv_0"] * 1.02


def test_biases_take_the_shift_of_the_mean() -> None:
    """Coarse weights whose rounding errors all point one way move the mean of the outputs; biases move it back."""
    weights = classifier_weights()
    weights["w2"] = np.abs(weights["w2"])
    shifts = []
    for correct in (False, True):
        made = classifier(w2=weights["w2"])
        reference = outputs(made, images())
        Quantize(correct=correct, rounding="nearest", scales="max", fallback="none", observer="minmax")(made)
        shifts.append(np.abs((outputs(made, images()) - reference).mean(axis=0)).mean())
    assert shifts[1] < 0.4 * shifts[0]


SPECTRUM = """g (float[1,32] x) => (float[1,8] y) {
    s = MatMul(x, fourier)
    q = Mul(s, s)
    e = MatMul(q, bands)
    l = Log(e)
    h = MatMul(l, w0)
    r = Relu(h)
    y = MatMul(r, w1)
}"""


def spectrum(model) -> ir.Model:
    """A spectrogram in front of a classifier: small numbers count behind the logarithm."""
    rng = np.random.default_rng(0)
    n = np.arange(32)
    fourier = np.cos(np.pi / 32 * (n[:, None] + 0.5) * n).astype(np.float32)
    bands = np.eye(32, dtype=np.float32) + 1e-6
    made = model(SPECTRUM, fourier=fourier, bands=bands, w0=f32(32, 16), w1=f32(16, 8))
    falling = 10.0 ** (-3 * n / 32)
    x = (rng.standard_normal((48, 32)) * falling) @ np.linalg.pinv(fourier)
    return calibrated(made, Stacked({"x": x.astype(np.float32)}))


def test_layers_go_back_to_float_until_the_damage_is_small(model) -> None:
    made = spectrum(model)
    data = Context.of(made).calibration
    reference = outputs(made, data)
    Quantize()(made)
    record = Context.of(made).records[-1]
    assert set(record["floats"]) & {"MatMul_0", "MatMul_2"}
    assert record["damage_all"] > 0.02 >= record["damage"]
    assert {r["layer"] for r in records(made, "float")} == set(record["floats"])
    assert len(records(made, "int8")) == 4 - len(record["floats"]) >= 1
    assert np.abs(outputs(made, data) - reference).mean() < 0.3 * np.abs(reference).mean()


def test_what_comes_nearer_to_the_original_is_no_damage() -> None:
    """Behind a pass that changed the model, rounding with data makes up for some of it: far from the model it was given."""
    made = classifier()
    original = Context.of(made).original
    assert original is not None
    for layer in list(weighted_layers(made))[:3:2]:
        w = layer.read()
        layer.write(np.where(np.abs(w) < np.quantile(np.abs(w), 0.6), 0, w).astype(np.float32))
    data, changed = images(), save(made)
    trial = Trial(made, lambda model, floats: True, data, original)
    goal = ir.from_proto(onnx.load_model_from_string(original))
    assert Trial(made, lambda model, floats: True, data).damage_of(goal) > 0.02
    assert trial.damage_of(goal) == 0.0
    worse = ir.from_proto(onnx.load_model_from_string(changed))
    for layer in weighted_layers(worse):
        layer.write(np.asarray(0.3 * layer.read(), np.float32))
    assert trial.damage_of(worse) > 0.02


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 1.0])
def test_a_share_of_the_work_bounds_what_goes_back(share: float) -> None:
    made = classifier()
    costs = {
        layer.name: layer.size * work for layer, work in zip(weighted_layers(made), (144, 36, 36, 1, 1), strict=True)
    }
    Quantize(rounding="nearest", fallback=share)(made)
    floats = [r["layer"] for r in records(made, "float")]
    assert sum(costs[name] for name in floats) <= share * sum(costs.values()) + 1e-6
    assert bool(floats) == (share > 0)
    checked(made)


# ---- refusals


def test_ranges_need_data() -> None:
    made = classifier()
    made.meta.clear()
    with pytest.raises(RecipeError, match=r"^quantize: the ranges of activations are measured: give --calibration"):
        Quantize()(made)


def test_numbers_that_are_not_finite_are_refused() -> None:
    made = classifier()
    data = images(4).arrays["x"].copy()
    data[2, 0, 0, 0] = np.inf
    with pytest.raises(DataError, match="not finite"):
        Quantize(**QUICK)(calibrated(made, Stacked({"x": data})))


@pytest.mark.parametrize(
    ("text", "weights", "reason"),
    [
        ("g (float[1,4] x, float[4,4] w) => (float[1,4] y) { y = MatMul(x, w) }", {}, "0 of 0 layers matched"),
        ("g (float[1,4] x) => (float[1,4] y) { y = Relu(x) }", {}, "0 of 0 layers matched"),
        ("g (float[4,1] x) => (float[4,1] y) { y = MatMul(w, x) }", {"w": f32(4, 4)}, "has its constant on the left"),
        ("g (float[1,4] x) => (float[1,4] y) { y = Gemm<alpha = 2.0>(x, w) }", {"w": f32(4, 4)}, "scales its product"),
        ("g (float[4,1] x) => (float[1,4] y) { y = Gemm<transA = 1>(x, w) }", {"w": f32(4, 4)}, "transposes its input"),
        (
            "g (float16[1,4] x) => (float16[1,4] y) { y = MatMul(x, w) }",
            {"w": f32(4, 4).astype(np.float16)}, "has weights of type FLOAT16",
        ),
    ],
)  # fmt: skip
def test_what_does_not_match_is_named(model, text: str, weights: dict, reason: str) -> None:
    made = model(text, **weights)
    kind = np.float16 if "float16" in text else np.float32
    shape = (3, 4, 1) if "[4,1] x" in text else (3, 4)
    before = save(calibrated(made, Stacked({"x": np.ones(shape, kind)})))
    with pytest.raises(RecipeError, match=reason):
        Quantize()(made)
    assert save(made) == before


@pytest.mark.parametrize(
    "options",
    [
        "group=48", "percentile=0.4", "trust=2", "fallback=1.5", "samples=0", "damage=-1", "asymmetric=true", "group=32",
        "types=Relu", "weights=int3", "observer=guess", "rounding=up",
    ],
)  # fmt: skip
def test_options_are_checked(options: str) -> None:
    with pytest.raises(RecipeError, match="quantize"):
        parse_spec(f"quantize:{options}")


def test_a_weight_that_two_layers_read_is_stored_once(model) -> None:
    made = model(
        "g (float[1,8] x) => (float[1,8] y) { a = MatMul(x, w) r = Relu(a) b = MatMul(r, w) y = Relu(b) }", w=f32(8, 8)
    )
    data = Stacked({"x": f32(16, 8)})
    reference = outputs(calibrated(made, data), data)
    Quantize(fallback="none")(made)
    checked(made)
    assert len(list(stored_weights(made))) == 1
    assert error(outputs(made, data), reference) < 0.01


def test_a_sum_that_only_floats_read_stays_float(model) -> None:
    made = model(
        "g (float[1,4,8] x) => (float[1,4,8] y) { a = MatMul(x, w) s = Add(a, x)"
        " y = LayerNormalization<axis = -1>(s, g, b) }",
        w=f32(8, 8), g=f32(8), b=f32(8),
    )  # fmt: skip
    Quantize(fallback="none")(calibrated(made, Stacked({"x": f32(16, 4, 8)})))
    assert [str(n.inputs[0].name) for n in made.graph if n.op_type == "QuantizeLinear"] == ["x"]
    checked(made)


def test_loads_again_as_it_is() -> None:
    """What the pass writes is the form that loading brings other quantized models to."""
    made = classifier()
    Quantize(**QUICK)(made)
    data = save(made)
    loaded = load_model(data)
    assert Counter(n.op_type for n in loaded.graph) == Counter(n.op_type for n in made.graph)
    sample = next(iter(images(1, seed=9)))
    np.testing.assert_array_equal(outputs(loaded, Stacked(sample)), outputs(made, Stacked(sample)))
    assert onnx.load_model_from_string(model_bytes(loaded)).ByteSize() > 0
    assert CLASSIFIER.count("Conv") == 3


def test_layers_that_rounding_with_data_saves_stay_integers() -> None:
    """A limit between the damage of rounding to nearest and what is left with the means corrected."""
    weights = classifier_weights()
    made = classifier(w2=np.abs(weights["w2"]) + 0.3, w4=20 * weights["w4"])
    options = {"scales": "max", "observer": "minmax", "activations": "uint8"}
    Quantize(damage=0.0, **options)(made)
    plain = Context.of(made).records[-1]
    made = classifier(w2=np.abs(weights["w2"]) + 0.3, w4=20 * weights["w4"])
    Quantize(fallback="none", **options)(made)
    full = error(
        outputs(made, images()), outputs(classifier(w2=np.abs(weights["w2"]) + 0.3, w4=20 * weights["w4"]), images())
    )
    assert full < 0.05
    made = classifier(w2=np.abs(weights["w2"]) + 0.3, w4=20 * weights["w4"])
    Quantize(damage=0.999 * plain["damage_all"], **options)(made)
    record = Context.of(made).records[-1]
    assert record["floats"] == []
    assert record["damage"] < record["damage_all"]
    checked(made)


def test_stored_numbers_that_another_operator_reads_stay() -> None:
    """A QuantizeLinear of the model whose bytes go to more than DequantizeLinear, beside a layer that is new in int8."""
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[1,4] x, float[1,4] w) => (float[1,3] y, uint8[1,4] i, float[1,4] j)
        <float s = {0.05}, uint8 z = {128}>
        { q = QuantizeLinear(x, s, z) i = BitwiseOr(q, q) j = DequantizeLinear(q, s, z) y = MatMul(w, m) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(f32(4, 3), "m"))
    data = {"x": f32(8, 4), "w": f32(8, 4)}
    made, _ = run_passes(load_model(proto), ("quantize:fallback=none,rounding=nearest",), calibration=data)
    feeds = {name: array[:1] for name, array in data.items()}
    before, after = (quiet_session(save(m)).run(None, feeds) for m in (load_model(proto), made))
    assert [np.array_equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, True]
    assert error(after[0], before[0]) < 0.01


def test_inputs_that_hardly_vary_around_large_means() -> None:
    """Their covariance is nothing but what float32 left of the values."""
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[1,8,3,3] x) => (float[1,8,3,3] y) { a = Add(x, c) y = Conv(a, w, b) }"""
    proto = onnx.parser.parse_model(text)
    for name, array in (("c", 100 * f32(8, 1, 1)), ("w", f32(8, 8, 1, 1)), ("b", f32(8))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    made, _ = run_passes(
        load_model(proto), ("quantize:fallback=none,samples=4",), calibration={"x": 1e-4 * f32(4, 8, 3, 3)}
    )
    assert Counter(node.op_type for node in made.graph)["QuantizeLinear"]
