from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sparsec.errors import ModelError
from sparsec.passes import FoldConstants
from sparsec.passes.normalization.fold_constants import GROWTH_BYTES, static_shape

RNG = np.random.default_rng(0)


def load(text: str, **weights: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]> ' + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for index, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{index}"
    return ir.from_proto(proto)


def test_shape_arithmetic_folds_in_one_walk(rewrite) -> None:
    made = load("""
        g (float[2,3,4,5] x) => (float[] y) {
            s = Shape(x)
            zero = Constant<value_int = 0>()
            batch = Gather(s, zero)
            axes = Constant<value_ints = [0]>()
            b = Unsqueeze(batch, axes)
            rest = Constant<value_ints = [-1]>()
            target = Concat<axis = 0>(b, rest)
            flat = Reshape(x, target)
            n = Size(flat)
            one = Constant<value_ints = [1]>()
            long = Reshape(n, one)
            z = Reshape(flat, long)
            y = Relu(z)
        }""")
    assert rewrite(made, FoldConstants()) == ["Reshape", "Reshape", "Relu"]
    assert static_shape(made.graph.outputs[0]) == (120,)
    assert sorted(v.const_value.numpy().tolist() for v in made.graph.initializers.values()) == [[2, -1], [120]]


def test_shape_takes_a_slice_of_the_dimensions(rewrite) -> None:
    made = load("g (float[2,3,4] x) => (int64[] y) { s = Shape<start = -2, end = 3>(x) y = Identity(s) }")
    rewrite(made, FoldConstants())
    (value,) = made.graph.initializers.values()
    assert value.const_value.numpy().tolist() == [3, 4]


def test_constant_branch_of_if_is_inlined_and_nested(rewrite) -> None:
    made = load("""
        g (float[4] x) => (float[4] y)
        <bool c = {1}> {
            y = If (c) <
                then_branch = t () => (float[4] a) {
                    k = Constant<value = float[1] {2}>()
                    a = If (c) < then_branch = u () => (float[4] p) { p = Mul(x, k) },
                                 else_branch = v () => (float[4] q) { q = Neg(x) } >
                },
                else_branch = e () => (float[4] b) { b = Neg(x) }
            >
        }""")
    assert [op for op in rewrite(made, FoldConstants()) if op != "Identity"] == ["Mul"]
    assert made.graph.outputs[0].name == "y"


def test_branch_that_depends_on_the_input_stays(rewrite) -> None:
    made = load("""
        g (float[4] x, bool c) => (float[4] y) {
            y = If (c) < then_branch = t () => (float[4] a) { a = Neg(x) },
                         else_branch = e () => (float[4] b) { b = Relu(x) } >
        }""")
    assert rewrite(made, FoldConstants()) == ["If"]


def test_constant_output_keeps_its_name_and_a_node(rewrite) -> None:
    made = load("""
        g (float[3] x) => (float[3] y, float[2] c) {
            k = Constant<value = float[2] {1, 2}>()
            c = Neg(k)
            y = Relu(x)
        }""")
    assert sorted(rewrite(made, FoldConstants())) == ["Identity", "Relu"]
    assert [v.name for v in made.graph.outputs] == ["y", "c"]


def test_scalars_stay_scalars(rewrite) -> None:
    made = load("""
        g (float[3] x) => (float[3] y) {
            k = Constant<value = float {2}>()
            m = Neg(k)
            y = Mul(x, m)
        }""")
    rewrite(made, FoldConstants())
    (value,) = made.graph.initializers.values()
    assert value.const_value.numpy().shape == ()
    assert value.const_value.numpy() == -2


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32])
def test_integers_of_a_float_layer_become_floats(rewrite, dtype: type) -> None:
    q = RNG.integers(0, 128, (4, 3, 1, 1)).astype(dtype)
    made = load(
        "g (float[1,3,5,5] x) => (float[1,4,5,5] y) { w = DequantizeLinear(q, s) y = Conv(x, w) }",
        q=q, s=np.float32(0.5).reshape(()),
    )  # fmt: skip
    assert rewrite(made, FoldConstants()) == ["Conv"]
    np.testing.assert_array_equal(made.graph.initializers["w"].const_value.numpy(), q.astype(np.float32) * 0.5)


def test_quantized_layer_keeps_its_dequantization(rewrite) -> None:
    made = load(
        """g (float[1,3,5,5] x) => (float[1,4,5,5] y) {
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s, z)
            w = DequantizeLinear(q, s, z)
            y = Conv(xd, w)
        }""",
        q=RNG.integers(-127, 128, (4, 3, 1, 1)).astype(np.int8),
        s=np.float32(0.5).reshape(()), z=np.int8(0).reshape(()),
    )  # fmt: skip
    assert rewrite(made, FoldConstants()) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Conv"]


@pytest.mark.parametrize("op", ["Expand(k, shape)", "ConstantOfShape(shape)"])
def test_a_small_constant_does_not_become_a_huge_one(op: str) -> None:
    elements = GROWTH_BYTES // 4 + 100
    made = load(
        f"g (float[1] x) => (float[] y) {{ big = {op} m = ReduceSum(big) y = Mul(x, m) }}",
        k=np.ones(1, np.float32), shape=np.array([elements], np.int64),
    )  # fmt: skip
    FoldConstants()(made)
    assert op.split("(")[0] in [node.op_type for node in made.graph]
    assert max(v.const_value.nbytes for v in made.graph.initializers.values()) < 1000


def test_random_numbers_are_not_constants(rewrite) -> None:
    made = load("g (float[3] x) => (float[3] y) { r = RandomNormal<shape = [3]>() y = Add(x, r) }")
    FoldConstants()(made)
    assert [node.op_type for node in made.graph] == ["RandomNormal", "Add"]


def test_shapes_that_do_not_fit_name_the_node() -> None:
    made = load(
        "g (float[2,3] x) => (float[] y) { y = MatMul(x, w) }", w=RNG.standard_normal((4, 5)).astype(np.float32)
    )
    with pytest.raises(ModelError, match=r"node 'MatMul_0': MatMul does not fit its inputs"):
        FoldConstants()(made)
