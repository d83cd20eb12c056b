from __future__ import annotations

import numpy as np
import pytest

from sparsec.passes import RemoveNoOps

I64 = np.int64

REMOVED = {
    "identity": ("b = Identity(a)", {}),
    "dropout": ("b = Dropout(a)", {}),
    "dropout, training off": (
        "b = Dropout(a, r, t)",
        {"r": np.array(0.5, np.float32), "t": np.array(False)},
    ),
    "cast": ("b = Cast<to = 1>(a)", {}),
    "reshape": ("b = Reshape(a, s)", {"s": np.array([2, -1, 4], I64)}),
    "transpose": ("b = Transpose<perm = [0, 1, 2]>(a)", {}),
    "concat": ("b = Concat<axis = 1>(a)", {}),
    "pad": ("b = Pad(a, p)", {"p": np.zeros(6, I64)}),
    "expand": ("b = Expand(a, s)", {"s": np.array([1, 3, 1], I64)}),
    "tile": ("b = Tile(a, s)", {"s": np.ones(3, I64)}),
    "slice": ("b = Slice(a, s, e)", {"s": np.zeros(1, I64), "e": np.array([99], I64)}),
    "max": ("b = Max(a)", {}),
    "split into all": ("b = Split<axis = 1, num_outputs = 1>(a)", {}),
    "split into all and nothing, and together again": (
        "c, d = Split<axis = 2>(a, s) b = Concat<axis = 2>(c, d)",
        {"s": np.array([4, 0], I64)},
    ),
}


@pytest.mark.parametrize(("body", "weights"), REMOVED.values(), ids=REMOVED)
def test_removed(model, rewrite, body: str, weights: dict) -> None:
    made = model(f"g (float[2,3,4] x) => (float[2,3,4] y) {{ a = Relu(x) {body} y = Neg(b) }}", **weights)
    assert rewrite(made, RemoveNoOps()) == ["Relu", "Neg"]
    assert not made.graph.initializers


KEPT = {
    "transpose of equal axes": ("b = Transpose<perm = [1, 0, 2]>(a)", {}),
    "reversing slice": (
        "b = Slice(a, s, e, k, t)",
        {"s": np.array([-1], I64), "e": np.array([-99], I64), "k": np.zeros(1, I64), "t": np.array([-1], I64)},
    ),
    "pad and crop": ("b = Pad(a, p)", {"p": np.array([1, 0, 0, -1, 0, 0], I64)}),
    "rounding cast": ("c = Cast<to = 10>(a) b = Cast<to = 1>(c)", {}),
}


@pytest.mark.parametrize(("body", "weights"), KEPT.values(), ids=KEPT)
def test_must_not_match(model, rewrite, body: str, weights: dict) -> None:
    made = model(f"g (float[3,3,4] x) => (float[3,3,4] y) {{ a = Relu(x) {body} y = Neg(b) }}", **weights)
    before = [node.op_type for node in made.graph]
    assert rewrite(made, RemoveNoOps()) == before


def test_empty_parts_of_a_concat_are_left_out(model, rewrite) -> None:
    made = model("g (float[2,3] x, float[0,3] e) => (float[4,3] y) { a = Relu(x) y = Concat<axis = 0>(e, a, x) }")
    assert rewrite(made, RemoveNoOps()) == ["Relu", "Concat"]
    assert [value.name for value in made.graph.node(1).inputs] == ["a", "x"]


def test_dropout_whose_mask_is_read_stays(model, rewrite) -> None:
    made = model("g (float[3] x) => (float[3] y, bool[3] m) { a = Relu(x) b, m = Dropout(a) y = Neg(b) }")
    assert rewrite(made, RemoveNoOps()) == ["Relu", "Dropout", "Neg"]


def test_outputs_keep_their_names(model, rewrite) -> None:
    made = model("g (float[3] x) => (float[3] y) { a = Relu(x) y = Identity(a) }")
    assert rewrite(made, RemoveNoOps()) == ["Relu"]
    assert [v.name for v in made.graph.outputs] == ["y"]


def test_copy_of_an_input_or_of_another_output_stays(model, rewrite) -> None:
    made = model(
        "g (float[3] x) => (float[3] y, float[3] z, float[3] t) { y = Identity(x) z = Relu(x) t = Identity(z) }"
    )
    assert rewrite(made, RemoveNoOps()) == ["Identity", "Relu", "Identity"]
