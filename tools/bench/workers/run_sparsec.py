"""sparsec's artifact through its C API."""

from __future__ import annotations

from typing import Any

from serve import Arrays, Opened, serve

import sparsec
from sparsec.runtimes.native import Native


def open_model(model: str, feed: Arrays, threads: int, options: dict[str, Any]) -> Opened:
    """`model` is an artifact directory."""
    session = Native().open(sparsec.load(model), threads)
    return session.once(feed), lambda: session.run(feed), ""


serve(open_model, lambda: sparsec.__version__)
