"""Moves of quantized tensors, done on their integers: DequantizeLinear after them, QuantizeLinear before.

With DQ and Q of one scale for the whole tensor, and f an operator that only moves, selects or repeats values,

    f(DQ(q)) = DQ(f(q))         Q(f(x)) = f(Q(x))         Q(Concat(x1, x2)) = Concat(Q(x1), Q(x2))
    Concat(DQ(q1), DQ(q2)) = DQ(Concat(q1, q2))           Q(DQ(q)) = q                  all of one scale and zero point

Maxima select too: Q and DQ keep the order of values. Padding with a constant c becomes padding with Q(c), which is
exact behind a Q; behind a DQ only where c is one of its values. All hold bit by bit. What is left are moves of bytes, an
eighth part of whose traffic float32 would be, and Q and DQ that meet what they can be fused with; a Q of another scale
than the DQ before it is a table of 256 bytes. A constant behind a Q is stored as integers.

A Q goes up only if nobody else reads the values that move, and not where it would quantize an input of the model that
the move makes smaller. A DQ that others read stays for them.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from sparsec.kernels import planes, pool_int8
from sparsec.kernels.quantized import QuantType
from sparsec.lowering.match import attribute, constant, dims, only_consumer
from sparsec.lowering.quantized import source, type_of
from sparsec.passes.normalization.normalize_qdq import MOVES


def move_integers(model: ir.Model) -> ir.Model:
    """`model`, or a copy whose quantized tensors are moved as integers."""
    nodes = [node for node in model.graph if node.op_type in ("DequantizeLinear", "QuantizeLinear")]
    if not any(_near_move(node) for node in nodes):
        return model
    model = model.clone()
    _Mover(model.graph).run()
    return model


def _near_move(node: ir.Node) -> bool:
    if node.op_type == "QuantizeLinear":
        maker = node.inputs[0].producer() if node.inputs[0] is not None else None
        return maker is not None and (_moves(maker) or constant(node.inputs[0]) is not None)
    return any(_moves(use.node) for use in node.outputs[0].uses())


def _moves(node: ir.Node) -> bool:
    """Whether f(DQ(q)) = DQ(f(q)) for what it reads first, but for constants it pads with."""
    match node.op_type:
        case "Concat" | "Identity" | "GlobalMaxPool" | "ReduceMax":
            return True
        case "Resize":
            mode, where = attribute(node, "mode", "nearest"), attribute(node, "coordinate_transformation_mode", "")
            return mode == "nearest" and where != "tf_crop_and_resize"
        case "MaxPool":
            return len(node.outputs) == 1 and _sees_elements(node)
        case "Pad":
            given = node.inputs[2] if len(node.inputs) > 2 else None
            return given is None or constant(given) is not None
    return node.op_type in MOVES


def _sees_elements(node: ir.Node) -> bool:
    """Whether no window of a MaxPool lies in the padding alone, where its maximum is -inf."""
    size, kernel = dims(node.inputs[0])[2:], tuple(attribute(node, "kernel_shape", ()))  # type: ignore[arg-type]
    if attribute(node, "auto_pad", "NOTSET") != "NOTSET":
        return True  # as much padding as a window needs, always less than a window
    rank = len(kernel)
    strides, dilations = (tuple(attribute(node, name, (1,) * rank)) for name in ("strides", "dilations"))
    pads, ceil = tuple(attribute(node, "pads", (0,) * (2 * rank))), bool(attribute(node, "ceil_mode", 0))
    return all(
        pool_int8.refusal(
            planes.Window(1, size[i], (1, kernel[i]), (1, strides[i]), (0, pads[i], 0, pads[rank + i]), (1, dilations[i]), ceil)
        ) is None
        for i in range(rank)
    )  # fmt: skip


class _Mover:
    """One rewriting of a graph that nobody else holds."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.names = {str(v.name) for v in (*graph.inputs, *graph.initializers.values()) if v.name}
        self.names |= {str(v.name) for node in graph for v in node.outputs if v.name}

    def run(self) -> None:
        """DQ down, Q up, and what then meets goes."""
        for node in list(self.graph):
            if _moves(node):
                self._lower_dequantize(node)
        pending = [node for node in self.graph if node.op_type == "QuantizeLinear"]
        while pending:
            node = pending.pop()
            if not self._cancel(node):
                pending += self._raise_quantize(node)
        for node in reversed(list(self.graph)):
            if not any(y.uses() or y.is_graph_output() for y in node.outputs):
                self.graph.remove(node, safe=True)

    def _fresh(self, name: str) -> str:
        while name in self.names:
            name += "'"
        self.names.add(name)
        return name

    # --- DQ down

    def _lower_dequantize(self, node: ir.Node) -> None:
        """f(DQ(q)) to DQ(f(q)); Concat only if all of it is of one quantization."""
        reals = node.inputs if node.op_type == "Concat" else node.inputs[:1]
        found = [source(value) for value in reals]
        first = found[0]
        if first is None or any(s is None or s.type != first.type for s in found):
            return
        if node.op_type == "Pad" and not self._pad_with_integer(node, first.type, exact=True):
            return
        for i, past in enumerate(found):
            assert past is not None
            node.replace_input_with(i, past.value)
        for real in node.outputs:
            if not (real.uses() or real.is_graph_output()):
                continue
            made = ir.node("DequantizeLinear", [real, *first.through.inputs[1:]], name=first.through.name)
            behind = made.outputs[0]
            behind.name, behind.shape, behind.type = real.name, real.shape, real.type
            real.replace_all_uses_with(behind, replace_graph_outputs=True)
            made.replace_input_with(0, real)
            real.name, real.type = self._fresh(f"{real.name}/integers"), first.value.type
            self.graph.insert_after(node, made)

    def _pad_with_integer(self, node: ir.Node, kind: QuantType, *, exact: bool) -> bool:
        """The constant of a Pad quantized; False, and nothing changed, if it must be `exact` and is not."""
        if attribute(node, "mode", "constant") != "constant":
            return True
        given = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        value = np.float32(0 if given is None else given.reshape(-1)[0])
        stored = kind.quantize(value)
        if exact and not np.array_equal(kind.dequantize(stored), value):
            return False
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        name = self._fresh(f"{node.name}/padding")
        node.replace_input_with(2, self._constant(name, np.asarray(stored, kind.dtype)))
        return True

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self.graph.register_initializer(value)
        return value

    # --- Q up

    def _raise_quantize(self, node: ir.Node) -> list[ir.Node]:
        """Q(f(x)) to f(Q(x)); returns the new QuantizeLinear nodes."""
        y, kind = node.inputs[0], type_of(node)
        move = y.producer() if y is not None else None
        if y is None or kind is None or move is None or not _moves(move) or only_consumer(y) is not node:
            return []
        if any(other.uses() or other.is_graph_output() for other in move.outputs if other is not y):
            return []
        reals = list(move.inputs if move.op_type == "Concat" else move.inputs[:1])
        if any(v is None for v in reals) or any(self._grows(v, y) for v in reals if v is not None):
            return []
        if move.op_type == "Pad":
            self._pad_with_integer(move, kind, exact=False)
        made: list[ir.Node] = []
        for i, real in enumerate(reals):
            assert real is not None
            move.replace_input_with(i, self._quantized(real, node, kind, move, made))
        stored = node.outputs[0]
        name, y.type = stored.name, stored.type
        stored.name = f"{name}/replaced"
        stored.replace_all_uses_with(y, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        y.name = name
        return made

    def _grows(self, x: ir.Value, y: ir.Value) -> bool:
        return x.producer() is None and x.const_value is None and math.prod(dims(x)) > math.prod(dims(y))

    def _quantized(self, x: ir.Value, like: ir.Node, kind: QuantType, move: ir.Node, made: list[ir.Node]) -> ir.Value:
        """Q(x) with the parameters of `like`: a constant, one there is already, or a new node in front of `move`."""
        array = constant(x)
        if array is not None:
            return self._constant(self._fresh(f"{x.name}/integers"), kind.quantize(array))
        for reader, index in x.uses():
            if reader in made and reader.op_type == "QuantizeLinear" and index == 0:
                return reader.outputs[0]
        node = ir.node("QuantizeLinear", [x, *like.inputs[1:]], name=like.name)
        stored = node.outputs[0]
        stored.name, stored.shape, stored.type = self._fresh(f"{x.name}/integers"), x.shape, like.outputs[0].type
        self.graph.insert_before(move, node)
        made.append(node)
        return stored

    def _cancel(self, node: ir.Node) -> bool:
        """Q(DQ(q)) is q; a Q of a constant is one."""
        past, stored, kind = source(node.inputs[0]), node.outputs[0], type_of(node)
        array = constant(node.inputs[0])
        if array is not None and kind is not None and not stored.is_graph_output():
            stored.replace_all_uses_with(self._constant(self._fresh(f"{stored.name}/integers"), kind.quantize(array)))
            self.graph.remove(node, safe=True)
            return True
        if past is None or past.type != kind:
            return False
        q = past.value
        if stored.is_graph_output():
            if q.producer() is None or q.is_graph_output():
                return False  # an input or another output under another name: it must be copied
            q.name, stored.name = stored.name, f"{stored.name}/replaced"
        stored.replace_all_uses_with(q, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        return True
