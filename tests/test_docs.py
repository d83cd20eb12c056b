"""What the documentation shows is run."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_tour(capsys) -> None:
    runpy.run_path(str(DOCS / "tour.py"), run_name="__main__")
    assert "That is the whole line" in capsys.readouterr().out


def test_pass_how_to(tmp_path, capsys) -> None:
    """The worked example of docs/passes.md is a plugin that runs."""
    from sparsec.passes_api import resolve_passes

    text = (DOCS / "passes.md").read_text(encoding="utf-8")
    code = text.split("```python\n", 1)[1].split("```", 1)[0]
    plugin = tmp_path / "scale.py"
    plugin.write_text(code, encoding="utf-8")
    (step,) = resolve_passes(["scale:factor=0.5"], plugins=[plugin])
    assert step.options == {"factor": 0.5}
