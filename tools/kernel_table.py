"""Write the table of kernel variants into docs/kernels.md, from the tables in the code. `--check` only compares."""

from __future__ import annotations

import sys
from pathlib import Path

from sparsec import kernels

DOC = Path(__file__).parent.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- table: written by tools/kernel_table.py -->\n", "<!-- end of table -->\n"


def table() -> str:
    """Markdown of every row of every family."""
    lines = ["| name | ONNX operators | weights | type | what |", "|---|---|---|---|---|"]
    for row in kernels.tables():
        lines.append(f"| `{row.name}` | {row.op} | {row.format} | {row.dtype} | {row.text} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Rewrite the document, or with `--check` say whether it is up to date."""
    text = DOC.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    wanted = before + BEGIN + table() + END + rest.split(END)[1]
    if "--check" in sys.argv[1:]:
        if wanted != text:
            print("docs/kernels.md is out of date: run tools/kernel_table.py", file=sys.stderr)
        return int(wanted != text)
    DOC.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
