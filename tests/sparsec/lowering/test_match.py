"""Fusion on ONNX text: what becomes one layer, and above all what must not."""

from __future__ import annotations

import math

import onnx_ir as ir
import pytest
from programs import agree, parse

from sparsec.kernels.epilogue import NONE, Activation
from sparsec.loading.load import load_model
from sparsec.lowering import schedule
from sparsec.lowering.match import Group, fuse
from sparsec.lowering.rules.base import Taken
from sparsec.targets import find_target

CONV = "g (float[1,4,5,5] x, float[4,4,1,1] w0, float[1,4,5,5] o) => (float[1,4,5,5] y"
# Scalars that activations are made of.
NUMBERS = """<float zero = {0.0}, float one = {1.0}, float three = {3.0}, float six = {6.0}, float half = {0.5},
    float two = {2.0}, float sixth = {0.16666667}, float root = {1.4142135}, float inverse_root = {0.70710677},
    float cubic = {0.044715}, float sqrt_2_pi = {0.7978846}, float[1,1,1,1] three4 = {3.0}, float nearly = {2.9},
    float minus = {-1.5}>"""


def graph_of(body: str, outputs: str = "", head: str = CONV) -> ir.Graph:
    """A Conv of x by w0 called c, then `body`, which makes y."""
    numbers = "".join(NUMBERS.splitlines())
    return load_model(parse(f"{head}{outputs}) {numbers} {{\n c = Conv(x, w0)\n {body}\n}}")).graph


def group_of(body: str, outputs: str = "", head: str = CONV) -> Group:
    """The group of that Conv."""
    graph = graph_of(body, outputs, head)
    return fuse(next(node for node in graph if node.op_type == "Conv"), set())


def layers_of(graph: ir.Graph) -> list[str]:
    """What runs, in order: `Conv+Relu`, and `(Op)` for the generic route."""
    found = []
    for item in schedule(graph, find_target("host")):
        found += [item.group.op] if isinstance(item, Taken) else [f"({node.op_type})" for node, _ in item]
    return found


HARDSWISH = {
    "divided last": "s = Add(c, three) t = Clip(s, zero, six) m = Mul(c, t) y = Div(m, six)",
    "multiplied last": "s = Add(three, c) t = Clip(s, zero, six) m = Mul(t, c) y = Mul(m, sixth)",
    "gate divided": "s = Add(c, three4) t = Clip(s, zero, six) d = Div(t, six) y = Mul(c, d)",
    "gate multiplied": "s = Add(c, three) t = Clip(s, zero, six) d = Mul(sixth, t) y = Mul(d, c)",
    "input divided": "s = Add(c, three) t = Clip(s, zero, six) d = Div(c, six) y = Mul(d, t)",
    "hard sigmoid": "s = HardSigmoid<alpha=0.16666667, beta=0.5>(c) y = Mul(c, s)",
}
GELU = {
    "halved last": "a = Div(c, root) e = Erf(a) p = Add(e, one) m = Mul(c, p) y = Mul(m, half)",
    "halved first": "h = Mul(c, half) a = Mul(c, inverse_root) e = Erf(a) p = Add(one, e) y = Mul(h, p)",
    "halved gate": "a = Div(c, root) e = Erf(a) p = Add(e, one) g = Div(p, two) y = Mul(g, c)",
}
GELU_TANH = {
    "power": "q = Pow(c, three) k = Mul(q, cubic) s = Add(c, k) t = Mul(s, sqrt_2_pi) h = Tanh(t) p = Add(h, one) "
             "m = Mul(c, p) y = Mul(m, half)",
    "products": "q = Mul(c, c) r = Mul(q, c) k = Mul(r, cubic) s = Add(c, k) t = Mul(s, sqrt_2_pi) h = Tanh(t) "
                "p = Add(h, one) m = Mul(half, c) y = Mul(m, p)",
}  # fmt: skip
ONE_NODE = {
    "y = Relu(c)": Activation("relu"),
    "y = Clip(c, zero, six)": Activation("clip", 0.0, 6.0),
    "y = Clip(c, zero)": Activation("clip", 0.0, math.inf),
    "y = Clip(c, , six)": Activation("clip", -math.inf, 6.0),
    "y = Clip(c, minus, six)": Activation("clip", -1.5, 6.0),
    "y = LeakyRelu(c)": Activation("leaky_relu", 0.01),
    "y = LeakyRelu<alpha=0.5>(c)": Activation("leaky_relu", 0.5),
    "y = HardSigmoid<alpha=0.5>(c)": Activation("hardsigmoid", 0.5, 0.5),
    "y = HardSwish(c)": Activation("hardswish"),
    "y = Sigmoid(c)": Activation("sigmoid"),
    "y = Tanh(c)": Activation("tanh"),
    "y = Gelu(c)": Activation("gelu"),
    'y = Gelu<approximate="tanh">(c)': Activation("gelu_tanh"),
    "s = Sigmoid(c) y = Mul(c, s)": Activation("silu"),
    "s = Sigmoid(c) y = Mul(s, c)": Activation("silu"),
    **dict.fromkeys(HARDSWISH.values(), Activation("hardswish")),
    **dict.fromkeys(GELU.values(), Activation("gelu")),
    **dict.fromkeys(GELU_TANH.values(), Activation("gelu_tanh")),
}


@pytest.mark.parametrize("body", ONE_NODE)
def test_activation(body):
    group, expected = group_of(body), ONE_NODE[body]
    assert group.activation.kind == expected.kind
    assert (group.activation.alpha, group.activation.beta) == pytest.approx((expected.alpha, expected.beta))
    assert group.output.name == "y"
    assert len(group.nodes) == 1 + body.count("=") - body.count("alpha=") - body.count("beta=") - body.count(
        "approximate="
    )
    assert group.residual == "none"


NOT_FUSED = {
    "read twice": "r = Relu(c) y = Add(r, c)",
    "read twice by one node": "y = Mul(c, c)",
    "bounds that exchange": "y = Clip(c, six, zero)",
    "bound computed": "m = ReduceMax<keepdims=0>(x) y = Clip(c, zero, m)",
    "hard swish with another shift": "s = Add(c, nearly) t = Clip(s, zero, six) m = Mul(c, t) y = Div(m, six)",
    "hard swish with another bound": "s = Add(c, three) t = Clip(s, zero, three) m = Mul(c, t) y = Div(m, six)",
    "hard swish with another scale": "s = Add(c, three) t = Clip(s, zero, six) m = Mul(c, t) y = Div(m, three)",
    "hard swish divided into": "s = Add(c, three) t = Clip(s, zero, six) m = Mul(c, t) y = Div(six, m)",
    "gate of another value": "s = Sigmoid(o) y = Mul(c, s)",
    "silu, its gate read elsewhere": "s = Sigmoid(c) m = Mul(c, s) y = Add(m, s)",
    "silu scaled": "s = Sigmoid(c) m = Mul(c, s) n = Mul(m, two) y = Add(n, c)",
    "gelu with another root": "a = Div(c, two) e = Erf(a) p = Add(e, one) m = Mul(c, p) y = Mul(m, half)",
    "gelu with another one": "a = Div(c, root) e = Erf(a) p = Add(e, two) m = Mul(c, p) y = Mul(m, half)",
    "gelu not halved": "a = Div(c, root) e = Erf(a) p = Add(e, one) y = Mul(c, p)",
    "gelu_tanh with a square": "q = Pow(c, two) k = Mul(q, cubic) s = Add(c, k) t = Mul(s, sqrt_2_pi) h = Tanh(t) "
                               "p = Add(h, one) m = Mul(c, p) y = Mul(m, half)",
    "multiplied, not added": "y = Mul(c, o)",
    "subtracted": "y = Sub(c, o)",
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_FUSED)
def test_not_fused(name):
    group = group_of(NOT_FUSED[name])
    assert (group.op, group.activation, group.residual) == ("Conv", NONE, "none")
    numbers = "".join(NUMBERS.splitlines())
    agree(parse(f"{CONV}) {numbers} {{\n c = Conv(x, w0)\n {NOT_FUSED[name]}\n}}"))


def test_an_output_in_the_middle_is_not_fused_through():
    assert group_of("y = Relu(c)", ", float[1,4,5,5] c").op == "Conv"
    group = group_of("r = Relu(c) y = Add(r, o)", ", float[1,4,5,5] r")
    assert (group.op, group.output.name) == ("Conv+Relu", "r")
    assert group_of("s = Sigmoid(c) y = Mul(c, s)", ", float[1,4,5,5] s").op == "Conv"
    assert group_of("a = Add(c, o) y = Relu(a)", ", float[1,4,5,5] a").op == "Conv+Add"


@pytest.mark.parametrize(
    ("body", "op", "residual"),
    [
        ("y = Add(c, o)", "Conv+Add", "before"),
        ("y = Add(o, c)", "Conv+Add", "before"),
        ("a = Add(o, c) y = Relu(a)", "Conv+Add+Relu", "before"),
        ("a = Relu(c) y = Add(a, o)", "Conv+Relu+Add", "after"),
        ("a = Relu(c) b = Add(a, o) y = Relu(b)", "Conv+Relu+Add", "after"),
        ("a = Add(c, o) s = Sigmoid(a) y = Mul(s, a)", "Conv+Add+Sigmoid+Mul", "before"),
        ("y = Add(c, x)", "Conv+Add", "before"),
        ("a = Add(c, o) b = Add(a, x) y = Relu(b)", "Conv+Add", "before"),
    ],
)
def test_residual(body, op, residual):
    group = group_of(body)
    assert (group.op, group.residual) == (op, residual)
    assert group.other is not None
    assert group.other.name in ("o", "x")


@pytest.mark.parametrize("shape", ["1,4,1,1", "1,4,5,1", "5", "1,1,5,5"])
def test_what_broadcasts_is_no_residual(shape):
    assert group_of("y = Add(c, o)", head=CONV.replace("[1,4,5,5] o", f"[{shape}] o")).op == "Conv"


def test_a_sum_that_is_wider_than_the_layer_is_no_residual():
    head = "g (float[1,4,5,5] x, float[4,4,1,1] w0, float[3,4,5,5] o) => (float[3,4,5,5] y"
    assert group_of("y = Add(c, o)", head=head).op == "Conv"


@pytest.mark.parametrize("name", ["w5", "w6"])
def test_a_constant_is_no_residual(name):
    head = CONV.replace(") =>", ", float[1,4,5,5] w5, float[5] w6) =>")
    assert group_of(f"y = Add(c, {name})", head=head).other is None


def test_one_sum_of_two_convolutions_is_fused_once():
    graph = graph_of("d = Conv(o, w0) a = Add(c, d) y = Relu(a)")
    assert layers_of(graph) == ["Conv", "Conv+Add+Relu"]
    agree(parse(CONV + ") { c = Conv(x, w0) d = Conv(o, w0) a = Add(c, d) y = Relu(a) }"))


def test_a_sum_waits_for_its_later_side():
    """The first convolution takes the Add, so it runs behind the second."""
    graph = graph_of("d0 = Conv(o, w0) d = Tanh(d0) e = Conv(d, w0) a = Relu(c) y = Add(e, a)")
    layers = layers_of(graph)
    assert sorted(layers) == ["Conv", "Conv+Relu+Add", "Conv+Tanh"]
    assert layers[-1] == "Conv+Relu+Add"


def test_a_sum_with_itself_is_no_residual():
    assert group_of("y = Add(c, c)").op == "Conv"


def test_through_a_reshape():
    """A view between is part of the layer only if something behind it is."""
    shapes = "<int64[3] cube = {1, 4, 25}, int64[4] back = {1, 4, 5, 5}>"
    head = f"g (float[1,4,5,5] x, float[4,4,1,1] w0, float[1,4,25] o) => (float[1,4,25] y) {shapes}"

    def layers(body: str) -> list[str]:
        return layers_of(load_model(parse(f"{head} {{ c = Conv(x, w0) {body} }}")).graph)

    assert layers("r = Reshape(c, cube) y = Relu(r)") == ["Conv+Reshape+Relu"]
    assert layers("r = Reshape(c, cube) y = Add(r, o)") == ["Conv+Reshape+Add"]
    assert layers("y = Reshape(c, cube)") == ["Conv", "Reshape"]
    assert layers("r = Reshape(c, cube) y = Mul(r, r)") == ["Conv", "Reshape", "Mul"]


def matmul_layers(body: str, shape: str = "2,3,6") -> list[str]:
    text = "g (float[2,3,4] x, float[4,6] w0, float[6] w1, float[1,1,6] w2, float[3,1] w3, float[3,6] w4, float[1] w5, "
    text += f"float[6] v, float[1,1,1,6] w6, float[2,3,6] o) => (float[{shape}] y) {{ c = MatMul(x, w0) {body} }}"
    return layers_of(load_model(parse(text)).graph)


def test_bias_of_a_product():
    assert matmul_layers("y = Add(c, w1)") == ["MatMul+Add"]
    assert matmul_layers("a = Add(w2, c) y = Relu(a)") == ["MatMul+Add+Relu"]
    assert matmul_layers("a = Add(w2, c) b = Add(o, a) y = Relu(b)") == ["MatMul+Add+Add+Relu"]
    assert matmul_layers("a = Add(c, o) y = Add(a, w1)") == ["MatMul+Add", "Add"]


@pytest.mark.parametrize("other", ["w3", "w4", "w5", "v"])
def test_no_bias_of_a_product(other):
    assert matmul_layers(f"y = Add(c, {other})") == ["MatMul", "Add"]


def test_a_bias_that_adds_an_axis_is_none():
    assert matmul_layers("y = Add(c, w6)", "1,2,3,6") == ["MatMul", "(Add)"]


def test_nothing_is_fused_into_two_layers():
    """A decomposed activation behind an Add that another layer took stays whole."""
    body = "a = Add(c, o) s = Add(a, three) t = Clip(s, zero, six) m = Mul(a, t) y = Div(m, six)"
    assert layers_of(graph_of(body)) == ["Conv+Add+Add+Clip+Mul+Div"]
    alone = parse("g (float[2,9] x, float[2,9] o) => (float[2,9] y, float[2,9] z) " + "".join(NUMBERS.splitlines()) + """{
        a = Add(x, o) s = Add(a, three) t = Clip(s, zero, six) m = Mul(a, t) y = Div(m, six) z = Mul(m, o)
    }""")  # fmt: skip
    assert layers_of(load_model(alone).graph) == ["Add", "Add+Clip", "Mul", "Div", "Mul"]
    agree(alone)


@pytest.mark.parametrize(
    "body", [*HARDSWISH.values(), *GELU.values(), *GELU_TANH.values(), "s = Sigmoid(c) y = Mul(c, s)"]
)
def test_an_activation_alone_is_one_layer(body):
    """The same forms, behind an input instead of a layer."""
    text = f"g (float[3,7] c) => (float[3,7] y) {''.join(NUMBERS.splitlines())} {{ {body.replace('three4', 'three')} }}"
    model = parse(text)
    assert len(layers_of(load_model(model).graph)) == 1
    agree(model)
