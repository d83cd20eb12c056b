"""A small network with two layers alike, for the tests of measured choices, and what they ask of its layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparsec import tuner, tuning
from sparsec.kernels import conv
from sparsec.lowering.prices import Prices
from sparsec.lowering.rules.convolution import price_conv
from sparsec.targets import Target
from sparsec.tuning import Entry, Measured


def pruned(shape: tuple[int, ...], density: float, rows: int, seed: int) -> np.ndarray:
    """A weight of which exactly the share `density` of blocks of `rows` output channels remains."""
    rng = np.random.default_rng(seed)
    blocks = shape[0] // rows * int(np.prod(shape[1:]))
    kept = (rng.permutation(blocks) < density * blocks).reshape(shape[0] // rows, *shape[1:])
    return (rng.standard_normal(shape) * kept.repeat(rows, 0)).astype(np.float32)


def chain_model() -> onnx.ModelProto:
    """x [1, 16, 6, 6] through `one`, `two` (1x1, both 75% zero in 4x1 blocks: one layer for the tuner) and `three` (3x3)."""
    weights = {
        "w1": pruned((16, 16, 1, 1), 0.25, 4, 1),
        "w2": pruned((16, 16, 1, 1), 0.25, 4, 1)[:, ::-1].copy() * 2,
        "w3": np.random.default_rng(3).standard_normal((8, 16, 3, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "one"),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Conv", ["b", "w2"], ["c"], "two"),
        helper.make_node("Conv", ["c", "w3"], ["y"], "three", pads=[1, 1, 1, 1]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "chain",
        [value("x", TensorProto.FLOAT, [1, 16, 6, 6])],
        [value("y", TensorProto.FLOAT, [1, 8, 6, 6])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def prices_of(target: Target, w: np.ndarray, side: int = 6) -> Prices:
    geometry = conv.Geometry((1, w.shape[1], side, side), w.shape)
    return price_conv(target.machine, geometry, w)


def plant(tuned: tuner.Tuned, path: Path, **changes: Any) -> Path:
    """The tuned file with another choice for the layer of `one`: its candidate for which `changes` hold."""
    document = json.loads(tuned.path.read_text())
    [key] = [tuning.layer_key(layer.entry.layer) for layer in tuned.layers if "one" in layer.names]
    rows = document["layers"][key]["candidates"]
    rows.sort(key=lambda row: any(row[name] != value for name, value in changes.items()))
    assert all(rows[0][name] == value for name, value in changes.items())
    path.write_text(json.dumps(document))
    return path


def entry(*times: tuple[float, float]) -> Entry:
    return Entry({}, tuple(Measured("conv_f32_dense", 4, i + 1, 16, 0, p, m) for i, (p, m) in enumerate(times)))
