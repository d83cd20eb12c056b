"""Fusions of ONNX Runtime that end the process are left out where they would."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest

from sparsec.proving.ort_faults import OF_HALF, left_out

TEXT = """<ir_version: 10, opset_import: ["" : 21]> g (TYPE[17,5,16,3] x) => (TYPE[5,16,3,8] y)
    { a = Transpose<perm=[1,2,3,0]>(x) y = MatMul(a, w) }"""


def model(kind: str) -> onnx.ModelProto:
    made = onnx.parser.parse_model(TEXT.replace("TYPE", kind))
    weight = np.ones((17, 8), np.float16 if kind == "float16" else np.float32)
    made.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return made


def test_only_models_with_float16_lose_a_fusion(tmp_path) -> None:
    assert left_out(model("float16")) == list(OF_HALF)
    assert left_out(model("float")) == []
    path = tmp_path / "m.onnx"
    onnx.save(model("float16"), path)
    assert left_out(path) == left_out(path.read_bytes()) == list(OF_HALF)
    assert left_out(b"no model") == left_out(tmp_path / "none.onnx") == []
    cast = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (bool c, float[2] x) => (float[2] y) { y = If(c) <then_branch = t () => (float[2] a)'
        "{ h = Cast<to=10>(x) a = Cast<to=1>(h) }, else_branch = e () => (float[2] b) { b = Neg(x) }> }"
    )
    assert left_out(cast) == list(OF_HALF)


@pytest.mark.parametrize(
    "open_it",
    [
        "from sparsec.runtimes.ort import OrtSession; OrtSession(sys.argv[1]).run({'x': x})",
        "from sparsec.proving.ort_session import open_session; open_session(onnx.load(sys.argv[1])).run(None, {'x': x})",
        "import onnx_ir as ir; from sparsec.passes.measure.segments import Segment;"
        " Segment(ir.load(sys.argv[1]), ['x'], ['y']).run({'x': x[None]})",
    ],
)
def test_sessions_open_what_ended_the_process(tmp_path, open_it: str) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model("float16"), path)
    code = f"import sys, numpy as np, onnx; x = np.ones((17, 5, 16, 3), np.float16); {open_it}"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
