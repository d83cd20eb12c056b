"""Write every padding as numbers, and pad in the convolution or pooling instead of a node before it.

    auto_pad=SAME_*   pads[i] + pads[i+n] = max((ceil(in / stride) - 1) * stride + (k - 1) * dilation + 1 - in, 0)
                      for each axis i, the odd one at the end (UPPER) or at the begin (LOWER)
    Pad(x, p, 0) -> Conv(pads=q)          = Conv(x, pads=p+q)
    Pad(x, p, 0) -> AveragePool(pads=q)   = AveragePool(x, pads=p+q) counting the padding, if it counted q too or q = 0

Legal for constant zero padding of spatial axes by p >= 0. Not for MaxPool (its padding is -inf) and not where the
pooling's window would lie in the padding altogether (p+q >= k). https://onnx.ai/onnx/operators/onnx__Conv.html
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sparsec.passes.normalization.fold_constants import constant, remove_unused_initializers, static_shape
from sparsec.passes.normalization.windows import automatic_pads
from sparsec.rewriting.passes_api import Context, Pass, PassResult

WINDOWED = ("Conv", "MaxPool", "AveragePool", "LpPool")


@dataclass(frozen=True)
class ExplicitPads(Pass):
    """Resolve auto_pad; fold zero Pad nodes into convolutions and average pooling."""

    name: ClassVar[str] = "explicit-pads"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> PassResult:
        done = []
        for node in list(model.graph):
            if node.domain in ("", "ai.onnx") and node.op_type in WINDOWED:
                resolved = _resolve_auto_pad(node)
                folded = _fold_pad(model.graph, node)
                if resolved or folded:
                    done.append(node.name)
        if done:
            remove_unused_initializers(model.graph)
            Context.of(model).records.append({"padded": done})
        return PassResult(model, bool(done))


def _window(node: ir.Node) -> tuple[list[int], list[int], list[int]] | None:
    """Kernel, strides, dilations."""
    kernel = node.attributes.get_ints("kernel_shape", None)
    if kernel is None:
        shape = static_shape(node.inputs[1]) if node.op_type == "Conv" else None
        if shape is None:
            return None
        kernel = shape[2:]
    n = len(kernel)
    strides = node.attributes.get_ints("strides", None) or [1] * n
    dilations = node.attributes.get_ints("dilations", None) or [1] * n
    return list(kernel), list(strides), list(dilations)


def _resolve_auto_pad(node: ir.Node) -> bool:
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return False
    shape, window = static_shape(node.inputs[0]), _window(node)
    if window is None or shape is None:
        return False
    node.attributes["pads"] = ir.AttrInt64s("pads", automatic_pads(mode, shape[2:], *window))
    del node.attributes["auto_pad"]
    return True


def spatial_zero_pad(node: ir.Node | None, rank: int) -> list[int] | None:
    """Begin and end pads of the spatial axes if the node pads only those, by zeros."""
    if node is None or node.op_type != "Pad" or node.domain not in ("", "ai.onnx"):
        return None
    if node.attributes.get_string("mode", "constant") != "constant":
        return None
    pads, value, axes = (constant(x) for x in [*node.inputs[1:4], None, None, None][:3])
    if pads is None or (pads < 0).any():
        return None
    present = [*node.inputs, None, None, None]
    if (present[2] is not None and value is None) or (present[3] is not None and axes is None):
        return None
    if value is not None and value.reshape(-1)[0] != 0:
        return None
    chosen = list(range(rank)) if axes is None else [int(a) % rank for a in axes.reshape(-1)]
    full = [0] * (2 * rank)
    for i, axis in enumerate(chosen):
        full[axis], full[rank + axis] = int(pads[i]), int(pads[len(chosen) + i])
    if any(full[i] for i in (0, 1, rank, rank + 1)):
        return None
    return full[2:rank] + full[rank + 2 :]


def _fold_pad(graph: ir.Graph, node: ir.Node) -> bool:
    if node.op_type not in ("Conv", "AveragePool") or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return False
    x, window = node.inputs[0], _window(node)
    if x is None or x.shape is None or window is None:
        return False
    pad = x.producer()
    extra = spatial_zero_pad(pad, len(x.shape))
    if extra is None:
        return False
    kernel = window[0]
    own = list(node.attributes.get_ints("pads", None) or [0] * (2 * len(kernel)))
    pads = [a + b for a, b in zip(own, extra, strict=True)]
    if node.op_type == "AveragePool":
        if node.attributes.get_int("ceil_mode", 0) or any(p >= k for p, k in zip(pads, kernel * 2, strict=True)):
            return False
        if any(own) and not node.attributes.get_int("count_include_pad", 0):
            return False
        node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 1)
    node.attributes["pads"] = ir.AttrInt64s("pads", pads)
    node.replace_input_with(0, pad.inputs[0])
    if not pad.outputs[0].uses() and not pad.outputs[0].is_graph_output():
        graph.remove(pad, safe=True)
    return True
