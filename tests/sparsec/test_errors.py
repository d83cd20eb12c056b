"""Messages stay readable whatever stands in a file."""

from __future__ import annotations

from sparsec.errors import ModelError


def test_long_names_are_shortened() -> None:
    error = ModelError(f"node {'n' * 70_000} reads {'v' * 400}", "f" * 500)
    assert len(str(error)) < 1200
    assert "v" * 400 in str(error)
    assert f"{'n' * 200}...{'n' * 100}" in error.message
