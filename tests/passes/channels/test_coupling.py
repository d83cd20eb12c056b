from __future__ import annotations

import networkx
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.passes.channels.coupling import ChannelClass, Coupling, components, couple, permute
from sparsec.rewriting.pipeline import check_equal
from tests.channel_networks import channel_networks
from tests.networks import networks

RNG = np.random.default_rng(7)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def shuffle(graph: ir.Graph, seed: int) -> int:
    """Permute every free class at random; how many units there were."""
    rng = np.random.default_rng(seed)
    free = couple(graph).free
    permute(graph, [(units, rng.permutation(units.size)) for units in free])
    return sum(units.size for units in free if units.size > 1)


def moves_nothing_outside(made: ir.Model, seed: int = 0) -> int:
    before = ir.to_proto(made).SerializeToString()
    count = shuffle(made.graph, seed)
    after = ir.to_proto(made).SerializeToString()
    onnx.checker.check_model(after, full_check=True)
    check_equal(before, after, "shuffle")
    return count


def named(coupling: Coupling, node: str) -> list[ChannelClass]:
    """Free classes that the rows of `node` belong to."""
    return [c for c in coupling.free if any(p.node.name == node for p in c.producers)]


@settings(max_examples=150, deadline=None)
@given(proto=channel_networks(), seed=st.integers(0, 3))
def test_any_permutation_of_free_classes_leaves_the_function(proto, seed) -> None:
    moves_nothing_outside(ir.from_proto(proto), seed)


@settings(max_examples=60, deadline=None)
@given(proto=networks(), seed=st.integers(0, 3))
def test_any_permutation_leaves_general_networks(proto, seed) -> None:
    moves_nothing_outside(ir.from_proto(onnx.shape_inference.infer_shapes(proto)), seed)


def test_residual_add_joins_all_layers_of_a_stage(model) -> None:
    made = model(
        """g (float[1,3,4,4] x) => (float[1,2,4,4] y) {
            a = Conv(x, w0, b)
            c = Relu(a)
            d = Conv(c, w1)
            e = Add(d, c)
            f = BatchNormalization(e, s, s, s, s)
            y = Conv(f, w2)
        }""",
        w0=f32(8, 3, 1, 1), b=f32(8), w1=f32(8, 8, 1, 1), w2=f32(2, 8, 1, 1), s=np.abs(f32(8)),
    )  # fmt: skip
    (stage,) = couple(made.graph).free
    assert (stage.size, stage.pinned) == (8, "")
    assert [p.node.name for p in stage.producers] == ["Conv_0", "Conv_2"]
    assert [c.node.name for c in stage.consumers] == ["Conv_2", "Conv_5"]
    held = sorted((str(m.value.name), m.axis.axis) for m in stage.members if m.value.is_initializer())
    assert held == [("b", 0), ("s", 0), ("w0", 0), ("w1", 0), ("w1", 1), ("w2", 1)]
    pinned = {(c.size, c.pinned) for c in couple(made.graph).classes if not c.free}
    assert pinned == {(3, "is a graph input"), (2, "is a graph output")}
    assert moves_nothing_outside(made) == 8


def test_concat_gives_each_part_its_own_class_and_slice_cuts_one(model) -> None:
    made = model(
        """g (float[1,3,2,2] x) => (float[1,2,2,2] y) {
            a = Conv(x, w0)
            b = Conv(x, w1)
            c = Concat<axis = 1>(a, b)
            d = Conv(c, w2)
            e = Slice(d, start, end, axis)
            f = Conv(e, w3)
            g = Conv(d, w3b)
            y = Add(f, g)
        }""",
        w0=f32(4, 3, 1, 1), w1=f32(6, 3, 1, 1), w2=f32(8, 10, 1, 1), w3=f32(2, 5, 1, 1), w3b=f32(2, 8, 1, 1),
        start=np.array([3]), end=np.array([8]), axis=np.array([1]),
    )  # fmt: skip
    free = couple(made.graph).free
    assert sorted(c.size for c in free) == [3, 4, 5, 6]
    first, second = named(couple(made.graph), "Conv_0")[0], named(couple(made.graph), "Conv_1")[0]
    assert first.consumers[0].member.positions.ravel().tolist() == [0, 1, 2, 3]
    assert second.consumers[0].member.positions.ravel().tolist() == [4, 5, 6, 7, 8, 9]
    assert moves_nothing_outside(made) == 18


def test_flatten_makes_a_channel_a_run_of_columns(model) -> None:
    made = model(
        "g (float[1,3,2,5] x) => (float[1,2] y) { a = Conv(x, w0) f = Flatten(a) y = Gemm<transB = 1>(f, w1) }",
        w0=f32(4, 3, 1, 1), w1=f32(2, 40),
    )  # fmt: skip
    (units,) = couple(made.graph).free
    np.testing.assert_array_equal(units.consumers[0].member.positions, np.arange(40).reshape(4, 10))
    assert moves_nothing_outside(made) == 4


@pytest.mark.parametrize(("groups", "classes"), [(1, [8, 8]), (2, [4, 4, 4, 4]), (8, [8])])
def test_group_convolution_keeps_channels_in_their_group(model, groups: int, classes: list[int]) -> None:
    made = model(
        f"g (float[1,3,4,4] x) => (float[1,2,4,4] y) {{ a = Conv(x, w0) b = Conv<group = {groups}>(a, w1) y = Conv(b, w2) }}",
        w0=f32(8, 3, 1, 1), w1=f32(8, 8 // groups, 1, 1), w2=f32(2, 8, 1, 1),
    )  # fmt: skip
    assert sorted(c.size for c in couple(made.graph).free) == classes
    assert moves_nothing_outside(made) == sum(classes)
    if groups == 2:  # cutting takes the same channel of every group
        (inner,) = [c for c in couple(made.graph, cut=True).free if c.producers[0].node.name == "Conv_0"]
        np.testing.assert_array_equal(inner.producers[0].member.positions, [[0, 4], [1, 5], [2, 6], [3, 7]])


ATTENTION = """g (float[1,6,8] x) => (float[1,6,8] y) {
    q = MatMul(x, wq)
    qs = Reshape(q, split)
    qt = Transpose<perm = [0, 2, 1, 3]>(qs)
    k = MatMul(x, wk)
    ks = Reshape(k, split)
    kt = Transpose<perm = [0, 2, 3, 1]>(ks)
    v = MatMul(x, wv)
    vs = Reshape(v, split)
    vt = Transpose<perm = [0, 2, 1, 3]>(vs)
    s = MatMul(qt, kt)
    p = Softmax(s)
    o = MatMul(p, vt)
    ot = Transpose<perm = [0, 2, 1, 3]>(o)
    f = Reshape(ot, join)
    y = MatMul(f, wo)
}"""


def test_attention_heads_stay_and_what_moves_inside_moves_alike(model) -> None:
    parts = {name: f32(8, 8) for name in ("wq", "wk", "wv", "wo")}
    made = model(ATTENTION, split=np.array([1, 6, 2, 4]), join=np.array([1, 6, 8]), **parts)
    keys, values = couple(made.graph).free
    assert [p.node.name for p in keys.producers] == ["MatMul_0", "MatMul_3"]
    assert [p.node.name for p in values.producers] == ["MatMul_6"]
    np.testing.assert_array_equal(keys.producers[0].member.positions, [[0, 4], [1, 5], [2, 6], [3, 7]])
    assert moves_nothing_outside(made) == 8
    cut = couple(made.graph, cut=True).free  # a sum of products of activations is not cut
    assert [p.node.name for c in cut for p in c.producers] == ["MatMul_6"]


def test_channels_that_a_pad_adds_move_among_themselves(model) -> None:
    made = model(
        """g (float[1,3,2,2] x) => (float[1,2,2,2] y) {
            a = Conv(x, w0)
            p = Pad(a, pads)
            b = Conv(x, w1)
            c = Add(p, b)
            y = Conv(c, w2)
        }""",
        w0=f32(4, 3, 1, 1), w1=f32(8, 3, 1, 1), w2=f32(2, 8, 1, 1), pads=np.array([0, 1, 0, 0, 0, 3, 0, 0]),
    )  # fmt: skip
    inner, outer = couple(made.graph).free
    assert inner.consumers[0].member.positions.ravel().tolist() == [1, 2, 3, 4]
    assert outer.consumers[0].member.positions.ravel().tolist() == [0, 5, 6, 7]
    assert moves_nothing_outside(made) == 8


def test_units_that_only_look_alike_are_told_apart(model) -> None:
    """Two copies of a channel come in one order for some units and in the other for the rest."""
    made = model(
        """g (float[1,3,2,2] x) => (float[1,2,2,2] y) {
            a = Conv(x, w0)
            s = Sigmoid(a)
            c = Concat<axis = 1>(a, s)
            m = Gather<axis = 1>(c, index)
            y = Conv(m, w1)
        }""",
        w0=f32(4, 3, 1, 1), w1=f32(2, 8, 1, 1), index=np.array([0, 4, 5, 1, 2, 6, 7, 3]),
    )  # fmt: skip
    assert [c.producers[0].member.positions.ravel().tolist() for c in couple(made.graph).free] == [[0, 2], [1, 3]]
    for seed in range(4):
        moves_nothing_outside(made, seed)


PINNED = {
    "input": ("y0 = Relu(x) y = Conv(y0, w)", "is a graph input"),
    "output": ("y = Conv(x, w)", "is a graph output"),
    "unknown operator": ("a = Conv(x, w) b = LRN<size = 3>(a) y = Conv(b, v)", "LRN 'LRN_1': no rule for the operator"),
    "order matters": ("a = Conv(x, w) b = CumSum(a, one) y = Conv(b, v)", "depends on the order along it"),
    "merged with others": ("a = Conv(x, w) b = Reshape(a, mixed) c = Relu(b) d = Reshape(c, back) y = Conv(d, v)",
                           "mixes it with other axes"),
    "index read": ("a = Conv(x, w) b, i = MaxPool<kernel_shape = [1, 1]>(a) k = Cast<to = 1>(i) c = Add(b, k) y = Conv(c, v)",
                   "its further outputs are read"),
    "computed index": ("a = Conv(x, w) n = ReduceSum<keepdims = 0>(x) i = Cast<to = 7>(n) c = Gather<axis = 1>(a, i) y = Relu(c)",
                       "takes positions of it by number"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), PINNED.values(), ids=PINNED)
def test_what_is_not_known_is_pinned(model, body: str, reason: str) -> None:
    made = model(
        f"g (float[1,4,2,2] x) => (float[] y) {{ {body} }}",
        w=f32(4, 4, 1, 1), v=f32(4, 4, 1, 1), one=np.array(1), mixed=np.array([1, 2, 8, 1]), back=np.array([1, 4, 2, 2]),
    )  # fmt: skip
    coupling = couple(made.graph)
    assert not [c for c in coupling.free if c.size > 1]
    assert any(reason in c.pinned for c in coupling.classes)


def test_unknown_shapes_pin(model) -> None:
    made = model(
        "g (float[1,4,2,2] x) => (float[] y) { a = Conv(x, w) y = Conv(a, w2) }", w=f32(4, 4, 1, 1), w2=f32(4, 4, 1, 1)
    )
    assert couple(made.graph).free
    made.graph[0].outputs[0].shape = None
    assert not couple(made.graph).free


def test_what_a_subgraph_reads_is_pinned(model) -> None:
    text = """g (bool c, float[1,3,2,2] x) => (float[1,2,2,2] y) {
        a = Conv(x, w0)
        b = Relu(a)
        t = If(c) <then_branch = g1 () => (float[1,2,2,2] p) { p = Conv(b, w1) },
                   else_branch = g2 () => (float[1,2,2,2] q) { q = Conv(x, w2) }>
        d = Conv(b, w3)
        y = Add(t, d)
    }"""  # fmt: skip
    made = model(text, w0=f32(4, 3, 1, 1), w1=f32(2, 4, 1, 1), w2=f32(2, 3, 1, 1), w3=f32(2, 4, 1, 1))
    assert not [c for c in couple(made.graph).free if c.size > 1]
    assert any("is read inside a subgraph by Conv" in c.pinned for c in couple(made.graph).classes)


def test_weight_read_with_different_groups_is_pinned(model) -> None:
    made = model(
        """g (float[1,4,2,2] x) => (float[1,1,2,2] y) {
            a = Conv(x, w0)
            b = Conv<group = 2>(a, w)
            c = Conv(x, w1)
            d = Conv(c, w)
            e = Add(b, d)
            y = Conv(e, w2)
        }""",
        w0=f32(4, 4, 1, 1), w=f32(4, 2, 1, 1), w1=f32(2, 4, 1, 1), w2=f32(1, 4, 1, 1),
    )  # fmt: skip
    reasons = {c.pinned for c in couple(made.graph).classes}
    assert "'w' is read with different groups" in reasons
    moves_nothing_outside(made)


def test_only_permutations_of_free_classes_are_taken(model) -> None:
    made = model(
        "g (float[1,3,2,2] x) => (float[1,2,2,2] y) { a = Conv(x, w) y = Conv(a, v) }",
        w=f32(4, 3, 1, 1),
        v=f32(2, 4, 1, 1),
    )
    (units,) = couple(made.graph).free
    with pytest.raises(ValueError, match="not a permutation of a free class of 4 units: Conv_0"):
        permute(made.graph, [(units, np.array([0, 1, 2, 2]))])
    pinned = next(c for c in couple(made.graph).classes if not c.free)
    with pytest.raises(ValueError, match="not a permutation of a free class"):
        permute(made.graph, [(pinned, np.arange(pinned.size))])
    assert not permute(made.graph, [(units, np.arange(4))])


@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=60))
def test_components_are_those_of_the_graph(count: int, pairs: list[tuple[int, int]]) -> None:
    pairs = [(a % count, b % count) for a, b in pairs]
    graph = networkx.Graph()
    graph.add_nodes_from(range(count))
    graph.add_edges_from(pairs)
    expected = np.empty(count, int)
    for part in networkx.connected_components(graph):
        expected[list(part)] = min(part)
    a, b = np.array(pairs, int).reshape(-1, 2).T
    np.testing.assert_array_equal(components(count, a, b), expected)
