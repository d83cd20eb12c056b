"""What the runtimes `node` and `chromium` share: requests to an opened model, as `js/requests.js` describes them."""

from __future__ import annotations

import json
import struct
from abc import abstractmethod
from typing import Any

import numpy as np

from sparsec.errors import ArtifactError, RuntimeUnavailable
from sparsec.runtimes.base import Arrays, Compiled, Session, Stats
from sparsec.runtimes.batch import decode, encode, tensor_bytes

WARMUP = 3  # the engine's compilers and the choice of how many runs to time together


def pack(request: dict[str, Any], payload: bytes = b"") -> bytes:
    """A message."""
    text = json.dumps(request).encode()
    return struct.pack("<I", len(text)) + text + payload


def unpack(message: bytes, where: str) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a message. Raises ArtifactError: what the model answered, or a damaged message."""
    try:
        (size,) = struct.unpack_from("<I", message)
        header = json.loads(message[4 : 4 + size])
        payload = message[4 + size :]
        if len(payload) != header.get("bytes", 0):
            raise ValueError(f"{len(payload)} bytes, announced {header.get('bytes', 0)}")
    except (struct.error, ValueError, AttributeError) as error:
        raise ArtifactError(f"the engine's answer is damaged: {error}", where) from error
    if "error" in header:
        raise ArtifactError(str(header["error"]), where)
    return header, payload


def check_target(artifact: Compiled, threads: int | None) -> None:
    """Raise RuntimeUnavailable unless the artifact is a WebAssembly module and one thread will do."""
    target = artifact.manifest["target"]
    if target["arch"] != "wasm32":
        raise RuntimeUnavailable(f"the artifact is for {target['arch']}, not wasm32", str(artifact.path))
    if threads is not None and threads > 1:
        raise RuntimeUnavailable(f"a WebAssembly artifact runs on one thread, got {threads}", str(artifact.path))


class WebSession(Session):
    """A model opened by model.js in some engine; subclasses carry the messages."""

    def __init__(self, artifact: Compiled) -> None:
        self._artifact = artifact
        self._where = str(artifact.path)
        self._memory: int | None = None

    @abstractmethod
    def _ask(self, message: bytes) -> bytes:
        """Send a message and wait for the answer."""

    def run(self, inputs: Arrays) -> Arrays:
        outputs = self._artifact.outputs
        payload = encode(inputs, self._artifact.inputs)
        _, raw = unpack(self._ask(pack({"op": "run", "bytes": len(payload)}, payload)), self._where)
        if len(raw) != tensor_bytes(outputs):
            raise ArtifactError(f"the answer has {len(raw)} bytes, expected {tensor_bytes(outputs)}", self._where)
        return decode(raw, outputs)

    def time(self, inputs: Arrays, runs: int, warmup: int = 1) -> Stats:
        self.run(inputs)
        request = {"op": "time", "runs": runs, "warmup": max(warmup, WARMUP)}
        header, _ = unpack(self._ask(pack(request)), self._where)
        self._memory = int(header["memory"])
        return Stats.of(np.asarray(header["seconds"], np.float64).tolist(), self._memory)

    def peak_bytes(self) -> int | None:
        """The size of the module's memory, weights and activations included."""
        return self._memory
