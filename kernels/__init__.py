"""Kernel families: TIR templates, one file a family, each with a `TABLE` of its variants."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

FAMILIES = (
    "conv",
    "conv.int8",
    "conv.gathered",
    "conv.paired",
    "depthwise",
    "depthwise_int8",
    "gemm",
    "gemm_int8",
    "fc",
    "fc_int8",
    "weight_only",
    "pool",
    "pool_int8",
    "mean_int8",
    "moves_int8",
    "resize_int8",
    "elementwise",
    "elementwise_int8",
    "quantize_int8",
    "lookup_int8",
    "normalize",
    "cuda.gemm",
    "cuda.gemv",
    "cuda.conv",
    "cuda.depthwise",
    "cuda.pool",
    "cuda.normalize",
    "cuda.block_sparse",
    "cuda.vectorwise",
    "cuda.two_four",
    "cuda.group_matvec",
)


def tables() -> tuple[Any, ...]:
    """Every row of every family: `name`, `op`, `format`, `dtype`, `text`, and what the family adds. Imports TVM."""
    rows: list[Any] = []
    for family in FAMILIES:
        if importlib.util.find_spec(f"{__name__}.{family}") is not None:
            rows += importlib.import_module(f"{__name__}.{family}").TABLE
    return tuple(rows)
