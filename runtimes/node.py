"""`node`: WebAssembly artifacts in Node, through their own model.js, in a process that `web/runner.mjs` describes."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from importlib import resources
from typing import Any

import numpy as np

from sparsec.errors import ArtifactError, RuntimeUnavailable
from sparsec.runtimes.base import Arrays, Compiled, Runtime, Session, Stats
from sparsec.runtimes.batch import decode, encode, tensor_bytes

OLDEST = 18  # Node releases below lack what model.js and the runner use
RELAXED = 22  # from here on relaxed SIMD needs no option
_LONGEST = 1 << 28  # bytes of an answer's JSON


def find_node() -> str | None:
    """Path of Node, or None."""
    return shutil.which("node")


def _version(node: str) -> int:
    try:
        text = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
        found = re.match(r"v(\d+)\.", text)
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeUnavailable(f"cannot be started: {error}", node) from error
    if found is None or int(found[1]) < OLDEST:
        raise RuntimeUnavailable(f"is {text.strip()!r}; Node {OLDEST} or newer is needed", node)
    return int(found[1])


class NodeSession(Session):
    """One Node process with the model open in it."""

    def __init__(self, artifact: Compiled, node: str) -> None:
        self._artifact = artifact
        self._where = str(artifact.path)
        self._memory: int | None = None
        options = []
        if "relaxed-simd" in artifact.manifest["features"] and _version(node) < RELAXED:
            options.append("--experimental-wasm-relaxed-simd")
        with resources.as_file(resources.files("sparsec.runtimes.web").joinpath("runner.mjs")) as runner:
            command = [node, *options, str(runner), str(artifact.path.resolve())]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            try:
                self._receive()
            except BaseException:
                self.close()
                raise

    def _ask(self, request: dict[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
        text = json.dumps(request).encode()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(struct.pack("<I", len(text)) + text + payload)
            self._process.stdin.flush()
        except OSError as error:
            raise ArtifactError(f"Node ended: {self._last_words()}", self._where) from error
        return self._receive()

    def _receive(self) -> tuple[dict[str, Any], bytes]:
        (size,) = struct.unpack("<I", self._read(4))
        if size > _LONGEST:
            raise ArtifactError(f"Node answers with {size} bytes of text", self._where)
        answer: dict[str, Any] = json.loads(self._read(size))
        if "error" in answer:
            raise ArtifactError(str(answer["error"]), self._where)
        return answer, self._read(int(answer.get("bytes", 0)))

    def _read(self, count: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(count)
        if len(data) < count:
            raise ArtifactError(f"Node ended: {self._last_words()}", self._where)
        return data

    def _last_words(self) -> str:
        _, err = self._process.communicate()
        lines = [line for line in err.decode(errors="replace").splitlines() if "Error" in line]
        return lines[0] if lines else f"exit code {self._process.returncode}"

    def run(self, inputs: Arrays) -> Arrays:
        specs, outputs = self._artifact.inputs, self._artifact.outputs
        payload = encode(inputs, specs)
        _, raw = self._ask({"op": "run", "bytes": len(payload)}, payload)
        if len(raw) != tensor_bytes(outputs):
            raise ArtifactError(f"Node answers with {len(raw)} bytes, expected {tensor_bytes(outputs)}", self._where)
        return decode(raw, outputs)

    def time(self, inputs: Arrays, runs: int, warmup: int = 1) -> Stats:
        self.run(inputs)
        answer, _ = self._ask({"op": "time", "runs": runs, "warmup": warmup})
        self._memory = int(answer["memory"])
        return Stats.of(np.asarray(answer["seconds"], np.float64).tolist(), self._memory)

    def peak_bytes(self) -> int | None:
        """The size of the module's memory, weights and activations included."""
        return self._memory

    def close(self) -> None:
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()


class Node(Runtime):
    """Node on this machine, for artifacts of the target `wasm`."""

    name = "node"

    def open(self, artifact: Compiled, threads: int | None = None) -> NodeSession:
        target = artifact.manifest["target"]
        if target["arch"] != "wasm32":
            raise RuntimeUnavailable(f"the artifact is for {target['arch']}, not wasm32", str(artifact.path))
        if threads is not None and threads > 1:
            raise RuntimeUnavailable(f"a WebAssembly artifact runs on one thread, got {threads}", str(artifact.path))
        node = find_node()
        if node is None:
            raise RuntimeUnavailable(f"Node {OLDEST} or newer is not installed: apt-get install nodejs", "node")
        return NodeSession(artifact, node)
