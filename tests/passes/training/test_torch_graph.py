"""The torch interpreter against ONNX Runtime: every operator it knows, random operators and networks, the whole zoo."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from networks import networks
from operators import operators

from sparsec.errors import UnsupportedError
from sparsec.loading.load import load_model, model_bytes
from sparsec.models import BUILDERS, build
from sparsec.passes.normalization.fold_constants import FoldConstants, quiet_session
from sparsec.proving.tolerance import derive_tolerance
from sparsec.rewriting.pipeline import ROUNDED_AGAIN, relative_error

torch = pytest.importorskip("torch", reason="needs the extra [torch]; make test-torch runs this")

from sparsec.passes.training.torch_graph import TorchGraph  # noqa: E402
from sparsec.passes.training.torch_ops import OPERATORS  # noqa: E402
from sparsec.passes.training.torch_recurrent import RECURRENT  # noqa: E402

DATA = os.environ.get("SPARSEC_DATA")
RNG = np.random.default_rng(5)

# Operator -> bodies of a graph over x float[2,6,9,8], p (the same shape, positive), r float[3,4]; `shape = values` after
# the bar are integer constants. One body a case.
CASES: dict[str, list[str]] = {
    **{op: [f"y = {op}(x)"] for op in (
        "Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "HardSwish", "Mish", "Neg", "Relu", "Round", "Sigmoid", "Sign", "Sin",
        "Softplus", "Softsign", "Tanh", "Identity", "GlobalAveragePool", "GlobalMaxPool",
    )},
    **{op: [f"y = {op}(p)"] for op in ("Log", "Reciprocal", "Sqrt")},
    **{op: [f"y = {op}(x)", f"y = {op}<alpha = 0.3>(x)"] for op in (
        "Celu", "Elu", "LeakyRelu", "ThresholdedRelu", "HardSigmoid", "Selu",
    )},
    "Swish": [],  # of opset 24, see test_swish
    "RMSNormalization": [],  # of opset 23
    "Gelu": ["y = Gelu(x)", 'y = Gelu<approximate = "tanh">(x)'],
    "Dropout": ["y = Dropout(x)"],
    "Clip": ["y = Clip(x, low, high)", "y = Clip(x, low)", "y = Clip(x, , high)", "y = Clip(x)"],
    "Cast": ["i = Cast<to = 7>(x) y = Cast<to = 1>(i)", "i = Cast<to = 9>(x) y = Cast<to = 1>(i)"],
    **{op: [f"y = {op}(x, p)", f"y = {op}(x, c)", f"y = {op}(c, x)"] for op in ("Add", "Sub", "Mul", "Max", "Min")},
    "Div": ["y = Div(x, p)", "i = Cast<to = 7>(x) j = Div(i, seven) y = Cast<to = 1>(j)"],
    "Pow": ["y = Pow(p, x)", "y = Pow(x, three)"],
    "PRelu": ["y = PRelu(x, c)"],
    "Sum": ["y = Sum(x, p, c)"], "Mean": ["y = Mean(x, p, c)"],
    **{op: [f"b = {op}(x, p) y = Where(b, x, p)"] for op in (
        "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual",
    )},
    "Where": ["b = Greater(x, c) y = Where(b, c, x)"],
    "Not": ["b = Greater(x, c) n = Not(b) y = Cast<to = 1>(n)"],
    "And": ["a = Greater(x, c) b = Less(x, p) n = And(a, b) y = Cast<to = 1>(n)"],
    "Or": ["a = Greater(x, p) b = Less(x, c) n = Or(a, b) y = Cast<to = 1>(n)"],
    "Conv": [
        "y = Conv(x, w3, b4)", "y = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, w3)",
        "y = Conv<pads = [2, 0, 1, 3], dilations = [2, 1]>(x, w3)", 'y = Conv<auto_pad = "SAME_UPPER", strides = [2, 3]>(x, w3)',
        'y = Conv<auto_pad = "SAME_LOWER", strides = [2, 3]>(x, w3)', "y = Conv<group = 6, pads = [1, 1, 1, 1]>(x, wd)",
        "r1 = Reshape(x, to3) y = Conv<pads = [1, 1]>(r1, w1d)",
        "r1 = Reshape(x, to5) y = Conv<pads = [1, 1, 1, 1, 1, 1]>(r1, w3d)",
    ],
    "ConvTranspose": [
        "y = ConvTranspose(x, wt, b5)", "y = ConvTranspose<strides = [2, 3], pads = [1, 0, 2, 1], output_padding = [1, 2]>(x, wt)",
        "y = ConvTranspose<group = 2, dilations = [2, 1]>(x, wt)",
        'y = ConvTranspose<strides = [2, 2], auto_pad = "SAME_UPPER">(x, wt)',
        "y = ConvTranspose<strides = [2, 2], output_shape = [18, 17]>(x, wt)",
    ],
    "Einsum": ['y = Einsum<equation = "nchw,ck->nkhw">(x, m)'],
    "Gemm": [
        "f = Flatten(x) y = Gemm<alpha = 0.5, beta = 2.0>(f, g)", "y = Gemm<transA = 1, transB = 1, alpha = 2.0>(r, g34, c3)",
        "f = Flatten(x) y = Gemm(f, g, b7)", "y = Gemm<transA = 1, transB = 1, beta = 0.5>(r, g34, c3)",
    ],
    "MatMul": ["y = MatMul(x, m8)", "t = Transpose<perm = [0, 1, 3, 2]>(p) y = MatMul(x, t)"],
    "AveragePool": [
        "y = AveragePool<kernel_shape = [3, 2], strides = [2, 1]>(x)",
        "y = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]>(x)",
        "y = AveragePool<kernel_shape = [3, 3], pads = [1, 0, 1, 2], count_include_pad = 1>(x)",
        "y = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 0, 0], strides = [2, 2], ceil_mode = 1, count_include_pad = 1>(x)",
        "y = AveragePool<kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1>(x)",
        "y = AveragePool<kernel_shape = [3, 2], dilations = [2, 3]>(x)",
        'y = AveragePool<kernel_shape = [3, 3], strides = [2, 2], auto_pad = "SAME_UPPER">(x)',
    ],
    "MaxPool": [
        "y = MaxPool<kernel_shape = [3, 2], strides = [2, 1]>(x)",
        "y = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]>(x)",
        "y = MaxPool<kernel_shape = [3, 3], pads = [1, 0, 0, 2], strides = [2, 2], ceil_mode = 1>(x)",
        "y = MaxPool<kernel_shape = [2, 2], dilations = [3, 2]>(x)",
    ],
    **{op: [
        f"y = {op}<keepdims = 1>(p, axes)", f"y = {op}<keepdims = 0>(p, axes)", f"y = {op}(p)",
        f"y = {op}<noop_with_empty_axes = 1>(p)",
    ] for op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare",
                 "ReduceLogSumExp")},
    "LayerNormalization": ["y = LayerNormalization(x, s8, b8)", "y = LayerNormalization<axis = 2, epsilon = 0.01>(x, s98)"],
    "BatchNormalization": ["y = BatchNormalization(x, s6, b6, b6, s6)"],
    "GroupNormalization": ["y = GroupNormalization<num_groups = 3>(x, s6, b6)"],
    "InstanceNormalization": ["y = InstanceNormalization(x, s6, b6)"],
    "LRN": ["y = LRN<size = 3>(x)", "y = LRN<size = 5, alpha = 0.5, beta = 0.6, bias = 2.0>(x)"],
    "LpNormalization": ["y = LpNormalization(x)", "y = LpNormalization<axis = 1, p = 1>(x)"],
    "Softmax": ["y = Softmax(x)", "y = Softmax<axis = 1>(x)"], "LogSoftmax": ["y = LogSoftmax<axis = 2>(x)"],
    "Concat": ["y = Concat<axis = 1>(x, p)", "y = Concat<axis = -1>(x, p, x)"],
    "DepthToSpace": ["c8 = Concat<axis = 1>(x, p) y = DepthToSpace<blocksize = 2>(c8)",
        'c8 = Concat<axis = 1>(x, p) y = DepthToSpace<blocksize = 2, mode = "CRD">(c8)'],
    "SpaceToDepth": ["h = Concat<axis = 2>(x, p) y = SpaceToDepth<blocksize = 2>(h)"],
    "Expand": ["y = Expand(r, to234)"], "Tile": ["y = Tile(r, axes)"],
    "Flatten": ["y = Flatten(x)", "y = Flatten<axis = 2>(x)", "y = Flatten<axis = -1>(x)", "y = Flatten<axis = 0>(x)"],
    "Gather": ["y = Gather<axis = 2>(x, at)", "y = Gather<axis = -1>(x, at2)"],
    "GatherElements": ["y = GatherElements<axis = 1>(r, at34)"],
    "Pad": [
        "y = Pad(x, pads)", 'y = Pad<mode = "edge">(x, pads)', 'y = Pad<mode = "reflect">(x, pads)', "y = Pad(x, crop, two)",
        "y = Pad(x, pads2, , axes)", 'y = Pad<mode = "wrap">(x, pads)',
    ],
    "Reshape": ["y = Reshape(x, to3)", "y = Reshape(x, to5)"],
    "Resize": [
        *(f'y = Resize<mode = "{mode}", coordinate_transformation_mode = "{law}">(x, , , sizes)'
          for mode in ("nearest", "linear") for law in ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")),
        *(f'y = Resize<mode = "nearest", nearest_mode = "{mode}", coordinate_transformation_mode = "asymmetric">(x, , scales)'
          for mode in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")),
    ],
    "Slice": ["y = Slice(x, from, upto, axes)", "y = Slice(x, from, upto, axes, steps)", "y = Slice(x, upto, below, axes, back)"],
    "Split": ["a, y = Split<axis = 1>(x, parts)", "y, b = Split<axis = -2>(x, parts3)", "a, y, b = Split<axis = 1, num_outputs = 3>(x)"],
    "Squeeze": ["u = Unsqueeze(x, axes) y = Squeeze(u)", "u = Unsqueeze(x, axes) y = Squeeze(u, axes)"],
    "Unsqueeze": ["y = Unsqueeze(x, minus)"],
    "Transpose": ["y = Transpose(x)", "y = Transpose<perm = [0, 2, 3, 1]>(x)"],
    "GRU": [
        "q = Reshape(x, seq) y = GRU<hidden_size = 5, linear_before_reset = 1>(q, gw, gr, gb)",
        "q = Reshape(x, seq) y = GRU<hidden_size = 5>(q, gw, gr)",
        'q = Reshape(x, seq) y = GRU<hidden_size = 5, direction = "reverse">(q, gw, gr, gb)',
    ],
    "LSTM": [
        "q = Reshape(x, seq) y = LSTM<hidden_size = 5>(q, lw, lr, lb)",
        'q = Reshape(x, seq) a, y = LSTM<hidden_size = 5, direction = "bidirectional">(q, lw2, lr2)',
        "q = Reshape(x, seq) a, b, y = LSTM<hidden_size = 5>(q, lw, lr, lb, , h0, h0)",
    ],
    "RNN": ["q = Reshape(x, seq) y, b = RNN<hidden_size = 5>(q, rw, rr)"],
}  # fmt: skip


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


CONSTANTS: dict[str, np.ndarray] = {
    "low": np.float32(-0.4), "high": np.float32(0.7), "two": np.float32(2), "three": np.float32(3), "seven": np.int64(7),
    "c": f32(6, 1, 1), "w3": f32(4, 6, 3, 2), "b4": f32(4), "wd": f32(12, 1, 3, 3), "w1d": f32(3, 6, 3),
    "w3d": f32(2, 3, 3, 3, 3), "wt": f32(6, 5, 3, 2), "b5": f32(5), "m": f32(6, 4), "g": f32(432, 7), "b7": f32(7),
    "g34": f32(5, 3), "c3": f32(5), "m8": f32(8, 3), "s8": f32(8), "b8": f32(8), "s98": f32(9, 8),
    "s6": np.abs(f32(6)) + 0.5, "b6": f32(6), "gw": f32(1, 15, 6), "gr": f32(1, 15, 5), "gb": f32(1, 30),
    "lw": f32(1, 20, 6), "lr": f32(1, 20, 5), "lb": f32(1, 40), "lw2": f32(2, 20, 6), "lr2": f32(2, 20, 5),
    "h0": f32(1, 8, 5), "rw": f32(1, 5, 6), "rr": f32(1, 5, 5),
    "scales": np.array([1, 1, 2, 1.5], np.float32),
    "at": np.array([[0, -1, 3], [2, 2, -9]]), "at2": np.array(-3), "at34": RNG.integers(-4, 4, (3, 4)),
}  # fmt: skip
INTEGERS: dict[str, list[int]] = {
    "to3": [2, 6, 72], "to5": [2, 3, 4, 6, 6], "to234": [2, 3, 4], "axes": [1, 2], "minus": [-1, 0], "pads": [0, 0, 1, 2, 0, 0, 3, 1],
    "crop": [0, 1, -1, 2, 0, 0, 1, -2], "pads2": [1, 0, 0, 2], "sizes": [2, 6, 13, 5], "from": [1, -6], "upto": [5, 9],
    "steps": [2, 3], "below": [-100, 1], "back": [-1, -2], "parts": [2, 4], "parts3": [4, 5], "seq": [18, 8, 6],
}  # fmt: skip


def case(body: str) -> ir.Model:
    signature = "g (float[2,6,9,8] x, float[2,6,9,8] p, float[3,4] r) => (float y)"
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {signature} {{ {body} }}')
    proto.graph.output[0].ClearField("type")
    read = {name for node in proto.graph.node for name in node.input}
    arrays = {**CONSTANTS, **{name: np.array(values, np.int64) for name, values in INTEGERS.items()}}
    for name in sorted(read & arrays.keys()):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(arrays[name]), name))
    for index, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{index}"
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True, strict_mode=True)
    made = ir.from_proto(inferred)
    FoldConstants()(made)
    return made


def compare(model: ir.Model, count: int = 2, seed: int = 0, native: bool | None = None) -> TorchGraph:
    """`count` random samples through torch together and through ONNX Runtime one by one."""
    graph = TorchGraph(model)
    session = quiet_session(model_bytes(model))
    rng = np.random.default_rng(seed)
    feeds = {name: rng.standard_normal((count, *shape)).astype(np.float32) for name, shape in graph.inputs.items()}
    if "p" in feeds:
        feeds["p"] = np.abs(feeds["p"]) + np.float32(0.1)
    if native is not None:
        graph._native = native
    with torch.no_grad():
        found = graph.run({name: torch.from_numpy(x) for name, x in feeds.items()})
    limit = ROUNDED_AGAIN * derive_tolerance(model)
    read = [x.name for x in session.get_inputs()]
    for index in range(count):
        wanted = session.run(graph.outputs, {name: np.asarray(feeds[name][index]) for name in read})
        for name, y in zip(graph.outputs, wanted, strict=True):
            got = np.asarray(found[name][index].numpy())
            y = np.asarray(y)
            assert got.shape == y.shape
            error = relative_error(y, got.astype(y.dtype))
            assert error <= limit, f"{name}: {error:.3g} > {limit:.3g}"
    return graph


def test_every_operator_has_a_case() -> None:
    assert set(CASES) == set(OPERATORS) | set(RECURRENT)


@pytest.mark.parametrize("body", [body for bodies in CASES.values() for body in bodies])
def test_operator_equals_onnx_runtime(body: str) -> None:
    compare(case(body))


def test_comparer_can_fail() -> None:
    model = case("y = Relu(x)")
    graph = TorchGraph(case("y = LeakyRelu(x)"))
    x = torch.from_numpy(f32(1, 2, 6, 9, 8))
    (y,) = quiet_session(model_bytes(model)).run(None, {"x": x[0].numpy(), "p": x[0].numpy(), "r": f32(3, 4)})
    assert relative_error(y, graph.run({"x": x})["y"][0].numpy()) > 1e-3


@pytest.mark.parametrize(("op", "opset"), [("Swish", 24), ("RMSNormalization", 23)])
def test_operators_of_later_opsets_follow_their_page(op: str, opset: int) -> None:
    inputs = "x" if op == "Swish" else "x, s"
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> g (float[3,8] x) => (float[3,8] y) {{ y = {op}({inputs}) }}'
    proto = onnx.parser.parse_model(text)
    scale = f32(8)
    if op != "Swish":
        proto.graph.initializer.append(onnx.numpy_helper.from_array(scale, "s"))
    x = f32(1, 3, 8)
    y = TorchGraph(ir.from_proto(proto)).run({"x": torch.from_numpy(x)})["y"].numpy()
    wanted = x / (1 + np.exp(-x)) if op == "Swish" else x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(operators())
def test_random_operators(model: onnx.ModelProto) -> None:
    try:
        loaded = load_model(model)
    except UnsupportedError:
        return
    compare(loaded, count=1)


@settings(max_examples=15, deadline=None)
@given(networks())
def test_random_networks_in_both_ways_of_batching(model: onnx.ModelProto) -> None:
    loaded = load_model(model)
    compare(loaded, count=3)
    compare(loaded, count=3, native=False)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_builders(name: str) -> None:
    small = {} if name == "demo" else {"resolution": 64}
    assert compare(load_model(build(name, **small)))._native


REAL = {
    "dscnn_kws_mlperf_tiny": ({}, {}, True), "kwt1_speech_commands": ({}, {}, False),
    "mobilenetv2_torchvision": ({}, {}, True), "resnet20_cifar10": ({}, {}, True), "squeezenet1.1": ({}, {}, True),
    "ultraface_RFB_320": ({}, {}, False), "nsnet2": ({"input": (1, 5, 161)}, {}, False),
    "silero_vad": ({"input": (1, 576), "state": (2, 1, 128)}, {"sr": 16000}, False),
}  # fmt: skip


@pytest.mark.skipif(DATA is None, reason="needs SPARSEC_DATA")
@pytest.mark.parametrize("name", sorted(REAL))
def test_real_models(name: str) -> None:
    shapes, bind, native = REAL[name]
    graph = compare(load_model(Path(str(DATA)) / "models" / f"{name}.onnx", shapes, bind, []))
    assert graph._native is native


@pytest.mark.parametrize("op", ["AveragePool", "Cast", "Conv", "Gemm", "MaxPool", "Pad", "Resize"])
def test_one_sample_in_float16(op: str) -> None:
    """What a function holds of its own is of the samples' type: torch refuses products of two."""
    for body in CASES[op]:
        model = case(body)
        graph, single = TorchGraph(model, floats=torch.float16), TorchGraph(model)
        feeds = {name: torch.from_numpy(f32(*shape)) for name, shape in graph.inputs.items()}
        wanted = single.run_one(feeds)["y"].double()
        found = graph.run_one({name: x.half() for name, x in feeds.items()})["y"]
        assert found.dtype == torch.float16
        assert float((found - wanted).abs().max()) <= 1e-2 * float(wanted.abs().max())


def test_gradients_reach_weights_and_match_differences() -> None:
    model = case("h = Conv<pads = [1, 1, 1, 1]>(x, w3, b4) t = Tanh(h) y = GlobalAveragePool(t)")
    graph = TorchGraph(model)
    feeds = {"x": torch.from_numpy(f32(3, 2, 6, 9, 8))}
    weight = graph.constants["w3"].double().requires_grad_()
    graph.constants = {name: c.double() for name, c in graph.constants.items()}
    feeds = {name: x.double() for name, x in feeds.items()}

    def loss(w: torch.Tensor) -> torch.Tensor:
        return graph.run(feeds, weights={"w3": w})["y"].square().sum()

    assert torch.autograd.gradcheck(loss, (weight,))


def test_the_magnitude_of_nothing_has_a_gradient() -> None:
    graph = TorchGraph(case("a = Conv(x, w3, b4) s = Mul(a, a) y = Sqrt(s)"))
    weight = graph.constants["w3"].requires_grad_()
    x = torch.from_numpy(f32(2, 2, 6, 9, 8))
    y = graph.run({"x": torch.cat([x, torch.zeros_like(x)])}, weights={"w3": weight, "b4": torch.zeros(4)})["y"]
    assert (y[2:] == 0).all()
    y.sum().backward()
    assert torch.isfinite(weight.grad).all() and weight.grad.abs().max() > 0


def test_values_given_cut_the_graph_in_front_of_them() -> None:
    model = case("a = Conv(x, w3, b4) b = Relu(a) y = GlobalAveragePool(b)")
    graph = TorchGraph(model)
    x = {"x": torch.from_numpy(f32(2, 2, 6, 9, 8))}
    whole = graph.run(x, ["a", "y"])
    cut = graph.run({}, ["y"], given={"a": whole["a"]})
    assert torch.equal(cut["y"], whole["y"])
    assert not torch.equal(graph.run({}, ["y"], given={"a": whole["a"] + 1})["y"], whole["y"])


def test_what_torch_cannot_execute_is_named_at_once() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[2,5] x, int64[1] k) => (float y, float z, float w) {
        v, i = TopK(x, k)  u = NonZero(x)  w = CumSum(x, k)  y = Relu(v)  z = Cast<to = 1>(u)
    }"""
    proto = onnx.parser.parse_model(text)
    for index, node in enumerate(proto.graph.node):
        node.name = f"n{index}"
    with pytest.raises(UnsupportedError) as caught:
        TorchGraph(ir.from_proto(proto))
    message = str(caught.value)
    for part in ("TopK (n0)", "NonZero (n1)", "CumSum (n2)", "Relu"):
        assert (part in message) == (part != "Relu")
    assert "\n" not in message


def test_a_computed_shape_is_a_reason() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[2,5] x, int64[2] k) => (float[2,2] y) {
        y = Slice(x, k, k, k)
    }"""
    with pytest.raises(UnsupportedError, match="its start is computed"):
        TorchGraph(ir.from_proto(onnx.parser.parse_model(text)))
