"""What allocation and budgets looked at, as tables: the points of damage or drop against what is removed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from sparsec.budget import Point


def show_fronts(passes: Iterable[Mapping[str, Any]]) -> None:
    """The fronts that allocations saw, of the records of passes; on stderr, if it is a terminal."""
    if not sys.stderr.isatty():
        return
    from rich.console import Console

    for record in passes:
        for detail in record["details"]:
            if "front" in detail:
                Console(stderr=True).print(front_table(detail))


def show_points(points: Sequence[Point]) -> None:
    """What was tried for a budget that nothing holds; on stderr."""
    from rich.console import Console

    rows = sorted((point.record() | {"measured": point.measured} for point in points), key=lambda p: p["speedup"])
    if rows:
        Console(stderr=True).print(_points("tried", rows, None))


def front_table(detail: Mapping[str, Any]) -> Table:
    """Of an allocation's record: the least damage seen for each share of the budget removed."""
    from rich.table import Table

    table = Table(title=f"allocation={detail['allocation']} of {detail['budget']}: {detail['measure']}, "
                  f"{detail['samples']} samples", title_justify="left")  # fmt: skip
    for column in ("removed", "damage, layers summed", "damage, measured", "top class changed"):
        table.add_column(column, justify="right")
    for point in detail["front"]:
        changed = f"{point['changed']:.1%}" if "changed" in point else "-"
        summed = f"{point['predicted']:.4g}" if "predicted" in point else "-"
        style = "bold" if point == detail["chosen"] else None
        table.add_row(f"{point['share']:.0%}", summed, f"{point['damage']:.4g}", changed, style=style)
    return table


def budget_table(facts: Mapping[str, Any]) -> Table:
    """Of a budget's record: every point that was tried, the chosen one bold."""
    return _points(f"{facts['budget']}: {facts['drop']}, {facts['samples']} samples", facts["curve"], facts["chosen"])


def _points(title: str, points: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any] | None) -> Table:
    from rich.table import Table

    timed = any(point.get("measured") is not None for point in points)
    table = Table(title=title, title_justify="left")
    for column in ("block", "zeros", "drop", "predicted", *(["measured"] if timed else []), "recovered", "holds"):
        table.add_column(column, justify="left" if column == "block" else "right")
    for point in points:
        cells = [point["block"], f"{point['zeros']:.1%}", f"{point['drop']:.2%}", f"{point['speedup']:.2f}x"]
        if timed:
            cells.append("-" if point.get("measured") is None else f"{point['measured']:.2f}x")
        cells += ["yes" if point["recovered"] else "", "yes" if point["holds"] else ""]
        table.add_row(*cells, style="bold" if point == chosen else None)
    return table
