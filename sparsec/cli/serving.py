"""`sparsec serve`: artifacts in the browser."""

from __future__ import annotations

import click

from sparsec.cli.options import PREPROCESS
from sparsec.terminal import note


@click.command("serve")
@click.argument("paths", metavar="ARTIFACT...", nargs=-1, required=True)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option("--labels", metavar="FILE|NAME,...", help="Names of the classes.")
@PREPROCESS
@click.option("-v", "--verbose", is_flag=True, help="Show where an internal error comes from.")
def serve_verb(paths: tuple[str, ...], port: int, labels: str | None, preprocess: str | None, verbose: bool) -> None:
    """A page on this machine that runs WebAssembly artifacts beside each other in the browser."""
    from sparsec.artifact import load
    from sparsec.serving import Server, read_labels

    with Server([load(path) for path in paths], port, read_labels(labels), preprocess) as server:
        note(f"open {server.url} in a browser; Ctrl-C ends")
        server.serve_forever()
