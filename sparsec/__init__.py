"""sparsec: an ONNX graph-rewriting compiler for edge deployment.

artifact = sparsec.compile("model.onnx", target="arm", passes=["prune:sparsity=0.8,block=4x1"], output="out/")
outputs = artifact.run({"x": array})
"""

from __future__ import annotations

import importlib as _importlib
import os as _os
from typing import TYPE_CHECKING, Any

# A Python started in the project's root finds this folder before an installed package; its siblings are our parts then.
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if _os.path.isdir(_os.path.join(_root, "passes")) and _os.path.isfile(_os.path.join(_root, "pyproject.toml")):
    __path__.append(_root)

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sparsec.artifact import Artifact, load
    from sparsec.compiler import compile, rewrite
    from sparsec.errors import SparsecError
    from sparsec.images import Images
    from sparsec.rewriting.passes_api import Pass, PassResult
    from sparsec.tuner import tune

# Loaded on first use: `sparsec --help` should not wait for TVM.
_HOMES = {
    "Artifact": "artifact",
    "Images": "images",
    "Pass": "rewriting.passes_api",
    "PassResult": "rewriting.passes_api",
    "SparsecError": "errors",
    "compile": "compiler",
    "load": "artifact",
    "rewrite": "compiler",
    "tune": "tuner",
}
__all__ = ["Artifact", "Images", "Pass", "PassResult", "SparsecError", "compile", "load", "rewrite", "tune"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(_importlib.import_module(f"sparsec.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sparsec' has no attribute {name!r}")
