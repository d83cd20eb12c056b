"""What is fuzzed: `TARGETS` maps a name to a function of bytes and its seeds.

A function may raise a `SparsecError` of one line, and nothing else. `FuzzFailure` says what else it did.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fuzz.mutations import mutate_bytes, mutate_model
from sparsec.errors import SparsecError
from sparsec.limits import Limits

LIMITS = Limits(memory=1 << 30, seconds=20)


class FuzzFailure(AssertionError):
    """A reader that misbehaved."""


@dataclass(frozen=True)
class Target:
    """`run`: bytes in, nothing out. `mutate`: (bytes, rng, seeds) -> bytes."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    mutate: Callable[..., bytes] = mutate_bytes


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Only errors of ours, of one line."""
    try:
        yield
    except SparsecError as error:
        if "\n" in str(error) or not str(error) or len(str(error)) > 20_000:
            raise FuzzFailure(f"a message of {len(str(error).splitlines())} lines: {str(error)[:300]!r}") from error


@contextlib.contextmanager
def file_of(data: bytes, name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sparsec-fuzz-") as folder:
        path = Path(folder, name)
        path.write_bytes(data)
        yield path


# ---- models


def _model_file(data: bytes) -> None:
    """Parsing, counts, data of tensors; external data finds an empty folder."""
    from sparsec.loading.reading import read_source

    with file_of(data, "m.onnx") as path, one_line():
        read_source(path, LIMITS)


def _model(data: bytes) -> None:
    """All of loading, in its own process. A crash there is an error of one line too, and counted by the caller."""
    from sparsec.loading.load import load_model, model_bytes

    with one_line():
        model_bytes(load_model(data, limits=LIMITS))


@cache
def _models() -> list[bytes]:
    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    def value(name: str, *dims: int | str, kind: int = onnx.TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, dims)

    texts = [
        "g (float[1,4,6,6] x, float[8,4,3,3] w, float[8] b) => (float[1,8,3,3] y) {"
        " c = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w, b) y = Relu(c) }",
        "g (float[N,4] x, int64[2] s) => (float[n,m] y) { r = Shape(x) t = Concat<axis=0>(s, r) u = Slice(t, s, s)"
        " e = Exp(x) y = Reshape<allowzero=0>(e, s) }",
        "g (float[1,8] x) => (float[1,8] y) { m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) q = Softmax<axis=1>(d) y = Mul(q, x) }",
        "g (float[2,3,4] x) => (float[2,4,3] y, float[2,12] z) { y = Transpose<perm=[0,2,1]>(x) z = Flatten(y) }",
        "g (bool c, float[4] x) => (float[4] y) { y = If(c) <then_branch = t () => (float[4] a) { a = Relu(x) },"
        " else_branch = e () => (float[4] b) { b = Neg(x) }> }",
        "g (float[3,4] x) => (float[3,4] y) { n = Constant<value_int: int = 3>() t = Constant<value: tensor = bool {1}>()"
        " y = Loop(n, t, x) <body = b (int64 i, bool go, float[3,4] v) => (bool on, float[3,4] w)"
        " { on = Identity(go) w = Add(v, v) }> }",
        'g (float[1,2,4,4] x, float[4] r) => (float[1,2,8,8] y) { y = Resize<mode="nearest">(x, , r) }',
    ]
    models = [
        onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {o}]> {t}')
        for t, o in zip(texts, (13, 17, 13, 21, 16, 16, 18), strict=True)
    ]
    lstm = helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=3)
    graph = helper.make_graph(
        [lstm], "g", [value("x", 2, 1, 4)], [value("y", 2, 1, 1, 3)], [tensor("w", 1, 12, 4), tensor("r", 1, 12, 3)]
    )
    models.append(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8))
    scales = [numpy_helper.from_array(np.array(v, t), n) for n, v, t in (("s", 0.1, np.float32), ("z", 3, np.uint8))]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
    ]
    nodes.append(helper.make_node("Gemm", ["d", "w"], ["y"], transB=1))
    graph = helper.make_graph(nodes, "g", [value("x", 1, 4)], [value("y", 1, 5)], [*scales, tensor("w", 5, 4)])
    models.append(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8))
    body = helper.make_function(
        "own", "twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 21)]
    )
    graph = helper.make_graph(
        [helper.make_node("twice", ["x"], ["y"], domain="own")], "g", [value("x", 3)], [value("y", 3)]
    )
    models.append(
        helper.make_model(
            graph,
            functions=[body],
            opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("own", 1)],
            ir_version=9,
        )
    )
    outside = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    for key, text in (("location", "w.bin"), ("offset", "0"), ("length", "16")):
        outside.external_data.add(key=key, value=text)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], "g", [value("x", 4)], [value("y", 4)], [outside]
    )
    models.append(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=9))
    return [m.SerializeToString() for m in models]


# ---- files of ours


def _recipe(data: bytes) -> None:
    from sparsec.rewriting.pass_specs import resolve_passes
    from sparsec.rewriting.recipe import load_recipe

    with file_of(data, "r.yaml") as path, one_line():
        recipe = load_recipe(path)
        json.dumps(recipe.document(), default=str)
        resolve_passes((), recipe, ())


RECIPES = [
    b"version: 1\npasses:\n  - fold-constants\n  - prune: {sparsity: 0.8, block: 4x1, include: [a.*, b]}\ntarget: arm\n",
    b"version: 1\npasses: [{prune: {sparsity: 5e-1}}]\ncalibration: c.npz\nshapes: {x: [1, 3, 8, 8], y: 1x2}\n",
    b'{"version": 1, "passes": ["quantize", {"factorize": null}]}',
    b"version: 1\npasses: &a [!!python/object:os.system ls, *a, 2020-01-01, 0x1F, .nan, {? [1] : 2}]\n",
]


def _manifest(data: bytes) -> None:
    from sparsec.manifest import check_manifest, read_json

    with file_of(data, "manifest.json") as path, one_line():
        check_manifest(read_json(path), path.parent)


@cache
def _manifests() -> list[bytes]:
    from sparsec.manifest import FILES
    from sparsec.targets import container

    tensor = {"name": "x", "shape": [1, 4], "dtype": "float32", "quantization": None}
    entry = {"bytes": 3, "sha256": "a" * 64}
    whole = {
        "schema": 1, "name": "m", "target": dict.fromkeys(("name", "cpu", "arch", "os", "runtime", "precision"), "a"),
        "features": ["avx2"], "inputs": [tensor], "outputs": [{**tensor, "name": "y"}], "arena_bytes": 64,
        "scratch_bytes": 0, "weights_bytes": 64, "embed_weights": False, "threads": 1, "bind": {"k": "1"},
        "tools": {"numpy": "2"}, "digests": {"model": "b" * 64, "recipe": None}, "passes": [{"name": "prune"}],
        "notes": ["a"], "tolerances": {"y": 1e-5}, "parity": {"passed": True, "outputs": []},
        "files": {name: entry for name in (*FILES[container("x86_64")], "weights.bin")},
    }  # fmt: skip
    return [json.dumps(whole).encode(), json.dumps(whole, indent=2).encode()]


def _tuning(data: bytes) -> None:
    from sparsec.tuning import read_tuning

    with file_of(data, "t.json") as path, one_line():
        tuning = read_tuning(path)
        json.dumps(tuning.document())
        tuning.nearest({"stored": {"dense": 100}})


@cache
def _tunings() -> list[bytes]:
    from sparsec.tuning import Entry, Measured, Tuning, layer_key

    layer = {"op": "conv", "oc": 8, "stored": {"dense": 100, "4x1": 50}}
    entry = Entry(layer, (Measured("k", 4, 2, 16, 0, 1.0, 2.0), Measured("l", 0, 0, 0, 0, 1.5, 2.5)))
    return [json.dumps(Tuning("cpu", "znver", "abc", {layer_key(layer): entry}).document()).encode()]


def _npz(data: bytes) -> None:
    from sparsec.npz import read_npy, read_npz

    with file_of(data, "d.npz") as path:
        for read in (read_npz, read_npy):
            with one_line():
                read(path)


@cache
def _archives() -> list[bytes]:
    import io

    found = []
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(
            buffer,
            x=np.arange(12, dtype=np.float32).reshape(3, 4),
            label=np.array([1, 2, 3]),
            z=np.zeros((50, 50), bool),
        )
        found.append(buffer.getvalue())
    buffer = io.BytesIO()
    np.save(buffer, np.asfortranarray(np.ones((2, 3), np.int16)))
    return [*found, buffer.getvalue()]


def _masks(data: bytes) -> None:
    from sparsec.masks_io import read_masks

    with file_of(data, "m.npz") as path, one_line():
        read_masks(path)


def _options(data: bytes) -> None:
    from fuzz.options import read

    with one_line():
        read(data)


def _option_texts() -> list[bytes]:
    from fuzz.options import seeds

    return seeds()


TARGETS: dict[str, Target] = {
    "model-file": Target(_model_file, _models, mutate_model),
    "model-bytes": Target(_model_file, _models),
    "model": Target(_model, _models, mutate_model),
    "recipe": Target(_recipe, lambda: RECIPES),
    "manifest": Target(_manifest, _manifests),
    "tuning": Target(_tuning, _tunings),
    "npz": Target(_npz, _archives),
    "masks": Target(_masks, _archives),
    "options": Target(_options, _option_texts),
}
