"""A page that runs WebAssembly artifacts in the browser: what `sparsec serve` offers on the loopback address.

Only files that a manifest names are given away, and only to a page of this server: a request under another Host name (a
foreign site that resolves to this machine) is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

from sparsec.artifact import Artifact
from sparsec.errors import DataError, RuntimeUnavailable, UsageError
from sparsec.images import Images
from sparsec.manifest import MANIFEST

HOST = "127.0.0.1"
FILES = ("page.html", "page.js", "page.css", "model.js", "requests.js", "runner.html", "runner.js")
TYPES = {
    ".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css", ".json": "application/json",
    ".wasm": "application/wasm",
}  # fmt: skip
_LABEL_BYTES = 1 << 20


def read_labels(spec: str | None) -> list[str]:
    """Names of classes: a text file with one a line, or names with commas between. Raises DataError."""
    if not spec:
        return []
    path = Path(spec)
    if "," in spec and not path.exists():
        return [name.strip() for name in spec.split(",")]
    try:
        if path.stat().st_size > _LABEL_BYTES:
            raise DataError(f"larger than {_LABEL_BYTES} bytes; expected one name a line", spec)
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"cannot read the labels: {reason}", spec) from error


def describe(artifacts: Sequence[Artifact], labels: Sequence[str], preprocess: str | None) -> dict[str, Any]:
    """models.json of the page. Raises UsageError for an artifact that is no WebAssembly."""
    for artifact in artifacts:
        if artifact.manifest["target"]["arch"] != "wasm32":
            found = artifact.manifest["target"]["name"]
            raise UsageError(f"is for {found}; a browser runs what `compile --target wasm` makes", str(artifact.path))
    images = Images.parse(".", preprocess or "")
    means, deviations = (list(v) if isinstance(v, tuple) else [v] for v in (images.mean, images.std))
    return {
        "models": [
            {
                "url": f"/models/{i}/",
                "name": artifact.path.name.removesuffix(".sparsec"),
                "zeros": artifact.report["totals"]["zeros"],
                "bytes": artifact.bytes["weights"] + artifact.bytes["code"],
            }
            for i, artifact in enumerate(artifacts)
        ],
        "labels": list(labels),
        "preprocess": {
            "scale": images.scale, "mean": means, "std": deviations, "color": images.color, "layout": images.layout,
        },
    }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """Answers GET for the page's files and for those of the artifacts."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """One file."""
        if not self.local():
            self.send_error(HTTPStatus.FORBIDDEN, "only for pages of this machine")
            return
        found = self.server.find(self.path.partition("?")[0])
        if found is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        name, data = found
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", TYPES.get(Path(name).suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")  # these two make the browser's clock finer
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(data)

    def local(self) -> bool:
        """Whether the request is to this machine by its own name."""
        return self.headers.get("Host", "").rpartition(":")[0] in (HOST, "localhost")

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


class Server(ThreadingHTTPServer):
    """The page for some artifacts. `port` 0: any free one. Raises RuntimeUnavailable if it is taken."""

    daemon_threads = True

    def __init__(
        self, artifacts: Sequence[Artifact], port: int = 0, labels: Sequence[str] = (), preprocess: str | None = None,
        handler: type[Handler] = Handler,
    ) -> None:  # fmt: skip
        self.artifacts = list(artifacts)
        self.document = json.dumps(describe(artifacts, labels, preprocess)).encode()
        try:
            super().__init__((HOST, port), handler)
        except OSError as error:
            raise RuntimeUnavailable(
                f"cannot be opened: {error.strerror}; choose another --port", f"port {port}"
            ) from error

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"

    def find(self, path: str) -> tuple[str, bytes] | None:
        """Name and content of what is at `path`, or None."""
        name = path[1:] or "page.html"
        if name in FILES:
            return name, resources.files("sparsec.runtimes.js").joinpath(name).read_bytes()
        if path == "/models.json":
            return path, self.document
        match path.split("/"):
            case ["", "models", index, name] if index.isdecimal() and int(index) < len(self.artifacts):
                artifact = self.artifacts[int(index)]
                if name == MANIFEST or name in artifact.manifest["files"]:
                    return name, (artifact.path / name).read_bytes()
        return None
