"""Single operators with their inputs, by kind: what the generic route is held against ONNX Runtime with."""

from __future__ import annotations

from operator_cases import elementwise, moves, quantized, sums
from operator_cases.case import Case, floats, ints, positive

__all__ = ["CASES", "Case", "floats", "ints", "positive"]

CASES = [*elementwise.CASES, *moves.CASES, *sums.CASES, *quantized.CASES]
