"""How many windows a pooling has. Where ONNX's shape inference and its text disagree, the node is written unambiguously.

With ceil_mode the operator page says: windows that would start in the padding at the end are ignored (PyTorch and ONNX
Runtime do so); shape inference up to opset 21 counts them. For an axis with stride s, window span k' = (k - 1) d + 1:

    floor = (in + begin + end - k') // s + 1        ceil = -(-(in + begin + end - k') // s) + 1
    windows = ceil - 1 if (ceil - 1) s >= in + begin else ceil                                     floor or floor + 1

https://onnx.ai/onnx/operators/onnx__MaxPool.html
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sparsec.passes.initializers import add_initializer, free_name

POOLS = ("MaxPool", "AveragePool", "LpPool")


def resolve_ceil_mode(node: ir.Node, shape: tuple[int, ...]) -> bool:
    """Rewrite a pooling of `shape` whose inferred number of windows would be wrong; whether it was rewritten.

    Either ceil_mode=0 and pads that give floor = windows, where padding does not count in the average; or ceil_mode=1
    and pads that give ceil = windows, the input cut where the last window ends before it.
    """
    kernel = list(node.attributes.get_ints("kernel_shape", None) or [])
    if node.op_type not in POOLS or not node.attributes.get_int("ceil_mode", 0) or len(shape) != len(kernel) + 2:
        return False
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return False
    n = len(kernel)
    strides = node.attributes.get_ints("strides", None) or [1] * n
    dilations = node.attributes.get_ints("dilations", None) or [1] * n
    begin, end = _halves(node.attributes.get_ints("pads", None) or [0] * (2 * n))
    wrong, exact, grown = False, [], False
    for size, k, s, d, before, after in zip(shape[2:], kernel, strides, dilations, begin, end, strict=True):
        free = size + before + after - (k - 1) * d - 1
        ceil = -(-free // s) + 1
        windows = ceil - ((ceil - 1) * s >= size + before)
        wrong |= windows != ceil
        exact.append((windows - 1) * s + (k - 1) * d + 1 - size - before)  # padding that the last window reaches
        grown |= windows != free // s + 1
    if not wrong:
        return False
    counted = node.op_type != "MaxPool" and (
        node.op_type == "LpPool" or node.attributes.get_int("count_include_pad", 0)
    )
    longer = [max(e, after) for e, after in zip(exact, end, strict=True)]
    if not (grown and counted) and all(e < k for e, k in zip(longer, kernel, strict=True)):
        node.attributes["ceil_mode"] = ir.AttrInt64("ceil_mode", 0)
        node.attributes["pads"] = ir.AttrInt64s("pads", [*begin, *longer])
        return True
    shorter = [min(e, after) for e, after in zip(exact, end, strict=True)]
    if min(shorter) < 0:
        _cut(node, shape, [min(e, 0) for e in shorter])
    node.attributes["ceil_mode"] = ir.AttrInt64("ceil_mode", 1)
    node.attributes["pads"] = ir.AttrInt64s("pads", [*begin, *(max(e, 0) for e in shorter)])
    return True


def automatic_pads(
    mode: str, size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """Begin and end pads by axis that `auto_pad` (SAME_UPPER, SAME_LOWER or VALID) means."""
    begin, end = [], []
    for length, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        total = max((-(-length // s) - 1) * s + (k - 1) * d + 1 - length, 0) if mode.startswith("SAME") else 0
        less, more = total // 2, total - total // 2
        begin.append(less if mode == "SAME_UPPER" else more)
        end.append(more if mode == "SAME_UPPER" else less)
    return begin + end


def _cut(node: ir.Node, shape: tuple[int, ...], ends: list[int]) -> None:
    """A Slice before `node` that drops what no window reads: -ends[i] elements at the end of spatial axis i."""
    x, graph = node.inputs[0], node.graph
    assert x is not None and graph is not None
    axes = [i for i, e in enumerate(ends) if e]
    numbers = {"starts": [0] * len(axes), "ends": [shape[2 + i] + ends[i] for i in axes], "axes": [2 + i for i in axes]}
    inputs = [add_initializer(graph, f"{node.name}/{k}", np.array(v, np.int64)) for k, v in numbers.items()]
    cut = ir.node("Slice", [x, *inputs], name=f"{node.name}/cut")
    y = cut.outputs[0]
    y.name, y.type = free_name(graph, f"{node.name}/cut"), x.type
    y.shape = ir.Shape([*shape[:2], *(size + e for size, e in zip(shape[2:], ends, strict=True))])
    graph.insert_before(node, cut)
    node.replace_input_with(0, cut.outputs[0])


def _halves(pads: list[int] | tuple[int, ...]) -> tuple[list[int], list[int]]:
    return list(pads[: len(pads) // 2]), list(pads[len(pads) // 2 :])
