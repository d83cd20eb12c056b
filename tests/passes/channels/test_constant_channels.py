from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.passes.channels.constant_channels import constant_channels
from sparsec.passes.layers import weighted_layers
from sparsec.passes.normalization.fold_constants import quiet_session
from tests.channel_networks import channel_networks

RNG = np.random.default_rng(17)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def observed(made: ir.Model, runs: int = 3) -> dict[str, list[np.ndarray]]:
    """Every value of the model on random inputs."""
    proto = ir.to_proto(made)
    names = {o.name for o in proto.graph.output}
    for node in proto.graph.node:
        for name in node.output:
            if name not in names:
                proto.graph.output.append(onnx.ValueInfoProto(name=name))
    session = quiet_session(proto.SerializeToString())
    outputs = [o.name for o in session.get_outputs()]
    found: dict[str, list[np.ndarray]] = {name: [] for name in outputs}
    rng = np.random.default_rng(0)
    for _ in range(runs):
        feeds = {x.name: 3 * rng.standard_normal(x.shape).astype(np.float32) for x in session.get_inputs()}
        for name, array in zip(outputs, session.run(None, feeds), strict=True):
            found[name].append(array)
    return found


def holds(made: ir.Model) -> int:
    """Each constant that is claimed is what ONNX Runtime computes; how many there were."""
    values = observed(made)
    count = 0
    for value, channels in constant_channels(made.graph).items():
        for array in values[value.name]:
            assert array.shape[channels.axis] == channels.values.size
            rows = np.moveaxis(array, channels.axis, 0).reshape(channels.values.size, -1)
            for row, claimed in zip(rows, channels.values, strict=True):
                if not np.isnan(claimed):
                    np.testing.assert_allclose(row, claimed, rtol=1e-4, atol=1e-5)
                    count += 1
    return count


@settings(max_examples=80, deadline=None)
@given(proto=channel_networks(), seed=st.integers(0, 5))
def test_what_is_claimed_is_computed(proto, seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = ir.from_proto(proto)
    for layer in weighted_layers(made):
        weight = layer.read().copy()
        weight[rng.random(len(weight)) < 0.5] = 0
        layer.write(weight)
    holds(made)


def test_constants_are_followed_through_a_network(model) -> None:
    made = model(
        """g (float[2,3,6,6] x) => (float[2,4] y) {
            a = Conv<pads = [1, 1, 1, 1]>(x, w, b)
            n = BatchNormalization(a, s, t, t, s)
            r = HardSwish(n)
            p = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(r)
            c = Concat<axis = 1>(p, p)
            d = Conv<group = 8>(c, g)
            q = Pad(d, pads)
            m = ReduceMean(q, axes)
            f = Flatten(m)
            y = Gemm<transB = 1>(f, v)
        }""",
        w=np.where(np.arange(4)[:, None, None, None] % 2, 0, f32(4, 3, 3, 3)).astype(np.float32),
        b=f32(4), s=np.abs(f32(4)), t=f32(4), g=f32(8, 1, 3, 3), pads=np.array([0, 1, 0, 0, 0, 0, 0, 0]),
        axes=np.array([2, 3]), v=np.where(np.arange(9) % 2, 0, f32(4, 9)).astype(np.float32),
    )  # fmt: skip
    known = {value.name: channels for value, channels in constant_channels(made.graph).items()}
    expected = {"a": 2, "n": 2, "r": 2, "p": 2, "c": 4, "d": 4, "q": 5, "m": 5, "f": 5, "y": 4}
    assert {name: int((~np.isnan(k.values)).sum()) for name, k in known.items()} == expected
    assert holds(made) == 3 * sum(expected.values())


UNKNOWN = {
    "live row": "a = Conv(x, full) y = Relu(a)",
    "bias is computed": "s = ReduceMean<keepdims = 0>(x, axes) k = Squeeze(s) a = Conv(x, zero, k) y = Relu(a)",
    "unknown operator": "a = Conv(x, zero, b) y = LRN<size = 3>(a)",
    "added to what varies": "a = Conv(x, zero, b) y = Add(a, x)",
    "gate that varies": "a = Conv(x, zero, b) s = Sigmoid(x) y = Mul(a, s)",
    "reflected": 'a = Conv(x, zero, b) k = Relu(x) c = Sub(k, a) y = Pad<mode = "reflect">(c, pads)',
}


@pytest.mark.parametrize("body", UNKNOWN.values(), ids=UNKNOWN)
def test_what_varies_is_not_claimed(model, body: str) -> None:
    made = model(
        f"g (float[1,4,3,3] x) => (float[] y) {{ {body} }}",
        full=f32(4, 4, 1, 1), zero=np.zeros((4, 4, 1, 1), np.float32), b=np.ones(4, np.float32),
        axes=np.array([2, 3]), pads=np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    )  # fmt: skip
    assert made.graph.outputs[0] not in constant_channels(made.graph)


@pytest.mark.parametrize(("bias", "claimed"), [(0.0, True), (1.0, False)])
def test_padding_shows_a_constant_that_is_not_zero(model, bias: float, claimed: bool) -> None:
    made = model(
        "g (float[1,4,3,3] x) => (float[] y) { a = Conv(x, zero, b) y = Conv<pads = [1, 1, 1, 1]>(a, w) }",
        zero=np.zeros((4, 4, 1, 1), np.float32), b=np.full(4, bias, np.float32), w=f32(2, 4, 3, 3),
    )  # fmt: skip
    assert (made.graph.outputs[0] in constant_channels(made.graph)) == claimed
