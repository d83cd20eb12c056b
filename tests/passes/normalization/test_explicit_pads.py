from __future__ import annotations

import numpy as np
import pytest

from sparsec.passes import ExplicitPads, FoldConstants
from sparsec.passes.normalization.fold_constants import static_shape

RNG = np.random.default_rng(2)
PADS = np.array([0, 0, 1, 2, 0, 0, 0, 1], np.int64)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_auto_pad_of_conv(model, rewrite, mode: str, stride: int) -> None:
    attributes = f'auto_pad = "{mode}", strides = [{stride}, {stride}]'
    weight = RNG.standard_normal((2, 3, 4, 3)).astype(np.float32)
    made = model(f"g (float[1,3,9,8] x) => (float[] y) {{ y = Conv<{attributes}>(x, w) }}", w=weight)
    rewrite(made, ExplicitPads())
    assert "auto_pad" not in made.graph[0].attributes
    assert len(made.graph[0].attributes["pads"].as_ints()) == 4


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_auto_pad_of_dilated_conv_keeps_the_shape(model, stride: int) -> None:
    """ONNX Runtime refuses this attribute pair, so only the result's shape can be compared."""
    attributes = f'auto_pad = "SAME_UPPER", dilations = [2, 3], strides = [{stride}, {stride}]'
    weight = RNG.standard_normal((2, 3, 4, 3)).astype(np.float32)
    made = model(f"g (float[1,3,9,8] x) => (float[] y) {{ y = Conv<{attributes}>(x, w) }}", w=weight)
    ExplicitPads()(made)
    FoldConstants()(made)
    assert static_shape(made.graph.outputs[0]) == (1, 2, -(-9 // stride), -(-8 // stride))


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
def test_auto_pad_of_pooling(model, rewrite, op: str, mode: str) -> None:
    attributes = f'auto_pad = "{mode}", kernel_shape = [3, 2], strides = [2, 1]'
    made = model(f"g (float[1,3,8,7] x) => (float[] y) {{ y = {op}<{attributes}>(x) }}")
    rewrite(made, ExplicitPads())
    assert "auto_pad" not in made.graph[0].attributes


@pytest.mark.parametrize("value", ["", ", zero"])
def test_zero_pad_folds_into_conv(model, rewrite, value: str) -> None:
    weights = {"w": RNG.standard_normal((4, 3, 3, 3)).astype(np.float32), "p": PADS}
    if value:
        weights["zero"] = np.zeros((), np.float32)
    made = model(
        f"g (float[1,3,6,6] x) => (float[] y) {{ q = Pad(x, p{value}) y = Conv<pads = [1, 0, 0, 1]>(q, w) }}", **weights
    )
    assert rewrite(made, ExplicitPads()) == ["Conv"]
    assert list(made.graph[0].attributes["pads"].as_ints()) == [2, 2, 0, 2]


def test_pad_along_named_axes_folds(model, rewrite) -> None:
    made = model(
        "g (float[1,3,6,6] x) => (float[] y) { q = Pad(x, p, , axes) y = Conv(q, w) }",
        w=RNG.standard_normal((4, 3, 3, 3)).astype(np.float32),
        p=np.array([2, 1], np.int64), axes=np.array([-1], np.int64),
    )  # fmt: skip
    assert rewrite(made, ExplicitPads()) == ["Conv"]
    assert list(made.graph[0].attributes["pads"].as_ints()) == [0, 2, 0, 1]


def test_zero_pad_folds_into_average_pool_and_is_counted(model, rewrite) -> None:
    made = model(
        "g (float[1,3,6,6] x) => (float[] y) { q = Pad(x, p) y = AveragePool<kernel_shape = [3, 3]>(q) }", p=PADS
    )
    assert rewrite(made, ExplicitPads()) == ["AveragePool"]


MUST_NOT_MATCH = {
    "max pooling": ("y = MaxPool<kernel_shape = [3, 3]>(q)", PADS, "q = Pad(x, p)"),
    "reflection": ("y = Conv(q, w)", PADS, 'q = Pad<mode = "reflect">(x, p)'),
    "ones": ("y = Conv(q, w)", PADS, "q = Pad(x, p, one)"),
    "channels": ("y = AveragePool<kernel_shape = [3, 3]>(q)", np.array([0, 1, 0, 0, 0, 0, 0, 0], np.int64), ""),
    "cropping": ("y = Conv(q, w)", np.array([0, 0, -1, 0, 0, 0, 1, 1], np.int64), ""),
    "padding not counted": ("y = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(q)", PADS, ""),
    "window in the padding": ("y = AveragePool<kernel_shape = [2, 2]>(q)", PADS, ""),
}


@pytest.mark.parametrize(("body", "pads", "pad"), MUST_NOT_MATCH.values(), ids=MUST_NOT_MATCH)
def test_must_not_match(model, rewrite, body: str, pads: np.ndarray, pad: str) -> None:
    weights = {"p": pads}
    if "w)" in body:
        weights["w"] = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)
    if "one" in pad:
        weights["one"] = np.ones((), np.float32)
    made = model(f"g (float[1,3,6,6] x) => (float[] y) {{ {pad or 'q = Pad(x, p)'} {body} }}", **weights)
    before = [node.op_type for node in made.graph]
    assert before[0] == "Pad"
    assert rewrite(made, ExplicitPads()) == before


def test_pad_with_another_reader_stays_for_it(model, rewrite) -> None:
    made = model(
        "g (float[1,3,6,6] x) => (float[] y, float[] z) { q = Pad(x, p) y = Conv(q, w) z = Relu(q) }",
        p=PADS, w=RNG.standard_normal((4, 3, 3, 3)).astype(np.float32),
    )  # fmt: skip
    assert sorted(rewrite(made, ExplicitPads())) == ["Conv", "Pad", "Relu"]
    assert next(n for n in made.graph if n.op_type == "Conv").inputs[0].name == "x"
