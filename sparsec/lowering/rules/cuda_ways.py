"""The ways to run one layer on a CUDA device, of which predicted time chooses one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsec.kernels.cuda.base import DeviceCall
from sparsec.lowering.match import Group
from sparsec.lowering.prices import KEEP
from sparsec.lowering.rules.base import Taken
from sparsec.lowering.rules.cuda_base import Launched, emit_device
from sparsec.lowering.structure import Structure
from sparsec.program import Candidate

MARGIN = 0.95  # of the dense time: what is gained must be more than the models of both may err by


@dataclass(frozen=True)
class DeviceWay:
    """One way to run a layer: a kernel, its predicted time, and what binds its calls. `parts`: float32 sums that the first
    of two calls leaves to the second. `kept`: weights stay the integers that they are in the model."""

    kernel: str
    us: float
    sparse: bool
    bind: Callable[..., DeviceCall | Sequence[DeviceCall]] = field(repr=False)
    parts: int = 0
    kept: bool = False


def take_way(
    group: Group, ways: Sequence[DeviceWay], structure: Structure, inputs: Mapping[str, ir.Value], w: np.ndarray,
    bias: np.ndarray | None,
) -> Taken:  # fmt: skip
    """The layer by one of `ways`, all of them reported."""
    ranked = sorted(ways, key=lambda way: way.us)
    way = choose_way(ranked)
    bound = way.bind(bias=bias, activation=group.activation, residual=group.residual)
    calls = [bound] if isinstance(bound, DeviceCall) else list(bound)
    inputs = dict(inputs) | ({"residual": group.other} if group.other is not None else {})
    launches: Any = calls[0]
    between: dict[str, tuple[tuple[int, ...], str]] | None = None
    if len(calls) > 1:
        launches = [Launched(calls[0], writes=("parts",)), Launched(calls[1])]
        between = {"parts": ((way.parts,), "float32")}
    candidates = tuple(Candidate(item.kernel, round(item.us, 3)) for item in ranked)
    emit = emit_device(
        group, launches, inputs, reason_of(ranked, way), way.us, between=between, weight=w, structure=str(structure),
        candidates=candidates,
    )  # fmt: skip
    return Taken(group, emit)


def choose_way(ranked: Sequence[DeviceWay]) -> DeviceWay:
    """What runs the layer, of ways that are sorted by time: integers stay as they do on CPUs, and zeros must pay."""
    cheapest = ranked[0]
    kept = next((way for way in ranked if way.kept), None)
    if kept is not None and kept.us <= KEEP * cheapest.us:
        return kept
    dense = next(way for way in ranked if not way.sparse)
    return dense if cheapest.sparse and cheapest.us > MARGIN * dense.us else cheapest


def reason_of(ranked: Sequence[DeviceWay], way: DeviceWay) -> str:
    """Why `way` of `ranked` runs the layer."""
    kept = next((item for item in ranked if item.kept), None)
    if kept is not None:
        floats = next(item for item in ranked if not item.kept)
        texts = f"kept as integers {kept.us:.1f} us", f"as floats {floats.us:.1f} us"
        return f"weights {', '.join(texts if way.kept else texts[::-1])}"
    dense = next(item for item in ranked if not item.sparse)
    if way.sparse:
        return f"predicted {way.us:.1f} us, dense {dense.us:.1f} us"
    sparse = next(item for item in ranked if item.sparse)
    return f"below break-even: dense {dense.us:.1f} us, best sparse {sparse.kernel} {sparse.us:.1f} us"
