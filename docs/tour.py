"""sparsec in one file: follow one weight and one activation from an ONNX file to an instruction.

Run it: `python docs/tour.py`. Every claim is asserted; the test suite runs this file.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

import sparsec
from sparsec.codegen import kernel_text
from sparsec.kernels import conv
from sparsec.kernels.epilogue import RELU6
from sparsec.loading import load_model, model_bytes
from sparsec.lowering import lower, schedule
from sparsec.lowering.rules.base import Taken
from sparsec.lowering.structure import detect_structure
from sparsec.passes_api import resolve_passes
from sparsec.pipeline import run_passes
from sparsec.targets import find_target


def say(title: str, *lines: object) -> None:
    """Print one stop of the tour."""
    print(f"\n== {title}")
    for line in lines:
        print("  ", line)


# --- 1. A model ------------------------------------------------------------------------------------------------------
#
# A user brings an exported ONNX file. Ours is a small network: a first convolution, a depthwise one, a pointwise one that
# will be pruned, a residual Add, pooling and a classifier. BatchNorm stands behind the pointwise convolution, as exporters
# leave it, and the batch is symbolic.


def small_model() -> onnx.ModelProto:
    """x [N, 3, 16, 16] -> logits [N, 4]."""
    rng = np.random.default_rng(0)
    weights = {
        "w0": rng.standard_normal((16, 3, 3, 3)) * 0.3,
        "wd": rng.standard_normal((16, 1, 3, 3)) * 0.3,
        "wp": rng.standard_normal((16, 16, 1, 1)) * 0.3,
        "gamma": rng.uniform(0.5, 1.5, 16), "beta": rng.standard_normal(16) * 0.1,
        "mean": rng.standard_normal(16) * 0.1, "var": rng.uniform(0.5, 1.5, 16),
        "wf": rng.standard_normal((4, 16)) * 0.3, "bf": np.zeros(4),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], name="stem", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="stem/relu"),
        helper.make_node("Conv", ["b", "wd"], ["c"], name="depthwise", group=16, pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["c", "wp"], ["d"], name="pointwise"),
        helper.make_node("BatchNormalization", ["d", "gamma", "beta", "mean", "var"], ["e"], name="norm"),
        helper.make_node("Add", ["e", "b"], ["f"], name="residual"),
        helper.make_node("Clip", ["f", "low", "high"], ["g"], name="clip"),
        helper.make_node("GlobalAveragePool", ["g"], ["h"], name="pool"),
        helper.make_node("Flatten", ["h"], ["i"], name="flatten"),
        helper.make_node("Gemm", ["i", "wf", "bf"], ["logits"], name="head", transB=1),
    ]
    tensors = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    tensors += [numpy_helper.from_array(np.float32(v), n) for n, v in (("low", 0.0), ("high", 6.0))]
    graph = helper.make_graph(
        nodes,
        "tour",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 4])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


exported = small_model()

# --- 2. load ---------------------------------------------------------------------------------------------------------
#
# Loading fixes shapes (the batch becomes 1, and that is said), folds constants and BatchNorm, and leaves a model in which
# every value has a static shape. It is still plain ONNX.

notes: list[str] = []
model = load_model(exported, notes=notes)
operators = [node.op_type for node in model.graph]
say("load", f"{len(exported.graph.node)} nodes became {len(operators)}: {' '.join(operators)}", *notes)
assert "BatchNormalization" not in operators

# --- 3. rewrite ------------------------------------------------------------------------------------------------------
#
# A pass is ONNX to ONNX. `prune` zeroes the blocks of least magnitude: here blocks of 4 output channels x 1 input channel,
# half of them. Nothing marks the layer as pruned; its zeros say it all, so that a model pruned elsewhere is as good.

model, records = run_passes(model, resolve_passes(["prune:sparsity=0.5,block=4x1,include=pointwise"]))
pointwise = next(node for node in model.graph if node.name == "pointwise")
weight = pointwise.inputs[1].const_value.numpy()
bias = pointwise.inputs[2].const_value.numpy()  # what is left of BatchNorm
found = detect_structure(weight)
say("rewrite", f"weight {list(weight.shape)}: {found}")
assert found.name == "4x1"
assert found.zeros == 0.5

# --- 4. A sparse convolution by hand ---------------------------------------------------------------------------------
#
# The law: y[oc, p] = sum over k of w[oc, k] * x[k, p]. Four rows that share their zeros share their column indices, so each
# panel row x[k, :] that is loaded feeds four rows of sums. Stored: for each group of four rows the columns that are left, a
# 16-bit index and four values each. That is all there is to the format.

packed = conv.pack(weight, conv.TABLE[3])
assert conv.TABLE[3].format == "4x1"
say(
    "stored form",
    f"{weight.size} weights, {packed.blocks} blocks: {packed.values.nbytes} B of values, {packed.index.nbytes} B of indices",
    f"group 0 keeps input channels {packed.live[packed.index[: packed.pointers[1]]].tolist()}",
)
assert packed.values.size == np.count_nonzero(weight)


def by_hand(x: np.ndarray) -> np.ndarray:
    """The register tile in NumPy: x [K, P] -> y [OC, P], before the epilogue."""
    panel = x[packed.live]  # the input channels that anyone reads: packed once for all groups
    y = np.zeros((weight.shape[0], x.shape[1]), np.float32)
    for g in range(len(packed.pointers) - 1):
        sums = np.repeat(bias[4 * g : 4 * g + 4, None], x.shape[1], axis=1)  # 4 rows x P pixels, in registers
        for b in range(packed.pointers[g], packed.pointers[g + 1]):
            row = panel[packed.index[b]]  # one index, one row of the panel
            sums += packed.values[4 * b : 4 * b + 4, None] * row  # four multiply-adds for each pixel
        y[4 * g : 4 * g + 4] = sums
    return y


rng = np.random.default_rng(1)
x = rng.standard_normal((16, 64)).astype(np.float32)
assert np.allclose(by_hand(x), weight[:, :, 0, 0] @ x + bias[:, None], atol=1e-5)

# --- 5. Which kernel? ------------------------------------------------------------------------------------------------
#
# The same loop in TIR, with the tile's height and width as parameters. A cost model of the target's ports prices each
# stored form and tile for this layer; the cheapest wins, and dense is always a candidate.

target = find_target("arm")
geometry = conv.Geometry((1, 16, 8, 8), (16, 16, 1, 1))
prices = {}
for form in conv.TABLE:
    tiling, cost = conv.best_tiling(
        target.machine, geometry, form, conv.stored_columns(weight, form, target.machine, geometry)
    )
    prices[form.format] = cost
best = min(prices, key=lambda name: prices[name])
say("predicted on Arm, us", " ".join(f"{name} {cost:.2f}" for name, cost in prices.items()), f"cheapest: {best}")
assert prices["4x1"] < prices["dense"]

_, call = conv.bind(target.machine, geometry, weight, form=conv.TABLE[3], bias=bias, activation=RELU6)
inner = [line.strip() for line in call.func.script().splitlines() if "Shuffle" in line]
say("one line of its TIR", call.text, inner[0][:150])

# --- 6. lower --------------------------------------------------------------------------------------------------------
#
# Groups are matched on the ONNX graph, so that names survive: the pointwise convolution takes the Add and the Clip behind
# it. What no rule takes would go through Relax. Then memory is planned: one arena, every buffer an offset in it.

groups = [item.group for item in schedule(model.graph, target) if isinstance(item, Taken)]
say("groups", *(f"{group.name}: {group.op}" for group in groups))
assert "Conv+Add+Clip" in [group.op for group in groups]

program = lower(model, target, "tour")
say("program", *str(program).splitlines()[:6], f"... {len(program.steps)} steps, {len(program.kernels)} kernels")
assert all(layer.route != "generic" for layer in program.layers)
assert {"flatten"} <= {layer.name for layer in program.layers if layer.route == "free"}  # a view costs nothing

# A step is a kernel, a number of independent tiles, and up to eight places. Every kernel has one C signature:
#     void kernel(void *a0, ..., void *a7, int32_t begin, int32_t end);
step = next(s for s in program.steps if "pointwise" in s.nodes)
say("the pointwise step", step.kernel, f"{step.tiles} tiles", *(f"{arg.space} + {arg.offset}" for arg in step.args))
assert kernel_text(next(k for k in program.kernels if k.name == step.kernel)).count("T.Buffer") == len(step.args)

# --- 7. build, pack, verify ------------------------------------------------------------------------------------------
#
# `compile` is all of the above, then code generation, linking and proof. The artifact is a folder with a library, packed
# weights, a program to run on the device, and the ONNX model that it must equal.

with tempfile.TemporaryDirectory() as folder:
    artifact = sparsec.compile(
        exported,
        target="host",
        passes=["prune:sparsity=0.5,block=4x1,include=pointwise"],
        output=Path(folder) / "tour.sparsec",
    )
    say("artifact", *sorted(path.name for path in artifact.path.iterdir()))
    assert artifact.manifest["passes"][0]["name"] == "prune"

    image = rng.standard_normal((1, 3, 16, 16)).astype(np.float32)
    ours = artifact.run({"x": image})["logits"]
    session = ort.InferenceSession(model_bytes(model), providers=["CPUExecutionProvider"])
    reference = session.run(None, {"x": image})[0]
    error = np.abs(ours - reference).max() / np.abs(reference).max()
    say("verify", f"relative error {error:.1e}; the manifest allows {artifact.manifest['tolerances']['logits']:.1e}")
    assert error <= artifact.manifest["tolerances"]["logits"]
    assert artifact.verify().passed

print("\nThat is the whole line: load, rewrite, lower, build, pack, verify.")
