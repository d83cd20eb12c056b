"""Small models and their artifacts, shared by the tests of runtimes and of the command line."""

from __future__ import annotations

import functools

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import sparsec
from sparsec.artifact import Artifact
from sparsec.runtimes.base import find_runtime


def pair_model() -> onnx.ModelProto:
    """Two inputs, two outputs: x [1, 3, 8, 8] through convolutions to y [1, 4]; state [2, 5], doubled, to `next`."""
    rng = np.random.default_rng(0)
    weights = {
        "w0": rng.standard_normal((16, 3, 3, 3)) * 0.3,
        "b0": rng.standard_normal(16),
        "w1": rng.standard_normal((16, 16, 1, 1)) * 0.3,
        "w2": rng.standard_normal((4, 16)) * 0.3,
        "b2": rng.standard_normal(4),
        "two": np.full((), 2.0),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"], "first_relu"),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], "second"),
        helper.make_node("Relu", ["c1"], ["r1"], "second_relu"),
        helper.make_node("GlobalAveragePool", ["r1"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["y"], "head", transB=1),
        helper.make_node("Mul", ["state", "two"], ["next"], "double"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "pair",
        [value("x", TensorProto.FLOAT, [1, 3, 8, 8]), value("state", TensorProto.FLOAT, [2, 5])],
        [value("y", TensorProto.FLOAT, [1, 4]), value("next", TensorProto.FLOAT, [2, 5])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def pair_inputs(count: int, seed: int = 1) -> list[dict[str, np.ndarray]]:
    """`count` samples for `pair_model`."""
    rng = np.random.default_rng(seed)
    return [
        {"x": rng.standard_normal((1, 3, 8, 8), np.float32), "state": rng.standard_normal((2, 5), np.float32)}
        for _ in range(count)
    ]


@functools.cache
def pair_artifact(target: str = "host", embed_weights: bool = False) -> Artifact:
    """`pair_model` compiled for `target` (arm: linux); compiled once, gone when the tests end."""
    system = "linux" if target == "arm" else None
    return sparsec.compile(pair_model(), target, os=system, embed_weights=embed_weights)


def agree(artifact: Artifact, runtime: str | None, samples: list[dict[str, np.ndarray]]) -> None:
    """`runtime` against ONNX Runtime on the same model, within the artifact's own tolerance."""
    with (
        find_runtime(runtime, artifact).open(artifact) as session,
        find_runtime("ort", artifact).open(artifact) as reference,
    ):
        results = list(session.run_many(samples))
        assert len(results) == len(samples)
        for sample, got in zip(samples, results, strict=True):
            wanted = reference.run(sample)
            assert list(got) == list(wanted)
            for name, array in wanted.items():
                assert got[name].shape == array.shape
                assert got[name].dtype == array.dtype
                allowed = artifact.manifest["tolerances"][name] * np.abs(array).max()
                np.testing.assert_allclose(got[name], array, rtol=0, atol=allowed)
