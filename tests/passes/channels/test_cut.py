from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.passes.channels.coupling import couple
from sparsec.passes.channels.cut import cut, silence
from sparsec.rewriting.pipeline import check_equal
from tests.channel_networks import channel_networks

RNG = np.random.default_rng(5)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def choose(made: ir.Model, seed: int, share: float):
    """A random choice among the units of every free class that a weight reads, one left at least."""
    rng = np.random.default_rng(seed)
    removals = []
    for units in couple(made.graph, cut=True).free:
        removed = rng.random(units.size) < share
        removed[rng.integers(units.size)] = False
        if units.consumers:
            removals.append((units, removed))
    return removals


def equal_to_twin(proto: onnx.ModelProto, seed: int = 0, share: float = 0.5) -> tuple[ir.Model, int]:
    """Cut and masked model agree in ONNX Runtime; the cut model and how many units were removed."""
    whole, twin = ir.from_proto(proto), ir.from_proto(proto)
    silence(twin.graph, choose(twin, seed, share))
    removals = choose(whole, seed, share)
    cut(whole.graph, removals)
    after = ir.to_proto(whole)
    onnx.checker.check_model(after, full_check=True)
    check_equal(ir.to_proto(twin).SerializeToString(), after.SerializeToString(), "cut")
    return whole, sum(int(removed.sum()) for _, removed in removals)


@settings(max_examples=150, deadline=None)
@given(proto=channel_networks(), seed=st.integers(0, 3), share=st.sampled_from([0.3, 0.6, 0.9]))
def test_cut_network_equals_the_masked_one(proto, seed: int, share: float) -> None:
    equal_to_twin(proto, seed, share)


def test_what_counts_channels_follows(model) -> None:
    made = model(
        """g (float[1,3,4,4] x) => (float[1,2,8,8] y) {
            a = Conv(x, w0)
            d = Conv<group = 8, pads = [1, 1, 1, 1]>(a, w1)
            p = Pad(d, pads)
            s, t = Split<axis = 1, num_outputs = 2>(p)
            u = Slice(t, start, end, axis)
            v = Conv(u, w2)
            m = Conv(s, w3)
            e = Reshape(d, flat)
            f = Relu(e)
            h = Reshape(f, back)
            r = Resize<mode = "nearest">(h, none, none, sizes)
            k = Conv(r, w4)
            z = Add(v, m)
            q = ReduceMean<keepdims = 1>(z, all)
            y = Add(k, q)
        }""",
        w0=f32(8, 3, 1, 1), w1=f32(8, 1, 3, 3), w2=f32(2, 4, 1, 1), w3=f32(2, 6, 1, 1), w4=f32(2, 8, 1, 1),
        pads=np.array([0, 2, 0, 0, 0, 2, 0, 0]), start=np.array([1]), end=np.array([5]), axis=np.array([1]),
        flat=np.array([1, 8, 16]), back=np.array([1, 8, 4, 4]), none=np.zeros(0, np.float32),
        sizes=np.array([1, 8, 8, 8]), all=np.array([1, 2, 3]),
    )  # fmt: skip
    after, count = equal_to_twin(ir.to_proto(made), seed=1, share=0.4)
    assert count > 0
    nodes = {node.name: node for node in after.graph}
    left = after.graph.initializers["w0"].const_value.shape[0]
    assert left < 8
    assert nodes["Conv_1"].attributes.get_int("group") == left
    assert nodes["Reshape_7"].inputs[1].const_value.numpy().tolist() == [1, left, 16]
    assert nodes["Resize_10"].inputs[3].const_value.numpy().tolist() == [1, left, 8, 8]
    assert "flat" not in after.graph.initializers


def test_a_constant_that_others_read_is_not_written_over(model) -> None:
    """One shape for two Reshapes, of which one is cut."""
    made = model(
        """g (float[1,8,2,2] x) => (float[1,2,2,2] y) {
            a = Conv(x, w0)
            b = Reshape(a, shape)
            c = Relu(b)
            d = Reshape(c, back)
            e = Conv(d, w1)
            f = Reshape(x, shape)
            g2 = Reshape(f, back)
            h = Conv(g2, w1)
            y = Add(e, h)
        }""",
        w0=f32(8, 8, 1, 1), w1=f32(2, 8, 1, 1), shape=np.array([1, 8, 4]), back=np.array([1, 8, 2, 2]),
    )  # fmt: skip
    equal_to_twin(ir.to_proto(made))  # w1 reads the graph input too: nothing may be cut, and nothing breaks


def test_refusals(model) -> None:
    made = model(
        "g (float[1,3,2,2] x) => (float[1,2,2,2] y) { a = Conv(x, w) y = Conv(a, v) }",
        w=f32(4, 3, 1, 1), v=f32(2, 4, 1, 1),
    )  # fmt: skip
    (units,) = couple(made.graph, cut=True).free
    with pytest.raises(ValueError, match="nothing would be left of axis"):
        cut(made.graph, [(units, np.ones(4, bool))])
    with pytest.raises(ValueError, match="not a choice among the units of a free class: Conv_0"):
        cut(made.graph, [(units, np.ones(3, bool))])
    pinned = next(c for c in couple(made.graph, cut=True).classes if not c.free)
    with pytest.raises(ValueError, match="not a choice among the units"):
        cut(made.graph, [(pinned, np.zeros(pinned.size, bool))])


MIXED = {
    "softmax over channels": "s = Softmax<axis = 1>(a) y = Conv(s, v)",
    "mean over channels": "m = ReduceMean(a, one) s = Sub(a, m) y = Conv(s, v)",
    "normalized over channels": """t = Transpose<perm = [0, 2, 3, 1]>(a) n = LayerNormalization(t, g)
        u = Transpose<perm = [0, 3, 1, 2]>(n) y = Conv(u, v)""",
    "products of activations": """f = Reshape(a, flat) t = Transpose<perm = [0, 2, 1]>(f) p = MatMul(t, f)
        q = ReduceMean(p, two) r = MatMul(q, k) y = Reshape(r, out)""",
}


@pytest.mark.parametrize("body", MIXED.values(), ids=MIXED)
def test_what_mixes_channels_is_not_cut(model, body: str) -> None:
    """Permuting is free, removing would change a mean, a sum or a norm."""
    made = model(
        f"g (float[1,3,2,2] x) => (float[] y) {{ a = Conv(x, w) {body} }}",
        w=f32(4, 3, 1, 1), v=f32(2, 4, 1, 1), g=f32(4), one=np.array([1]), two=np.array([2]),
        flat=np.array([1, 4, 4]), k=f32(1, 8), out=np.array([1, 2, 4, 4]),
    )  # fmt: skip
    assert any(c.size > 1 for c in couple(made.graph).free)
    assert not [c for c in couple(made.graph, cut=True).free if c.producers]
