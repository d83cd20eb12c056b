"""Moves and pooling of quantized tensors on the graph: what becomes a move of bytes, bit by bit, and what must not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from programs import onnx_runtime, run_program
from quantized_models import check, feeds_of, graph, kernels, optimized

from sparsec.loading.load import load_model, model_bytes
from sparsec.lowering import lower
from sparsec.lowering.integers import move_integers
from sparsec.runtimes.emulated import find_emulator
from sparsec.targets import find_target, with_precision

CONSTANTS = """, int64[2] two_two = {2, 2}, int64[3] order = {2, 0, -1}, int64[1] front = {1}, int64[1] back = {-1},
    int64[1] far = {-100}, int64[1] minus = {-2}, int64[1] axis2 = {2}, int64[1] axis3 = {3}, int64[8] pads = {0, 1, 0, 2, 0, 0, 3, 1},
    int64[8] cut = {0, -1, 1, 0, 0, 2, -1, 0}, float exact = {0.5}, float between = {0.52}, int64[2] rows = {3, -1},
    int64[2] halves = {2, 4}, int64[4] five = {5, 2, 6, 10}, int64[4] times = {2, 1, 3, 1}, float[0] none = {},
    float[4] twice = {1, 1, 2, 2}, float[4] more = {1, 1, 1.5, 2.5}, float[4] less = {1, 1, 0.5, 0.75}, int64[2] last = {2, 3}"""
X = "uint8[2, 6, 6, 10] q"


def moved(nodes: str, outputs: str, inputs: str = X) -> onnx.ModelProto:
    return graph(inputs, outputs, nodes.replace("'", '"'), CONSTANTS)


MOVES = {  # the move of x, the shape of its result, and whether its memory is x's
    "Transpose<perm=[0, 2, 3, 1]>(x)": ((2, 6, 10, 6), False),
    "Transpose<perm=[3, 0, 1, 2]>(x)": ((10, 2, 6, 6), False),
    "Reshape(x, rows)": ((3, 240), True),
    "Flatten(x)": ((2, 360), True),
    "Slice(x, front, back, axis2)": ((2, 6, 4, 10), False),
    "Slice(x, back, far, axis3, minus)": ((2, 6, 6, 5), False),
    "Gather<axis=1>(x, order)": ((2, 3, 6, 10), False),
    "Pad(x, pads)": ((2, 7, 9, 13), False),
    "Pad(x, cut, exact)": ((2, 7, 6, 10), False),
    "Pad<mode='reflect'>(x, pads)": ((2, 7, 9, 13), False),
    "Pad<mode='edge'>(x, pads)": ((2, 7, 9, 13), False),
    "Pad<mode='wrap'>(x, pads)": ((2, 7, 9, 13), False),
    "Tile(x, times)": ((4, 6, 18, 10), False),
    "SpaceToDepth<blocksize=2>(x)": ((2, 24, 3, 5), False),
    "Resize(x, none, twice)": ((2, 6, 12, 20), False),
    "Resize<coordinate_transformation_mode='asymmetric', nearest_mode='floor'>(x, none, more)": ((2, 6, 9, 25), False),
    "Resize<coordinate_transformation_mode='align_corners', nearest_mode='round_prefer_ceil'>(x, none, less)": (
        (2, 6, 3, 7), False,
    ),
    "MaxPool<kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1]>(x)": ((2, 6, 3, 10), False),
    "GlobalMaxPool(x)": ((2, 6, 1, 1), False),
    "ReduceMax<keepdims=0>(x, last)": ((2, 6), False),
}  # fmt: skip


@pytest.mark.parametrize("move", MOVES)
def test_moves_are_moves_of_integers(move):
    shape, view = MOVES[move]
    nodes = f"x = D(q, s, z)  y = {move}  r = Q(y, s, z)"
    other = f"a = D(q, u, o)  b = {move.replace('(x', '(a')}  p = Q(b, t, n)"
    model = moved(nodes + other, f"uint8{list(shape)} r, int8{list(shape)} p")
    (_, kernel), (_, same), (op, _) = kernels(check(model, exact=True))
    assert kernel == same
    assert kernel.startswith("view" if view else "maxpool" if "Max" in move else "move")
    assert op == "QuantizeLinear", "to another scale: a table behind the move"


def test_d2s_in_both_orders():
    for mode in ("DCR", "CRD"):
        nodes = f"x = D(q, s, z) y = DepthToSpace<blocksize=2, mode='{mode}'>(x) r = Q(y, s, z)"
        kernels(check(moved(nodes, "uint8[1, 3, 6, 10] r", "uint8[1, 12, 3, 5] q"), exact=True))


def test_every_part_of_a_split():
    nodes = "x = D(q, s, z)  a, b = Split<axis=1>(x, halves)  r = Q(a, s, z)  p = Q(b, t, n)"
    found = kernels(check(moved(nodes, "uint8[2, 2, 6, 10] r, int8[2, 4, 6, 10] p"), exact=True))
    assert [op for op, _ in found] == ["Split", "QuantizeLinear"]


def test_a_chain_of_moves_and_one_of_floats():
    """Down from a DequantizeLinear, up from a QuantizeLinear; the mean between them gets both."""
    nodes = """x = D(q, s, z)  a = Transpose<perm=[0, 2, 1, 3]>(x)  b = Flatten(a)  c = Expand(b, rows)
        d = ReduceMean<keepdims=1>(x, last)  e = Squeeze(d, last)  f = Transpose(e)  r = Q(f, t, n)"""
    nodes = nodes.replace("c = Expand(b, rows)", "p = Q(b, s, z)")
    found = kernels(check(moved(nodes, "int8[6, 2] r, uint8[2, 360] p")))
    assert [op for op, _ in found] == ["Transpose", "Flatten", "ReduceMean+QuantizeLinear", "Squeeze", "Transpose"]


def test_what_others_read_stays():
    """Of a DequantizeLinear, of a move in front of a Q, and where the reals are outputs."""
    nodes = """x = D(q, s, z)  a = Transpose<perm=[0, 2, 3, 1]>(x)  b = Softmax(x)  r = Q(a, s, z)
        c = Sqrt(a)  d = Identity(a)  e = Add(x, b)"""
    model = moved(nodes, "uint8[2, 6, 10, 6] r, float[2, 6, 10, 6] c, float[2, 6, 10, 6] a, float[2, 6, 6, 10] e")
    feeds = feeds_of(model)
    loaded = load_model(model)
    found = run_program(lower(loaded, find_target("host")), feeds)
    for name, value in onnx_runtime(model_bytes(loaded), feeds).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
    assert np.array_equal(found["r"], feeds["q"].transpose(0, 2, 3, 1))


def test_padding_with_what_is_no_step():
    """0.52 is no multiple of the scale: it is rounded behind, never in front."""
    nodes = "x = D(q, s, z)  y = Pad(x, pads, between)  r = Q(y, s, z)"
    kernels(check(moved(nodes, "uint8[2, 7, 9, 13] r"), exact=True))
    nodes = "x = D(q, s, z)  y = Pad(x, pads, between)  r = Relu(y)"
    model = moved(nodes, "float[2, 7, 9, 13] r")
    feeds = feeds_of(model)
    found = run_program(lower(load_model(model), find_target("host")), feeds)
    np.testing.assert_array_equal(found["r"], onnx_runtime(model.SerializeToString(), feeds)["r"])
    assert np.float32(0.52) in found["r"]


CONCATS = {
    "equal, outermost": ("a = D(q, s, z) b = D(p, s, z) y = Concat<axis=0>(a, b)", (4, 6, 6, 10)),
    "equal, inner": ("a = D(q, s, z) b = D(p, s, z) y = Concat<axis=2>(a, b, a)", (2, 6, 18, 10)),
    "last axis": ("a = D(q, s, z) b = D(p, t, z) y = Concat<axis=3>(a, b)", (2, 6, 6, 20)),
    "another scale": ("a = D(q, s, z) b = D(p, u, o) y = Concat<axis=1>(a, b)", (2, 12, 6, 10)),
    "twice the same": ("a = D(q, u, o) y = Concat<axis=0>(a, a)", (4, 6, 6, 10)),
    "joined twice": ("a = D(q, u, o) b = D(p, s, z) c = Concat<axis=0>(a, b) y = Concat<axis=0>(c, a)", (6, 6, 6, 10)),
    "moved first": (
        "a = D(q, s, z) b = D(p, u, o) c = Transpose<perm=[0, 1, 3, 2]>(b) d = Transpose<perm=[0, 1, 3, 2]>(c) "
        "y = Concat<axis=0>(a, d)", (4, 6, 6, 10),
    ),
    "a float among them": ("a = D(q, s, z) b = D(p, u, o) c = Softmax(b) y = Concat<axis=0>(a, c)", (4, 6, 6, 10)),
    "a constant": ("a = D(q, s, z) y = Concat<axis=0>(a, wsome)", (3, 6, 6, 10)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONCATS)
def test_concat(name):
    nodes, shape = CONCATS[name]
    inputs = f"{X}, uint8[2, 6, 6, 10] p" if "p," in nodes else X
    inputs += ", float[1, 6, 6, 10] wsome" if "wsome" in nodes else ""
    model = moved(f"{nodes} r = Q(y, s, z)", f"uint8{list(shape)} r", inputs)
    found = dict(kernels(check(model, exact="Softmax" not in nodes)))
    assert "DequantizeLinear" not in found or "Softmax" in nodes


POOLS = {
    "GlobalAveragePool(x)": (6, 1, 1),
    "AveragePool<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(x)": (6, 6, 10),
    "AveragePool<kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2], count_include_pad=1>(x)": (6, 3, 5),
    "AveragePool<kernel_shape=[3, 3], auto_pad='SAME_UPPER', strides=[2, 3]>(x)": (6, 3, 4),
    "AveragePool<kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1>(x)": (6, 3, 5),
    "AveragePool<kernel_shape=[6, 10]>(x)": (6, 1, 1),
    "AveragePool<kernel_shape=[2, 3], dilations=[2, 2]>(x)": (6, 4, 6),
    "ReduceMean(x, last)": (6, 1, 1),
}


@pytest.mark.parametrize("pool", POOLS)
def test_means(pool):
    shape = [2, *POOLS[pool]]
    model = moved(f"x = D(q, s, z)  y = {pool}  r = Q(y, t, n)", f"int8{shape} r")
    assert [op for op, _ in kernels(check(model))] == [pool.partition("<")[0].partition("(")[0] + "+QuantizeLinear"]
    model = moved(f"x = D(q, s, z)  y = {pool}  r = Relu(y)", f"float{shape} r")
    assert len(kernels(check(model))) == 1


@pytest.mark.skipif(find_emulator() is None, reason="no emulator of Arm")
def test_with_float16_around():
    """Means that leave integers are float32 whatever the others compute in."""
    target = with_precision(find_target("arm", "armv8.2-a"), "f16")
    nodes = "x = D(q, s, z)  y = GlobalAveragePool(x)  r = Sigmoid(y)  b = Resize<mode='linear'>(x, none, twice)  p = Relu(b)"
    model = moved(nodes, "float[2, 6, 1, 1] r, float[2, 6, 12, 20] p")
    feeds = feeds_of(model)
    program = lower(load_model(model), target)
    found, expected = run_program(program, feeds), onnx_runtime(model.SerializeToString(), feeds)
    assert {layer.route for layer in program.layers} == {"native"}
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 2e-3 * np.abs(value).max()


def test_one_dimensional_windows():
    for kind in ("MaxPool", "AveragePool"):
        nodes = f"x = D(q, s, z)  y = {kind}<kernel_shape=[3], strides=[2], pads=[1, 1]>(x)  r = Q(y, s, z)"
        ((_, kernel),) = kernels(check(moved(nodes, "uint8[2, 6, 30] r", "uint8[2, 6, 60] q"), exact=kind == "MaxPool"))
        assert kernel.startswith(kind.lower())


@pytest.mark.parametrize("scales", ["twice", "more", "less"])
@pytest.mark.parametrize(
    "mode", ["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel", "half_pixel_symmetric"]
)
def test_linear_resize(mode, scales):
    shape = {"twice": (12, 20), "more": (9, 25), "less": (3, 7)}[scales]
    resize = f"Resize<mode='linear', coordinate_transformation_mode='{mode}'>"
    nodes = f"x = D(q, s, z)  y = {resize}(x, none, {scales})  r = Q(y, t, n)"
    nodes += f"a = D(q, u, o)  b = {resize}(a, none, {scales})  p = Q(b, u, o)"
    model = moved(nodes, f"int8{[2, 6, *shape]} r, uint8{[2, 6, *shape]} p")
    feeds = feeds_of(model)
    program = lower(load_model(model), find_target("host"))
    assert [op for op, _ in kernels(program)] == ["Resize+QuantizeLinear"] * 2
    found = run_program(program, feeds)
    for run in (onnx_runtime, optimized):  # its own fusion interpolates integers and cuts fractions off
        off = {
            name: np.abs(found[name] - value.astype(int))
            for name, value in run(model.SerializeToString(), feeds).items()
        }
        assert off["p"].max() <= 1  # with many ties
        if run is onnx_runtime:
            # weights are off by 2^-12, results by 0.15 steps at most and by a tenth of that mostly
            assert off["r"].max() <= 1 and np.mean(off["r"] > 0) < 0.05


@pytest.mark.parametrize(("mode", "fixed"), [("half_pixel", True), ("align_corners", False)])
def test_a_linear_resize_to_floats_is_as_near_as_floats_are(mode, fixed):
    """Weights of quarters fit into fixed point, elevenths do not; where no step of the result hides it, floats are used."""
    nodes = f"x = D(q, s, z)  r = Resize<mode='linear', coordinate_transformation_mode='{mode}'>(x, none, twice)"
    model = moved(nodes, "float[2, 6, 12, 20] r")
    program, feeds = lower(load_model(model), find_target("host")), feeds_of(model)
    expected = onnx_runtime(model.SerializeToString(), feeds)["r"]
    np.testing.assert_allclose(run_program(program, feeds)["r"], expected, rtol=0, atol=1e-5)
    assert [op for op, _ in kernels(program)] == ["Resize"] if fixed else program.layers[-1].route == "generic"


@pytest.mark.parametrize(
    "nodes",
    [
        "x = D(q, s, z)  y = MaxPool<kernel_shape=[2, 2], pads=[2, 2, 0, 0]>(x)  r = Relu(y)",
        "x = D(q, s, z)  y = Resize<mode='cubic'>(x, none, twice)  r = Q(y, s, z)",
        "x = D<axis=1>(q, per, zs)  y = Identity(x)  a = Transpose(y)  r = Relu(a)",
    ],
)
def test_what_is_not_moved(nodes):
    """A window with nothing but padding is -inf; interpolation is no move; scales for each channel stay by their axis."""
    constants = CONSTANTS + ", float[6] per = {1, 2, 3, 4, 5, 6}, uint8[6] zs = {0, 1, 2, 3, 4, 5}"
    kind = "uint8" if "Q(" in nodes else "float"
    model = load_model(graph(X, f"{kind}[a, b, c, d] r", nodes.replace("'", '"'), constants))
    before = [node.op_type for node in model.graph]
    assert [node.op_type for node in move_integers(model).graph] == before


def test_a_constant_quantized_twice_is_a_constant():
    """Weights as ONNX Runtime leaves them when it quantizes a quantized model: integers, reals, other integers."""
    integers = (np.arange(36) * 7 % 255 - 127).astype(np.int8).reshape(6, 6, 1, 1)
    constants = f"{CONSTANTS}, int8[6, 6, 1, 1] i = {{{', '.join(map(str, integers.reshape(-1)))}}}"
    twice = "a = D(i, t, n)  b = Q(a, s, n)"
    model = load_model(
        graph(
            X, "uint8[2, 6, 6, 10] r", f"x = D(q, s, z) {twice} c = D(b, s, n) y = Conv(x, c) r = Q(y, s, z)", constants
        )
    )
    found = move_integers(model).graph
    assert [node.op_type for node in found] == ["DequantizeLinear"] * 2 + ["Conv", "QuantizeLinear"]
    (weight,) = (v for v in found.initializers.values() if str(v.name).endswith("/integers"))
    computed = graph("int8[6, 6, 1, 1] i", "int8[6, 6, 1, 1] b", twice).SerializeToString()
    np.testing.assert_array_equal(weight.const_value.numpy(), onnx_runtime(computed, {"i": integers})["b"])


def test_the_model_itself_stays_and_twice_is_once():
    nodes = """x = D(q, s, z)  a = Transpose<perm=[0, 2, 3, 1]>(x)  b = Concat<axis=0>(a, a)  c = Pad(b, pads)
        r = Q(c, s, z)"""
    model = load_model(moved(nodes, "uint8[4, 7, 12, 7] r"))
    before = model_bytes(model)
    once = move_integers(model)
    assert model_bytes(model) == before != model_bytes(once)
    assert model_bytes(move_integers(once)) == model_bytes(once)
    assert {node.op_type for node in once.graph} == {"Transpose", "Concat", "Pad"}
    assert [v.name for v in once.graph.outputs] == ["r"]


def test_the_largest_of_one_number():
    """A scalar has no last axis to slide along."""
    lone = "x = D(q, s, z)  y = ReduceMax<keepdims=0>(x)  r = Q(y, s, z)"
    check(moved(lone, "uint8 r", "uint8 q"), exact=True)
