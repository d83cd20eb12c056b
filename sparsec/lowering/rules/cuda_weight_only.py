"""Weights that stay integers beside float activations on CUDA devices: 1 to 8 rows, groups of zeros stored or left out.

The nodes are those that CPUs take (`weight_only`): DequantizeLinear of a constant int8 or int4 weight, by groups of inputs
or by output -> Gemm or MatMul.
"""

from __future__ import annotations

from typing import Any

from sparsec.kernels.cuda import group_matvec
from sparsec.kernels.cuda.base import DeviceCall, Gpu
from sparsec.kernels.integers import Stored
from sparsec.lowering.rules.cuda_ways import DeviceWay


def kept_products(gpu: Gpu, m: int, stored: Stored) -> list[DeviceWay]:
    """The ways to multiply m rows by a weight that stays integers; none where `group_matvec.refusal` has a reason."""
    if group_matvec.refusal(m, stored) is not None:
        return []
    found = []
    for sparse in (False, True):
        if sparse and group_matvec.kept_groups(stored).all():
            continue
        us, tiling = group_matvec.ranked_tilings(gpu, m, stored, sparse)[0]

        def bind(sparse: bool = sparse, tiling: Any = tiling, **options: Any) -> tuple[DeviceCall, ...]:
            return group_matvec.bind(gpu, m=m, stored=stored, sparse=sparse, tiling=tiling, **options)

        name = gpu.named(group_matvec.form_of(stored, sparse).name)
        parts = tiling.splits * m * stored.q.shape[0]
        found.append(DeviceWay(f"{name}, {tiling}", us, sparse, bind, parts, kept=True))
    return found
