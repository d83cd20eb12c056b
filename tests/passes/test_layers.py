from __future__ import annotations

import doctest

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.passes import layers
from sparsec.passes.layers import as_layer, block_sums, parse_block, spread_blocks, weighted_layers
from sparsec.passes.normalization.fold_constants import quiet_session
from sparsec.rewriting import pass_specs

RNG = np.random.default_rng(6)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


KINDS = {
    "conv": ("y = Conv(x, w)", (1, 4, 7, 7), (6, 4, 3, 2), (6, 4, 3, 2)),
    "grouped conv": ("y = Conv<group = 2>(x, w)", (1, 4, 7, 7), (6, 2, 3, 3), (6, 2, 3, 3)),
    "1-d conv": ("y = Conv(x, w)", (1, 4, 7), (6, 4, 3), (6, 4, 1, 3)),
    "3-d conv": ("y = Conv(x, w)", (1, 4, 7, 7, 7), (6, 4, 2, 3, 5), (6, 4, 6, 5)),
    "gemm": ("y = Gemm(x, w)", (2, 7), (7, 9), (9, 7, 1, 1)),
    "gemm transposed": ("y = Gemm<transB = 1>(x, w)", (2, 7), (9, 7), (9, 7, 1, 1)),
    "matmul": ("y = MatMul(x, w)", (3, 2, 7), (7, 9), (9, 7, 1, 1)),
    "matmul, one matrix": ("y = MatMul(x, w)", (3, 2, 7), (1, 7, 9), (9, 7, 1, 1)),
    "matmul from the left": ("y = MatMul(w, x)", (7, 5), (9, 7), (9, 7, 1, 1)),
}


@pytest.mark.parametrize(("text", "x", "stored", "view"), KINDS.values(), ids=KINDS)
def test_view_is_output_by_input_channels(model, text: str, x, stored, view) -> None:
    """Row `oc` of the view is what output channel `oc` depends on: zeroing it makes that channel zero."""
    made = model(f"g (float[{','.join(map(str, x))}] x) => (float[] y) {{ {text} }}", w=f32(*stored))
    (layer,) = weighted_layers(made)
    assert layer.shape == view
    original = layer.read().copy()
    assert original.shape == view
    layer.write(original)
    np.testing.assert_array_equal(layer.read(), original)
    assert layer.tensor.numpy().shape == stored
    changed = original.copy()
    changed[1] = 0
    layer.write(changed)
    feed = {"x": np.abs(f32(*x)) + np.float32(1)}
    (y,) = quiet_session(ir.to_proto(made).SerializeToString()).run(None, feed)
    axis = 1 if layer.op == "Conv" else y.ndim - (2 if "MatMul(w" in text else 1)
    channels = np.moveaxis(y, axis, 0)
    assert not channels[1].any()
    assert channels[0].any()


def test_depthwise(model) -> None:
    made = model("g (float[1,4,7,7] x) => (float[] y) { y = Conv<group = 4>(x, w) }", w=f32(8, 1, 3, 3))
    (layer,) = weighted_layers(made)
    assert layer.depthwise
    assert layer.groups == 4


def test_reasons(model) -> None:
    made = model("g (float[4,4] x) => (float[4,4] y) { a = MatMul(x, x) y = Relu(a) }")
    assert [as_layer(node) for node in made.graph] == [
        "neither operand is a constant float matrix",
        "Relu has no weight",
    ]


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
)
def test_block_sums_against_loops(shape: tuple[int, ...], rows: int, columns: int) -> None:
    weight = np.random.default_rng(0).integers(0, 9, shape)
    sums = block_sums(weight, rows, columns)
    for i in range(sums.shape[0]):
        for j in range(sums.shape[1]):
            part = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            np.testing.assert_array_equal(sums[i, j], part.sum(axis=(0, 1)))
    spread = spread_blocks(sums, rows, columns, shape)
    assert spread.shape == shape
    for oc in range(shape[0]):
        for ic in range(shape[1]):
            np.testing.assert_array_equal(spread[oc, ic], sums[oc // rows, ic // columns])


@pytest.mark.parametrize("text", ["", "4", "x", "4x", "x4", "0x1", "4x0", "-4x1", "4x1x1", "axb"])
def test_bad_block(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the caller says what is expected
        parse_block(text)


@pytest.mark.parametrize("module", [layers, pass_specs])
def test_examples_in_docstrings(module) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
