"""WebAssembly artifacts: what is in them, what Node and a browser make of them, and what they say of bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import numpy as np
import onnx
import pytest

import sparsec
from sparsec import models
from sparsec.artifact import Artifact, load
from sparsec.errors import ArtifactError, DataError, RuntimeUnavailable, UsageError
from sparsec.runtimes.base import find_runtime
from sparsec.runtimes.chromium import find_chromium
from sparsec.runtimes.node import find_node
from sparsec.serving import Server, read_labels

RUNTIMES = [
    pytest.param("node", marks=pytest.mark.skipif(find_node() is None, reason="Node is not installed")),
    pytest.param("chromium", marks=pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed")),
]
needs_node = pytest.mark.skipif(find_node() is None, reason="Node is not installed")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The demo model with half of its weights gone."""
    folder = tmp_path_factory.mktemp("wasm")
    return sparsec.compile(
        models.build("demo"), "wasm", passes=["prune:sparsity=0.5,block=4x1"], output=folder / "demo.sparsec"
    )


@pytest.fixture
def copy(demo: Artifact, tmp_path: Path) -> Path:
    """An artifact that may be damaged."""
    return Path(shutil.copytree(demo.path, tmp_path / "demo.sparsec"))


def relu() -> onnx.ModelProto:
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[4] x) => (float[4] y) { y = Relu (x) }'
    return onnx.parser.parse_model(text)


def script(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a module in Node that imports the artifact's own model.js."""
    file = folder.parent / "script.mjs"
    file.write_text(text)
    return subprocess.run(["node", *options, str(file)], capture_output=True, text=True, cwd=folder.parent, check=False)


def test_files(demo: Artifact) -> None:
    names = {path.name for path in demo.path.iterdir()}
    assert names == {
        "model.wasm", "model.js", "model.d.ts", "weights.bin", "model.onnx", "parity.bin", "manifest.json", "report.json",
    }  # fmt: skip
    assert demo.manifest["target"]["arch"] == "wasm32"
    assert demo.manifest["features"] == ["simd128"]
    assert demo.bytes["code"] == (demo.path / "model.wasm").stat().st_size < 100_000
    assert load(demo.path).manifest == demo.manifest


def test_declarations(demo: Artifact) -> None:
    text = (demo.path / "model.d.ts").read_text()
    assert '/** float32, 1 x 3 x 32 x 32 */\n  "input": Float32Array;' in text
    assert "run(feeds: Inputs): Outputs;" in text


def test_imports_nothing(demo: Artifact) -> None:
    """An import section (id 2) would make the module need more than its engine."""
    data, sections, at = (demo.path / "model.wasm").read_bytes(), [], 8
    assert data[:8] == b"\0asm\1\0\0\0"
    while at < len(data):
        section, size, shift, at = data[at], 0, 0, at + 1
        while True:
            byte, at = data[at], at + 1
            size, shift = size | (byte & 127) << shift, shift + 7
            if byte < 128:
                break
        sections.append(section)
        at += size
    assert 2 not in sections


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_parity_on_data(demo: Artifact, runtime: str, tmp_path: Path) -> None:
    models.write_data(tmp_path / "held.npz", 40)
    result = demo.verify(data=tmp_path / "held.npz", runtime=runtime)
    assert result.passed
    assert result.accuracy is not None


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_times(demo: Artifact, runtime: str) -> None:
    timing = demo.bench(runs=5, runtime=runtime)
    assert 0 < timing.min_ms <= timing.median_ms <= timing.p90_ms


@needs_node
@pytest.mark.parametrize("cpu", ["mvp", "relaxed-simd"])
def test_other_instruction_sets(cpu: str) -> None:
    artifact = sparsec.compile(models.build("demo"), "wasm", cpu=cpu)
    assert artifact.verify().passed


@needs_node
@pytest.mark.parametrize("cpu", ["simd128", "mvp"])
def test_eight_bits(cpu: str, tmp_path: Path) -> None:
    """The 8-bit kernels on the module's own instructions: sums, byte picks, narrowing."""
    models.write_data(tmp_path / "data.npz", 32)
    artifact = sparsec.compile(
        models.build("demo"),
        "wasm",
        ["prune:sparsity=0.6,block=4x4", "quantize"],
        calibration=tmp_path / "data.npz",
        cpu=cpu,
    )
    kernels = [layer["kernel"] for layer in artifact.report["layers"]]
    for family in ("conv1x1_i8", "conv3x3_i8", "depthwise_int8"):
        assert any(name.startswith(family) for name in kernels) == (cpu == "simd128" or family != "depthwise_int8"), (
            family
        )
    result = artifact.verify(data=tmp_path / "data.npz")
    assert result.passed
    assert result.same_top1 == result.samples


@needs_node
def test_element_types() -> None:
    """64-bit integers travel as BigInt; two inputs and outputs keep their order."""
    text = '<ir_version: 10, opset_import: ["" : 21]> g (int64[2,3] a, int64[2,3] b, float[5] c)'
    text += " => (int64[2,3] sum, float[5] square) { sum = Add (a, b)\n square = Mul (c, c) }"
    model = onnx.parser.parse_model(text)
    artifact = sparsec.compile(model, "wasm")
    feeds = {
        "a": np.full((2, 3), 1 << 40, np.int64), "b": np.arange(6).reshape(2, 3), "c": np.arange(5, dtype=np.float32),
    }  # fmt: skip
    got = artifact.run(feeds)
    np.testing.assert_array_equal(got["sum"], feeds["a"] + feeds["b"])
    np.testing.assert_array_equal(got["square"], feeds["c"] ** 2)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one thread, got 2"):
        sparsec.compile(models.build("demo"), "wasm", threads=2)
    with pytest.raises(UsageError, match=r"keeps weights in weights\.bin"):
        sparsec.compile(models.build("demo"), "wasm", embed_weights=True)
    host = sparsec.compile(relu(), "host")
    with pytest.raises(RuntimeUnavailable, match="not wasm32"):
        find_runtime("node", host).open(host)


@needs_node
def test_threads_are_refused(demo: Artifact) -> None:
    with pytest.raises(RuntimeUnavailable, match="one thread"):
        demo.run({"input": np.zeros((1, 3, 32, 32), np.float32)}, threads=2)


# --- what model.js says ------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    (path / "weights.bin").write_bytes((path / "weights.bin").read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray((path / "weights.bin").read_bytes())
    data[200] ^= 1
    (path / "weights.bin").write_bytes(data)


def edit(key: str, value: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        manifest[key] = value
        (path / "manifest.json").write_text(json.dumps(manifest))

    return change


DAMAGES = {
    "truncated weights": (truncate, "weights.bin has"),
    "a flipped bit": (flip, "bad weights: damaged"),
    "no code": (lambda path: (path / "model.wasm").unlink(), "cannot read"),
    "no JSON": (lambda path: (path / "manifest.json").write_text("{"), "manifest.json"),
    "a missing feature": (edit("features", ["simd128", "simd256"]), "this engine lacks simd256"),
    "another version": (edit("schema", 7), "schema 7"),
}


@needs_node
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged(copy: Path, damage: str) -> None:
    change, text = DAMAGES[damage]
    change(copy)
    done = script(
        copy,
        "import { load, SparsecError } from './demo.sparsec/model.js';\n"
        "try { await load(); } catch (e) { console.log(e instanceof SparsecError, e.message); }\n",
    )
    assert done.stderr == ""
    assert done.stdout.startswith("true ")
    assert text in done.stdout
    assert len(done.stdout.splitlines()) == 1


@needs_node
def test_session_reports_damage(copy: Path) -> None:
    flip(copy)
    artifact = Artifact(copy, json.loads((copy / "manifest.json").read_text()))
    with pytest.raises(ArtifactError, match="bad weights"):
        artifact.run({"input": np.zeros((1, 3, 32, 32), np.float32)})


@needs_node
def test_wrong_inputs(copy: Path) -> None:
    done = script(
        copy,
        "import { load } from './demo.sparsec/model.js';\n"
        "const model = await load();\n"
        "const x = new Float32Array(3 * 32 * 32);\n"
        "for (const feeds of [{}, { input: x.subarray(1) }, { input: new Float64Array(3072) }, { input: x, more: x }]) {\n"
        "  try { model.run(feeds); } catch (e) { console.log(e.message); }\n"
        "}\n"
        "console.log(model.run({ input: x }).logits.length, model.inputs[0].shape.join());\n"
        "model.close();\n"
        "try { model.run({ input: x }); } catch (e) { console.log(e.message); }\n",
    )
    assert done.stdout.splitlines() == [
        "input 'input' is float32: expected a Float32Array, got nothing",
        "input 'input' is 1 x 3 x 32 x 32: expected 3072 values, got 3071",
        "input 'input' is float32: expected a Float32Array, got Float64Array",
        "the model has no input 'more', only input",
        "10 1,3,32,32",
        "the model is closed",
    ]


@needs_node
def test_two_models_beside_each_other(copy: Path) -> None:
    """Instances have memories of their own."""
    done = script(
        copy,
        "import { load } from './demo.sparsec/model.js';\n"
        "const [a, b] = [await load(), await load()];\n"
        "const x = new Float32Array(3072).fill(0.5);\n"
        "const before = a.run({ input: x }).logits;\n"
        "b.run({ input: x.map((v, i) => Math.sin(i)) });\n"
        "b.close();\n"
        "console.log(a.run({ input: x }).logits.every((v, i) => v === before[i]));\n",
    )
    assert done.stdout == "true\n"


# --- the page ------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(demo: Artifact) -> Iterator[Server]:
    with Server([demo], labels=["disk"], preprocess="scale=64,mean=2") as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def get(url: str, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_server_gives_its_files_only(server: Server, demo: Artifact) -> None:
    assert b"<canvas" in get(server.url)[1]
    facts = json.loads(get(f"{server.url}models.json")[1])
    assert facts["models"][0]["name"] == "demo"
    assert facts["preprocess"]["mean"] == [2.0]
    assert get(f"{server.url}models/0/model.wasm")[1] == (demo.path / "model.wasm").read_bytes()
    (demo.path.parent / "secret").write_text("s")
    for path in ("models/0/../secret", "models/0/%2e%2e/secret", "models/1/model.js", "models/0/", "page.py", "../x"):
        assert get(server.url + path)[0] == 404, path
    assert get(server.url, Host="rebound.example:80")[0] == 403


def test_server_refuses_other_targets() -> None:
    host = sparsec.compile(relu(), "host")
    with pytest.raises(UsageError, match="compile --target wasm"):
        Server([host])


def test_port_taken(server: Server, demo: Artifact) -> None:
    with pytest.raises(RuntimeUnavailable, match="choose another --port"):
        Server([demo], server.server_port)


def test_labels(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("cat\ndog\n")
    assert read_labels(str(tmp_path / "names")) == read_labels("cat, dog") == ["cat", "dog"]
    assert read_labels(None) == []
    with pytest.raises(DataError, match="cannot read the labels"):
        read_labels(str(tmp_path / "absent"))
