"""`node`: WebAssembly artifacts in Node, through their own model.js, in a process of its own (`js/runner.mjs`)."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from importlib import resources

from sparsec.errors import ArtifactError, RuntimeUnavailable
from sparsec.runtimes.base import Compiled, Runtime
from sparsec.runtimes.web import WebSession, check_target, unpack

OLDEST = 18  # Node releases below lack what model.js and the runner use
RELAXED = 22  # from here on relaxed SIMD needs no option


def find_node() -> str | None:
    """Path of Node, or None."""
    return shutil.which("node")


def _version(node: str) -> int:
    try:
        text = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeUnavailable(f"cannot be started: {error}", node) from error
    found = re.match(r"v(\d+)\.", text)
    if found is None or int(found[1]) < OLDEST:
        raise RuntimeUnavailable(f"is {text.strip()!r}; Node {OLDEST} or newer is needed", node)
    return int(found[1])


class NodeSession(WebSession):
    """One Node process with the model open in it; messages through its standard streams."""

    def __init__(self, artifact: Compiled, node: str) -> None:
        super().__init__(artifact)
        options = ["--experimental-wasm-relaxed-simd"] if self._relaxed(node) else []
        folder = resources.files("sparsec.runtimes.js")
        command = [node, *options, str(folder.joinpath("runner.mjs")), str(artifact.path.resolve())]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
        try:
            unpack(self._receive(), self._where)
        except BaseException:
            self.close()
            raise

    def _relaxed(self, node: str) -> bool:
        """Whether Node has to be told to allow what the artifact needs."""
        return _version(node) < RELAXED and "relaxed-simd" in self._artifact.manifest["features"]

    def _ask(self, message: bytes) -> bytes:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(message)
            self._process.stdin.flush()
        except OSError as error:
            raise ArtifactError(f"Node ended: {self._last_words()}", self._where) from error
        return self._receive()

    def _receive(self) -> bytes:
        size = self._read(4)
        header = self._read(struct.unpack("<I", size)[0])
        return size + header + self._read(int(json.loads(header).get("bytes", 0)))

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
        check_target(artifact, threads)
        node = find_node()
        if node is None:
            raise RuntimeUnavailable(f"Node {OLDEST} or newer is not installed: apt-get install nodejs", "node")
        return NodeSession(artifact, node)
