"""What a run of the command line gives, and what the tests expect of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[..., tuple[int, str, str]]


def refused(result: tuple[int, str, str], code: int = 2, *says: str) -> None:
    """One line on stderr that names everything in `says`, nothing on stdout."""
    assert result[0] == code, result
    assert result[1] == ""
    assert result[2].startswith("error: ")
    assert result[2].count("\n") == 1, result[2]
    assert "Traceback" not in result[2]
    for text in says:
        assert text in result[2]


def parsed(result: tuple[int, str, str], code: int = 0) -> dict[str, Any]:
    """The one JSON object on stdout."""
    assert result[0] == code, result
    return json.loads(result[1], parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
