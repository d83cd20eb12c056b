from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import sparsec
from sparsec.errors import RecipeError
from sparsec.passes import Compress
from sparsec.passes.layers import weighted_layers
from sparsec.passes.low_rank.compress_choice import Rounding, choices, input_steps, rounded, rounding_error
from sparsec.passes.low_rank.decompositions import Svd
from sparsec.passes.low_rank.factor_forms import stored_bytes, stored_int8_bytes
from sparsec.passes.low_rank.rank_allocation import Way, Ways
from sparsec.passes.measure.statistics import gather
from sparsec.passes.normalization.fold_constants import quiet_session
from sparsec.rewriting.passes_api import Context, Stacked

RNG = np.random.default_rng(11)
NET = """g (float[1,6,16] x) => (float[1,6,8] y) {
    a = MatMul(x, low)
    b = Add(a, low_b)
    r = Relu(b)
    c = MatMul(r, holes)
    d = Add(c, holes_b)
    s = Relu(d)
    e = MatMul(s, full)
    t = Relu(e)
    y = MatMul(t, last)
}"""


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def low_rank(rows: int, columns: int, rank: int) -> np.ndarray:
    return (f32(rows, rank) @ f32(rank, columns) + 0.01 * f32(rows, columns)).astype(np.float32)


def sparse(rows: int, columns: int, share: float) -> np.ndarray:
    big = np.where(RNG.random((rows, columns)) < share, f32(rows, columns), 0)
    return (big + 0.01 * f32(rows, columns)).astype(np.float32)


@pytest.fixture
def net(model) -> ir.Model:
    """One layer that is nearly low rank, one that is nearly sparse, one that is neither."""
    return model(
        NET, low=low_rank(16, 32, 2), low_b=f32(32), holes=sparse(32, 32, 0.1), holes_b=f32(32), full=f32(32, 24),
        last=f32(24, 8),
    )  # fmt: skip


def samples(count: int = 48, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((count, 6, 16)).astype(np.float32)}


def run(model: ir.Model, data: dict[str, np.ndarray]) -> np.ndarray:
    session = quiet_session(ir.to_proto(model).SerializeToString())
    return np.concatenate([session.run(None, {"x": x[None]})[0] for x in data["x"]])


def compressed(model: ir.Model, **options: object) -> tuple[ir.Model, list[dict]]:
    records: list[dict] = []
    made = sparsec.rewrite(
        ir.from_proto(ir.to_proto(model)), passes=[Compress(**options)], calibration=samples(), records=records
    )
    return made, next(record["details"] for record in records if record["name"] == "compress")


RECURRENT = """g (float[1,6,16] x) => (float[1,6,8] y) {
    a = MatMul(x, step)  b = Tanh(a)  c = MatMul(b, step)  d = Tanh(c)  e = MatMul(d, full)  f = Tanh(e)  y = MatMul(f, last)
}"""


@pytest.mark.parametrize("methods", [("low-rank", "sparse"), ()])
def test_a_weight_that_several_read_is_chosen_for_once(model, methods: tuple[str, ...]) -> None:
    net = model(RECURRENT, step=low_rank(16, 16, 2), full=f32(16, 24), last=f32(24, 8))
    made, (summary, *rows) = compressed(net, bytes=0.85, methods=methods)
    assert [row["layer"] for row in rows] == ["MatMul_0", "MatMul_4", "MatMul_6"]
    assert summary["of"] == sum(row["dense"] for row in rows) == 4 * (16 * 16 + 16 * 24 + 24 * 8)
    if methods:
        assert rows[0]["choice"].startswith("svd"), rows[0]
        parts = [layer for layer in weighted_layers(made) if layer.name.startswith(("MatMul_0/", "MatMul_2/"))]
        assert len(parts) == 4 and len({id(part.weight) for part in parts}) == 2
    reference, after = run(net, samples(8, 1)), run(made, samples(8, 1))
    assert np.square(after - reference).sum() < 0.05 * np.square(reference).sum()


def test_each_layer_gets_the_form_it_has(net: ir.Model) -> None:
    made, (summary, *rows) = compressed(net, bytes=0.55, methods=("sparse", "low-rank"))
    choice = {row["layer"]: row["choice"] for row in rows}
    assert choice["MatMul_0"].startswith("svd"), choice
    assert choice["MatMul_3"].startswith("sparse"), choice
    assert summary["cost"] <= 0.55 * summary["of"] * (1 + 1e-6)
    assert sum(stored_bytes(layer.read()) for layer in weighted_layers(made)) <= 0.55 * summary["of"] * (1 + 1e-6)
    y, z = run(net, samples(seed=1)), run(made, samples(seed=1))
    assert np.square(z - y).sum() < 0.05 * np.square(y).sum()


def test_with_int8_the_same_bytes_cost_less_accuracy(net: ir.Model) -> None:
    damages = {}
    for methods in ((), ("sparse", "low-rank")):
        made, (summary, *rows) = compressed(net, bytes=0.25, methods=methods)
        assert summary["cost"] <= 0.25 * summary["of"]
        damages[methods] = summary["measured damage"]
        quantized = {row["layer"] for row in rows if row["choice"].endswith("int8")}
        assert bool(quantized) == (not methods)
        inside = any(node.op_type == "QuantizeLinear" for node in made.graph)
        assert inside == bool(quantized)
        onnx.checker.check_model(ir.to_proto(made), full_check=True)
    assert damages[()] < damages[("sparse", "low-rank")]


def test_records_have_predicted_and_measured_errors_that_agree(net: ir.Model) -> None:
    _, (summary, *rows) = compressed(net, bytes=0.4)
    for row in rows:
        assert 0 <= row["predicted_error"] < 1 and 0 <= row["measured_error"] < 1
    first = rows[0]  # reads the model's input: nothing before it has an error
    assert 0.2 < first["measured_error"] / max(first["predicted_error"], 1e-9) < 5, first
    assert 0.1 < summary["measured damage"] / summary["predicted damage"] < 10, summary


def test_a_second_budget_that_is_larger_damages_less(net: ir.Model) -> None:
    damages = [compressed(net, bytes=share)[1][0]["predicted damage"] for share in (0.2, 0.3, 0.6)]
    assert damages[0] > damages[1] > damages[2]


def test_layers_left_out_stay(net: ir.Model) -> None:
    before = {layer.name: layer.read().copy() for layer in weighted_layers(net)}
    made, (_, *rows) = compressed(net, bytes=0.5, exclude=("MatMul_[03]",))
    assert {row["layer"] for row in rows} == {"MatMul_6", "MatMul_8"}
    after = {layer.name: layer for layer in weighted_layers(made)}
    assert all(np.array_equal(after[name].read(), before[name]) for name in ("MatMul_0", "MatMul_3"))


def test_rounding_error_is_that_of_rounded_weights_and_inputs(net: ir.Model) -> None:
    data = Stacked(samples(200))
    layer, statistics = next(iter(gather(net, list(weighted_layers(net))[:1], data)))
    step = input_steps(["x"], list(data), net)["x"]
    x = samples(200)["x"].reshape(-1, 16).astype(np.float64)
    w = layer.read().reshape(32, 16).astype(np.float64)
    v = rounded(layer, np.diagonal(statistics.gram)[None]).reshape(w.shape)
    y = x @ w.T
    true = np.square(np.rint(x / step) * step @ v.T - y).sum() / np.square(y).sum()
    assert rounding_error(layer, statistics, step) == pytest.approx(true, rel=0.1)


def test_choices_in_int8_add_the_rounding_of_every_layer_of_a_chain(net: ir.Model) -> None:
    layer = next(weighted_layers(net))
    factors = Svd(4).build(sparsec.passes.low_rank.metric.Objective(layer.read()))
    way = Way(0.5, 0, 100.0, 0.03, Svd(4), factors, 1, 0.2)
    ways = Ways(layer, (Way(0.0, 0, 400.0), way))
    found = choices(ways, ways, Rounding(0.01, 0.001), "bytes", Context())
    assert [(c.text, c.int8) for c in found] == [
        ("dense", False), ("svd 4", False), ("dense, int8", True), ("svd 4, int8", True)
    ]  # fmt: skip
    assert found[3].damage == pytest.approx(0.03 + 2 * 0.001) and found[3].loss == pytest.approx(0.2 + 2 * 0.01)
    assert found[2].cost == stored_int8_bytes(layer.read())
    assert not any(c.int8 for c in choices(ways, ways, None, "bytes", Context()))


@pytest.mark.parametrize(("rows", "columns"), itertools.product((8, 10), (8, 10)))
def test_stored_int8_bytes(rows: int, columns: int) -> None:
    full = np.ones((rows, columns, 1, 1))
    words = -(-columns // 4) * 4
    assert stored_int8_bytes(full) == rows * words + 4 * rows
    assert stored_int8_bytes(np.ones((rows, 1, 3, 3)), depthwise=True) == rows * (3 * 4 + 4)
    full[:, 4:] = 0  # one word of each row is left: one block of 8 rows or of 1 row each
    assert stored_int8_bytes(full) <= 4 * rows + rows * (4 + 2) + 4 * (rows + 1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bytes": 0.5, "latency": 0.5}, "one of bytes and latency"),
        ({"bytes": 1.5}, "from 0 to 1"),
        ({"bytes": 0.5, "methods": ("zip",)}, "must be some of"),
        ({"latency": 0.5, "methods": ("int8",)}, "no predicted time"),
        ({"bytes": 0.5, "samples": 0}, "at least 1"),
        ({"bytes": 0.5, "blocks": ("4",)}, "RxC"),
    ],
)
def test_options_are_refused(options: dict, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        Compress(**options)


def test_refusals(net: ir.Model) -> None:
    with pytest.raises(RecipeError, match="one of bytes and latency"):
        Compress()(net)
    with pytest.raises(RecipeError, match="give --calibration"):
        Compress(bytes=0.5)(net)
    for options, text in (
        ({"bytes": 0.001}, "cannot be held"),
        ({"bytes": 1.0}, "as it is"),
        ({"latency": 0.5}, "needs a target"),
        ({"bytes": 0.5, "include": ("nothing",)}, "0 layers matched"),
    ):
        with pytest.raises(RecipeError, match=text):
            compressed(net, **options)
