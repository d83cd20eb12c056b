"""DFT and STFT as products with a constant matrix, for the lengths that are known at compile time.

    X[k] = sum_j x[j] e^(-2 pi i j k / n)                k = 0 .. n - 1, or 0 .. n // 2 with onesided
    x[j] = sum_k X[k] e^(+2 pi i j k / n) / n            inverse; onesided: X[n - k] = conj X[k], and x is real

A complex number is a pair on the last axis, so that a complex product is one real matrix [N * 2, K * 2]. Costs n^2, not
n log n: signals of a few thousand samples, as audio models have. https://onnx.ai/onnx/operators/onnx__DFT.html
"""

from __future__ import annotations

import math

import numpy as np
import onnx

from sparsec.lowering.expansions.context import Chain, Context, ExpansionError, attribute, numpy_type

LIMIT = 1 << 24  # elements of the matrix


def fourier(n: int, given: int, parts: int, inverse: bool, onesided: bool) -> tuple[np.ndarray, int, int]:
    """The matrix [given * parts, made * parts out], `made` and `parts` of the result, float64.

    `n`: the length of the transform; `given`: samples there are (more than n are left out, fewer mean zeros); `parts`:
    1 for real samples, 2 for complex ones.
    """
    half = n // 2 + 1
    made = half if onesided and not inverse else n
    used = min(given, half if onesided and inverse else n)
    if made * given * 4 > LIMIT:
        raise ExpansionError(f"a DFT of {n} values is too long for a matrix")
    angle = 2 * math.pi / n * (np.outer(np.arange(used), np.arange(made)) % n)
    cos, sin = np.cos(angle), np.sin(angle) * (1 if inverse else -1)
    if onesided and inverse:  # the other half adds the conjugate of each but the first and, for even n, the middle
        weight = np.full((used, 1), 2.0)
        weight[0] = 1
        if n % 2 == 0 and used == half:
            weight[-1] = 1
        whole = np.stack([cos * weight, -sin * weight], axis=1)[..., None] / n
        whole = whole[:, :parts]
    else:
        whole = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], axis=1)[:, :parts]
        whole = whole / n if inverse else whole
    matrix = np.zeros((given, parts, made, whole.shape[-1]))
    matrix[:used] = whole
    return matrix.reshape(given * parts, -1), made, whole.shape[-1]


def dft(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto]:
    """Along one axis, the last one being the pairs."""
    x, length, axis_name = [*node.input, "", ""][:3]
    shape = context.shape(x)
    axis = int(context.value(axis_name).reshape(())) if axis_name else int(attribute(node, "axis", -2))
    axis %= len(shape)
    inverse, onesided = bool(attribute(node, "inverse", 0)), bool(attribute(node, "onesided", 0))
    default = 2 * (shape[axis] - 1) if inverse and onesided else shape[axis]
    n = int(context.value(length).reshape(())) if length else default
    matrix, made, parts = fourier(n, shape[axis], shape[-1], inverse, onesided)
    last = len(shape) - 1
    order = [*(d for d in range(last) if d != axis), axis, last]
    rest = [shape[d] for d in order[:-2]]
    chain = Chain(context, node.output[0])
    rows = chain.add("Reshape", chain.add("Transpose", x, perm=order), chain.const([*rest, matrix.shape[0]]))
    product = chain.add("MatMul", rows, chain.const(matrix, numpy_type(context.element(x))))
    pairs = chain.add("Reshape", product, chain.const([*rest, made, parts]))
    chain.add("Transpose", pairs, perm=[order.index(d) for d in range(len(shape))], result=node.output[0])
    return chain.nodes


def stft(node: onnx.NodeProto, context: Context) -> list[onnx.NodeProto]:
    """Frames by a gather, the window in the matrix where it is constant."""
    x, step_name, window, length = [*node.input, "", ""][:4]
    shape = context.shape(x)
    size = int(context.value(length).reshape(())) if length else context.shape(window)[0]
    step, kind = int(context.value(step_name).reshape(())), numpy_type(context.element(x))
    frames = 1 + (shape[1] - size) // step
    parts = shape[2] if len(shape) == 3 else 1
    matrix, made, out = fourier(size, size, parts, False, bool(attribute(node, "onesided", 1)))
    chain = Chain(context, node.output[0])
    taken = chain.const(step * np.arange(frames)[:, None] + np.arange(size))
    framed = chain.add("Reshape", chain.add("Gather", x, taken, axis=1), chain.const([shape[0], frames, size, parts]))
    if window in context.initializers:
        matrix = matrix * context.value(window).astype(np.float64).repeat(parts)[:, None]
    elif window:
        framed = chain.add("Mul", framed, chain.add("Reshape", window, chain.const([size, 1])))
    rows = chain.add("Reshape", framed, chain.const([shape[0], frames, size * parts]))
    product = chain.add("MatMul", rows, chain.const(matrix, kind))
    chain.add("Reshape", product, chain.const([shape[0], frames, made, out]), result=node.output[0])
    return chain.nodes
