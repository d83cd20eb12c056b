"""Tools are no package: `tools/` is put on the path so that `bench` imports as it does for `tools/bench/run.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
