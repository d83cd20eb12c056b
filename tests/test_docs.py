"""What the documentation shows is run."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
from harness import run_kernel

from sparsec.targets import find_target, table

DOCS = Path(__file__).parent.parent / "docs"


def test_tour(capsys) -> None:
    runpy.run_path(str(DOCS / "tour.py"), run_name="__main__")
    assert "That is the whole line" in capsys.readouterr().out


def test_pass_how_to(tmp_path, capsys) -> None:
    """The worked example of docs/passes.md is a plugin that runs."""
    from sparsec.rewriting.pass_specs import resolve_passes

    text = (DOCS / "passes.md").read_text(encoding="utf-8")
    code = text.split("```python\n", 1)[1].split("```", 1)[0]
    plugin = tmp_path / "scale.py"
    plugin.write_text(code, encoding="utf-8")
    (step,) = resolve_passes(["scale:factor=0.5"], plugins=[plugin])
    assert step.options == {"factor": 0.5}


def test_kernel_table_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, "tools/kernel_table.py", "--check"], cwd=DOCS.parent, check=False)
    assert done.returncode == 0


def test_kernel_how_to() -> None:
    """The worked example of docs/kernels.md is a kernel that works."""
    text = (DOCS / "kernels.md").read_text(encoding="utf-8")
    example: dict[str, Any] = {}
    exec(compile(text.split("```python\n", 1)[1].split("```", 1)[0], "docs/kernels.md", "exec"), example)
    x = np.random.default_rng(0).standard_normal(3000).astype(np.float32) * 10
    call = example["bind"](find_target("host").machine, size=x.size)
    _, y = run_kernel(call.func, [x, np.full_like(x, np.nan)], call.tiles)
    assert np.array_equal(y, example["reference"](x))


def test_target_how_to() -> None:
    """The stanza of docs/targets.md names only facts that a stanza has, and inherits the rest."""
    text = (DOCS / "targets.md").read_text(encoding="utf-8")
    stanza = tomllib.loads(text.split("```toml\n", 1)[1].split("```", 1)[0])["cpu"]["cortex-a76-2ghz"]
    base = table()["cpu"][stanza.pop("base")]
    known = {**table()["cpu"]["cortex-a53"], **table()["cpu"]["cortex-a55"], **base}
    assert set(stanza) <= set(known)


def test_architecture_names_what_exists() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:sparsec|passes|kernels|runtimes|models|tests|tools|docs)/[\w./-]*\w", text))
    assert len(named) > 30
    lost = [path for path in sorted(named) if not any((DOCS.parent / f"{path}{end}").exists() for end in ("", ".py"))]
    assert lost == []
