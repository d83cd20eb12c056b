"""`ort`: ONNX Runtime on the CPU, the reference. What users and `verify` run models in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsec.errors import ModelError, RuntimeUnavailable, SparsecError
from sparsec.ports import InputSpec, numpy_type
from sparsec.runtimes.base import Arrays, Compiled, Runtime, Session


class OrtSession(Session):
    """A model in ONNX Runtime with `threads` threads inside an operator and one between operators.

    Workers stop spinning when a run ends, so that a runtime measured in between is not slowed down.
    """

    interleaves = True

    def __init__(self, model: bytes | str | Path, threads: int = 1, where: str = "", optimize: bool = True) -> None:
        try:
            from sparsec.proving.ort_session import open_session
        except ImportError as error:
            raise RuntimeUnavailable("ONNX Runtime is missing: pip install onnxruntime", "ort") from error
        self._where = where or (str(model) if not isinstance(model, bytes) else "model")
        entries = {"session.force_spinning_stop": "1"}
        try:
            self._session = open_session(model, threads=threads, optimize=optimize, entries=entries, where=self._where)
        except SparsecError:
            raise
        except Exception as error:  # pybind classes without a common base
            raise ModelError(f"ONNX Runtime does not load it: {_line(error)}", self._where) from error
        self._outputs = [output.name for output in self._session.get_outputs()]

    @property
    def optimized(self) -> bool:
        """Whether the graph is optimized: not where that was not asked for, or ONNX Runtime fails on it."""
        import onnxruntime as ort

        level = self._session.get_session_options().graph_optimization_level
        return bool(level != ort.GraphOptimizationLevel.ORT_DISABLE_ALL)

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """Inputs; a symbolic dimension is 1."""
        return tuple(_spec(node) for node in self._session.get_inputs())

    @property
    def outputs(self) -> list[str]:
        """Output names in order."""
        return list(self._outputs)

    def run(self, inputs: Arrays) -> Arrays:
        try:
            return dict(zip(self._outputs, self._session.run(None, inputs), strict=True))
        except Exception as error:  # pybind classes without a common base
            raise ModelError(f"ONNX Runtime fails: {_line(error)}", self._where) from error

    def once(self, inputs: Arrays) -> Callable[[], object]:
        self.run(inputs)  # errors with their text, not in the middle of a measurement
        session = self._session
        return lambda: session.run(None, inputs)


def _spec(node: Any) -> InputSpec:
    shape = tuple(dim if isinstance(dim, int) else 1 for dim in node.shape)
    return InputSpec(node.name, shape, numpy_type(node.type).name)


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class Ort(Runtime):
    """ONNX Runtime on the artifact's model.onnx."""

    name = "ort"

    def open(self, artifact: Compiled, threads: int | None = None) -> OrtSession:
        path = artifact.path / "model.onnx"
        return OrtSession(path, threads or artifact.manifest["threads"], where=str(path))
