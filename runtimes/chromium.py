"""`chromium`: WebAssembly artifacts in a browser without a window. The page (`js/runner.js`) asks a server of ours on the
loopback address for requests and posts the answers."""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import tempfile
import threading
from http import HTTPStatus
from typing import Any

from sparsec.artifact import Artifact
from sparsec.errors import ArtifactError, RuntimeUnavailable
from sparsec.runtimes.base import Compiled, Runtime
from sparsec.runtimes.web import WebSession, check_target, pack, unpack
from sparsec.serving import Handler, Server

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 600  # seconds for one answer
_LONGEST = 1 << 31  # bytes of an answer


def find_chromium() -> str | None:
    """Path of Chromium or Chrome, or None."""
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


class _Exchange(Handler):
    """The page's server, with requests to fetch and answers to post."""

    server: _Desk

    def do_GET(self) -> None:
        """A file, or at /next the next request when there is one."""
        if self.path != "/next":
            super().do_GET()
            return
        message = self.server.requests.get()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Length", str(len(message)))
        self.end_headers()
        self.wfile.write(message)

    def do_POST(self) -> None:
        """An answer."""
        size = int(self.headers.get("Content-Length", "0"))
        if self.path != "/answer" or not 0 < size <= _LONGEST or not self.local():
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        self.server.answers.put(self.rfile.read(size))
        self.send_response(HTTPStatus.NO_CONTENT)
        self.end_headers()


class _Desk(Server):
    def __init__(self, artifact: Artifact) -> None:
        super().__init__([artifact], handler=_Exchange)
        self.requests: queue.Queue[bytes] = queue.Queue()
        self.answers: queue.Queue[bytes] = queue.Queue()


class ChromiumSession(WebSession):
    """One browser with the model open in its page."""

    def __init__(self, artifact: Compiled, browser: str) -> None:
        super().__init__(artifact)
        self._server = _Desk(Artifact(artifact.path, artifact.manifest))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._profile = tempfile.TemporaryDirectory(prefix="sparsec-", ignore_cleanup_errors=True)
        options = ["--headless", "--disable-gpu", "--no-first-run", f"--user-data-dir={self._profile.name}"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            options.append("--no-sandbox")  # it refuses to start as root otherwise
        nothing: Any = subprocess.DEVNULL
        command = [browser, *options, f"{self._server.url}runner.html"]
        self._process = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing)
        try:
            unpack(self._answer(), self._where)
        except BaseException:
            self.close()
            raise

    def _ask(self, message: bytes) -> bytes:
        self._server.requests.put(message)
        return self._answer()

    def _answer(self) -> bytes:
        for _ in range(PATIENCE):
            try:
                return self._server.answers.get(timeout=1)
            except queue.Empty:
                if self._process.poll() is not None:
                    raise ArtifactError(
                        f"the browser ended with code {self._process.returncode}", self._where
                    ) from None
        raise ArtifactError(f"no answer from the browser in {PATIENCE} s", self._where)

    def close(self) -> None:
        self._server.requests.put(pack({"op": "close"}))
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._server.shutdown()
        self._server.server_close()
        self._profile.cleanup()


class Chromium(Runtime):
    """Chromium on this machine, for artifacts of the target `wasm`."""

    name = "chromium"

    def open(self, artifact: Compiled, threads: int | None = None) -> ChromiumSession:
        check_target(artifact, threads)
        browser = find_chromium()
        if browser is None:
            raise RuntimeUnavailable("no Chromium or Chrome is installed: apt-get install chromium", "chromium")
        return ChromiumSession(artifact, browser)
