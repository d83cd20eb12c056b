"""sparsec in one file: one weight and one activation, from an ONNX file to the instruction that multiplies them.

Run it: `python docs/tour.py`. Every claim is asserted; the test suite runs this file. The stops are those of
`sparsec/compiler.py`: load, rewrite, lower, build, pack, verify.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

import sparsec
from sparsec.building.codegen import assembly, kernel_text
from sparsec.building.emit import HEADER_BYTES, weights_blob
from sparsec.kernels import conv
from sparsec.kernels.base import variant
from sparsec.loading.load import load_model, model_bytes
from sparsec.lowering import lower
from sparsec.lowering.structure import detect_structure
from sparsec.rewriting.pipeline import run_passes
from sparsec.targets import find_target


def say(title: str, *lines: object) -> None:
    """Print one stop of the tour."""
    print(f"\n== {title}")
    for line in lines:
        print("  ", line)


# --- A model ---------------------------------------------------------------------------------------------------------
#
# A user brings an exported ONNX file. Ours is a piece of a mobile network: a first convolution, a depthwise one, a
# pointwise (1x1) one that we shall prune, a residual Add, pooling, a classifier. BatchNorm stands behind the pointwise
# convolution and the batch is symbolic, as exporters leave them.

C = 64  # channels


def small_model() -> onnx.ModelProto:
    """x [N, 3, 16, 16] -> logits [N, 4]."""
    rng = np.random.default_rng(0)
    weights = {
        "w0": rng.standard_normal((C, 3, 3, 3)) * 0.3,
        "wd": rng.standard_normal((C, 1, 3, 3)) * 0.3,
        "wp": rng.standard_normal((C, C, 1, 1)) * 0.1,
        "gamma": rng.uniform(0.5, 1.5, C), "beta": rng.standard_normal(C) * 0.1,
        "mean": rng.standard_normal(C) * 0.1, "var": rng.uniform(0.5, 1.5, C),
        "wf": rng.standard_normal((4, C)) * 0.3, "bf": np.zeros(4),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], name="stem", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="stem/relu"),
        helper.make_node("Conv", ["b", "wd"], ["c"], name="depthwise", group=C, pads=[1, 1, 1, 1]),
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
file = {tensor.name: numpy_helper.to_array(tensor) for tensor in exported.graph.initializer}

# --- load ------------------------------------------------------------------------------------------------------------
#
# Loading checks the file, fixes shapes (the batch becomes 1, and that is said), folds constants and BatchNorm, and leaves
# a model in which every value has a static shape. It is still plain ONNX.

notes: list[str] = []
model = load_model(exported, notes=notes)
operators = [node.op_type for node in model.graph]
say("load", f"{len(exported.graph.node)} nodes became {len(operators)}: {' '.join(operators)}", *notes)
assert "BatchNormalization" not in operators

pointwise = next(node for node in model.graph if node.name == "pointwise")
scale = file["gamma"] / np.sqrt(file["var"] + 1e-5)  # what BatchNorm multiplies each output channel with
assert np.allclose(pointwise.inputs[1].const_value.numpy(), file["wp"] * scale[:, None, None, None], rtol=1e-5)

# --- rewrite ---------------------------------------------------------------------------------------------------------
#
# A pass is ONNX to ONNX. `prune` zeroes the blocks of least magnitude: here three quarters of the blocks of 4 output
# channels x 1 input channel. After every pass the pipeline checks that the model is valid and that ONNX Runtime loads it.
# Nothing marks the layer as pruned: its structure is read off its zeros, so that a model pruned elsewhere is as good.

model, records = run_passes(model, ["prune:sparsity=0.75,block=4x1,include=pointwise"])
weight = pointwise.inputs[1].const_value.numpy()  # [OC, IC, 1, 1]
bias = pointwise.inputs[2].const_value.numpy()  # what is left of BatchNorm
found = detect_structure(weight)
say("rewrite", f"weight {list(weight.shape)}: {found}")
assert found.name == "4x1"
assert found.zeros == 0.75

# The weight to follow: of output channel 5, and the first input channel that this channel still reads.
oc = 5
ic = int(np.flatnonzero(weight[oc, :, 0, 0])[0])
w = weight[oc, ic, 0, 0]
say("our weight", f"wp[{oc}, {ic}] = {file['wp'][oc, ic, 0, 0]:.6f} in the file, {w:.6f} with BatchNorm folded in")
assert np.isclose(w, file["wp"][oc, ic, 0, 0] * scale[oc], rtol=1e-5)

# --- lower: which kernel? --------------------------------------------------------------------------------------------
#
# Lowering turns the model into a `Program` for one target. Groups are matched on the ONNX graph, so that names survive:
# the pointwise convolution takes the Add and the Clip behind it. For each group a cost model of the target's ports prices
# every stored form of its weight; the cheapest wins, and dense is always a candidate. What no rule takes would become
# loop nests by way of TVM's Relax; here nothing does.

target = find_target("arm", "cortex-a55")  # the small cores of most phones
program = lower(model, target, "tour")
say("layers", *(f"{layer.name}: {layer.op}, {layer.route}, {layer.kernel}" for layer in program.layers))
assert all(layer.route != "generic" for layer in program.layers)

layer = next(layer for layer in program.layers if layer.name == "pointwise")
prices = {candidate.kernel: candidate.predicted_us for candidate in layer.candidates}
say("pointwise: predicted us", "  ".join(f"{name} {us:.2f}" for name, us in prices.items()), layer.reason)
assert layer.op == "Conv+Add+Clip"
assert min(prices, key=lambda name: prices[name]) == "conv_f32_4x1"
assert prices["conv_f32_4x1"] < 0.5 * prices["conv_f32_dense"]  # a quarter of the weights is left

# --- lower: the stored form ------------------------------------------------------------------------------------------
#
# The law of the layer: y[oc, p] = sum over k of w[oc, k] * x[k, p], for pixels p. Four rows that share their zeros share
# their column indices, so that each row x[k, :] that is loaded feeds four rows of sums. Stored, for each group of four
# rows: the columns that are left, as a 16-bit index and four values each. That is all there is to the format.

form = variant(conv.TABLE, "4x1")
packed = conv.pack(weight, form)
block = next(
    b for b in range(packed.pointers[oc // 4], packed.pointers[oc // 4 + 1]) if packed.live[packed.index[b]] == ic
)
at = 4 * block + oc % 4  # in `values`
say(
    "stored form",
    f"{weight.size} weights became {packed.blocks} blocks: {packed.values.nbytes} B of values, {packed.index.nbytes} B of indices",
    f"our weight is number {oc % 4} of block {block}, values[{at}]",
)
assert packed.values[at] == w
assert np.array_equal(conv.unpack(packed, weight.shape), weight)


def by_hand(x: np.ndarray) -> np.ndarray:
    """The kernel in NumPy, up to its epilogue: x [IC, P] -> y [OC, P]."""
    panel = x[packed.live]  # the input channels that anyone reads, packed once for all groups
    y = np.zeros((C, x.shape[1]), np.float32)
    for g in range(C // 4):
        sums = np.repeat(bias[4 * g : 4 * g + 4, None], x.shape[1], axis=1)  # 4 rows x P pixels, in registers
        for b in range(packed.pointers[g], packed.pointers[g + 1]):
            row = panel[packed.index[b]]  # one index, one row of the panel
            sums += packed.values[4 * b : 4 * b + 4, None] * row  # four multiply-adds for each pixel
        y[4 * g : 4 * g + 4] = sums
    return y


# --- lower: the program ----------------------------------------------------------------------------------------------
#
# Last, memory is planned: one arena for all activations, every buffer an offset in it that is free again when its last
# reader is done; one blob for all constants. A step is a kernel, a number of independent tiles that threads may share
# out, and up to eight places. All kernels have one C signature, and nothing is allocated while they run:
#
#     void kernel(void *a0, ..., void *a7, int32_t begin, int32_t end);

number, step = next((i, s) for i, s in enumerate(program.steps) if "pointwise" in s.nodes)
kernel = next(k for k in program.kernels if k.name == step.kernel)
say("the pointwise step", f"{kernel.name}: {kernel.text}", f"{step.tiles} tiles", *step.args)
assert step.nodes == ("pointwise", "residual", "clip")

# Our activation: pixel (5, 2) of input channel `ic`, in the buffer "c" that the depthwise step wrote.
buffer = next(b for b in program.buffers if b.name == "c")
pixel = 5 * 8 + 2  # of 8 x 8
place = buffer.offset + 4 * (ic * 64 + pixel)
say(
    "our activation",
    f"c[0, {ic}, 5, 2] lies at byte {place} of the arena, alive from step {buffer.first} to {buffer.last}",
)
assert step.args[0].offset == buffer.offset
assert buffer.first < number <= buffer.last

# Our weight lies in weights.bin, which is mapped read-only and shared by every instance of the model.
values = next(c for c in program.constants if c.name == "pointwise/values")
weights_bin = weights_blob(program, digest=bytes(32))
byte = HEADER_BYTES + values.offset + 4 * at
say("our weight", f"lies at byte {byte} of weights.bin ({len(weights_bin)} bytes)")
assert np.frombuffer(weights_bin, "<f4", 1, byte)[0] == w

# --- build: the instruction ------------------------------------------------------------------------------------------
#
# A kernel is TIR, TVM's loop language: the register tile is written out with vector values, the loops over blocks and
# groups are data. `sparsec compile --dump DIR` writes all of it as 50-kernels.py. TVM's LLVM makes machine code of it.

line = next(line.strip() for line in kernel_text(kernel).splitlines() if "T.Shuffle([values" in line)
say("one line of its TIR", line)

lines = [" ".join(line.split()) for line in assembly((kernel,), target).splitlines()]
first = next(i for i, line in enumerate(lines) if line.startswith("fmla") and ".s[" in line)
say("the same on Cortex-A55", *(line for line in lines[first - 3 : first + 6] if not line.startswith(".")))

# Read it so: `fmla v28.4s, v12.4s, v11.s[1]` adds to four pixels' sums of output channel 4 g + 1, held in v28, the four
# activations in v12 times lane 1 of v11. Four weights came with one load: lane oc % 4 is where our weight is when the
# loop is at its block, and one lane of the activations is ours when the tile is at its pixel.
lanes = [line[-3:] for line in lines if line.startswith("fmla") and ".s[" in line]
assert {f"[{r}]" for r in range(4)} <= set(lanes)
assert lanes.count("[0]") == lanes.count("[1]") == lanes.count("[2]") == lanes.count("[3]")  # one load feeds four rows

# --- pack, verify ----------------------------------------------------------------------------------------------------
#
# `compile` is all of the above, then linking and proof. The artifact is a folder: a library, packed weights, a program to
# run on the device, and the ONNX model that it must equal. Here for this machine, which can run it.

with tempfile.TemporaryDirectory() as folder:
    artifact = sparsec.compile(
        exported,
        target="host",
        passes=["prune:sparsity=0.75,block=4x1,include=pointwise"],
        output=Path(folder) / "tour.sparsec",
    )
    say("artifact", *sorted(f"{path.name} {path.stat().st_size:,} B" for path in artifact.path.iterdir()))
    assert artifact.manifest["passes"][0]["name"] == "prune"
    assert (artifact.path / "model.onnx").read_bytes() == model_bytes(model)

    image = np.random.default_rng(1).standard_normal((1, 3, 16, 16)).astype(np.float32)
    logits = artifact.run({"x": image})["logits"]
    allowed = artifact.manifest["tolerances"]["logits"]  # from the lengths of its sums, not from what happened to pass
    assert artifact.verify().passed

# ONNX Runtime on the rewritten model is the reference. Asked for inner values too, it shows our activation, and that the
# kernel by hand, with the Add and the Clip of its epilogue, is what the layer computes.

inner = onnx.load_model_from_string(model_bytes(model))
inner.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, C, 8, 8]) for name in "bcg")
session = ort.InferenceSession(inner.SerializeToString(), providers=["CPUExecutionProvider"])
reference = dict(zip([value.name for value in session.get_outputs()], session.run(None, {"x": image}), strict=True))

b, c, g = (reference[name].reshape(C, 64) for name in "bcg")
ours = np.clip(by_hand(c) + b, 0, 6)
say(
    "one product",
    f"{w:.6f} * {c[ic, pixel]:.6f} is one of {np.count_nonzero(weight[oc])} that make y[{oc}, {pixel}] = {ours[oc, pixel]:.6f}",
)
assert np.allclose(ours, g, atol=1e-5)

error = np.abs(logits - reference["logits"]).max() / np.abs(reference["logits"]).max()
say("verify", f"relative error of the artifact {error:.1e}; rounding explains {allowed:.1e}")
assert error <= allowed

print("\nThat is the whole line: load, rewrite, lower, build, pack, verify.")
