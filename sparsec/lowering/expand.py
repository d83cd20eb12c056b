"""ONNX nodes rewritten, before import, into operators that TVM's importer gets right.

Operators the importer lacks are replaced by the function body that ONNX defines for them; operators with many inputs become
chains, because a kernel takes few buffers; Resize becomes gathers at positions computed here, after the formulas of ONNX
and in the precision of ONNX Runtime, because the importer knows only sizes, not scales; OneHot keeps its element type;
QuantizeLinear and DequantizeLinear become the arithmetic that ONNX gives for them, ties to even, scales in blocks too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MANY = 6  # inputs of one kernel; with the output and an intermediate it stays within the ABI's pointers


class ExpansionError(ValueError):
    """The node's attributes ask for something without a lowering."""


@dataclass
class _Context:
    types: Mapping[str, onnx.ValueInfoProto]
    initializers: dict[str, onnx.TensorProto]
    importable: Collection[str]
    opset: int

    def constant(self, name: str, array: np.ndarray) -> str:
        self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def value(self, name: str) -> np.ndarray:
        if name not in self.initializers:
            raise ExpansionError(f"{name!r} must be a constant")
        return numpy_helper.to_array(self.initializers[name])

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.initializers:
            return tuple(self.initializers[name].dims)
        if name not in self.types:
            raise ExpansionError(f"the shape of {name!r} is unknown")
        return tuple(d.dim_value for d in self.types[name].type.tensor_type.shape.dim)

    def element(self, name: str) -> int:
        """The element type of a value, as ONNX numbers it."""
        return int(self.type_of(name).tensor_type.elem_type)

    def is_zero(self, name: str) -> bool:
        return name in self.initializers and not self.value(name).any()

    def type_of(self, name: str) -> onnx.TypeProto:
        if name in self.initializers:
            tensor = self.initializers[name]
            return helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        return self.types[name].type


def expand_nodes(
    nodes: list[onnx.NodeProto],
    types: Mapping[str, onnx.ValueInfoProto],
    initializers: dict[str, onnx.TensorProto],
    importable: Collection[str],
    opset: int,
) -> list[onnx.NodeProto]:
    """`nodes` with some expanded, in order. New constants are added to `initializers`.

    `types`: of every value that is not a constant. `importable`: operators that the importer has.
    """
    context = _Context(types, initializers, importable, opset)
    result: list[onnx.NodeProto] = []
    pending = list(reversed(nodes))
    while pending:
        node = pending.pop()
        expansion = (
            _EXPANSIONS.get(node.op_type, _function_body)(node, context) if node.domain in ("", "ai.onnx") else None
        )
        if expansion is None:
            result.append(node)
        else:
            pending.extend(reversed(expansion))
    return result


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            value = helper.get_attribute_value(attribute)
            return value.decode() if isinstance(value, bytes) else value
    return default


def _chain(node: onnx.NodeProto, context: _Context) -> list[onnx.NodeProto] | None:
    """Concat, Sum, Min, Max of many: the first few, then that with the next few."""
    if len(node.input) <= MANY:
        return None
    head = f"{node.output[0]}/of{len(node.input)}"
    first = helper.make_node(node.op_type, node.input[:MANY], [head], name=node.name)
    second = helper.make_node(node.op_type, [head, *node.input[MANY:]], node.output, name=node.name)
    first.attribute.extend(node.attribute)
    second.attribute.extend(node.attribute)
    return [first, second]


def _mean(node: onnx.NodeProto, context: _Context) -> list[onnx.NodeProto] | None:
    if len(node.input) <= MANY:
        return None
    total, output = f"{node.output[0]}/sum", node.output[0]
    count = context.constant(f"{output}/count", np.array(len(node.input), np.float32))
    return [helper.make_node("Sum", node.input, [total]), helper.make_node("Div", [total, count], [output])]


def _pow(node: onnx.NodeProto, context: _Context) -> list[onnx.NodeProto] | None:
    """Small whole powers as products: exact, vectors instead of a call, and right for negative bases."""
    x, exponent = node.input
    if exponent not in context.initializers or context.value(exponent).size != 1:
        return None
    power = float(context.value(exponent).reshape(()))
    if context.shape(exponent) not in ((), (1,)) or power not in (1, 2, 3, 4) or not context.shape(x):
        return None
    output, square = node.output[0], f"{node.output[0]}/square"
    if power == 1:
        return [helper.make_node("Identity", [x], [output])]
    if power == 2:
        return [helper.make_node("Mul", [x, x], [output])]
    other = x if power == 3 else square
    return [helper.make_node("Mul", [x, x], [square]), helper.make_node("Mul", [square, other], [output])]


def _quantize(node: onnx.NodeProto, context: _Context) -> list[onnx.NodeProto]:
    """saturate(round(x / scale) + zero_point), half to even; the zero point is added before the limits apply."""
    x, scale = node.input[:2]
    zero = node.input[2] if len(node.input) > 2 else ""
    output, real = node.output[0], context.element(scale)
    kind = context.element(zero) if zero else int(_attribute(node, "output_dtype", 0)) or TensorProto.UINT8
    if kind not in _LIMITS or context.element(x) != real:
        raise ExpansionError(f"QuantizeLinear to {TensorProto.DataType.Name(kind)} has no lowering")
    made = _Chain(context, output)
    y = made.add("Round", made.add("Div", x, made.along(node, scale, x)))
    if zero and not context.is_zero(zero):
        y = made.add("Add", y, made.along(node, made.cast(zero, real), x))
    low, high = (context.constant(f"{output}/limit{v}", np.array(v, _numpy(real))) for v in _LIMITS[kind])
    made.add("Cast", made.add("Clip", y, low, high), to=kind, result=output)
    return made.nodes


def _dequantize(node: onnx.NodeProto, context: _Context) -> list[onnx.NodeProto]:
    """(x - zero_point) * scale, the difference in whole numbers."""
    x, scale = node.input[:2]
    zero = node.input[2] if len(node.input) > 2 else ""
    if context.element(x) not in _LIMITS:
        raise ExpansionError(f"DequantizeLinear of {TensorProto.DataType.Name(context.element(x))} has no lowering")
    made = _Chain(context, node.output[0])
    y = made.cast(x, TensorProto.INT32)
    if zero and not context.is_zero(zero):
        y = made.add("Sub", y, made.along(node, made.cast(zero, TensorProto.INT32), x))
    made.add("Mul", made.cast(y, context.element(scale)), made.along(node, scale, x), result=node.output[0])
    return made.nodes


class _Chain:
    """Nodes of an expansion, named after the value they end in."""

    def __init__(self, context: _Context, output: str) -> None:
        self.context, self.output = context, output
        self.nodes: list[onnx.NodeProto] = []

    def add(self, op: str, *inputs: str, result: str = "", **attributes: Any) -> str:
        name = result or f"{self.output}/{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def cast(self, x: str, to: int) -> str:
        """`x` as element type `to`: a constant at once, else by a Cast."""
        if x in self.context.initializers:
            return self.context.constant(f"{self.output}/{x}", self.context.value(x).astype(_numpy(to)))
        return self.add("Cast", x, to=to)

    def along(self, node: onnx.NodeProto, scale: str, x: str) -> str:
        """A scale or zero point of `node` so that it broadcasts against `x`: for all, along an axis, or in blocks."""
        context, shape = self.context, self.context.shape(x)
        own = context.types[scale].type.tensor_type.shape if scale in context.types else None
        size = [d.dim_value for d in own.dim] if own is not None else list(context.value(scale).shape)
        block = int(_attribute(node, "block_size", 0))
        axis = int(_attribute(node, "axis", 1)) % len(shape) if shape else 0
        if int(np.prod(size)) == 1:
            wanted = [1] * len(shape)
        elif block:
            array = context.value(scale).repeat(block, axis=axis)
            return context.constant(f"{self.output}/{scale}/blocks", np.take(array, range(shape[axis]), axis=axis))
        else:
            wanted = [shape[axis] if i == axis else 1 for i in range(len(shape))]
        if size == wanted or not size:
            return scale
        if scale in context.initializers:
            return context.constant(f"{self.output}/{scale}/wide", context.value(scale).reshape(wanted))
        to = context.constant(f"{self.output}/{scale}/shape", np.array(wanted, np.int64))
        return self.add("Reshape", scale, to)


# Of the types that QuantizeLinear makes: what each holds. int32 is only ever read.
_LIMITS: dict[int, tuple[int, int]] = {
    TensorProto.UINT8: (0, 255),
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT16: (0, 65535),
    TensorProto.INT16: (-32768, 32767),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT4: (-8, 7),
    TensorProto.INT32: (-(2**31), 2**31 - 1),
}


def _numpy(kind: int) -> Any:
    return helper.tensor_dtype_to_np_dtype(kind)


def _one_hot(node: onnx.NodeProto, context: _Context) -> list[onnx.NodeProto]:
    indices, depth, values = node.input
    classes = int(context.value(depth).reshape(-1)[0])
    off, on = context.value(values)
    rank = len(context.shape(indices))
    axis = int(_attribute(node, "axis", -1)) % (rank + 1)
    output = node.output[0]
    dtype = helper.tensor_dtype_to_np_dtype(context.type_of(indices).tensor_type.elem_type)
    line = np.arange(classes, dtype=dtype).reshape([-1 if d == axis else 1 for d in range(rank + 1)])
    low = context.constant(f"{output}/zero", np.zeros((), dtype))
    wrap = context.constant(f"{output}/depth", np.array(classes, dtype))
    names = [f"{output}/{part}" for part in ("negative", "wrapped", "index", "column", "equal")]
    return [
        helper.make_node("Less", [indices, low], [names[0]]),
        helper.make_node("Add", [indices, wrap], [names[1]]),
        helper.make_node("Where", [names[0], names[1], indices], [names[2]]),
        helper.make_node("Unsqueeze", [names[2], context.constant(f"{output}/axis", np.array([axis]))], [names[3]]),
        helper.make_node("Equal", [names[3], context.constant(f"{output}/line", line)], [names[4]]),
        helper.make_node(
            "Where", [names[4], context.constant(f"{output}/on", on), context.constant(f"{output}/off", off)], [output]
        ),
    ]


def _resize(node: onnx.NodeProto, context: _Context) -> list[onnx.NodeProto]:
    """One gather an axis and tap, weighted: 1 tap for nearest, 2 for linear, 4 for cubic."""
    x, output = node.input[0], node.output[0]
    mode = str(_attribute(node, "mode", "nearest"))
    transform = str(_attribute(node, "coordinate_transformation_mode", "half_pixel"))
    policy = _attribute(node, "keep_aspect_ratio_policy", "stretch")
    if transform == "tf_crop_and_resize" or _attribute(node, "antialias", 0) or policy != "stretch":
        raise ExpansionError("Resize with antialias, a crop or a kept aspect ratio has no lowering")
    shape = context.shape(x)
    axes = [a % len(shape) for a in _attribute(node, "axes", range(len(shape)))]
    scales = context.value(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(0, np.float32)
    if scales.size:
        sizes = [int(np.floor(np.float32(shape[a]) * s)) for a, s in zip(axes, scales, strict=True)]
        if sizes != [context.shape(output)[a] for a in axes]:
            raise ExpansionError(f"Resize makes {sizes} of {shape}, declared is {context.shape(output)}")
    else:
        sizes = [int(s) for s in context.value(node.input[3])]
        scales = np.array([m / shape[a] for a, m in zip(axes, sizes, strict=True)], np.float32)
    nodes: list[onnx.NodeProto] = []
    for axis, size, scale in zip(axes, sizes, scales, strict=True):
        n = shape[axis]
        if size == n and scale == 1:
            continue
        positions = _positions(n, size, np.float32(scale), transform)
        taps = _taps(node, mode, positions, n)
        terms = []
        for i, (index, weight) in enumerate(taps):
            gathered = f"{output}/{axis}/{i}"
            name = context.constant(f"{gathered}/index", index.astype(np.int64))
            nodes.append(helper.make_node("Gather", [x, name], [gathered], axis=axis))
            if weight is not None:
                column = weight.astype(np.float32).reshape([-1] + [1] * (len(shape) - 1 - axis))
                nodes.append(
                    helper.make_node(
                        "Mul", [gathered, context.constant(f"{gathered}/weight", column)], [f"{gathered}/term"]
                    )
                )
                gathered += "/term"
            terms.append(gathered)
        x = terms[0]
        for i, term in enumerate(terms[1:]):
            nodes.append(helper.make_node("Add", [x, term], [f"{output}/{axis}/sum{i}"]))
            x = f"{output}/{axis}/sum{i}"
    nodes.append(helper.make_node("Identity", [x], [output]))
    return nodes


def _positions(n: int, m: int, scale: np.float32, transform: str) -> np.ndarray:
    """Coordinates in the input, float32 as in ONNX Runtime, of the m outputs along an axis of n."""
    half, out = np.float32(0.5), np.arange(m, dtype=np.float32)
    if transform == "align_corners":
        return out * np.float32(n - 1) / np.float32(m - 1) if m > 1 else out * 0
    if transform == "asymmetric":
        return out / scale
    centred = (out + half) / scale - half
    if transform == "half_pixel":
        return centred
    if transform == "pytorch_half_pixel":
        return centred if m > 1 else out * 0
    if transform == "half_pixel_symmetric":
        return np.float32(n / 2 * (1 - m / (float(scale) * n))) + centred
    raise ExpansionError(f"Resize with coordinate_transformation_mode {transform!r} has no lowering")


def _taps(node: onnx.NodeProto, mode: str, x: np.ndarray, n: int) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Indices and weights whose weighted sum is the result; no weight means 1."""
    if mode == "nearest":
        rounding: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "round_prefer_floor": lambda v: np.ceil(v - np.float32(0.5)),
            "round_prefer_ceil": lambda v: np.floor(v + np.float32(0.5)),
            "floor": np.floor,
            "ceil": np.ceil,
        }
        index = rounding[str(_attribute(node, "nearest_mode", "round_prefer_floor"))](x)
        return [(np.clip(index, 0, n - 1), None)]
    if mode == "linear":
        x = np.clip(x, 0, n - 1)
        low = np.floor(x)
        share = x - low
        return [(low, 1 - share), (np.minimum(low + 1, n - 1), share)]
    if mode == "cubic":
        a = np.float32(_attribute(node, "cubic_coeff_a", -0.75))
        low = np.floor(x)
        t = x - low
        weights = [
            ((a * (t + 1) - 5 * a) * (t + 1) + 8 * a) * (t + 1) - 4 * a,
            ((a + 2) * t - (a + 3)) * t * t + 1,
            ((a + 2) * (1 - t) - (a + 3)) * (1 - t) * (1 - t) + 1,
            ((a * (2 - t) - 5 * a) * (2 - t) + 8 * a) * (2 - t) - 4 * a,
        ]
        indices = [low + d for d in (-1, 0, 1, 2)]
        if _attribute(node, "exclude_outside", 0):
            weights = [np.where((i >= 0) & (i < n), w, 0) for i, w in zip(indices, weights, strict=True)]
            total = np.sum(weights, axis=0)
            weights = [w / total for w in weights]
        return [(np.clip(i, 0, n - 1), w) for i, w in zip(indices, weights, strict=True)]
    raise ExpansionError(f"Resize with mode {mode!r} has no lowering")


def _function_body(node: onnx.NodeProto, context: _Context) -> list[onnx.NodeProto] | None:
    """The function that ONNX defines for an operator the importer lacks."""
    if node.op_type in context.importable or not onnx.defs.has(node.op_type):
        return None
    schema: Any = onnx.defs.get_schema(node.op_type, context.opset)
    plain = [v for v in schema.function_opset_versions if v <= context.opset]
    dependent = [v for v in schema.context_dependent_function_opset_versions if v <= context.opset]
    if plain:
        text = schema.get_function_with_opset_version(max(plain))
    elif dependent and all(i in context.types or i in context.initializers for i in node.input if i):
        types = [context.type_of(i).SerializeToString() if i else b"" for i in node.input]
        text = schema.get_context_dependent_function_with_opset_version(max(dependent), node.SerializeToString(), types)
    else:
        return None
    body = onnx.FunctionProto.FromString(text)
    renamed = dict(zip(body.output, node.output, strict=False))
    renamed.update(zip(body.input, [*node.input, *[""] * (len(body.input) - len(node.input))], strict=False))
    given = {attribute.name: attribute for attribute in node.attribute}
    given = {**{name: a.default_value for name, a in schema.attributes.items() if a.default_value.name}, **given}

    def name_of(value: str) -> str:
        return renamed.get(value, f"{node.output[0]}/{value}") if value else ""

    result = []
    for inner in body.node:
        clone = helper.make_node(
            inner.op_type, [name_of(i) for i in inner.input], [name_of(o) for o in inner.output], domain=inner.domain
        )
        for attribute in inner.attribute:
            if not attribute.ref_attr_name:
                clone.attribute.append(attribute)
            elif attribute.ref_attr_name in given:
                copy = clone.attribute.add()
                copy.CopyFrom(given[attribute.ref_attr_name])
                copy.name = attribute.name
        result.append(clone)
    return result


def _layer_norm(node: onnx.NodeProto, context: _Context) -> list[onnx.NodeProto] | None:
    """Mean and variance over the axes from `axis` on; the importer knows neither other axes nor the other outputs."""
    x, scale, bias = [*node.input, ""][:3]
    rank = len(context.shape(x))
    axis = int(_attribute(node, "axis", -1)) % rank
    dtype = helper.tensor_dtype_to_np_dtype(context.type_of(x).tensor_type.elem_type)
    if dtype != np.float32 or context.opset < 18:  # where the axes of ReduceMean are an attribute
        return None
    output, mean, inverse = [*node.output, "", ""][:3]
    axes = context.constant(f"{output}/axes", np.arange(axis, rank))
    epsilon = context.constant(f"{output}/epsilon", np.array(_attribute(node, "epsilon", 1e-5), dtype))
    one = context.constant(f"{output}/one", np.array(1, dtype))
    names = ["centred", "square", "variance", "shifted", "deviation", "scaled", "weighted"]
    centred, square, variance, shifted, deviation, scaled, weighted = (f"{output}/{name}" for name in names)
    mean, inverse = mean or f"{output}/mean", inverse or f"{output}/inverse"
    return [
        helper.make_node("ReduceMean", [x, axes], [mean], keepdims=1),
        helper.make_node("Sub", [x, mean], [centred]),
        helper.make_node("Mul", [centred, centred], [square]),
        helper.make_node("ReduceMean", [square, axes], [variance], keepdims=1),
        helper.make_node("Add", [variance, epsilon], [shifted]),
        helper.make_node("Sqrt", [shifted], [deviation]),
        helper.make_node("Div", [one, deviation], [inverse]),
        helper.make_node("Mul", [centred, inverse], [scaled]),
        helper.make_node("Mul", [scaled, scale], [weighted if bias else output]),
        *([helper.make_node("Add", [weighted, bias], [output])] if bias else []),
    ]


def _batch_norm(node: onnx.NodeProto, context: _Context) -> list[onnx.NodeProto] | None:
    if _attribute(node, "training_mode", 0):
        raise ExpansionError("BatchNormalization in training mode has no lowering; export the model for inference")
    return None


def _mish(node: onnx.NodeProto, context: _Context) -> list[onnx.NodeProto] | None:
    """x tanh(log(1 + e^x)) = x n / (n + 2) with n = e^x (e^x + 2): no logarithm of a number next to 1."""
    x, output = node.input[0], node.output[0]
    dtype = helper.tensor_dtype_to_np_dtype(context.type_of(x).tensor_type.elem_type)
    if dtype != np.float32:
        return None
    two = context.constant(f"{output}/two", np.array(2, dtype))
    most = context.constant(f"{output}/most", np.array(20, dtype))  # where n / (n + 2) is 1 already
    low, e, plus, n, below, share = (f"{output}/{name}" for name in ("low", "e", "plus", "n", "below", "share"))
    return [
        helper.make_node("Min", [x, most], [low]),
        helper.make_node("Exp", [low], [e]),
        helper.make_node("Add", [e, two], [plus]),
        helper.make_node("Mul", [e, plus], [n]),
        helper.make_node("Add", [n, two], [below]),
        helper.make_node("Div", [n, below], [share]),
        helper.make_node("Mul", [x, share], [output]),
    ]


def _is_inf(node: onnx.NodeProto, context: _Context) -> list[onnx.NodeProto] | None:
    """The importer knows both signs together only."""
    x, output = node.input[0], node.output[0]
    both = _attribute(node, "detect_positive", 1), _attribute(node, "detect_negative", 1)
    if both == (1, 1):
        return None
    if both == (0, 0):
        raise ExpansionError("IsInf that detects no sign has no lowering")
    dtype = helper.tensor_dtype_to_np_dtype(context.type_of(x).tensor_type.elem_type)
    bound = context.constant(f"{output}/infinity", np.array(np.inf if both[0] else -np.inf, dtype))
    return [helper.make_node("Equal", [x, bound], [output])]


def _roi_align(node: onnx.NodeProto, context: _Context) -> list[onnx.NodeProto] | None:
    if _attribute(node, "mode", "avg") == "max":
        raise ExpansionError("RoiAlign with mode max has no lowering")
    return None


_EXPANSIONS: dict[str, Callable[[onnx.NodeProto, _Context], list[onnx.NodeProto] | None]] = {
    "BatchNormalization": _batch_norm,
    "Concat": _chain,
    "IsInf": _is_inf,
    "LayerNormalization": _layer_norm,
    "Mish": _mish,
    "RoiAlign": _roi_align,
    "DequantizeLinear": _dequantize,
    "QuantizeLinear": _quantize,
    "Sum": _chain,
    "Min": _chain,
    "Max": _chain,
    "Mean": _mean,
    "OneHot": _one_hot,
    "Pow": _pow,
    "Resize": _resize,
}
