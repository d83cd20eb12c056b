"""What the command line prints: results on stdout as a table or as one JSON object, progress and notes on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 160  # columns of a table when stdout is no terminal


def strict(value: Any) -> Any:
    """`value` with what JSON lacks (infinity, NaN) as null."""
    if isinstance(value, dict):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps(strict(value), indent=2, ensure_ascii=False, allow_nan=False))


def stdout() -> Console:
    """Where results go; wide if nobody's terminal limits it."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH, soft_wrap=False)


@contextlib.contextmanager
def progress() -> Iterator[Callable[..., None]]:
    """A function `say(what, done=None, total=None)`: a moving line on stderr, silent where that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda what, done=None, total=None: None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("starting") as status:

        def say(what: str, done: int | None = None, total: int | None = None) -> None:
            status.update(escape(f"{what} {done}/{total}" if total else what))

        yield say


def note(text: str) -> None:
    """Something the user should know, on stderr."""
    click.echo(f"note: {text}", err=True)


def listing(key: str, rows: Sequence[dict[str, Any]], as_json: bool, columns: Sequence[str]) -> None:
    """Rows as JSON `{key: rows}` or as a table of `columns`."""
    if as_json:
        print_json({key: list(rows)})
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(_cell(row[column])) for column in columns))
    stdout().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{k}={_cell(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return "+".join(_cell(v) for v in value)
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
