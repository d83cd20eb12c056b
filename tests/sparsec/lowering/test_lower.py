"""Lowering end to end: each rule on small graphs, random networks, and hazards, run and compared with ONNX Runtime."""

from __future__ import annotations

import re

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from networks import networks
from operators import operators
from programs import agree, parse, routes

from sparsec.errors import UnsupportedError
from sparsec.limits import Limits
from sparsec.loading.load import load_model
from sparsec.lowering import lower
from sparsec.runtimes.emulated import find_emulator
from sparsec.targets import find_target, with_precision

# Text of a graph, share of zeros, and the routes of its layers.
GRAPHS: dict[str, tuple[str, float, dict[str, str]]] = {
    "convolutions": (
        """g (float[2,6,9,11] x, float[7,6,3,3] w0, float[7] w1, float[4,6,1,1] w2, float[5,6,5,2] w3, float[8,6,9,11] w4)
        => (float[2,7,9,11] a, float[2,4,5,6] b, float[2,5,3,8] c, float[2,8,1,1] d) {
            a = Conv<pads=[1,1,1,1]>(x, w0, w1)
            b = Conv<strides=[2,2]>(x, w2)
            c = Conv<strides=[3,1], pads=[2,0,1,0], dilations=[1,3]>(x, w3)
            d = Conv(x, w4)
        }""", 0.0, {"Conv": "native"},
    ),
    "sparse convolutions": (
        """g (float[1,24,14,13] x, float[30,24,3,3] w0, float[30] w1, float[17,24,1,1] w2)
        => (float[1,30,14,13] a, float[1,17,7,7] b) {
            a = Conv<pads=[1,1,1,1]>(x, w0, w1)
            b = Conv<strides=[2,2]>(x, w2)
        }""", 0.85, {"Conv": "native"},
    ),
    "automatic padding": (
        """g (float[1,3,10,7] x, float[4,3,3,2] w0, float[4,3,4,4] w1, float[4,3,3,3] w2)
        => (float[1,4,5,4] a, float[1,4,10,7] b, float[1,4,4,5] c) {
            a = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w0)
            b = Conv<auto_pad="SAME_LOWER">(x, w1)
            c = Conv<auto_pad="VALID", strides=[2,1]>(x, w2)
        }""", 0.0, {"Conv": "native"},
    ),
    "grouped convolutions": (
        """g (float[1,12,8,7] x, float[10,6,3,3] w0, float[10] w1, float[9,4,1,1] w2, float[1,9,8,7] other)
        => (float[1,10,8,7] a, float[1,9,8,7] b) {
            a0 = Conv<pads=[1,1,1,1], group=2>(x, w0, w1)
            a = Relu(a0)
            b0 = Conv<group=3>(x, w2)
            b = Add(b0, other)
        }""", 0.6, {"Conv+Relu": "native", "Conv+Add": "native"},
    ),
    "depthwise convolutions": (
        """g (float[2,6,9,10] x, float[6,1,3,3] w0, float[6] w1, float[18,1,3,5] w2, float[1,7,20] s, float[7,1,4] w3)
        => (float[2,6,9,10] a, float[2,18,4,5] b, float[1,7,17] c) {
            a0 = Conv<pads=[1,1,1,1], group=6>(x, w0, w1)
            a = Clip(a0, zero, six)
            b = Conv<strides=[2,2], pads=[0,2,0,2], group=6>(x, w2)
            c = Conv<group=7>(s, w3)
        }""", 0.0, {"Conv+Clip": "native", "Conv": "native"},
    ),
    "convolutions in one dimension": (
        """g (float[2,5,33] x, float[8,5,3] w0, float[8] w1, float[6,5,4] w2) => (float[2,8,33] a, float[2,6,10] b) {
            a = Conv<pads=[1,1]>(x, w0, w1)
            b = Conv<strides=[3], pads=[0,2], dilations=[2]>(x, w2)
        }""", 0.3, {"Conv": "native"},
    ),
    "generic convolutions": (
        """g (float[1,2,4,5,6] x, float[3,2,2,2,2] w0, float[1,3,6,6] y, float[1,3,6,6] k, float[1,3,4,4] w1)
        => (float[1,3,3,4,5] a, float[1,1,1,1] b, float[1,4,9,9] c) {
            a = Conv(x, w0)
            b = Conv(y, k)
            c = ConvTranspose(y, w2)
        }""".replace("w1)", "w1, float[3,4,4,4] w2)"), 0.0, {"Conv": "generic", "ConvTranspose": "generic"},
    ),
    "fully connected": (
        """g (float[3,20] x, float[20,17] w0, float[17,20] w1, float[17] w2, float[1,17] w3, float[1] w4, float[3,17] o)
        => (float[3,17] a, float[3,17] b, float[3,17] c, float[3,17] d, float[3,17] e) {
            a = Gemm(x, w0)
            b = Gemm<alpha=0.5, beta=2.0, transB=1>(x, w1, w2)
            c0 = Gemm<alpha=1.5>(x, w0, w3)
            c = Relu(c0)
            d0 = Gemm(x, w0, w4)
            d = Add(o, d0)
            e0 = Gemm<beta=0.0>(x, w0, w2)
            e = Sigmoid(e0)
        }""", 0.0, {"Gemm": "native", "Gemm+Relu": "native", "Gemm+Add": "native", "Gemm+Sigmoid": "native"},
    ),
    "generic Gemm": (
        """g (float[20,3] x, float[20,17] w0, float[3,1] w1, float[3,17] y) => (float[3,17] a, float[3,17] b) {
            a = Gemm<transA=1>(x, w0)
            b = Gemm<transA=1>(x, w0, w1)
        }""", 0.0, {"Gemm": "generic"},
    ),
    "sparse fully connected": (
        """g (float[1,64] x, float[64,96] w0, float[96] w1, float[5,64] y, float[64,33] w2)
        => (float[1,96] a, float[5,33] b) {
            a = Gemm(x, w0, w1)
            b = MatMul(y, w2)
        }""", 0.9, {"Gemm": "native", "MatMul": "native"},
    ),
    "products of activations": (
        """g (float[2,3,5,8] a, float[2,3,8,6] b, float[8,6] c, float[3,6,8] d, float[1,5,8] e, float[2,3,6,8] f)
        => (float[2,3,5,6] p, float[2,3,5,6] q, float[3,5,6] r, float[2,3,5,6] s, float[2,3,5,6] t) {
            p = MatMul(a, b)
            q = MatMul(a, c)
            dt = Transpose<perm=[0,2,1]>(d)
            r = MatMul(e, dt)
            ft = Transpose<perm=[0,1,3,2]>(f)
            s0 = MatMul(a, ft)
            s1 = Div(s0, four)
            s = Relu(s1)
            t0 = Mul(b, b)
            t = MatMul(a, t0)
        }""", 0.0, {"MatMul": "native", "Transpose+MatMul": "native", "Transpose+MatMul+Div+Relu": "native"},
    ),
    "products with vectors and partial batches": (
        """g (float[2,1,5,8] a, float[1,3,8,6] b, float[8] v, float[8] w0, float[8,6] w1, float[5,8] m)
        => (float[2,3,5,6] p, float[2,1,5] q, float[6] r, float[5] s) {
            p = MatMul(a, b)
            q = MatMul(a, w0)
            r = MatMul(v, w1)
            s = MatMul(m, v)
        }""", 0.0, {"MatMul": "generic"},
    ),
    "bias of a MatMul": (
        """g (float[2,5,8] x, float[8,6] w0, float[6] w1, float[1,1,6] w2, float[5,1] w3, float[2,5,6] o)
        => (float[2,5,6] a, float[2,5,6] b, float[2,5,6] c, float[2,5,6] d) {
            a0 = MatMul(x, w0)
            a1 = Add(w1, a0)
            a = Relu(a1)
            b0 = MatMul(x, w0)
            b1 = Add(b0, w2)
            b = Add(b1, o)
            c0 = MatMul(x, w0)
            c = Add(c0, w3)
            d0 = MatMul(x, w0)
            d1 = Add(d0, w1)
            d2 = Reshape(d1, flat)
            d3 = Relu(d2)
            d = Reshape(d3, cube)
        }""", 0.0, {"MatMul+Add+Relu": "native", "MatMul+Add+Add": "native", "MatMul": "native", "Add": "native",
                    "MatMul+Add+Reshape+Relu": "native", "Reshape": "free"},
    ),
    "pooling": (
        """g (float[2,5,9,13] x, float[1,4,17] s) => (float[2,5,4,6] a, float[2,5,9,13] b, float[2,5,5,7] c,
            float[2,5,3,5] d, float[1,4,8] e, float[2,5,1,1] f, float[2,5,1,1] h, float[2,5,9,13] k) {
            a = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)
            b = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(x)
            c = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], count_include_pad=1>(x)
            d = MaxPool<kernel_shape=[4,3], strides=[3,3], ceil_mode=1>(x)
            e = MaxPool<kernel_shape=[3], strides=[2]>(s)
            f = GlobalAveragePool(x)
            h = GlobalMaxPool(x)
            k0 = MaxPool<kernel_shape=[3,3], pads=[2,2,2,2], dilations=[2,2]>(x)
            k = Relu(k0)
        }""", 0.0, {"MaxPool": "native", "AveragePool": "native", "GlobalAveragePool": "native",
                    "GlobalMaxPool": "native", "MaxPool+Relu": "native"},
    ),
    "reductions": (
        """g (float[2,5,6,7] x) => (float[2,5,1,1] a, float[2,5] b, float[1,1,1,1] c, float[2,5,6] d, float[2,1,6,7] e,
            float[2,5,1,7] f, float[2] h) {
            a = ReduceMean(x, hw)
            b = ReduceMax<keepdims=0>(x, hw)
            c = ReduceMean(x)
            d = ReduceMean<keepdims=0>(x, last)
            e = ReduceMean(x, channel)
            f = ReduceSum(x, h_only)
            h = ReduceMax<keepdims=0>(x, but_batch)
        }""", 0.0, {"ReduceMax": "native", "ReduceSum": "generic"},
    ),
    "parts of a value": (
        """g (float[1,9,4,5] x, float[8,3] y) => (float[1,3,4,5] a, float[1,6,4,5] c, float[1,4,4,5] d, float[3,3] e,
            float[8,1] f, float[1,2,4,5] h, float[1,9,2,5] k) {
            a0, b0 = Split<axis=1>(x, three_six)
            a = Relu(a0)
            c = Mul(b0, b0)
            d0 = Slice(x, three, seven, one)
            d = Sigmoid(d0)
            e = Slice(y, minus_five, minus_two, zero_axis)
            f = Slice(y, one, two, one)
            h0 = Slice(x, seven, big, one)
            h = Add(h0, h0)
            k = Slice(x, one, three, two)
        }""", 0.0, {"Split": "free", "Slice": "generic"},
    ),
    "joined values": (
        """g (float[1,4,5,5] x, float[3,4,1,1] w0, float[2,4,3,3] w1, float[2,3] u, float[2,2] v, float[1,1,5,5] w2)
        => (float[1,9,5,5] a, float[2,5] b, float[1,10,5,5] c, float[4,3] d) {
            p = Conv(x, w0)
            q = Conv<pads=[1,1,1,1]>(x, w1)
            a = Concat<axis=1>(p, x, q)
            b = Concat<axis=-1>(u, v)
            c = Concat<axis=1>(w2, a)
            d = Concat<axis=0>(u, u)
        }""", 0.0, {"Conv": "native"},
    ),
    "views": (
        """g (float[1,6,4,1] x, float[6,6,1,1] w0, float[6,4] y) => (float[1,4,6] a, float[24] b, float[1,1,6,4] c,
            float[6,4,1,1] d, float[4,6] e) {
            p = Conv(x, w0)
            q = Transpose<perm=[0,3,1,2]>(p)
            c = Relu(q)
            r = Reshape(p, flat)
            b = Tanh(r)
            s = Squeeze(p, three)
            a = Transpose<perm=[0,2,1]>(s)
            t = Unsqueeze(y, two_three)
            d = Identity(t)
            e = Transpose(y)
        }""", 0.0, {"Conv": "native", "Squeeze": "free", "Unsqueeze": "free"},
    ),
    "elementwise": (
        """g (float[2,6,5,7] x, float[2,6,1,1] s, float[6,1,1] w0, float[7] w1, float[2,6,5,7] y, float[1,1,5,1] w2,
            float[5,7] w3, float[1,6,5,7] z)
        => (float[2,6,5,7] a, float[2,6,5,7] b, float[2,6,5,7] c, float[2,6,5,7] d, float[2,6,5,7] e, float[2,6,5,7] f,
            float[2,6,5,7] h, float[2,6,5,7] k, float[2,6,5,7] l, float[2,6,5,7] m) {
            a = Mul(x, s)
            b = Sub(w0, x)
            y1 = Abs(y)
            y2 = Add(y1, three_f)
            c0 = Div(x, y2)
            c = Relu(c0)
            d = Add(x, w1)
            e = Mul(w2, x)
            f = Add(w3, x)
            h = Sub(three_f, x)
            k0 = Add(x, y)
            k = HardSwish(k0)
            l = Add(z, x)
            m = Div(s, y2)
        }""", 0.0, {"Mul": "native", "Sub": "native"},
    ),
    "activations": (
        """g (float[3,70] x) => (float[3,70] a, float[3,70] b, float[3,70] c, float[3,70] d, float[3,70] e, float[3,70] f,
            float[3,70] h, float[3,70] k, float[3,70] l, float[3,70] m, float[3,70] n, float[3,70] o, float[3,70] p) {
            a = Relu(x)
            b = Clip(x, minus_f, six)
            c = LeakyRelu<alpha=0.3>(x)
            d = HardSwish(x)
            e = HardSigmoid<alpha=0.3, beta=0.4>(x)
            f = Sigmoid(x)
            h = Tanh(x)
            k = Gelu(x)
            l = Gelu<approximate="tanh">(x)
            m = Elu(x)
            n0 = Sigmoid(x)
            n = Mul(x, n0)
            o = Clip(x)
            p = Clip(x, six, minus_f)
        }""", 0.0, {"Relu": "native", "Elu": "generic", "Gelu": "native"},
    ),
    "integers and flags": (
        """g (float[2,5] x, int64[2,5] i, bool[2,5] f) => (int64[2,5] a, float[2,5] b, bool[2,5] c, float[2,5] d, int64[4,5] e,
            bool[1,5] h) {
            a = Add(i, i)
            b = Cast<to=1>(i)
            c = Not(f)
            d = Where(f, x, b)
            e = Concat<axis=0>(i, a)
            h = Slice(f, one, two, zero_axis)
        }""", 0.0, {"Add": "generic", "Slice": "free"},
    ),
}  # fmt: skip

CONSTANTS: dict[str, float | list[int]] = {
    "zero": 0.0, "six": 6.0, "minus_f": -0.5, "three_f": 3.0,
    "four": 4.0, "flat": [-1], "cube": [2, 5, 6], "hw": [2, 3], "last": [-1], "channel": [1], "h_only": [2],
    "but_batch": [1, -2, 3], "three_six": [3, 6], "one": [1], "two": [2], "three": [3], "seven": [7], "big": [2**62],
    "minus_five": [-5], "minus_two": [-2], "zero_axis": [0], "two_three": [2, 3],
}  # fmt: skip


def graph(text: str, zeros: float = 0.0) -> onnx.ModelProto:
    """`parse`, with those of CONSTANTS that the text uses."""
    lines = []
    for name, value in CONSTANTS.items():
        if re.search(rf"[ (]{name}[,)]", text):
            kind, numbers = (f"int64[{len(value)}]", value) if isinstance(value, list) else ("float", [value])
            lines.append(f"{kind} {name} = {{{', '.join(map(str, numbers))}}}")
    head, brace, body = text.partition(" {")
    return parse(head + (f" <{', '.join(lines)}>" if lines else "") + brace + body, zeros)


ARM = [find_target("arm"), with_precision(find_target("arm"), "f16")] if find_emulator() else []


def target_id(target):
    return f"{target.name}-{target.precision}"


@pytest.mark.parametrize("target", [find_target("host"), *ARM], ids=target_id)
@pytest.mark.parametrize("name", GRAPHS)
def test_rule(name, target):
    text, zeros, expected = GRAPHS[name]
    program = agree(graph(text, zeros), target)
    found = routes(program)
    assert {op: found.get(op) for op in expected} == expected


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks())
def test_random_networks(model):
    agree(model)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(operators())
def test_random_operators(model):
    agree(model)


@pytest.mark.parametrize("target", ARM[:1], ids=target_id)
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(model=networks(), others=operators())
def test_random_models_on_arm(target, model, others):
    agree(model, target)
    agree(others, target)


def test_unsupported_nodes_are_named_all_at_once() -> None:
    """Nodes without a route, in runs that kernels of our own separate, stand in one error."""
    model = load_model(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 21]> g (float[4,4] x) => (float a, float b)'
            " { a = Det(x) y = Relu(x) b = Det(y) }"
        )
    )
    with pytest.raises(UnsupportedError, match=r"for 2 nodes: .*Det_0.*Det_2") as caught:
        lower(model, find_target("host"))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("g (float[65536,32768] x) => (float[65536,32768] y) { y = Relu(x) }", ["'x' has 65536x32768 = 2,147,483,648", "'y'"]),
        ("g (float[1,46400] x, float[46400,1] z) => (float[1,46400,46400] y) { y = Mul(x, z) }", ["'y'"]),
        # Its tensors are small enough; the padded copy that its kernel reads is not.
        ("""g (float[4194304,1,22,22] x, float[1,1,3,3] w) => (float[4194304,1,22,22] y) {
            y = Conv<pads = [1,1,1,1]>(x, w) }""", ["/prepared' has 4194304x1x1x24x24"]),
    ],
)  # fmt: skip
def test_tensors_beyond_32_bit_indices_are_refused(text, named):
    with pytest.raises(UnsupportedError, match="kernels index at most") as caught:
        lower(load_model(parse(text), limits=Limits(elements=1 << 40, isolate=0)), find_target("host"))
    assert "\n" not in str(caught.value)
    for name in named:
        assert name in str(caught.value)
