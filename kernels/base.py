"""What every kernel family shares: the call a family returns for one layer, activations, the machine it is built for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Machine:
    """The facts about a CPU that kernels and the cost model need; a subset of a target.

    `lanes`: float32 lanes of a vector register. `registers`: architectural vector registers. `fma`, `loads`, `uops`:
    sustained per cycle, for full vectors. `lane_fma`: FMA takes one lane of a register as multiplier (Arm), so that
    weights are loaded as vectors instead of broadcast. `group_cycles`: start and end of a register tile. `row_cycles`:
    start of one row's copy into the panel.
    """

    lanes: int
    registers: int
    fma: float
    loads: float
    uops: float
    ghz: float
    l1_bytes: int
    l2_bytes: int
    l2_bytes_per_cycle: float
    memory_gbps: float
    lane_fma: bool
    group_cycles: float = 10.0
    row_cycles: float = 2.0


@dataclass(frozen=True)
class KernelCall:
    """One layer bound to one kernel.

    `func` is a `tvm.tirx.PrimFunc(buffers in the order of roles..., begin: int32, end: int32)`. Roles name what the caller
    must bind: "x", "y", "residual", ... are activations; the keys of `constants` are packed arrays; "scratch" is
    `scratch` bytes private to the worker.
    """

    name: str
    func: Any = field(repr=False)
    roles: tuple[str, ...]
    constants: dict[str, np.ndarray] = field(repr=False)
    tiles: int
    scratch: int = 0
    text: str = ""
