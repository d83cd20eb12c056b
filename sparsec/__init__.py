"""sparsec: an ONNX graph-rewriting compiler for edge deployment."""

from __future__ import annotations

import os as _os

# A Python started in the project's root finds this folder before an installed package; its siblings are our parts then.
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if _os.path.isdir(_os.path.join(_root, "passes")) and _os.path.isfile(_os.path.join(_root, "pyproject.toml")):
    __path__.append(_root)

__version__ = "0.1.0"
