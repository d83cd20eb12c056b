"""What the cost model expects of one layer with another weight, without lowering the model: the price for allocation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from sparsec.kernels.base import Machine, roofline_us
from sparsec.kernels.cuda import conv
from sparsec.kernels.cuda.base import Gpu
from sparsec.kernels.cuda.base import roofline_us as device_us
from sparsec.lowering.match import attribute, dims
from sparsec.lowering.prices import SPARSE_FROM, choose
from sparsec.lowering.rules.convolution import price_conv, read_conv
from sparsec.lowering.rules.cuda_sparse import dense_products, sparse_convolutions, sparse_products
from sparsec.lowering.rules.cuda_ways import DeviceWay
from sparsec.lowering.rules.product import price_product
from sparsec.passes.layers import WeightedLayer
from sparsec.targets import Target

Price = Callable[[WeightedLayer, np.ndarray], float]


def layer_price(target: Target) -> Price:
    """A function (layer, weight [OC, IC, KH, KW]) -> microseconds that `lower` would predict for the layer, on one thread of
    a CPU or on the target's GPU.
    """
    machine, gpu = target.machine, target.gpu
    if gpu is not None:
        return lambda layer, weight: predict_device_us(gpu, layer, weight)
    return lambda layer, weight: predict_us(machine, layer, weight)


def predict_us(machine: Machine, layer: WeightedLayer, weight: np.ndarray) -> float:
    """Microseconds of the cheapest way to run `layer` with `weight`; what no kernel takes costs its dense arithmetic."""
    node = layer.node
    x = node.inputs[1 - layer.input_index if layer.op == "MatMul" else 0]
    assert x is not None
    prices: Any = None
    if layer.op == "Conv":
        read = read_conv(node)
        if not isinstance(read, str):
            read = replace(read, w=weight.reshape(read.w.shape).astype(np.float32, copy=False))
            if read.one_pixel:
                prices = price_product(machine, read.x_shape[0], read.w.reshape(read.w.shape[0], -1))
            elif read.groups == 1:
                prices = price_conv(machine, read.geometry, read.w)
    elif layer.input_index == 1 and len(layer.tensor.shape) == 2 and not attribute(node, "transA", 0):
        m = int(np.prod(dims(x)[:-1], dtype=np.int64))
        matrix = np.ascontiguousarray(weight.reshape(layer.shape[:2]), np.float32)
        prices = price_product(machine, m, matrix)
    if prices is not None:
        return float(choose(prices)[0].predicted_us)
    y = dims(node.outputs[0])
    macs = float(np.prod(y, dtype=np.float64)) * layer.size / layer.shape[0]
    return roofline_us(machine, 2.0 * macs, 4.0 * (np.prod(dims(x)) + np.prod(y) + layer.size))


def predict_device_us(gpu: Gpu, layer: WeightedLayer, weight: np.ndarray) -> float:
    """The same on a CUDA device."""
    x = layer.node.inputs[1 - layer.input_index if layer.op == "MatMul" else 0]
    assert x is not None
    ways: list[DeviceWay] = []
    zeros = float(np.mean(weight == 0)) >= SPARSE_FROM
    if layer.op == "Conv":
        read = read_conv(layer.node)
        if not isinstance(read, str):
            w: np.ndarray = weight.reshape(read.w.shape).astype(np.float32, copy=False)
            w_shape: Any = read.w.shape
            shape = conv.Shape(read.x_shape, w_shape, read.strides, read.pads, read.dilations, read.groups)
            if read.one_pixel:
                flat = w.reshape(w.shape[0], -1)
                ways = dense_products(gpu, read.x_shape[0], flat)
                ways += sparse_products(gpu, read.x_shape[0], flat) if zeros else []
            elif read.groups == 1:
                ways = sparse_convolutions(gpu, shape, w) if zeros else []
                dense_us: float = conv.plans(gpu, shape)[0][0]
                return min([dense_us, *(way.us for way in ways)])
    elif layer.input_index == 1 and len(layer.tensor.shape) == 2 and not attribute(layer.node, "transA", 0):
        m = int(np.prod(dims(x)[:-1], dtype=np.int64))
        matrix = np.ascontiguousarray(weight.reshape(layer.shape[:2]), np.float32)
        ways = dense_products(gpu, m, matrix) + (sparse_products(gpu, m, matrix) if zeros else [])
    if ways:
        return min(way.us for way in ways)
    y = dims(layer.node.outputs[0])
    macs = float(np.prod(y, dtype=np.float64)) * layer.size / layer.shape[0]
    moved = float(gpu.item) * (np.prod(dims(x)) + np.prod(y) + layer.size)
    return device_us(gpu, 2.0 * macs, moved, tensor=True)
