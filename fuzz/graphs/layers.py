"""Layers with weights, windows and normalizations."""

from __future__ import annotations

from typing import Any

import numpy as np

from fuzz.graphs.draft import BYTES, F16, F32, I32, REAL, U8, Draft, Value, size


def window(
    d: Draft, sizes: tuple[int, ...], largest: int = 5, dilate: bool = True
) -> tuple[list[int], dict[str, Any]] | None:
    """Output sizes and attributes of a window that slides over `sizes`; None if it does not fit."""
    rank = len(sizes)
    kernel = [d.among([k for k in (1, 1, 2, 3, 3, 5) if k <= largest]) for _ in sizes]
    strides = [d.number(1, 2) for _ in sizes]
    dilations = [d.among((1, 1, 1, 2)) if dilate else 1 for _ in sizes]
    more: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "dilations": dilations}
    auto = d.among(("NOTSET",) * 4 + ("SAME_UPPER", "SAME_LOWER", "VALID"))
    if auto.startswith("SAME"):
        if max(dilations) > 1 or any(k < s for k, s in zip(kernel, strides, strict=True)):
            return None
        return [-(-s // t) for s, t in zip(sizes, strides, strict=True)], more | {"auto_pad": auto}
    pads = [0 if auto == "VALID" else d.number(0, min(2, kernel[i % rank] - 1 + dilate)) for i in range(2 * rank)]
    out = []
    for i, length in enumerate(sizes):
        room = length + pads[i] + pads[i + rank] - dilations[i] * (kernel[i] - 1) - 1
        if room < 0:
            return None
        out.append(room // strides[i] + 1)
    return out, more | ({"auto_pad": auto} if auto == "VALID" else {"pads": pads})


def conv(d: Draft, x: Value) -> None:
    """Conv of one to three dimensions: dense, grouped, depthwise."""
    found = window(d, x.shape[2:]) if x.dtype in REAL and 3 <= x.rank <= 5 else None
    if found is None:
        return
    out, more = found
    n, c = x.shape[:2]
    group = d.among([1, 1, c, *[g for g in (2, 4) if c % g == 0]])
    oc = group * d.among((1, 2, 3, 4, 8)) if group > 1 else d.among((1, 3, 4, 8, 16, 17))
    inputs = [x.name, d.constant(d.weight((oc, c // group, *more["kernel_shape"]), x.dtype))]
    if d.maybe():
        inputs.append(d.constant(d.numbers((oc,), x.dtype)))
    d.add("Conv", inputs, (n, oc, *out), x.dtype, group=group, **more)


def conv_transpose(d: Draft, x: Value) -> None:
    """ConvTranspose of one or two dimensions."""
    if x.dtype not in REAL or x.rank not in (3, 4):
        return
    n, c, *sizes = x.shape
    kernel, strides = [d.number(1, 3) for _ in sizes], [d.number(1, 2) for _ in sizes]
    pads = [d.number(0, k - 1) for k in kernel] * 2
    out = [(s - 1) * t + k - 2 * p for s, t, k, p in zip(sizes, strides, kernel, pads, strict=False)]
    if min(out) < 1:
        return
    group = d.among([1, 1, *[g for g in (2, 4, c) if c % g == 0]])
    each = d.among((1, 2, 3, 8))
    inputs = [x.name, d.constant(d.weight((c, each, *kernel), x.dtype))]
    if d.maybe():
        inputs.append(d.constant(d.numbers((each * group,), x.dtype)))
    d.add(
        "ConvTranspose",
        inputs,
        (n, each * group, *out),
        x.dtype,
        kernel_shape=kernel,
        strides=strides,
        pads=pads,
        group=group,
    )


def pool(d: Draft, x: Value) -> None:
    """MaxPool and AveragePool, local and global; MaxPool of bytes too."""
    if x.rank not in (3, 4, 5) or x.dtype not in (*REAL, *BYTES):
        return
    n, c, *sizes = x.shape
    op = d.among(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool") if x.dtype in REAL else ("MaxPool",))
    if op.startswith("Global"):
        d.add(op, [x.name], (n, c, *[1] * len(sizes)), x.dtype)
        return
    found = window(d, tuple(sizes), 3, dilate=False)
    if found is None:
        return
    out, more = found
    del more["dilations"]
    pads = more.get("pads", [0] * 2 * len(sizes))
    if any(p >= k for p, k in zip(pads, more["kernel_shape"] * 2, strict=True)):
        return
    if op == "AveragePool":
        more["count_include_pad"] = d.number(0, 1)
    d.add(op, [x.name], (n, c, *out), x.dtype, x.rounded, **more)


def product(d: Draft, x: Value) -> None:
    """Gemm and MatMul with a constant or with another value."""
    if x.dtype not in REAL or not x.shape:
        return
    n = d.among((1, 3, 4, 8, 16, 17))
    if x.rank == 2 and d.maybe():
        turned, other = d.number(0, 1), d.number(0, 1)
        m, k = x.shape[::-1] if turned else x.shape
        bias = d.among(((n,), (1, n), (m, n), (m, 1), ()))
        inputs = [x.name, d.constant(d.weight((n, k) if other else (k, n), x.dtype))]
        if d.opset < 11 or d.number(0, 2):
            inputs.append(d.constant(d.numbers(bias, x.dtype)))
        alpha, beta = d.among((1.0, 0.5)), d.among((1.0, 2.0))
        d.add("Gemm", inputs, (m, n), x.dtype, transA=turned, transB=other, alpha=alpha, beta=beta)
        return
    fitting = [v for v in d.values if v.dtype == x.dtype and v.rank == x.rank >= 2 and v.shape[-2] == x.shape[-1]]
    fitting = [
        v for v in fitting if all(1 in (a, b) or a == b for a, b in zip(v.shape[:-2], x.shape[:-2], strict=True))
    ]
    if fitting and d.maybe():
        other_value = d.among(fitting)
        batch = np.broadcast_shapes(x.shape[:-2], other_value.shape[:-2])
        d.broadcasts += x.shape[:-2] != other_value.shape[:-2]
        d.add("MatMul", [x.name, other_value.name], (*batch, x.shape[-2], other_value.shape[-1]), x.dtype)
    elif x.rank >= 2 and d.maybe(4):  # constant in front
        d.add(
            "MatMul",
            [d.constant(d.weight((n, x.shape[-2]), x.dtype)), x.name],
            (*x.shape[:-2], n, x.shape[-1]),
            x.dtype,
        )
    else:
        d.add("MatMul", [x.name, d.constant(d.weight((x.shape[-1], n), x.dtype))], (*x.shape[:-1], n), x.dtype)


def network(d: Draft, x: Value) -> None:
    """Two to four layers of some width, one behind the other: what passes change together."""
    for _ in range(d.number(2, 4)):
        width = d.among((8, 16, 24, 32))
        y: Value | None
        if x.dtype == F32 and x.rank == 4:
            size = d.among((1, 1, 3))
            weight = d.constant(d.weight((width, x.shape[1], size, size)))
            bias = [d.constant(d.numbers((width,), F32))] if d.maybe() else []
            pads, kernel = [size // 2] * 4, [size, size]
            shape = (x.shape[0], width, *x.shape[2:])
            y = d.add("Conv", [x.name, weight, *bias], shape, F32, kernel_shape=kernel, pads=pads)
        elif x.dtype == F32 and x.rank >= 2:
            y = d.add("MatMul", [x.name, d.constant(d.weight((x.shape[-1], width)))], (*x.shape[:-1], width), F32)
        else:
            y = None
        if y is None:
            return
        kind = d.among(("Relu", "Relu", "Sigmoid", ""))
        y = (d.add(kind, [y.name], y.shape, F32) or y) if kind else y
        if y.shape == x.shape and d.maybe():
            y = d.add("Add", [y.name, x.name], y.shape, F32) or y
        x = y


NORMS = (
    "BatchNormalization", "LayerNormalization", "Softmax", "LogSoftmax", "InstanceNormalization", "GroupNormalization",
    "LpNormalization", "LRN", "MeanVarianceNormalization", "RMSNormalization",
)  # fmt: skip


def normalize(d: Draft, x: Value) -> None:
    """Over channels, positions or the last axes; never over one or two numbers, whose variance is rounding."""
    if x.dtype not in (F16, F32) or x.rank < 2:
        return
    op, c, dtype = d.among(NORMS), x.shape[1], x.dtype
    if op == "BatchNormalization":
        positive = np.abs(d.numbers((c,), dtype)) + dtype.type(0.5)
        rest = [d.constant(a) for a in (*(d.numbers((c,), dtype) for _ in range(3)), positive)]
        d.add(op, [x.name, *rest], x.shape, dtype)
    elif op in ("LayerNormalization", "RMSNormalization"):
        axis = d.number(1, x.rank - 1)
        if size(x.shape[axis:]) > 2:
            d.add(op, [x.name, d.constant(d.numbers(x.shape[axis:], dtype))], x.shape, dtype, axis=axis, epsilon=1e-2)
    elif op in ("InstanceNormalization", "GroupNormalization"):
        groups = d.among([g for g in (1, 2, 4, c) if c % g == 0])
        count = size(x.shape[2:]) * (1 if op.startswith("I") else c // groups)
        if x.rank > 2 and count > 2:
            inputs = [x.name, d.constant(d.numbers((c,), dtype)), d.constant(d.numbers((c,), dtype))]
            more: dict[str, Any] = {} if op.startswith("I") else {"num_groups": groups}
            if not more or d.opset >= 21:
                d.add(op, inputs, x.shape, dtype, epsilon=1e-2, **more)
    elif op == "LRN":
        if x.rank == 4:
            d.add(op, [x.name], x.shape, dtype, size=d.among((1, 3, 5)), alpha=0.1)
    elif op == "MeanVarianceNormalization":
        # Of an input alone: ONNX defines it by sqrt(E[x^2] - E[x]^2), which is sqrt of rounding, even of a negative number,
        # for a channel that hardly varies, as behind a Relu.
        if x.rank == 4 and x.shape[0] * x.shape[2] * x.shape[3] > 3 and x in d.inputs:
            d.add(op, [x.name], x.shape, dtype)
    elif op == "LpNormalization":
        long = [axis for axis, size in enumerate(x.shape) if size > 2]
        if long:
            d.add(op, [x.name], x.shape, dtype, axis=d.among(long), p=d.number(1, 2))
    else:
        d.add(op, [x.name], x.shape, dtype, axis=d.number(-x.rank, x.rank - 1))


def recurrent(d: Draft, x: Value) -> None:
    """LSTM, GRU and RNN of a few steps; the sequence, and the last state."""
    if x.dtype != F32 or x.rank != 3 or x.shape[0] > 8:
        return
    op, hidden = d.among(("LSTM", "GRU", "RNN")), d.among((1, 3, 8))
    steps, batch, width = x.shape
    both = d.number(0, 2) == 2
    gates, ways = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 2 if both else 1
    inputs = [x.name, d.constant(0.3 * d.numbers((ways, gates * hidden, width), F32))]
    inputs.append(d.constant(0.3 * d.numbers((ways, gates * hidden, hidden), F32)))
    if d.maybe():
        inputs.append(d.constant(d.numbers((ways, 2 * gates * hidden), F32)))
    direction = "bidirectional" if both else d.among(("forward", "reverse"))
    more: dict[str, Any] = {"linear_before_reset": d.number(0, 1)} if op == "GRU" else {}
    shapes = [(steps, ways, batch, hidden), (ways, batch, hidden)]
    d.add_all(op, inputs, shapes[: d.number(1, 2)], F32, hidden_size=hidden, direction=direction, **more)


def integer_product(d: Draft, x: Value) -> None:
    """MatMulInteger and ConvInteger of bytes that are the same everywhere: exact."""
    if x.dtype not in BYTES or x.rounded or x.rank < 2:
        return
    zero, n = [d.constant(d.among((0, 3)), x.dtype)] if d.maybe() else [], d.among((1, 4, 17))
    found = window(d, x.shape[2:]) if x.rank == 4 else None
    if found and x.dtype == U8:
        out, more = found
        weight = d.constant(d.numbers((n, x.shape[1], *more["kernel_shape"]), U8))
        d.add("ConvInteger", [x.name, weight, *zero], (x.shape[0], n, *out), I32, **more)
    else:
        weight = d.constant(d.numbers((x.shape[-1], n), d.among(BYTES)))
        d.add("MatMulInteger", [x.name, weight, *zero], (*x.shape[:-1], n), I32)
